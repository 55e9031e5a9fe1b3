"""The yardstick: transformers' own NemotronH, computing with a TwoTower's own context tower."""

from typing import Any

import torch
from transformers import BatchEncoding, NemotronHConfig, NemotronHForCausalLM

from ..configuration_twotower import TwoTowerConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .answers import Generated, Variant

BASELINE = "transformers NemotronH"


def baseline_variant(model: TwoTowerForBlockDiffusion, options: dict[str, Any] | None = None) -> Variant:
    """The context tower run by transformers' own model and `generate`, with some options of that."""
    baseline: Any = context_tower_in_transformers(model)

    def generate(inputs: BatchEncoding, max_new_tokens: int) -> Generated:
        return Generated(baseline.generate(**inputs, **options or {}, max_new_tokens=max_new_tokens, do_sample=False))

    return Variant(BASELINE, {}, generate)


def context_tower_in_transformers(model: TwoTowerForBlockDiffusion) -> NemotronHForCausalLM:
    """
    transformers' NemotronH over the context tower's own tensors, with the Mamba step clamped as the config says.

    Raises:
        ValueError: for a context tower that is offloaded or on several devices: who moves its tensors stays with it.
    """
    with torch.device("meta"):
        baseline = NemotronHForCausalLM(nemotron_config(model.config))
    state = {f"model.{name}": tensor for name, tensor in model.context_tower.state_dict().items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in model.context_lm_head.state_dict().items()}
    places = {str(tensor.device) for tensor in state.values()}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"the context tower is on {', '.join(sorted(places))}, and transformers' NemotronH needs it on one "
            "device; load it so, or leave transformers out (--modes)"
        )
    baseline.load_state_dict(state, assign=True)
    for layer in baseline.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = model.config.time_step_limit
    # `generate` would warn about a padding id that differs from the model's own.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(baseline.generation_config, name, getattr(model.generation_config, name))
    return baseline.eval()


def nemotron_config(config: TwoTowerConfig) -> NemotronHConfig:
    """The fields of a TwoTower's config that describe one tower."""
    own = {"model_type", "architectures", "auto_map", *(TwoTowerConfig.__annotations__)}
    return NemotronHConfig(**{name: value for name, value in config.to_dict().items() if name not in own})
