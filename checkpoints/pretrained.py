"""How a TwoTower comes from files, or from a backbone's, and goes to files: the class methods of its models."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat_twotower import CONFIG_NAME, NemotronHExperts, find_adapter_config_file, is_peft_available, logger
from ..configuration_twotower import TwoTowerConfig
from ..kernels.backends import check_kernels
from .loading import (
    REMEDY_OF_RENAMED,
    check_complete,
    check_mask,
    check_no_adapter,
    check_parts,
    check_safetensors,
    config_of_backbone,
    load_backbone,
    renamed_weights,
    spare_modules,
    take_text_tokens,
)
from .placement import CONTEXT_PARTS, Device, devices_for_towers, memory_for_towers, towers_device_map
from .selection import only_tensors_of, where_of

TrainedTowers = Literal["denoiser", "context", "both"]
LoadedTowers = Literal["both", "context"]


def check_towers(name: str, towers: str, choices: Any) -> None:
    """Raise a ValueError for towers that are not one of the `choices`, [`TrainedTowers`] or [`LoadedTowers`]."""
    if towers not in get_args(choices):
        raise ValueError(f"{name} is {towers!r}; use one of {', '.join(get_args(choices))}")


TWOTOWER_PARTS = (
    "context_tower",
    "context_lm_head",
    "denoiser_tower",
    "lm_head",
    "t_embedder",
    "t_block",
    "scale_shift_tables",
)
# Linear layers that stay in the model's dtype under every quantiser. Router, norms, convolutions, SSM parameters and
# routed experts are none, so that no quantiser takes them by default.
UNQUANTIZED_MODULES = ("context_lm_head", "lm_head", "t_embedder", "t_block")


class PretrainedInterface(PreTrainedModel):
    """Mixin of [`TwoTowerForBlockDiffusion`], before the classes it is otherwise made of."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any) -> Any:
        """
        Load a checkpoint in NVIDIA's layout or ours; takes every argument of `PreTrainedModel.from_pretrained`.

        Args:
            trained_towers: "denoiser" (default), "context" or "both", see
                [`~TwoTowerForBlockDiffusion.set_trained_towers`]; of a folder with an adapter nothing is.
            kernels: who computes each operation, default "auto", see [`~TwoTowerForBlockDiffusion.set_kernels`].
            towers: "both" (default), or "context" for a model without denoiser, its head and time conditioning, which
                reads and writes in mode "ar"; of a checkpoint in several files only those it needs are fetched.
            device_map: also "towers", see [`~TwoTowerForBlockDiffusion.towers_device_map`], for the accelerators that
                `max_memory` names, or all there are.

        Raises:
            ValueError: for unknown `towers` or `trained_towers`, for towers that do not fit on the devices, for
                `kernels` that are unknown or not installed, and for a local folder without safetensors, or with a
                missing or truncated file, before anything is built; for a checkpoint that lacks tensors of a TwoTower.
        """
        trained_towers = kwargs.pop("trained_towers", None)
        check_towers("trained_towers", "denoiser" if trained_towers is None else trained_towers, TrainedTowers)
        kernels = check_kernels(kwargs.pop("kernels", "auto"))
        towers = kwargs.pop("towers", "both")
        check_towers("towers", towers, LoadedTowers)
        renamed = bool(kwargs.get("key_mapping"))
        parts = CONTEXT_PARTS if towers == "context" else TWOTOWER_PARTS
        names = check_safetensors(pretrained_model_name_or_path, kwargs, () if renamed else parts)
        if names is not None and not renamed:
            check_parts(names, parts, pretrained_model_name_or_path)
        if isinstance(kwargs.get("device_map"), str) and kwargs["device_map"] == "towers":
            kwargs["device_map"] = cls._map_of_towers(pretrained_model_name_or_path, kwargs, towers)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_modules(kwargs["quantization_config"], UNQUANTIZED_MODULES)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True)
        if towers == "both":
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        else:
            with only_tensors_of(parts, pretrained_model_name_or_path, kwargs, renamed) as (place, arguments):
                model, info = super().from_pretrained(place, *model_args, **arguments, towers=towers)
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        check_complete(info["missing_keys"], pretrained_model_name_or_path)
        model._check_quantized_experts(kwargs.get("experts_implementation"))
        if not renamed:
            # What save_pretrained writes is to depend on its arguments, not on the layout this model was loaded from.
            model._weight_conversions = None
        if not model._hf_peft_config_loaded:
            model.set_trained_towers("denoiser" if trained_towers is None else trained_towers)
        elif trained_towers is not None:  # of an adapter's folder peft freezes all, and save_pretrained writes no more
            raise ValueError(
                f"trained_towers is {trained_towers!r}, but {pretrained_model_name_or_path} holds an adapter, whose "
                "model is frozen; leave it out, or load the model and put the adapter on it with peft"
            )
        model.set_kernels(kernels)
        return (model, info) if with_info else model

    @classmethod
    def _map_of_towers(
        cls, path: str | os.PathLike, kwargs: dict[str, Any], towers: LoadedTowers
    ) -> dict[str, Device]:
        """`device_map="towers"` of a checkpoint that `from_pretrained(path, **kwargs)` is to load."""
        config, max_memory = kwargs.get("config"), kwargs.get("max_memory")
        # Not by our class: of an exported folder, remote code has its config of another class of that name.
        if config is None or isinstance(config, str | os.PathLike):
            place = _without_adapter(path, kwargs) if config is None else config
            config = TwoTowerConfig.from_pretrained(place, **where_of(kwargs))
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = config.dtype if dtype == "auto" or isinstance(dtype, dict) else dtype
        # How many bytes quantised weights will have, only their quantiser knows.
        quantized = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        limits = max_memory if quantized else memory_for_towers(max_memory)
        return cls.towers_device_map(config, devices_for_towers(max_memory), dtype, limits, towers)

    @classmethod
    def towers_device_map(
        cls,
        config: TwoTowerConfig,
        devices: Sequence[Device],
        dtype: torch.dtype | str | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        towers: LoadedTowers = "both",
    ) -> dict[str, Device]:
        """
        What `from_pretrained(..., device_map="towers")` puts where, from the config alone.

        Args:
            config: the model's.
            devices: of an even number, the context tower and its head get the first half, the denoiser, its head and
                its time conditioning the second; a tower with several devices is divided by layers, by bytes. Of an
                odd number, or if a half has not the room, both towers together are so divided: one device then has
                layers of both. Of one, all is there.
            dtype: of the weights, default the config's, or float32.
            max_memory: device -> most bytes, or such as "70GB"; default no limit.
            towers: "context" for a model without denoiser, whose tower is divided between all devices.

        Raises:
            ValueError: for no devices, one given twice, one that is none, no dtype, and where a tower does not fit.
        """
        with torch.device("meta"):
            model = cls(config) if towers == "both" else cls(config, towers)
        wanted = config.dtype if dtype is None else dtype
        wanted = getattr(torch, wanted, wanted) if isinstance(wanted, str) else wanted
        if wanted is not None and not isinstance(wanted, torch.dtype):
            raise ValueError(f'dtype is {dtype!r}; give a torch dtype, or the name of one, such as "bfloat16"')
        return towers_device_map(model, devices, None if wanted is None else wanted.itemsize, max_memory)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """
        Write NVIDIA's layout, or with `save_original_format=False` ours; as `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: before anything is written: for a model without denoiser, of which a folder would be no
                TwoTower; for one within a PeftModel; for weights that accelerate keeps elsewhere, for one weight under
                two names, and for a config or generation config that could not be loaded or stored.
        """
        self.check_denoiser("save_pretrained")
        first: dict[tuple, str] = {}
        written = state_dict or dict(self.named_parameters(remove_duplicate=False))
        if self._hf_peft_config_loaded:  # of which no more is written than the adapter
            written = {}
        for name, tensor in written.items():
            if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.data_ptr() == 0:
                continue
            other = first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape), name)
            if other != name:
                raise ValueError(
                    f"{name} and {other} are one tensor, and a checkpoint has one for each; give one of them a copy, "
                    "as in nn.Parameter(weight.detach().clone())"
                )
        # What a device map has offloaded transformers fetches.
        if is_main_process and state_dict is None and getattr(self, "hf_device_map", None) is None:
            offloaded = next((name for name, tensor in self.named_parameters() if tensor.is_meta), None)
            if offloaded is not None:
                raise ValueError(
                    f"{offloaded} holds no data here: if accelerate's cpu_offload or disk_offload keeps it elsewhere, "
                    "call accelerate.hooks.remove_hook_from_submodules(model) before saving, or offload by the "
                    "device_map of from_pretrained; else give the tensors as state_dict"
                )
        if not self._hf_peft_config_loaded:  # else transformers writes the adapter that it has put there
            check_no_adapter(self)
            self.config.check()
            with tempfile.TemporaryDirectory() as scratch:  # transformers refuses flags when the config is written
                self.generation_config.save_pretrained(scratch)
        if renamed := renamed_weights(self):
            logger.warning(
                f"what is saved lacks {renamed[0]}, which is computed from other tensors here, so that "
                f"from_pretrained will refuse it; {REMEDY_OF_RENAMED} before saving a model to be loaded"
            )
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().to(*args, **kwargs)
        except NotImplementedError as error:
            empty = [name for name, tensor in self.state_dict().items() if tensor.is_meta]
            if not empty:
                raise
            raise ValueError(
                f"{len(empty)} tensors hold no data, {empty[0]} for one. accelerate's load_checkpoint_and_dispatch "
                "goes by the names that tensors have in this model, and in NVIDIA's layout experts have others: load "
                "with from_pretrained, or save the checkpoint with save_original_format=False first"
            ) from error

    def _check_quantized_experts(self, implementation: str | None) -> None:
        """Of the ways to compute experts, a matrix product per expert is the one that a quantised tensor knows."""
        experts = [module for module in self.modules() if isinstance(module, NemotronHExperts)]
        if all(type(tensor.data) is torch.Tensor for module in experts for tensor in module.parameters()):
            return
        if implementation not in (None, "eager"):
            raise ValueError(
                f"experts_implementation is {implementation!r}, which cannot multiply by quantised experts; "
                'use "eager", or leave it unset'
            )
        self.set_experts_implementation("eager")

    @classmethod
    def from_backbone(
        cls,
        path_or_model: str | os.PathLike | PreTrainedModel,
        trained_towers: TrainedTowers = "denoiser",
        **kwargs: Any,
    ) -> Any:
        """
        Put a denoiser to train on a NemotronH backbone.

        Context tower and denoiser, and their heads, are separate copies of the backbone; time conditioning is the
        identity, so that the untrained denoiser's layers compute what the backbone's do. A path is read once for each
        tower, so that the two towers are all that is in memory; for a TwoTower that does not fit there,
        [`~checkpoints.conversion.convert_backbone`] writes it to disk.

        Args:
            path_or_model: folder or Hub id of any NemotronH checkpoint, or a loaded [`NemotronHForCausalLM`].
            trained_towers: see [`~TwoTowerForBlockDiffusion.set_trained_towers`].
            kwargs: `block_size`, `mask_token_id` and what else [`TwoTowerConfig`] adds to the backbone's config; with
                a path also arguments of `from_pretrained`, such as `dtype` or `attn_implementation`.

        Raises:
            ValueError: for unknown `trained_towers`, a backbone that is incomplete or spread over devices.
        """
        check_towers("trained_towers", trained_towers, TrainedTowers)
        added = {name: kwargs.pop(name) for name in TwoTowerConfig.__annotations__ if name in kwargs}
        given = isinstance(path_or_model, PreTrainedModel)
        backbone = load_backbone(path_or_model, **kwargs)
        with torch.device("meta"):
            model = cls(config_of_backbone(backbone, **added)).to(backbone.dtype)
        # What was asked for by name, or is the backbone's own way.
        attention, experts = (kwargs.get(f"{each}_implementation") for each in ("attn", "experts"))
        if attention or backbone.config._attn_implementation == "eager":
            model.set_attn_implementation(attention or "eager")
        if experts or backbone.config._experts_implementation != "grouped_mm":
            model.set_experts_implementation(experts or backbone.config._experts_implementation)
        take_text_tokens(model.generation_config, backbone.generation_config)
        check_mask(model.config.mask_token_id, model.generation_config)
        device = _device_of_all(backbone)
        cls._take_over(model.context_tower, model.context_lm_head, backbone, copy=given)
        if not given:
            # The context tower's now; a second reading is the denoiser's.
            del backbone
            backbone = load_backbone(path_or_model, **kwargs)
        cls._take_over(model.denoiser_tower, model.lm_head, backbone, copy=given)
        for conditioning in (model.t_embedder, model.t_block, model.scale_shift_tables):
            conditioning.to_empty(device=device)
        model.t_embedder.apply(model._init_weights)
        model.reset_time_conditioning()
        model.set_trained_towers(trained_towers)
        return model.eval()

    @classmethod
    def _take_over(cls, tower: nn.Module, head: nn.Module, backbone: PreTrainedModel, copy: bool) -> None:
        """Put a backbone's tensors, or copies, into a tower and its head, in the dtype we keep them in."""
        for part, source in ((tower, backbone.model), (head, backbone.lm_head)):
            tensors = {}
            for name, tensor in source.state_dict().items():
                in_float32 = any(kept in name for kept in cls._keep_in_fp32_modules_strict)
                # Whatever transformers does.
                tensors[name] = tensor.to(torch.float32 if in_float32 else backbone.dtype, copy=copy)
            part.load_state_dict(tensors, assign=True)


def _device_of_all(backbone: PreTrainedModel) -> torch.device:
    """A ValueError for a backbone on several devices or offloaded, whose hooks its tensors would leave behind."""
    devices = {tensor.device for tensor in backbone.state_dict().values()}
    if len(devices) > 1 or backbone.device.type == "meta":
        places = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the backbone is spread over {places}; load it on one device (leave device_map out), and place the "
            "TwoTower: save it, and give device_map to from_pretrained"
        )
    return backbone.device


def _without_adapter(path: str | os.PathLike, kwargs: dict[str, Any]) -> str | os.PathLike:
    """Where transformers finds the model: a place that holds no more than peft's adapter names the one it is of."""
    file = find_adapter_config_file(str(path), **where_of(kwargs)) if is_peft_available() else None
    if file is None or Path(path, CONFIG_NAME).is_file():
        return path
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


__all__ = ["TWOTOWER_PARTS", "LoadedTowers", "PretrainedInterface", "TrainedTowers", "check_towers"]
