"""The knobs of `generate`: transformers' flags, the strategy's own, and what is refused."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import CompileConfig, GenerationConfig

from ..compat_twotower import logger
from .rules import PARAMETERS, UNMASKING_DEFAULTS, UNMASKING_RULES, Parameter, number_that, one_of, whole_number_from

MODES = ("mask_diffusion", "self_speculative", "mock_ar", "ar")
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


# The strategy's own knobs; None in a config is unset.
KNOBS: dict[str, Parameter] = {
    "mode": one_of(MODES),
    "block_size": whole_number_from(COUNTS["block_size"]),  # by default the model's
    "steps_per_block": whole_number_from(COUNTS["steps_per_block"], 16),
    "draft_steps": whole_number_from(COUNTS["draft_steps"], 1),
    "draft_length": Parameter(
        "auto",
        'give "auto" or a whole number of at least 1',
        lambda value: value == "auto" or whole_number_from(1).holds(value),
    ),
    "acceptance_ratio": number_that("lie in (0, 1]", 1.0, lambda value: 0 < value <= 1),
    "compile": Parameter(False, "give True or False", lambda value: isinstance(value, bool)),
    "seed": Parameter(
        None,
        "give a whole number of 64 bits, or a list of one per row",
        lambda value: all(
            whole_number_from(-(2**63)).holds(number) and number < 2**64
            for number in (value if isinstance(value, list) else [value])
        ),
    ),
    "unmasking_rule": Parameter(
        UNMASKING_DEFAULTS["unmasking_rule"],
        f"use one of {', '.join(UNMASKING_RULES)}, or a function (prediction, masked, step, steps) -> commit",
        lambda value: callable(value) or (isinstance(value, str) and value in UNMASKING_RULES),
    ),
    **PARAMETERS,
}
FLAGS = {*vars(GenerationConfig()), *KNOBS}
OF_ALL_MODES = ("mode", "compile", "seed")
STRATEGY_DEFAULTS: dict[str, Any] = {name: parameter.default for name, parameter in KNOBS.items()}
IS_WHOLE = whole_number_from(-(2**63)).holds
TOKENS = {
    "bos_token_id": Parameter(None, "give a token id, or None", IS_WHOLE),
    "pad_token_id": Parameter(None, "give a token id, or None", IS_WHOLE),
    "eos_token_id": Parameter(
        None,
        "give a token id or a list of some, or None",
        lambda value: all(map(IS_WHOLE, (isinstance(value, list) and value) or [value])),
    ),
}
SHARES = {
    "top_p": number_that("lie in [0, 1]", 1.0, lambda value: 0 <= value <= 1),
    # Beyond these transformers leaves the flag out without a word.
    "typical_p": number_that("lie in (0, 1]", 1.0, lambda value: 0 < value <= 1),
    "epsilon_cutoff": number_that("lie in [0, 1)", 0.0, lambda value: 0 <= value < 1),
    "eta_cutoff": number_that("lie in [0, 1)", 0.0, lambda value: 0 <= value < 1),
}
CHECKED = {
    **{name: whole_number_from(least) for name, least in COUNTS.items()},
    **SHARES,
    **TOKENS,
    # Of which any text, "no" too, would be true.
    "do_sample": Parameter(False, "give True or False", lambda value: value in (True, False)),
    **KNOBS,
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
    "continuous_batching_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    # the prompt, which is not to change between what the user gave and what comes back
    "token_healing": (False,),
}
MOST_POSTERIOR_STEPS = 4096
# The 30B model's quality was measured on blocks of up to four times the size it was trained on.
MOST_TRAINED_SIZES = 4
REFUSED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "inputs_embeds",
    # It would be given processors, criteria and a cache that are made for rows at their own pace.
    "custom_generate",
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
        draft_length (`int` or `"auto"`, the default):
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
        compile (`bool`, defaults to `False`):
            Run passes of both towers as compiled programs of static shapes, see `decoding/compiled.py`: the same
            text, after what no call has needed before was recorded (on a GPU) or compiled, for minutes. Processors,
            criteria and callbacks are called as ever, between passes. transformers' `compile_config` says how, as
            arguments of `torch.compile`.
        unmasking_rule (`str`, defaults to `"confidence"`), confidence_threshold (`float`, defaults to 0.8), ...:
            Which predictions a pass commits, and the rules' parameters: see
            `decoding/rules.py`; the rule may also be a function (prediction, masked (R, S) bool, step (R,), steps) ->
            commit (R, S) bool.
        kwargs:
            Any other generation flag of transformers.

    Raises:
        ValueError: for an unknown mode or rule or a value outside its range.
    """

    def __init__(self, **kwargs: Any):
        kwargs = plain(kwargs)
        for name in STRATEGY_DEFAULTS:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop("_from_model_config", None)  # with it, transformers drops flags it does not know when loading
        super().__init__(**kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> None:
        plain(vars(self))
        super().validate(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if self.compile_config is not None:  # which transformers would leave out, and compile=True not
            raise ValueError(
                f"compile_config={self.compile_config!r} cannot be stored; set it to None, and give it to generate"
            )
        if callable(self.unmasking_rule):
            raise ValueError(
                f"unmasking_rule={self.unmasking_rule!r} cannot be stored; set it to None, and give it to generate"
            )
        super().save_pretrained(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TwoTowerGenerationConfig":
        """As `generate` makes one; a rule of the user's stays the same object, which may count or hold a lock."""
        memo[id(self.unmasking_rule)] = self.unmasking_rule
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        """By which configs are shown and compared, too; a rule that is a function is told by its repr."""
        shown = copy.copy(self)
        if callable(shown.unmasking_rule):
            shown.unmasking_rule = repr(shown.unmasking_rule)
        return super(TwoTowerGenerationConfig, shown).to_json_string(*args, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "TwoTowerGenerationConfig":
        """The generation flags of a model config; the strategy's own knobs are not among them."""
        return cls(**GenerationConfig.from_model_config(model_config).to_dict())


def plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """
    The flags, those that count, special tokens and the strategy's knobs as Python's numbers if of numpy or torch.

    Raises:
        ValueError: for one of these out of its range; None means unset.
    """
    numbers = dict(flags)
    for name, parameter in CHECKED.items():
        value: Any = flags.get(name)
        if hasattr(value, "tolist"):
            numbers[name] = value = value.tolist()
        elif name in ("seed", "eos_token_id") and isinstance(value, tuple):
            numbers[name] = value = list(value)
        if value is not None and not parameter.holds(value):
            raise ValueError(f"{name} is {value!r}; {parameter.requirement}")
    return numbers


def resolve(config: GenerationConfig, strategies: Mapping[str, Any], trained_block_size: int) -> None:
    """
    Set the knobs a config leaves unset, and refuse by name what has no meaning for two towers, or for its strategy.

    What columns of a block hold that no row may ever write changes what the denoiser makes of the others, so up to
    the trained size, and in `mask_diffusion` up to the largest multiple of it that was ever measured, a block is as
    wide as it was asked for. The bound depends on nothing but the call's flags: a row's passes must not depend on its
    neighbours.
    """
    for name, value in plain(vars(config)).items():
        setattr(config, name, value)
    for name, default in {**STRATEGY_DEFAULTS, "block_size": trained_block_size}.items():
        if getattr(config, name, None) is None:
            setattr(config, name, default)
    strategy = strategies[config.mode]
    check_supported(config, strategy)
    size, length = config.block_size, config.draft_length
    tokens = config.max_length if config.max_new_tokens is None else config.max_new_tokens
    most = max(tokens, MOST_TRAINED_SIZES * trained_block_size)
    if "draft_length" in strategy.knobs:
        if size < 2:
            raise ValueError(f"block_size is {size}; {config.mode} needs at least 2")
        if length != "auto" and length > size:
            raise ValueError(f"draft_length is {length}, more than the block_size {size}; give at most that")
        widest = max(tokens, trained_block_size, 2)
        # Where lengths are chosen a power of two, so that calls of few tokens do not each ask what another one costs.
        config.block_size = min(size, 1 << (widest - 1).bit_length() if length == "auto" else widest)
        if length != "auto":
            config.draft_length = min(length, config.block_size)
    elif "block_size" in strategy.knobs and size > most:
        raise ValueError(
            f"block_size is {size}, but no row may write more than {tokens} tokens, and the denoiser was trained on "
            f"blocks of {trained_block_size}; give at most {most}, or more max_new_tokens"
        )
    elif "block_size" in strategy.knobs and size > trained_block_size:
        logger.warning(
            f"block_size {size} is larger than the {trained_block_size} the denoiser was trained on; the 30B model's "
            "HumanEval fell from 76 to 20 when its blocks went from 16 to 64"
        )
    rule = config.unmasking_rule
    draws = config.do_sample or (isinstance(rule, str) and UNMASKING_RULES[rule].draws)
    if config.seed is not None and not draws:
        logger.warning(f"seed={config.seed!r} has no effect without do_sample=True")


def without_effect(given: Mapping[str, Any], config: GenerationConfig, strategy: Any) -> list[str]:
    """Those of the knobs given that the strategy and the rule of a resolved config do not look at."""
    rule, looked_at = config.unmasking_rule, (*OF_ALL_MODES, *strategy.knobs)
    if "unmasking_rule" in strategy.knobs and isinstance(rule, str):
        looked_at += tuple(UNMASKING_RULES[rule].parameters)
    return [name for name in KNOBS if given.get(name) is not None and name not in looked_at]


def unknown_flags(config: GenerationConfig) -> list[str]:
    """What a config holds, as one may any name, that neither transformers nor the strategies look at."""
    held = {name: value for name, value in vars(config).items() if not name.startswith("_")}  # transformers' own, too
    return [name for name, value in held.items() if value is not None and name not in FLAGS]


def check_supported(config: GenerationConfig, strategy: Any) -> None:
    """Refuse by name what has no meaning for two towers, or for a strategy; all knobs are set."""
    for name, unset in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value not in unset:
            instead = "; compile=True runs compiled passes" if name == "cache_implementation" else ""
            raise ValueError(f"{name}={value!r} is not supported by TwoTower's generate; leave it unset{instead}")
    check_compile_config(config.compile_config, config.compile)
    if config.disable_compile and config.compile:  # alone it asks for what is so anyway, as TRL's trainers do
        raise ValueError("disable_compile=True and compile=True contradict each other; give one of them")
    temperature = 1.0 if config.temperature is None else config.temperature
    if config.do_sample and not (isinstance(temperature, int | float) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}; sampling needs it above 0 (or do_sample=False)")
    seconds = config.max_time
    if seconds is not None and not (isinstance(seconds, int | float) and seconds == seconds):
        raise ValueError(f"max_time is {seconds!r}; give a number of seconds")
    decay = config.exponential_decay_length_penalty
    if decay is not None and config.eos_token_id is None:
        raise ValueError(f"exponential_decay_length_penalty={decay!r} favours end-of-text; give eos_token_id, too")
    # This rule alone spreads its commits over all the steps there may be, most of which then commit nothing.
    name = strategy.steps_knob
    if name is not None and config.unmasking_rule == "posterior" and getattr(config, name) > MOST_POSTERIOR_STEPS:
        raise ValueError(
            f'{name} is {getattr(config, name)}; the rule "posterior" takes passes that commit nothing, in '
            f"proportion, so give it at most {MOST_POSTERIOR_STEPS}"
        )
    watermark = config.watermarking_config
    if type(watermark).__name__ == "SynthIDTextWatermarkingConfig" and name is not None:
        raise ValueError(
            f"watermarking_config is {watermark!r}, which counts calls and needs one token at a time; "
            f'use mode "ar" or "mock_ar" rather than {config.mode!r}'
        )


def check_compile_config(given: Any, is_used: bool) -> None:
    """Refuse a `compile_config` that nobody would look at, or that `torch.compile` would not take."""
    if given is None:
        return
    if not isinstance(given, CompileConfig):
        raise ValueError(f"compile_config is a {type(given).__name__}; give transformers' CompileConfig")
    if not is_used:
        raise ValueError(f"compile_config={given!r} has no effect without compile=True; give both, or leave it unset")
    if given.mode is not None and given.options is not None:
        raise ValueError(
            f"compile_config has the mode {given.mode!r} and options, of which torch.compile takes one; give mode=None"
        )


__all__ = [
    "MODES",
    "STRATEGY_DEFAULTS",
    "TwoTowerGenerationConfig",
    "plain",
    "resolve",
    "unknown_flags",
    "without_effect",
]
