"""Kernels in the interpreter, in bfloat16 and of tensors that lie oddly in memory, against torch."""

import sys

import pytest
import torch
from fake_packages import CausalConv1d

from twotower.kernels._causal_conv1d import causal_conv_with_package
from twotower.kernels._experts_triton import RELU2
from twotower.kernels.block_attention import block_attention
from twotower.kernels.causal_conv import causal_conv
from twotower.kernels.gated_rms_norm import gated_rms_norm
from twotower.kernels.routed_experts import routed_experts


def parts(dtype=torch.float32):
    torch.manual_seed(0)
    own = [torch.randn(3, heads, 4, 8).to(dtype) for heads in (4, 2, 2)]
    return [*own, *(torch.randn(3, 2, 9, 8).to(dtype) for _ in range(2))]


def test_attention_multiplies_bfloat16():
    out, expected = (block_attention(*parts(torch.bfloat16), backend=backend) for backend in ("triton", "torch"))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_multiply_bfloat16(tokens):
    torch.manual_seed(0)
    x, up, down = torch.randn(tokens, 24), torch.randn(4, 16, 24) / 5, torch.randn(4, 24, 16) / 4
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    arguments = (x.bfloat16(), indices, torch.rand(tokens, 2), up.bfloat16(), down.bfloat16(), RELU2())
    out, expected = (routed_experts(*arguments, backend=backend).float() for backend in ("triton", "torch"))
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"context_lengths": torch.tensor([9, 0, 3, 0, 5, 0])[::2]},
        {"context_lengths": torch.tensor(4).expand(3)},
        {"context_mask": (torch.arange(27) % 3 > 0).view(9, 3).t()},
        {"block_mask": (torch.arange(12) % 3 > 0).view(4, 3).t()},
    ],
)
def test_lengths_and_masks_may_lie_apart(options):
    out, expected = (block_attention(*parts(), **options, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_gates_and_outputs_may_lie_apart():
    x, gate = torch.randn(3, 5, 12), torch.randn(5, 3, 12).transpose(0, 1)
    weight = torch.randn(12)
    expected = gated_rms_norm(x, gate.contiguous(), weight, 4, 1e-5, backend="torch")
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, 4, 1e-5, backend="torch"), expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 1, 16).expand(-1, 5, -1),
        torch.randn(2, 5, 24)[..., 4:20],  # not at 16 bytes in 16 bits
        torch.randn(2, 5, 20)[..., :16],
        torch.randn(161)[1:].view(2, 5, 16),
    ],
)
def test_causal_conv1d_gets_tokens_of_their_own_at_whole_16_bytes(x, monkeypatch):
    given, package = [], CausalConv1d()
    fn = package.causal_conv1d_fn
    monkeypatch.setattr(package, "causal_conv1d_fn", lambda x, *args, **kw: given.append(x) or fn(x, *args, **kw))
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    weight = torch.randn(16, 4)
    y, _ = causal_conv_with_package(x, weight)
    torch.testing.assert_close(y, causal_conv(x, weight, backend="torch")[0])
    assert given[0].storage_offset() % 8 == 0
    assert given[0].stride() == (80, 1, 16)
