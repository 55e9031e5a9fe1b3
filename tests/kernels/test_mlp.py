"""mlp: our Triton kernel in the interpreter against torch in float64, and where a layer may use it."""

import pytest
import torch
from ahead import assert_nothing_spills
from tiny import tiny_model
from tolerances import assert_close

from twotower.compat_twotower import ACT2FN
from twotower.kernels import _mlp_triton
from twotower.kernels._mlp_triton import product_tiles, triton_cannot_multiply
from twotower.kernels.mlp import mlp
from twotower.modeling_twotower import TwoTowerMLP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELU2 = ACT2FN["relu2"]


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch):
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: make(*args, **options).fill_(torch.nan))


def draw(shape, hidden=24, inner=40, dtype=torch.float32):
    torch.manual_seed(hidden)
    parts = torch.randn(*shape, hidden), torch.randn(inner, hidden) / hidden**0.5, torch.randn(hidden, inner)
    return [*(part.to(DEVICE, dtype) for part in parts), RELU2]


def exact(parts):
    return mlp(*(part.double() for part in parts[:3]), RELU2, backend="torch")


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 9), (64,), (3, 1, 5)])
@pytest.mark.parametrize("hidden, inner", [(24, 40), (130, 7), (1, 33)])
def test_triton(shape, hidden, inner):
    parts = draw(shape, hidden, inner)
    assert_close(mlp(*parts, backend="triton"), exact(parts))


def test_tensors_that_lie_otherwise():
    parts = draw((4, 3))
    parts[:3] = [part.mT.contiguous().mT for part in parts[:3]]
    assert_close(mlp(*parts, backend="triton"), exact(parts))


def test_what_triton_cannot():
    parts = draw((2,))
    assert triton_cannot_multiply(*parts) is None
    with pytest.raises(ValueError, match=r'"triton": it squares what is positive \(relu2\), not SiLU'):
        mlp(*parts[:3], ACT2FN["silu"], backend="triton")
    assert "computes in float32, x is torch.float64" in triton_cannot_multiply(parts[0].double(), *parts[1:])
    assert "the weights' dtype, torch.float32, x is torch.bf" in triton_cannot_multiply(
        parts[0].bfloat16(), *parts[1:]
    )
    assert "takes 1 to 64 tokens, these are 65" in triton_cannot_multiply(*draw((65,)))
    assert "takes 1 to 64 tokens, these are 0" in triton_cannot_multiply(*draw((0,)))

    class Packed(torch.Tensor):
        pass

    packed = parts[1].as_subclass(Packed)
    assert "plain weights, these are Packed and Tensor" in triton_cannot_multiply(parts[0], packed, *parts[2:])


def layer():
    return next(part for part in tiny_model("all kinds").modules() if isinstance(part, TwoTowerMLP))


def test_a_layer_of_projections_that_are_hooked_computes_them_itself():
    own = layer()
    x = torch.randn(2, 3, own.hidden_size)
    with torch.no_grad():
        expected = own(x)
        own.kernels = own.kernels | {"mlp": "triton"}
        assert_close(own(x), expected)
        own.up_proj.register_forward_hook(lambda module, inputs, output: output + 1)
        with pytest.raises(ValueError, match=r'mlp cannot be computed by "triton": its projections \(Linear\) are'):
            own(x)


def ahead(architecture, dtype, tokens):
    tiles = product_tiles(tokens, 3712, dtype)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(["x", "weight", "out"], {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype])
    return architecture, "few_rows_product", types, {"D": 2688, "N": 3712, "ACTIVATED": True, **tiles}, options


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    cases = [(90, torch.bfloat16, 1), (90, torch.bfloat16, 64), (80, torch.bfloat16, 16), (90, torch.float32, 16)]
    assert_nothing_spills(_mlp_triton, tmp_path, [ahead(*case) for case in cases])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_in_bfloat16_on_a_gpu(tokens):
    parts = draw((tokens,), 2688, 3712, torch.bfloat16)
    assert_close(mlp(*parts, backend="triton"), exact(parts), torch.bfloat16, 2.0)
