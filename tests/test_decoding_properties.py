"""Properties of the decoding loops: a scripted denoiser for mask diffusion, a plain oracle, and rows on their own."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_requests import OF_CODE
from tiny import random_ids, tiny_model

from twotower.decoding.rules import UNMASKING_RULES
from twotower.decoding.sampling import gumbel_noise
from twotower.generation_twotower import MODES

PAD, MASK, VOCAB = 0, 3, 48
COUNTERS = ("denoiser_forwards", "context_forwards", "tokens_per_forward", "tokens_per_denoiser_forward")
RECORDED = ("commit_steps", "confidences", "log_probs")


class ScriptedDenoiser:
    """Logits from a hash of a row's own block, time and number of cached tokens, and of nothing else."""

    sharpness = 2.0

    def __call__(self, block_ids, past_key_values, timestep):
        return self.logits(block_ids, past_key_values.lengths, timestep)

    def logits(self, block_ids, lengths, timestep):
        """(R, S) ids, (R,) lengths and (R,) times -> (R, S, V)."""
        columns = torch.arange(block_ids.shape[1])
        row = (block_ids * (2 * columns + 3) ** 5).sum(1) + lengths * 1_000_003 + (timestep * 720_720).round().long()
        return self.sharpness * gumbel_noise(row, columns.expand(block_ids.shape), VOCAB)


@pytest.fixture(scope="module")
def denoiser():
    return ScriptedDenoiser()


@pytest.fixture(scope="module")
def scripted(denoiser):
    """Mask diffusion's other half: a real context tower, of one layer, that only counts what it reads."""
    model = tiny_model("only -")
    model.denoise = denoiser
    return model


@pytest.fixture(scope="module")
def real():
    return tiny_model("each kind once")


class Call(NamedTuple):
    prompts: list[list[int]]
    seeds: list[int]
    side: str
    order: list[int]
    sharpness: float
    knobs: dict[str, Any]


@st.composite
def calls(draw, rules=tuple(UNMASKING_RULES), sampled=(False, True)) -> Call:
    prompts = draw(st.lists(st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=5))
    rows = len(prompts)
    knobs: dict[str, Any] = {
        "block_size": draw(st.integers(1, 9)),
        "steps_per_block": draw(st.integers(1, 9)),
        "max_new_tokens": draw(st.integers(1, 25)),
        "eos_token_id": draw(st.none() | st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=12, unique=True)),
        "confidence_threshold": draw(st.floats(0.05, 1.0)),
        "unmasking_rule": draw(st.sampled_from(rules)),
    }
    if draw(st.sampled_from(sampled)):
        knobs |= {"do_sample": True, "temperature": draw(st.floats(0.3, 3.0))}
    seeds = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows))
    side, order = draw(st.sampled_from(["left", "right"])), draw(st.permutations(range(rows)))
    return Call(prompts, seeds, side, order, draw(st.floats(0.2, 4.0)), knobs)


def generate(model, call: Call, order=None, **knobs):
    """The output for some of a call's rows, and the width of their prompts."""
    order = range(len(call.prompts)) if order is None else order
    rows = [call.prompts[idx] for idx in order]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for idx, row in enumerate(rows):
        columns = slice(width - len(row), width) if call.side == "left" else slice(0, len(row))
        ids[idx, columns], mask[idx, columns] = torch.tensor(row), 1
    if isinstance(model.denoise, ScriptedDenoiser):
        model.denoise.sharpness = call.sharpness
    options = {"pad_token_id": PAD, "return_dict_in_generate": True, **call.knobs, **knobs}
    if options.get("do_sample") or options["unmasking_rule"] == "posterior":
        options["seed"] = [call.seeds[idx] for idx in order]
    return model.generate(ids, attention_mask=mask, **options), width


def new_lengths(output):
    """(B,) new tokens of each row: log-probabilities are NaN on padding."""
    return (~output.log_probs.isnan()).sum(1)


@given(call=calls())
def test_rows_end_within_their_budget(scripted, call):
    output, width = generate(scripted, call)
    knobs, new = call.knobs, output.sequences[:, width:]
    lengths, stops = new_lengths(output), set(knobs["eos_token_id"] or ())
    assert new.shape[1] == lengths.max()
    assert (new[lengths[:, None] <= torch.arange(new.shape[1])] == PAD).all()
    for idx, length in enumerate(lengths.tolist()):
        text = new[idx, :length].tolist()
        assert MASK not in text
        assert not stops & set(text[:-1])
        assert text[-1] in stops or length == knobs["max_new_tokens"]
        blocks = -(-length // knobs["block_size"])
        assert blocks <= output.denoiser_forwards[idx] <= blocks * knobs["steps_per_block"]
        # The prompt, and every block but the last.
        assert output.context_forwards[idx] == blocks
        steps = output.commit_steps[idx, :length]
        assert steps.min() >= 0
        assert steps.max() < knobs["steps_per_block"]


@given(call=calls())
def test_committed_tokens_stay(scripted, call):
    seen: dict[tuple[int, int], list] = {}

    def watch(state):
        assert ((state.ids == MASK) == ~state.committed).all()
        assert not (state.commit & state.committed).any()
        assert state.steps == call.knobs["steps_per_block"]
        if state.step == state.steps - 1:
            assert (state.commit | state.committed).all()
        for place, row in enumerate(state.rows.tolist()):
            after = state.tokens[place].where(state.commit[place], state.ids[place])
            seen.setdefault((row, state.block), []).append((state.step, state.ids[place].clone(), after))

    output, width = generate(scripted, call, step_callback=watch)
    size, lengths = call.knobs["block_size"], new_lengths(output).tolist()
    passes = [0] * len(lengths)
    for (row, number), steps in seen.items():
        assert [step for step, _, _ in steps] == list(range(len(steps)))
        assert (steps[0][1] == MASK).all()
        for (_, _, after), (_, then, _) in pairwise(steps):
            assert torch.equal(after, then)
        passes[row] += sum(bool((before == MASK).any()) for _, before, _ in steps)
        kept = min(size, lengths[row] - number * size)
        assert kept > 0
        text = output.sequences[row, width + number * size :][:kept]
        assert torch.equal(steps[-1][2][:kept], text)
        for step, before, after in steps:
            now = ((before == MASK) & (after != MASK))[:kept]
            assert (output.commit_steps[row, number * size :][:kept][now] == step).all()
    assert passes == output.denoiser_forwards.tolist()


def decode_slowly(denoiser, prompt, knobs):
    """One greedy row by the rule "confidence", position by position: tokens, passes, commit steps, confidences."""
    stops, size, most = set(knobs["eos_token_id"] or ()), knobs["block_size"], knobs["max_new_tokens"]
    done, passes = [], 0
    while True:
        block: list[Any] = [None] * size
        for step in range(knobs["steps_per_block"]):
            open_ = [idx for idx in range(size) if block[idx] is None]
            if not open_:
                break
            ids = torch.tensor([[MASK if place is None else place[0] for place in block]])
            length = torch.tensor([len(prompt) + len(done)])
            logits = denoiser.logits(ids, length, torch.tensor([len(open_) / size]))[0]
            logits[:, MASK] = -torch.inf
            confidence, choice = (each.tolist() for each in logits.softmax(-1).max(-1))
            passes += 1
            sure = sum(confidence[idx] > knobs["confidence_threshold"] for idx in open_)
            due = -(-len(open_) // (knobs["steps_per_block"] - step))
            for idx in sorted(open_, key=lambda idx: -confidence[idx])[: max(sure, due, 1)]:
                block[idx] = (choice[idx], step, confidence[idx])
            for idx, place in enumerate(block):
                if place is None:
                    break
                if place[0] in stops or len(done) + idx + 1 == most:
                    return done + block[: idx + 1], passes
        done += block


@given(call=calls(rules=("confidence",), sampled=(False,)))
def test_every_row_is_what_a_plain_loop_gives(scripted, denoiser, call):
    output, width = generate(scripted, call)
    for idx, prompt in enumerate(call.prompts):
        places, passes = decode_slowly(denoiser, prompt, call.knobs)
        tokens, steps, confidences = zip(*places, strict=True)
        count = len(places)
        assert new_lengths(output)[idx] == count
        assert output.sequences[idx, width : width + count].tolist() == list(tokens)
        assert output.denoiser_forwards[idx] == passes
        assert output.commit_steps[idx, :count].tolist() == list(steps)
        assert output.confidences[idx, :count].tolist() == pytest.approx(list(confidences), rel=1e-4)


def assert_row(output, width, place, alone, own_width):
    """One row of a batch has all that it has alone, to the last counter."""
    count = int(new_lengths(alone)[0])
    assert new_lengths(output)[place] == count
    assert torch.equal(output.sequences[place, width : width + count], alone.sequences[0, own_width:])
    for name in (*COUNTERS, "accepted_lengths", "acceptance"):
        if name in output:
            torch.testing.assert_close(output[name][place], alone[name][0], rtol=0, atol=0, equal_nan=True)
    for name in RECORDED:
        torch.testing.assert_close(output[name][place, :count], alone[name][0], rtol=1e-4, atol=1e-5, msg=name)


@settings(max_examples=60)
@given(call=calls())
def test_neighbours_padding_and_order_do_not_matter(scripted, call):
    alone = [generate(scripted, call, [idx]) for idx in range(len(call.prompts))]
    other_side = "right" if call.side == "left" else "left"
    for order, side in ((None, call.side), (call.order, other_side), (call.order[:2], call.side)):
        output, width = generate(scripted, call._replace(side=side), order)
        for place, idx in enumerate(range(len(alone)) if order is None else order):
            assert_row(output, width, place, *alone[idx])


@settings(max_examples=12)
@pytest.mark.parametrize("mode", MODES)
@given(call=calls())
def test_neighbours_do_not_matter_to_real_towers_in_any_mode(real, mode, call):
    knobs = {"mode": mode}
    if mode == "self_speculative":
        knobs |= {"block_size": call.knobs["block_size"] + 1, "draft_steps": call.knobs["steps_per_block"]}
    output, width = generate(real, call, call.order, **knobs)
    for place, idx in enumerate(call.order):
        assert_row(output, width, place, *generate(real, call, [idx], **knobs))


# Settings under which rows come to different steps of their blocks, in one of which more is due than in others.
TEXT_READERS = {
    "vectorised": (lambda: {"repetition_penalty": 4.0}, 3),
    "vectorised, which forbids": (lambda: {"no_repeat_ngram_size": 1}, 3),
    "asked": (OF_CODE["stateless"], 3),
    "stateful": (OF_CODE["per row"], 4),
}


@pytest.mark.parametrize("kind", list(TEXT_READERS))
@pytest.mark.parametrize("rule", ["confidence", "left_to_right"])
def test_neighbours_at_other_steps_do_not_matter_to_processors_that_read_the_text(real, kind, rule):
    (make, steps), ids = TEXT_READERS[kind], random_ids(4, 5, seed=1)
    knobs = {"block_size": 8, "steps_per_block": steps, "confidence_threshold": 0.06, "unmasking_rule": rule}
    knobs |= {"max_new_tokens": 36, "eos_token_id": None, "pad_token_id": PAD, "return_dict_in_generate": True}
    together = real.generate(ids, **knobs, **make())
    for idx in range(len(ids)):
        assert_row(together, 5, idx, real.generate(ids[idx : idx + 1], **knobs, **make()), 5)


@settings(max_examples=20)
@pytest.mark.parametrize("mode", MODES[1:])
@given(call=calls())
def test_every_mode_ends_within_its_budget(real, mode, call):
    size, drafts = call.knobs["block_size"] + 1, call.knobs["steps_per_block"]
    output, width = generate(real, call, mode=mode, block_size=size, draft_length=size, draft_steps=drafts)
    stops = set(call.knobs["eos_token_id"] or ())
    for idx, length in enumerate(new_lengths(output).tolist()):
        text = output.sequences[idx, width : width + length].tolist()
        assert not stops & set(text[:-1])
        assert text[-1] in stops or length == call.knobs["max_new_tokens"]
        denoised, read = int(output.denoiser_forwards[idx]), int(output.context_forwards[idx])
        if mode == "ar":
            assert (denoised, read) == (0, length)
        elif mode == "mock_ar":
            # A prompt of one token leaves nothing to read before it.
            assert (denoised, read) == (length, length - (len(call.prompts[idx]) == 1))
        else:
            cycles = read - 1
            assert cycles <= denoised <= cycles * drafts
            assert -(-(length - 1) // size) <= cycles <= length - 1


@settings(max_examples=30)
@given(call=calls(sampled=(True,)))
def test_a_row_draws_by_its_own_seed(scripted, call):
    first, width = generate(scripted, call)
    again, _ = generate(scripted, call)
    assert torch.equal(first.sequences, again.sequences)
    # Other seeds for all rows but the first leave it as it is.
    others = [call.seeds[0], *(seed ^ 1 for seed in call.seeds[1:])]
    changed, _ = generate(scripted, call._replace(seeds=others))
    count = int(new_lengths(first)[0])
    assert torch.equal(changed.sequences[0, width : width + count], first.sequences[0, width : width + count])
    assert changed.denoiser_forwards[0] == first.denoiser_forwards[0]


def test_seeds_matter(scripted):
    knobs = {"block_size": 8, "steps_per_block": 8, "max_new_tokens": 24, "eos_token_id": None}
    knobs |= {"unmasking_rule": "confidence", "do_sample": True, "temperature": 2.0}
    call = Call([[5, 6, 7]] * 3, [1, 2, 1], "left", [0, 1, 2], 1.0, knobs)
    new = generate(scripted, call)[0].sequences[:, 3:]
    assert torch.equal(new[0], new[2])
    assert not torch.equal(new[0], new[1])
