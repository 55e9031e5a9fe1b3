"""Mode "self_speculative" gives the text of mode "ar", whatever the denoiser drafts, and counts what it does."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny_model, without_special_tokens
from transformers import AutoTokenizer, LogitsProcessor

import twotower
from twotower import PerRow, Stateless
from twotower.decoding.rules import UNMASKING_RULES
from twotower.demo.evaluation import MAX_NEW_TOKENS
from twotower.demo.tasks import held_out_tasks
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

PAD, EOS, MASK = 0, 2, 3
# No answer of the embedded checkpoint is longer.
MOST = MAX_NEW_TOKENS


class Answer(NamedTuple):
    """One row's new tokens, end-of-text included, and its part of the rest of the output."""

    tokens: list[int]
    output: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model():
    """The embedded checkpoint: its denoiser drafts well, but not always."""
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    return [tokenizer(problem.prompt)["input_ids"] for problem in held_out_tasks("words", 200, seed=0)]


@pytest.fixture(scope="module")
def ar(model, prompts):
    """Mode "ar" on all prompts."""
    return answers(model, prompts, batch=40, mode="ar")


@pytest.fixture(scope="module")
def few(prompts):
    """Eight prompts of different lengths."""
    by_length = sorted(prompts, key=len)
    few = by_length[::28]
    assert len({len(prompt) for prompt in few}) == len(few) == 8
    return few


def padded(rows, side="left"):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for idx, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[idx, columns], mask[idx, columns] = torch.tensor(row), 1
    return ids, mask


def answers(model, rows, batch=8, side="left", seed=None, **knobs: Any) -> list[Answer]:
    """Every row's answer, in ragged batches, by drafts of whole blocks; `seed` lists one per row."""
    knobs = {"mode": "self_speculative", "max_new_tokens": MOST, "pad_token_id": PAD, **knobs}
    knobs.setdefault("draft_length", knobs.get("block_size", model.config.block_size))
    found = []
    for start in range(0, len(rows), batch):
        ids, mask = padded(rows[start : start + batch], side)
        if seed is not None:
            knobs["seed"] = seed[start : start + batch]
        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **knobs)
        new = output.sequences[:, ids.shape[1] :]
        lengths = (~output.log_probs.isnan()).sum(1).tolist()
        assert new.shape[1] == max(lengths)
        for idx, length in enumerate(lengths):
            assert (new[idx, length:] == PAD).all()
            row = {name: value[idx] for name, value in output.items() if isinstance(value, torch.Tensor)}
            found.append(Answer(new[idx, :length].tolist(), row))
    return found


def tokens(answers):
    return [answer.tokens for answer in answers]


def cycles(answer: Answer) -> list[int]:
    """How many tokens each cycle added; the context tower's own choice ends every one but perhaps the last."""
    steps = answer.output["commit_steps"][: len(answer.tokens)].tolist()
    assert steps[0] == -1
    lengths, length = [], 0
    for step in steps[1:]:
        length += 1
        if step == -1:
            lengths.append(length)
            length = 0
    return lengths + [length] * (length > 0)


# The text is that of "ar".


def test_greedy_text_on_nvidias_checkpoint(goldens):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint").eval()
    tensors = load_file(goldens / "tensors.safetensors")
    prompts = [tensors[f"p{idx}.ids"].tolist() for idx in range(5)]
    free = {"max_new_tokens": 24, "eos_token_id": None}
    expected = tokens(answers(model, prompts, batch=1, mode="ar", **free))
    assert [len(text) for text in expected] == [24] * 5
    settings = [*product((1, 2, 4), (2, 4, 8, 16, 32), (5,)), (1, 16, 1), (2, 8, 1)]
    for draft_steps, block_size, batch in settings:
        knobs = {"draft_steps": draft_steps, "block_size": block_size, **free}
        assert tokens(answers(model, prompts, batch, **knobs)) == expected, (knobs, batch)


def test_greedy_text_of_many_problems(model, prompts, ar):
    assert all(text[-1] == EOS for text in tokens(ar))
    speculative = answers(model, prompts, batch=40)
    assert tokens(speculative) == tokens(ar)
    # It is what the mode is for: most drafts are kept.
    passes = sum(int(each.output["context_forwards"] + each.output["denoiser_forwards"]) for each in speculative)
    assert passes < 0.3 * sum(int(each.output["context_forwards"]) for each in ar)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("draft_steps", [1, 2, 4])
@pytest.mark.parametrize("block_size", [4, 8, 16, 32])
def test_greedy_text_at_every_setting(model, prompts, ar, batch, draft_steps, block_size):
    rows = prompts[: max(batch, 2)]
    found = answers(model, rows, batch, draft_steps=draft_steps, block_size=block_size)
    assert tokens(found) == tokens(ar[: len(rows)])


@pytest.mark.parametrize("rule", UNMASKING_RULES)
def test_greedy_text_whatever_the_draft_commits_first(model, prompts, ar, rule):
    found = answers(model, prompts[:8], draft_steps=3, unmasking_rule=rule)
    assert tokens(found) == tokens(ar[:8])


@pytest.mark.parametrize("temperature", [4.0, 6.0])
def test_sampled_text(model, prompts, ar, temperature):
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "seed": list(range(16))}
    expected = tokens(answers(model, prompts[:16], mode="ar", **sampling))
    settings = ((1, 16, 0.8, 8), (2, 5, 0.3, 3), (4, 9, 1.0, 16))
    for draft_steps, block_size, threshold, batch in settings:
        knobs = {"draft_steps": draft_steps, "block_size": block_size, "confidence_threshold": threshold}
        assert tokens(answers(model, prompts[:16], batch, **knobs, **sampling)) == expected, knobs
    assert expected != tokens(ar[:16]), "sampling must matter"


def test_a_draft_is_drawn_by_the_noise_it_is_verified_by(model, few):
    """Where both towers have the same distribution, a draft is the verifier's own draw."""

    def uniform(input_ids, scores):
        return torch.zeros_like(scores).index_fill(1, torch.tensor([MASK]), -torch.inf)

    knobs = {"do_sample": True, "top_k": 0, "seed": list(range(3)), "logits_processor": [Stateless(uniform)]}
    knobs |= {"eos_token_id": None, "max_new_tokens": 25}
    expected = tokens(answers(model, few[:3], mode="ar", **knobs))
    assert len({tuple(text) for text in expected}) == 3
    for draft_steps in (1, 3):
        for answer, text in zip(
            answers(model, few[:3], block_size=8, draft_steps=draft_steps, **knobs), expected, strict=True
        ):
            assert answer.tokens == text
            assert (answer.output["acceptance"] == 1).all()


class Shifting(LogitsProcessor):
    """Prefers other tokens after every text: sees whether the text before a position is the right one."""

    stateless = True

    def __call__(self, input_ids, scores):
        weights = torch.arange(1, input_ids.shape[1] + 1)
        bias = torch.zeros_like(scores)
        bias[0, int((input_ids[0] * weights).sum()) % scores.shape[1]] = 40.0
        return scores + bias


PROCESSORS: dict[str, Any] = {
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "repetition_penalty": 4.0,
    "encoder_repetition_penalty": 0.5,
    "bad_words_ids": None,  # of the text
    "sequence_bias": None,
    "min_new_tokens": 60,
    "min_length": 120,
    "exponential_decay_length_penalty": (5, 1.8),
    "forced_eos_token_id": EOS,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "logits_processor": [Shifting()],
    "prefix_allowed_tokens_fn": lambda row, text: [(7 * row + 3 * len(text) + k) % 60 + 4 for k in range(20)],
}


@pytest.fixture(scope="module")
def plain_texts(model, few):
    """Mode "ar" on three prompts, greedy and sampled, and the knobs."""
    found = {}
    for sample, most in product((False, True), (24, 40, 64)):
        knobs: dict[str, Any] = {"max_new_tokens": most}
        if sample:
            knobs |= {"do_sample": True, "temperature": 0.7, "seed": list(range(3))}
        found[sample, most] = tokens(answers(model, few[1::3], mode="ar", **knobs)), knobs
    return found


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_text_with_a_logits_processor(model, few, plain_texts, name, sample):
    few = few[1::3]
    most = {"forced_eos_token_id": 24, "min_new_tokens": 64, "min_length": 64}.get(name, 40)
    plain, plain_knobs = plain_texts[sample, most]
    first, knobs = plain[0], dict(plain_knobs)
    of_text = {
        "bad_words_ids": [first[3:5], first[8:9], first[10:13]],
        "sequence_bias": {tuple(first[2:4]): -20.0, (first[6],): 3.0},
        "suppress_tokens": first[4:6],
        "begin_suppress_tokens": first[:1],
    }
    knobs[name] = of_text.get(name, PROCESSORS[name])
    expected = tokens(answers(model, few, mode="ar", **knobs))
    assert expected != plain, "the processor must matter"
    settings = {"draft_steps": 2, "block_size": 7} if sample else {}
    assert tokens(answers(model, few, **settings, **knobs)) == expected


@pytest.mark.parametrize("forced", [False, True], ids=["biased", "forced"])
def test_the_mask_id_is_a_token_like_any_other(model, few, forced):
    class PrefersTheMask(LogitsProcessor):
        """At every third place; forced, it is not even impossible to the denoiser."""

        stateless = True

        def __call__(self, input_ids, scores):
            if input_ids.shape[1] % 3 == 0:
                scores[:, MASK] = 1e3 if forced else scores[:, MASK] + 1e3
            return scores

    knobs = {"logits_processor": [PrefersTheMask()], "max_new_tokens": 24, "eos_token_id": None}
    expected = tokens(answers(model, few, mode="ar", **knobs))
    assert all(text.count(MASK) == 8 for text in expected)
    for settings in ({}, {"draft_steps": 3, "block_size": 5}):
        assert tokens(answers(model, few, **settings, **knobs)) == expected, settings


# What it counts and records.


@pytest.mark.parametrize(("draft_steps", "block_size"), [(1, 16), (3, 7), (2, 2)])
def test_passes_and_acceptance_agree_with_the_cycles_of_the_text(model, few, draft_steps, block_size):
    for most in (MOST, 20):
        knobs = {"draft_steps": draft_steps, "block_size": block_size, "max_new_tokens": most}
        for answer in answers(model, few, confidence_threshold=0.99, **knobs):
            lengths, output = cycles(answer), answer.output
            count = len(lengths)
            assert output["context_forwards"] == 1 + count
            assert count <= output["denoiser_forwards"] <= draft_steps * count
            new = len(answer.tokens)
            assert output["tokens_per_denoiser_forward"] == pytest.approx(new / int(output["denoiser_forwards"]))
            passes = int(output["denoiser_forwards"] + output["context_forwards"])
            assert output["tokens_per_forward"] == pytest.approx(new / passes)
            assert output["acceptance"].shape == (block_size - 1,)
            assert output["accepted_lengths"] == pytest.approx((new - 1) / count)
            # All tokens of a cycle but its last are drafts, and so may be the text's last.
            kept = [[length - 1 > position for position in range(block_size - 1)] for length in lengths]
            seen = (output["acceptance"] * count).round().int()
            extra = seen - torch.tensor(kept).sum(0)
            draft_at_the_end = [int(position == lengths[-1] - 1) for position in range(block_size - 1)]
            assert extra.tolist() in ([0] * (block_size - 1), draft_at_the_end)


def test_records_are_those_of_ar(model, few):
    knobs = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.1, "max_new_tokens": 40}
    ids, mask = padded(few)
    options = {"attention_mask": mask, "return_dict_in_generate": True, **knobs}
    expected = model.generate(ids, mode="ar", **options)
    for draft_steps, block_size in ((1, 16), (3, 6)):
        settings = {"draft_steps": draft_steps, "block_size": block_size}
        found = model.generate(ids, mode="self_speculative", **settings, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("log_probs", "confidences"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0, equal_nan=True)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), atol=1e-3, rtol=0)
        assert (expected.commit_steps == -1).all()
        assert set(found.commit_steps.unique().tolist()) <= set(range(-1, draft_steps))
        own = ((found.commit_steps == -1) & ~found.log_probs.isnan()).sum(1)
        lengths = (~found.log_probs.isnan()).sum(1)
        last = found.commit_steps[torch.arange(8), lengths - 1]
        # One for the prompt, and one for each cycle that was not cut before it.
        assert torch.equal(own, found.context_forwards - (last >= 0).long())


def test_sampled_log_probs_are_those_of_ar(model, few):
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "seed": list(range(8))}
    for one, other in zip(answers(model, few, mode="ar", **sampling), answers(model, few, **sampling), strict=True):
        expected = one.output["log_probs"]
        torch.testing.assert_close(other.output["log_probs"], expected, atol=1e-4, rtol=0, equal_nan=True)


# Where the text ends.


def test_a_length_limit_inside_a_cycle(model, few):
    free = {"eos_token_id": None}
    longest = tokens(answers(model, few, mode="ar", max_new_tokens=40, **free))
    for most in (1, 2, 3, 9, 16, 17, 18, 33):
        assert tokens(answers(model, few, max_new_tokens=most, **free)) == [text[:most] for text in longest]


def test_an_end_of_text_inside_a_cycle(model, few):
    free = tokens(answers(model, few, mode="ar", max_new_tokens=40, eos_token_id=None))
    for place in range(20):
        stops = sorted({free[place % 8][place], free[(place + 3) % 8][place + 7]})
        found = tokens(answers(model, few, max_new_tokens=40, eos_token_id=stops))
        for text, whole in zip(found, free, strict=True):
            end = next((idx + 1 for idx, token in enumerate(whole) if token in stops), 40)
            assert text == whole[:end]


def test_a_users_criterion_inside_a_cycle(model, few):
    def at_eleventh(input_ids, scores, **kwargs):
        return torch.tensor([(input_ids.shape[1] % 11) == 0])

    knobs = {"stopping_criteria": [Stateless(at_eleventh)], "eos_token_id": None}
    expected = tokens(answers(model, few, mode="ar", **knobs))
    assert [(len(text) + len(prompt)) % 11 for text, prompt in zip(expected, few, strict=True)] == [0] * 8
    assert tokens(answers(model, few, **knobs)) == expected


# Rows go their own ways.


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_rows_that_drift_apart_get_what_they_get_alone(model, few, sample):
    knobs = {"block_size": 8, "draft_steps": 2}
    seeds = list(range(8)) if sample else None
    if sample:
        knobs |= {"do_sample": True, "temperature": 1.5}
    alone = answers(model, few, batch=1, seed=seeds, **knobs)
    assert len({int(answer.output["context_forwards"]) for answer in alone}) > 2
    for order, side in ((range(8), "left"), ((3, 0, 5, 7, 2, 4, 1, 6), "right")):
        shuffled = [seeds[idx] for idx in order] if sample else None
        together = answers(model, [few[idx] for idx in order], side=side, seed=shuffled, **knobs)
        for answer, idx in zip(together, order, strict=True):
            assert answer.tokens == alone[idx].tokens
            assert cycles(answer) == cycles(alone[idx])
            for name in ("denoiser_forwards", "context_forwards", "accepted_lengths", "acceptance"):
                assert torch.equal(answer.output[name], alone[idx].output[name]), name


class Scripted:
    """A denoiser that drafts given texts: (R, positions) by row, the same tokens whatever the block says."""

    def __init__(self, vocab_size, texts):
        self.vocab_size, self.texts = vocab_size, texts

    def __call__(self, block_ids, past_key_values, timestep):
        # The block begins with the token after the cached ones.
        columns = past_key_values.lengths[:, None] + torch.arange(block_ids.shape[1])
        logits = torch.zeros(*block_ids.shape, self.vocab_size)
        return logits.scatter(-1, self.texts.gather(1, columns)[..., None], 20.0)


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_a_denoiser_that_is_always_wrong(model, few, monkeypatch, draft_steps):
    expected = answers(model, few, mode="ar")
    unused = max(set(range(4, model.config.vocab_size)) - {token for text in tokens(expected) for token in text})
    texts = torch.full((1, 1000), unused).expand(8, -1)

    def denoise(block_ids, past_key_values, timestep):
        return Scripted(model.config.vocab_size, texts[: len(block_ids)])(block_ids, past_key_values, timestep)

    monkeypatch.setattr(model, "denoise", denoise)
    found = answers(model, few, draft_steps=draft_steps)
    assert tokens(found) == tokens(expected)
    for answer in found:
        assert answer.output["context_forwards"] == len(answer.tokens)
        assert answer.output["accepted_lengths"] == 1
        assert (answer.output["acceptance"] == 0).all()
        assert (answer.output["commit_steps"] == -1).all()


@pytest.mark.parametrize("block_size", [2, 5, 16])
def test_a_denoiser_that_is_always_right(model, few, monkeypatch, block_size):
    free = {"eos_token_id": None, "block_size": block_size}
    expected = tokens(answers(model, few, mode="ar", max_new_tokens=40 + block_size, **free))
    whole = [prompt + text for prompt, text in zip(few, expected, strict=True)]
    texts, _ = padded(whole, "right")
    for most in (1 + 2 * block_size, 38):
        count = -(-(most - 1) // block_size)
        for draft_steps in (1, 3):
            # All rows end with the same cycle, so that none leaves the script.
            monkeypatch.setattr(model, "denoise", Scripted(model.config.vocab_size, texts))
            found = answers(model, few, max_new_tokens=most, draft_steps=draft_steps, **free)
            assert tokens(found) == [text[:most] for text in expected]
            for answer in found:
                assert answer.output["context_forwards"] == 1 + count
                assert answer.output["denoiser_forwards"] == count
                # What is drafted past the end is not accepted.
                assert answer.output["accepted_lengths"] == pytest.approx((most - 1) / count)
                last = (torch.arange(block_size - 1) < most - 1 - (count - 1) * block_size).float()
                torch.testing.assert_close(answer.output["acceptance"], (count - 1 + last) / count)
                steps = torch.arange(most - 1) % block_size
                assert torch.equal(answer.output["commit_steps"][1:], torch.where(steps == block_size - 1, -1, 0))


def test_relaxed_verification_with_a_criterion_for_all_rows_keeps_no_cache():
    """Else a row keeps as little of a draft as its neighbours, and is drafted otherwise than alone."""
    model = without_special_tokens(tiny_model("each kind once"))
    ids, asked = random_ids(3, 9), []

    def never(ids, scores):
        asked.append(ids.shape)
        return False

    options = {"mode": "self_speculative", "block_size": 4, "acceptance_ratio": 0.2, "max_new_tokens": 12}
    with pytest.raises(ValueError, match=r"acceptance_ratio is 0.2, and the stopping criterion function is one for 3"):
        model.generate(ids, stopping_criteria=[never], return_dict_in_generate=True, **options)
    assert not asked
    alone = [model.generate(row[None], **options)[0].tolist() for row in ids]
    for criterion, kept in (
        (never, False),
        (Stateless(never), True),
        (PerRow(lambda row: lambda ids, scores: False), True),
    ):
        output = model.generate(ids, stopping_criteria=[criterion], return_dict_in_generate=kept, **options)
        assert (output.sequences if kept else output).tolist() == alone
    lone = model.generate(ids[:1], stopping_criteria=[never], return_dict_in_generate=True, **options)
    assert lone.sequences.tolist() == alone[:1]
