"""routed_experts: each of torch's ways, and our Triton kernels in the interpreter, against the equation in float64."""

import pytest
import torch
import torch.nn.functional as F
from ahead import assert_nothing_spills
from tolerances import assert_close

from twotower.compat_twotower import ACT2FN
from twotower.kernels import _experts_triton
from twotower.kernels._experts_triton import expert_tiles, triton_cannot_route
from twotower.kernels.routed_experts import (
    all_experts,
    copied_experts,
    experts_in_turn,
    grouped_experts,
    routed_experts,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELU2 = ACT2FN["relu2"]


class Packed(torch.Tensor):
    """As quantisers put in the place of weights."""


def draw(tokens, chosen=2, experts=6, hidden=24, inner=40, among=None, dtype=torch.float32, act_fn=RELU2):
    """Tokens, whose experts are among the first so many."""
    torch.manual_seed(tokens + hidden)
    among = experts if among is None else among
    indices = torch.stack([torch.randperm(among)[:chosen] for _ in range(tokens)])
    up, down = torch.randn(experts, inner, hidden) / hidden**0.5, torch.randn(experts, hidden, inner) / inner**0.5
    parts = [torch.randn(tokens, hidden), indices, torch.rand(tokens, chosen), up, down]
    parts = [part.to(DEVICE, dtype if part.is_floating_point() and part.ndim != 2 else None) for part in parts]
    return [parts[0].to(dtype), *parts[1:], act_fn]


def equation(x, indices, weights, up, down, act_fn):
    """Token by token in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, experts in enumerate(indices.tolist()):
        for place, expert in enumerate(experts):
            hidden = act_fn(F.linear(x[token].double(), up[expert].double()))
            out[token] += weights[token, place].double() * F.linear(hidden, down[expert].double())
    return out


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("way", [routed_experts, grouped_experts, all_experts, experts_in_turn])
def test_torchs_ways(way, tokens):
    parts = draw(tokens)
    assert_close(way(*parts), equation(*parts), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(130, 130), (1030, 64), (24, 9), (30, 40)])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_rows_of_no_whole_16_bytes(tokens, sizes, dtype):
    hidden, inner = sizes
    parts = draw(tokens, hidden=hidden, inner=inner, dtype=dtype)
    for way in (routed_experts, grouped_experts):
        assert_close(way(*parts), equation(*parts), dtype, 4.0)
    learnt = [parts[0].requires_grad_(), parts[2].requires_grad_(), *(part.requires_grad_() for part in parts[3:5])]
    expected = torch.autograd.grad(equation(*parts).square().sum(), learnt)
    for way in (routed_experts, grouped_experts):
        gradients = torch.autograd.grad(way(*parts).double().square().sum(), learnt)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert_close(gradient, wanted, dtype, 20.0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_done_in_place_leaves_what_was_given(dtype):
    parts = draw(9, dtype=dtype)
    before = [part.clone() for part in parts[:5]]
    assert_close(grouped_experts(*parts), equation(*parts), dtype, 2.0)
    assert all(map(torch.equal, parts[:5], before))


class Twice(type(RELU2)):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_another_activation_of_that_family_and_hooks_on_it_are_called():
    parts, calls = draw(9, act_fn=Twice()), []
    assert_close(grouped_experts(*parts), equation(*parts), torch.float32)
    assert "relu2" in triton_cannot_route(*parts)
    hooked = type(RELU2)()
    hooked.register_forward_hook(lambda *_: calls.append("called"))
    grouped_experts(*draw(9, act_fn=hooked))
    assert calls == ["called"]


@torch.no_grad()
def test_weights_alone_may_be_mapped_over():
    x, indices, weights, *others = draw(9)
    mapped = torch.func.vmap(lambda each: grouped_experts(x, indices, each, *others))(
        torch.stack([weights, 2 * weights])
    )
    assert_close(mapped[1], equation(x, indices, 2 * weights, *others), torch.float32)


def test_a_lone_tokens_experts_copied():
    parts = draw(1)
    assert_close(copied_experts(*parts), equation(*parts), torch.float32)


def test_experts_that_were_not_chosen_may_hold_no_numbers():
    parts = draw(3, among=4)
    expected = equation(*parts)
    for weight in parts[3:5]:
        weight[4:] = float("nan")
    for way in (grouped_experts, all_experts):
        assert_close(way(*parts), expected, torch.float32)


def test_float64_and_no_token():
    parts = [part.double() if torch.is_tensor(part) and part.is_floating_point() else part for part in draw(5)]
    assert_close(routed_experts(*parts), equation(*parts))
    assert routed_experts(*(part[:0] for part in parts[:3]), *parts[3:]).shape == (0, 24)


@pytest.mark.usefixtures("nan_where_nothing_is_written")
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 1, "chosen": 5, "hidden": 33, "inner": 7},
        {"tokens": 2, "chosen": 1},
        {"tokens": 7, "hidden": 130, "inner": 20},
        {"tokens": 40, "chosen": 3, "among": 3},  # whose tokens take several tiles of rows
        {"tokens": 5, "experts": 1, "chosen": 1},
    ],
    ids=lambda sizes: " ".join(f"{name} {size}" for name, size in sizes.items()),
)
def test_triton(sizes):
    parts = draw(**sizes)
    found = routed_experts(*parts, backend="triton")
    assert found.dtype == torch.float32
    assert_close(found, equation(*parts))


@pytest.mark.usefixtures("nan_where_nothing_is_written")
def test_triton_with_tensors_that_lie_otherwise_and_experts_nobody_chose():
    parts = draw(6, among=3)
    expected = equation(*parts)
    for weight in parts[3:5]:
        weight[3:] = float("nan")
    parts[:5] = [part.mT.contiguous().mT for part in parts[:5]]
    assert_close(routed_experts(*parts, backend="triton"), expected)


def test_triton_keeps_what_is_no_number():
    """In the interpreter this holds of numpy's maximum, too; on a GPU not of Triton's."""
    parts = draw(3)
    parts[0][1, 5] = float("nan")
    found = routed_experts(*parts, backend="triton")
    assert found.isnan().any(-1).tolist() == [False, True, False] and found[1].isnan().all()


@pytest.mark.usefixtures("nan_where_nothing_is_written")
def test_triton_of_many_tokens_some_at_a_time(monkeypatch):
    monkeypatch.setattr(_experts_triton, "MOST_PAIRS", 15)
    parts = draw(16)
    assert_close(routed_experts(*parts, backend="triton"), equation(*parts))


def test_what_triton_cannot():
    parts = draw(2)
    assert triton_cannot_route(*parts) is None
    with pytest.raises(ValueError, match=r'"triton": it squares what is positive \(relu2\), not SiLU'):
        routed_experts(*parts[:5], ACT2FN["silu"], backend="triton")
    assert "computes in float32, x is torch.float64" in triton_cannot_route(parts[0].double(), *parts[1:])
    assert "weights are torch.float64" in triton_cannot_route(*parts[:2], parts[2].double(), *parts[3:])
    assert "the weights' dtype, torch.float32, x is torch.bf" in triton_cannot_route(parts[0].bfloat16(), *parts[1:])
    packed = parts[3].as_subclass(Packed)
    assert "plain weights, these are Packed and Tensor" in triton_cannot_route(*parts[:3], packed, *parts[4:])
    none = [part[:0] for part in parts[:3]]
    assert "indices have the shape (0, 2)" in triton_cannot_route(*none, *parts[3:])


def ahead(architecture, dtype, pairs, lone=False):
    """The first product at the released geometry."""
    tiles = expert_tiles(pairs, dtype)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys(["x", "weight", "out"], kind) | {"indices": "*i64", "pairs": "*i32", "counts": "*i32"}
    constants = {"D": 2688, "N": 1856, "PAIRS_OF_ROW": 6, "ACTIVATED": True, "LONE": lone, **tiles}
    return architecture, "expert_product", types, constants, options


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    cases = [
        ahead(90, torch.bfloat16, 1, lone=True),
        ahead(90, torch.bfloat16, 1),
        ahead(90, torch.bfloat16, 12),
        ahead(90, torch.bfloat16, 40),
        ahead(80, torch.bfloat16, 12),
        ahead(90, torch.float32, 1),
        (90, "list_pairs", {"indices": "*i64", "pairs": "*i32", "counts": "*i32"}, {"TILE": 8192}, {"num_warps": 4}),
        (
            90,
            "sum_pairs",
            dict.fromkeys(["outputs", "weights", "out"], "*fp32"),
            {"H": 2688, "K": 6, "TILE": 512},
            {"num_warps": 4},
        ),
    ]
    assert_nothing_spills(_experts_triton, tmp_path, cases)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_in_bfloat16_on_a_gpu(tokens):
    parts = draw(tokens, chosen=6, experts=32, hidden=2688, inner=1856, dtype=torch.bfloat16)
    assert_close(routed_experts(*parts, backend="triton"), equation(*parts), torch.bfloat16, 2.0)
