"""accelerate's tools for models that do not fit: every one of them leaves the numbers as they are."""

import accelerate
import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

IDS = random_ids(2, 7)
KNOBS = {"max_new_tokens": 9, "eos_token_id": None}
MODES = ("mask_diffusion", "self_speculative")
FIRST_FITS = {"cpu": "60KB", "disk": "1GB"}


@pytest.fixture(scope="module")
def expected():
    model = tiny_model("all kinds")
    with torch.no_grad():
        return [model(IDS).logits, *(model.generate(IDS, mode=mode, **KNOBS) for mode in MODES)]


@pytest.fixture(scope="module", params=["one file", "shards"])
def folder(request, tmp_path_factory):
    """Our layout, whose names are those of the modules."""
    path = tmp_path_factory.mktemp("ours")
    size = "50GB" if request.param == "one file" else "60KB"
    tiny_model("all kinds").save_pretrained(path, save_original_format=False, max_shard_size=size)
    return path


def without_weights():
    with accelerate.init_empty_weights():
        return AutoModelForCausalLM.from_config(tiny_config("all kinds")).eval()


def assert_same(model, expected):
    model.generation_config.update(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected[0])
    for mode, text in zip(MODES, expected[1:], strict=True):
        assert torch.equal(model.generate(IDS, mode=mode, **KNOBS), text)


def test_half_on_disk_by_an_inferred_map(expected, tmp_path):
    model = tiny_model("all kinds")
    places = accelerate.infer_auto_device_map(model, FIRST_FITS, no_split_module_classes=model._no_split_modules)
    assert set(places.values()) == {"cpu", "disk"}
    assert not any("mixer" in name for name in places), "a layer is not divided"
    assert_same(accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path), expected)


def test_cpu_offload(expected):
    assert_same(accelerate.cpu_offload(tiny_model("all kinds"), execution_device="cpu"), expected)


def test_disk_offload(expected, tmp_path):
    model = tiny_model("all kinds")
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert_same(model, expected)


@pytest.mark.parametrize("places", [None, "auto", {"": "cpu"}])
def test_a_checkpoint_in_our_layout_is_loaded_and_dispatched(folder, expected, places):
    model = accelerate.load_checkpoint_and_dispatch(
        without_weights(), folder, places, no_split_module_classes=["TwoTowerLayer"]
    )
    assert_same(model, expected)


def test_a_checkpoint_in_our_layout_with_a_tower_on_disk(folder, expected, tmp_path):
    """Without `offload_buffers`, accelerate leaves the buffers of what is on disk (the router's bias) unread."""
    places = {name: "cpu" for name, _ in tiny_model("all kinds").named_children()} | {"denoiser_tower": "disk"}
    model = accelerate.load_checkpoint_and_dispatch(
        without_weights(), folder, places, offload_folder=tmp_path, offload_buffers=True
    )
    assert_same(model, expected)


def test_a_checkpoint_in_nvidias_layout_is_refused(tmp_path):
    tiny_model("all kinds").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.up_proj for one.*save_original_format=False"):
        accelerate.load_checkpoint_and_dispatch(without_weights(), tmp_path, {"": "cpu"})


def test_another_move_that_is_not_implemented_keeps_its_error(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no such device")

    model = tiny_model("all kinds")
    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with pytest.raises(NotImplementedError, match="no such device"):
        model.to("cpu")


CHANGES = {
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(60),
    "reset_denoiser": lambda model: model.reset_denoiser(),
    "reset_time_conditioning": lambda model: model.reset_time_conditioning(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_offloaded_weights_is_refused_before_any_is_made(change):
    """To their place-holders torch would copy nothing, and say nothing."""
    model = tiny_model("all kinds")
    for part in (model.denoiser_tower, model.lm_head, model.t_block, model.scale_shift_tables):
        accelerate.cpu_offload(part, execution_device="cpu")
    with pytest.raises(ValueError, match=f"{change} changes weights in place, and those of an offloaded module"):
        CHANGES[change](model)
    assert model.context_lm_head.out_features == model.resize_token_embeddings().num_embeddings == 48
