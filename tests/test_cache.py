"""TwoTowerCache: what it holds, that reading it copies nothing, ragged rows, and the choice of rows."""

import copy
import pickle
import random
from contextlib import contextmanager
from weakref import ref

import pytest
import torch
from accelerate import cpu_offload
from test_continuation import generate
from tiny import random_block, random_ids, tiny_config, tiny_model, without_special_tokens
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from twotower.cache_twotower import KeyValueLayer, KeyValues, MambaState, MambaUpdate, TwoTowerCache
from twotower.generation_twotower import MODES
from twotower.kernels.block_attention import JOINED

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
    cache.slots(torch.zeros(batch, tokens))[0].update(present)
    cache.append(torch.zeros(batch, tokens), [], counts)


def test_an_empty_cache():
    cache = TwoTowerCache(tiny_config("all kinds"))
    assert len(cache.layers) == 7
    assert [cache.view(layer) for layer in range(7)] == [None] * 7
    assert cache.get_seq_length() == cache.width == 0
    assert cache.lengths is None
    assert cache.batch_size == -1
    assert cache.context_lengths() is None


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
    assert cache.context_lengths() is None


def test_a_view_is_no_copy():
    cache = attention_cache()
    read(cache, key_values(1, 3))
    first, second = cache.view(0), cache.view(0)
    assert first.key.data_ptr() == second.key.data_ptr() == cache.layers[0].buffers.key.data_ptr()


def test_how_much_of_its_context_a_row_may_see():
    cache = attention_cache()
    assert cache.context_lengths() is None
    read(cache, key_values(2, 2))
    assert cache.context_lengths() is None, "all of it"
    read(cache, key_values(2, 2, first=2), counts=[0, 2])
    assert cache.context_lengths().tolist() == [2, 4]


@pytest.mark.parametrize(("held", "tokens"), [(2, 3), (2, 1), (JOINED, 1), (JOINED - 3, 3), (JOINED - 2, 3)])
def test_a_chunk_is_read_beside_a_long_context_and_as_the_last_of_a_short_one(held, tokens):
    cache = attention_cache()
    read(cache, key_values(2, held), counts=[held, 1])
    chunk = key_values(2, tokens, first=held)
    context, own = cache.slots(torch.zeros(2, tokens))[0].read_with(chunk)
    beside = tokens > 1 and held + tokens > JOINED
    assert own is (chunk if beside else None)
    assert context.key.shape[2] == (held if beside else held + tokens)
    written = cache.layers[0].buffers.key
    assert written[0, 0, held : held + tokens, 0].tolist() == chunk.key[0, 0, :, 0].tolist()
    assert written[1, 0, 1 : 1 + tokens, 0].tolist() == chunk.key[1, 0, :, 0].tolist()


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
    cache.slots(torch.zeros(1, 2))[0].update(key_values(1, 2, first=2))
    assert keys(cache).tolist() == [[0, 1]]


def test_ragged_rows_are_packed():
    cache = attention_cache()
    read(cache, key_values(2, 4), counts=[4, 1])
    assert cache.lengths.tolist() == [4, 1]
    assert cache.width == 4
    assert cache.context_lengths().tolist() == [4, 1]
    read(cache, key_values(2, 3, first=4), counts=[1, 3])
    assert keys(cache)[0].tolist() == [0, 1, 2, 3, 4]
    assert keys(cache)[1, :4].tolist() == [100, 104, 105, 106]
    assert cache.context_lengths().tolist() == [5, 4]


def test_rows_that_become_equally_long_need_no_mask():
    cache = attention_cache()
    read(cache, key_values(2, 3), counts=[3, 1])
    read(cache, key_values(2, 2, first=3), counts=[0, 2])
    assert cache.context_lengths() is None
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
    assert (cache.context_lengths() is None) == (len(set(cache.lengths.tolist())) == 1)
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
    assert (copied.context_lengths() is None) == (len(set(copied.lengths.tolist())) == 1)
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
        cache.slots(torch.zeros(2, 4))[0].update(key_values(2, 4, first=column))
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
    cache.slots(torch.zeros(2, 3))[0].update(key_values(2, 3))
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
    cache.slots(torch.zeros(2, 2))[0].update(key_values(2, 2))
    cache.tentative = 2
    rows = torch.tensor([0])
    for call in (
        lambda: cache.slots(torch.zeros(2, 2)),
        lambda: cache.select_rows(rows),
        lambda: cache.copy_rows(rows),
        lambda: cache.replace_rows([settled]),
        lambda: settled.replace_rows([cache]),
    ):
        with pytest.raises(ValueError, match=r"holds 2 tokens read tentatively; call accept\(counts\) first"):
            call()


@pytest.mark.parametrize("counts", [[0, 5], [2, 3], [5, 1]])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_the_convolution_goes_back_to_the_tokens_that_count(taps, counts):
    """Its inputs are the last ones before the tokens that do not, those before the chunk among them."""
    inputs = torch.arange(2 * (taps - 1 + 5)).float().view(2, -1, 1).expand(-1, -1, 3)
    scan = [torch.rand(2, 5, 2, 4), torch.rand(2, 5, 2), -torch.ones(2), torch.rand(2, 5, 1, 3)]
    state = MambaUpdate(inputs, *scan).apply(None, torch.tensor(counts))
    for row, count in enumerate(counts):
        assert torch.equal(state.conv[row], inputs[row, count : count + taps - 1])


# What has been read


def ids_of(cache: TwoTowerCache) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(cache.ids, cache.lengths, strict=True)]


def test_ids_follow_the_tokens_that_count():
    model, ids = tiny_model("all kinds"), random_ids(3, 6)
    cache = TwoTowerCache(model.config)
    assert cache.ids is None
    model(ids[:, :4], attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]), past_key_values=cache)
    rows = [ids[0, 1:4].tolist(), ids[1, :2].tolist(), ids[2, :4].tolist()]
    assert ids_of(cache) == rows
    for counts in ([2, 0, 1], [1, 2, 2]):
        model.context_tower(ids[:, 4:], cache, tentative=True)
        assert ids_of(cache) == rows
        cache.accept(torch.tensor(counts))
        rows = [row + new[:count].tolist() for row, new, count in zip(rows, ids[:, 4:], counts, strict=True)]
        assert ids_of(cache) == rows
    parts = [cache.copy_rows(torch.tensor([2, 0])), cache.copy_rows(torch.tensor([1]))]
    assert ids_of(parts[0]) == [rows[2], rows[0]]
    cache.replace_rows(parts)
    assert ids_of(cache) == [rows[2], rows[0], rows[1]]
    cache.select_rows(torch.tensor([1, 1]))
    model(ids[:2, :1], past_key_values=cache)
    assert ids_of(cache) == [rows[0] + ids[0, :1].tolist(), rows[0] + ids[1, :1].tolist()]


@pytest.fixture(scope="module")
def writer():
    return without_special_tokens(tiny_model("all kinds"))


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_knows_the_text_it_is_of(writer, mode):
    flags = {"mode": mode, "max_new_tokens": 9}
    end = int(generate(writer, random_ids(3, 5), **flags).sequences[0, 6])
    output = generate(writer, random_ids(3, 5), eos_token_id=end, **flags)
    cache = output.past_key_values
    assert cache.ragged, "rows must have ended at different times"
    assert ids_of(cache) == [
        row[:length].tolist() for row, length in zip(output.sequences, cache.lengths, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right", "hole"])
@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_differs_from_what_was_read_is_refused(writer, mode, side):
    """By its row and the position among the row's own tokens; padding does not count."""
    text = random_ids(2, 9, seed=1)
    cache = writer(text[:, :6], past_key_values=TwoTowerCache(writer.config)).past_key_values
    place = {"left": 0, "right": 9, "hole": 2}[side]
    padded, mask = (
        torch.cat([part[:, :place], part.new_zeros(2, 3), part[:, place:]], dim=1)
        for part in (text, torch.ones_like(text))
    )
    for position in (0, 4, 5):
        other = padded.clone()
        column = position if position < place else position + 3
        read, other[1, column] = int(text[1, position]), 4 if text[1, position] > 4 else 5
        message = (
            f"read token {read} at position {position} of row 1, where its text has {int(other[1, column])}; give"
        )
        with pytest.raises(ValueError, match=f"past_key_values has {message} .* or leave past_key_values out"):
            generate(writer, other, attention_mask=mask, mode=mode, past_key_values=cache)
    # What follows may be anything, and the refusals have changed nothing.
    output = generate(writer, padded, attention_mask=mask, mode=mode, past_key_values=cache)
    fresh = generate(writer, text, mode=mode).sequences[:, 9:]
    assert torch.equal(output.sequences[:, 12:], fresh)


def test_a_text_that_differs_is_refused_whatever_its_length(writer):
    text = random_ids(2, 6, seed=1)
    cache = generate(writer, text, max_new_tokens=4).past_key_values
    other = text.clone()
    other[1, 3] = 4 if text[1, 3] > 4 else 5
    for length in (4, 5, 6):
        with pytest.raises(ValueError, match="at position 3 of row 1, "):
            generate(writer, other[:, :length], past_key_values=cache)
    # Of copies, the row of input_ids is named.
    with pytest.raises(ValueError, match="at position 3 of row 1, "):
        generate(writer, other, past_key_values=cache, num_return_sequences=3, do_sample=True)
    assert generate(writer, text, past_key_values=cache, max_new_tokens=1).sequences.shape == (2, 7)


@pytest.mark.parametrize("known", [0, 3])
def test_tokens_read_as_embeddings_are_not_compared(writer, known):
    text = random_ids(2, 8, seed=1)
    cache = TwoTowerCache(writer.config)
    writer(text[:, :6], past_key_values=cache)
    unknown = text[:, :6].clone()
    unknown[:, known:] = -1
    cache.tokens.buffers.key[:, 0, :6, 0] = unknown + 1
    assert torch.equal(cache.ids, unknown)
    assert torch.equal(generate(writer, text, past_key_values=cache).sequences, generate(writer, text).sequences)


# Which model has read


OTHERS = {
    "vocab_size": ({"vocab_size": 49}, "48", "49"),
    "hidden_size": ({"hidden_size": 40}, "32", "40"),
    "num_hidden_layers": ({"hybrid_override_pattern": "M-*E*-"}, "7", "6"),
    r"layers_block_type\[1\]": ({"hybrid_override_pattern": "ME*E*-M"}, "'mlp'", "'moe'"),
    "num_key_value_heads": ({"num_key_value_heads": 4}, "2", "4"),
    "head_dim": ({"head_dim": 4}, "8", "4"),
    "mamba_num_heads": ({"mamba_num_heads": 8}, "4", "8"),
    "mamba_head_dim": ({"mamba_head_dim": 4}, "8", "4"),
    "ssm_state_size": ({"ssm_state_size": 4}, "8", "4"),
    "n_groups": ({"n_groups": 1}, "2", "1"),
    "conv_kernel": ({"conv_kernel": 3}, "4", "3"),
}


def refusals(model, cache: TwoTowerCache, message: str) -> None:
    text = random_ids(2, 9, seed=1)
    calls = [
        lambda: generate(model, text, past_key_values=cache),
        lambda: model(text, past_key_values=cache),
        lambda: model.denoise(random_block(2, 3), cache),
        lambda: model.predict_next(text[:, :1], cache),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_another_geometry_is_refused(writer, name):
    fields, held, expected = OTHERS[name]
    other = tiny_model("all kinds", **fields)
    remedy = "give a cache of this model, or leave past_key_values out"
    for cache in (TwoTowerCache(writer.config), writer(random_ids(2, 4)).past_key_values):
        refusals(other, cache, f"another model: its {name} is {held}, this model's {expected}; {remedy}")


def test_a_cache_of_another_dtype_is_refused(writer):
    cache = writer(random_ids(2, 4)).past_key_values
    message = "past_key_values was read in torch.float32, this model computes in torch.bfloat16; give a cache"
    refusals(tiny_model("all kinds").to(torch.bfloat16), cache, message)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refusals(writer, cache, message)
        own = writer(random_ids(2, 4)).past_key_values
        writer(random_ids(2, 4), past_key_values=own)
    refusals(writer, own, "read in torch.bfloat16, this model computes in torch.float32")


def test_a_cache_of_another_model_of_the_same_geometry_is_refused(writer):
    other = without_special_tokens(tiny_model("all kinds", seed=1))
    cache = other(random_ids(2, 4)).past_key_values
    refusals(writer, cache, "past_key_values is of a model with other embeddings than this model's; give a cache")
    joined = TwoTowerCache(writer.config)
    joined.replace_rows([cache])
    refusals(writer, joined, "with other embeddings")
    # A fresh one is nobody's yet, and the denoiser is not what has read.
    writer(random_ids(2, 4), past_key_values=TwoTowerCache(other.config))
    trained = copy.deepcopy(writer)
    trained.reset_denoiser()
    trained(random_ids(2, 4), past_key_values=writer(random_ids(2, 4)).past_key_values)


def test_what_is_no_cache_of_a_twotower_is_refused(writer):
    refusals(writer, DynamicCache(), "past_key_values is a DynamicCache; give the TwoTowerCache of an earlier call")


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_or_pickled_cache_goes_on(writer, carry):
    text = random_ids(2, 9, seed=1)
    cache = generate(writer, text[:, :6], mode="ar", max_new_tokens=1).past_key_values
    expected = generate(writer, text).sequences
    assert torch.equal(generate(writer, text, past_key_values=carry(cache)).sequences, expected)
    assert cache.lengths.tolist() == [6, 6]


@pytest.mark.parametrize("carry", [copy.copy, copy.deepcopy])
def test_a_copied_cache_and_what_it_is_of_go_on_with_texts_of_their_own(writer, carry):
    text, other = random_ids(2, 9, seed=1), random_ids(2, 9, seed=2)
    other[:, :6] = text[:, :6]
    cache = generate(writer, text[:, :6], mode="ar", max_new_tokens=1).past_key_values
    for own, its in ((text, carry(cache)), (other, cache)):
        assert torch.equal(generate(writer, own, past_key_values=its).sequences, generate(writer, own).sequences)


def test_a_cache_goes_between_an_offloaded_model_and_one_in_memory(writer):
    text = random_ids(2, 9, seed=1)
    offloaded = cpu_offload(copy.deepcopy(writer), torch.device("cpu"))
    assert offloaded.context_tower.embeddings.weight.device.type == "meta"
    expected = generate(writer, text).sequences
    for reader, other in ((writer, offloaded), (offloaded, writer)):
        cache = reader(text[:, :6]).past_key_values
        assert torch.equal(generate(other, text, past_key_values=cache).sequences, expected)


def test_a_cache_of_a_model_with_another_layer_is_refused_while_that_model_is_there():
    model, ids = tiny_model(), random_ids(1, 5)
    cache = model(ids).cache
    other = copy.deepcopy(model)
    assert torch.equal(other.denoise(random_block(1, 4), cache), model.denoise(random_block(1, 4), cache))
    with torch.no_grad():
        other.context_tower.layers[0].mixer.out_proj.weight *= 1.5
    with pytest.raises(ValueError, match=r"with another layers\.0\.mixer\.out_proj\.weight"):
        other.denoise(random_block(1, 4), model(ids).cache)


# Rows that come and go, and parts


ROWS_GEOMETRIES = ["all kinds", "pure Mamba", "pure attention", "convolution of 1", "odd"]


class Rows:
    """A cache of many rows beside their texts, driven at random; each text is to be as read alone."""

    def __init__(self, geometry: str, seed: int):
        self.model, self.random = tiny_model(geometry), random.Random(seed)
        self.cache, self.texts = TwoTowerCache(self.model.config), []
        self.add()

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(4, 48) for _ in range(count)]

    def add(self):
        count = self.random.randint(1, 3)
        self.cache.add_rows(count)
        self.texts += [[] for _ in range(count)]

    def swap(self):
        first, second = (self.random.randrange(len(self.texts)) for _ in range(2))
        self.cache.swap_rows(first, second)
        self.texts[first], self.texts[second] = self.texts[second], self.texts[first]

    def drop(self):
        if len(self.texts) > 1:
            count = self.random.randint(1, len(self.texts) - 1)
            self.cache.drop_rows(count)
            del self.texts[-count:]

    def part(self) -> tuple[TwoTowerCache, list[int]]:
        count = self.random.randint(1, len(self.texts))
        if self.random.random() < 0.5:
            return self.cache.part(slice(0, count)), list(range(count))
        rows = self.random.sample(range(len(self.texts)), count)
        return self.cache.part(rows), rows

    def read(self, tentative: bool = False):
        part, rows = (self.cache, list(range(len(self.texts)))) if self.random.random() < 0.2 else self.part()
        columns = self.random.randint(1, 6)
        counts = (
            [self.random.randint(0, columns) for _ in rows] if self.random.random() < 0.6 else [columns] * len(rows)
        )
        new = [self.tokens(count) for count in counts]
        ids = torch.tensor([each + [7] * (columns - len(each)) for each in new])
        with self.random.choice([torch.inference_mode, torch.no_grad])():
            self.model.context_tower(ids, part, counts, tentative=tentative)
            if tentative:
                counts = [self.random.randint(0, count) for count in counts]
                part.accept(counts)
        for row, tokens, count in zip(rows, new, counts, strict=True):
            self.texts[row] = self.texts[row] + tokens[:count]
        assert part.host_lengths == [len(self.texts[row]) for row in rows]

    def step(self):
        self.random.choice([self.add, self.swap, self.drop, self.read, self.read, lambda: self.read(tentative=True)])()

    def check(self):
        """All that the cache says, and by a part, what the model makes of it."""
        lengths = [len(text) for text in self.texts]
        assert self.cache.host_lengths == self.cache.lengths.tolist() == lengths
        assert self.cache.width == max(lengths)
        assert self.cache.ragged == (len(set(lengths)) > 1)
        part, rows = self.part()
        block, newest = random_block(len(rows), 3), random_ids(len(rows), 1)
        with torch.no_grad():
            logits, next_logits = self.model.denoise(block, part), self.model.predict_next(newest, part)
            for idx, row in enumerate(rows):
                alone, text = TwoTowerCache(self.model.config), self.texts[row]
                if text:
                    assert part.ids[idx, : len(text)].tolist() == text
                    self.model(torch.tensor([text]), cache=alone)
                assert_close(logits[idx], self.model.denoise(block[idx : idx + 1], alone)[0])
                assert_close(next_logits[idx], self.model.predict_next(newest[idx : idx + 1], alone)[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("geometry", ROWS_GEOMETRIES)
def test_rows_that_come_and_go_are_as_each_alone(geometry, seed):
    rows = Rows(geometry, seed)
    for _ in range(25):
        rows.step()
    rows.read()
    rows.check()


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_fails_leaves_all_rows_as_they_were(seed):
    """Also what was done in place: rows exchanged, dropped and taken by others, states of some rows."""
    rows = Rows("all kinds", seed)
    for _ in range(10):
        rows.step()
    texts = [list(text) for text in rows.texts]
    for steps in (1, 4, 12):
        with pytest.raises(InterruptedError), rows.cache.undone_on_error():
            for number in range(steps):
                with rows.cache.undone_on_error():
                    rows.step()
                if number == steps // 2:
                    before = [list(text) for text in rows.texts]
                    with pytest.raises(KeyboardInterrupt), rows.cache.undone_on_error():
                        rows.step()
                        rows.step()
                        raise KeyboardInterrupt
                    rows.texts = before
            raise InterruptedError
        rows.texts = [list(text) for text in texts]
        rows.check()
    for _ in range(5):
        rows.step()
    rows.check()


def test_a_pass_over_a_part_that_fails_leaves_both_as_they_were():
    model, cache = tiny_model("all kinds"), ragged_cache()
    before, part = cache.copy_rows([0, 1, 2]), cache.part([2, 0])
    hook = model.context_tower.norm_f.register_forward_hook(lambda *_: 1 / 0)
    for tentative in (False, True):
        with pytest.raises(ZeroDivisionError):
            model.context_tower(random_ids(2, 9), part, tentative=tentative)
    hook.remove()
    assert (part.host_lengths, part.tentative, cache.host_lengths) == ([4, 6], 0, [6, 3, 4])
    assert_same_rows(cache, [0, 1, 2], before, [0, 1, 2])
    model(random_ids(2, 9), cache=part)
    assert cache.host_lengths == [15, 3, 13]
    assert_same_rows(cache, [1], before, [1])


def test_the_first_rows_are_looked_at_without_a_copy():
    cache = ragged_cache()
    part = cache.part(slice(0, 2))
    assert part.width == 6
    for layer in range(len(cache.layers)):
        for own, whole in zip(part.view(layer) or (), cache.view(layer) or (), strict=True):
            assert own.data_ptr() == whole.data_ptr()
    assert cache.part([0, 1]).view(0).ssm.data_ptr() == cache.view(0).ssm.data_ptr()
    assert cache.part([1]).width == 3


def test_a_row_that_takes_the_place_of_another_finds_nothing_of_it():
    """Not even numbers that are none, beside a longer row."""
    model, cache = tiny_model("all kinds"), ragged_cache(lengths=(9, 4, 7))
    for layer in cache.layers:
        for part in getattr(layer, "buffers", None) or getattr(layer, "state", None) or ():
            part[2] = torch.nan
    cache.drop_rows(1)
    cache.add_rows(1)
    ids = random_ids(1, 3, seed=4)
    model.context_tower(ids, cache.part([2]))
    block = random_block(3, 3)
    assert_close(model.denoise(block, cache)[2], model.denoise(block[2:], model(ids).cache)[0])


def test_a_part_is_refused_once_rows_have_changed():
    cache, model = ragged_cache(), tiny_model("all kinds")
    changes = [
        lambda: cache.swap_rows(0, 1),
        lambda: cache.drop_rows(1),
        lambda: cache.add_rows(1),
        lambda: model.context_tower(random_ids(1, 2), cache.part([0])),
    ]
    for change in changes:
        part, read = cache.part([1, 0]), cache.part([0])
        model.context_tower(random_ids(1, 2), read, tentative=True)
        change()
        for call in (
            lambda part=part: model.context_tower(random_ids(2, 2), part),
            lambda part=part: model.denoise(random_block(2, 2), part),
            lambda part=part: part.copy_rows([0]),
            lambda read=read: read.accept([1]),
        ):
            with pytest.raises(ValueError, match="rows of this part's cache have changed since it was taken"):
                call()


def test_impossible_rows_are_refused():
    cache = ragged_cache()
    fresh = TwoTowerCache(tiny_config("all kinds"))
    for rows in ([], [0, 0], [3], [-1], slice(3, 5)):
        with pytest.raises(ValueError, match=r"a part of rows \[.*\] was asked for; give distinct rows of the 3"):
            cache.part(rows)
    for parent in (fresh, cache.part([0])):
        with pytest.raises(ValueError, match="only a cache with rows that is no part itself has parts"):
            parent.part([0])
    with pytest.raises(ValueError, match="4 rows are to be dropped of the 3"):
        cache.drop_rows(4)
    with pytest.raises(ValueError, match="rows 0 and 3 are to be exchanged, of the 3"):
        cache.swap_rows(0, 3)
    part = cache.part([0])
    for call in (lambda: part.add_rows(1), lambda: part.swap_rows(0, 0), lambda: part.select_rows([0])):
        with pytest.raises(ValueError, match="a part's rows are those of another cache; change that one's"):
            call()


def test_no_more_is_accepted_than_a_row_has_of_the_chunk():
    model, cache = tiny_model("all kinds"), ragged_cache()
    model.context_tower(random_ids(3, 4), cache, [4, 0, 2], tentative=True)
    for counts, message in ([4, 1, 2], r"the rows have \[4, 0, 2\] tokens"), ([4, 0], "of each of 3 rows"):
        with pytest.raises(ValueError, match=message):
            cache.accept(counts)
    cache.accept([3, 0, 2])
    assert cache.host_lengths == [9, 3, 6]


class HostReads(TorchDispatchMode):
    """Fails at an operation whose result the host must wait for."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(idx, torch.Tensor) and idx.dtype == torch.bool
            for idx in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        assert name not in self.READS and not by_mask, f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads(monkeypatch):
    def refuse(name):
        def read(self, *args, **kwargs):
            raise AssertionError(f"Tensor.{name} reads from the device")

        return read

    @contextmanager
    def watch():
        with monkeypatch.context() as patch, HostReads():
            for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, refuse(name))
            yield

    return watch


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", ["all kinds", "expert groups", "latent experts"])
@pytest.mark.parametrize("grouped", ["even", "ragged", "part"])
def test_nothing_is_read_from_the_device_within_a_pass(no_host_reads, geometry, batch, grouped):
    model = tiny_model(geometry)
    ids, block = random_ids(batch, 4), random_block(batch, 4)
    counts = None if grouped == "even" else [4, 1, 2][-batch:]
    cache = TwoTowerCache(model.config)
    cache.add_rows(batch + 1)
    cache = cache.part(list(range(batch, 0, -1))) if grouped == "part" else TwoTowerCache(model.config)
    with no_host_reads(), torch.inference_mode():
        hidden_states = model.context_tower(ids, cache, counts)
        model.context_lm_head(hidden_states)
        for _ in range(2):
            model.denoise(block, cache)
            model.denoise(block, cache, 0.5)
            model.predict_next(ids[:, :1], cache)
            model.context_tower(ids[:, :1], cache)
            model.context_tower(ids, cache, counts, tentative=True)
            cache.accept([1, 0, 1][:batch])


@torch.no_grad()
def test_a_cache_that_knows_how_long_a_text_will_be_grows_once():
    model, cache = tiny_model("base"), TwoTowerCache(tiny_model("base").config)
    ids = random_ids(1, 300, seed=1)
    cache.expect(300)
    places = set()
    for chunk in ids.split(50, dim=1):
        model.context_tower(chunk, cache)
        places.add(cache.layers[2].buffers.key.data_ptr())
    assert len(places) == 1 and cache.layers[2].buffers.key.shape[2] == 320
    expected = TwoTowerCache(model.config)
    model.context_tower(ids, expected)
    assert_close(cache.view(2).key, expected.view(2).key)


@torch.no_grad()
def test_generate_reads_a_long_prompt_into_buffers_that_have_room_for_it():
    model, cache = tiny_model("base"), TwoTowerCache(tiny_model("base").config)
    grown, reserve = [], KeyValueLayer.reserve

    def noted(layer, like, rows, columns):
        grown.append(columns)
        return reserve(layer, like, rows, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyValueLayer, "reserve", noted)
        options = {"mode": "ar", "max_new_tokens": 3, "prefill_chunk_size": 50, "return_dict_in_generate": True}
        model.generate(random_ids(1, 300, seed=1), cache=cache, **options)
    assert len(grown) == 2  # of keys and values, and of ids


@torch.no_grad()
def test_a_forward_pass_keeps_no_buffer_that_has_grown(monkeypatch):
    model, alive = tiny_model("base"), []
    cache = TwoTowerCache(model.config)
    model(random_ids(1, 60, seed=1), cache=cache)
    buffers = [ref(layer.buffers.key) for layer in cache.layers if isinstance(layer, KeyValueLayer)]
    head = model.context_lm_head.forward
    monkeypatch.setattr(
        model.context_lm_head, "forward", lambda x: alive.extend(each() is not None for each in buffers) or head(x)
    )
    model(random_ids(1, 60, seed=2), cache=cache)
    assert alive == [False]


@torch.no_grad()
def test_after_a_failed_forward_pass_whose_buffers_had_grown_the_cache_goes_on(monkeypatch):
    model = tiny_model("base")
    ids = random_ids(1, 180, seed=1)
    for read in (0, 60):
        cache, expected = TwoTowerCache(model.config), TwoTowerCache(model.config)
        for each in (cache, expected):
            if read:
                model(ids[:, :read], cache=each)
        with monkeypatch.context() as patch:
            patch.setattr(model.context_lm_head, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, read : read + 100], cache=cache)
        assert cache.get_seq_length() == read
        logits = [model(ids[:, read : read + 70], cache=each).logits for each in (cache, expected)]
        assert_close(logits[0], logits[1])


@torch.no_grad()
def test_keys_and_values_grow_one_after_the_other(monkeypatch):
    model, cache, alive = tiny_model("base"), TwoTowerCache(tiny_model("base").config), []
    model.context_tower(random_ids(1, 60, seed=1), cache)
    layer = next(layer for layer in cache.layers if isinstance(layer, KeyValueLayer))
    value, new_zeros = ref(layer.buffers.value), torch.Tensor.new_zeros

    def noted(tensor, *size):
        if tensor is layer.buffers.key:
            alive.append(value() is not None)
        return new_zeros(tensor, *size)

    monkeypatch.setattr(torch.Tensor, "new_zeros", noted)
    model.context_tower(random_ids(1, 60, seed=2), cache)
    assert alive == [False]


@torch.no_grad()
def test_where_memory_lacks_for_keys_after_values_have_grown_the_cache_goes_on(monkeypatch):
    model, cache, expected = tiny_model("base"), *(TwoTowerCache(tiny_model("base").config) for _ in range(2))
    for each in (cache, expected):
        model.context_tower(random_ids(1, 60, seed=1), each)
    layer = next(layer for layer in cache.layers if isinstance(layer, KeyValueLayer))
    new_zeros = torch.Tensor.new_zeros

    def lacking(tensor, *size):
        return 1 / 0 if tensor is layer.buffers.key else new_zeros(tensor, *size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", lacking)
        with pytest.raises(ZeroDivisionError):
            model.context_tower(random_ids(1, 200, seed=2), cache)
    outputs = [model.context_tower(random_ids(1, 60, seed=2), each) for each in (cache, expected)]
    assert_close(outputs[0], outputs[1])


def test_what_grows_without_gradients_has_none():
    """Though what was held before came with them: else the first call's graph would live on in every later one."""
    model = tiny_model("all kinds")
    cache = model(random_ids(2, 60)).cache
    assert any(part.requires_grad for held in cache.views() for part in held or ())
    with torch.no_grad():
        model(random_ids(2, 9), cache=cache)  # more than there was room for
        cache.add_rows(1)
        model(random_ids(3, 1), cache=cache)
    assert not any(part.requires_grad for held in cache.views() for part in held or ())


def test_a_cache_that_is_returned_expects_no_more():
    model = without_special_tokens(tiny_model("only *"))
    cache = model.generate(random_ids(1, 100), mode="ar", max_new_tokens=2, return_dict_in_generate=True).cache
    assert [layer.expected for layer in (*cache.layers, cache.tokens)] == [0, 0]


class TestTransformersNames:
    """What transformers' own caches can do."""

    def test_rows_are_reordered_chosen_and_repeated(self, writer):
        text = random_ids(3, 9, seed=1)
        cache = writer(text).cache
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        assert cache.ids.tolist() == text[[2, 2, 1, 1]].tolist()
        more = torch.cat([text[[2, 2, 1, 1]], random_ids(4, 3)], dim=1)
        assert_close(writer(more[:, 9:], cache=cache).logits, writer(more).logits[:, 9:])

    def test_a_cache_that_was_reset_is_as_new(self, writer):
        cache = writer(random_ids(3, 9)).cache
        cache.reset()
        assert cache.batch_size == -1 and cache.width == 0 and cache.ids is None
        text = random_ids(2, 5, seed=3)
        assert torch.equal(writer(text, cache=cache).logits, writer(text).logits)

    def test_what_mamba_states_cannot_is_refused(self, writer):
        cache = writer(random_ids(1, 9)).cache
        cache.crop(0)
        with pytest.raises(ValueError, match=r"crop\(2\) is not supported .* keep a copy \(copy_rows\)"):
            cache.crop(2)


def test_rows_that_are_not_there_are_not_selected():
    for rows in ([0, 3], [-1], torch.tensor([5])):
        with pytest.raises(ValueError, match=r"rows \[.*\] are to be selected, of the 3 there are"):
            ragged_cache().select_rows(rows)


def test_counts_that_are_no_whole_numbers_are_not_accepted():
    model, cache = tiny_model("all kinds"), ragged_cache()
    model.context_tower(random_ids(3, 4), cache, tentative=True)
    with pytest.raises(TypeError, match="float"):
        cache.accept([1.5, 1, 1])
