"""A TwoTower from a backbone: on disk by copying bytes, in memory without a third copy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize, tiny_config
from transformers import NemotronHForCausalLM

from twotower.checkpoints.conversion import convert_backbone
from twotower.checkpoints.loading import BACKBONE_ONLY_FIELDS
from twotower.compat_twotower import NemotronHConfig
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from twotower.checkpoints.conversion import convert_backbone
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
how, source, target = sys.argv[1:]
torch.empty(8).sum()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if how == "disk":
    convert_backbone(source, target)
else:
    model = TwoTowerForBlockDiffusion.from_backbone(source)
print(peak() - before)
"""


def backbone(**fields) -> NemotronHForCausalLM:
    config = tiny_config("all kinds", **fields).to_dict()
    added = ("block_size", "mask_token_id", "timestep_features", "timestep_max_period", "timestep_scale")
    for name in (*BACKBONE_ONLY_FIELDS.split(), *added):
        config.pop(name, None)
    model = NemotronHForCausalLM(NemotronHConfig(**config))
    randomize(model)
    return model


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_disk_it_is_what_from_backbone_makes(original, dtype, tmp_path):
    backbone().to(dtype).save_pretrained(tmp_path / "backbone", save_original_format=original, max_shard_size="40KB")
    assert len(list((tmp_path / "backbone").glob("*.safetensors"))) > 1
    folder = convert_backbone(tmp_path / "backbone", tmp_path / "both", block_size=8, mask_token_id=5)
    model, info = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert (model.config.block_size, model.config.mask_token_id) == (8, 5)
    expected = TwoTowerForBlockDiffusion.from_backbone(
        tmp_path / "backbone", dtype=dtype, block_size=8, mask_token_id=5
    )
    for name, tensor in expected.state_dict().items():
        if "t_embedder" not in name:  # drawn anew
            assert torch.equal(model.state_dict()[name], tensor), name
    assert all(tensor.std() > 0.01 for name, tensor in model.t_embedder.named_parameters() if "weight" in name)


def test_prediction_layers_are_left_out(tmp_path):
    backbone().save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="dtype is no field that a TwoTower adds; leave it out, or use block_size"):
        convert_backbone(tmp_path / "backbone", tmp_path / "both", dtype="bfloat16")
    (file,) = (tmp_path / "backbone").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "mtp.layers.0.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    folder = convert_backbone(tmp_path / "backbone", tmp_path / "both")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("mtp" in name for name in names)
    TwoTowerForBlockDiffusion.from_pretrained(folder)


@pytest.mark.parametrize("size", ["40KB", "50GB"])
def test_files_that_transformers_would_not_load_are_left_out(size, tmp_path):
    backbone().save_pretrained(tmp_path / "backbone", max_shard_size=size)
    file = min((tmp_path / "backbone").glob("*.safetensors"))
    others = {name: tensor + 1 for name, tensor in load_file(file).items()}
    for name in ("model-00001-of-99999.safetensors", "zz.safetensors"):
        save_file(others, tmp_path / "backbone" / name, metadata={"format": "pt"})
    folder = convert_backbone(tmp_path / "backbone", tmp_path / "both")
    model = TwoTowerForBlockDiffusion.from_pretrained(folder)
    expected = TwoTowerForBlockDiffusion.from_backbone(tmp_path / "backbone")
    for name, tensor in expected.context_tower.state_dict().items():
        assert torch.equal(model.context_tower.state_dict()[name], tensor), name


def test_what_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="full is not empty; give another folder"):
        convert_backbone(tmp_path, tmp_path / "full")
    backbone().save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="dtype is no field that a TwoTower adds; leave it out, or use block_size"):
        convert_backbone(tmp_path / "backbone", tmp_path / "both", dtype="bfloat16")
    (file,) = (tmp_path / "backbone").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "encoder.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds encoder.weight, which is no NemotronH's"):
        convert_backbone(tmp_path / "backbone", tmp_path / "both")
    headless = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    save_file(headless, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        convert_backbone(tmp_path / "backbone", tmp_path / "both")


@pytest.mark.parametrize(("how", "most"), [("disk", 0.5), ("memory", 2.6)])
def test_peak_memory(how, most, fresh_python, tmp_path):
    """In backbones: on disk next to nothing (what the model's code takes included), in memory the two towers."""
    model = backbone(vocab_size=200_000, hidden_size=128)
    model.save_pretrained(tmp_path / "backbone", max_shard_size="60MB")
    size = sum(file.stat().st_size for file in (tmp_path / "backbone").glob("*.safetensors"))
    assert size > 1.5e8 and len(list((tmp_path / "backbone").glob("*.safetensors"))) > 1
    script = Path(tmp_path / "measure.py")
    script.write_text(MEASURE)
    done = fresh_python(script, how, tmp_path / "backbone", tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < most * size, int(done.stdout.split()[-1]) / size
