"""What a step callback gets and may give back."""

import numpy as np
import pytest
import torch
from tiny import random_ids, tiny_model, without_special_tokens

MODES = ("mask_diffusion", "self_speculative")
PROMPTS = random_ids(3, 6)


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model())


def generate(model, callback=None, mode="mask_diffusion", **flags):
    flags = {"max_new_tokens": 12, "confidence_threshold": 0.3, "return_dict_in_generate": True, **flags}
    if mode == "self_speculative":
        flags["draft_length"] = model.config.block_size  # "auto" might draft nothing, and call nothing
    return model.generate(PROMPTS, mode=mode, step_callback=callback, **flags)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("commit", lambda commit: commit.int(), "dtype torch.int32; it needs torch.bool"),
        ("commit", lambda commit: commit.float(), "dtype torch.float32; it needs torch.bool"),
        ("commit", lambda commit: commit[:, :1], r"shape \(3, 1\); it needs \(3, 4\)"),
        ("commit", lambda commit: commit[0], r"shape \(4,\); it needs \(3, 4\)"),
        ("commit", lambda commit: commit.to("meta"), "device meta; it needs cpu"),
        ("commit", lambda commit: commit.tolist(), "as a list; assign a tensor"),
        ("commit", lambda commit: True, "as a bool; assign a tensor"),
        ("commit", lambda commit: None, "as a NoneType; assign a tensor"),
        ("tokens", lambda tokens: tokens.float(), "dtype torch.float32; it needs torch.int64"),
        ("tokens", lambda tokens: tokens > 0, "dtype torch.bool; it needs torch.int64"),
        ("tokens", lambda tokens: tokens[:, :3], r"shape \(3, 3\); it needs \(3, 4\)"),
        ("tokens", lambda tokens: tokens[:1], r"shape \(1, 4\); it needs \(3, 4\)"),
        ("tokens", lambda tokens: tokens.to("meta"), "device meta; it needs cpu"),
        ("tokens", lambda tokens: np.asarray(tokens), "as a ndarray; assign a tensor"),
    ],
)
def test_an_answer_of_another_kind_is_refused_by_name(model, mode, name, wrong, message):
    def answer(state):
        setattr(state, name, wrong(getattr(state, name)))

    with pytest.raises(ValueError, match=f"step_callback left {name} (with )?{message}"):
        generate(model, answer, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 2.0, "seed": [1, 2, 3]}])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.3}])
def test_nothing_comes_of_what_a_callback_does_to_its_copies(model, mode, sampled, processors):
    flags = {**sampled, **processors, "draft_steps": 2, "eos_token_id": list(range(4, 10))}

    def scribble(state):
        state.rows.fill_(0)
        state.ids.fill_(7)
        state.committed.logical_not_()
        state.timestep.fill_(torch.nan)
        state.logits.fill_(torch.nan)
        state.confidence.fill_(torch.nan)
        state.block, state.step, state.steps = -1, -1, 0

    expected, found = generate(model, None, mode, **flags), generate(model, scribble, mode, **flags)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("confidences", "log_probs", "commit_steps", "denoiser_forwards", "context_forwards"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_what_a_callback_keeps_stays_as_it_was(model):
    """Not a view of what the decoder goes on writing."""
    kept = []
    generate(model, lambda state: kept.append((state, {k: v.clone() for k, v in tensors(state)})))
    assert len(kept) > 3
    for state, before in kept:
        for name, value in tensors(state):
            assert torch.equal(value, before[name]), name


def tensors(state):
    return [(name, value) for name, value in vars(state).items() if isinstance(value, torch.Tensor)]
