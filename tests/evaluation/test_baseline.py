"""The same tower run by transformers."""

import math

import pytest
import torch
from accelerate import cpu_offload
from tiny import tiny_config, tiny_model
from tolerances import assert_close
from transformers import BatchEncoding

from twotower import TwoTowerForBlockDiffusion
from twotower.evaluation.baseline import baseline_variant, context_tower_in_transformers, nemotron_config


@pytest.fixture(scope="module")
def model():
    model = tiny_model("all kinds", vocab_size=280)
    # Steps far below transformers' lower bound of 0.001, so that a clamp there would show.
    for layer in (model.context_tower.layers[0], model.context_tower.layers[6]):
        layer.mixer.dt_bias.data.fill_(-9.0)
    return model


def test_transformers_runs_the_same_tensors_to_the_same_logits(model):
    baseline = context_tower_in_transformers(model)
    ids = torch.randint(4, 280, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ours, theirs = model(ids, mask).logits, baseline(ids, attention_mask=mask).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert baseline.lm_head.weight.data_ptr() == model.context_lm_head.weight.data_ptr()
    assert baseline.model.layers[0].mixer.D.data_ptr() == model.context_tower.layers[0].mixer.D.data_ptr()
    for layer in (0, 6):
        baseline.model.layers[layer].mixer.time_step_limit = (0.001, math.inf)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(baseline(ids).logits[0], ours[0])


def test_an_offloaded_tower_is_refused():
    offloaded = cpu_offload(tiny_model("all kinds", vocab_size=280), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the context tower is on cpu, meta, .* needs it on one device; .*--modes"):
        context_tower_in_transformers(offloaded)


def test_nemotron_config_describes_one_tower(model):
    config = nemotron_config(model.config)
    assert config.model_type == "nemotron_h"
    assert not hasattr(config, "mask_token_id")
    for name in ("layers_block_type", "hidden_size", "routed_scaling_factor", "vocab_size"):
        assert getattr(config, name) == getattr(model.config, name)
    assert tuple(config.time_step_limit) == model.config.time_step_limit


def test_baseline_ends_at_the_models_end_of_text(model):
    variant = baseline_variant(model)
    inputs = BatchEncoding({"input_ids": torch.tensor([[1, 9, 9]]), "attention_mask": torch.ones(1, 3).long()})
    first = int(variant.generate(inputs, 4).sequences[0, 3])
    ending = TwoTowerForBlockDiffusion(tiny_config("all kinds", vocab_size=280, eos_token_id=first)).eval()
    ending.load_state_dict(model.state_dict())
    assert baseline_variant(ending).generate(inputs, 4).sequences.shape == (1, 4)
