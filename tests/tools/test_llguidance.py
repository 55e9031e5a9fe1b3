"""The grammar processor that keeps no state, in every mode."""

import json
import re

import pytest
import torch
from grammars import REGEX, texts_of
from transformers import TextStreamer

from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES
from twotower.grammar import Grammar

SCHEMA = {
    "type": "object",
    "properties": {"result": {"type": "integer", "minimum": 0, "maximum": 999}, "unit": {"enum": ["apples", "m"]}},
    "required": ["result", "unit"],
    "additionalProperties": False,
}
LARK = 'start: NUMBER " " OP " " NUMBER\nNUMBER: /[0-9]{1,3}/\nOP: "+" | "-"'


def is_json(text):
    value = json.loads(text)
    return list(value) == ["result", "unit"] and 0 <= value["result"] <= 999 and value["unit"] in ("apples", "m")


GRAMMARS = {
    "schema": (lambda tokenizer: Grammar.from_json_schema(SCHEMA, tokenizer), is_json),
    "regex": (lambda tokenizer: Grammar.from_regex(REGEX, tokenizer), re.compile(REGEX).fullmatch),
    "lark": (lambda tokenizer: Grammar.from_lark(LARK, tokenizer), re.compile(r"\d{1,3} [+-] \d{1,3}").fullmatch),
}


@pytest.fixture(params=GRAMMARS)
def grammar(request, tokenizer):
    """A grammar, and whether a text is of it."""
    make, is_of_it = GRAMMARS[request.param]
    return make(tokenizer), is_of_it


@pytest.mark.parametrize("flags", [{}, {"do_sample": True, "temperature": 1.5, "seed": 4}])
def test_every_text_is_of_the_grammar(model, tokenizer, inputs, grammar, flags):
    grammar, is_of_it = grammar
    options = {"logits_processor": [grammar], "max_new_tokens": 32, **flags}
    found = {mode: texts_of(model, tokenizer, inputs[3], mode=mode, **options) for mode in MODES}
    assert all(is_of_it(text) for texts in found.values() for text in texts), found
    assert found["self_speculative"] == found["ar"]
    for mode in ("mask_diffusion", "self_speculative"):
        assert texts_of(model, tokenizer, inputs[1], mode=mode, **options) == found[mode][:1]


def test_copies_streams_and_later_turns_are_under_it(model, tokenizer, inputs):
    grammar = Grammar.from_regex("[0-9]{2} [+*] [0-9]", tokenizer)
    for mode in MODES:
        options = {"mode": mode, "logits_processor": [grammar], "do_sample": True, "seed": 1}
        texts = texts_of(model, tokenizer, inputs[2], num_return_sequences=2, **options)
        assert len(texts) == 4
        assert all(re.fullmatch("[0-9]{2} [+*] [0-9]", text) for text in texts)
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        first = model.generate(
            **inputs[1], streamer=streamer, return_dict_in_generate=True, max_new_tokens=40, **options
        )
        turn = {"input_ids": torch.cat([first.sequences, inputs[1]["input_ids"]], dim=1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        (text,) = texts_of(model, tokenizer, turn, past_key_values=first.past_key_values, **options)
        assert re.fullmatch("[0-9]{2} [+*] [0-9]", text)


def test_it_drafts_under_the_grammar(model, tokenizer, inputs):
    unit = "apples and pears and cards and shells"
    schema = {"type": "object", "properties": {"unit": {"const": unit}}, "required": ["unit"]}
    grammar = Grammar.from_json_schema(schema | {"additionalProperties": False}, tokenizer)
    options = {"logits_processor": [grammar], "return_dict_in_generate": True, "max_new_tokens": 40}
    output = model.generate(**inputs[1], mode="self_speculative", draft_length=16, **options)
    new = output.sequences[0, inputs[1]["input_ids"].shape[1] :]
    assert json.loads(tokenizer.decode(new, skip_special_tokens=True)) == {"unit": unit}
    # What can be written one way only is drafted so.
    assert len(new) > 16
    assert output.context_forwards.item() <= 2 + len(new) // 16


def test_it_serves_transformers_own_models(model, tokenizer, inputs):
    grammar = Grammar.from_regex(REGEX, tokenizer)
    processor = grammar.after(inputs[3]["input_ids"].shape[1])
    expected = texts_of(context_tower_in_transformers(model), tokenizer, inputs[3], logits_processor=[processor])
    assert texts_of(model, tokenizer, inputs[3], mode="ar", logits_processor=[grammar]) == expected


def test_whatever_torchs_default_device_scores_stay_where_they_are(tokenizer):
    grammar, scores = Grammar.from_regex("a[0-9]+b", tokenizer), torch.zeros(1, len(tokenizer))
    expected = grammar.after(2)(torch.tensor([[5, 5]]), scores)
    ids = torch.tensor([[5, 5]])
    with torch.device("meta"):
        assert torch.equal(grammar.after(2)(ids, scores), expected)


def test_an_answer_depends_on_the_text_alone(tokenizer):
    grammar = Grammar.from_regex("a[0-9]+b", tokenizer)
    processor = grammar.after(2)
    texts = ["a", "a1", "a12b", "", "a9", "b", "a1b", "a12", "a1bb", "a"]
    scores = torch.zeros(1, len(tokenizer) + 8)
    for text in texts:
        ids = torch.tensor([[5, 5, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        fresh = grammar.after(2)(ids, scores)
        assert torch.equal(processor(ids, scores), fresh)
        complete = text.endswith("b") and text in ("a12b", "a1b")
        allowed = (fresh[0] == 0).nonzero()[:, 0].tolist()
        assert (allowed == [tokenizer.eos_token_id]) == complete
        assert (allowed == []) == (text in ("b", "a1bb"))


def test_a_schema_may_be_text(tokenizer):
    as_text = Grammar.from_json_schema(json.dumps(SCHEMA), tokenizer)
    assert as_text.text == Grammar.from_json_schema(SCHEMA, tokenizer).text


def test_a_grammar_that_is_none_is_refused(tokenizer):
    with pytest.raises(ValueError, match="llguidance does not understand the grammar"):
        Grammar.from_lark("start: (", tokenizer)
    with pytest.raises(ValueError, match="llguidance does not understand the grammar"):
        Grammar.from_regex("[", tokenizer)


@pytest.mark.parametrize("schema", ["{", "true", 5])
def test_what_is_no_schema_is_refused_by_name(tokenizer, schema):
    with pytest.raises(ValueError, match=f"llguidance does not understand the JSON schema {schema!r}: "):
        Grammar.from_json_schema(schema, tokenizer)
