"""transformers, as far as it is not its documented interface: the releases we know, and the internals we lean on.

Every private import is here, and what two releases name differently: transformers 5.24 calls `cache` what was called
`past_key_values`. We call it `cache` on every release, and understand the older name everywhere.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import transformers

OLDEST_RELEASE, FIRST_UNKNOWN_RELEASE = "5.23", "5.25"


def check_release(installed: str) -> None:
    """Raise an ImportError for a release of transformers this code was not tested with."""
    if not _release_number(OLDEST_RELEASE) <= _release_number(installed) < _release_number(FIRST_UNKNOWN_RELEASE):
        raise ImportError(
            f"this TwoTower code knows transformers from {OLDEST_RELEASE} to before {FIRST_UNKNOWN_RELEASE}, and "
            f"{installed} is installed: pip install 'transformers>={OLDEST_RELEASE},<{FIRST_UNKNOWN_RELEASE}', "
            "or take newer TwoTower code"
        )


def _release_number(version: str) -> tuple[int, ...]:
    """Its first two numbers: "5.24.0.dev0" has what 5.24 will have."""
    return tuple(int(number) for number in version.split(".")[:2])


# Before the imports below, of which an unknown release may lack any.
check_release(transformers.__version__)

from transformers import NemotronHConfig
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter
from transformers.dynamic_module_utils import get_relative_imports
from transformers.generation import logits_process
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.integrations.moe import _grouped_mm as grouped_mm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import _add_variant as add_variant
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHExperts,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHMoE,
    NemotronHPreTrainedModel,
    NemotronHRMSNorm,
    NemotronHTopkRouter,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    can_return_tuple,
    extract_commit_hash,
    find_adapter_config_file,
    is_accelerate_available,
    is_peft_available,
    requires_backends,
)
from transformers.utils.logging import get_logger, tqdm
from transformers.utils.quantization_config import QuantizationConfigMixin

# One name for all that we say, below transformers' own: its verbosity and handlers are ours, too, also in remote code.
logger = get_logger("transformers.twotower")

Method = TypeVar("Method", bound=Callable[..., Any])


def accepts_past_key_values(method: Method) -> Method:
    """Let the argument `cache` of a method also be given as `past_key_values`."""

    @wraps(method)
    def with_either_name(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            if cache is not None and kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values were both given, two names of one argument; give one")
            if cache is not None:
                kwargs["cache"] = cache
        return method(self, *args, **kwargs)

    return with_either_name  # type: ignore[return-value]


class CacheOutput(ModelOutput):
    """A result whose field `cache` can also be read, set and looked up as `past_key_values`."""

    # transformers 5.24 understands the older name, too, but warns at every use of it.
    @property
    def past_key_values(self) -> Any:
        return self.cache

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_current_name(name), value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_current_name(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_current_name(key), value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_current_name(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_current_name(key), default)


def _current_name(key: Any) -> Any:
    return "cache" if key == "past_key_values" else key


__all__ = [
    "ACT2FN",
    "CONFIG_NAME",
    "GENERATION_CONFIG_NAME",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "AutoQuantizationConfig",
    "BaseStreamer",
    "CacheOutput",
    "EosTokenCriteria",
    "ExpertsInterface",
    "GenerationOutput",
    "GradientCheckpointingLayer",
    "MaxTimeCriteria",
    "ModelOutput",
    "NemotronHAttention",
    "NemotronHConfig",
    "NemotronHExperts",
    "NemotronHMLP",
    "NemotronHMamba2Mixer",
    "NemotronHMoE",
    "NemotronHPreTrainedModel",
    "NemotronHRMSNorm",
    "NemotronHTopkRouter",
    "QuantizationConfigMixin",
    "RequestStatus",
    "WeightConverter",
    "accepts_past_key_values",
    "add_variant",
    "cached_file",
    "can_return_tuple",
    "extract_commit_hash",
    "find_adapter_config_file",
    "force_accelerate_hooks",
    "get_checkpoint_conversion_mapping",
    "get_relative_imports",
    "grouped_mm",
    "grouped_mm_experts_forward",
    "is_accelerate_available",
    "is_peft_available",
    "logger",
    "logits_process",
    "register_checkpoint_conversion_mapping",
    "requires_backends",
    "slice_logits_to_keep",
    "tqdm",
]
