"""The knobs' values: what counts is a whole number, and no number makes a call run away."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
from tiny import random_ids, tiny_model, without_special_tokens
from transformers import CompileConfig, GenerationConfig

from twotower.decoding.config import COUNTS, MOST_POSTERIOR_STEPS, TwoTowerGenerationConfig
from twotower.decoding.rules import UNMASKING_RULES

IDS = random_ids(2, 5)
TRAINED = 4  # the tiny model's block


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model())


@pytest.fixture
def widths(model, monkeypatch):
    """How many columns each denoiser pass computed."""
    seen, denoise = [], model.denoise

    def watch(block_ids, *arguments):
        seen.append(block_ids.shape[1])
        return denoise(block_ids, *arguments)

    monkeypatch.setattr(model, "denoise", watch)
    return seen


def generate(model, **knobs):
    return model.generate(IDS, **{"max_new_tokens": 6, "return_dict_in_generate": True, **knobs})


@pytest.mark.parametrize("value", [2.5, 2.0, float("nan"), float("inf"), "3", True, torch.tensor(2.5), np.float64(2)])
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_whole_number_is_refused_by_name(model, name, value):
    message = f"{name} is .*; it must be a whole number of at least {COUNTS[name]}"
    flags = {name: value} if name in ("max_new_tokens", "max_length") else {name: value, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, **flags)
    with pytest.raises(ValueError, match=message):
        TwoTowerGenerationConfig(**flags)
    plain = GenerationConfig()
    setattr(plain, name, value)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, generation_config=plain)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_too_small_is_refused_by_name(model, name):
    with pytest.raises(ValueError, match=f"{name} is {COUNTS[name] - 1}"):
        model.generate(IDS, **{name: COUNTS[name] - 1})


@pytest.mark.parametrize("value", [2, -0.1, float("nan"), "0.9", True])
def test_a_share_of_probability_is_one(model, value):
    with pytest.raises(ValueError, match=r"top_p is .*; it must lie in \[0, 1\]"):
        model.generate(IDS, do_sample=True, top_p=value)
    model.generate(IDS, do_sample=True, top_p=np.float32(0.9), max_new_tokens=2)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("typical_p", 2.0), ("typical_p", 0.0), ("epsilon_cutoff", 1.0), ("epsilon_cutoff", -0.1), ("eta_cutoff", 2)],
)
def test_a_share_that_transformers_would_ignore_is_refused(model, flag, value):
    with pytest.raises(ValueError, match=rf"{flag} is {value}; it must lie in [\[(]0, 1"):
        model.generate(IDS, do_sample=True, **{flag: value})


def test_a_growing_pull_to_no_end_of_text_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match=r"exponential_decay_length_penalty=\(2, 1.5\) .*; give eos_token_id"):
        model.generate(IDS, max_new_tokens=4, exponential_decay_length_penalty=(2, 1.5))
    model.generate(IDS, max_new_tokens=4, exponential_decay_length_penalty=(2, 1.5), eos_token_id=7)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_whole_numbers_of_numpy_and_torch_count(model, kind):
    expected = generate(model, block_size=3, steps_per_block=2).sequences
    found = generate(model, max_new_tokens=kind(6), block_size=kind(3), steps_per_block=kind(2)).sequences
    assert torch.equal(found, expected)
    assert TwoTowerGenerationConfig(draft_steps=kind(3)).to_dict()["draft_steps"] == 3


@pytest.mark.parametrize("seconds", [float("nan"), "long"])
def test_a_time_limit_that_is_none_is_refused(model, seconds):
    with pytest.raises(ValueError, match=r"max_time is .*; give a number of seconds"):
        generate(model, max_time=seconds)


@pytest.mark.parametrize("limit", ["max_new_tokens", "max_length"])
@pytest.mark.parametrize("most", [sys.maxsize, 10**30])
def test_a_limit_beyond_any_text_is_none(model, limit, most):
    """As scripts write it; transformers takes it, too."""
    stop = int(generate(model, mode="ar").sequences[0, 8])
    expected = generate(model, mode="ar", max_new_tokens=100, eos_token_id=stop).sequences
    flags = {"max_new_tokens": None, limit: most, "eos_token_id": stop, "stopping_criteria": [_within_hundred]}
    assert torch.equal(generate(model, mode="ar", **flags).sequences, expected)


def _within_hundred(text, scores):
    return text.shape[1] >= 105


# Numbers that made a call run away.


def test_any_number_of_tokens_per_step_is_allowed(model):
    sequences = [
        generate(model, unmasking_rule="fixed", tokens_per_step=tokens, block_size=4).sequences
        for tokens in (4, 10**30)
    ]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("rule", [rule for rule in UNMASKING_RULES if rule != "posterior"])
@pytest.mark.parametrize("steps", [10**9, 10**400])
def test_more_steps_than_positions_change_nothing(model, rule, steps):
    """Each pass commits a position at least: no loop goes on after the last."""
    if rule != "predict_and_noise":  # whose schedule more steps make finer
        expected = generate(model, unmasking_rule=rule, steps_per_block=TRAINED)
        found = generate(model, unmasking_rule=rule, steps_per_block=steps)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.denoiser_forwards, expected.denoiser_forwards)
    assert (generate(model, unmasking_rule=rule, steps_per_block=steps).denoiser_forwards <= 2 * TRAINED).all()
    text = generate(model, mode="ar").sequences
    drafted = generate(model, mode="self_speculative", unmasking_rule=rule, draft_steps=steps)
    assert torch.equal(drafted.sequences, text)


@pytest.mark.parametrize(
    ("mode", "name"), [("mask_diffusion", "steps_per_block"), ("self_speculative", "draft_steps")]
)
def test_the_posteriors_steps_are_bounded(model, mode, name):
    """Alone of the rules it takes passes that commit nothing: all of a billion."""
    message = f'{name} is 1000000000; the rule "posterior" .* at most {MOST_POSTERIOR_STEPS}'
    with pytest.raises(ValueError, match=message):
        generate(model, mode=mode, unmasking_rule="posterior", **{name: 10**9})
    flags = {"unmasking_rule": "posterior", "seed": 0, "max_new_tokens": 2, "block_size": 2}
    generate(model, mode=mode, **flags, **{name: 64})
    generate(model, mode="ar", unmasking_rule="posterior", **{name: 10**9})


def test_a_block_far_wider_than_any_text_is_refused(model):
    message = f"block_size is 4096, but no row may write more than 6 tokens, .* blocks of {TRAINED}; give at most 16"
    with pytest.raises(ValueError, match=message):
        generate(model, block_size=4096)
    with pytest.raises(ValueError, match="give at most 40"):
        generate(model, max_new_tokens=40, block_size=41)
    with pytest.raises(ValueError, match="no row may write more than 20 tokens"):
        model.generate(IDS, block_size=4096)


@pytest.mark.parametrize(("size", "most"), [(16, 6), (40, 40), (TRAINED, 1)])
def test_a_block_is_as_wide_as_it_was_asked_for(model, widths, size, most):
    """What its other columns are changes what the denoiser makes of it."""
    generate(model, block_size=size, max_new_tokens=most)
    assert set(widths) == {size}


@pytest.mark.parametrize(("most", "width"), [(6, 6), (30, 30), (1, TRAINED)])
def test_a_draft_is_no_wider_than_any_text(model, widths, most, width):
    """Its text is that of "ar" at any width."""
    drafts = {"mode": "self_speculative", "block_size": 4096, "draft_length": 4096}
    output = generate(model, **drafts, max_new_tokens=most)
    assert torch.equal(output.sequences, generate(model, mode="ar", max_new_tokens=most).sequences)
    assert set(widths) <= {width}
    assert output.acceptance.shape == (2, width - 1)
    limited = generate(model, **drafts, max_new_tokens=None, max_length=5 + most)
    assert torch.equal(limited.sequences, output.sequences)


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_modes_without_blocks_do_not_mind_their_size(model, mode):
    assert torch.equal(generate(model, mode=mode, block_size=10**9).sequences, generate(model, mode=mode).sequences)


def test_a_compile_config_is_not_lost_where_a_config_is_stored(tmp_path):
    config = TwoTowerGenerationConfig(compile=True, compile_config=CompileConfig(backend="eager"))
    with pytest.raises(ValueError, match=r"compile_config=CompileConfig.*cannot be stored; set it to None"):
        config.save_pretrained(tmp_path)
    config.compile_config = None
    config.save_pretrained(tmp_path)
    assert TwoTowerGenerationConfig.from_pretrained(tmp_path).compile is True


def test_a_config_with_a_rule_of_ones_own_can_be_shown_and_compared_but_not_stored(tmp_path):
    def rule(prediction, masked, step, steps):
        return masked

    config, other = (TwoTowerGenerationConfig(unmasking_rule=each) for each in (rule, lambda *_: None))
    assert "function" in repr(config) and config == copy.deepcopy(config) != other and hash(config) != hash(other)
    with pytest.raises(ValueError, match=r"unmasking_rule=<function .*rule.*> cannot be stored; set it to None"):
        config.save_pretrained(tmp_path)
    config.unmasking_rule = None
    config.save_pretrained(tmp_path)


def test_a_rule_of_ones_own_in_a_config_is_asked_itself(model):
    class Counting:
        def __init__(self):
            self.calls, self.lock = 0, threading.Lock()  # which cannot be copied

        def __call__(self, prediction, masked, step, steps):
            self.calls += 1
            return masked

    rule = Counting()
    config = TwoTowerGenerationConfig(unmasking_rule=rule, max_new_tokens=2 * TRAINED, bad_words_ids=[[5]])
    model.generate(IDS, generation_config=config)
    assert rule.calls >= 2
    copied = copy.deepcopy(config)
    assert copied.unmasking_rule is rule and copied == config and copied.bad_words_ids is not config.bad_words_ids


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"mode": "ar", "draft_steps": 3, "block_size": 4}, "block_size, draft_steps"),
        ({"mode": "mask_diffusion", "acceptance_ratio": 0.5}, "acceptance_ratio"),
        ({"mode": "self_speculative", "steps_per_block": 4}, "steps_per_block"),
        ({"mode": "mask_diffusion", "unmasking_rule": "fixed", "confidence_threshold": 0.7}, "confidence_threshold"),
        ({"mode": "mask_diffusion", "steps_per_block": 4, "confidence_threshold": 0.7, "block_size": 4}, None),
        ({"mode": "self_speculative", "draft_steps": 3, "confidence_threshold": 0.7, "block_size": 4}, None),
        ({"mode": "ar"}, None),
    ],
)
def test_knobs_without_an_effect_are_told_of(model, knobs, told, warned):
    generate(model, **knobs)
    messages = [record.message for record in warned.records if "no effect in mode" in record.message]
    assert len(messages) == (told is not None)
    assert told is None or messages[0].endswith(f": {told}")


@pytest.mark.parametrize("kind", [GenerationConfig, TwoTowerGenerationConfig])
def test_a_misspelled_flag_of_a_config_is_told_of(model, kind, warned):
    model.generate(IDS, generation_config=kind(confidence_treshold=0.5, confidence_threshold=0.5, max_new_tokens=2))
    messages = [record.message for record in warned.records]
    assert messages == ["no effect, as generate knows no such flags: confidence_treshold"]


@pytest.mark.parametrize("kind", [GenerationConfig, TwoTowerGenerationConfig])
def test_what_transformers_notes_of_a_config_is_no_misspelled_flag(model, kind, tmp_path, warned):
    kind(max_new_tokens=2).save_pretrained(tmp_path)
    model.generate(IDS, generation_config=kind.from_pretrained(tmp_path))
    assert not warned.records
