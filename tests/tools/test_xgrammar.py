"""xgrammar's processor, which takes in one token of every row per call."""

import re

import pytest
import xgrammar
from grammars import REGEX, texts_of

from twotower import PerRow
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES

BLOCK_MODES = ("mask_diffusion", "self_speculative")


@pytest.fixture(scope="module")
def make(model, tokenizer):
    """A new processor, which serves one call."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_regex(REGEX)
    return lambda: xgrammar.contrib.hf.LogitsProcessor(grammar)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_it_serves_a_batch_as_in_transformers(model, tokenizer, inputs, make, rows):
    baseline = context_tower_in_transformers(model)
    expected = texts_of(baseline, tokenizer, inputs[rows], logits_processor=[make()], do_sample=False)
    assert texts_of(model, tokenizer, inputs[rows], mode="ar", logits_processor=[make()]) == expected
    found = texts_of(model, tokenizer, inputs[rows], mode="mock_ar", logits_processor=[make()])
    assert all(re.fullmatch(REGEX, text) for text in expected + found)


@pytest.mark.parametrize("flags", [{}, {"do_sample": True, "seed": 2}])
def test_it_serves_one_row_in_every_mode(model, tokenizer, inputs, make, flags):
    found = {
        mode: texts_of(model, tokenizer, inputs[1], mode=mode, logits_processor=[make()], **flags) for mode in MODES
    }
    assert found["self_speculative"] == found["ar"]
    assert all(re.fullmatch(REGEX, text) for (text,) in found.values())


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_one_for_rows_that_drift_apart_is_refused(model, tokenizer, inputs, make, mode):
    with pytest.raises(ValueError, match="LogitsProcessor is one for 2 rows"):
        texts_of(model, tokenizer, inputs[2], mode=mode, logits_processor=[make()])


def test_one_per_row_serves_every_mode(model, tokenizer, inputs, make):
    own = PerRow(lambda row: make())
    found = {mode: texts_of(model, tokenizer, inputs[3], mode=mode, logits_processor=[own]) for mode in MODES}
    assert found["ar"] == texts_of(model, tokenizer, inputs[3], mode="ar", logits_processor=[make()])
    assert found["self_speculative"] == found["ar"]
    assert all(re.fullmatch(REGEX, text) for texts in found.values() for text in texts)
