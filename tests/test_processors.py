"""Logits processors and stopping criteria that may keep state get the calls transformers would make of them."""

from itertools import pairwise

import pytest
import torch
from test_generation import padded
from tiny import random_ids, tiny_model, without_special_tokens
from transformers.generation import logits_process

from twotower import PerRow, Stateless
from twotower.compat_twotower import MaxTimeCriteria
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES

BLOCK_MODES = ("mask_diffusion", "self_speculative")
PAD = 1
# With these the rows end after 4, 9 and 1 tokens in mode "ar" under PENALTY.
ENDS = [13, 44]
PENALTY = 1.2


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model("all kinds"))


@pytest.fixture(scope="module")
def rows():
    return [random_ids(length, seed=length) for length in (7, 3, 5)]


class Spy:
    """Writes down what it is shown, as a processor or a criterion that ends nothing."""

    def __init__(self, calls, kind, answer=False):
        self.calls, self.kind, self.answer = calls, kind, answer

    def __call__(self, input_ids, scores):
        shape = None if self.kind == "criterion" else tuple(scores.shape)
        self.calls.append((self.kind, input_ids.tolist(), shape))
        return scores if shape else self.answer


def spies(calls):
    return {"logits_processor": [Spy(calls, "processor")], "stopping_criteria": [Spy(calls, "criterion")]}


def generate(model, ids, **flags):
    return model.generate(ids, **{"max_new_tokens": 12, "pad_token_id": PAD, **flags})


@pytest.mark.parametrize("copies", [1, 2])
def test_ar_makes_the_calls_of_transformers(model, rows, copies):
    ids, mask = padded(rows, "left")
    ids = ids.masked_fill(mask == 0, PAD)
    flags = {"attention_mask": mask, "eos_token_id": ENDS, "repetition_penalty": PENALTY}
    if copies > 1:
        flags |= {"do_sample": True, "top_k": 1, "num_return_sequences": copies}
    ours, theirs = [], []
    found = generate(model, ids, mode="ar", **flags, **spies(ours))
    expected = generate(context_tower_in_transformers(model), ids, **flags, **spies(theirs))
    ends = [next(i for i, token in enumerate([*row, *ENDS]) if token in ENDS) for row in expected[:, 7:].tolist()]
    assert len(set(ends)) == 3, "rows must end at different places"
    assert torch.equal(found, expected)
    assert ours == theirs
    assert ours[0][1] == ids.repeat_interleave(copies, 0).tolist() and ours[0][2] == (3 * copies, 48)


def test_mock_ar_makes_such_calls_too(model, rows):
    ids, mask = padded(rows, "right")
    calls = []
    output = generate(model, ids, attention_mask=mask, mode="mock_ar", eos_token_id=list(range(30)), **spies(calls))
    left, _ = padded(rows, "left")
    text = torch.cat([left, output[:, 7:]], dim=1).tolist()
    width = len(text[0])
    assert [(kind, len(shown[0])) for kind, shown, _ in calls] == [
        (kind, length + more) for length in range(7, width) for kind, more in (("processor", 0), ("criterion", 1))
    ]
    assert all(shown == [row[: len(shown[0])] for row in text] for _, shown, _ in calls)


# Self-speculation.


def of_kind(calls, kind="processor"):
    return [call for call in calls if call[0] == kind]


@pytest.mark.parametrize("draft_steps", [1, 3])
@pytest.mark.parametrize("flags", [{}, {"repetition_penalty": PENALTY}, {"do_sample": True, "seed": 3}])
def test_self_speculation_makes_the_calls_of_ar(model, rows, draft_steps, flags):
    for row in rows:
        calls = {"ar": [], "self_speculative": []}
        texts = [
            generate(
                model, row[None], mode=mode, eos_token_id=ENDS, draft_steps=draft_steps, **flags, **spies(calls[mode])
            )
            for mode in calls
        ]
        assert torch.equal(*texts)
        for kind in ("processor", "criterion"):
            assert of_kind(calls["self_speculative"], kind) == of_kind(calls["ar"], kind)


class EndsAt:
    """Ends each row at a length of its own, once; counts its calls as a row's tokens."""

    def __init__(self, lengths):
        self.lengths, self.asked = lengths, 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        assert len(input_ids) == len(self.lengths)
        return torch.tensor([self.asked == length for length in self.lengths])


@pytest.mark.parametrize("kind", ["shared", "own", "stateless"])
def test_nothing_is_asked_beyond_a_criterion(model, rows, kind):
    ids, mask = padded(rows, "left")
    lengths = [5, 3, 9]
    criterion = {
        "shared": lambda: EndsAt(lengths),
        "own": lambda: PerRow(lambda row: EndsAt([lengths[row]])),
        "stateless": lambda: Stateless(lambda text, _: len(text[0]) % 7 == 0),
    }[kind]
    texts, calls = [], []
    for mode in ("ar", "self_speculative"):
        asked = [[] for _ in rows]
        own = PerRow(lambda row, asked=asked: Spy(asked[row], "processor"))
        flags = {"logits_processor": [own], "stopping_criteria": [criterion()], "return_dict_in_generate": True}
        texts.append(generate(model, ids, attention_mask=mask, mode=mode, draft_steps=2, **flags).sequences)
        calls.append(asked)
    assert torch.equal(*texts)
    assert calls[0] == calls[1]
    new = [len(asked) for asked in calls[0]]
    assert new == (lengths if kind != "stateless" else [7, 4, 2])
    assert all(shape == (1, 48) for asked in calls[0] for _, _, shape in asked)
    assert all(
        shown[0][: len(row)] == row.tolist()
        for row, asked in zip(rows, calls[0], strict=True)
        for _, shown, _ in asked
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_rows_own_criterion_is_asked_no_more_once_it_has_ended_its_row(model, mode):
    calls = []

    def ends_from_the_second_on(row):
        spy = Spy(calls, "criterion")
        return lambda ids, scores: spy(ids, scores) or len(calls) >= 2

    # Drafts that are always kept, and blocks of one pass, add several tokens at once.
    flags = {"acceptance_ratio": 1e-9, "draft_length": 4, "steps_per_block": 1}
    criteria = [PerRow(ends_from_the_second_on)]
    output = generate(model, random_ids(1, 5), mode=mode, stopping_criteria=criteria, **flags)
    assert [len(shown[0]) for _, shown, _ in calls] == [6, 7]
    assert output.shape == (1, 7)


def test_time_that_ends_within_a_pass_lets_no_token_by_unasked(model, monkeypatch):
    """As a slow grammar would: what is kept of a draft has been asked about, whatever the clock says meanwhile."""
    late = []
    monkeypatch.setattr(MaxTimeCriteria, "__call__", lambda *_: torch.tensor([bool(late)]))
    for seed in range(20):
        asked = []
        late.clear()

        def own(ids, scores, asked=asked):
            asked.append(ids.shape[1])
            late[:] = asked[2:]  # over by the third call
            return scores

        flags = {"acceptance_ratio": 1e-30, "draft_length": 4, "max_time": 60.0}
        flags |= {"stopping_criteria": [Stateless(lambda ids, _: False)]}
        processor = PerRow(lambda row, own=own: own)
        output = generate(
            model, random_ids(1, 5, seed=seed), mode="self_speculative", logits_processor=[processor], **flags
        )
        assert asked == list(range(5, output.shape[1]))


# Mask diffusion.


@pytest.mark.parametrize("kind", ["shared", "own", "stateless"])
@pytest.mark.parametrize("flags", [{"steps_per_block": 1}, {"steps_per_block": 2}, {"confidence_threshold": 0.05}])
def test_diffusion_asks_a_rows_own_about_nothing_beyond_a_criterion(model, rows, kind, flags):
    ids, mask = padded(rows, "left")
    criterion = {
        "shared": lambda: EndsAt([5, 3, 9]),
        "own": lambda: PerRow(lambda row: EndsAt([[5, 3, 9][row]])),
        "stateless": lambda: Stateless(lambda text, _: len(text[0]) % 7 == 0),
    }[kind]
    asked = [[] for _ in rows]
    own = PerRow(lambda row: Spy(asked[row], "processor"))
    more = {"stopping_criteria": [criterion()], "return_dict_in_generate": True, "output_scores": True} | flags
    generate(model, ids, attention_mask=mask, mode="mask_diffusion", logits_processor=[own], block_size=4, **more)
    assert [len(calls) for calls in asked] == ([5, 3, 9] if kind != "stateless" else [7, 4, 2])


@pytest.mark.parametrize(
    "flags", [{}, {"do_sample": True, "seed": 1}, {"steps_per_block": 2}, {"confidence_threshold": 0.05}]
)
def test_diffusion_asks_a_rows_own_about_every_token_once(model, rows, flags):
    ids, mask = padded(rows, "left")
    asked = [[] for _ in rows]
    own = PerRow(lambda row: Spy(asked[row], "processor"))
    output = generate(
        model, ids, attention_mask=mask, logits_processor=[own], repetition_penalty=PENALTY, eos_token_id=ENDS, **flags
    )
    for row, new, calls in zip(rows, output[:, 7:].tolist(), asked, strict=True):
        end = next((place + 1 for place, token in enumerate(new) if token in ENDS), 12)
        text = row.tolist() + new
        assert [shown for _, shown, _ in calls] == [[text[: len(row) + length]] for length in range(end)]


def test_diffusion_with_one_row_takes_a_shared_processor(model):
    prompt, calls = random_ids(1, 5, seed=3), []
    output = generate(model, prompt, logits_processor=[Spy(calls, "processor")])
    assert [shown for _, shown, _ in calls] == [[output[0, :length].tolist()] for length in range(5, 17)]


# What has no place for state needs no declaration.


class WithoutAttributes(logits_process.LogitsProcessor):
    """Prefers another token after every text, whatever stands before it in the row."""

    def __call__(self, input_ids, scores):
        bias = torch.zeros_like(scores)
        return scores + bias.scatter(1, (7 * input_ids[:, -1:] + 3) % 40 + 4, 5.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["function", "object"])
def test_a_plain_processor_serves_many_rows_in_every_mode(model, rows, mode, kind):
    plain = WithoutAttributes() if kind == "object" else lambda ids, scores: WithoutAttributes()(ids, scores)
    ids, mask = padded(rows, "left")
    found = generate(model, ids, attention_mask=mask, mode=mode, logits_processor=[plain])[:, 7:]
    for row, new in zip(rows, found, strict=True):
        for processor in (plain, Stateless(plain)):
            assert torch.equal(generate(model, row[None], mode=mode, logits_processor=[processor])[0, len(row) :], new)
    assert not torch.equal(generate(model, ids, attention_mask=mask, mode=mode)[:, 7:], found)


def test_in_self_speculation_a_plain_processor_is_never_asked_about_drafts(model, rows):
    calls = {row[0].item(): [] for row in rows}

    def note(input_ids, scores):
        calls[input_ids[0, 0].item()].append(input_ids[0].tolist())
        return scores

    ids, mask = padded(rows, "left")
    found = generate(model, ids, attention_mask=mask, mode="self_speculative", logits_processor=[note])[:, 7:]
    for row, new in zip(rows, found.tolist(), strict=True):
        text = row.tolist() + new
        assert calls[text[0]] == [text[:length] for length in range(len(row), len(text))]


# What is refused.


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_one_processor_for_rows_that_drift_apart_is_refused(model, mode):
    with pytest.raises(
        ValueError, match=f"Spy is one for 2 rows, and in mode '{mode}'.*PerRow.*Stateless.*mode \"ar\""
    ):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[Spy([], "processor")])
    shared = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor is one for 2 rows"):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[shared])


@pytest.mark.parametrize("argument", ["starting_block", "step_callback"])
def test_what_a_processor_would_not_see_is_refused(model, argument):
    given = {"starting_block": torch.tensor([[5, 3, 3]]), "step_callback": lambda step: None}[argument]
    with pytest.raises(
        ValueError, match=f"{argument} decides about tokens that the logits processor Spy would not see"
    ):
        generate(model, random_ids(1, 5), logits_processor=[Spy([], "processor")], **{argument: given})


@pytest.mark.parametrize("mode", MODES)
def test_per_row_must_make_one_for_each_row(model, mode):
    one = Spy([], "processor")
    with pytest.raises(ValueError, match="PerRow made the same Spy for row 1"):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[PerRow(lambda row: one)])
    with pytest.raises(ValueError, match="PerRow made the same Spy for row 1"):
        generate(model, random_ids(2, 5), mode=mode, stopping_criteria=[PerRow(lambda row: one)])
    with pytest.raises(ValueError, match="PerRow made 7 for row 0, which cannot be called"):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[PerRow(lambda row: 7)])


@pytest.mark.parametrize("mode", MODES)
def test_per_row_may_make_what_keeps_no_state(model, rows, mode):
    ids, mask = padded(rows, "left")
    penalties = [1.1, 1.6, 2.5]
    own = PerRow(lambda row: logits_process.RepetitionPenaltyLogitsProcessor(penalties[row]))
    found = generate(model, ids, attention_mask=mask, mode=mode, logits_processor=[own])[:, 7:]
    for row, penalty, new in zip(rows, penalties, found, strict=True):
        assert torch.equal(generate(model, row[None], mode=mode, repetition_penalty=penalty)[0, len(row) :], new)


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_a_processor_of_all_rows_must_answer_for_all(model, mode):
    with pytest.raises(ValueError, match=r"function returned scores of shape \(1, 48\) for \(2, 48\); all rows"):
        generate(model, random_ids(2, 5), mode=mode, logits_processor=[lambda ids, scores: scores[:1]])


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_of_all_rows_must_answer_for_all(model, mode):
    with pytest.raises(ValueError, match="criterion function gave 2 answers about a batch of 3 rows"):
        generate(model, random_ids(3, 5), mode=mode, stopping_criteria=[lambda *_: torch.tensor([True, False])])


# Criteria about the whole batch.


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_of_all_rows_ends_each_where_it_says(model, rows, mode, with_cache):
    ids, mask = padded(rows, "left")
    free = generate(model, ids, attention_mask=mask, mode=mode, max_new_tokens=30)[:, 7:]
    lengths, calls = [11, 25, 6], []
    flags = {"stopping_criteria": [EndsAt(lengths), Spy(calls, "criterion")], "max_new_tokens": 30}
    output = generate(model, ids, attention_mask=mask, mode=mode, return_dict_in_generate=with_cache, **flags)
    found = (output.sequences if with_cache else output)[:, 7:]
    expected = [row[:length].tolist() + [PAD] * (25 - length) for row, length in zip(free, lengths, strict=True)]
    assert found.tolist() == expected
    # Column after column, padded after each row's end, as in "ar".
    prompts = ids.tolist()
    assert [shown for _, shown, _ in calls] == [
        [prompt + row[:length] for prompt, row in zip(prompts, expected, strict=True)] for length in range(1, 26)
    ]
    if with_cache:
        news = random_ids(3, 1, seed=4)
        held = torch.arange(1, 26) <= torch.tensor(lengths)[:, None]
        whole = torch.cat([mask, held, torch.ones(3, 1)], dim=1).long()
        turn = torch.cat([output.sequences, news], dim=1)
        again = generate(model, turn, attention_mask=whole, mode=mode, past_key_values=output.past_key_values)
        for new, text, kept in zip(again[:, 33:], turn, whole, strict=True):
            alone = text[kept.bool()]
            assert torch.equal(generate(model, alone[None], mode=mode)[0, len(alone) :], new)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("answer", [True, torch.tensor([True])])
def test_one_answer_is_for_all_rows(model, rows, mode, answer):
    ids, mask = padded(rows, "left")
    free = generate(model, ids, attention_mask=mask, mode=mode)

    def at_ten(input_ids, scores):
        return answer if input_ids.shape == (3, 10) else False

    output = generate(model, ids, attention_mask=mask, mode=mode, stopping_criteria=[at_ten])
    assert torch.equal(output, free[:, :10])


@pytest.mark.parametrize("mode", MODES)
def test_an_end_that_all_rows_wait_for_takes_back_a_later_one(model, rows, mode):
    """A row that has met its end-of-text may have been ended by a criterion before, not due for the others."""
    ids, mask = padded(rows, "left")
    free = generate(model, ids, attention_mask=mask, mode=mode, max_new_tokens=30)[:, 7:].tolist()
    for ends in range(4, 12):
        stop = free[0][ends]
        lengths = [ends - 1, 31, 31]
        flags = {"eos_token_id": stop, "max_new_tokens": 30, "attention_mask": mask, "mode": mode}
        found = generate(model, ids, stopping_criteria=[EndsAt(lengths)], **flags)[:, 7:].tolist()
        for row, text, whole in zip(range(3), found, free, strict=True):
            end = next((place + 1 for place, token in enumerate(whole) if token == stop), 30)
            end = min(end, lengths[row])
            assert text == whole[:end] + [PAD] * (len(text) - end)


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_of_all_rows_gets_their_scores(model, rows, mode):
    ids, mask = padded(rows, "left")
    seen = []

    def record(input_ids, scores):
        seen.append(scores)
        return False

    flags = {"output_scores": True, "return_dict_in_generate": True, "attention_mask": mask, "mode": mode}
    output = generate(model, ids, stopping_criteria=[record], **flags)
    for length, scores in enumerate(seen, start=1):
        torch.testing.assert_close(torch.stack(scores), torch.stack(output.scores[:length]))
    assert len(seen) == 12
    seen.clear()
    generate(model, ids, stopping_criteria=[record], attention_mask=mask, mode=mode)
    assert set(seen) == {None}


@pytest.mark.parametrize("kind", [Stateless, lambda record: PerRow(lambda row: record), lambda record: record])
def test_criteria_are_shown_scores_that_are_made_once(model, rows, kind):
    """Making those of all earlier tokens anew would cost a text's length squared."""
    seen = []

    def record(input_ids, scores):
        seen.append(scores)
        return False

    flags = {"output_scores": True, "return_dict_in_generate": True, "mode": "ar"}
    output = generate(model, rows[0][None], stopping_criteria=[kind(record)], **flags)
    assert [len(scores) for scores in seen] == list(range(1, 13))
    torch.testing.assert_close(torch.stack(seen[-1]), torch.stack(output.scores))
    for earlier, later in pairwise(seen[1:]):
        assert all(one is other for one, other in zip(earlier[:-1], later, strict=False))


@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_never_gets_what_a_criterion_takes_back(model, rows, mode):
    ids, mask = padded(rows, "left")
    put = []

    class Streamer:
        def put(self, tokens):
            put.append(tokens)

        def end(self):
            pass

    flags = {"attention_mask": mask, "mode": mode, "eos_token_id": ENDS, "max_new_tokens": 30}
    output = generate(model, ids, streamer=Streamer(), stopping_criteria=[EndsAt([3, 20, 8])], **flags)
    assert torch.equal(torch.cat(put, dim=1), output)


# Runaway and silence.


def forbid_from(length):
    """From some length of the text on."""
    return Stateless(lambda ids, scores: scores if ids.shape[1] < length else torch.full_like(scores, -torch.inf))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("stateless", [True, False])
def test_forbidding_every_token_is_refused(model, rows, mode, tokens, stateless):
    ids, mask = padded(rows, "left")
    message = f"forbid every token.*at position {5 + tokens} of row 2, after {tokens} new tokens"

    def make(row):
        forbidding = forbid_from(5 + tokens if row == 2 else 99)
        return forbidding if stateless else forbidding.function

    with pytest.raises(ValueError, match=message):
        generate(model, ids, attention_mask=mask, mode=mode, logits_processor=[PerRow(make)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", [torch.nan, torch.inf])
def test_nothing_is_drawn_by_scores_that_are_no_numbers(model, rows, mode, score):
    row = rows[0][None]

    def processor(ids, scores):
        return scores.index_fill(1, torch.tensor([9]), score) if ids.shape[1] >= 8 else scores

    flags = {"mode": mode, "logits_processor": [Stateless(processor)]}
    assert (generate(model, row, **flags)[0, 8:] == 9).all(), "of transformers' greedy decoding, too, it is the best"
    with pytest.raises(ValueError, match=r"make scores that are no numbers.*at position 8 of row 0"):
        generate(model, row, do_sample=True, seed=1, **flags)


@pytest.mark.parametrize("mode", MODES)
def test_a_temperature_that_makes_scores_infinite_is_refused(model, rows, mode):
    greedy = generate(model, rows[0][None], mode=mode)
    sampled = {"do_sample": True, "seed": 1, "mode": mode}
    assert torch.equal(generate(model, rows[0][None], temperature=1e-30, **sampled), greedy)
    with pytest.raises(ValueError, match=r"at position 7 of row 0.*or for a temperature near 0"):
        generate(model, rows[0][None], temperature=1e-40, **sampled)


@pytest.mark.parametrize("mode", MODES)
def test_suppressing_every_token_is_refused(model, rows, mode):
    with pytest.raises(ValueError, match=r"forbid every token.*at position 7 of row 0, after 0 new tokens"):
        generate(model, rows[0][None], mode=mode, suppress_tokens=list(range(48)))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_forbidden_after_the_end_does_not_matter(model, rows, mode):
    row = rows[0]
    text = generate(model, row[None], mode=mode, max_new_tokens=4, logits_processor=[forbid_from(99)])
    limited = [forbid_from(len(row) + 4)]
    assert torch.equal(generate(model, row[None], mode=mode, max_new_tokens=4, logits_processor=limited), text)


@pytest.mark.parametrize("flags", [{}, {"do_sample": True, "seed": 1}, {"repetition_penalty": PENALTY}])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tower", ["context_tower", "denoiser_tower"])
def test_weights_that_are_no_numbers_are_refused(rows, mode, tower, flags):
    model = without_special_tokens(tiny_model("all kinds"))
    with torch.no_grad():
        getattr(model, tower).norm_f.weight[3] = torch.nan
    ids, mask = padded(rows, "left")
    unused = {"denoiser_tower": ("ar",), "context_tower": ("mask_diffusion", "mock_ar")}
    if mode in unused[tower]:
        generate(model, ids, attention_mask=mask, mode=mode, **flags)
        return
    if mode == "self_speculative":
        flags = {**flags, "draft_length": model.config.block_size}
    name = "context tower" if mode == "ar" or tower == "context_tower" else "denoiser"
    first = 1 if (mode, name) == ("self_speculative", "denoiser") else 0
    place = f"position {7 + first} of row 0, after {first}"
    with pytest.raises(ValueError, match=f"the {name} gives no numbers.*at {place} new tokens"):
        generate(model, ids, attention_mask=mask, mode=mode, **flags)
    output = generate(model, ids, attention_mask=mask, mode=mode, remove_invalid_values=True, **flags)
    assert output.shape == (3, 19)


@pytest.mark.parametrize("mode", MODES)
def test_infinite_logits_are_refused(model, rows, mode, monkeypatch):
    head = model.context_lm_head if mode in ("ar", "self_speculative") else model.lm_head

    def infinite(_, __, logits):
        logits[..., 9] = torch.inf
        return logits

    hook = head.register_forward_hook(infinite)
    with pytest.raises(ValueError, match="gives no numbers"):
        generate(model, rows[0][None], mode=mode)
    hook.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("answer", [None, "yes", object()])
def test_answers_of_another_kind_are_refused_by_name(model, mode, answer):
    with pytest.raises(ValueError, match=r"function returned .*; a logits processor returns scores, a tensor"):
        generate(model, random_ids(1, 5), mode=mode, logits_processor=[lambda ids, scores: answer])
    with pytest.raises(ValueError, match=r"stopping criterion function gave .*; it must give bools"):
        generate(model, random_ids(1, 5), mode=mode, stopping_criteria=[lambda ids, scores: answer])


@pytest.mark.parametrize("mode", MODES)
def test_max_length_counts_the_columns_that_a_criterion_of_all_rows_is_shown(model, rows, mode):
    """As in transformers, whose users count on it: lm-eval asks for the padded width and so many tokens more."""
    ids, mask = padded(rows, "left")
    calls = []
    flags = {"max_new_tokens": None, "max_length": 12, "stopping_criteria": [Spy(calls, "criterion")]}
    found = generate(model, ids, attention_mask=mask, mode=mode, **flags)
    assert found.shape == (3, 12) and max(len(shown[0]) for _, shown, _ in calls) == 12
    for row, new in zip(rows, found[:, 7:], strict=True):
        assert torch.equal(generate(model, row[None], mode=mode, max_new_tokens=5)[0, len(row) :], new)
