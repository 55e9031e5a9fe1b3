"""The model and tokenizer of a recipe: loaded or new, frozen and adapted as it says, stored whole or as an adapter."""

import copy
import difflib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_twotower import TwoTowerConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .recipe import LoraRecipe, ModelRecipe

# The linear layers of a denoiser's mixers, by what a recipe calls their kind of layer.
LORA_MODULES = {
    "attention": ("full_attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mamba": ("linear_attention", ("in_proj", "out_proj")),
    "shared_experts": ("moe", ("shared_experts.up_proj", "shared_experts.down_proj")),
    "mlp": ("mlp", ("up_proj", "down_proj")),
}
# Routed experts are no modules, but tensors of all experts of a layer.
LORA_EXPERTS = ("experts.up_proj", "experts.down_proj")


def build_model(
    recipe: ModelRecipe, stored: Path | None = None
) -> tuple[TwoTowerForBlockDiffusion, PreTrainedTokenizerBase]:
    """A recipe's model (without adapters), as it is before the first step or as `stored`, and its tokenizer."""
    dtype = getattr(torch, recipe.dtype)
    origin = _folder(recipe.checkpoint or recipe.backbone or "")
    tokenizer = AutoTokenizer.from_pretrained(_folder(recipe.tokenizer or origin))
    if stored is not None:
        model = TwoTowerForBlockDiffusion.from_pretrained(stored, dtype=dtype)
    elif recipe.checkpoint is not None:
        model = TwoTowerForBlockDiffusion.from_pretrained(origin, dtype=dtype)
    elif recipe.backbone is not None:
        added = {"mask_token_id": recipe.mask_token_id, "block_size": recipe.block_size}
        given: dict[str, Any] = {name: value for name, value in added.items() if value is not None}
        model = TwoTowerForBlockDiffusion.from_backbone(origin, dtype=dtype, **given)
    else:
        model = TwoTowerForBlockDiffusion(_new_config(recipe.config or {})).to(dtype)
    if model._hf_peft_config_loaded:  # of which save_pretrained would write no more, and all else be trained in vain
        raise ValueError(f"{origin} holds an adapter; load it with peft, merge it (merge_and_unload()) and save that")
    if recipe.reset_denoiser and stored is None:
        model.reset_denoiser()
    model.set_trained_towers(recipe.trained_towers)
    check_tokens(model, tokenizer)
    return model, tokenizer


def _new_config(given: dict[str, Any]) -> TwoTowerConfig:
    try:
        config, plain = TwoTowerConfig(**copy.deepcopy(given)), TwoTowerConfig()
    except (StrictDataclassError, TypeError) as error:  # of a value of another kind
        raise ValueError(f"model.config: {' '.join(str(error).split())}; see TwoTowerConfig") from error
    for name in given:
        # What is no field of a config becomes an attribute of it, without an effect.
        if hasattr(config, name) and not hasattr(plain, name):
            close = difflib.get_close_matches(str(name), vars(plain), 1)
            remedy = f"did you mean {close[0]}?" if close else "leave it out"
            raise ValueError(f"model.config.{name} is no field of a TwoTowerConfig; {remedy}")
    return config


def check_tokens(model: TwoTowerForBlockDiffusion, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError for a tokenizer and a model that do not go together; end a text where the tokenizer does."""
    eos, vocabulary, mask = tokenizer.eos_token_id, model.config.vocab_size, model.config.mask_token_id
    if eos is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; set its eos_token, save it, and "
            "name its folder as model.tokenizer"
        )
    if mask in (eos, tokenizer.bos_token_id):
        raise ValueError(f"mask_token_id is {mask}, which begins or ends a text; choose one that no text has")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model {vocabulary}; give "
            "the model's own, or resize its embeddings"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = eos
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def with_adapter(model: TwoTowerForBlockDiffusion, recipe: LoraRecipe, adapter: Path | None) -> Any:
    """The model under peft: with a new adapter, or with one that a checkpoint holds, to be trained on."""
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ValueError('model.lora needs peft; pip install "twotower[train]"') from error
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    modules, experts = lora_targets(model, recipe)
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # any number
            lora_dropout=recipe.dropout,
            target_modules=modules,
            target_parameters=experts or None,
            task_type="CAUSAL_LM",
        ),
    )


def lora_targets(model: TwoTowerForBlockDiffusion, recipe: LoraRecipe) -> tuple[list[str], list[str]]:
    """Full names of the denoiser's modules, and of its parameters, that get an adapter."""
    modules, experts = [], []
    for idx, layer in enumerate(model.config.layers_block_type):
        mixer = f"denoiser_tower.layers.{idx}.mixer"
        for target, (kind, names) in LORA_MODULES.items():
            if target in recipe.targets and layer == kind:
                modules += [f"{mixer}.{name}" for name in names]
        if layer == "moe" and "routed_experts" in recipe.targets:
            experts += [f"{mixer}.{name}" for name in LORA_EXPERTS]
    if not modules and not experts:
        raise ValueError(f"lora.targets are {', '.join(recipe.targets)}, of which the model has no layer; name others")
    return modules, experts


def _folder(name: str) -> str:
    from .. import demo_checkpoint

    if name == "demo":
        return str(demo_checkpoint())
    path = Path(name).expanduser()
    if name.startswith(("/", ".", "~")) and not path.exists():
        raise ValueError(f"{name} does not exist; give a folder or a Hub repository")
    return str(path) if path.exists() else name


__all__ = ["build_model", "check_tokens", "lora_targets", "with_adapter"]
