"""The unmasking rules, alone and against NVIDIA's Megatron-LM trajectories."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from twotower.unmasking_twotower import (
    UNMASKING_DEFAULTS,
    UNMASKING_RULES,
    Prediction,
    UnmaskingRule,
    check_unmasking,
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
    confidence, tokens = logits.softmax(-1).max(-1)
    return Prediction(logits, tokens, confidence)


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
            confidence, tokens = logits.softmax(-1).max(-1)
            commit = scheduled.commit(Prediction(logits, tokens, confidence), masked, call, case["steps"], None)
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
        row = Prediction(*(part[index] for part in predicted[:3]))
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
            Prediction(*(part[:1] for part in predicted[:3])), masked[:1], step, steps, lambda noise=noise: noise[:1]
        )
        assert torch.equal(alone, commit[:1])
        assert 0 <= chosen.timestep(masked, step, steps).min() <= chosen.timestep(masked, step, steps).max() <= 1
        masked = masked & ~commit
    assert not masked.any()


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
        ("noise_schedule", "square", "noise_schedule is 'square'; use one of linear"),
        ("noising_order", 3, "noising_order is 3; use one of confidence"),
        ("confidence_threshold", 0.0, r"confidence_threshold is 0.0; it must lie in \(0, 1\]"),
        ("confidence_threshold", True, "confidence_threshold is True"),
        ("margin_threshold", -0.1, "margin_threshold is -0.1"),
        ("entropy_bound", float("nan"), "entropy_bound is nan"),
        ("factor", 0, "factor is 0; it must be a number above 0"),
        ("tokens_per_step", 0, "tokens_per_step is 0"),
        ("tokens_per_step", 1.5, "tokens_per_step is 1.5"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        check_unmasking(SimpleNamespace(**{**UNMASKING_DEFAULTS, field: value}))
    check_unmasking(SimpleNamespace(**dict.fromkeys(UNMASKING_DEFAULTS)))
