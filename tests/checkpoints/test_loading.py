"""Checkpoints: both layouts in and out, dtypes and devices, from_backbone, and what is refused before any work."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from tiny import GEOMETRIES, random_block, random_ids, randomize, tiny_config, tiny_model
from tolerances import assert_close
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.trainer_utils import load_sharded_checkpoint

from twotower.checkpoints.conversion import convert_backbone
from twotower.checkpoints.export import export
from twotower.checkpoints.loading import check_safetensors
from twotower.configuration_twotower import TwoTowerConfig
from twotower.modeling_twotower import TWOTOWER_PARTS, TwoTowerForBlockDiffusion


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, dtypes included."""
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's safetensors."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def released_names(model: TwoTowerForBlockDiffusion) -> set[str]:
    """The names NVIDIA gives a checkpoint of this geometry."""
    names = set()
    for name in model.state_dict():
        if ".mixer.experts." in name:
            prefix, projection = name.rsplit(".", 1)
            names |= {f"{prefix}.{expert}.{projection}.weight" for expert in range(model.config.n_routed_experts)}
        else:
            names.add(name)
    return names


def outputs(model: TwoTowerForBlockDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both towers."""
    with torch.no_grad():
        output = model(random_ids(2, 9))
        return output.logits, model.denoise(random_block(2, 5), output.past_key_values)


# Layouts


def test_nvidias_layout_loads_whole(goldens):
    model, info = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint", output_loading_info=True)
    assert not any(info.values())
    assert not model.training
    assert model.dtype == torch.float32
    tensors = stored(goldens / "checkpoint")
    for name, tensor in model.state_dict().items():
        if ".mixer.experts." in name:
            prefix, projection = name.rsplit(".", 1)
            tensors[name] = torch.stack([tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in range(8)])
        assert torch.equal(tensor, tensors[name]), name


def test_nvidias_layout_is_written_back_as_it_was(goldens, tmp_path):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
    model.save_pretrained(tmp_path)
    written, source = stored(tmp_path), stored(goldens / "checkpoint")
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", [True, False])
def test_round_trip(original, dtype, shards, tmp_path):
    model = tiny_model("all kinds").to(dtype)
    size = "50GB" if shards == 1 else "40KB"
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    assert not list(tmp_path.glob("*.bin"))
    assert stored(tmp_path).keys() == (released_names(model) if original else model.state_dict().keys())
    loaded, info = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # The correction bias is kept in float32, as everywhere in transformers.
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_round_trip_of_every_geometry(geometry, tmp_path):
    model = tiny_model(geometry)
    for original in (True, False):
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
        assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path / str(original)), model)


def test_what_is_written_depends_on_the_argument_not_on_what_was_loaded(tmp_path):
    """transformers alone would write whichever layout it had read."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "fused")
    loaded.save_pretrained(tmp_path / "released")
    assert stored(tmp_path / "released").keys() == released_names(model)
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "released")
    loaded.save_pretrained(tmp_path / "fused again", save_original_format=False)
    assert stored(tmp_path / "fused again").keys() == model.state_dict().keys()
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "fused again"), model)


def test_any_sharding_loads(tmp_path):
    """A layer's experts spread over files, in no order."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = list(load_file(tmp_path / "model.safetensors").items())
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(3):
        file = f"part-{shard}.safetensors"
        save_file(dict(tensors[shard::3]), tmp_path / file, metadata={"format": "pt"})
        weight_map.update({name: file for name, _ in tensors[shard::3]})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path), model)


def test_the_written_config_is_ours(goldens, tmp_path):
    TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "twotower"
    assert config["architectures"] == ["TwoTowerForBlockDiffusion"]
    assert "auto_map" not in config


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_auto_classes(auto_class, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is TwoTowerForBlockDiffusion
    assert_same_weights(loaded, model)
    assert type(auto_class.from_config(tiny_config())) is TwoTowerForBlockDiffusion


# load_state_dict, by which transformers' Trainer loads checkpoints


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("original", [True, False])
def test_load_state_dict_takes_both_layouts(original, assign, tmp_path):
    model, other = tiny_model("all kinds"), tiny_model("all kinds", seed=1)
    model.save_pretrained(tmp_path, save_original_format=original)
    tensors = stored(tmp_path)
    names = set(tensors)
    assert not any(other.load_state_dict(tensors, assign=assign))
    assert set(tensors) == names, "the caller's own dictionary"
    assert_same_weights(other, model)
    assert_same_weights(tiny_model("all kinds"), model)
    wrapped = torch.nn.ModuleDict({"module": tiny_model("all kinds", seed=1)})
    assert not any(wrapped.load_state_dict({f"module.{name}": tensor for name, tensor in tensors.items()}))
    assert_same_weights(wrapped["module"], model)


@pytest.mark.parametrize("size", ["8KB", "40KB"])
def test_load_state_dict_takes_one_shard_after_another(size, tmp_path):
    """An expert's matrices then come with any others of its layer or with none."""
    model, other = tiny_model("each kind once"), tiny_model("each kind once", seed=1)
    model.save_pretrained(tmp_path, max_shard_size=size)
    load_sharded_checkpoint(other, tmp_path, strict=False)
    assert_same_weights(other, model)


def test_load_state_dict_names_absent_experts_and_keeps_their_weights(tmp_path):
    model, other = tiny_model("only E"), tiny_model("only E", seed=1)
    kept = other.denoiser_tower.layers[0].mixer.experts.up_proj[2].detach().clone()
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    absent = "denoiser_tower.layers.0.mixer.experts.2.up_proj.weight"
    removed = tensors.pop(absent)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{absent}"'):
        other.load_state_dict(tensors)
    other.load_state_dict(tensors, strict=False)
    assert torch.equal(other.denoiser_tower.layers[0].mixer.experts.up_proj[2], kept)
    with torch.no_grad():
        other.denoiser_tower.layers[0].mixer.experts.up_proj[2] = removed
    assert_same_weights(other, model)


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_refuses_experts_of_another_shape_or_number(strict, tmp_path):
    tiny_model("only E", n_routed_experts=5).save_pretrained(tmp_path / "more")
    tiny_model("only E", moe_intermediate_size=8).save_pretrained(tmp_path / "smaller")
    with pytest.raises(RuntimeError, match=r"experts.up_proj have shapes \{\(8, 32\)\}, expected \(16, 32\)"):
        tiny_model("only E").load_state_dict(stored(tmp_path / "smaller"), strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.4\.up_proj\.weight"):
            tiny_model("only E", n_routed_experts=4).load_state_dict(stored(tmp_path / "more"))


# Who is trained


def frozen(model: torch.nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("original", [True, False])
def test_loaded_context_towers_are_frozen_unless_asked_for(original, tmp_path):
    context, denoiser = set(TWOTOWER_PARTS[:2]), set(TWOTOWER_PARTS[2:])
    tiny_model().save_pretrained(tmp_path, save_original_format=original)
    for load in (TwoTowerForBlockDiffusion.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert frozen(load(tmp_path)) == context
        assert frozen(load(tmp_path, trained_towers="context")) == denoiser
        assert frozen(load(tmp_path, trained_towers="both")) == set()


def test_the_context_tower_of_a_backbone_is_frozen_unless_asked_for():
    backbone = nemotron_h()
    assert frozen(TwoTowerForBlockDiffusion.from_backbone(backbone)) == set(TWOTOWER_PARTS[:2])
    assert frozen(TwoTowerForBlockDiffusion.from_backbone(backbone, trained_towers="both")) == set()
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_what_a_loaded_config_is_told_is_checked(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert TwoTowerForBlockDiffusion.from_pretrained(tmp_path, block_size=8).config.block_size == 8
    for name, value, said in (("mask_token_id", 500, "outside the vocabulary of 48"), ("block_size", 0, "positive")):
        with pytest.raises(ValueError, match=f"{name} is {value}.*{said}"):
            TwoTowerForBlockDiffusion.from_pretrained(tmp_path, **{name: value})


def test_unknown_towers_are_refused_before_any_work(no_work, tmp_path):
    for load in (TwoTowerForBlockDiffusion.from_pretrained, TwoTowerForBlockDiffusion.from_backbone):
        with pytest.raises(ValueError, match="trained_towers is 'all'; use one of denoiser, context, both"):
            load(tmp_path, trained_towers="all")


# NVIDIA's 30B geometry, without weights


@pytest.fixture(scope="module")
def released_shapes(goldens):
    path = goldens.parent / "nvidia_30b" / "state_dict_shapes.json.gz"
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(path.read_bytes())).items()}


@pytest.fixture(scope="module")
def released_model(goldens):
    with torch.device("meta"):
        return TwoTowerForBlockDiffusion(TwoTowerConfig.from_pretrained(goldens.parent / "nvidia_30b"))


def test_all_released_tensors_find_their_place(released_model, released_shapes):
    """Through the conversion that from_pretrained applies, tensor by tensor."""
    assert len(released_shapes) == 12_544
    checkpoint = {name: torch.empty(shape, device="meta") for name, shape in released_shapes.items()}
    info, _ = convert_and_load_state_dict_in_model(
        released_model,
        checkpoint,
        LoadStateDictConfig(
            device_map={"": "meta"}, weight_mapping=get_model_conversion_mapping(released_model), dtype=torch.float32
        ),
    )
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert not info.conversion_errors
    assert sum(tensor.numel() for tensor in released_model.state_dict().values()) == 63_185_902_848


def test_the_released_tensors_are_what_would_be_written(released_model, released_shapes):
    written = revert_weight_conversion(released_model, released_model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == released_shapes


# dtypes and devices


def test_dtype(goldens):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint", dtype=torch.bfloat16)
    assert model.config.dtype == torch.bfloat16
    float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert float32 == {name for name in model.state_dict() if name.endswith("e_score_correction_bias")}
    source = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint", dtype="float32")
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name
    assert outputs(model)[1].isfinite().all()


def test_dtype_of_the_checkpoint_by_default(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert TwoTowerForBlockDiffusion.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert TwoTowerForBlockDiffusion.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments", [{"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str
)
def test_placement(arguments, tmp_path):
    model = tiny_model("all kinds")
    model.save_pretrained(tmp_path)
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, **arguments)
    assert_same_weights(loaded, model)


CONTEXT_PARTS = {"context_tower", "context_lm_head"}
PLACES = {
    "the denoiser on disk": {"device_map": {p: "cpu" if p in CONTEXT_PARTS else "disk" for p in TWOTOWER_PARTS}},
    "the context tower on disk": {"device_map": {p: "disk" if p in CONTEXT_PARTS else "cpu" for p in TWOTOWER_PARTS}},
    "all that does not fit": {"device_map": "auto", "max_memory": {"cpu": "80KB"}},
}


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_disk_offload(place, original, tmp_path):
    """What is on disk is read when it is needed, and saved again."""
    model = tiny_model("all kinds")
    model.save_pretrained(tmp_path / "source", save_original_format=original)
    loaded = TwoTowerForBlockDiffusion.from_pretrained(
        tmp_path / "source", offload_folder=tmp_path / "offload", **PLACES[place]
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert any(not parameter.is_meta for parameter in loaded.parameters())
    for actual, expected in zip(outputs(loaded), outputs(model), strict=True):
        assert_close(actual, expected)
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "saved")
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "saved"), model)


# From a backbone


def nemotron_h(geometry: str = "all kinds", **fields) -> NemotronHForCausalLM:
    config = tiny_config(geometry).to_dict()
    for name in ("model_type", "architectures", "block_size", "mask_token_id"):
        config.pop(name)
    config = {name: value for name, value in config.items() if not name.startswith("timestep_")}
    backbone = NemotronHForCausalLM(NemotronHConfig(**{**config, **fields})).eval()
    randomize(backbone)
    return backbone


def assert_made_of(model: TwoTowerForBlockDiffusion, backbone: NemotronHForCausalLM) -> None:
    for tower, head in ((model.context_tower, model.context_lm_head), (model.denoiser_tower, model.lm_head)):
        assert_same_weights(tower, backbone.model)
        assert_same_weights(head, backbone.lm_head)


@pytest.mark.parametrize("original", [True, False])
def test_from_backbone_in_a_folder(original, tmp_path):
    backbone = nemotron_h()
    backbone.save_pretrained(tmp_path, save_original_format=original)
    model = TwoTowerForBlockDiffusion.from_backbone(tmp_path, block_size=8, mask_token_id=5)
    assert (model.config.block_size, model.config.mask_token_id) == (8, 5)
    assert model.config.model_type == "twotower"
    assert model.config.layers_block_type == backbone.config.layers_block_type
    assert not model.training
    assert_made_of(model, backbone)


@pytest.mark.parametrize("original", [True, False])
def test_a_twotower_is_no_backbone(original, tmp_path):
    tiny_model().save_pretrained(tmp_path, save_original_format=original)
    with pytest.raises(ValueError, match="is a TwoTower, not a backbone; load it with from_pretrained, or name it as"):
        TwoTowerForBlockDiffusion.from_backbone(tmp_path)


def test_from_a_loaded_backbone():
    backbone = nemotron_h()
    model = TwoTowerForBlockDiffusion.from_backbone(backbone)
    assert (model.config.block_size, model.config.mask_token_id) == (16, 3)
    assert type(backbone.config) is NemotronHConfig
    assert_made_of(model, backbone)
    # Nothing is shared: not with the backbone, nor between the towers.
    backbone.model.embeddings.weight.data.zero_()
    model.context_tower.embeddings.weight.data.fill_(1.0)
    assert model.denoiser_tower.embeddings.weight.abs().max() > 1
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("loaded", [True, False])
def test_a_text_ends_where_the_backbones_does(loaded, tmp_path):
    backbone, ids = nemotron_h().eval(), torch.tensor([[5, 6, 7]])
    text = backbone.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    backbone.generation_config.update(eos_token_id=[2, text[3]], do_sample=True, temperature=0.5, use_cache=False)
    backbone.save_pretrained(tmp_path / "backbone")
    model = TwoTowerForBlockDiffusion.from_backbone(backbone if loaded else tmp_path / "backbone")
    assert model.generation_config.eos_token_id == [2, text[3]]
    # No more of it than that, which save_pretrained or generate might refuse.
    model.save_pretrained(tmp_path / "saved")
    written = model.generate(ids, mode="ar", max_new_tokens=8, pad_token_id=0)[0, 3:].tolist()
    assert written == text[: text.index(text[3]) + 1]
    convert_backbone(tmp_path / "backbone", tmp_path / "on disk")
    converted = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "on disk").generation_config
    assert converted.to_diff_dict() == model.generation_config.to_diff_dict()
    backbone.generation_config = None
    assert TwoTowerForBlockDiffusion.from_backbone(backbone).generation_config.eos_token_id == 2


def test_what_is_asked_of_a_backbone_or_is_its_own_way_becomes_the_models(tmp_path):
    backbone = nemotron_h()
    backbone.save_pretrained(tmp_path)
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path, **ways)
    for model in (
        TwoTowerForBlockDiffusion.from_backbone(tmp_path, **ways),
        TwoTowerForBlockDiffusion.from_backbone(loaded),
    ):
        for tower in (model, model.context_tower, model.denoiser_tower):
            assert (tower.config._attn_implementation, tower.config._experts_implementation) == ("eager", "eager")
    plain = TwoTowerForBlockDiffusion.from_backbone(tmp_path).config
    assert plain._attn_implementation == "sdpa"
    assert plain._experts_implementation == tiny_model().config._experts_implementation
    with pytest.raises(ValueError, match="output_loading_info=True: a backbone that is incomplete is refused"):
        TwoTowerForBlockDiffusion.from_backbone(tmp_path, output_loading_info=True)


def test_offloaded_weights_are_told_of_before_anything_is_saved(tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"embeddings.weight holds no data here: .*hooks.remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "given", True, before)
    assert (tmp_path / "given" / "model.safetensors").exists()
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "saved")
    after = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_one_weight_under_two_names_is_told_of_before_anything_is_saved(tmp_path):
    model = tiny_model()
    model.lm_head.weight = model.context_lm_head.weight
    for given in (None, model.state_dict()):
        with pytest.raises(ValueError, match=r"lm_head.weight and \w*lm_head.weight are one tensor.*give one of them"):
            model.save_pretrained(tmp_path / "saved", state_dict=given)
    assert not (tmp_path / "saved").exists()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        ("config", "block_size", 0, "block_size is 0; it must be positive"),
        ("generation_config", "unmasking_rule", print, "unmasking_rule=.* cannot be stored"),
        ("generation_config", "mode", "best", "mode is 'best'; use one of"),
    ],
)
def test_a_config_that_cannot_be_stored_leaves_the_folder_as_it_was(place, name, value, message, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    model.config.chunk_size = 16
    setattr(getattr(model, place), name, value)
    for folder in ("saved", "new"):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / folder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_published_generation_config_is_saved_back_as_by_transformers_unless_it_was_changed(tmp_path):
    """One that has temperature without do_sample, as many have."""
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6}))
    model = TwoTowerForBlockDiffusion.from_pretrained(tmp_path)
    model.generate(random_ids(1, 3), max_new_tokens=1)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["temperature"] == 0.6
    model.generation_config.top_p = 0.9
    with pytest.raises(ValueError, match="top_p"):
        model.save_pretrained(tmp_path / "changed")


def test_generate_on_the_meta_device_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, device_map="meta")
    with pytest.raises(ValueError, match=r'weights hold no data, as on the meta device; load it .* device_map="meta"'):
        model.generate(random_ids(1, 4))


def test_a_subfolder_that_is_not_there_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="inner holds no weights"):
        TwoTowerForBlockDiffusion.from_pretrained(tmp_path, subfolder="inner")
    with pytest.raises(OSError, match=r"config.json in .*, subfolder 'inner' is not there"):
        TwoTowerConfig.from_pretrained(tmp_path, subfolder="inner")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_backbone_that_is_spread_over_devices_is_refused(loaded, tmp_path):
    """Its tensors were taken, and the hooks that fill them were not: they held no data."""
    source, arguments = nemotron_h(), {}
    if loaded:
        cpu_offload(source, torch.device("cpu"))
    else:
        source.save_pretrained(tmp_path / "backbone")
        arguments = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offload"}
        source = tmp_path / "backbone"
    with pytest.raises(ValueError, match=r"the backbone is spread over .*meta.*; load it on one device"):
        TwoTowerForBlockDiffusion.from_backbone(source, **arguments)


def test_from_backbone_in_bfloat16(tmp_path):
    nemotron_h().save_pretrained(tmp_path)
    model = TwoTowerForBlockDiffusion.from_backbone(tmp_path, dtype=torch.bfloat16)
    float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert float32 == {name for name in model.state_dict() if name.endswith("e_score_correction_bias")}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_from_backbone_without_its_prediction_layers(tmp_path):
    backbone = nemotron_h()
    backbone.config.num_nextn_predict_layers = 1
    assert TwoTowerForBlockDiffusion.from_backbone(backbone).config.num_nextn_predict_layers == 0


def test_an_untrained_denoiser_computes_what_the_backbone_does():
    model = TwoTowerForBlockDiffusion.from_backbone(nemotron_h())
    ids, token = random_ids(2, 7), random_ids(2, 1, seed=1)
    with torch.no_grad():
        cache = model(ids).past_key_values
        logits = model.denoise(token, cache, timestep=0.7)
        assert_close(logits, model(token, past_key_values=cache).logits)


def test_a_model_from_a_backbone_trains_saves_and_loads(tmp_path):
    model = TwoTowerForBlockDiffusion.from_backbone(nemotron_h(), block_size=4)
    ids = random_ids(2, 12)
    model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss.backward()
    for name, parameter in model.named_parameters():
        learns = not name.startswith("context_") and "t_embedder" not in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name
    for index in (0, 2):
        assert model.t_embedder.mlp[index].weight.std() > 0.01
    model.save_pretrained(tmp_path)
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path), model)


def test_reset_denoiser_of_a_loaded_model(tmp_path):
    """transformers' initialisers leave alone what was loaded; a reset may not."""
    tiny_model().save_pretrained(tmp_path)
    model = TwoTowerForBlockDiffusion.from_pretrained(tmp_path)
    model.reset_denoiser()
    assert_same_weights(model.denoiser_tower, model.context_tower)
    assert not model.t_block[1].weight.any()
    assert not model.t_block[1].bias.any()
    for table in model.scale_shift_tables:
        assert torch.equal(table, torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 32))
        assert table.requires_grad


def test_backbones_that_are_refused(tmp_path):
    backbone = nemotron_h()
    with pytest.raises(ValueError, match="the backbone is a NemotronHModel; give a NemotronHForCausalLM"):
        TwoTowerForBlockDiffusion.from_backbone(backbone.model)
    with pytest.raises(ValueError, match="the backbone is a NoneType; give a NemotronHForCausalLM, or its path"):
        TwoTowerForBlockDiffusion.from_backbone(None)
    with pytest.raises(ValueError, match="dtype: meant for loading a backbone"):
        TwoTowerForBlockDiffusion.from_backbone(backbone, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="block_size is 0"):
        TwoTowerForBlockDiffusion.from_backbone(backbone, block_size=0)
    with pytest.raises(ValueError, match="mask_token_id is 2, which ends a text"):
        TwoTowerForBlockDiffusion.from_backbone(backbone, mask_token_id=2)
    backbone.generation_config.eos_token_id = [2, 5]
    backbone.save_pretrained(tmp_path / "chat")
    for given in (backbone, tmp_path / "chat"):
        with pytest.raises(ValueError, match="mask_token_id is 5, which ends a text"):
            TwoTowerForBlockDiffusion.from_backbone(given, mask_token_id=5)
    with pytest.raises(ValueError, match="mask_token_id is 5, which ends a text"):
        convert_backbone(tmp_path / "chat", tmp_path / "both", mask_token_id=5)
    assert not (tmp_path / "both").exists()
    NemotronHModel(backbone.config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless lacks lm_head\.weight"):
        TwoTowerForBlockDiffusion.from_backbone(tmp_path / "headless")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no weights"):
        TwoTowerForBlockDiffusion.from_backbone(tmp_path / "empty")


# What is refused


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test that builds a model."""

    def build(self, config):
        raise AssertionError("a model was built")

    monkeypatch.setattr(TwoTowerForBlockDiffusion, "__init__", build)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def broken(sharded, tmp_path) -> Path:
    """A copy of a sharded checkpoint to break, and its second shard."""
    shutil.copytree(sharded, tmp_path / "broken")
    return sorted((tmp_path / "broken").glob("*.safetensors"))[1]


def refused(folder: Path, message: str, **arguments) -> None:
    for auto_class in (TwoTowerForBlockDiffusion, AutoModel):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(folder, **arguments)


def test_a_folder_without_weights(no_work, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    refused(tmp_path, "holds no weights: neither model.safetensors nor model.safetensors.index.json")


def test_a_folder_without_weights_of_the_variant(no_work, sharded):
    refused(sharded, r"neither model\.other\.safetensors nor", variant="other")


def test_a_missing_shard_is_named(no_work, broken):
    broken.unlink()
    refused(broken.parent, f"{broken.name} is missing")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(kept, no_work, broken):
    broken.write_bytes(broken.read_bytes()[:kept])
    refused(broken.parent, f"{broken.name} is truncated")


def test_a_truncated_single_file_is_named(no_work, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(48, 32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    refused(tmp_path, "model.safetensors is truncated")


def test_a_shard_that_lacks_a_promised_tensor_is_named(no_work, broken):
    tensors = load_file(broken)
    name, _ = tensors.popitem()
    save_file(tensors, broken, metadata={"format": "pt"})
    refused(broken.parent, f"{broken.name} lacks the tensor {name}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_pickle_is_refused(name, no_work, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    torch.save(tiny_config().to_dict(), tmp_path / name)
    refused(tmp_path, f"holds pickled weights \\({name}\\)")


def test_a_pickle_is_refused_even_when_asked_for(no_work, sharded):
    refused(sharded, "use_safetensors is False", use_safetensors=False)


def test_a_backbone_is_no_twotower(no_work, tmp_path):
    nemotron_h().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no context_tower, context_lm_head, denoiser_tower.*from_backbone"):
        TwoTowerForBlockDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("absent", ["denoiser_tower.", "t_block.", "scale_shift_tables.", "lm_head."])
def test_a_checkpoint_without_one_of_the_parts(absent, no_work, tmp_path, sharded):
    tensors = {name: tensor for name, tensor in stored(sharded).items() if not name.startswith(absent)}
    shutil.copy(sharded / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, f"holds no {absent[:-1]}: it is no TwoTower checkpoint")


def test_a_missing_tensor_is_named(tmp_path, sharded):
    tensors = stored(sharded)
    del tensors["denoiser_tower.layers.0.mixer.A_log"]
    shutil.copy(sharded / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"lacks denoiser_tower\.layers\.0\.mixer\.A_log$")


def test_many_missing_tensors_are_counted(tmp_path, sharded):
    tensors = {name: tensor for name, tensor in stored(sharded).items() if ".norm.weight" not in name}
    shutil.copy(sharded / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"lacks context_tower\.layers\.0\.mixer\.norm\.weight, .* and 9 more$")


@pytest.mark.parametrize("expert", [0, 2, 3])
@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_a_missing_expert_is_named(projection, expert, no_work, tmp_path, sharded):
    tensors = stored(sharded)
    del tensors[f"denoiser_tower.layers.1.mixer.experts.{expert}.{projection}.weight"]
    shutil.copy(sharded / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, rf"lacks denoiser_tower\.layers\.1\.mixer\.experts\.{expert}\.{projection}\.weight$")


def test_safetensors_next_to_a_pickle_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path), model)


def test_a_variant_and_a_subfolder_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "inner", variant="other")
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, subfolder="inner", variant="other")
    assert_same_weights(loaded, model)


def test_key_mapping_renames_on_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = {name.replace("lm_head.", "head."): tensor for name, tensor in stored(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "head.weight" in tensors
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, key_mapping={r"head\.weight$": "lm_head.weight"})
    assert_same_weights(loaded, model)


# Folders that are malformed


def test_a_folder_without_config_is_refused_at_once(no_work, broken, monkeypatch):
    """Not after asking the Hub for what a folder lacks, and with no hint at a network."""
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    (broken.parent / "config.json").unlink()
    for load in (TwoTowerForBlockDiffusion.from_pretrained, TwoTowerForBlockDiffusion.from_backbone):
        with pytest.raises(ValueError, match=f"^{broken.parent} holds no config.json; give a checkpoint's folder.*$"):
            load(broken.parent)


def test_a_config_given_beside_the_folder_needs_no_file(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").rename(tmp_path / "config.json")
    config = TwoTowerConfig.from_pretrained(tmp_path)
    expected = TwoTowerForBlockDiffusion.from_pretrained(sharded)
    assert_same_weights(TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "bare", config=config), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON"),
        ("{'single': 'quotes'}", "is no JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": 5}}', "has 5 for lm_head.weight; it needs a file's name"),
        ('{"weight_map": {"lm_head.weight": null}}', "has None for lm_head.weight"),
        ('{"weight_map": {"lm_head.weight": ["a"]}}', r"has \['a'\] for lm_head.weight"),
        ('{"weight_map": {"lm_head.weight": ""}}', "has '' for lm_head.weight"),
        ('{"weight_map": {"lm_head.weight": "."}}', "broken is missing"),
    ],
)
def test_a_malformed_index_is_named(no_work, broken, content, message):
    index = broken.parent / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        TwoTowerForBlockDiffusion.from_pretrained(broken.parent)
    assert str(broken.parent) in str(error.value)


@pytest.mark.parametrize("content", ["", "no json", "[1]"])
def test_a_malformed_config_is_named(no_work, broken, content):
    (broken.parent / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{broken.parent / 'config.json'} (is no JSON|holds a list)"):
        TwoTowerForBlockDiffusion.from_pretrained(broken.parent)


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        (["AutoModel"], r"is \['AutoModel'\]; it must map auto classes to code"),
        ("modeling_twotower.Model", "is 'modeling_twotower.Model'; it must map"),
        ({"AutoModel": None}, "has None for AutoModel; it must be 'module.Class'"),
        ({"AutoModel": ["a.B"]}, r"has \['a.B'\] for AutoModel"),
        ({"AutoTokenizer": ["a.B", 5]}, r"has \['a.B', 5\] for AutoTokenizer"),
    ],
)
def test_a_malformed_auto_map_is_named(no_work, broken, auto_map, message):
    file = broken.parent / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    with pytest.raises(ValueError, match=f"auto_map of {file} {message}"):
        TwoTowerForBlockDiffusion.from_pretrained(broken.parent)
    with pytest.raises(ValueError, match=f"auto_map of config.json in {broken.parent} {message}"):
        TwoTowerConfig.from_pretrained(broken.parent)
    with pytest.raises(ValueError, match=f"auto_map of the config {message}"):
        tiny_config(auto_map=auto_map)


@pytest.mark.parametrize("model_type", ["llama", None, 5])
def test_a_config_of_another_model_is_refused(no_work, broken, model_type):
    file = broken.parent / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))
    for load in (TwoTowerForBlockDiffusion.from_pretrained, TwoTowerForBlockDiffusion.from_backbone):
        with pytest.raises(ValueError, match=f"{file} has model_type {model_type!r}, expected twotower or nemotron_h"):
            load(broken.parent)


def test_an_index_without_metadata_is_named(no_work, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "sharded")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": json.loads(file.read_text())["weight_map"]}))
    refused(folder, f"{file} has no metadata")


def test_broken_generation_flags_are_not_ignored(no_work, broken):
    (broken.parent / "generation_config.json").write_text('{"eos_token_id": ')
    refused(broken.parent, f"{broken.parent / 'generation_config.json'} is no JSON")


def test_an_adapters_folder_is_left_to_transformers(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert check_safetensors(tmp_path, {}) is None


def test_an_auto_map_with_a_tokenizers_pair_loads(sharded, tmp_path):
    config = json.loads((sharded / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other.Config", "AutoTokenizer": [None, "other.Fast"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not hasattr(TwoTowerConfig.from_pretrained(tmp_path), "auto_map")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64, torch.int8, torch.uint8])
def test_weights_that_are_no_floats_are_refused(no_work, broken, dtype):
    tensors = load_file(broken)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(dtype)}, broken, metadata={"format": "pt"})
    refused(broken.parent, f"{broken.name} holds {name} as [A-Z0-9]+, which would be cast to a weight")


def test_a_quantised_checkpoint_may_hold_integers(broken):
    file = broken.parent / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "other"}}))
    tensors = load_file(broken)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, broken, metadata={"format": "pt"})
    assert check_safetensors(broken.parent, {}) == set(stored(broken.parent))


def _pruned(head):
    prune.l1_unstructured(head, "weight", amount=0.5)


@pytest.mark.parametrize("change", [_pruned, weight_norm, parametrizations.weight_norm])
def test_weights_under_other_names_are_told_of_and_not_exported(change, tmp_path, warned):
    model = tiny_model()
    change(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head.weight is computed from other tensors; make it a weight again"):
        export(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    model.save_pretrained(tmp_path / "saved")
    assert "what is saved lacks lm_head.weight" in warned.text
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "saved")
