"""The knobs of `generate`: transformers' flags, the strategy's own, and what is refused."""

from typing import Any

from transformers import GenerationConfig

from .rules import UNMASKING_DEFAULTS, check_unmasking, is_whole

MODES = ("mask_diffusion", "self_speculative", "mock_ar", "ar")
STRATEGY_DEFAULTS: dict[str, Any] = {
    "mode": "mask_diffusion",
    "block_size": None,
    "steps_per_block": 16,
    "draft_steps": 1,
    "draft_length": "auto",
    "acceptance_ratio": 1.0,
    "seed": None,
    **UNMASKING_DEFAULTS,
}
# Flags that count something, ours and transformers', and the least each may be.
COUNTS = {
    "block_size": 1,
    "steps_per_block": 1,
    "draft_steps": 1,
    "tokens_per_step": 1,
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_return_sequences": 1,
    "prefill_chunk_size": 1,
}
# Flags without meaning for two towers, or for one cache that only this model has, and the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # beams
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    # other decoding methods, and other models beside this one
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "low_memory": (False,),
    "guidance_scale": (1.0,),
    "use_mtp": (False,),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_early_exit": (),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    # encoders
    "decoder_start_token_id": (),
    # the cache and the forward pass
    "use_cache": (True,),
    "cache_implementation": (),
    "cache_config": (),
    "max_cache_len": (),
    "compile_config": (),
    "disable_compile": (),
    "continuous_batching_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    # the prompt, which is not to change between what the user gave and what comes back
    "token_healing": (False,),
}
MOST_POSTERIOR_STEPS = 4096
REFUSED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "inputs_embeds",
)


class TwoTowerGenerationConfig(GenerationConfig):
    """
    transformers' generation config and the knobs of the two towers.

    Args:
        mode (`str`, defaults to `"mask_diffusion"`):
            `"mask_diffusion"` fills blocks in parallel; `"self_speculative"` lets the denoiser draft and the context
            tower verify, with the text of `"ar"`; `"mock_ar"` takes one token per denoiser pass; `"ar"` is the
            context tower alone.
        block_size (`int`, defaults to the model config's, 16):
            Tokens per block, at least 1, for `mask_diffusion`; at least 2 for `self_speculative`.
        steps_per_block (`int`, defaults to 16):
            Most denoiser passes per block, at least 1; for `mask_diffusion`.
        draft_steps (`int`, defaults to 1):
            Most denoiser passes per draft, at least 1; for `self_speculative`.
        draft_length (`int`, defaults to `"auto"`):
            Tokens of a draft, the newest token of the text included, from 1 (no draft, a step of `ar`) to
            `block_size`; for `self_speculative`. `"auto"` chooses anew for every cycle among 1, 2, 4, ... and
            `block_size` what promises most tokens per second, by how much of earlier drafts was kept and by what
            passes cost on this machine; with `acceptance_ratio` below 1, where the text depends on it, `block_size`.
        acceptance_ratio (`float`, defaults to 1.0):
            For `self_speculative`: 1 keeps a drafted token only where it is the context tower's own choice, so that
            the text is that of `ar`. Below 1, in (0, 1], it is also kept where the context tower gives it at least so
            many times the probability of its own choice (after all logits processors), as in typical acceptance (Cai
            et al. 2024, Medusa, arXiv 2401.10774). That bounds each token by itself, and promises nothing about the
            distribution of the text.
        seed (`int` or a list of one per row, defaults to a new one from torch's global generator):
            With `do_sample`, or the rule `"posterior"`: what a row draws depends on its seed and its text alone. Of
            `num_return_sequences` the first uses the seed itself.
        unmasking_rule (`str`, defaults to `"confidence"`), confidence_threshold (`float`, defaults to 0.8), ...:
            Which predictions a pass commits, and the rules' parameters: see
            `decoding/rules.py`; the rule may also be a function, see [`UnmaskingRule`].
        kwargs:
            Any other generation flag of transformers.

    Raises:
        ValueError: for an unknown mode or rule or a value outside its range.
    """

    def __init__(self, **kwargs: Any):
        kwargs = plain_counts(kwargs)
        kwargs["seed"] = plain_seed(kwargs.get("seed"))
        for name in STRATEGY_DEFAULTS:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop("_from_model_config", None)  # with it, transformers drops flags it does not know when loading
        super().__init__(**kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> None:
        check_strategy(self)
        super().validate(*args, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "TwoTowerGenerationConfig":
        """The generation flags of a model config; the strategy's own knobs are not among them."""
        return cls(**GenerationConfig.from_model_config(model_config).to_dict())


def check_strategy(config: GenerationConfig) -> None:
    """Raise a ValueError for a strategy knob out of range; None means unset."""
    if config.mode is not None and config.mode not in MODES:
        raise ValueError(f"mode is {config.mode!r}; use one of {', '.join(MODES)}")
    plain_counts(vars(config))
    plain_seed(config.seed)
    length = config.draft_length
    if length not in (None, "auto") and not (is_whole(length) and length >= 1):
        raise ValueError(f'draft_length is {length!r}; give "auto" or a whole number of at least 1')
    ratio = config.acceptance_ratio
    if ratio is not None and not (isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= 1):
        raise ValueError(f"acceptance_ratio is {ratio!r}; it must lie in (0, 1]")
    check_unmasking(config)


def plain_counts(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags, those of [`COUNTS`] as Python's whole numbers; a ValueError for one that is none or too small."""
    plain = dict(flags)
    for name, least in COUNTS.items():
        value: Any = flags.get(name)
        number = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
        if number is not None and not (is_whole(number) and number >= least):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if name in flags:
            plain[name] = number
    return plain


def plain_seed(seed: Any) -> int | list[int] | None:
    """One seed or one per row, also of numpy or torch, as Python numbers; a ValueError for anything else."""
    plain = seed.tolist() if hasattr(seed, "tolist") else seed
    for number in plain if isinstance(plain, list | tuple) else [0 if plain is None else plain]:
        if not (is_whole(number) and -(2**63) <= number < 2**64):
            raise ValueError(f"seed is {seed!r}; give a whole number of 64 bits, or a list of one per row")
    return list(plain) if isinstance(plain, tuple) else plain


def check_supported(config: GenerationConfig) -> None:
    """Refuse by name what has no meaning for two towers."""
    for name, unset in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value not in unset:
            raise ValueError(f"{name}={value!r} is not supported by TwoTower's generate; leave it unset")
    temperature = 1.0 if config.temperature is None else config.temperature
    if config.do_sample and not (isinstance(temperature, int | float) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}; sampling needs it above 0 (or do_sample=False)")
    if config.mode == "self_speculative" and config.block_size < 2:
        raise ValueError(f"block_size is {config.block_size}; self_speculative needs at least 2")
    if config.mode == "self_speculative" and is_whole(config.draft_length) and config.draft_length > config.block_size:
        raise ValueError(
            f"draft_length is {config.draft_length}, more than the block_size {config.block_size}; give at most that"
        )
    seconds = config.max_time
    if seconds is not None and not (isinstance(seconds, int | float) and seconds == seconds):
        raise ValueError(f"max_time is {seconds!r}; give a number of seconds")
    _check_posterior_steps(config)
    watermark = config.watermarking_config
    if type(watermark).__name__ == "SynthIDTextWatermarkingConfig" and config.mode not in ("ar", "mock_ar"):
        raise ValueError(
            f"watermarking_config is {watermark!r}, which counts calls and needs one token at a time; "
            f'use mode "ar" or "mock_ar" rather than {config.mode!r}'
        )


def _check_posterior_steps(config: GenerationConfig) -> None:
    """This rule alone spreads its commits over all the steps there may be, most of which then commit nothing."""
    name = {"mask_diffusion": "steps_per_block", "self_speculative": "draft_steps"}.get(config.mode)
    if name is None or config.unmasking_rule != "posterior" or getattr(config, name) <= MOST_POSTERIOR_STEPS:
        return
    raise ValueError(
        f'{name} is {getattr(config, name)}; the rule "posterior" takes passes that commit nothing, in proportion, so '
        f"give it at most {MOST_POSTERIOR_STEPS}"
    )


__all__ = [
    "MODES",
    "STRATEGY_DEFAULTS",
    "TwoTowerGenerationConfig",
    "check_strategy",
    "check_supported",
    "plain_counts",
    "plain_seed",
]
