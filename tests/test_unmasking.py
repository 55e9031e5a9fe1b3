"""The commit rule, alone and against NVIDIA's Megatron-LM trajectories."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from twotower.unmasking_twotower import commit_confident

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
