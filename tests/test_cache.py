"""TwoTowerCache: what it holds, that reading it copies nothing, ragged rows, and the choice of rows."""

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from tolerances import assert_close

from twotower.cache_twotower import KeyValues, MambaState, TwoTowerCache

HEADS, HEAD_DIM = 2, 3


def key_values(batch: int, tokens: int, first: float = 0.0) -> KeyValues:
    """Keys that count the columns from `first`, row r's 100 r higher; values are their negatives."""
    columns = first + torch.arange(tokens) + 100.0 * torch.arange(batch)[:, None]
    key = columns[:, None, :, None].expand(batch, HEADS, tokens, HEAD_DIM).clone()
    return KeyValues(key, -key)


def keys(cache: TwoTowerCache, layer: int = 0) -> torch.Tensor:
    """(B, L) the counted columns a key/value layer holds."""
    held = cache.view(layer)
    assert torch.equal(held.value, -held.key)
    assert torch.equal(held.key, held.key[:, :1, :, :1].expand_as(held.key))
    return held.key[:, 0, :, 0]


def attention_cache() -> TwoTowerCache:
    return TwoTowerCache(tiny_config("only *"))


def read(cache: TwoTowerCache, present: KeyValues, counts: list[int] | None = None) -> None:
    batch, tokens = present.key.shape[0], present.key.shape[2]
    cache.slot(0).append(present)
    cache.advance(batch, tokens, None if counts is None else torch.tensor(counts), torch.device("cpu"))


def test_an_empty_cache():
    cache = TwoTowerCache(tiny_config("all kinds"))
    assert len(cache.layers) == 7
    assert [cache.view(layer) for layer in range(7)] == [None] * 7
    assert cache.get_seq_length() == cache.width == 0
    assert cache.lengths is None
    assert cache.batch_size == -1
    assert cache.context_mask() is None


def test_every_kind_of_layer_holds_its_own_state():
    model = tiny_model("all kinds")
    cache = model(random_ids(2, 9), use_cache=True).past_key_values
    config = model.config
    for layer, kind in enumerate(config.layers_block_type):
        held = cache.view(layer)
        if kind == "linear_attention":
            assert isinstance(held, MambaState)
            assert held.conv.shape == (2, config.conv_kernel - 1, 32 + 2 * 2 * 8)
            assert held.ssm.shape == (2, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        elif kind == "full_attention":
            assert isinstance(held, KeyValues)
            assert held.key.shape == held.value.shape == (2, config.num_key_value_heads, 9, config.head_dim)
        else:
            assert held is None
    assert cache.get_seq_length() == 9
    assert cache.lengths.tolist() == [9, 9]
    assert cache.batch_size == 2


def test_states_are_float32_in_a_bfloat16_model():
    cache = tiny_model().to(torch.bfloat16)(random_ids(1, 5)).past_key_values
    assert cache.view(0).ssm.dtype == torch.float32
    assert cache.view(0).conv.dtype == torch.bfloat16


def test_chunks_are_appended():
    cache = attention_cache()
    read(cache, key_values(2, 3))
    read(cache, key_values(2, 1, first=3))
    read(cache, key_values(2, 2, first=4))
    assert keys(cache).tolist() == [[0, 1, 2, 3, 4, 5], [100, 101, 102, 103, 104, 105]]
    assert cache.context_mask() is None


def test_a_view_is_no_copy():
    cache = attention_cache()
    read(cache, key_values(1, 3))
    first, second = cache.view(0), cache.view(0)
    assert first.key.data_ptr() == second.key.data_ptr() == cache.layers[0].buffers.key.data_ptr()


def test_what_a_chunk_may_see():
    cache = attention_cache()
    assert cache.visible_to(3) is None, "from the beginning, causality says it all"
    read(cache, key_values(2, 2))
    assert cache.visible_to(1) is None
    assert cache.visible_to(3).tolist() == [[[[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]]]
    read(cache, key_values(2, 2, first=2), counts=[0, 2])
    assert cache.visible_to(1)[:, 0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert cache.visible_to(2).sum(-1).tolist() == [[[3, 4]], [[5, 6]]]


def test_growing_is_rare():
    cache = attention_cache()
    buffers = set()
    for column in range(1000):
        read(cache, key_values(1, 1, first=column))
        buffers.add(cache.layers[0].buffers.key.data_ptr())
    assert keys(cache).tolist() == [list(range(1000))]
    assert len(buffers) < 15


def test_a_chunk_counts_only_once_it_has_advanced():
    cache = attention_cache()
    read(cache, key_values(1, 2))
    cache.slot(0).append(key_values(1, 2, first=2))
    assert keys(cache).tolist() == [[0, 1]]


def test_ragged_rows_are_packed():
    cache = attention_cache()
    read(cache, key_values(2, 4), counts=[4, 1])
    assert cache.lengths.tolist() == [4, 1]
    assert cache.width == 4
    assert cache.context_mask()[:, 0, 0].tolist() == [[True] * 4, [True, False, False, False]]
    read(cache, key_values(2, 3, first=4), counts=[1, 3])
    assert keys(cache)[0].tolist() == [0, 1, 2, 3, 4]
    assert keys(cache)[1, :4].tolist() == [100, 104, 105, 106]
    assert cache.context_mask()[:, 0, 0].sum(-1).tolist() == [5, 4]


def test_rows_that_become_equally_long_need_no_mask():
    cache = attention_cache()
    read(cache, key_values(2, 3), counts=[3, 1])
    read(cache, key_values(2, 2, first=3), counts=[0, 2])
    assert cache.context_mask() is None
    assert keys(cache).tolist() == [[0, 1, 2], [100, 103, 104]]


def test_a_whole_chunk_after_ragged_ones():
    cache = attention_cache()
    read(cache, key_values(2, 3), counts=[1, 3])
    read(cache, key_values(2, 2, first=3))
    assert cache.lengths.tolist() == [3, 5]
    assert keys(cache)[0, :3].tolist() == [0, 3, 4]
    assert keys(cache)[1].tolist() == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1]])
def test_select_rows(rows):
    model = tiny_model()
    ids = random_ids(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [0] * 2 + [1] * 4])
    cache = model(ids, attention_mask=mask).past_key_values
    before = [cache.view(layer) for layer in range(5)]
    cache.select_rows(torch.tensor(rows))
    assert cache.lengths.tolist() == [[6, 3, 4][row] for row in rows]
    assert cache.width == max(cache.lengths)
    assert (cache.context_mask() is None) == (len(set(cache.lengths.tolist())) == 1)
    assert cache.batch_size == len(rows)
    for layer, held in enumerate(before):
        for part, expected in zip(cache.view(layer) or (), held or (), strict=True):
            expected = expected[rows]
            if isinstance(held, KeyValues):
                expected = expected[:, :, : cache.width]
            assert torch.equal(part, expected)


def test_rows_of_an_empty_cache():
    cache = TwoTowerCache(tiny_config())
    cache.select_rows(torch.tensor([0, 1]))
    assert cache.lengths.tolist() == cache.copy_rows(torch.tensor([1, 0])).lengths.tolist() == [0, 0]


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0)])
def test_rows_that_have_read_nothing_beside_others(lengths):
    model = tiny_model("all kinds")
    rows = [random_ids(1, length, seed=length) for length in lengths]
    parts = []
    for row in rows:
        parts.append(TwoTowerCache(model.config))
        if row.shape[1] > 0:
            model(row, past_key_values=parts[-1])
        parts[-1].select_rows(torch.tensor([0]))
    cache = TwoTowerCache(model.config)
    cache.replace_rows(parts)
    assert cache.lengths.tolist() == list(lengths)
    new = random_ids(2, 4, seed=9)
    logits = model(new, past_key_values=cache).logits
    for idx, row in enumerate(rows):
        whole = torch.cat([row, new[idx : idx + 1]], dim=1)
        assert_close(logits[idx], model(whole).logits[0, -4:])


def ragged_cache(geometry: str = "all kinds", lengths: tuple[int, ...] = (6, 3, 4)) -> TwoTowerCache:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tiny_model(geometry)(random_ids(*mask.shape), attention_mask=mask.long()).past_key_values


def assert_same_rows(cache: TwoTowerCache, rows: list[int], other: TwoTowerCache, other_rows: list[int]) -> None:
    assert cache.lengths[rows].tolist() == other.lengths[other_rows].tolist()
    for layer in range(len(cache.layers)):
        held, others = cache.view(layer), other.view(layer)
        for part, expected in zip(held or (), others or (), strict=True):
            for row, other_row in zip(rows, other_rows, strict=True):
                columns = slice(cache.lengths[row]) if isinstance(held, KeyValues) else slice(None)
                assert torch.equal(part[row][:, columns], expected[other_row][:, columns])


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1]])
def test_copies_of_rows_are_their_own_and_hold_no_more_than_they_use(rows):
    cache = ragged_cache()
    copied = cache.copy_rows(torch.tensor(rows))
    assert isinstance(copied, TwoTowerCache)
    assert_same_rows(copied, list(range(len(rows))), cache, rows)
    assert copied.width == copied.lengths.max()
    assert (copied.context_mask() is None) == (len(set(copied.lengths.tolist())) == 1)
    untouched = cache.copy_rows(torch.arange(3))
    for layer in copied.layers:
        for part in (getattr(layer, "buffers", None) or getattr(layer, "state", None)) or ():
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
            part.fill_(7.0)
        assert layer not in cache.layers
    assert_same_rows(cache, [0, 1, 2], untouched, [0, 1, 2])


def test_rows_leave_and_come_back():
    cache = ragged_cache()
    before = cache.copy_rows(torch.arange(3))
    first, second, third = (cache.copy_rows(torch.tensor([row])) for row in range(3))
    layers = cache.layers
    cache.replace_rows([third, first, second])
    assert cache.layers is layers
    assert cache.width == 6
    assert_same_rows(cache, [1, 2, 0], before, [0, 1, 2])
    cache.replace_rows([cache.copy_rows(torch.tensor([2]))])
    assert (cache.width, cache.ragged) == (3, False)
    assert_same_rows(cache, [0], before, [1])


def test_a_cache_with_rows_of_others_reads_on():
    """Rows of different caches, grown and trimmed, give what each gives by itself."""
    model = tiny_model("all kinds")
    cache, other = ragged_cache(), ragged_cache(lengths=(9, 2))
    model(random_ids(3, 1), past_key_values=cache)
    whole = TwoTowerCache(model.config)
    whole.replace_rows([other, cache])
    assert whole.lengths.tolist() == [9, 2, 7, 4, 5]
    ids = random_ids(5, 3, seed=1)
    logits = model(ids, past_key_values=whole).logits
    assert_close(logits[:2], model(ids[:2], past_key_values=other).logits)
    assert_close(logits[2:], model(ids[2:], past_key_values=cache).logits)


# Chunks read tentatively; that what is accepted equals what is read plainly is tested in test_modeling.py


@pytest.mark.parametrize(("counts", "ragged"), [([0, 4], True), ([2, 2], False), ([4, 4], False), ([0, 0], False)])
def test_accepted_keys_are_those_of_the_first_tokens(counts, ragged):
    cache = attention_cache()
    read(cache, key_values(2, 3))
    for column, lengths in ((3, [3, 3]), (5, [3 + count for count in counts])):
        cache.slot(0).append(key_values(2, 4, first=column))
        cache.tentative = 4
        assert cache.lengths.tolist() == lengths
        cache.accept(torch.tensor(counts))
        assert cache.ragged == ragged
    first = [[*range(3), *range(3, 3 + count), *range(5, 5 + count)] for count in counts]
    for row, (length, expected) in enumerate(zip(cache.lengths, first, strict=True)):
        assert keys(cache)[row, :length].tolist() == [100 * row + column for column in expected]


@pytest.mark.parametrize("counts", [[-1, 2], [0, 4]])
def test_more_than_was_read_is_not_accepted(counts):
    cache = attention_cache()
    cache.slot(0).append(key_values(2, 3))
    cache.tentative = 3
    with pytest.raises(ValueError, match=rf"counts are \[{counts[0]}, {counts[1]}\]; .* has 3 tokens"):
        cache.accept(torch.tensor(counts))


def test_nothing_is_accepted_without_a_tentative_read():
    cache = attention_cache()
    read(cache, key_values(2, 3))
    with pytest.raises(ValueError, match="no chunk has been read with tentative=True"):
        cache.accept(torch.tensor([1, 1]))


def test_what_is_read_tentatively_must_be_accepted_first():
    cache = attention_cache()
    read(cache, key_values(2, 3))
    settled = cache.copy_rows(torch.tensor([0]))
    cache.slot(0).append(key_values(2, 2))
    cache.tentative = 2
    rows = torch.tensor([0])
    for call in (
        lambda: cache.slot(0),
        lambda: cache.select_rows(rows),
        lambda: cache.copy_rows(rows),
        lambda: cache.replace_rows([settled]),
        lambda: settled.replace_rows([cache]),
    ):
        with pytest.raises(ValueError, match=r"holds 2 tokens read tentatively; call accept\(counts\) first"):
            call()
