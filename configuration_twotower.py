"""Configuration of a TwoTower model: a NemotronH backbone, used twice, plus what block diffusion adds."""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .compat_twotower import NemotronHConfig

LAYER_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


@strict
class TwoTowerConfig(NemotronHConfig):
    r"""
    Geometry of both towers (they share it) and of the denoiser's block.

    Every field of [`NemotronHConfig`] applies to each tower; NVIDIA's published config is read as it is
    (`hybrid_override_pattern`, `model_type: nemotron_h`, a literal `Infinity`). An `auto_map` that points at other
    code than ours is dropped, so it is never saved again.

    Args:
        block_size (`int`, defaults to 16):
            Tokens per block the denoiser was trained on. Absent from NVIDIA's config.
        mask_token_id (`int`, defaults to 3):
            Id of the [MASK] token. Absent from NVIDIA's config.
        timestep_features (`int`, defaults to 256):
            Sinusoidal features of the timestep, half cosines and half sines: even.
        timestep_max_period (`float`, defaults to 10000.0):
            Longest period of those features.
        timestep_scale (`float`, defaults to 1000.0):
            Factor applied to the masked fraction before the features are taken.

    Raises:
        ValueError: for a value outside its range, an unknown layer letter, or dimensions that do not divide; the
            message names the value.
    """

    model_type = "twotower"
    # NemotronH's plans name what one tower would have at the root; a TwoTower has none.
    base_model_tp_plan = None
    base_model_ep_plan = None
    # By which name transformers' fp8 experts ask for it.
    attribute_map = {**NemotronHConfig.attribute_map, "hidden_act": "mlp_hidden_act"}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "last_hidden_state", "masked_tokens"]

    block_size: int = 16
    mask_token_id: int = 3
    timestep_features: int = 256
    timestep_max_period: float = 10000.0
    timestep_scale: float = 1000.0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        auto_map = kwargs.pop("auto_map", None)
        check_auto_map(auto_map, "the config")
        _check_dtype(kwargs.get("torch_dtype") or self.dtype)
        declared_layers, pattern = kwargs.get("num_hidden_layers"), kwargs.get("hybrid_override_pattern")
        super().__post_init__(**kwargs)
        if auto_map and _is_own_code(auto_map):
            self.auto_map = auto_map
        self.time_step_limit: tuple[float, ...] = tuple(float(limit) for limit in self.time_step_limit)
        self._check_layers(declared_layers, pattern)
        self._check_absent()
        self.check()

    def check(self) -> None:
        """Raise a ValueError for a value outside its range, which may have been set after the config was made."""
        self._check_sizes()
        self._check_divisions()
        self._check_tokens()

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config as transformers does, taking NVIDIA's `nemotron_h` for the TwoTower it describes."""
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        source = f"config.json in {args[0]}" if args else "config.json"
        if not isinstance(config_dict, dict):
            raise ValueError(f"{source} holds a {type(config_dict).__name__}, not an object of fields")
        if not config_dict:  # of which transformers makes no error where a subfolder is looked for
            inner = f", subfolder {kwargs['subfolder']!r}" if kwargs.get("subfolder") else ""
            raise OSError(f"{source}{inner} is not there, or empty; look at the name, and at revision if it was given")
        kind, known = config_dict.get("model_type"), (cls.model_type, NemotronHConfig.model_type)
        if kind not in known:
            raise ValueError(f"{source} has model_type {kind!r}, expected {' or '.join(known)}; give a TwoTower's")
        check_auto_map(config_dict.get("auto_map"), source)
        if kind == NemotronHConfig.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": ["TwoTowerForBlockDiffusion"]}
        return config_dict, unused

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with a ValueError for a value of another kind."""
        try:
            return super().from_dict(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"config: {' '.join(str(error).split())}") from error

    def _check_layers(self, declared_layers: int | None, pattern: str | None) -> None:
        kinds = set(LAYER_LETTERS.values())
        if not self.layers_block_type:
            raise ValueError(
                "`layers_block_type` is empty; give at least one layer, e.g. hybrid_override_pattern='M*'"
            )
        if unknown := sorted(set(self.layers_block_type) - kinds):
            raise ValueError(f"`layers_block_type` holds unknown layer kinds {unknown}; use {sorted(kinds)}")
        if pattern is not None and self._pattern_to_list(pattern) != self.layers_block_type:
            raise ValueError(
                f"hybrid_override_pattern is {pattern!r}, but layers_block_type {self.layers_block_type}; make them "
                "agree or drop one of them"
            )
        if declared_layers is not None and declared_layers != len(self.layers_block_type):
            raise ValueError(
                f"num_hidden_layers is {declared_layers}, but the layer pattern has {len(self.layers_block_type)} "
                "layers; make them agree or drop num_hidden_layers"
            )

    def _check_absent(self) -> None:
        """Refuse what a backbone's config may ask for and a TwoTower would otherwise ignore."""
        absent = {
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": False,
            "residual_in_fp32": False,
            "sliding_window": None,
            "attention_dropout": 0,
            "hidden_dropout": 0,
            "mamba_ssm_cache_dtype": "float32",
        }
        for name, only in absent.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} is {getattr(self, name)!r}; a TwoTower supports only {only!r}")

    def _check_sizes(self) -> None:
        sizes = (
            "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size "
            "ssm_state_size mamba_num_heads mamba_head_dim n_groups conv_kernel chunk_size n_routed_experts "
            "moe_intermediate_size moe_shared_expert_intermediate_size num_experts_per_tok n_group topk_group "
            "block_size timestep_features timestep_max_period timestep_scale layer_norm_epsilon"
        )
        for name in sizes.split():
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.moe_latent_size is not None and self.moe_latent_size <= 0:
            raise ValueError(f"moe_latent_size is {self.moe_latent_size}; it must be positive, or None")
        limit = self.time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] < limit[1]:
            raise ValueError(f"time_step_limit is {limit}; expected 0 <= low < high")

    def _check_divisions(self) -> None:
        divisions = (
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
            ("n_routed_experts", "n_group"),
        )
        for whole, part in divisions:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, more than n_group {self.n_group}")
        group = self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > group * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the {group * self.topk_group} experts "
                f"of a token's groups: {group} in each of topk_group {self.topk_group}"
            )
        if group == 1 and self.topk_group < self.n_group:
            raise ValueError(f"n_group is {self.n_group}, of one expert each; groups are ranked by their best two")
        if self.timestep_features % 2:
            raise ValueError(f"timestep_features is {self.timestep_features}; it must be even (cosines and sines)")

    def _check_tokens(self) -> None:
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id is {self.mask_token_id}, outside the vocabulary of {self.vocab_size}")

    @staticmethod
    def _pattern_to_list(pattern: str) -> list[str]:
        if unknown := sorted(set(pattern) - set(LAYER_LETTERS)):
            raise ValueError(
                f"hybrid_override_pattern {pattern!r} holds unknown letters {unknown}; use M (Mamba-2), "
                "* (attention), E (mixture of experts) and - (MLP)"
            )
        return [LAYER_LETTERS[letter] for letter in pattern]


def _check_dtype(dtype: Any) -> None:
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; give one of torch's, e.g. bfloat16 or float32")


def check_auto_map(auto_map: Any, source: Any) -> None:
    """Raise a ValueError that names what is no mapping of auto classes to code; `source` says where it stands."""
    if auto_map is None:
        return
    if not isinstance(auto_map, dict):
        raise ValueError(f"auto_map of {source} is {auto_map!r}; it must map auto classes to code, or be left out")
    for name, reference in auto_map.items():
        # A tokenizer's is a pair, of which either may be None.
        references = reference if name == "AutoTokenizer" and isinstance(reference, list | tuple) else [reference]
        if not all(isinstance(code, str) or (code is None and len(references) > 1) for code in references):
            raise ValueError(f"auto_map of {source} has {reference!r} for {name}; it must be 'module.Class'")


def _is_own_code(auto_map: dict[str, str]) -> bool:
    """Whether a config's `auto_map` points at this model's exported code (`repo--module.Class` or `module.Class`)."""
    own_config = auto_map.get("AutoConfig", "").endswith(TwoTowerConfig.__name__)
    return own_config and all(
        isinstance(reference, str) and reference.split("--")[-1].split(".")[0].endswith("_twotower")
        for reference in auto_map.values()
    )


__all__ = ["TwoTowerConfig", "check_auto_map"]
