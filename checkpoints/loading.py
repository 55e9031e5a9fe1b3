"""Checkpoints: the layouts that are read, and refusing what cannot be loaded before any work is done.

NVIDIA's layout has a matrix per expert, transformers' modules a tensor per layer. transformers converts between them
on loading and on saving.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, NemotronHForCausalLM, PreTrainedModel

from ..compat_twotower import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    AutoQuantizationConfig,
    NemotronHConfig,
    QuantizationConfigMixin,
    WeightConverter,
    add_variant,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from ..configuration_twotower import TwoTowerConfig, check_auto_map

PICKLED_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ADAPTER_CONFIG = "adapter_config.json"
MODEL_TYPES = (TwoTowerConfig.model_type, NemotronHConfig.model_type)
# By safetensors' names.
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPERT_MATRIX = re.compile(r"(.+\.mixer\.experts\.)(\d+)(\..+)")
BACKBONE_ONLY_FIELDS = (
    "model_type architectures auto_map transformers_version num_nextn_predict_layers mtp_layers_block_type"
)


def register_checkpoint_layout() -> None:
    """Make transformers merge NVIDIA's experts on loading, and split them again on saving."""
    merge_experts = [
        conversion
        for conversion in get_checkpoint_conversion_mapping("nemotron_h")
        if isinstance(conversion, WeightConverter)
    ]
    register_checkpoint_conversion_mapping(TwoTowerConfig.model_type, merge_experts, overwrite=True)


def check_safetensors(path: str | os.PathLike, kwargs: dict[str, Any], parts: Sequence[str] = ()) -> set[str] | None:
    """
    Look at the files `from_pretrained(path, **kwargs)` would load, before it does.

    With `parts`, of several files only those that hold tensors of these modules.

    Returns:
        Names of the tensors of a local folder; None for anything else.

    Raises:
        ValueError: without config.json or weights, with pickled ones only, where a file is missing, truncated,
            malformed or lacks a tensor, or where a tensor is of numbers that no weight is.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors is False, but only safetensors are loaded; leave it unset")
    if path is None or not os.path.isdir(path):
        return None
    folder = Path(path, kwargs.get("subfolder", ""))
    if (folder / ADAPTER_CONFIG).is_file():
        return None  # peft's: transformers loads the model it names, and then the adapter
    single, index = (
        folder / add_variant(name, kwargs.get("variant")) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single.is_file():
        return _tensor_names(single, _check_config(folder, kwargs))
    if index.is_file():
        return _sharded_tensor_names(index, _check_config(folder, kwargs), parts)
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise ValueError(
            f"{folder} holds pickled weights ({', '.join(pickled)}); convert them, only safetensors are loaded"
        )
    raise ValueError(f"{folder} holds no weights: neither {single.name} nor {index.name}")


def _check_config(folder: Path, kwargs: dict[str, Any]) -> bool:
    """Whether the weights are quantised; a ValueError where config.json is needed and missing or malformed."""
    flags = folder / GENERATION_CONFIG_NAME
    if flags.is_file():
        _read_object(flags)  # which transformers would do without if it cannot be read
    if kwargs.get("config") is not None:  # or the path of one
        return getattr(kwargs["config"], "quantization_config", None) is not None
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}; give a checkpoint's folder, or copy the model's there")
    config = _read_object(file)
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{file} has model_type {config.get('model_type')!r}, expected {' or '.join(MODEL_TYPES)}; give the "
            "folder of a TwoTower, or for from_backbone of a NemotronH"
        )
    check_auto_map(config.get("auto_map"), file)
    return config.get("quantization_config") is not None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object of fields; download it again")
    return content


def _sharded_tensor_names(index: Path, quantized: bool, parts: Sequence[str]) -> set[str]:
    content = _read_object(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise ValueError(f"{index} has no weight_map of tensor names to files; download it again")
    for name, shard in weight_map.items():
        if not (isinstance(shard, str) and shard):
            raise ValueError(f"the weight_map of {index} has {shard!r} for {name}; it needs a file's name")
    weight_map = {name: shard for name, shard in weight_map.items() if not parts or is_of(name, parts)}
    held = {shard: _tensor_names(index.parent / shard, quantized) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise ValueError(
                f"{index.parent / shard} lacks the tensor {name} that {index.name} promises; download it again"
            )
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} has no metadata, which transformers needs; download it again, or add an empty one")
    return set(weight_map)


def _tensor_names(file: Path, quantized: bool) -> set[str]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; download it again")
    with opened_weights(file) as tensors:
        names = set(tensors.keys())
        for name in [] if quantized else sorted(names):
            dtype = tensors.get_slice(name).get_dtype()
            if dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{file} holds {name} as {dtype}, which would be cast to a weight; give it as one of "
                    f"{', '.join(WEIGHT_DTYPES)}, or the quantization_config it belongs to"
                )
        return names


@contextmanager
def opened_weights(file: Path) -> Iterator[Any]:
    """The tensors of a safetensors file; a ValueError where it is none, or cut off."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}); download it again") from error


def is_of(name: str, parts: Sequence[str]) -> bool:
    """Whether a tensor is of one of these modules."""
    return name.startswith(tuple(f"{part}." for part in parts))


def check_parts(names: set[str], parts: tuple[str, ...], path: str | os.PathLike) -> None:
    """Raise a ValueError if a checkpoint has no tensor at all of one of a TwoTower's parts, or not all experts."""
    absent = [part for part in parts if not any(is_of(name, [part]) for name in names)]
    if absent:
        raise ValueError(
            f"{path} holds no {', '.join(absent)}: it is no TwoTower checkpoint. From the checkpoint of a NemotronH "
            "backbone, TwoTowerForBlockDiffusion.from_backbone makes one"
        )
    experts = [match.groups() for match in map(EXPERT_MATRIX.fullmatch, names) if match]
    numbers = {expert for _, expert, _ in experts}
    layers = {(before, after) for before, _, after in experts}
    check_complete({f"{a}{number}{b}" for a, b in layers for number in numbers} - names, path)


def check_complete(missing: set[str], path: str | os.PathLike) -> None:
    """Raise a ValueError that names tensors a checkpoint did not have, rather than leave them random."""
    if missing:
        shown = ", ".join(sorted(missing)[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{path} lacks {shown}")


def check_no_adapter(model: nn.Module) -> None:
    """Raise a ValueError for a model whose modules adapters have wrapped, so that its tensors have other names."""
    for name, module in model.named_modules():
        if {"base_layer", "original_module"} & module._modules.keys():  # as peft's wrappers have
            raise ValueError(
                f"{name} has an adapter; merge it first (PeftModel's merge_and_unload()), or save the PeftModel, "
                "which writes the adapter alone"
            )


def renamed_weights(model: nn.Module) -> list[str]:
    """Weights that are computed from tensors of other names, by torch's parametrizations, weight norm or pruning."""
    found = []
    for name, module in model.named_modules():
        own = [*module._modules["parametrizations"]._modules] if "parametrizations" in module._modules else []
        own += {key.rpartition("_")[0] for key in module._parameters if key.endswith(("_orig", "_g"))}
        found += [f"{name}.{weight}" for weight in own]
    return found


REMEDY_OF_RENAMED = (
    "make it a weight again (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove)"
)


def merge_expert_matrices(
    experts: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """
    Before `load_state_dict` loads a layer's experts: merge a matrix per expert, as NVIDIA's layout has and
    `save_pretrained` writes, into the tensor this layer holds.

    transformers converts in `from_pretrained` only; its Trainer loads checkpoints with `load_state_dict`, those in
    several files one by one, so that experts that are not in `state_dict` keep the weights they have.
    """
    for name, tensor in experts.named_parameters(recurse=False):
        keys = {idx: f"{prefix}{idx}.{name}.weight" for idx in range(len(tensor))}
        found = {idx: state_dict.pop(key) for idx, key in keys.items() if key in state_dict}
        if not found or prefix + name in state_dict:
            continue
        absent = [key for idx, key in keys.items() if idx not in found]
        if absent and strict:
            missing_keys.extend(absent)
        shapes = {tuple(matrix.shape) for matrix in found.values()}
        if shapes != {tuple(tensor.shape[1:])}:
            error_msgs.append(f"experts of {prefix}{name} have shapes {shapes}, expected {tuple(tensor.shape[1:])}.")
        elif absent:
            merged = tensor.detach().clone()
            for idx, matrix in found.items():
                merged[idx] = matrix
            state_dict[prefix + name] = merged
        else:
            state_dict[prefix + name] = torch.stack([found[idx] for idx in sorted(found)])


def spare_modules(
    quantization_config: QuantizationConfigMixin | dict[str, Any], modules: tuple[str, ...]
) -> QuantizationConfigMixin:
    """A copy of a quantisation config that leaves also these modules as they are, beside those its user names."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    spared = copy.copy(quantization_config)
    for field in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if hasattr(spared, field):
            named = getattr(spared, field) or []
            setattr(spared, field, [*named, *(module for module in modules if module not in named)])
    return spared


def load_backbone(path_or_model: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> NemotronHForCausalLM:
    """A NemotronH with its head, as given or loaded as strictly as a TwoTower."""
    if isinstance(path_or_model, NemotronHForCausalLM):
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: meant for loading a backbone, but a loaded one was given")
        _check_plain(path_or_model)
        return path_or_model
    if not isinstance(path_or_model, str | os.PathLike):
        merged = " (of a PeftModel, what merge_and_unload() returns)" if hasattr(path_or_model, "peft_config") else ""
        raise ValueError(
            f"the backbone is a {type(path_or_model).__name__}; give a NemotronHForCausalLM{merged}, or its path"
        )
    if kwargs.pop("output_loading_info", False):
        raise ValueError("output_loading_info=True: a backbone that is incomplete is refused anyway; leave it out")
    names = check_safetensors(path_or_model, kwargs)
    if any(is_of(name, ["context_tower", "denoiser_tower"]) for name in names or ()):
        raise ValueError(
            f"{path_or_model} is a TwoTower, not a backbone; load it with from_pretrained, or name it as a recipe's "
            "model.checkpoint"
        )
    kwargs["use_safetensors"] = True
    backbone, info = NemotronHForCausalLM.from_pretrained(path_or_model, output_loading_info=True, **kwargs)
    check_complete(info["missing_keys"], path_or_model)
    _check_plain(backbone)
    return backbone


def _check_plain(backbone: nn.Module) -> None:
    check_no_adapter(backbone)
    if getattr(backbone, "hf_quantizer", None) is not None:
        raise ValueError(
            "the backbone is quantised, which a denoiser cannot be trained from; give what it was made of, loaded "
            "without quantization_config, and quantise the TwoTower when it is loaded"
        )


def take_text_tokens(config: GenerationConfig, backbone: GenerationConfig | None) -> None:
    """Let texts begin and end where a backbone's do. How it would be asked otherwise is not how a TwoTower may be."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := getattr(backbone, name, None)) is not None:
            setattr(config, name, token)


def config_of_backbone(backbone: NemotronHForCausalLM | NemotronHConfig, **fields: Any) -> TwoTowerConfig:
    """The config of a TwoTower on a backbone, or of its config; `fields` are those that TwoTowerConfig adds."""
    config = (backbone if isinstance(backbone, NemotronHConfig) else backbone.config).to_dict()
    for name in BACKBONE_ONLY_FIELDS.split():
        config.pop(name, None)
    made = TwoTowerConfig(**{**config, **fields})
    check_mask(made.mask_token_id, made)
    return made


def check_mask(mask: int, config: Any) -> None:
    """Raise a ValueError for a mask that by a config, of a model or of texts, ends these."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if mask in ends:
        raise ValueError(f"mask_token_id is {mask}, which ends a text; choose one that no text has")


__all__ = [
    "ADAPTER_CONFIG",
    "WEIGHT_DTYPES",
    "check_complete",
    "check_mask",
    "check_no_adapter",
    "check_parts",
    "check_safetensors",
    "config_of_backbone",
    "is_of",
    "load_backbone",
    "merge_expert_matrices",
    "opened_weights",
    "register_checkpoint_layout",
    "spare_modules",
    "take_text_tokens",
]
