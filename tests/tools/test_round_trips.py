"""A model taken through every door that is not `save_pretrained`: copies, state dicts, configs, the Hub."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from fake_hub import hub_environment
from safetensors.torch import load_model, save_model
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from twotower.generation_twotower import TwoTowerGenerationConfig
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

IDS = random_ids(2, 7)
KNOBS = {"mode": "ar", "draft_steps": 3, "unmasking_rule": "entropy", "entropy_bound": 0.4, "seed": [1, 2]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("all kinds")


def through_a_safetensors_file(model, folder):
    save_model(model, folder / "weights.safetensors")
    other = TwoTowerForBlockDiffusion(model.config)
    assert load_model(other, folder / "weights.safetensors") == (set(), [])
    return other


def through_a_pickled_state_dict(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")
    other = TwoTowerForBlockDiffusion(model.config)
    other.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return other


def pickled_whole(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


WAYS = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "safetensors": through_a_safetensors_file,
    "torch.save of the state dict": through_a_pickled_state_dict,
    "torch.save of the model": pickled_whole,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_back_is_the_same_model(model, tmp_path, way):
    other = WAYS[way](model, tmp_path).eval()
    assert other is not model
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    options = {"max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(other.generate(IDS, **options), model.generate(IDS, **options))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_from_config(auto):
    model = auto.from_config(tiny_config("all kinds"), dtype=torch.bfloat16).eval()
    assert type(model) is TwoTowerForBlockDiffusion and model.dtype == torch.bfloat16
    assert isinstance(model.generation_config, TwoTowerGenerationConfig)
    assert model.generate(IDS, max_new_tokens=4, eos_token_id=None).shape == (2, 11)


@pytest.mark.parametrize("reader", [TwoTowerGenerationConfig, GenerationConfig])
def test_a_generation_config_keeps_its_knobs(tmp_path, reader):
    """Also read as transformers' own class, as tools do that know no other."""
    TwoTowerGenerationConfig(**KNOBS, max_new_tokens=9).save_pretrained(tmp_path)
    read = reader.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in KNOBS} == KNOBS and read.max_new_tokens == 9
    read.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == json.loads(
        (tmp_path / "generation_config.json").read_text()
    )


def test_a_generation_config_saved_beside_a_model_is_taken_from_there(model, tmp_path):
    model.save_pretrained(tmp_path)
    changed = copy.deepcopy(model.generation_config)
    changed.update(mode="ar", max_new_tokens=5)
    changed.save_pretrained(tmp_path)
    other = TwoTowerForBlockDiffusion.from_pretrained(tmp_path)
    assert (other.generation_config.mode, other.generation_config.max_new_tokens) == ("ar", 5)
    assert other.generate(IDS, eos_token_id=None).shape == (2, 12)


PUSH = """
import sys
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
model = TwoTowerForBlockDiffusion.from_pretrained(sys.argv[1])
model.push_to_hub("lab/pushed", private=True)
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="lab/saved")
model.generation_config.push_to_hub("lab/saved")
for repo in ("lab/pushed", "lab/saved"):
    other = TwoTowerForBlockDiffusion.from_pretrained(repo)
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.generation_config.to_dict() == model.generation_config.to_dict()
"""


def test_a_plain_model_pushed_to_the_hub_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    with hub_environment(tmp_path) as environment:
        command = [sys.executable, "-c", PUSH, tmp_path / "source", tmp_path / "saved"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_continuous_batching_gives_what_generate_gives(model):
    prompts, config = [[4, 5, 6], [7, 8]], GenerationConfig(max_new_tokens=4, eos_token_id=None)
    expected = [model.generate(torch.tensor([prompt]), config)[0, len(prompt) :].tolist() for prompt in prompts]
    outputs = model.generate_batch(prompts, config)
    assert [output.generated_tokens for output in outputs.values()] == expected
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        handles = manager.add_requests(prompts)
        assert [list(handle) for handle in handles] == expected
    assert model.init_continuous_batching().add_request(prompts[0]).cancel()
