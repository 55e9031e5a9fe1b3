"""Going on from what is there: a cache, a starting block, a callback, a streamer, and stops inside a block."""

from itertools import pairwise
from threading import Thread

import pytest
import torch
from test_generation import padded
from tiny import random_ids, tiny_model, tiny_tokenizer, without_special_tokens
from transformers import DynamicCache, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from twotower import Stateless
from twotower.cache_twotower import TwoTowerCache
from twotower.decoding.adapter import CALL_ARGUMENTS
from twotower.generation_twotower import MODES, BlockStep

MASK, SIZE = 3, 4
BOTH = pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 1.5, "seed": 5}])


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model("all kinds"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer):
    """A model that writes the tokenizer's tokens."""
    return without_special_tokens(tiny_model("all kinds", vocab_size=len(tokenizer), seed=2))


@pytest.fixture(scope="module")
def rows():
    return [random_ids(length, seed=length) for length in (7, 3, 5)]


def generate(model, ids, **kwargs):
    # Random text holds the padding id as a token like any other.
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    kwargs = {"max_new_tokens": 10, "pad_token_id": 0, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, **kwargs)


def text_mask(output, mask):
    """The attention mask of a whole text: the prompt's, then 1 on what each row generated."""
    return torch.cat([mask, (~output.log_probs.isnan()).long()], dim=1)


def own_text(sequence, mask):
    return sequence[mask.bool()]


# A cache from one call into the next.


@BOTH
@pytest.mark.parametrize("mode", ["ar", "self_speculative", "mock_ar"])
def test_two_calls_write_the_text_of_one(model, mode, sampled):
    prompt = random_ids(2, 6, seed=1)
    whole = generate(model, prompt, mode=mode, max_new_tokens=17, **sampled).sequences
    for first in (1, 4, 7):
        begun = generate(model, prompt, mode=mode, max_new_tokens=first, **sampled)
        rest = {"past_key_values": begun.past_key_values, "max_new_tokens": 17 - first}
        assert torch.equal(generate(model, begun.sequences, mode=mode, **rest, **sampled).sequences, whole)


@BOTH
def test_whole_blocks_in_two_calls_are_those_of_one(model, sampled):
    prompt = random_ids(2, 6, seed=1)
    whole = generate(model, prompt, max_new_tokens=4 * SIZE, **sampled).sequences
    begun = generate(model, prompt, max_new_tokens=SIZE, **sampled)
    rest = {"past_key_values": begun.past_key_values, "max_new_tokens": 3 * SIZE}
    assert torch.equal(generate(model, begun.sequences, **rest, **sampled).sequences, whole)


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_going_on_is_a_fresh_call_on_the_whole_text(model, mode, sampled):
    prompt = random_ids(2, 6, seed=1)
    for first in (1, 3, 6):
        begun = generate(model, prompt, mode=mode, max_new_tokens=first, **sampled)
        fresh = generate(model, begun.sequences, mode=mode, **sampled)
        gone_on = generate(model, begun.sequences, mode=mode, past_key_values=begun.past_key_values, **sampled)
        assert torch.equal(gone_on.sequences, fresh.sequences)
        assert torch.equal(gone_on.denoiser_forwards, fresh.denoiser_forwards)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_serves_call_after_call_and_other_modes(model, mode):
    text, cache = random_ids(2, 6, seed=1), None
    for other in (mode, "ar", mode, "mask_diffusion", "self_speculative", "mock_ar", mode):
        fresh = generate(model, text, mode=other, max_new_tokens=3)
        output = generate(model, text, mode=other, max_new_tokens=3, past_key_values=cache)
        assert torch.equal(output.sequences, fresh.sequences)
        assert cache is None or output.past_key_values is cache
        # A new turn from the user.
        text = torch.cat([output.sequences, random_ids(2, 2, seed=len(text[0]))], dim=1)
        cache = output.past_key_values


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_a_ragged_batch_goes_on_with_holes(model, rows, mode, side):
    ids, mask = padded(rows, side)
    stops = list(range(28, 34))
    begun = generate(model, ids, attention_mask=mask, mode=mode, eos_token_id=stops, max_new_tokens=9)
    mask = text_mask(begun, mask)
    assert len(set(mask[:, ids.shape[1] :].sum(1).tolist())) > 1, "rows ended at different times"
    question = random_ids(3, 2, seed=8)
    text = torch.cat([begun.sequences, question], dim=1)
    mask = torch.cat([mask, torch.ones_like(question)], dim=1)
    output = generate(model, text, attention_mask=mask, mode=mode, past_key_values=begun.past_key_values)
    assert torch.equal(output.sequences[:, : text.shape[1]], text)
    for row in range(3):
        own = own_text(text[row], mask[row])
        alone = generate(model, own[None], mode=mode).sequences[0, len(own) :]
        assert torch.equal(output.sequences[row, text.shape[1] :], alone)
    # And once more, now with holes at several places.
    mask = torch.cat([mask, torch.ones(3, 10 + 1, dtype=torch.long)], dim=1)
    text = torch.cat([output.sequences, random_ids(3, 1, seed=9)], dim=1)
    again = generate(model, text, attention_mask=mask, mode=mode, past_key_values=output.past_key_values)
    for row in range(3):
        own = own_text(text[row], mask[row])
        assert torch.equal(
            again.sequences[row, text.shape[1] :], generate(model, own[None], mode=mode).sequences[0, len(own) :]
        )


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_row_go_on_from_one_cache(model, mode):
    prompt = random_ids(2, 6, seed=1)
    begun = generate(model, prompt, mode=mode, max_new_tokens=3)
    lengths = begun.past_key_values.lengths.clone()
    draw = {"do_sample": True, "temperature": 2.0, "seed": [5, 6], "num_return_sequences": 3}
    output = generate(model, begun.sequences, mode=mode, past_key_values=begun.past_key_values, **draw)
    assert torch.equal(output.sequences, generate(model, begun.sequences, mode=mode, **draw).sequences)
    assert output.past_key_values.batch_size == 6
    assert torch.equal(begun.past_key_values.lengths, lengths), "the cache of fewer rows stays as it was"
    fresh = generate(model, output.sequences, mode=mode, max_new_tokens=3).sequences
    gone_on = generate(model, output.sequences, mode=mode, max_new_tokens=3, past_key_values=output.past_key_values)
    assert torch.equal(gone_on.sequences, fresh)


@pytest.mark.parametrize("mode", MODES)
def test_max_length_counts_a_rows_own_tokens(model, rows, mode):
    ids, mask = padded(rows, "left")
    output = generate(model, ids, attention_mask=mask, mode=mode, max_new_tokens=None, max_length=12)
    assert text_mask(output, mask).sum(1).tolist() == [12, 12, 12]
    for row, sequence in zip(rows, output.sequences, strict=True):
        alone = generate(model, row[None], mode=mode, max_new_tokens=None, max_length=12).sequences[0]
        assert torch.equal(sequence[7 : 7 + 12 - len(row)], alone[len(row) :])


def test_max_length_counts_no_holes(model):
    # Eight columns, of which no row uses more than six.
    ids = random_ids(2, 8, seed=3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    cache = generate(model, ids[:, 2:3], mode="ar", max_new_tokens=1).past_key_values
    ids[0, 0] = ids[0, 2]
    output = generate(
        model, ids, attention_mask=mask, mode="ar", past_key_values=cache, max_new_tokens=None, max_length=8
    )
    assert output.sequences.shape == (2, 10)
    assert torch.equal(output.sequences[:, :8], ids)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_does_not_fit_is_refused(model, mode):
    prompt = random_ids(2, 6, seed=1)
    begun = generate(model, prompt, mode=mode)
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, input_ids 3"):
        generate(model, random_ids(3, 20), mode=mode, past_key_values=begun.past_key_values)
    held = begun.past_key_values.lengths.tolist()
    for length in (6, held[0] - 1 if mode == "mask_diffusion" else held[0]):
        with pytest.raises(
            ValueError, match=f"past_key_values holds {held[0]} tokens of row 0, whose text has {length}"
        ):
            generate(model, begun.sequences[:, :length], mode=mode, past_key_values=begun.past_key_values)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        generate(model, prompt, mode=mode, past_key_values=DynamicCache())
    fresh = generate(model, begun.sequences, mode=mode).sequences
    gone_on = generate(model, begun.sequences, mode=mode, past_key_values=begun.past_key_values).sequences
    assert torch.equal(gone_on, fresh), "a refusal leaves the cache as it was"


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_survives_an_error_in_the_middle(model, rows, mode):
    """What the context tower has read stays read, for all rows in the batch's order, those that had ended included."""
    ids, mask = padded(rows, "left")
    begun = generate(model, ids, attention_mask=mask, mode=mode, max_new_tokens=2)
    text = torch.cat([begun.sequences, random_ids(3, 1, seed=5)], dim=1)
    mask = torch.cat([text_mask(begun, mask), torch.ones(3, 1, dtype=torch.long)], dim=1)

    # Text ends after so few puts in two of the modes.
    last_put = 4 if mode in ("ar", "self_speculative") else 2

    class Break(BaseStreamer):
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == last_put:
                raise InterruptedError

    flags = {"attention_mask": mask, "mode": mode, "max_new_tokens": 40, "eos_token_id": list(range(28, 34))}
    with pytest.raises(InterruptedError):
        generate(model, text, past_key_values=begun.past_key_values, streamer=Break(), **flags)
    cache = begun.past_key_values
    whole = generate(model, text, **flags)
    own = [own_text(*pair) for pair in zip(whole.sequences, text_mask(whole, mask), strict=True)]
    assert cache.batch_size == 3
    assert all(held < len(row) for held, row in zip(cache.lengths.tolist(), own, strict=True))
    again, again_mask = padded(own, "left")
    expected = generate(model, again, attention_mask=again_mask, mode=mode).sequences
    output = generate(model, again, attention_mask=again_mask, mode=mode, past_key_values=cache)
    assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("mode", MODES)
def test_padding_in_a_text_that_goes_on_needs_a_mask(model, mode):
    """It may as well be a token that the model wrote."""
    begun = generate(model, random_ids(2, 6, seed=1), mode=mode)
    text = torch.cat([begun.sequences, random_ids(2, 1, seed=5)], dim=1)
    pad = int(begun.sequences[0, 8])
    with pytest.raises(ValueError, match=f"input_ids hold the padding id {pad}, .*give attention_mask"):
        model.generate(text, mode=mode, past_key_values=begun.past_key_values, pad_token_id=pad, max_new_tokens=3)
    masked = generate(model, text, mode=mode, past_key_values=begun.past_key_values, pad_token_id=pad)
    assert torch.equal(masked.sequences, generate(model, text, mode=mode, pad_token_id=pad).sequences)


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_cache_of_the_callers_own_keeps_all_rows(model, rows, mode):
    cache, ids, mask = TwoTowerCache(model.config), *padded(rows, "left")
    flags = {"mode": mode, "attention_mask": mask, "eos_token_id": list(range(28, 34))}
    plain = generate(model, ids, past_key_values=cache, return_dict_in_generate=False, **flags)
    begun = generate(model, ids, **flags)
    assert torch.equal(plain, begun.sequences)
    assert cache.lengths.tolist() == begun.past_key_values.lengths.tolist()
    assert cache.ragged, "rows must have ended at different times"
    text = torch.cat([begun.sequences, random_ids(3, 1, seed=5)], dim=1)
    flags["attention_mask"] = torch.cat([text_mask(begun, mask), torch.ones(3, 1, dtype=torch.long)], dim=1)
    gone_on, expected = (generate(model, text, past_key_values=c, **flags) for c in (cache, begun.past_key_values))
    assert torch.equal(gone_on.sequences, expected.sequences)


@pytest.mark.parametrize("keep", [False, True])
def test_rows_of_one_token_that_end_at_once(model, keep):
    """Mode "mock_ar" has read nothing of them then."""
    prompt = torch.arange(5, 13)[:, None]
    free = generate(model, prompt, mode="mock_ar").sequences
    end = int(free[0, 1])
    ended = free[:, 1] == end
    assert not ended.all()
    output = generate(model, prompt, mode="mock_ar", eos_token_id=end, return_dict_in_generate=keep)
    sequences = output.sequences if keep else output
    assert (sequences[ended, 1] == end).all() and not sequences[ended, 2:].any()
    assert torch.equal(sequences[~ended, :2], free[~ended, :2])
    if keep:
        cache = output.past_key_values
        assert torch.equal(cache.lengths == 0, ended)
        kept = ended.nonzero()[:, 0]
        text = torch.cat([sequences[kept, :2], random_ids(len(kept), 1, seed=5)], dim=1)
        gone_on = generate(model, text, mode="ar", past_key_values=cache.copy_rows(kept)).sequences
        assert torch.equal(gone_on, generate(model, text, mode="ar").sequences)


@pytest.mark.parametrize("calls", [5, 6, 7, 8, 9])
def test_diffusion_goes_on_from_a_text_that_was_cancelled_before_a_block(model, calls):
    prompt, asked = random_ids(1, 6, seed=1), 0

    def cancel(input_ids, scores):
        nonlocal asked
        asked += 1
        return asked >= calls

    begun = generate(model, prompt, stopping_criteria=[cancel], confidence_threshold=1.0, steps_per_block=2)
    gone_on = generate(model, begun.sequences, past_key_values=begun.past_key_values).sequences
    assert torch.equal(gone_on, generate(model, begun.sequences).sequences)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_inside_the_context_tower_leaves_the_cache_as_it_was(model, mode):
    text = random_ids(2, 9, seed=1)
    cache = generate(model, text[:, :4], mode="ar", max_new_tokens=1).past_key_values
    expected = generate(model, text, mode=mode, past_key_values=cache.copy_rows(torch.arange(2))).sequences

    def fail(*_):
        raise InterruptedError

    hook = model.context_tower.layers[-2].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        generate(model, text, mode=mode, past_key_values=cache)
    hook.remove()
    assert torch.equal(generate(model, text, mode=mode, past_key_values=cache).sequences, expected)


# A starting block.


@BOTH
def test_a_starting_block_keeps_its_tokens_and_fills_the_others(model, sampled):
    prompt = random_ids(2, 6, seed=1)
    given = torch.tensor([[MASK, 20, MASK, 21], [22, MASK, MASK, MASK]])
    output = generate(model, prompt, starting_block=given, max_new_tokens=2 * SIZE, **sampled)
    new = output.sequences[:, 6:]
    fixed = given != MASK
    assert torch.equal(new[:, :SIZE][fixed], given[fixed])
    assert not (new == MASK).any()
    assert (output.commit_steps[:, :SIZE][fixed] == -1).all()
    assert (output.commit_steps[:, :SIZE][~fixed] >= 0).all()
    assert torch.equal(output.confidences.isnan()[:, :SIZE], fixed)
    assert torch.equal(given, torch.tensor([[MASK, 20, MASK, 21], [22, MASK, MASK, MASK]])), (
        "the argument is unchanged"
    )
    for row in range(2):
        alone = generate(
            model, prompt[row : row + 1], starting_block=given[row : row + 1], max_new_tokens=2 * SIZE, **sampled
        )
        assert torch.equal(alone.sequences[0, 6:], new[row])


def test_starting_blocks_of_other_widths(model):
    prompt = random_ids(2, 6, seed=1)
    free = generate(model, prompt).sequences
    for width in range(1, SIZE + 1):
        masked = torch.full((2, width), MASK)
        assert torch.equal(generate(model, prompt, starting_block=masked).sequences, free)
    full = random_ids(2, SIZE, seed=4)
    wanted = {"output_scores": True, "output_logits": True}
    output = generate(model, prompt, starting_block=full, max_new_tokens=SIZE, **wanted)
    assert torch.equal(output.sequences[:, 6:], full)
    assert output.denoiser_forwards.tolist() == [0, 0]
    assert output.tokens_per_denoiser_forward.isnan().all()
    for rows in (output.scores, output.logits):
        assert len(rows) == SIZE
        assert torch.equal(torch.stack(rows), torch.zeros(SIZE, 2, model.config.vocab_size))
    gone_on = generate(model, prompt, starting_block=full, max_new_tokens=2 * SIZE).sequences
    fresh = generate(model, torch.cat([prompt, full], dim=1), max_new_tokens=SIZE).sequences
    assert torch.equal(gone_on, fresh)
    # A row that is full waits for the others, and takes no pass of its own.
    mixed = torch.stack([full[0], torch.full((SIZE,), MASK)])
    output = generate(model, prompt, starting_block=mixed, max_new_tokens=SIZE)
    assert output.denoiser_forwards[0] == 0 < output.denoiser_forwards[1]
    assert torch.equal(output.sequences[1], free[1, : 6 + SIZE])


def test_a_starting_block_may_end_the_text_and_is_repeated_for_copies(model):
    prompt = random_ids(1, 6, seed=1)
    ends = torch.tensor([[20, 9, MASK, MASK]])
    output = generate(model, prompt, starting_block=ends, eos_token_id=9)
    assert output.sequences[0, 6:].tolist() == [20, 9]
    later = torch.tensor([[MASK, MASK, MASK, 9]])
    output = generate(model, prompt, starting_block=later, eos_token_id=9)
    assert output.sequences[0, 6:].tolist()[-1] == 9
    draw = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    output = generate(model, prompt, starting_block=torch.tensor([[MASK, 20]]), **draw)
    assert output.sequences[:, 7].tolist() == [20, 20, 20]
    cache = generate(model, prompt, mode="ar", max_new_tokens=1).past_key_values
    longer = torch.cat([prompt, random_ids(1, 1)], dim=1)
    starting = {"starting_block": torch.tensor([[MASK, 20]])}
    expected = generate(model, longer, **starting).sequences
    assert torch.equal(generate(model, longer, past_key_values=cache, **starting).sequences, expected)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([[5, 6]], r"starting_block has shape \(1, 2\); expected a row for each of the 2 sequences"),
        ([[5, 6, 7, 8, 9]] * 2, "of at most block_size 4 tokens"),
        ([[], []], "starting_block has shape"),
        ([5, 6], r"starting_block has shape \(2,\)"),
        ([[5, 48], [5, 6]], "starting_block holds 48, outside the vocabulary of 48"),
        ([[5, -1], [5, 6]], "starting_block holds -1, outside"),
    ],
)
def test_a_bad_starting_block_is_refused(model, block, message):
    with pytest.raises(ValueError, match=message):
        generate(model, random_ids(2, 6), starting_block=torch.tensor(block, dtype=torch.long))


def test_a_starting_block_is_of_a_prompt_not_of_each_of_its_sequences(model):
    draw = {"do_sample": True, "num_return_sequences": 2, "starting_block": [[MASK, 20]] * 4}
    with pytest.raises(ValueError, match=r"shape \(4, 2\); expected a row for each of the 2 sequences of input_ids"):
        generate(model, random_ids(2, 6), **draw)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("self_speculative", "starting_block"), *((mode, name) for mode in ("mock_ar", "ar") for name in CALL_ARGUMENTS)],
)
def test_what_is_for_other_modes_is_refused(model, mode, name):
    value = torch.full((2, 2), MASK) if name == "starting_block" else print
    with pytest.raises(ValueError, match=f"{name} is for mode mask_diffusion.*, not {mode}; leave it out"):
        generate(model, random_ids(2, 6), mode=mode, **{name: value})


def test_a_starting_block_that_ends_the_text_costs_no_pass(model):
    prompt = random_ids(3, 6, seed=1)
    given = torch.tensor([[7, MASK, MASK, MASK], [9, 8, MASK, 7], [9, 7, MASK, MASK]])
    output = generate(model, prompt, starting_block=given, eos_token_id=7)
    assert output.denoiser_forwards.tolist()[0::2] == [0, 0] and output.denoiser_forwards[1] > 0
    assert [row.tolist() for row in output.sequences[0::2, 6:]] == [[7] + [0] * 3, [9, 7] + [0] * 2]
    output = generate(model, prompt, starting_block=given, max_new_tokens=1)
    assert output.denoiser_forwards.tolist() == [0, 0, 0]
    assert torch.equal(output.sequences[:, 6:], given[:, :1])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([[5.5], [6.0]], "starting_block are torch.float32; give token ids"),
        ([5, 6], r"starting_block has shape \(2,\)"),
    ],
)
def test_a_starting_block_of_other_kinds(model, block, message):
    prompt = random_ids(2, 6, seed=1)
    copies = {"num_return_sequences": 2, "do_sample": True, "seed": 1}
    listed = generate(model, prompt, starting_block=[[5], [6]], **copies).sequences
    assert torch.equal(listed, generate(model, prompt, starting_block=torch.tensor([[5], [6]]), **copies).sequences)
    as_list = generate(model, prompt, starting_block=[[5], [6]]).sequences
    assert torch.equal(as_list, generate(model, prompt, starting_block=torch.tensor([[5], [6]])).sequences)
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, starting_block=block)


# A callback after every pass.


@BOTH
def test_a_callback_sees_every_pass_and_may_do_nothing(model, rows, sampled):
    ids, mask = padded(rows, "left")
    seen: list[BlockStep] = []
    flags = {"attention_mask": mask, "eos_token_id": list(range(28, 34)), "steps_per_block": 3, **sampled}
    expected = generate(model, ids, **flags)
    output = generate(model, ids, step_callback=seen.append, **flags)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.log_probs, expected.log_probs, equal_nan=True)
    passes = torch.zeros(3, dtype=torch.long)
    for state in seen:
        count = len(state.rows)
        assert state.steps == 3 and 0 <= state.step < 3
        assert state.ids.shape == state.committed.shape == state.tokens.shape == state.commit.shape == (count, SIZE)
        assert state.confidence.shape == (count, SIZE) and state.timestep.shape == (count,)
        assert state.logits.shape == (count, SIZE, 48) and state.logits.dtype == state.timestep.dtype == torch.float32
        assert (state.logits[..., MASK] == -torch.inf).all()
        assert torch.equal(state.ids == MASK, ~state.committed)
        assert not (state.commit & state.committed).any()
        chosen = state.logits.softmax(-1).gather(-1, state.tokens[..., None])[..., 0]
        torch.testing.assert_close(state.confidence, chosen)
        assert sampled or torch.equal(state.tokens, state.logits.argmax(-1))
        passes[state.rows] += (~state.committed).any(1)
    assert torch.equal(passes, output.denoiser_forwards)
    numbers = [(state.block, state.step) for state in seen]
    assert numbers == sorted(set(numbers)) and numbers[0] == (0, 0)
    following = {(before.block, before.step + 1): before for before in seen}
    for state in seen:
        before = following.get((state.block, state.step))
        if before is not None:
            still = torch.isin(before.rows, state.rows)
            assert torch.equal(state.committed, (before.committed | before.commit)[still])


def test_a_callback_vetoes_and_commits_more(model):
    prompt = random_ids(2, 6, seed=1)

    def one_from_the_left(state):
        first = (~state.committed).int().cumsum(1) == 1
        state.commit = first & ~state.committed

    output = generate(model, prompt, step_callback=one_from_the_left, max_new_tokens=SIZE)
    assert output.commit_steps.tolist() == [[0, 1, 2, 3]] * 2

    def none_before_the_third(state):
        state.commit &= state.step >= 2

    output = generate(model, prompt, step_callback=none_before_the_third, max_new_tokens=SIZE)
    assert (output.commit_steps >= 2).all()

    def everything(state):
        state.commit[:] = True

    output = generate(model, prompt, step_callback=everything, max_new_tokens=2 * SIZE)
    assert output.denoiser_forwards.tolist() == [2, 2]
    assert (output.commit_steps == 0).all()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_callback_replaces_tokens(model, in_place):
    prompt = random_ids(2, 6, seed=1)

    def replace(state):
        if in_place:
            state.tokens.fill_(20)
        else:
            state.tokens = torch.full_like(state.tokens, 20)

    output = generate(model, prompt, step_callback=replace, output_logits=True, suppress_tokens=[30])
    assert (output.sequences[:, 6:] == 20).all()
    logits = torch.stack(output.logits, 1)
    torch.testing.assert_close(output.confidences, logits.softmax(-1)[..., 20])
    logits[..., 30] = -torch.inf
    torch.testing.assert_close(output.log_probs, logits.log_softmax(-1)[..., 20])


def test_what_a_callback_changes_besides_has_no_effect(model):
    prompt = random_ids(2, 6, seed=1)
    given = torch.tensor([[MASK, 20, MASK, MASK]] * 2)

    def meddle(state):
        state.ids.fill_(9)
        state.committed[:] = True
        state.rows = state.rows[:0]
        # Replacing what is committed already changes nothing.
        state.tokens[:, 1] = 21
        state.commit[:, 1] = True

    output = generate(model, prompt, starting_block=given, step_callback=meddle, max_new_tokens=SIZE)
    expected = generate(model, prompt, starting_block=given, max_new_tokens=SIZE)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.commit.zero_(), "step_callback vetoed position 0 of row 0 in the last of 2 steps"),
        (lambda state: state.tokens.fill_(MASK), f"step_callback committed the mask id {MASK}; veto"),
        (lambda state: state.tokens.fill_(48), "step_callback committed token 48, outside the vocabulary"),
        (lambda state: state.tokens.fill_(-1), "step_callback committed token -1, outside the vocabulary"),
    ],
)
def test_a_callbacks_mistake_is_an_error(model, change, message):
    def callback(state):
        change(state)

    with pytest.raises(ValueError, match=message):
        generate(model, random_ids(2, 6, seed=1), step_callback=callback, steps_per_block=2)


def test_a_token_beyond_the_vocabulary_that_is_not_committed_is_no_mistake(model):
    def callback(state):
        state.tokens[~state.commit] = 48

    prompt = random_ids(2, 6, seed=1)
    expected = generate(model, prompt).sequences
    assert torch.equal(generate(model, prompt, step_callback=callback).sequences, expected)


# Streamers.


def question(tokenizer):
    return tokenizer("Tom has 12 apples.", return_tensors="pt").input_ids


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streamer_class", [TextStreamer, TextDiffusionStreamer])
def test_a_printed_text_is_the_decoded_output(writer, tokenizer, mode, skip_prompt, streamer_class, capsys):
    prompt = question(tokenizer)
    streamer = streamer_class(tokenizer, skip_prompt=skip_prompt)
    kept = []
    streamer.on_finalized_text = lambda text, stream_end=False: kept.append(text)
    draft = {"draft_length": SIZE} if mode == "self_speculative" else {}
    output = generate(writer, prompt, mode=mode, streamer=streamer, max_new_tokens=23, **draft)
    decoded = tokenizer.decode(output.sequences[0, prompt.shape[1] if skip_prompt else 0 :])
    assert "".join(kept) == decoded
    drafts = capsys.readouterr().out.count("\0337")
    assert (drafts > 0) == (streamer_class is TextDiffusionStreamer and mode in ("mask_diffusion", "self_speculative"))


@pytest.mark.parametrize("mode", MODES)
def test_a_printed_text_ends_with_the_text(writer, tokenizer, mode):
    prompt = question(tokenizer)
    free = generate(writer, prompt, mode=mode, max_new_tokens=23).sequences[0, prompt.shape[1] :]
    kept = []
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: kept.append(text)
    output = generate(
        writer, prompt, mode=mode, max_new_tokens=23, eos_token_id=int(free[9]), streamer=streamer
    ).sequences[0, prompt.shape[1] :]
    assert len(output) <= 10
    assert "".join(kept) == tokenizer.decode(output)


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_iterator_streams_the_decoded_output(writer, tokenizer, mode, skip_prompt):
    prompt = question(tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=30, skip_special_tokens=True)
    outputs = []
    thread = Thread(target=lambda: outputs.append(generate(writer, prompt, mode=mode, streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = outputs[0].sequences[0, prompt.shape[1] if skip_prompt else 0 :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_gets_a_batch_column_by_column(model, rows, mode):
    class Collect(BaseStreamer):
        def __init__(self):
            self.puts, self.ended = [], 0

        def put(self, value):
            assert not self.ended and value.device.type == "cpu"
            self.puts.append(value)

        def end(self):
            self.ended += 1

    ids, mask = padded(rows, "left")
    streamer = Collect()
    output = generate(model, ids, attention_mask=mask, mode=mode, streamer=streamer)
    assert streamer.ended == 1
    assert torch.equal(streamer.puts[0], ids)
    got = torch.cat([put.reshape(3, -1) for put in streamer.puts[1:]], dim=1)
    assert torch.equal(got, output.sequences[:, ids.shape[1] :])


# Stops inside a block.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_a_criterion_cancels_inside_a_block(model, mode, count):
    prompt = random_ids(2, 6, seed=1)
    free = generate(model, prompt, mode=mode).sequences

    def cancel(input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 1 and not (input_ids == MASK).any()
        return input_ids.shape[1] >= 6 + count

    output = generate(model, prompt, mode=mode, stopping_criteria=[Stateless(cancel)])
    assert torch.equal(output.sequences, free[:, : 6 + count])
    assert not output.log_probs.isnan().any()
    gone_on = torch.cat([output.sequences, random_ids(2, 1, seed=4)], dim=1)
    fresh = generate(model, gone_on, mode=mode).sequences
    assert torch.equal(generate(model, gone_on, mode=mode, past_key_values=output.past_key_values).sequences, fresh)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", [1, 2, 3, 7, 12])
def test_cancelling_at_any_time_leaves_a_valid_text(model, mode, calls):
    """A user's button, which is pressed after some passes and has nothing to do with the text."""
    prompt = random_ids(2, 6, seed=1)
    free = generate(model, prompt, mode=mode, max_new_tokens=30, confidence_threshold=1.0).sequences
    asked = 0

    def cancel(input_ids, scores, **kwargs):
        nonlocal asked
        asked += 1
        return torch.full((len(input_ids),), asked >= calls)

    output = generate(
        model, prompt, mode=mode, max_new_tokens=30, confidence_threshold=1.0, stopping_criteria=[Stateless(cancel)]
    )
    new = output.sequences[:, 6:]
    kept = ~output.log_probs.isnan()
    assert new.shape[1] < 24
    assert not (new == MASK).any()
    assert torch.equal(new[kept], free[:, 6 : 6 + new.shape[1]][kept])
    assert (new[~kept] == 0).all()
    assert asked <= calls + 3, "every row asks once more"


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_cut_where_they_end(writer, tokenizer, mode):
    prompts = [question(tokenizer)[0], tokenizer("9 + 4", return_tensors="pt").input_ids[0]]
    ids, mask = padded(prompts, "left")
    free = generate(writer, ids, attention_mask=mask, mode=mode, max_new_tokens=24).sequences[:, ids.shape[1] :]
    # The text of some tokens of row 0, without bytes that are no character alone.
    texts = [tokenizer.decode(free[0, start : start + 2]) for start in range(23)]
    start, stop = next((idx, text) for idx, text in enumerate(texts) if text.isascii() and text.isprintable())
    flags = {
        "attention_mask": mask,
        "mode": mode,
        "max_new_tokens": 24,
        "stop_strings": [stop],
        "tokenizer": tokenizer,
    }
    output = generate(writer, ids, **flags)
    for row in range(2):
        new = output.sequences[row, ids.shape[1] :][~output.log_probs[row].isnan()]
        assert torch.equal(new, free[row, : len(new)])
        text = tokenizer.decode(new)
        assert stop in text or len(new) == 24
        assert stop not in tokenizer.decode(new[:-1])
    assert (~output.log_probs[0].isnan()).sum() <= start + 2
    with pytest.raises(ValueError, match="tokenizer"):
        generate(writer, ids, mode=mode, stop_strings=[stop])


@pytest.mark.parametrize("mode", MODES)
def test_max_time_leaves_a_valid_text_to_go_on_from(model, mode):
    prompt = random_ids(2, 6, seed=1)
    free = generate(model, prompt, mode=mode, max_new_tokens=30).sequences
    output = generate(model, prompt, mode=mode, max_new_tokens=30, max_time=1e-9)
    new = output.sequences.shape[1] - 6
    assert 0 <= new < 30
    assert torch.equal(output.sequences, free[:, : 6 + new])
    longer = torch.cat([output.sequences, random_ids(2, 1, seed=4)], dim=1)
    fresh = generate(model, longer, mode=mode).sequences
    assert torch.equal(generate(model, longer, mode=mode, past_key_values=output.past_key_values).sequences, fresh)


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_gets_the_scores_of_all_tokens_so_far(model, mode, sampled):
    prompt = random_ids(2, 6, seed=1)
    free = generate(model, prompt, mode=mode, output_scores=True, **sampled)
    scores = torch.stack(free.scores, dim=1)
    asked = []

    def record(input_ids, given):
        row = next(idx for idx in range(2) if torch.equal(input_ids[0, :6], prompt[idx]))
        length = input_ids.shape[1] - 6
        asked.append((row, length))
        assert [each.shape for each in given] == [(1, 48)] * length
        torch.testing.assert_close(torch.cat(list(given)), scores[row, :length])
        return False

    generate(model, prompt, mode=mode, output_scores=True, stopping_criteria=[Stateless(record)], **sampled)
    assert set(asked) == {(row, length) for row in range(2) for length in range(1, 11)}
    unscored = []
    generate(model, prompt, mode=mode, stopping_criteria=[lambda _, given: unscored.append(given) or False], **sampled)
    assert set(unscored) == {None}


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_that_answers_for_a_whole_batch_is_refused(model, mode):
    def answer_both(input_ids, scores):
        return torch.tensor([True, False])

    with pytest.raises(ValueError, match="function gave 2 answers about one row"):
        generate(model, random_ids(2, 6), mode=mode, stopping_criteria=[Stateless(answer_both)])


class EosLater(EosTokenCriteria):
    """End-of-text ends a text from some length on."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores) & (input_ids.shape[1] > 10)


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_made_from_transformers_own_is_asked(model, mode):
    prompt = random_ids(1, 6, seed=1)
    ends = list(range(48))
    assert generate(model, prompt, mode=mode, stopping_criteria=[EosTokenCriteria(ends)]).sequences.shape == (1, 7)
    assert generate(model, prompt, mode=mode, stopping_criteria=[EosLater(ends)]).sequences.shape == (1, 11)


@BOTH
def test_a_callback_changes_drafts_but_not_the_text(model, rows, sampled):
    ids, mask = padded(rows, "left")
    flags = {"mode": "self_speculative", "attention_mask": mask, "draft_length": SIZE, "draft_steps": 2, **sampled}
    expected = generate(model, ids, **flags)
    seen: list[BlockStep] = []
    assert torch.equal(generate(model, ids, step_callback=seen.append, **flags).sequences, expected.sequences)
    assert {state.step for state in seen} <= {0, 1} and {state.steps for state in seen} == {2}
    assert [state.block for state in seen] == sorted(state.block for state in seen)
    assert all(state.committed[:, 0].all() and not state.commit[:, 0].any() for state in seen)

    def replace(state):
        state.tokens[:, 1::2] = 5

    def veto(state):
        state.commit[:] = False

    assert torch.equal(generate(model, ids, step_callback=replace, **flags).sequences, expected.sequences)
    undrafted = generate(model, ids, step_callback=veto, **flags)
    assert torch.equal(undrafted.sequences, expected.sequences)
    assert (undrafted.accepted_lengths == 1).all()


def open_until_last(state):
    """Vetoes the first position of every block as long as that is allowed."""
    if state.step < state.steps - 1:
        state.commit[:, 0] = False


def replace_first(state):
    if state.step == 0:
        state.tokens[:, -1] = 9
        state.commit[:, -1] = True


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_processors_see_what_a_callback_made_of_the_text(model, steps):
    """Bigrams of what is written without them are forbidden: first those with the vetoed token."""
    prompt = random_ids(3, 6, seed=1)
    flags = {
        "step_callback": open_until_last,
        "steps_per_block": steps,
        "confidence_threshold": 1e-6,
        "max_new_tokens": 24,
    }
    bad_words = set()
    for _ in range(4):
        new = generate(model, prompt, bad_words_ids=[[47, 47, 47], *map(list, bad_words)], **flags).sequences[:, 6:]
        pairs = {pair for row in new.tolist() for pair in pairwise(row)}
        assert not pairs & bad_words
        bad_words |= pairs


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative"])
def test_a_callback_cannot_replace_tokens_that_processors_have_read(model, mode):
    """What was chosen behind a replaced token was chosen for another text."""
    prompt, flags = random_ids(3, 6, seed=1), {"mode": mode, "draft_length": SIZE, "max_new_tokens": 12}
    with pytest.raises(ValueError, match="step_callback replaced a token while RepetitionPenalty"):
        generate(model, prompt, step_callback=replace_first, repetition_penalty=1.3, **flags)
    generate(model, prompt, step_callback=lambda state: state.tokens.clone(), repetition_penalty=1.3, **flags)
    generate(model, prompt, step_callback=replace_first, temperature=0.5, do_sample=True, seed=1, **flags)


def test_what_a_callback_does_to_the_logits_changes_nothing(model):
    prompt = random_ids(2, 6, seed=1)
    expected = generate(model, prompt, output_logits=True)
    output = generate(model, prompt, output_logits=True, step_callback=lambda state: state.logits.zero_())
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.confidences, expected.confidences)
    assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))
