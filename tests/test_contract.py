"""What every transformers model lets its caller do, as far as other test files do not show it."""

import pytest
import torch
from tiny import random_ids, tiny_model

from twotower.arguments_twotower import UNSUPPORTED

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def test_embeddings_stand_for_their_tokens():
    model, ids = tiny_model(), random_ids(2, 6)
    embeds = model.context_tower.embeddings(ids)

    for mask in (None, MASK):
        expected, got = model(ids, attention_mask=mask), model(inputs_embeds=embeds, attention_mask=mask)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.cache.view(0).ssm, expected.cache.view(0).ssm)

    continued = model(inputs_embeds=embeds[:, 4:], cache=model(ids[:, :4]).cache)
    torch.testing.assert_close(continued.logits, model(ids).logits[:, 4:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither input_ids nor inputs_embeds"),
        ({"input_ids": random_ids(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "were both given"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "labels": random_ids(1, 4)}, "give input_ids"),
        ({"inputs_embeds": torch.zeros(1, 4, 31)}, r"shape \(1, 4, 31\); expected \(batch, tokens, 32\)"),
        ({"inputs_embeds": torch.zeros(4, 32)}, r"shape \(4, 32\)"),
        ({"input_ids": random_ids(1, 4), "labels": random_ids(1, 4), "output_hidden_states": True}, "keeps none"),
    ],
)
def test_inputs_that_do_not_say_what_to_read_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**given)


def test_hidden_states_are_those_before_every_layer_and_the_heads_input():
    model, ids = tiny_model(), random_ids(2, 6)
    inputs, hooks = [], []
    for layer in model.context_tower.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
    output = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()

    assert len(output.hidden_states) == 6
    for got, expected in zip(output.hidden_states, inputs, strict=False):
        assert torch.equal(got, expected)
    assert output.hidden_states[-1] is output.last_hidden_state
    assert torch.equal(model.context_lm_head(output.last_hidden_state), output.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 6


def test_hidden_states_lie_in_the_columns_of_their_tokens():
    model, ids = tiny_model(), random_ids(2, 6)
    padded = model(ids, attention_mask=MASK, output_hidden_states=True)
    alone = model(ids[:1, 2:], output_hidden_states=True)

    for got, expected in zip(padded.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(got[:1, 2:], expected)
    # The head sees only some columns, the last hidden state has all.
    assert model(ids, logits_to_keep=1).last_hidden_state.shape == (2, 6, 32)


def test_a_tuple_holds_what_the_output_does():
    model, ids = tiny_model(), random_ids(2, 6)
    output, as_tuple = model(ids, use_cache=False), model(ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert all(map(torch.equal, as_tuple, output.to_tuple()))

    model.config.return_dict = False
    loss, masked = model(ids, labels=ids)
    assert loss.ndim == masked.ndim == 0


def test_position_ids_have_no_effect():
    model, ids = tiny_model(), random_ids(2, 6)
    of_left_padding = (MASK.cumsum(1) - 1).masked_fill(MASK == 0, 1)
    for mask, positions in (
        (None, torch.arange(6)[None]),
        (None, 7 + torch.arange(6).expand(2, 6)),
        (MASK, of_left_padding),
    ):
        got = model(ids, attention_mask=mask, position_ids=positions, cache_position=positions[0])
        assert torch.equal(got.logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("labels", [None, random_ids(1, 4)])
def test_position_ids_of_packed_texts_are_refused(labels):
    with pytest.raises(ValueError, match="packed texts are not supported"):
        tiny_model()(random_ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), labels=labels)


def test_position_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4\)"):
        tiny_model()(random_ids(1, 4), position_ids=torch.zeros(3, 1, 4))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_other_models_support_is_refused_by_name(name):
    model, ids = tiny_model(), random_ids(1, 4)
    model(ids, **{name: None})
    model(ids, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        model(ids, **{name: torch.ones(1) if UNSUPPORTED[name] is None else not UNSUPPORTED[name]})


def test_attention_weights_are_refused_where_the_config_asks_for_them():
    model = tiny_model()
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(random_ids(1, 4))


def test_misspelled_arguments_are_not_lost():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lables'"):
        tiny_model()(random_ids(1, 4), lables=None)
