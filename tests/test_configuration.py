"""TwoTowerConfig: NVIDIA's config as it is, what is saved, and every value that is refused."""

import json
import math
from pathlib import Path

import pytest
from tiny import GEOMETRIES, tiny_config
from transformers import AutoConfig, NemotronHConfig

from twotower.configuration_twotower import TwoTowerConfig

OWN_AUTO_MAP = {
    "AutoConfig": "configuration_twotower.TwoTowerConfig",
    "AutoModel": "modeling_twotower.TwoTowerForBlockDiffusion",
}
FOREIGN_AUTO_MAPS = {
    "NVIDIA's": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_twotower.NemotronHTwoTowerForCausalLM",
    },
    "from another repository": {
        "AutoConfig": "someone/repo--configuration_x.TwoTowerConfig",
        "AutoModel": "someone/repo--modeling_x.TwoTowerForBlockDiffusion",
    },
    "ours in part": {**OWN_AUTO_MAP, "AutoModel": "modeling_other.TwoTowerForBlockDiffusion"},
}


def saved_json(config: TwoTowerConfig, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def without_versions(config: TwoTowerConfig) -> dict:
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")}


def test_reads_nvidias_config_as_it_is(goldens):
    folder = goldens.parent / "nvidia_30b"
    config = TwoTowerConfig.from_pretrained(folder)
    published = json.loads((folder / "config.json").read_text())
    assert published["model_type"] == "nemotron_h"
    assert config.model_type == "twotower"
    assert config.architectures == ["TwoTowerForBlockDiffusion"]
    assert config.time_step_limit == (0.0, math.inf)
    assert not hasattr(config, "auto_map")
    kinds = config.layers_block_type
    assert [kinds.count(kind) for kind in ("linear_attention", "moe", "full_attention", "mlp")] == [23, 23, 6, 0]
    assert config.hybrid_override_pattern == published["hybrid_override_pattern"]
    assert (config.block_size, config.mask_token_id) == (16, 3)
    assert (config.timestep_features, config.timestep_max_period, config.timestep_scale) == (256, 10000.0, 1000.0)
    renamed = {"model_type", "architectures", "auto_map", "time_step_limit", "torch_dtype", "transformers_version"}
    for name, value in published.items():
        if name not in renamed:
            assert getattr(config, name) == value, name


def test_reads_nvidias_config_as_a_dictionary(goldens, tmp_path):
    published = json.loads((goldens.parent / "nvidia_30b" / "config.json").read_text())
    for config in (TwoTowerConfig(**published), TwoTowerConfig.from_dict(published)):
        assert config.model_type == "twotower"
        saved = saved_json(config, tmp_path)
        assert saved["model_type"] == "twotower"
        assert "auto_map" not in saved


def test_reads_the_goldens_config(goldens):
    config = TwoTowerConfig.from_pretrained(goldens / "checkpoint")
    assert config.hybrid_override_pattern == "MEM*EM*E"
    assert config.model_type == "twotower"
    assert not hasattr(config, "auto_map")


def test_the_released_config_survives_a_round_trip(goldens, tmp_path):
    config = TwoTowerConfig.from_pretrained(goldens.parent / "nvidia_30b")
    saved = saved_json(config, tmp_path)
    assert saved["model_type"] == "twotower"
    assert "auto_map" not in saved
    assert without_versions(TwoTowerConfig.from_pretrained(tmp_path)) == without_versions(config)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_round_trip(geometry, tmp_path):
    config = tiny_config(geometry, mask_token_id=7, timestep_max_period=500.0, timestep_scale=10.0)
    config.save_pretrained(tmp_path)
    assert without_versions(TwoTowerConfig.from_pretrained(tmp_path)) == without_versions(config)


def test_a_round_trip_keeps_finite_step_limits(tmp_path):
    tiny_config(time_step_limit=[0.25, 0.5]).save_pretrained(tmp_path)
    assert TwoTowerConfig.from_pretrained(tmp_path).time_step_limit == (0.25, 0.5)


@pytest.mark.parametrize("name", FOREIGN_AUTO_MAPS)
def test_a_foreign_auto_map_is_dropped_and_never_saved_again(name, tmp_path):
    config = tiny_config(auto_map=FOREIGN_AUTO_MAPS[name])
    assert not hasattr(config, "auto_map")
    assert "auto_map" not in saved_json(config, tmp_path)


@pytest.mark.parametrize("prefix", ["", "someone/repo--"])
def test_our_own_auto_map_is_kept(prefix, tmp_path):
    auto_map = {auto_class: prefix + reference for auto_class, reference in OWN_AUTO_MAP.items()}
    saved = saved_json(tiny_config(auto_map=auto_map), tmp_path)
    assert saved["auto_map"] == auto_map
    assert TwoTowerConfig.from_pretrained(tmp_path).auto_map == auto_map


def test_auto_config(tmp_path):
    tiny_config(block_size=8).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TwoTowerConfig
    assert config.block_size == 8
    assert type(AutoConfig.for_model("twotower", hybrid_override_pattern="M*")) is TwoTowerConfig


def test_nemotron_h_stays_transformers_own():
    assert type(AutoConfig.for_model("nemotron_h")) is NemotronHConfig


def test_fields_can_be_overridden_on_loading(goldens):
    config = TwoTowerConfig.from_pretrained(goldens / "checkpoint", block_size=8, mask_token_id=5)
    assert (config.block_size, config.mask_token_id) == (8, 5)


def test_a_pattern_of_every_letter():
    config = tiny_config(hybrid_override_pattern="M*E-")
    assert config.layers_block_type == ["linear_attention", "full_attention", "moe", "mlp"]
    assert config.num_hidden_layers == 4


POSITIVE = [
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "ssm_state_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "conv_kernel",
    "chunk_size",
    "n_routed_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "block_size",
    "timestep_features",
    "timestep_max_period",
    "timestep_scale",
    "layer_norm_epsilon",
]


@pytest.mark.parametrize("value", [0, -2])
@pytest.mark.parametrize("name", POSITIVE)
def test_sizes_must_be_positive(name, value):
    value = float(value) if name in ("timestep_max_period", "timestep_scale", "layer_norm_epsilon") else value
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be positive"):
        tiny_config(**{name: value})


def test_a_pattern_and_layers_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"hybrid_override_pattern is 'M\*', but layers_block_type \['moe'\]"):
        tiny_config(hybrid_override_pattern="M*", layers_block_type=["moe"])
    agreeing = tiny_config(hybrid_override_pattern="M*", layers_block_type=["linear_attention", "full_attention"])
    assert agreeing.num_hidden_layers == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["timestep_max_period", "timestep_scale", "layer_norm_epsilon"])
def test_sizes_must_be_finite(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be positive and finite"):
        tiny_config(**{name: value})


REFUSED = {
    "unknown letters": ({"hybrid_override_pattern": "MXE?"}, r"'MXE\?' holds unknown letters \['\?', 'X'\]"),
    "lower case": ({"hybrid_override_pattern": "m*"}, r"'m\*' holds unknown letters \['m'\]"),
    "no layers": ({"hybrid_override_pattern": ""}, "`layers_block_type` is empty"),
    "unknown kinds": ({"layers_block_type": ["moe", "rnn"]}, r"unknown layer kinds \['rnn'\]"),
    "a pattern of another length": ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but the layer pattern has 5"),
    "prediction layers": ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1;"),
    "tied heads": ({"tie_word_embeddings": True}, "tie_word_embeddings is True;"),
    "float32 residual": ({"residual_in_fp32": True}, "residual_in_fp32 is True;"),
    "sliding window": ({"sliding_window": 64}, "sliding_window is 64;"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1;"),
    "hidden dropout": ({"hidden_dropout": 0.2}, "hidden_dropout is 0.2;"),
    "narrow states": ({"mamba_ssm_cache_dtype": "bfloat16"}, "mamba_ssm_cache_dtype is 'bfloat16';"),
    "attention heads": (
        {"num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "Mamba groups": ({"n_groups": 3}, "mamba_num_heads 4 is not a multiple of n_groups 3"),
    "expert groups": ({"n_group": 3}, "n_routed_experts 4 is not a multiple of n_group 3"),
    "groups per token": ({"topk_group": 2}, "topk_group is 2, more than n_group 1"),
    "experts per token": ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than the 4 experts"),
    "experts per token's groups": (
        {"n_group": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok is 3, more than the 2 experts",
    ),
    "groups of one expert": ({"n_group": 4, "num_experts_per_tok": 1}, "n_group is 4, of one expert each"),
    "odd features": ({"timestep_features": 15}, "timestep_features is 15; it must be even"),
    "the mask id beyond the vocabulary": ({"mask_token_id": 48}, "mask_token_id is 48, outside the vocabulary of 48"),
    "a negative mask id": ({"mask_token_id": -1}, "mask_token_id is -1, outside the vocabulary"),
    "an empty step interval": ({"time_step_limit": (0.5, 0.5)}, r"time_step_limit is \(0.5, 0.5\)"),
    "a negative step": ({"time_step_limit": (-0.1, 1.0)}, r"time_step_limit is \(-0.1, 1.0\)"),
    "a step limit of three": ({"time_step_limit": (0.0, 0.5, 1.0)}, r"time_step_limit is \(0.0, 0.5, 1.0\)"),
    "no step limit": ({"time_step_limit": ()}, r"time_step_limit is \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_geometries_are_refused_by_name(case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"dtype": "float33"}, "dtype is 'float33'"),
        ({"torch_dtype": "float33", "dtype": None}, "dtype is 'float33'"),
        ({"model_type": "llama"}, "model_type 'llama', expected twotower or nemotron_h"),
        ({"model_type": None}, "model_type None, expected twotower"),
    ],
)
def test_a_refused_value_is_refused_on_loading_too(tmp_path, fields, message):
    path = tmp_path / "config.json"
    tiny_config().save_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        TwoTowerConfig.from_pretrained(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        TwoTowerConfig.from_pretrained(tmp_path)
