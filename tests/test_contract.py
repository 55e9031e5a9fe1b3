"""What every transformers model lets its caller do, as far as other test files do not show it."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from tiny import random_block, random_ids, tiny_config, tiny_model, without_special_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from twotower.generation_twotower import MODES
from twotower.inputs_twotower import UNSUPPORTED
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

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
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(model.context_lm_head(output.last_hidden_state), output.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    for got, expected in zip(model(ids, labels=ids).hidden_states, output.hidden_states, strict=True):
        torch.testing.assert_close(got, expected)


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
    with pytest.raises(ValueError, match="position_ids is a list; give a tensor of positions"):
        tiny_model()(random_ids(1, 4), position_ids=[[0, 1, 2, 3]])


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


def test_input_embeddings_and_output_embeddings_are_those_of_forward():
    model, ids = tiny_model(), random_ids(2, 6)
    embeddings, head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)

    assert model.get_input_embeddings() is model.context_tower.embeddings is embeddings
    assert model.get_output_embeddings() is model.context_lm_head is head
    output = model(ids, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], embeddings(ids))
    assert torch.equal(output.logits, head(output.last_hidden_state))


@pytest.mark.parametrize("size", [40, 56])
def test_resizing_the_vocabulary_resizes_both_towers_and_both_heads(size, tmp_path):
    model, ids = tiny_model(), random_ids(2, 6, vocab_size=40)
    block, kept = random_block(2, 4, vocab_size=40), min(size, 48)
    model.set_trained_towers("both")
    model.lm_head.requires_grad_(False)
    before, denoised = model(ids), model.denoise(block, model(ids).cache)

    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.vocab_size == size
    assert [p.requires_grad for p in (model.context_lm_head.weight, model.lm_head.weight)] == [True, False]
    model.save_pretrained(tmp_path)
    for resized in (model, TwoTowerForBlockDiffusion.from_pretrained(tmp_path)):
        assert torch.equal(resized(ids).logits[..., :kept], before.logits[..., :kept])
        read = resized(ids)
        assert torch.equal(resized.denoise(block, read.cache)[..., :kept], denoised[..., :kept])
        assert read.logits.shape[-1] == size == resized.denoise(block, read.cache).shape[-1]
    with pytest.raises(ValueError, match=f"its vocab_size is 48, this model's {size}"):
        resized.denoise(block, before.cache)
    assert resized.generate(ids, max_new_tokens=4).shape[0] == 2


def test_a_vocabulary_without_the_mask_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="vocabulary of 3 tokens would lack the mask, token 3"):
        model.resize_token_embeddings(3)
    assert model.config.vocab_size == len(model.lm_head.weight) == 48
    # Asked for nothing, it stays as it is.
    assert model.resize_token_embeddings().num_embeddings == 48


@pytest.mark.parametrize("mask", [None, MASK])
def test_eager_attention_is_honoured_and_gives_the_same_numbers(mask, monkeypatch):
    model, ids = tiny_model(), random_ids(2, 6)

    def everything():
        output = model(ids, attention_mask=mask)
        more = model(ids[:, :2], cache=output.cache).logits
        loss = model(ids, attention_mask=mask, labels=ids, generator=torch.Generator().manual_seed(0)).loss
        return output.logits, more, model.denoise(random_block(2, 4), output.cache), loss

    expected = everything()
    model.set_attn_implementation("eager")
    calls = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **_: calls.append(args))
    for got, value in zip(everything(), expected, strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)
    assert not calls


@pytest.mark.parametrize("name", ["flex_attention", "paged|eager", "nonsense"])
def test_other_attention_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"not support.*{re.escape(name)}|{re.escape(name)}.*not support"):
        tiny_model().set_attn_implementation(name)


def test_no_parallel_plan_is_claimed():
    model = tiny_model()
    assert not model.supports_tp_plan
    assert model.tp_plan == model.ep_plan == model.pp_plan == {}


@pytest.mark.parametrize("geometry", ["base", "all kinds", "latent experts"])
def test_a_double_model_computes_in_float64_throughout(geometry):
    model, ids = tiny_model(geometry).double(), random_ids(2, 9)
    output = model(ids)
    denoised = model.denoise(random_block(2, 4), output.cache, timestep=0.5)
    loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss
    for tensor in (
        output.logits,
        output.last_hidden_state,
        denoised,
        model.predict_next(ids[:, :1], output.cache),
        loss,
    ):
        assert tensor.dtype == torch.float64

    # Float32 anywhere on the way would part the two readings at 1e-7.
    halves = model(ids[:, 5:], cache=model(ids[:, :5]).cache)
    torch.testing.assert_close(halves.logits, output.logits[:, 5:], atol=1e-13, rtol=0)
    redone = model.denoise(random_block(2, 4), halves.cache, timestep=0.5)
    torch.testing.assert_close(redone, denoised, atol=1e-13, rtol=0)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes_generate(mode, dtype):
    model = without_special_tokens(tiny_model()).to(dtype)
    output = model.generate(
        random_ids(2, 5), max_new_tokens=6, mode=mode, return_dict_in_generate=True, output_logits=True
    )
    assert output.sequences.shape == (2, 11)
    assert output.logits[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_double_model_writes_the_text_of_the_float_model():
    model, ids = without_special_tokens(tiny_model()), random_ids(2, 5)
    texts = {mode: model.generate(ids, max_new_tokens=12, mode=mode) for mode in MODES}
    model.double()
    for mode, text in texts.items():
        assert torch.equal(model.generate(ids, max_new_tokens=12, mode=mode), text)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_share_nothing(copied):
    model, ids = tiny_model(), random_ids(2, 6)
    output = model(ids)
    twin = copied(model)
    assert torch.equal(twin(ids).logits, output.logits)
    twin.context_lm_head.weight.zero_()
    assert torch.equal(model(ids).logits, output.logits)
    # A cache is copied as a whole, too.
    cache = copied(output.cache)
    model(ids, cache=output.cache)
    assert torch.equal(model.denoise(ids[:, :4], cache), model.denoise(ids[:, :4], model(ids).cache))


def test_a_model_from_its_config_alone_is_the_auto_class():
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert type(model) is TwoTowerForBlockDiffusion
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    embedded = sum(tower.embeddings.weight.numel() for tower in (model.context_tower, model.denoiser_tower))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedded
    assert model.get_parameter("t_block.1.weight").dtype == torch.bfloat16


def test_heads_and_embeddings_stay_apart_when_tied_again():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.tie_weights()
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_base_model_gives_what_the_head_needs():
    # TRL's fused losses multiply these two.
    model, ids = tiny_model(), random_ids(2, 6)
    hidden_states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden_states @ model.get_output_embeddings().weight.T, model(ids).logits)
    assert model.get_decoder()(ids).last_hidden_state.shape == hidden_states.shape


@pytest.mark.parametrize("embeds", [[[0.0]], np.zeros((1, 4, 32), dtype=np.float32), torch.zeros(1, 4, 32).long()])
def test_embeddings_of_another_kind_are_refused(embeds):
    with pytest.raises(ValueError, match=r"inputs_embeds are .*; give a tensor of floating-point numbers"):
        tiny_model()(inputs_embeds=embeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_default_dtype_changes_nothing(dtype):
    """Of the odd geometry, whose blocks of 5 have masked fractions that bfloat16 rounds."""
    model = without_special_tokens(tiny_model("odd"))
    ids, block = random_ids(2, 10, vocab_size=53), random_block(2, 5, vocab_size=53)
    flags = {"max_new_tokens": 11, "return_dict_in_generate": True, "draft_length": 5}

    def numbers():
        cache = model(ids).cache
        given = [model.denoise(block, cache), model.denoise(block, cache, attention_mask=torch.ones_like(block))]
        for mode in MODES:
            output = model.generate(ids, mode=mode, **flags)
            given += [output.sequences, output.tokens_per_forward, output.log_probs]
        for training in (False, True):
            model.train(training)
            draws = {"generator": torch.Generator().manual_seed(0)} if training else {}
            weighted = {"num_items_in_batch": 20, "loss_weighting": "inverse_timestep"}
            given.append(model(ids, labels=ids, **weighted, **draws).loss)
        model.eval()
        return given

    with torch.no_grad():
        expected = numbers()
        torch.set_default_dtype(dtype)
        try:
            found = numbers()
        finally:
            torch.set_default_dtype(torch.float32)
    for number, (own, other) in enumerate(zip(expected, found, strict=True)):
        assert own.dtype == other.dtype and torch.equal(own.nan_to_num(), other.nan_to_num()), number
