"""The model of a recipe: where it comes from, its special tokens, and adapters."""

import pytest
import torch
from tiny import BASE, tiny_model, tiny_tokenizer
from training.runs import interrupted_after_step, left_behind, lines, make_inputs, recipe
from transformers import AutoTokenizer

from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
from twotower.training.models import build_model
from twotower.training.recipe import ModelRecipe
from twotower.training.run import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_new_denoiser_on_a_backbone(tmp_path):
    backbone = context_tower_in_transformers(tiny_model(vocab_size=280))
    backbone.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = build_model(ModelRecipe(backbone=str(tmp_path), mask_token_id=3, block_size=4))
    assert (model.config.block_size, model.config.mask_token_id) == (4, 3)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.context_lm_head.weight.requires_grad and model.lm_head.weight.requires_grad


def test_new_weights_are_those_of_the_seed(inputs, tmp_path):
    config = tiny_model("only -", vocab_size=280, block_size=8).config.to_dict()
    asked = {"model": {"config": config, "tokenizer": str(inputs / "model"), "trained_towers": "context"}, "steps": 1}
    models = [train(recipe(inputs, tmp_path / str(at), seed=seed, **asked)) for at, seed in enumerate((5, 5, 6))]
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in models)
    assert first == again != other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sise": 24}, r".hidden_sise is no field of a TwoTowerConfig; did you mean hidden_size\?"),
        ({"rope_theta": 1e4}, ".rope_theta is no field of a TwoTowerConfig; leave it out"),
        ({"hidden_size": "a"}, ": .*'hidden_size' expected int, got str .*; see TwoTowerConfig"),
        ({"hybrid_override_pattern": 5}, ": .*; see TwoTowerConfig"),
    ],
)
def test_what_no_config_has_is_refused(fields, message, inputs):
    """Before a model of the size that is then the default."""
    new = ModelRecipe(config={**BASE, **fields}, tokenizer=str(inputs / "model"))
    with pytest.raises(ValueError, match=f"model.config{message}") as caught:
        build_model(new)
    assert "\n" not in str(caught.value)


def test_special_tokens_that_do_not_go_together_are_refused(inputs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless has no end-of-text token; set its eos_token"):
        build_model(ModelRecipe(checkpoint=str(inputs / "model"), tokenizer=str(tmp_path / "endless")))
    tiny_model("only -", vocab_size=280, mask_token_id=2).save_pretrained(tmp_path / "mask")
    with pytest.raises(ValueError, match="mask_token_id is 2, which begins or ends a text"):
        build_model(ModelRecipe(checkpoint=str(tmp_path / "mask"), tokenizer=str(inputs / "model")))
    tiny_model("only -", vocab_size=64).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="has 280 tokens and the model 64; give the model's own"):
        build_model(ModelRecipe(checkpoint=str(tmp_path / "small"), tokenizer=str(inputs / "model")))
    with pytest.raises(ValueError, match=r"\./absent does not exist; give a folder or a Hub repository"):
        build_model(ModelRecipe(checkpoint="./absent"))


MODULES = ["attention", "mamba", "shared_experts", "mlp"]
NAMES = {"q_proj", "in_proj", "shared_experts.up_proj", "mixer.up_proj"}
LORA = {
    "everything": ({"rank": 2}, NAMES | {"experts.down_proj"}),
    "by Muon": ({"rank": 2, "targets": ["attention"]}, {"q_proj"}),
    "with dropout": ({"rank": 2, "dropout": 0.1, "targets": MODULES}, NAMES),
}


@pytest.mark.parametrize("case", LORA)
def test_an_adapter_is_trained_resumed_and_merged(case, inputs, tmp_path):
    """With dropout, whose draws a resumed run repeats; the context tower's text stays what it was."""
    lora, kinds = LORA[case]
    asked = {"model__lora": lora, "optimizer": {"lr": 0.1, "name": "muon" if case == "by Muon" else "adamw"}}
    train(recipe(inputs, tmp_path / "whole", **asked))
    interrupted_after_step(2, recipe(inputs, tmp_path / "parts", **asked))
    train(recipe(inputs, tmp_path / "parts", **asked))
    whole, parts = left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")
    # Of the adapter's config peft writes sets, in any order.
    assert {name for name in whole if parts.get(name) != whole[name] and "adapter_config" not in name} == set()
    assert {"adapter", "model"} <= set(whole["folders"]) and len(lines(tmp_path / "whole" / "log.jsonl")) == 4
    merged = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "whole" / "model").state_dict()
    before = TwoTowerForBlockDiffusion.from_pretrained(inputs / "model").state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("denoiser_tower.layers") for name in changed)
    assert all(any(kind in name for name in changed) for kind in kinds), changed
    texts = []
    model = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "whole" / "model")
    prompt = AutoTokenizer.from_pretrained(inputs / "model")("Question:", return_tensors="pt").input_ids
    for mode in ("ar", "self_speculative"):
        texts.append(model.generate(prompt, max_new_tokens=12, mode=mode))
    assert torch.equal(*texts)


def test_adapters_on_what_the_model_has_not_are_refused(tmp_path):
    inputs = make_inputs(tmp_path, "only -")
    with pytest.raises(ValueError, match=r"lora\.targets are attention, of which the model has no layer"):
        train(recipe(inputs, tmp_path / "run", model__lora={"targets": ["attention"]}))


def test_a_checkpoint_that_is_an_adapter_is_refused_rather_than_trained_and_not_stored(inputs, tmp_path):
    first = {"checkpoint": str(inputs / "model"), "lora": {"rank": 2, "merge": False}}
    adapter = train(recipe(inputs, tmp_path / "first", model=first, steps=1))
    for lora in (None, {"rank": 2}):
        with pytest.raises(ValueError, match=r"adapter holds an adapter; .* merge it"):
            train(recipe(inputs, tmp_path / "second", model={"checkpoint": str(adapter), "lora": lora}, steps=1))
    assert not [*(tmp_path / "second").glob("*/*")]
