"""peft's LoRA on the denoiser: trained, saved, loaded and merged, with the context tower's text as it was."""

import fake_graphs
import pytest
import torch
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import random_ids, student_model, tiny_model, without_special_tokens
from tolerances import assert_close
from transformers import NemotronHForCausalLM

from twotower import TwoTowerForBlockDiffusion
from twotower.checkpoints.conversion import convert_backbone
from twotower.checkpoints.export import export
from twotower.evaluation.baseline import context_tower_in_transformers

# Attention, Mamba and shared experts by module, routed experts by the tensors that hold all of a layer.
MODULES = r"denoiser_tower\.layers\.\d+\.mixer\.(shared_experts\.)?(q_proj|v_proj|in_proj|up_proj|down_proj)"
EXPERTS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
TARGETS = {
    "modules": {"target_modules": MODULES},
    "routed experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": MODULES, "target_parameters": EXPERTS},
}


def adapted(targets: str) -> PeftModel:
    model = without_special_tokens(student_model("all kinds"))
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.0, **TARGETS[targets]))


def train(model: PeftModel) -> None:
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    ids = random_ids(3, 12)
    for step in range(3):
        model(input_ids=ids, labels=ids, generator=torch.Generator().manual_seed(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the context tower and of the denoiser."""
    with torch.no_grad():
        output = model(input_ids=random_ids(2, 8))
        return output.logits, model.denoise(torch.full((2, 4), 3), output.cache)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_train_save_load_and_merge(targets, tmp_path):
    model = adapted(targets)
    context, denoiser = logits(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    train(model)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)
    after = logits(model)
    assert torch.equal(after[0], context)
    assert not torch.equal(after[1], denoiser)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(without_special_tokens(student_model("all kinds")), tmp_path).eval()
    for expected, actual in zip(after, logits(loaded), strict=True):
        assert torch.equal(actual, expected)
    for expected, actual in zip(after, logits(loaded.merge_and_unload()), strict=True):
        assert_close(actual, expected)


def test_an_adapters_folder_is_placed_by_the_model_it_is_of(tmp_path):
    """It has no config.json of its own, which the map was made from."""
    model = adapted("modules")
    train(model)
    expected = logits(model)
    student_model("all kinds").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "adapter", device_map="towers")
    for found, wanted in zip(logits(loaded), expected, strict=True):
        assert_close(found, wanted)


def test_self_speculative_of_an_adapted_denoiser_still_equals_ar():
    model = adapted("both")
    train(model)
    prompt = random_ids(2, 7)
    texts = [model.generate(input_ids=prompt, max_new_tokens=20, mode=mode) for mode in ("ar", "self_speculative")]
    assert torch.equal(*texts)
    diffused = model.generate(input_ids=prompt, max_new_tokens=20)
    plain = without_special_tokens(student_model("all kinds")).generate(prompt, max_new_tokens=20)
    assert not torch.equal(diffused, plain), "the adapter is used"


def test_an_adapter_that_is_switched_off_is_not_in_recorded_passes(monkeypatch):
    fake_graphs.put_in_place(monkeypatch)
    config = LoraConfig(r=4, target_modules=["in_proj", "q_proj"], init_lora_weights=False)
    model = get_peft_model(without_special_tokens(student_model("all kinds")), config).eval().requires_grad_(False)

    def texts():
        flags = {"input_ids": random_ids(2, 8), "mode": "ar", "max_new_tokens": 8}
        recorded, eager = model.generate(**flags, compile=True), model.generate(**flags)
        assert torch.equal(recorded, eager)
        return eager

    adapted_text = texts()
    with model.disable_adapter():
        assert not torch.equal(texts(), adapted_text)


def test_adapters_on_all_linear_layers_are_used_switched_off_and_merged():
    plain = without_special_tokens(student_model("all kinds"))
    model = get_peft_model(
        without_special_tokens(student_model("all kinds")),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    ).eval()
    assert any("t_embedder" in name for name, _ in model.named_parameters() if "lora_" in name)

    def texts(writer):
        flags = {"input_ids": random_ids(2, 7), "max_new_tokens": 12}
        return [writer.generate(**flags, mode=mode) for mode in ("ar", "mask_diffusion")]

    adapted_texts = texts(model)
    assert not any(map(torch.equal, adapted_texts, texts(plain)))
    with model.disable_adapter():
        assert all(map(torch.equal, texts(model), texts(plain)))
    assert all(map(torch.equal, texts(model.merge_and_unload()), adapted_texts))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(r=64, target_modules=["conv1d"]), "conv1d"),
        (LNTuningConfig(target_modules=r".*mixer\.norm"), "norm"),
    ],
)
def test_an_adapter_that_would_have_no_effect_is_refused(config, name):
    model = get_peft_model(student_model("all kinds"), config)
    with pytest.raises(ValueError, match=f"leave {name} out of target_modules"):
        model(input_ids=random_ids(2, 8))


def test_weights_saved_beside_adapters_may_be_those_used_without_a_call():
    model = without_special_tokens(student_model("all kinds"))
    before = logits(model)
    saved = ["conv1d", "t_block", "t_embedder"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    after = logits(model)
    assert not any(map(torch.equal, before, after))
    with model.disable_adapter():
        assert all(map(torch.equal, before, logits(model)))


def test_a_head_that_is_saved_because_its_name_ends_so_is_refused():
    def losses(**options):
        model = get_peft_model(student_model("all kinds"), LoraConfig(r=4, task_type="CAUSAL_LM", **options)).train()
        ids = random_ids(2, 8)
        return model, model(input_ids=ids, labels=ids).loss, model(input_ids=ids).logits.sum()

    with pytest.raises(ValueError, match="put lm_head into target_modules instead"):
        losses(target_modules=r"denoiser_tower\..*\.q_proj", modules_to_save=["lm_head"])
    model, loss, other = losses(target_modules=r"denoiser_tower\..*\.q_proj|lm_head")
    loss.backward()
    assert model.lm_head.lora_B["default"].weight.grad.any()
    assert not other.requires_grad
    *_, other = losses(target_modules=r"denoiser_tower\..*\.q_proj", modules_to_save=["lm_head", "context_lm_head"])
    assert other.requires_grad


def test_an_adapter_for_each_row_is_refused_where_a_batch_has_other_rows():
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(without_special_tokens(student_model("all kinds")), config)
    model.add_adapter("other", config)
    model.eval()
    prompt, names = random_ids(2, 7), ["other", "__base__"]
    with pytest.raises(ValueError, match="adapter_names is not supported by TwoTower's generate"):
        model.generate(input_ids=prompt, max_new_tokens=4, adapter_names=names)
    # A pass of the model has the rows of its input.
    mixed = model(input_ids=prompt, adapter_names=names).logits
    model.set_adapter("other")
    assert_close(mixed[:1], model(input_ids=prompt[:1]).logits)
    with model.disable_adapter():
        assert_close(mixed[1:], model(input_ids=prompt[1:]).logits)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_of_which_generate_knows_nothing_are_refused(config):
    model = without_special_tokens(student_model("all kinds"))
    virtual = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    prompt = random_ids(2, 7)
    with pytest.raises(ValueError, match="prompt, prefix and p-tuning"):
        virtual.generate(input_ids=prompt, max_new_tokens=4)
    with virtual.disable_adapter():
        text = virtual.generate(input_ids=prompt, max_new_tokens=4)
    assert torch.equal(text, model.generate(prompt, max_new_tokens=4))


@pytest.mark.parametrize("attach", ["get_peft_model", "add_adapter"])
def test_a_model_with_adapters_is_not_saved_or_exported_without_them(attach, tmp_path):
    model = without_special_tokens(student_model("all kinds"))
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    if attach == "add_adapter":
        model.add_adapter(config)
        model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        sources = [model, tmp_path / "adapter"]
    else:
        adapted = get_peft_model(model, config)
        with pytest.raises(ValueError, match="merge"):
            model.save_pretrained(tmp_path / "base")
        sources = [model, adapted]
    for source in sources:
        with pytest.raises(ValueError, match="merge"):
            export(source, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "base").exists()


def test_a_merged_adapter_is_exported(tmp_path):
    model = adapted("both")
    text = model.generate(input_ids=random_ids(2, 7), max_new_tokens=8)
    export(model.merge_and_unload(), tmp_path / "exported")
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "exported")
    assert torch.equal(loaded.generate(random_ids(2, 7), max_new_tokens=8), text)


def test_a_model_from_an_adapters_folder_trains_nothing_that_would_not_be_saved(tmp_path):
    student_model("all kinds").save_pretrained(tmp_path / "model")
    model = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(target_modules=MODULES)).save_pretrained(tmp_path / "adapter")
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "adapter")
    assert any("lora" in name for name, _ in loaded.named_parameters())
    assert not any(weight.requires_grad for weight in loaded.parameters())
    with pytest.raises(ValueError, match=r"trained_towers is 'both', but .*adapter holds an adapter"):
        TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "adapter", trained_towers="both")


def test_a_backbone_with_an_adapter_is_refused(tmp_path):
    context_tower_in_transformers(tiny_model()).save_pretrained(tmp_path / "backbone")
    adapted = get_peft_model(
        NemotronHForCausalLM.from_pretrained(tmp_path / "backbone"), LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"PeftModel; give a NemotronHForCausalLM .of a PeftModel, what merge_and_un"):
        TwoTowerForBlockDiffusion.from_backbone(adapted)
    for given in (adapted.base_model.model, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="q_proj has an adapter; merge it first"):
            TwoTowerForBlockDiffusion.from_backbone(given)
    with pytest.raises(ValueError, match="holds an adapter; load it with peft, merge it"):
        convert_backbone(tmp_path / "adapter", tmp_path / "both")
    assert not (tmp_path / "both").exists()
    TwoTowerForBlockDiffusion.from_backbone(adapted.merge_and_unload())
