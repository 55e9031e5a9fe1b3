"""top_k_routing: our Triton kernels in the interpreter against torch's code, which test_modeling.py compares."""

import pytest
import torch
from ahead import assert_nothing_spills

from twotower.kernels import _routing_triton
from twotower.kernels._routing_triton import LEAST, triton_cannot_choose
from twotower.kernels.top_k_routing import top_k_routing

pytestmark = pytest.mark.usefixtures("nan_where_nothing_is_written")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens, experts=8, hidden=24, dtype=torch.float32):
    torch.manual_seed(tokens + experts)
    parts = torch.randn(tokens, hidden), torch.randn(experts, hidden)
    return [*(part.to(DEVICE, dtype) for part in parts), torch.randn(experts, device=DEVICE)]


def check(parts, *options):
    logits, weights, indices = top_k_routing(*parts, *options, backend="triton")
    expected = top_k_routing(*parts, *options, backend="torch")
    assert weights.dtype == torch.float32 and indices.dtype == torch.long
    torch.testing.assert_close(logits, expected[0], atol=1e-12, rtol=1e-12)
    # In whatever order.
    order, expected_order = indices.argsort(-1), expected[2].argsort(-1)
    assert torch.equal(indices.gather(1, order), expected[2].gather(1, expected_order))
    found, wanted = weights.gather(1, order), expected[1].gather(1, expected_order)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 8, 3), (5, 7, 1), (3, 128, 6), (2, 4, 4), (40, 9, 2)])
def test_chooses_what_torch_chooses(tokens, experts, top_k):
    check(draw(tokens, experts), top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_sizes_of_several_tiles_and_weights_as_they_are(dtype):
    check(draw(2, hidden=5000, dtype=dtype), 3, 1, 1, False, 2.5)


def test_the_bias_chooses_but_does_not_weigh():
    parts = draw(4)
    parts[2][6] = 10.0
    _, weights, indices = top_k_routing(*parts, 2, backend="triton")
    assert (indices == 6).any(-1).all() and (weights < 1).all()
    check(parts, 2)


def test_all_groups_and_wide_weights():
    parts = draw(3)
    check(parts, 2, 4, 4)
    check([parts[0], parts[1].double(), parts[2].double()], 2)


def test_experts_that_a_bias_rules_out_come_last_and_once():
    parts = draw(3, experts=6)
    parts[2][[0, 1, 3, 5]] = float("-inf")
    _, _, indices = top_k_routing(*parts, 4, backend="triton")
    for chosen in indices.tolist():
        assert {2, 4} < set(chosen) <= set(range(6)) and len(set(chosen)) == 4


@pytest.mark.parametrize("at", [torch.nan, torch.inf])
def test_of_tokens_that_are_no_numbers_experts_differ_and_exist(at):
    """In the interpreter, where numpy chooses, this holds by itself; on a GPU it must be seen to."""
    parts = draw(3, experts=6)
    parts[0][1, 5] = at
    _, weights, indices = top_k_routing(*parts, 4, backend="triton")
    for chosen in indices.tolist():
        assert set(chosen) <= set(range(6)) and len(set(chosen)) == 4
    expected = top_k_routing(*parts, 4, backend="torch")[1]
    assert torch.equal(weights.isnan(), expected.isnan())


def test_what_it_cannot():
    parts = draw(3)
    assert triton_cannot_choose(*parts, 2) is None
    with pytest.raises(ValueError, match=r'"triton": it chooses among all experts, these come in 4 groups of which 1'):
        top_k_routing(*parts, 2, 4, 1, backend="triton")
    assert "x is torch.float64" in triton_cannot_choose(parts[0].double(), *parts[1:], 2)
    assert "1 to 8 of so many experts, not 9" in triton_cannot_choose(*parts, 9)
    assert "at least one token" in triton_cannot_choose(parts[0][:0], *parts[1:], 2)
    assert "at most 1024 experts, these are 2000" in triton_cannot_choose(*draw(1, experts=2000), 2)


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    logits = {"x": "*bf16", "weight": "*bf16", "logits": "*fp64"}, {"H": 2688, "H_TILE": 2048}
    choice = dict.fromkeys(["logits"], "*fp64") | {"bias": "*fp32", "weights": "*fp32", "indices": "*i64"}
    sizes = {"E": 128, "K": 6, "FACTOR": 2.5, "LEAST": LEAST, "NORMALIZED": True, "E_TILE": 128, "K_TILE": 8}
    cases = [(each, "router_logit", *logits, {"num_warps": 4}) for each in (90, 80)]
    cases += [(each, "choose_experts", choice, sizes, {"num_warps": 1}) for each in (90, 80)]
    assert_nothing_spills(_routing_triton, tmp_path, cases)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_in_bfloat16_on_a_gpu(tokens):
    check(draw(tokens, experts=128, hidden=2688, dtype=torch.bfloat16), 6, 1, 1, True, 2.5)
