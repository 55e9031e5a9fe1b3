"""Tiny TwoTower models of many geometries, with random weights that leave no part without an effect; a tokenizer."""

from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from twotower.configuration_twotower import TwoTowerConfig
from twotower.demo.tasks import training_tasks
from twotower.demo.tokenizer import train_tokenizer
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

BASE = {
    "hybrid_override_pattern": "ME*ME",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
    "block_size": 4,
    "timestep_features": 16,
}

# What differs from BASE. Of UNLIKE_TRANSFORMERS, transformers ignores the first and cannot run the second.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "base": {},
    "all kinds": {"hybrid_override_pattern": "M-*E*-M"},
    "each kind once": {"hybrid_override_pattern": "M*-E"},  # for loops, to which layers are all the same
    "only M": {"hybrid_override_pattern": "M"},
    "only *": {"hybrid_override_pattern": "*"},
    "only E": {"hybrid_override_pattern": "E"},
    "only -": {"hybrid_override_pattern": "-"},
    "pure Mamba": {"hybrid_override_pattern": "MM"},
    "pure attention": {"hybrid_override_pattern": "**"},
    "attention first": {"hybrid_override_pattern": "*-E"},
    "latent experts": {"moe_latent_size": 24},
    "expert groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 4, "norm_topk_prob": False},
    "biases": {"hybrid_override_pattern": "M-*E", "use_bias": True, "mlp_bias": True},
    "latent biases": {"hybrid_override_pattern": "ME", "mlp_bias": True, "moe_latent_size": 8},
    "attention biases": {"attention_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "convolution of 1": {"conv_kernel": 1},
    "convolution of 2": {"conv_kernel": 2},
    "convolution longer than a block": {"conv_kernel": 7},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 4},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "mamba_num_heads": 1, "n_groups": 1},
    "chunk of 1": {"chunk_size": 1},
    "bounded step": {"time_step_limit": (0.3, 0.9)},
    "other activations": {
        "hybrid_override_pattern": "M-*E",
        "mlp_hidden_act": "gelu",
        "mamba_hidden_act": "relu",
    },
    "block of 1": {"block_size": 1},
    "odd": {
        "hybrid_override_pattern": "ME*-ME*",
        "vocab_size": 53,
        "hidden_size": 30,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 7,
        "intermediate_size": 13,
        "mamba_num_heads": 9,
        "mamba_head_dim": 5,
        "ssm_state_size": 6,
        "n_groups": 3,
        "conv_kernel": 3,
        "chunk_size": 5,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 9,
        "moe_shared_expert_intermediate_size": 11,
        "block_size": 5,
        "timestep_features": 10,
    },
}
UNLIKE_TRANSFORMERS = {"attention biases", "one expert"}


def tiny_config(geometry: str = "base", **fields: Any) -> TwoTowerConfig:
    return TwoTowerConfig(**{**BASE, **GEOMETRIES[geometry], **fields})


def tiny_model(geometry: str = "base", seed: int = 0, **fields: Any) -> TwoTowerForBlockDiffusion:
    """In float32 and evaluation mode."""
    model = TwoTowerForBlockDiffusion(tiny_config(geometry, **fields)).eval()
    randomize(model, seed)
    return model


def student_model(geometry: str = "base", seed: int = 0, **fields: Any) -> TwoTowerForBlockDiffusion:
    """As `from_pretrained` and `from_backbone` give it: the context tower and its head are frozen."""
    model = tiny_model(geometry, seed, **fields)
    model.set_trained_towers("denoiser")
    return model


def without_special_tokens(model: TwoTowerForBlockDiffusion) -> TwoTowerForBlockDiffusion:
    """A model whose text ends at no token, so that random weights write as much as they are asked to."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter and buffer, at scales that keep activations of order one, and gates that vary."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "scale_shift_tables" in name:
            value = torch.tensor([0.0, 0.0, 1.0])[:, None] + 0.3 * noise
        elif name.endswith("A_log"):
            value = noise
        elif tensor.ndim == 1 and ("norm" in name or name.endswith("mixer.D")):
            value = 1 + 0.3 * noise
        elif tensor.ndim == 1:
            value = 0.3 * noise
        elif "embeddings" in name:
            value = noise
        else:
            value = noise / tensor.shape[-1] ** 0.5
        tensor.copy_(value)


def use_config_step_limit(model: torch.nn.Module) -> None:
    """Undo the one difference between transformers' NemotronH and NVIDIA's: its clamp of the Mamba step."""
    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = module.config.time_step_limit


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of 280 tokens, trained on 50 tasks of the embedded checkpoint's kinds."""
    return train_tokenizer(islice(training_tasks(0), 50), 280)


def random_ids(*shape: int, vocab_size: int = 48, seed: int = 0) -> torch.Tensor:
    """Token ids without the mask id, 3, nor the padding id, 0."""
    return torch.randint(4, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_block(*shape: int, vocab_size: int = 48, seed: int = 0) -> torch.Tensor:
    """Ids of which about half are masked; the first column always is."""
    masked = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    masked[..., 0] = True
    return random_ids(*shape, vocab_size=vocab_size, seed=seed).masked_fill(masked, 3)
