"""What was traced with one choice of experts holds for another."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from twotower.kernels._experts_triton import RELU2
from twotower.kernels.routed_experts import routed_experts


def run(*arguments):
    return routed_experts(*arguments, RELU2())


def by_fx(*arguments):
    return make_fx(run)(*arguments)


def by_jit(*arguments):
    return torch.jit.trace(run, arguments, check_trace=False)


@pytest.mark.parametrize("trace", [by_fx, by_jit])
@pytest.mark.parametrize("inner", [72, 70])
def test_a_trace_holds_for_other_experts(trace, inner):
    torch.manual_seed(0)
    x, weights = torch.randn(9, 128), torch.rand(9, 2)
    up, down = torch.randn(16, inner, 128) / 11, torch.randn(16, 128, inner) / 8
    indices = torch.stack([torch.randperm(16)[:2] for _ in range(9)])
    traced = trace(x, indices, weights, up, down)
    other = (x, (indices + 5) % 16, weights, up, down)
    with torch.no_grad():
        torch.testing.assert_close(traced(*other), run(*other))
