"""Our Triton kernels of block attention, in Triton's interpreter, against the equation in float64."""

import pytest
import torch
from ahead import assert_nothing_spills
from tolerances import assert_close

from twotower.kernels import _attention_triton
from twotower.kernels._attention_triton import (
    attention_tiles,
    attention_with_triton,
    context_parts,
    triton_cannot_attend,
)
from twotower.kernels.block_attention import block_attention

pytestmark = pytest.mark.usefixtures("nan_where_nothing_is_written")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(_attention_triton, "LEAST_SPAN", 16)


def draw(queries, context=None, heads=(4, 2), width=16, rows=3, block=True):
    torch.manual_seed(queries)

    def part(heads, columns):  # the cache's buffers have more columns than are looked at
        return torch.randn(rows, heads, columns + 3, width, device=DEVICE)[:, :, :columns]

    own = [part(heads[0], queries), *([part(heads[1], queries), part(heads[1], queries)] if block else [None, None])]
    return [*own, *([] if context is None else [part(heads[1], context), part(heads[1], context)])]


def check(parts, **options):
    options = {name: each.to(DEVICE) if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    actual = block_attention(*parts, **options, backend="triton")
    wide = [None if part is None else part.double() for part in parts]
    expected = block_attention(*wide, **options, backend="eager")
    assert actual.dtype == parts[0].dtype
    lost = ~seen(parts, **options)
    if lost.any():
        assert not actual[lost].any()
    assert_close(actual[~lost], expected[~lost].float())


def seen(parts, context_lengths=None, context_mask=None, block_mask=None, causal=False, scale=None):
    """(B, S), whether a query sees any column."""
    query, key, *_ = parts
    if key is not None and (causal or block_mask is None):
        return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=DEVICE)
    if key is None:
        return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=DEVICE)
    any_column = block_mask.any(1)
    if len(parts) > 3:
        columns = torch.arange(parts[3].shape[2], device=DEVICE)
        held = torch.ones(len(query), len(columns), dtype=torch.bool, device=DEVICE)
        held = held if context_lengths is None else columns < context_lengths[:, None]
        any_column = any_column | (held if context_mask is None else held & context_mask).any(1)
    return any_column[:, None].expand(-1, query.shape[2])


@pytest.mark.parametrize(
    "queries, context, heads", [(1, 100, (4, 2)), (5, 1, (6, 1)), (16, 21, (3, 3)), (16, 100, (4, 2))]
)
def test_a_block_behind_a_context(queries, context, heads):
    check(draw(queries, context=context, heads=heads, rows=2))


def test_a_context_in_one_part(monkeypatch):
    monkeypatch.setattr(_attention_triton, "LEAST_SPAN", 256)
    check(draw(5, context=100), context_lengths=torch.tensor([7, 0, 70]))


@pytest.mark.parametrize("width", [1, 40])
def test_heads_of_other_sizes(width):
    check(draw(5, context=33, heads=(9, 3), width=width))


def test_rows_with_contexts_and_blocks_of_their_own_lengths():
    tokens = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    check(draw(5, context=70), context_lengths=torch.tensor([7, 0, 70]), block_mask=tokens)


def test_tokens_that_stand_anywhere():
    block = torch.tensor([[False, True, True, False], [True, False, False, True], [True, True, True, True]])
    torch.manual_seed(0)
    context = torch.rand(3, 50) < 0.5
    check(draw(4, heads=(6, 2)), block_mask=block)
    check(draw(4, context=50, heads=(6, 2)), block_mask=block, context_mask=context)
    check(draw(4, context=50), context_mask=context, context_lengths=torch.tensor([50, 3, 20]))


def test_a_row_that_sees_nothing_gets_zeros():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    check(draw(2, context=4), context_lengths=torch.tensor([4, 0, 0]), block_mask=mask)


def test_a_chunk_from_the_beginning_and_behind_a_context():
    check(draw(6), causal=True)
    for lengths in (None, torch.tensor([9, 0, 4])):
        check(draw(4, context=9), context_lengths=lengths, causal=True)


@pytest.mark.parametrize("queries", [1, 11])
def test_a_chunk_whose_keys_are_in_the_cache_already(queries):
    """Rows' chunks begin at columns 2, 0 and 5; a query sees its row's columns up to its own."""
    for starts in (torch.tensor([2, 0, 5]), None):
        check(draw(queries, context=queries + 30, block=False), context_lengths=starts, causal=True)


def test_scale_and_large_scores():
    check(draw(3, context=4), scale=0.7)
    parts = draw(3, context=40)
    check([parts[0] * 100, *parts[1:]])


def test_what_it_cannot_compute():
    parts = draw(2, context=4)
    with pytest.raises(ValueError, match=r'"triton": it computes in float32, the queries are torch.float64'):
        block_attention(*(part.double() for part in parts), backend="triton")
    assert "at most 256 dimensions, these have 288" in triton_cannot_attend(*draw(2, width=288))
    assert "3 rows share 1 of context" in triton_cannot_attend(*parts[:3], *(part[:1] for part in parts[3:]))
    assert "together in memory" in triton_cannot_attend(*parts[:1], *(part.mT for part in parts[1:3]))
    assert "at least one row" in triton_cannot_attend(*draw(2, rows=0))
    with pytest.raises(ValueError, match="gives no gradients"):
        block_attention(*(part.requires_grad_() for part in parts), backend="triton")


def test_few_rows_are_divided_into_many_parts_and_many_into_few(monkeypatch):
    monkeypatch.setattr(_attention_triton, "LEAST_SPAN", 256)
    assert context_parts(131072, 2) == 64 and context_parts(131072, 1000) == 1
    assert context_parts(1024, 2) == 4 and context_parts(0, 2) == 0


def ahead(architecture, dtype, queries, masked=False):
    """A block behind a context of the released geometry, or the step of one token."""
    tiles = attention_tiles(16 * queries, 128, dtype, architecture // 10)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys(["query", "context_key", "context_value", "key", "value"], kind)
    types |= dict.fromkeys(["context_mask", "block_mask"], "*i1") | {"lengths": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(["means", "log_sums"], "*fp32")
    constants = {"CAUSAL": queries == 1, "WITHIN": queries == 1, "ENDED": True, "GROUP": 16, "D": 128, **tiles}
    constants |= {"CONTEXT_MASKED": masked, "BLOCK_MASKED": masked}
    return architecture, "attend", types, constants, options


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    cases = [
        (90, torch.bfloat16, 1, True),
        (90, torch.bfloat16, 2),
        (90, torch.bfloat16, 16, True),
        (80, torch.bfloat16, 1, True),
        (80, torch.bfloat16, 2, True),
        (80, torch.bfloat16, 16, True),
        (90, torch.float32, 1),
        (80, torch.float32, 16),
    ]
    merge = dict.fromkeys(["means", "log_sums"], "*fp32") | {"out": "*bf16"}
    sizes = {"HEADS": 32, "D": 128, "D_TILE": 128, "PARTS_TILE": 128}
    merges = [(each, "merge_parts", merge, sizes, {"num_warps": 4}) for each in (90, 80)]
    assert_nothing_spills(_attention_triton, tmp_path, [*(ahead(*case) for case in cases), *merges])


@pytest.mark.gpu
@pytest.mark.parametrize("context", [1, 200, 3000])
@pytest.mark.parametrize("queries", [1, 16])
def test_in_bfloat16_on_a_gpu(queries, context):
    parts = [part.bfloat16() for part in draw(queries, context=context, heads=(32, 2), width=128)]
    lengths = torch.tensor([context, 0, context // 2], device="cuda")
    expected = block_attention(*(part.double() for part in parts), context_lengths=lengths, backend="eager")
    assert_close(attention_with_triton(*parts, context_lengths=lengths), expected, torch.bfloat16, 2.0)
