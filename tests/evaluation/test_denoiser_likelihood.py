"""The denoiser's likelihood: the drawn estimate against every mask there is, and a text against its blocks."""

from itertools import combinations

import pytest
import torch
from transformers import AutoTokenizer

import twotower
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.denoiser_likelihood import denoiser_log_likelihood

PROMPTS = [problem.prompt for problem in held_out_tasks("words", 3, seed=0)]


@pytest.fixture(scope="module")
def model():
    folder = twotower.demo_checkpoint()
    return twotower.TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(twotower.demo_checkpoint())


def exact_bound(model, context, continuation):
    """The same expectation by every mask there is."""
    length, size = len(continuation), model.config.block_size
    cache, total = model(torch.tensor([context]), use_cache=True).cache, 0.0
    for count in range(1, length + 1):
        masks = list(combinations(range(length), count))
        for masked in masks:
            block = torch.full((1, size), model.config.mask_token_id)
            for place, token in enumerate(continuation):
                block[0, place] = model.config.mask_token_id if place in masked else token
            logits = model.denoise(block, cache)[0]
            logits[:, model.config.mask_token_id] = float("-inf")
            logs = logits.log_softmax(-1)
            total += length / count * sum(float(logs[i, continuation[i]]) for i in masked) / len(masks) / length
    return total


@torch.no_grad()
def test_the_denoisers_estimate_is_within_its_error_of_the_whole_sum(model, tokenizer):
    context = tokenizer(PROMPTS[0]).input_ids
    continuation = tokenizer(" After buying, 8", add_special_tokens=False).input_ids
    assert 3 <= len(continuation) <= 6
    exact = exact_bound(model, context, continuation)
    found = denoiser_log_likelihood(model, context, continuation, samples=400)
    assert 0 < found.stderr < 0.2 * abs(exact)
    assert found.value == pytest.approx(exact, abs=4 * found.stderr)
    one = denoiser_log_likelihood(model, context, continuation[:1], samples=2)
    assert one.value == pytest.approx(exact_bound(model, context, continuation[:1]), rel=1e-5) and one.stderr < 1e-6


def test_a_text_of_several_blocks_is_as_likely_as_its_blocks(model, tokenizer):
    ids = tokenizer(PROMPTS[0] + " After buying, 124 + 57 = 181 apples. After giving, 181 - 38 = 143").input_ids
    context, continuation = ids[:-20], ids[-20:]
    whole = denoiser_log_likelihood(model, context, continuation, samples=300)
    first = denoiser_log_likelihood(model, context, continuation[:16], samples=300)
    second = denoiser_log_likelihood(model, ids[:-4], continuation[16:], samples=300)
    error = (whole.stderr**2 + first.stderr**2 + second.stderr**2) ** 0.5
    assert whole.value == pytest.approx(first.value + second.value, abs=4 * error)
