"""gated_rms_norm against its equation in float64 and against transformers' module."""

import pytest
import torch
from tolerances import assert_close
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

from twotower.kernels.gated_rms_norm import gated_rms_norm


def draw(tokens, channels, dtype):
    torch.manual_seed(tokens)
    return (
        torch.randn(2, tokens, channels).to(dtype),
        torch.randn(2, tokens, channels).to(dtype),
        torch.randn(channels).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 4, 12])
@pytest.mark.parametrize("tokens", [1, 7])
def test_equals_the_equation(tokens, group_size, dtype):
    x, gate, weight = draw(tokens, 12, dtype)
    g = x.double() * gate.double() * gate.double().sigmoid()
    expected = torch.empty_like(g)
    for start in range(0, 12, group_size):
        group = g[..., start : start + group_size]
        expected[..., start : start + group_size] = group / (group.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    y = gated_rms_norm(x, gate, weight, group_size, 0.1)
    assert y.dtype == dtype
    assert_close(y, weight.double() * expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [4, 12])
def test_equals_transformers_to_the_last_bit(group_size, dtype):
    x, gate, weight = draw(5, 12, dtype)
    module = NemotronHRMSNormGated(12, group_size, eps=1e-5).to(dtype)
    module.weight.data = weight
    assert torch.equal(gated_rms_norm(x, gate, weight, group_size, 1e-5), module(x, gate))
