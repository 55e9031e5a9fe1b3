"""What a TwoTower is made of and what it needs, from its config alone: the model is built without storage.

Numbers of parameters are those of the checkpoint's tensors, the routers' correction biases included.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_twotower import TwoTowerConfig
from ..modeling_twotower import TwoTowerBackbone, TwoTowerForBlockDiffusion, TwoTowerMoE

# In the order of a table; the values are the keys of the counts below.
PARTS = {
    "Mamba": "linear_attention",
    "attention": "full_attention",
    "MoE": "moe",
    "MLP": "mlp",
    "embeddings": "embeddings",
    "final norm": "norm",
    "head": "head",
    "time conditioning": "time",
}


@dataclass(frozen=True)
class ModelSize:
    """
    Parameters of a TwoTower by part (a value of `PARTS`), for each tower and its head.

    Args:
        context: of the context tower.
        denoiser: of the denoiser tower and its time conditioning.
        active_context: those one token touches: the chosen experts, one row of the embeddings.
        active_denoiser: likewise.
    """

    context: Counter[str]
    denoiser: Counter[str]
    active_context: Counter[str]
    active_denoiser: Counter[str]

    @property
    def total(self) -> int:
        return self.context.total() + self.denoiser.total()


@dataclass(frozen=True)
class CacheSize:
    """
    Bytes of the one cache both towers use.

    Args:
        key_value_per_token: keys and values of all attention layers, for each token of a sequence.
        conv_per_sequence: convolution inputs of all Mamba layers.
        ssm_per_sequence: their scan states, float32 whatever the model's dtype.
    """

    key_value_per_token: int
    conv_per_sequence: int
    ssm_per_sequence: int

    @property
    def per_sequence(self) -> int:
        return self.conv_per_sequence + self.ssm_per_sequence

    def total(self, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens."""
        return self.per_sequence + tokens * self.key_value_per_token


def model_size(config: TwoTowerConfig) -> ModelSize:
    """Count parameters on the meta device."""
    with torch.device("meta"):
        model = TwoTowerForBlockDiffusion(config)
    context, denoiser = _tower_sizes(model.context_tower), _tower_sizes(model.denoiser_tower)
    context["head"] = _numel(model.context_lm_head)
    denoiser["head"] = _numel(model.lm_head)
    denoiser["time"] = sum(_numel(part) for part in (model.t_embedder, model.t_block, model.scale_shift_tables))
    # Both towers have the same layers.
    idle = _idle_expert_size(model.context_tower)
    return ModelSize(context, denoiser, _active(config, context, idle), _active(config, denoiser, idle))


def cache_size(config: TwoTowerConfig, dtype: torch.dtype) -> CacheSize:
    """Bytes of the cache of a model in `dtype`."""
    layers: Counter[str] = Counter(config.layers_block_type)
    inner = config.mamba_num_heads * config.mamba_head_dim
    channels = inner + 2 * config.n_groups * config.ssm_state_size
    key_value = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return CacheSize(
        key_value_per_token=layers["full_attention"] * key_value,
        conv_per_sequence=layers["linear_attention"] * (config.conv_kernel - 1) * channels * dtype.itemsize,
        ssm_per_sequence=layers["linear_attention"] * inner * config.ssm_state_size * torch.float32.itemsize,
    )


def dtype_named(name: str) -> torch.dtype:
    """The floating-point torch dtype of that name, e.g. "bfloat16"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}; use a torch floating-point dtype, e.g. bfloat16, float16 or float32")
    return dtype


def geometry(config: TwoTowerConfig) -> list[tuple[str, str]]:
    """What the config describes, as names and values for a table."""
    layers: Counter[str] = Counter(config.layers_block_type)
    kinds = ", ".join(f"{layers[kind]} {part}" for part, kind in PARTS.items() if layers[kind])
    rows = [
        ("layers per tower", f"{config.num_hidden_layers}: {kinds}"),
        ("pattern", config.hybrid_override_pattern),
        ("hidden size", str(config.hidden_size)),
        ("vocabulary", str(config.vocab_size)),
        ("block size", f"{config.block_size} (mask token id {config.mask_token_id})"),
    ]
    return rows + [
        (part, _LAYER_GEOMETRY[kind].format_map(vars(config))) for part, kind in PARTS.items() if layers[kind]
    ]


def parameter_table(size: ModelSize) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: each part of each tower, and what one token is multiplied by or looks up (active)."""
    header = ("", "context tower", "denoiser tower", "total", "active in context", "active in denoiser")
    columns = (size.context, size.denoiser, size.context + size.denoiser, size.active_context, size.active_denoiser)
    rows = [(part, *(human(column[kind]) for column in columns)) for part, kind in PARTS.items() if columns[2][kind]]
    return header, [*rows, ("total", *(human(column.total()) for column in columns))]


def memory_table(
    config: TwoTowerConfig, size: ModelSize, dtype: torch.dtype
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: bytes of weights and cache."""
    cache, longest = cache_size(config, dtype), config.max_position_embeddings
    sizes = {
        "weights of the context tower": size.context.total() * dtype.itemsize,
        "weights of the denoiser tower": size.denoiser.total() * dtype.itemsize,
        "weights in total": size.total * dtype.itemsize,
        "cache per token: keys and values": cache.key_value_per_token,
        "cache per sequence: convolution inputs": cache.conv_per_sequence,
        "cache per sequence: scan state, float32": cache.ssm_per_sequence,
        "cache per sequence: total": cache.per_sequence,
        f"cache of a sequence of {longest} tokens": cache.total(longest),
    }
    return ("", "", "bytes"), [(name, f"{human(count, giga='G')}B", str(count)) for name, count in sizes.items()]


def human(count: int, giga: str = "B") -> str:
    """Two decimals and a decimal unit; 10^9 is B where parameters are counted, G for bytes."""
    for unit, name in ((10**9, giga), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)


_LAYER_GEOMETRY = {
    "linear_attention": "{mamba_num_heads} heads of {mamba_head_dim}, state {ssm_state_size}, {n_groups} groups, "
    "convolution over {conv_kernel}",
    "full_attention": "{num_attention_heads} query and {num_key_value_heads} key/value heads of {head_dim}",
    "moe": "{n_routed_experts} experts of {moe_intermediate_size}, {num_experts_per_tok} per token, and a shared one "
    "of {moe_shared_expert_intermediate_size}",
    "mlp": "{intermediate_size} wide",
}


def _tower_sizes(tower: TwoTowerBackbone) -> Counter[str]:
    sizes = Counter({"embeddings": _numel(tower.embeddings), "norm": _numel(tower.norm_f)})
    for kind, layer in zip(tower.config.layers_block_type or (), tower.layers, strict=True):
        sizes[kind] += _numel(layer)
    return sizes


def _idle_expert_size(tower: TwoTowerBackbone) -> int:
    """Parameters of the experts that one token does not choose."""
    config, mixers = tower.config, (layer.get_submodule("mixer") for layer in tower.layers)
    experts = sum(_numel(mixer.experts) for mixer in mixers if isinstance(mixer, TwoTowerMoE))
    return experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts


def _active(config: TwoTowerConfig, sizes: Counter[str], idle_experts: int) -> Counter[str]:
    active = Counter(sizes)
    active["moe"] -= idle_experts
    active["embeddings"] = config.hidden_size
    return active


def _numel(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
