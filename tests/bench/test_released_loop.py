"""The released code's way of decoding: the tokens of "mask_diffusion", and what it does for nothing."""

import pytest
import torch
from tiny import random_ids, tiny_model

from twotower.bench.released_loop import released_mask_diffusion, with_expert_loop


@pytest.fixture(scope="module")
def model():
    return tiny_model("each kind once")


@pytest.fixture(scope="module")
def looped(model):
    return with_expert_loop(model)


def ours(model, prompt, ends=None, **knobs):
    knobs = {"confidence_threshold": 0.8, "max_new_tokens": 12, **knobs}
    return model.generate(
        prompt,
        mode="mask_diffusion",
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        **knobs,
    )


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.8])
def test_tokens_and_denoiser_passes_are_those_of_mask_diffusion(model, looped, threshold):
    for seed, length in ((1, 2), (2, 7), (3, 19)):
        prompt = random_ids(1, length, seed=seed)
        expected = ours(model, prompt, confidence_threshold=threshold)
        found = released_mask_diffusion(looped, prompt, 12, set(), threshold)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.denoiser_forwards == int(expected.denoiser_forwards)
        assert found.context_forwards == int(expected.context_forwards) + 1, "the last block is read for nothing"


def test_fewer_steps_than_positions(model, looped):
    prompt = random_ids(1, 5)
    expected = ours(model, prompt, steps_per_block=2)
    found = released_mask_diffusion(looped, prompt, 12, set(), steps_per_block=2)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.denoiser_forwards == int(expected.denoiser_forwards) == 6


def test_text_goes_on_to_the_end_of_the_block_that_ends_it(model, looped):
    prompt = random_ids(1, 5)
    text = released_mask_diffusion(looped, prompt, 12, set()).sequences[0, 5:].tolist()
    end = text[5]  # in the second of three blocks
    first = text.index(end)
    found = released_mask_diffusion(looped, prompt, 12, {end}).sequences[0, 5:].tolist()
    assert found == text[: (first // 4 + 1) * 4]
    expected = ours(model, prompt, ends=end).sequences[0, 5:].tolist()
    assert found[: first + 1] == expected[: first + 1]


def test_the_looped_model_has_the_same_tensors(model, looped):
    assert looped.config._experts_implementation == "eager" != model.config._experts_implementation
    assert looped.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_what_the_released_code_cannot_do_is_refused(looped):
    with pytest.raises(ValueError, match="2 rows; the released loop takes one prompt at a time"):
        released_mask_diffusion(looped, random_ids(2, 5), 12, set())
    with pytest.raises(ValueError, match="max_new_tokens is 10; the released loop needs a multiple of 4"):
        released_mask_diffusion(looped, random_ids(1, 5), 10, set())
