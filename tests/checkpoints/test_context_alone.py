"""towers="context": one tower is loaded, from its files alone, reads and writes, and says what it cannot do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_block, random_ids, tiny_config, tiny_model, without_special_tokens
from transformers import AutoModelForCausalLM

from twotower import TwoTowerEngine
from twotower.configuration_twotower import TwoTowerConfig
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

IDS = random_ids(2, 7)
AR = {"mode": "ar", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def whole():
    return without_special_tokens(tiny_model("all kinds"))


@pytest.fixture(scope="module", params=["NVIDIA's layout, shards", "ours, shards", "one file"])
def folder(request, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    size = "50GB" if request.param == "one file" else "40KB"
    whole.save_pretrained(path, save_original_format=request.param != "ours, shards", max_shard_size=size)
    return path


@pytest.fixture
def alone(folder):
    return TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context")


def test_half_of_the_released_geometry(goldens):
    config = TwoTowerConfig.from_pretrained(goldens.parent / "nvidia_30b")
    with torch.device("meta"):
        sizes = [
            sum(tensor.numel() for tensor in TwoTowerForBlockDiffusion(config, towers).state_dict().values())
            for towers in ("both", "context")
        ]
    assert 0.49 < sizes[1] / sizes[0] < 0.5


def test_what_there_is_is_the_context_tower(alone, whole, folder):
    names = set(alone.state_dict())
    assert names == {name for name in whole.state_dict() if name.startswith("context_")}
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in alone.state_dict().items())
    assert alone.name_or_path == alone.config.name_or_path == str(folder)


def test_it_reads_and_writes(alone, whole):
    assert torch.equal(alone(IDS).logits, whole(IDS).logits)
    assert torch.equal(alone.generate(IDS, **AR), whole.generate(IDS, **AR))
    engine = TwoTowerEngine(alone, slots=2)
    handle = engine.add_request(IDS[:1], **AR)
    while engine.step():
        pass
    assert torch.equal(handle.result(0), whole.generate(IDS[:1], **AR))
    first = alone.generate(IDS, **AR, return_dict_in_generate=True)
    assert torch.equal(whole.generate(first.sequences, **AR), alone.generate(first.sequences, **AR, cache=first.cache))


REFUSED = {
    "denoise": lambda model: model.denoise(random_block(2, 4), model(IDS).cache),
    "predict_next": lambda model: model.predict_next(IDS[:, :1], model(IDS).cache),
    "labels": lambda model: model(IDS, labels=IDS),
    "save_pretrained": lambda model: model.save_pretrained("nowhere"),
    "reset_denoiser": lambda model: model.reset_denoiser(),
    "reset_time_conditioning": lambda model: model.reset_time_conditioning(),
    "place_towers_on_devices": lambda model: model.place_towers_on_devices("cpu", "cpu"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_the_denoiser_is_refused(alone, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf'{what}.*missing; load it with towers="both"'):
        REFUSED[what](alone)
    assert not list(tmp_path.iterdir()), "nothing is half written"


@pytest.mark.parametrize("mode", [None, "mask_diffusion", "self_speculative", "mock_ar"])
def test_other_modes_are_refused(alone, mode):
    """The default among them, mask_diffusion."""
    arguments = {} if mode is None else {"mode": mode}
    with pytest.raises(ValueError, match=rf"mode is '{mode or 'mask_diffusion'}'.*mode=\"ar\".*towers=\"both\""):
        alone.generate(IDS, **arguments)
    with pytest.raises(ValueError, match='use mode="ar"'):
        TwoTowerEngine(alone, slots=2).add_request(IDS[:1], **arguments)


def test_unknown_towers_are_refused(folder):
    with pytest.raises(ValueError, match="towers is 'denoiser'; use one of both, context"):
        TwoTowerForBlockDiffusion.from_pretrained(folder, towers="denoiser")


def test_what_a_model_is_otherwise(alone, whole):
    """Embeddings of another size, training of the context tower, its parameters frozen by default."""
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    alone.set_trained_towers("context")
    alone.enable_input_require_grads()
    alone(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in alone.context_lm_head.parameters())
    alone.resize_token_embeddings(60)
    assert alone(IDS).logits.shape[-1] == 60


def test_arguments_of_from_pretrained(folder, whole):
    for arguments in ({"device_map": "auto"}, {"device_map": "towers"}, {"config": tiny_config("all kinds")}):
        model = TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context", **arguments)
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
    model, info = TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not model.training
    model = AutoModelForCausalLM.from_pretrained(folder, towers="context", dtype="bfloat16")
    assert not model.has_denoiser and model.dtype == torch.bfloat16


# The files.


@pytest.fixture
def shards(whole, tmp_path):
    """A sharded checkpoint, and the names of its files that hold something of the context tower, and the others."""
    folder = tmp_path / "sharded"
    whole.save_pretrained(folder, max_shard_size="40KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in weight_map.items() if name.startswith("context_")}
    others = set(weight_map.values()) - needed
    assert needed and others
    return folder, needed, others


def test_files_of_the_denoiser_need_not_be_there(shards, whole, tmp_path):
    folder, _, others = shards
    for name in others:
        (folder / name).unlink()
    (tmp_path / "outer").mkdir()
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    for place, arguments in ((folder, {}), (tmp_path / "outer", {"subfolder": "inner"})):
        model = TwoTowerForBlockDiffusion.from_pretrained(place, towers="context", **arguments)
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
        assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id
    with pytest.raises(ValueError, match="is missing; download it again"):
        TwoTowerForBlockDiffusion.from_pretrained(folder)


def test_an_index_beside_a_single_file_is_passed_over(shards, whole):
    """As by transformers, which leaves the index there where it saves anew in one file."""
    folder, *_ = shards
    whole.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_missing_file_of_the_context_tower_is_named(shards):
    folder, needed, _ = shards
    (folder / min(needed)).unlink()
    with pytest.raises(ValueError, match=f"{min(needed)} is missing"):
        TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context")


def test_what_is_offloaded_is_found_later(shards, whole, tmp_path):
    """In the files themselves, where transformers leaves it."""
    places = {"context_tower": "disk", "context_lm_head": "cpu"}
    for original in (True, False):
        folder = tmp_path / str(original)
        whole.save_pretrained(folder, max_shard_size="40KB", save_original_format=original)
        model = TwoTowerForBlockDiffusion.from_pretrained(
            folder, towers="context", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


ROOT = Path(__file__).resolve().parents[2]
DOWNLOAD = """
import sys, torch
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
model = TwoTowerForBlockDiffusion.from_pretrained("someone/model", towers="context", cache_dir=sys.argv[1])
print(model.name_or_path, model.has_denoiser, model(torch.tensor([[5, 6, 7]])).logits.sum().item())
"""


def test_files_of_the_denoiser_are_not_downloaded(shards, whole, fresh_python, tmp_path, monkeypatch):
    folder, needed, others = shards
    root = tmp_path / "hub"
    commit = root / "someone" / "model" / ("a" * 40)
    shutil.copytree(folder, commit)
    (commit.parent / "repo.json").write_text(json.dumps({"newest": commit.name, "private": False}))
    hub = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_hub.py"), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        environment = {"HF_ENDPOINT": hub.stdout.readline().strip(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        run = fresh_python("-c", DOWNLOAD, tmp_path / "cache", timeout=120)
    finally:
        hub.stdin.close()
        hub.wait(10)
    assert run.returncode == 0, run.stderr
    name, has_denoiser, total = run.stdout.split()
    assert (name, has_denoiser) == ("someone/model", "False")
    assert float(total) == pytest.approx(whole(torch.tensor([[5, 6, 7]])).logits.sum().item(), rel=1e-4)
    downloaded = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert downloaded == needed and not downloaded & others
