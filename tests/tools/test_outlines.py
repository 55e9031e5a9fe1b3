"""outlines' generators and processors, which take in one token of every row per call."""

import re

import outlines
import pytest
import torch
from grammars import PROMPTS, REGEX, texts_of
from outlines.backends import get_regex_logits_processor

from twotower import PerRow
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES

BLOCK_MODES = ("mask_diffusion", "self_speculative")


@pytest.fixture(autouse=True)
def uncompiled():
    """Its kernels are compiled, which takes minutes and changes no number."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", params=["outlines_core", "llguidance", "xgrammar"])
def make(request, model, tokenizer):
    """A new processor of a backend."""
    wrapped = outlines.from_transformers(model, tokenizer)
    return lambda: get_regex_logits_processor(request.param, wrapped, REGEX)


def test_it_serves_a_batch_as_in_transformers(model, tokenizer, inputs, make):
    expected = texts_of(context_tower_in_transformers(model), tokenizer, inputs[3], logits_processor=[make()])
    assert all(re.fullmatch(REGEX, text) for text in expected)
    assert texts_of(model, tokenizer, inputs[3], mode="ar", logits_processor=[make()]) == expected
    own = PerRow(lambda row: make())
    assert texts_of(model, tokenizer, inputs[3], mode="self_speculative", logits_processor=[own]) == expected
    alone = texts_of(model, tokenizer, inputs[1], mode="self_speculative", logits_processor=[make()])
    assert alone == texts_of(model, tokenizer, inputs[1], mode="ar", logits_processor=[make()])
    for mode in BLOCK_MODES:
        with pytest.raises(ValueError, match="LogitsProcessor is one for 3 rows"):
            texts_of(model, tokenizer, inputs[3], mode=mode, logits_processor=[make()])


def test_its_generator_writes_in_every_mode(model, tokenizer):
    generator = outlines.Generator(outlines.from_transformers(model, tokenizer), outlines.regex(REGEX))
    for mode in MODES:
        assert re.fullmatch(REGEX, generator(PROMPTS[0], max_new_tokens=40, mode=mode))
    for text in generator.batch(PROMPTS, max_new_tokens=40, mode="ar"):
        assert re.fullmatch(REGEX, text)
