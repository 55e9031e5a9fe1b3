"""What `info` computes, against a real model, its real cache, and NVIDIA's published tensors."""

import gzip
import json
import math

import pytest
import torch
from tiny import tiny_config

from twotower import TwoTowerConfig, TwoTowerForBlockDiffusion
from twotower.checkpoints.inspection import (
    cache_size,
    dtype_named,
    geometry,
    human,
    memory_table,
    model_size,
    parameter_table,
)

# The fields of NVIDIA's config that decide sizes.
NVIDIA_30B = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1856,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def nvidia_config(tmp_path) -> TwoTowerConfig:
    (tmp_path / "config.json").write_text(json.dumps(NVIDIA_30B))
    return TwoTowerConfig.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def config() -> TwoTowerConfig:
    return tiny_config("odd")


def test_nvidia_checkpoint(nvidia_config):
    size, cache = model_size(nvidia_config), cache_size(nvidia_config, torch.bfloat16)
    assert size.total == 63_185_902_848
    assert human(size.total) == "63.19 B"
    assert cache.key_value_per_token == 6144
    assert cache.ssm_per_sequence == 23 * 64 * 64 * 128 * 4
    assert cache.per_sequence == 49_082_368


def test_nvidia_tensors(goldens):
    folder = goldens.parent / "nvidia_30b"
    shapes = json.loads(gzip.decompress((folder / "state_dict_shapes.json.gz").read_bytes()))
    size = model_size(TwoTowerConfig.from_pretrained(folder))

    def numel(*prefixes):
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    assert size.total == numel("")
    assert size.context.total() == numel("context_")
    assert size.denoiser["time"] == numel("t_embedder", "t_block", "scale_shift_tables")
    experts = [idx for idx, letter in enumerate(NVIDIA_30B["hybrid_override_pattern"]) if letter == "E"]
    assert size.denoiser["moe"] == sum(numel(f"denoiser_tower.layers.{idx}.") for idx in experts)


def test_parts_add_up_to_the_model(config):
    size, model = model_size(config), TwoTowerForBlockDiffusion(config)
    assert size.total == sum(tensor.numel() for tensor in model.state_dict().values())
    layers = model.denoiser_tower.layers
    assert size.denoiser["linear_attention"] == sum(p.numel() for idx in (0, 4) for p in layers[idx].parameters())
    assert size.denoiser["mlp"] == sum(p.numel() for p in layers[3].parameters())
    assert size.context["embeddings"] == size.context["head"] == 53 * 30


def test_active_parameters(config):
    size = model_size(config)
    # In two layers two of five experts are idle, each with a matrix up and one down; one row of embeddings is read.
    idle = 2 * 2 * 2 * 30 * 9 + 52 * 30
    assert size.context.total() - size.active_context.total() == idle
    assert size.denoiser.total() - size.active_denoiser.total() == idle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_size_is_what_a_cache_holds(config, dtype):
    model, tokens = TwoTowerForBlockDiffusion(config).to(dtype), 11
    cache = model(torch.arange(4, 4 + tokens)[None]).past_key_values
    views = [cache.view(idx) for idx in range(len(cache.layers)) if cache.view(idx) is not None]
    held = sum(tensor.numel() * tensor.itemsize for view in views for tensor in view)
    assert cache_size(config, dtype).total(tokens) == held


def test_tables(config):
    header, rows = parameter_table(model_size(config))
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == [
        *("Mamba", "attention", "MoE", "MLP", "embeddings", "final norm", "head", "time conditioning", "total")
    ]
    _, rows = memory_table(config, model_size(config), torch.bfloat16)
    counts = {name: count for name, _, count in rows}
    assert counts["cache per token: keys and values"] == str(2 * 2 * 3 * 7 * 2)
    assert counts["weights in total"] == str(2 * model_size(config).total)
    assert dict(geometry(config))["attention"] == "6 query and 3 key/value heads of 7"
    assert dict(geometry(config))["layers per tower"] == "7: 2 Mamba, 2 attention, 2 MoE, 1 MLP"


def test_layer_kinds_a_model_lacks_are_left_out():
    config = tiny_config(hybrid_override_pattern="M*")
    assert "MoE" not in dict(geometry(config))
    assert "MoE" not in [row[0] for row in parameter_table(model_size(config))[1]]


@pytest.mark.parametrize("count, text", [(999, "999"), (6144, "6.14 K"), (48_234_496, "48.23 M"), (10**9, "1.00 B")])
def test_human(count, text):
    assert human(count) == text


@pytest.mark.parametrize("name", ["float33", "int8", "nn", ""])
def test_unknown_dtype(name):
    with pytest.raises(ValueError, match="floating-point dtype"):
        dtype_named(name)
