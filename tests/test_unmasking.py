"""The unmasking rules, alone and against NVIDIA's Megatron-LM trajectories."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from twotower.decoding.config import plain
from twotower.decoding.rules import (
    UNMASKING_DEFAULTS,
    UNMASKING_RULES,
    Prediction,
    UnmaskingRule,
    commit_confident,
    noise_level,
)

MASK = 3


def test_commits_what_is_surer_than_the_threshold():
    confidence = torch.tensor([[0.9, 0.85, 0.1, 0.95]])
    masked = torch.tensor([[True, True, True, False]])
    assert commit_confident(confidence, masked, 16, 0.8).tolist() == [[True, True, False, False]]


def test_threshold_is_exclusive_and_one_is_always_committed():
    confidence = torch.tensor([[0.8, 0.5, 0.8, 0.1]])
    masked = torch.ones(1, 4, dtype=torch.bool)
    # Of two equally sure positions the first.
    assert commit_confident(confidence, masked, 16, 0.8).tolist() == [[True, False, False, False]]


def test_enough_are_committed_to_finish_in_time():
    confidence = torch.linspace(0.1, 0.5, 8)[None]
    masked = torch.ones(1, 8, dtype=torch.bool)
    assert commit_confident(confidence, masked, 3, 0.9).sum() == 3
    assert commit_confident(confidence, masked, 1, 0.9).all()


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 1), st.integers(0, 2**31))
def test_commits_a_subset_progresses_and_ignores_neighbours(rows, size, steps_left, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, size, generator=generator)
    masked = torch.rand(rows, size, generator=generator) < 0.6
    commit = commit_confident(confidence, masked, steps_left, threshold)
    assert not (commit & ~masked).any()
    assert (commit.any(-1) == masked.any(-1)).all()
    left = (masked & ~commit).sum(-1)
    assert (left <= masked.sum(-1) - (masked.sum(-1) / steps_left).ceil()).all()
    alone = [commit_confident(confidence[[row]], masked[[row]], steps_left, threshold)[0] for row in range(rows)]
    assert torch.equal(commit, torch.stack(alone))


def megatron_cases(goldens):
    return [case for case in json.loads((goldens / "rules.json").read_text()) if "confidence_threshold" in case]


def test_trajectories_equal_megatrons(goldens):
    tensors = load_file(goldens / "rules.safetensors")
    cases = megatron_cases(goldens)
    assert cases
    for case in cases:
        trajectory, logits = tensors[f"{case['name']}.trajectory"], tensors[f"{case['name']}.logits"]
        block = trajectory[0]
        for call in range(case["denoiser_calls"]):
            masked = block == MASK
            torch.testing.assert_close(masked.float().mean(-1), tensors[f"{case['name']}.t"][call].float())
            scores = logits[call].clone()
            scores[..., MASK] = -torch.inf
            confidence, tokens = scores.softmax(-1).max(-1)
            commit = commit_confident(confidence, masked, case["steps"] - call, case["confidence_threshold"])
            block = torch.where(commit, tokens, block)
            assert torch.equal(block, trajectory[call + 1]), (case["name"], call)
        if case["denoiser_calls"] < case["steps"]:
            assert not (block == MASK).any()


@pytest.mark.parametrize("steps_left", [1, 2, 16])
def test_a_full_row_commits_nothing(steps_left):
    confidence = torch.rand(1, 16)
    assert not commit_confident(confidence, torch.zeros(1, 16, dtype=torch.bool), steps_left, 0.5).any()


# All rules, as `generate` uses them.


def rule(name, **parameters):
    return UnmaskingRule(SimpleNamespace(**{**UNMASKING_DEFAULTS, "unmasking_rule": name, **parameters}))


def prediction(rows, size, seed, vocab=7):
    logits = 3 * torch.randn(rows, size, vocab, generator=torch.Generator().manual_seed(seed))
    logits[..., MASK] = -torch.inf
    return Prediction(logits, logits.argmax(-1))


def scheduled_cases(goldens):
    cases = json.loads((goldens / "rules.json").read_text())
    return [case for case in cases if case["sampling_strategy"] == "predict_and_noise"]


def test_predict_and_noise_equals_megatrons_blocks_and_times(goldens):
    tensors = load_file(goldens / "rules.safetensors")
    cases = scheduled_cases(goldens)
    assert {name.split(".")[1] for name in (case["name"] for case in cases)} == {"confidence", "margin", "adaptive"}
    for case in cases:
        order, schedule = case["name"].split(".")[1], case.get("noise_schedule", "linear")
        scheduled = rule("predict_and_noise", noising_order=order, noise_schedule=schedule)
        trajectory = tensors[f"{case['name']}.trajectory"]
        block = trajectory[0]
        for call in range(case["denoiser_calls"]):
            masked = block == MASK
            time = scheduled.timestep(masked, call, case["steps"])
            torch.testing.assert_close(time, tensors[f"{case['name']}.t"][call], rtol=0, atol=1e-6)
            logits = tensors[f"{case['name']}.logits"][call].float()
            logits[..., MASK] = -torch.inf
            tokens = logits.argmax(-1)
            commit = scheduled.commit(Prediction(logits, tokens), masked, call, case["steps"], None)
            block = torch.where(commit, tokens, block)
            assert torch.equal(block, trajectory[call + 1]), (case["name"], call)
        assert not (block == MASK).any()


PARAMETERS = {
    "confidence": {"confidence_threshold": 0.6},
    "fixed": {"tokens_per_step": 3},
    "entropy": {"entropy_bound": 0.7},
    "margin": {"margin_threshold": 0.4},
    "factor": {"factor": 1.3},
    "left_to_right": {"confidence_threshold": 0.5},
    "posterior": {"noise_schedule": "cosine"},
    "predict_and_noise": {"noise_schedule": "exponential"},
}


def slow_count(name, row, order):
    """How many of one row's masked positions, in the rule's order, its own criterion commits: one after the other."""
    probabilities = row.logits.softmax(-1)
    if name == "fixed":
        return 3
    count, entropies = 0, []
    for position in order:
        best, second = probabilities[position].sort(descending=True).values[:2].tolist()
        entropies.append(-sum(p * math.log(p) for p in probabilities[position].tolist() if p > 0))
        holds = {
            "confidence": row.confidence[position] > 0.6,
            "entropy": sum(entropies) - max(entropies) <= 0.7,
            "margin": best - second > 0.4,
            "factor": (len(entropies) + 1) * (1 - best) < 1.3,
            "left_to_right": row.confidence[position] > 0.5,
        }[name]
        if holds:
            count = len(entropies)
        elif name in ("entropy", "left_to_right"):
            break
    return count


@pytest.mark.parametrize("name", ["confidence", "fixed", "entropy", "margin", "factor", "left_to_right"])
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_a_rule_commits_what_its_criterion_says_row_by_row(name, rows, size, steps, seed):
    predicted = prediction(rows, size, seed)
    masked = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    commit = rule(name, **PARAMETERS[name]).commit(predicted, masked, 0, steps, None)
    for index in range(rows):
        row = Prediction(predicted.logits[index], predicted.tokens[index])
        open_positions = masked[index].nonzero()[:, 0].tolist()
        best = row.logits.softmax(-1).sort(descending=True).values
        key = {
            "entropy": torch.special.entr(row.logits.softmax(-1)).sum(-1),
            "margin": best[:, 1] - best[:, 0],
            "left_to_right": torch.arange(size),
        }.get(name, -row.confidence)
        order = sorted(open_positions, key=lambda position: float(key[position]))
        due = max(1, math.ceil(len(order) / steps), slow_count(name, row, order))
        assert commit[index].nonzero()[:, 0].tolist() == sorted(order[:due])


@pytest.mark.parametrize("name", UNMASKING_RULES)
@given(st.integers(1, 4), st.integers(1, 16), st.integers(1, 9), st.integers(0, 2**31))
def test_every_rule_keeps_the_step_budget_and_what_is_committed(name, rows, size, steps, seed):
    chosen = rule(name, **PARAMETERS[name])
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, size, generator=generator) < 0.8
    for step in range(steps):
        predicted = prediction(rows, size, seed + step)
        noise = torch.rand(rows, size, generator=generator)
        commit = chosen.commit(predicted, masked, step, steps, lambda noise=noise: noise)
        assert not (commit & ~masked).any()
        if name != "posterior":
            assert (commit.any(-1) == masked.any(-1)).all()
        alone = chosen.commit(
            Prediction(predicted.logits[:1], predicted.tokens[:1]),
            masked[:1],
            step,
            steps,
            lambda noise=noise: noise[:1],
        )
        assert torch.equal(alone, commit[:1])
        assert 0 <= chosen.timestep(masked, step, steps).min() <= chosen.timestep(masked, step, steps).max() <= 1
        masked = masked & ~commit
    assert not masked.any()


# What Megatron-LM tells the denoiser in 4 steps.
TIMES = {
    "linear": [1.0, 0.7500025, 0.500005, 0.2500075],
    "cosine": [1.0, 0.6173202, 0.2928988, 0.0761250],
    "exponential": [1.0, 0.9414749, 0.8175780, 0.5552904],
}


@pytest.mark.parametrize("name", ["posterior", "predict_and_noise"])
@pytest.mark.parametrize("schedule", TIMES)
def test_a_scheduled_rule_tells_the_schedules_time_whatever_is_masked(name, schedule):
    chosen, masked = rule(name, noise_schedule=schedule), torch.tensor([[True, False], [False, False]])
    for step, time in enumerate(TIMES[schedule]):
        torch.testing.assert_close(chosen.timestep(masked, step, 4), torch.full((2,), time))


def test_other_rules_tell_the_masked_fraction():
    masked = torch.tensor([[True, False], [False, False]])
    assert rule("entropy", noise_schedule="cosine").timestep(masked, 1, 4).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("schedule", "order", "left"),
    [
        ("linear", "confidence", [12, 8, 4, 0]),
        ("cosine", "confidence", [9, 4, 1, 0]),
        ("exponential", "confidence", [15, 13, 8, 0]),
        ("linear", "margin", [12, 8, 4, 0]),
        ("linear", "adaptive", [15, 14, 7, 0]),
        # The first 40 % of five steps are two.
        ("linear", "adaptive", [15, 14, 9, 4, 0]),
        # Adaptive does not look at the schedule.
        ("cosine", "adaptive", [15, 14, 13, 12, 9, 6, 3, 0]),
        ("linear", "adaptive", [0]),
    ],
)
def test_predict_and_noise_leaves_the_schedules_share_of_the_least_sure(schedule, order, left):
    chosen = rule("predict_and_noise", noise_schedule=schedule, noising_order=order)
    masked = torch.ones(2, 16, dtype=torch.bool)
    for step, expected in enumerate(left):
        predicted = prediction(2, 16, seed=step)
        best, second = predicted.logits.softmax(-1).sort(descending=True).values[..., :2].unbind(-1)
        key = best - second if order == "margin" else best
        commit = chosen.commit(predicted, masked, step, len(left), None)
        masked = masked & ~commit
        assert masked.sum(-1).tolist() == [expected, expected]
        surest_left = key.masked_fill(~masked, -torch.inf).amax(-1)
        assert (key.masked_fill(~commit, torch.inf).amin(-1) > surest_left).all()


@pytest.mark.parametrize("order", ["confidence", "margin"])
def test_predict_and_noise_commits_one_where_the_schedule_would_leave_more_than_is_masked(order):
    masked = torch.arange(16)[None] < 5
    assert rule("predict_and_noise", noising_order=order).commit(prediction(1, 16, 0), masked, 0, 4, None).sum() == 1


@pytest.mark.parametrize("schedule", TIMES)
def test_the_posterior_unmasks_with_the_ancestral_samplers_probability(schedule):
    chosen, noise = rule("posterior", noise_schedule=schedule), torch.linspace(0.001, 0.999, 999)[None]
    masked = torch.arange(999)[None] % 5 > 0
    for step in range(4):
        # (alpha_s - alpha_t) / (1 - alpha_t), where the time told is 1 - alpha_t.
        times = [*TIMES[schedule], 0]
        expected = noise < (times[step] - times[step + 1]) / times[step]
        commit = chosen.commit(prediction(1, 1, 0), masked, step, 4, lambda: noise)
        assert torch.equal(commit, expected & masked), step


def test_the_posteriors_last_step_commits_all_whatever_is_drawn():
    masked, noise = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 1 - 2**-24)
    assert rule("posterior").commit(prediction(1, 1, 0), masked, 3, 4, lambda: noise).all()


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "confidence") for name in UNMASKING_RULES if name != "posterior"),
        ("predict_and_noise", "margin"),
        ("predict_and_noise", "adaptive"),
    ],
)
def test_of_equals_the_earlier_position_is_first(name, order):
    masked = torch.arange(64)[None] % 3 > 0
    logits = torch.zeros(1, 64, 7)
    logits[..., MASK] = -torch.inf
    equal = Prediction(logits, torch.zeros(1, 64, dtype=torch.long))
    commit = rule(name, noising_order=order, noise_schedule="cosine").commit(equal, masked, 7, 16, None)
    count = int(commit.sum())
    assert 1 < count < masked.sum()
    assert commit.nonzero()[:, 1].tolist() == masked.nonzero()[:count, 1].tolist()


def test_fast_dllms_bound_is_strict():
    equal = prediction(1, 4, 0)
    equal.confidence = torch.full((1, 4), 0.5)
    masked = torch.ones(1, 4, dtype=torch.bool)
    # (n + 1) / 2 is 1.5 for two positions, and 2 for three.
    assert rule("factor", factor=1.5).commit(equal, masked, 0, 16, None).sum() == 1
    assert rule("factor", factor=2.0).commit(equal, masked, 0, 16, None).sum() == 2


def test_the_posterior_unmasks_at_the_schedules_rate():
    masked = torch.ones(200, 100, dtype=torch.bool)
    noise = torch.rand(masked.shape, generator=torch.Generator().manual_seed(0))
    chosen = rule("posterior", noise_schedule="linear")
    # At step 1 of 4 a quarter of the block is open already, of the rest a third is due.
    share = chosen.commit(prediction(1, 1, 0), masked, 1, 4, lambda: noise).float().mean()
    assert share == pytest.approx(1 / 3, abs=0.02)


def test_noise_schedules():
    assert [round(noise_level("linear", step, 4), 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert noise_level("cosine", 2, 4) == pytest.approx(1 - math.cos(math.pi / 4), abs=1e-4)
    halfway = 1 - (math.exp(-1.5) - math.exp(-3)) / (1 - math.exp(-3))
    assert noise_level("exponential", 2, 4) == pytest.approx(halfway, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unmasking_rule", "best", "unmasking_rule is 'best'; use one of confidence, fixed"),
        ("unmasking_rule", ["fixed"], r"unmasking_rule is \['fixed'\]; use one of confidence, fixed"),
        ("noise_schedule", "square", "noise_schedule is 'square'; use one of linear"),
        ("noising_order", 3, "noising_order is 3; use one of confidence"),
        ("confidence_threshold", 0.0, r"confidence_threshold is 0.0; it must lie in \(0, 1\]"),
        ("confidence_threshold", 1.5, r"confidence_threshold is 1.5; it must lie in \(0, 1\]"),
        ("confidence_threshold", True, "confidence_threshold is True"),
        ("confidence_threshold", float("nan"), "confidence_threshold is nan"),
        ("confidence_threshold", "high", "confidence_threshold is 'high'"),
        ("margin_threshold", -0.1, r"margin_threshold is -0.1; it must lie in \[0, 1\]"),
        ("margin_threshold", 1.1, "margin_threshold is 1.1"),
        ("margin_threshold", False, "margin_threshold is False"),
        ("margin_threshold", float("nan"), "margin_threshold is nan"),
        ("entropy_bound", -0.1, "entropy_bound is -0.1; it must be a number of nats of at least 0"),
        ("entropy_bound", True, "entropy_bound is True"),
        ("entropy_bound", float("nan"), "entropy_bound is nan"),
        ("factor", 0, "factor is 0; it must be a number above 0"),
        ("factor", True, "factor is True"),
        ("factor", float("nan"), "factor is nan"),
        pytest.param("factor", 10**400, "factor is 1000.*; it must be a number above 0", id="factor beyond floats"),
        ("tokens_per_step", 0, "tokens_per_step is 0; it must be a whole number of at least 1"),
        ("tokens_per_step", True, "tokens_per_step is True"),
        ("tokens_per_step", 1.5, "tokens_per_step is 1.5"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        plain({**UNMASKING_DEFAULTS, field: value})
    plain(dict.fromkeys(UNMASKING_DEFAULTS))


@pytest.mark.parametrize("name", ["confidence_threshold", "margin_threshold", "factor", "tokens_per_step"])
def test_one_is_within_every_range(name):
    plain({**UNMASKING_DEFAULTS, name: 1})


@pytest.mark.parametrize("name", ["margin_threshold", "entropy_bound"])
def test_zero_is_within_some(name):
    plain({**UNMASKING_DEFAULTS, name: 0})
