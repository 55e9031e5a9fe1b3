"""What we pass to flash-attn, checked on a stand-in that does and refuses what the package says it does."""

import sys

import pytest
import torch
from fake_packages import FlashAttn
from tolerances import assert_close

from twotower.kernels._flash_attn import attention_with_flash_attn, flash_attn_cannot
from twotower.kernels.block_attention import block_attention

# Context's and block's results are each rounded to bfloat16 before they are joined, and that is rounded again.
JOINED = 2.0


@pytest.fixture
def package(monkeypatch):
    fake = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    return fake


def draw(queries, context=None, heads=(4, 2), width=16, rows=3):
    torch.manual_seed(queries)

    def part(heads, columns):  # the cache's buffers have more columns than are looked at
        return torch.randn(rows, heads, columns + 3, width).bfloat16()[:, :, :columns]

    own = [part(heads[0], queries), part(heads[1], queries), part(heads[1], queries)]
    return [*own, *([] if context is None else [part(heads[1], context), part(heads[1], context)])]


def check(parts, error=JOINED, **options):
    assert flash_attn_cannot(*parts, **options) is None
    actual = attention_with_flash_attn(*parts, **options)
    wide = [None if part is None else part.float() for part in parts]
    expected = block_attention(*wide, **options, backend="eager")
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, torch.bfloat16, error)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("context", [1, 21])
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_a_block_behind_a_context(package, queries, context, heads):
    check(draw(queries, context=context, heads=heads))


def test_rows_with_contexts_and_blocks_of_their_own_lengths(package):
    """Also of a row whose context is empty, of which the package returns a sum of +inf."""
    tokens = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    check(draw(5, context=12), context_lengths=torch.tensor([7, 0, 12]), block_mask=tokens)


def test_a_block_whose_tokens_stand_anywhere(package):
    tokens = torch.tensor([[False, True, True, False], [True, False, False, True], [True, True, True, True]])
    for context in (None, 5):
        check(draw(4, context=context, heads=(6, 2)), block_mask=tokens)


def test_a_row_that_sees_nothing_gets_zeros(package):
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    lengths = {"context_lengths": torch.tensor([4, 0, 0]), "block_mask": mask}
    out = attention_with_flash_attn(*draw(2, context=4), **lengths)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out.isfinite().all()


def test_a_chunk_from_the_beginning(package):
    check(draw(6), causal=True)


def test_a_chunk_behind_a_context_that_is_read_causally(package):
    for lengths in (None, torch.tensor([9, 0, 4])):
        check(draw(4, context=9), context_lengths=lengths, causal=True)
    assert package.calls == [True, False] * 2


def test_a_chunk_whose_keys_are_in_the_cache_already(package):
    """Rows' chunks begin at columns 2, 0 and 5; a query sees its row's columns up to its own."""
    for queries in (4, 1):
        for starts in (torch.tensor([2, 0, 5]), None):
            query, _, _, *context = draw(queries, context=9)
            check([query, None, None, *context], error=1.0, context_lengths=starts, causal=True)
    assert package.calls == [True] * 4


def test_scale(package):
    check(draw(3, context=4), scale=0.7)


def test_what_it_cannot_compute():
    parts = draw(2, context=4)
    assert "float16, the queries are torch.float32" in flash_attn_cannot(*(part.float() for part in parts))
    assert "at most 256 dimensions, these have 288" in flash_attn_cannot(*draw(2, width=288))
    tokens = torch.ones(3, 2, dtype=torch.bool)
    assert "by their lengths, not by a mask" in flash_attn_cannot(*parts, context_mask=tokens)
    assert "not by a mask" in flash_attn_cannot(*parts, block_mask=tokens, causal=True)
    assert "3 rows share 1 of context" in flash_attn_cannot(*parts[:3], *(part[:1] for part in parts[3:]))
    assert "together in memory" in flash_attn_cannot(*parts[:1], *(part.mT for part in parts[1:3]))
    assert "at least one row" in flash_attn_cannot(*draw(2, rows=0))


@pytest.mark.gpu
@pytest.mark.parametrize("context", [1, 200])
@pytest.mark.parametrize("queries", [1, 16])
def test_on_a_gpu(queries, context):
    parts = [part.cuda() for part in draw(queries, context=context, width=128)]
    lengths = torch.tensor([context, 0, context // 2], device="cuda")
    expected = block_attention(*(part.float() for part in parts), context_lengths=lengths, backend="eager")
    actual = attention_with_flash_attn(*parts, context_lengths=lengths)
    assert_close(actual, expected, torch.bfloat16, JOINED)
