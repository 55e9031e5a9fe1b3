"""Choosing tokens: the noise, what logits processors see of a row, and the distribution that is drawn from."""

import math
from itertools import pairwise

import pytest
import torch
from test_generation import padded
from tiny import random_ids, tiny_model, without_special_tokens
from transformers import LogitsProcessor, LogitsProcessorList

from twotower import Stateless
from twotower.decoding.sampling import RowLogitsProcessors, _hash, derived_seeds, gumbel_noise, uniform_noise
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES

# SplitMix64 of seed 1234567, from Vigna's reference program.
SPLITMIX64 = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
EULER_GAMMA = 0.5772156649

GREEDY_PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[32], [30, 19], [24]]},
    "suppress_tokens": {"suppress_tokens": [30, 31, 32]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(4, 36))},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(4, 40))},
    "min_length": {"min_length": 11, "eos_token_id": list(range(4, 40))},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
    "sequence_bias": {"sequence_bias": {(32,): -9.0, (30, 11): 9.0}},
    "renormalize_logits": {"renormalize_logits": True},
}
WARPERS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_k": 0, "top_p": 0.7},
    "top_h": {"top_k": 0, "top_h": 0.7},
    "min_p": {"top_k": 0, "min_p": 0.1},
    "typical_p": {"top_k": 0, "typical_p": 0.6},
    "epsilon_cutoff": {"top_k": 0, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"top_k": 0, "eta_cutoff": 0.05},
}


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model("each kind once"))


@pytest.fixture(scope="module")
def small_vocabulary():
    return tiny_model("each kind once", vocab_size=12, mask_token_id=3)


@pytest.fixture(scope="module")
def rows():
    return [random_ids(length, seed=length) for length in (7, 3, 5)]


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 10, "pad_token_id": 0, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, **kwargs)


def own_tokens(output, width):
    """Each row's new tokens and no padding: log-probabilities are NaN there."""
    new, kept = output.sequences[:, width:], ~output.log_probs.isnan()
    return [row[keep].tolist() for row, keep in zip(new, kept, strict=True)]


def assert_rows_as_alone(model, rows, **kwargs):
    kwargs.setdefault("max_new_tokens", 7)
    ids, mask = padded(rows, "left")
    together = own_tokens(generate(model, ids, attention_mask=mask, **kwargs), ids.shape[1])
    assert together == [own_tokens(generate(model, row[None], **kwargs), len(row))[0] for row in rows]


# The noise.


def as_int64(number):
    return (number + 2**63) % 2**64 - 2**63


def test_the_hash_is_splitmix64():
    states = [as_int64(1234567 + idx * GOLDEN_GAMMA) for idx in range(len(SPLITMIX64))]
    assert [number % 2**64 for number in _hash(torch.tensor(states)).tolist()] == SPLITMIX64


def test_noise_has_the_moments_of_its_distribution():
    seeds, positions = torch.arange(64), torch.arange(32).expand(64, -1)
    gumbel = gumbel_noise(seeds, positions, 128).flatten().double()
    error = 1 / math.sqrt(len(gumbel))
    assert gumbel.isfinite().all()
    assert gumbel.mean().item() == pytest.approx(EULER_GAMMA, abs=6 * error)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, abs=12 * error)
    # P(max of the noise > x) must hold far out: e^-x.
    assert (gumbel > 8).double().mean().item() == pytest.approx(1 - math.exp(-math.exp(-8)), rel=0.4)
    uniform = torch.stack([uniform_noise(seeds, positions, step) for step in range(16)]).flatten().double()
    error = 1 / math.sqrt(len(uniform))
    assert uniform.min() > 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=2 * error)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=error)


def test_noise_of_neighbours_is_uncorrelated():
    seeds, positions = torch.arange(64), torch.arange(64).expand(64, -1)
    noise = gumbel_noise(seeds, positions, 64).double() - EULER_GAMMA
    for axis in range(3):
        ahead, behind = noise.narrow(axis, 1, 63), noise.narrow(axis, 0, 63)
        assert abs((ahead * behind).mean().item()) < 6 * (math.pi**2 / 6) / math.sqrt(ahead.numel())
    steps = torch.stack([uniform_noise(seeds, positions, step) for step in range(8)]).double() - 0.5
    gumbel_like = -(-(steps + 0.5).log()).log() - EULER_GAMMA
    assert abs((steps[1:] * steps[:-1]).mean().item()) < 6 / 12 / math.sqrt(steps[1:].numel())
    assert abs((gumbel_like[0] * noise[..., 0]).mean().item()) < 6 * (math.pi**2 / 6) / math.sqrt(64 * 64)


def test_noise_depends_on_seed_and_place_alone():
    seeds = torch.tensor([5, -(2**63), 2**63 - 1, 0])
    positions = torch.tensor([[0, 1, 2], [7, 8, 9], [0, 1, 2], [2**40, 3, 3]])
    noise, uniform = gumbel_noise(seeds, positions, 50), uniform_noise(seeds, positions, 3)
    assert noise.dtype == uniform.dtype == torch.float32
    state = torch.get_rng_state()
    for row, column in ((0, 2), (1, 0), (2, 1), (3, 0)):
        place = seeds[row : row + 1], positions[row : row + 1, column : column + 1]
        # A larger vocabulary adds noise and changes none.
        assert torch.equal(gumbel_noise(*place, 60)[0, 0, :50], noise[row, column])
        assert torch.equal(uniform_noise(*place, 3)[0, 0], uniform[row, column])
    assert torch.equal(noise[3, 1], noise[3, 2])
    assert torch.equal(torch.get_rng_state(), state)
    # Numbers that any device must give.
    assert gumbel_noise(torch.tensor([0]), torch.tensor([[0]]), 3).shape == (1, 1, 3)


def test_derived_seeds():
    seeds = torch.tensor([3, -9, 2**62])
    derived = derived_seeds(seeds, 4).view(3, 4)
    assert torch.equal(derived[:, 0], seeds)
    assert len(derived.unique()) == 12
    assert torch.equal(derived_seeds(seeds, 1), seeds)
    assert torch.equal(derived_seeds(seeds, 2).view(3, 2), derived[:, :2])


def test_derived_seeds_are_the_same_in_every_release():
    """What a seed drew for a copy of a row, it draws again: SplitMix64 of the seed's own output less the copy."""
    assert derived_seeds(torch.tensor([0, 7, -9]), 4).view(3, 4).tolist() == [
        [0, 627405149472732430, -2896775031061218759, -4030626764348681087],
        [7, 4414019431610648415, 5090977316425868581, 7758145696617331093],
        [-9, -5195676045458349740, -2572965844319346807, 6653908922690995319],
    ]


# Logits processors.


class Recorder(LogitsProcessor):
    """Keeps what it was shown, and changes nothing."""

    stateless = True  # as far as its answers go

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        self.seen.append(input_ids[0].tolist())
        return scores


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_a_processor_sees_each_rows_own_text(model, rows, mode):
    recorder = Recorder()
    ids, mask = padded(rows, "right")
    output = generate(model, ids, attention_mask=mask, mode=mode, logits_processor=[recorder], max_new_tokens=4)
    new = output.sequences[:, ids.shape[1] :].tolist()
    expected = [row.tolist() + more[:length] for length in range(4) for row, more in zip(rows, new, strict=True)]
    assert recorder.seen == expected


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative"])
def test_a_processor_sees_the_block_before_a_position(model, rows, mode):
    recorder = Recorder()
    ids, mask = padded(rows, "left")
    output = generate(
        model, ids, attention_mask=mask, mode=mode, logits_processor=[recorder], max_new_tokens=9, draft_steps=2
    )
    texts = [row.tolist() + new for row, new in zip(rows, own_tokens(output, ids.shape[1]), strict=True)]
    seen_last = {}
    for seen in recorder.seen:
        owner = [idx for idx, row in enumerate(rows) if seen[: len(row)] == row.tolist()]
        assert len(owner) == 1, "a row's text begins with its prompt, without padding"
        assert model.config.mask_token_id not in seen
        seen_last[owner[0], len(seen)] = seen
    # The choice that stayed was made after the text that stands before it, and there was none beyond the end.
    assert seen_last == {
        (idx, length): text[:length]
        for idx, (row, text) in enumerate(zip(rows, texts, strict=True))
        for length in range(len(row), len(row) + 9)
    }


def test_a_processor_is_asked_about_open_positions_only(model):
    recorder = Recorder()
    prompt = random_ids(1, 5, seed=3)
    generate(model, prompt, logits_processor=[recorder], max_new_tokens=4, confidence_threshold=1.0)
    # Four positions, of which one is committed per pass, unless the text's end comes before.
    assert [len(seen) for seen in recorder.seen[:4]] == [5, 6, 7, 8]
    assert len(recorder.seen) == 4 + 3 + 2 + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*GREEDY_PROCESSORS, *WARPERS])
def test_a_processed_row_of_a_padded_batch_is_the_row_alone(model, rows, name, mode):
    extra = {"do_sample": True, "seed": 4, **WARPERS[name]} if name in WARPERS else GREEDY_PROCESSORS[name]
    assert_rows_as_alone(model, rows, mode=mode, **extra)


@pytest.mark.parametrize("mode", MODES)
def test_all_processors_at_once(model, rows, mode):
    extra = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [30], "temperature": 0.8}
    extra |= {"sequence_bias": {(11,): 1.0}, "bad_words_ids": [[32]], "top_p": 0.9, "top_k": 12}
    assert_rows_as_alone(model, rows, mode=mode, do_sample=True, seed=4, **extra)


@pytest.mark.parametrize("mode", MODES)
def test_prefix_allowed_tokens_fn_gets_the_rows_number(model, rows, mode):
    asked = []

    def allowed(batch_id, text):
        asked.append((batch_id, text.tolist()))
        return list(range(10 + 5 * batch_id, 15 + 5 * batch_id))

    ids, mask = padded(rows, "left")
    output = generate(
        model,
        ids,
        attention_mask=mask,
        mode=mode,
        prefix_allowed_tokens_fn=allowed,
        num_return_sequences=2,
        do_sample=True,
    )
    for row, new in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
        assert all(10 + 5 * row <= token < 15 + 5 * row for token in new)
    assert all(text[: len(rows[batch_id // 2])] == rows[batch_id // 2].tolist() for batch_id, text in asked)


@pytest.mark.parametrize("mode", MODES)
def test_a_users_processors_apply_in_their_order(model, rows, mode):
    class Prefer(LogitsProcessor):
        def __init__(self, token):
            self.token = token

        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -100.0)
            scores[:, self.token] = 0
            return scores

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([20]), -torch.inf).index_fill(1, torch.tensor([21]), 1.0)

    output = generate(model, rows[0][None], mode=mode, logits_processor=LogitsProcessorList([Prefer(20), Ban()]))
    assert (output.sequences[0, len(rows[0]) :] == 21).all()


@pytest.mark.parametrize("side", ["left", "alone"])
@pytest.mark.parametrize("name", GREEDY_PROCESSORS)
def test_ar_is_transformers_generate(model, rows, name, side):
    baseline = context_tower_in_transformers(model)
    flags = {"max_new_tokens": 10, "pad_token_id": 0, "do_sample": False, **GREEDY_PROCESSORS[name]}
    for row in rows:
        theirs = baseline.generate(row[None], **flags)
        if side == "alone":
            assert torch.equal(model.generate(row[None], mode="ar", **flags), theirs)
        else:
            ids, mask = padded([row, random_ids(12, seed=9)], "left")
            ours = model.generate(ids, attention_mask=mask, mode="ar", **flags)[0, 12:]
            theirs = theirs[0, len(row) :]
            assert torch.equal(ours[: len(theirs)], theirs)
            assert (ours[len(theirs) :] == 0).all()


@pytest.mark.parametrize("name", WARPERS)
def test_scores_are_those_of_transformers(model, rows, name):
    baseline = context_tower_in_transformers(model)
    ours = generate(
        model, rows[0][None], mode="ar", do_sample=True, seed=1, max_new_tokens=1, output_scores=True, **WARPERS[name]
    )
    flags = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True}
    theirs = baseline.generate(rows[0][None], output_scores=True, **flags, **WARPERS[name])
    assert torch.equal(ours.scores[0].isinf(), theirs.scores[0].isinf())
    torch.testing.assert_close(ours.scores[0], theirs.scores[0], atol=1e-4, rtol=1e-4)


def test_row_processors_without_any_return_the_logits_themselves():
    logits = torch.randn(2, 3, 5)
    nothing = RowLogitsProcessors(lambda _: LogitsProcessorList(), 2)
    assert nothing(logits, torch.arange(2), lambda: pytest.fail("no text is needed")) is logits


def test_row_processors_do_not_change_the_logits():
    def add_one(input_ids, scores):
        scores += 1
        return scores

    logits = torch.randn(3, 1, 5)
    before = logits.clone()
    processors = RowLogitsProcessors(lambda _: LogitsProcessorList([add_one]), 3)
    scores = processors(logits, [0, 1, 2], [torch.arange(6), None, torch.arange(4)])
    assert torch.equal(logits, before)
    torch.testing.assert_close(scores, logits + torch.tensor([1.0, 0.0, 1.0])[:, None, None])


@pytest.mark.parametrize("mode", MODES)
def test_what_must_not_stand_in_the_text_does_not(model, rows, mode):
    ids, mask = padded(rows, "left")
    knobs = {"attention_mask": mask, "mode": mode, "max_new_tokens": 40, "steps_per_block": 2}
    pairs = [set(pairwise(row)) for row in own_tokens(generate(model, ids, **knobs), ids.shape[1])]
    found = own_tokens(generate(model, ids, no_repeat_ngram_size=2, **knobs), ids.shape[1])
    for row, new in zip(rows, found, strict=True):
        text = list(pairwise(row.tolist() + new))
        assert len(set(text)) == len(text)
    bad_words = [list(pair) for some in pairs for pair in some]
    for new in own_tokens(generate(model, ids, bad_words_ids=bad_words, **knobs), ids.shape[1]):
        assert not set(pairwise(new)) & set(map(tuple, bad_words))


@pytest.mark.parametrize("mode", MODES)
def test_a_grammar_is_asked_about_its_own_texts_only(model, rows, mode):
    """Three sentences and their ends; and a bias with a value for every place of the text, no more."""
    sentences = [[10, 11, 12, 9], [10, 11, 20, 21, 22, 9], [30, 31, 9]]
    goes_on = {}
    for sentence in sentences:
        for length, token in enumerate(sentence):
            goes_on.setdefault(tuple(sentence[:length]), []).append(token)

    def allowed(number, text):
        return goes_on[tuple(text[len(rows[number]) :].tolist())]

    places = torch.zeros(6)
    starts = {row[0].item(): len(row) for row in rows}

    def bias(text, scores):
        return scores + places[text.shape[1] - starts[text[0, 0].item()]]

    ids, mask = padded(rows, "left")
    flags = {
        "prefix_allowed_tokens_fn": allowed,
        "logits_processor": [Stateless(bias)],
        "eos_token_id": 9,
        "max_new_tokens": 6,
    }
    for sampled in ({}, {"do_sample": True, "temperature": 5.0, "seed": 1}):
        output = generate(model, ids, attention_mask=mask, mode=mode, draft_steps=2, **flags, **sampled)
        assert all(new in sentences for new in own_tokens(output, ids.shape[1]))


def test_the_mask_is_not_written_whatever_processors_make_of_it(model):
    def level(input_ids, scores):
        return torch.zeros_like(scores)

    prompt = random_ids(2, 5, seed=3)
    output = generate(model, prompt, logits_processor=[Stateless(level)], do_sample=True, seed=1, max_new_tokens=200)
    assert (output.sequences[:, 5:] == 0).any()
    assert not (output.sequences == model.config.mask_token_id).any()
    with pytest.raises(ValueError, match="forbid every token but the mask id 3"):
        generate(model, prompt, prefix_allowed_tokens_fn=lambda *_: [3])

    # To the context tower it is a token like any other; that it cannot be drafted must not show.
    def mask_at_7(_, text):
        return [3] if len(text) == 7 else range(48)

    texts = [
        generate(model, prompt, mode=mode, prefix_allowed_tokens_fn=mask_at_7) for mode in ("ar", "self_speculative")
    ]
    assert (texts[0].sequences[:, 7] == 3).all()
    assert torch.equal(texts[0].sequences, texts[1].sequences)


@pytest.mark.parametrize("mode", MODES)
def test_a_processor_that_answers_for_a_whole_batch_is_refused(model, mode):
    def bias(input_ids, scores):
        return scores + torch.zeros(2, 48)

    with pytest.raises(ValueError, match=r"function returned scores of shape \(2, 48\) for \(1, 48\)"):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[Stateless(bias)])


# What is drawn.

SEEDS = 4096


def chi_square_is_plausible(observed, expected):
    """Whether Pearson's statistic of two tensors of counts lies within five deviations; small cells are merged."""
    observed, expected = observed.flatten().double(), expected.flatten().double()
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@torch.no_grad()
def exact_pairs(model, prompt):
    """(V, V) probability of the next two tokens after (1, P), by `forward` alone."""
    vocab = model.config.vocab_size
    first = model(prompt).logits[0, -1].double().softmax(-1)
    longer = torch.cat([prompt.expand(vocab, -1), torch.arange(vocab)[:, None]], dim=1)
    return first[:, None] * model(longer).logits[:, -1].double().softmax(-1)


def drawn(model, ids, **flags):
    """Text sampled from the whole vocabulary, which no token ends."""
    return generate(model, ids, do_sample=True, top_k=0, eos_token_id=None, **flags).sequences


def count_pairs(text):
    """(12, 12) how often each two tokens follow the prompt of five."""
    return torch.zeros(12, 12).index_put((text[:, 5], text[:, 6]), torch.ones(len(text)), accumulate=True)


@pytest.mark.parametrize("mode", ["ar", "self_speculative"])
@pytest.mark.parametrize("offset", [0, 10**12])
def test_pairs_are_drawn_with_their_exact_probabilities(small_vocabulary, mode, offset):
    model, prompt = small_vocabulary, random_ids(1, 5, vocab_size=12, seed=2)
    seeds = (torch.arange(SEEDS) + offset).tolist()
    counts = count_pairs(drawn(model, prompt.expand(SEEDS, -1), mode=mode, seed=seeds, max_new_tokens=2))
    assert chi_square_is_plausible(counts, SEEDS * exact_pairs(model, prompt))
    assert not chi_square_is_plausible(counts, torch.full((12, 12), SEEDS / 144)), "the test can tell"


@pytest.mark.parametrize("mode", ["ar", "self_speculative"])
def test_a_later_token_is_drawn_given_what_was_drawn_before(small_vocabulary, mode):
    model, prompt = small_vocabulary, random_ids(1, 4, vocab_size=12, seed=6)
    text = drawn(model, prompt.expand(SEEDS, -1), mode=mode, seed=list(range(SEEDS)), max_new_tokens=5)
    with torch.no_grad():
        expected = model(text).logits.double().softmax(-1)
    for position in range(4, 9):
        counts = text[:, position].bincount(minlength=12)
        assert chi_square_is_plausible(counts, expected[:, position - 1].sum(0)), position


def test_copies_of_a_row_are_drawn_independently(small_vocabulary):
    model, prompt = small_vocabulary, random_ids(1, 5, vocab_size=12, seed=2)
    counts = count_pairs(drawn(model, prompt, mode="ar", seed=7, num_return_sequences=SEEDS, max_new_tokens=2))
    assert chi_square_is_plausible(counts, SEEDS * exact_pairs(model, prompt))


def test_self_speculation_draws_the_text_of_ar(model, rows):
    for temperature in (0.7, 1.5):
        ids, mask = padded(rows, "left")
        flags = {"attention_mask": mask, "do_sample": True, "temperature": temperature, "seed": [1, 2, 3]}
        flags |= {"max_new_tokens": 20}
        expected = generate(model, ids, mode="ar", **flags).sequences
        for draft_steps in (1, 3):
            ours = generate(model, ids, mode="self_speculative", draft_steps=draft_steps, **flags).sequences
            assert torch.equal(ours, expected)


# Seeds.

DRAW = {"do_sample": True, "temperature": 2.0}


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(model, rows, mode):
    ids, mask = padded(rows, "left")
    together = generate(model, ids, attention_mask=mask, mode=mode, seed=[11, 12, 13], **DRAW)
    texts = own_tokens(together, ids.shape[1])
    for idx, row in enumerate(rows):
        torch.manual_seed(idx)
        alone = generate(model, row[None], mode=mode, seed=11 + idx, **DRAW)
        assert own_tokens(alone, len(row))[0] == texts[idx]
        assert own_tokens(generate(model, row[None], mode=mode, seed=[11 + idx], **DRAW), len(row))[0] == texts[idx]
        assert own_tokens(generate(model, row[None], mode=mode, seed=90 + idx, **DRAW), len(row))[0] != texts[idx]


@pytest.mark.parametrize("mode", MODES)
def test_the_forms_of_a_seed(model, rows, mode):
    pair = rows[0].expand(2, -1)
    as_list = generate(model, pair, mode=mode, seed=[5, 5], **DRAW).sequences
    assert torch.equal(as_list, generate(model, pair, mode=mode, seed=5, **DRAW).sequences)
    assert torch.equal(as_list, generate(model, pair, mode=mode, seed=torch.tensor([5, 5]), **DRAW).sequences)
    assert torch.equal(as_list[0], as_list[1])
    four = generate(model, pair, mode=mode, seed=[5, 6], num_return_sequences=2, **DRAW).sequences
    assert torch.equal(four[0], as_list[0])
    assert torch.equal(four[2:3], generate(model, pair[:1], mode=mode, seed=6, **DRAW).sequences)
    each = generate(model, pair, mode=mode, seed=[5, 6, 7, 8], num_return_sequences=2, **DRAW).sequences
    assert torch.equal(each[1:2], generate(model, pair[:1], mode=mode, seed=6, **DRAW).sequences)
    free = generate(model, pair, mode=mode, **DRAW).sequences
    assert not torch.equal(free[0], free[1])


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], []])
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_number_of_seeds_is_refused(model, rows, mode, seeds):
    with pytest.raises(ValueError, match=f"seed holds {len(seeds)} numbers for 2 prompts"):
        generate(model, rows[0].expand(2, -1), mode=mode, seed=seeds, **DRAW)


def test_a_seed_without_sampling_changes_nothing(model, rows):
    for mode in MODES:
        plain = generate(model, rows[0][None], mode=mode, do_sample=False).sequences
        assert torch.equal(generate(model, rows[0][None], mode=mode, do_sample=False, seed=3).sequences, plain)
