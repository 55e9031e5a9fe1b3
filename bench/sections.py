"""What `twotower bench` measures: generation in every mode, growth with the context, reading of prompts.

Shapes: B batch, T tokens read at once, L context, S block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..checkpoints.inspection import cache_size
from ..demo.evaluation import MAX_NEW_TOKENS
from ..evaluation.answers import (
    Generated,
    Run,
    Variant,
    answer,
    end_ids,
    pass_figures,
    same_answers,
    tokenized,
    variant_of,
)
from ..evaluation.baseline import BASELINE, baseline_variant, context_tower_in_transformers
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .released_loop import released_mask_diffusion, with_expert_loop
from .texts import Kind, prompts
from .timing import Seconds, in_turn, ratios, spread, timed

RELEASED = "released loop"
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "self_speculative": {"mode": "self_speculative"},
    "mask_diffusion": {"mode": "mask_diffusion"},
    "mock_ar": {"mode": "mock_ar"},
}
COMPILED: dict[str, Any] = {"compile": True}
# Of a text that does not end by itself.
OFF_TOKENS = 48
# How much of a prompt is read at once, where it is read in pieces.
CHUNK = 2048


# Generation.


def generation(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    batch_size: int,
    texts: int,
    rounds: int,
    seed: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """
    Every mode, transformers and, one text at a time, the released code's loop on the same texts, in turn.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        kind: "on" texts end by themselves; "off" ones have `OFF_TOKENS` tokens, whatever comes.
        batch_size: B.
        texts: how many, in batches.
        rounds: how often everything is timed; the first round is preceded by one that is not.
        seed: of the problems.
        compiled: every mode also with compiled passes; compiling takes minutes before the first round.

    Returns:
        By way: tokens, passes, texts equal to those of "ar", and of both clocks tokens per second and their ratio to
        those of "ar" in the same round; of "mask_diffusion" also that to the released loop's.
    """
    size = model.config.block_size
    limit = MAX_NEW_TOKENS if kind == "on" else OFF_TOKENS
    limit = max(size, limit - limit % size)  # whole blocks, as the released loop wants them
    endless = {} if kind == "on" else {"eos_token_id": None, "pad_token_id": model.generation_config.pad_token_id or 0}
    ends = end_ids(model) if kind == "on" else set()
    modes = MODES | ({f"{name}, compiled": options | COMPILED for name, options in MODES.items()} if compiled else {})
    variants = [variant_of(model, name, {**options, **endless}) for name, options in modes.items()]
    variants.append(baseline_variant(model, endless))
    if batch_size == 1:
        variants.append(_released_variant(model, ends))
    batches = tokenized(prompts(kind, texts, seed), batch_size, tokenizer, model)
    # The first round warms up, and measures what passes cost.
    runs = [answer(variants, batches[0], batches, ends, limit) for _ in range(rounds + 1)][1:]
    of_way = {variant.name: [run[variant.name] for run in runs] for variant in variants}
    ways = {name: _figures(own, of_way["ar"]) for name, own in of_way.items()}
    if RELEASED in ways:
        for clock, rate in RATES.items():
            ours, theirs = (list(map(rate, of_way[name])) for name in ("mask_diffusion", RELEASED))
            ways["mask_diffusion"][clock]["of_released_loop"] = ratios(ours, theirs)
    return {"texts": texts, "max_new_tokens": limit, "ways": ways}


def _released_variant(model: TwoTowerForBlockDiffusion, ends: set[int]) -> Variant:
    looped = with_expert_loop(model)

    def generate(inputs: BatchEncoding, max_new_tokens: int) -> Generated:
        whole = max_new_tokens + -max_new_tokens % model.config.block_size
        found = released_mask_diffusion(looped, inputs.input_ids, whole, ends)
        passes = torch.tensor([found.denoiser_forwards]), torch.tensor([found.context_forwards])
        return Generated(found.sequences, *passes)

    return Variant(RELEASED, {}, generate)


RATES: dict[str, Callable[[Run], float]] = {
    "wall": lambda run: run.tokens / run.seconds,
    "cpu": lambda run: run.tokens / run.cpu_seconds,
}


def _figures(runs: list[Run], base: list[Run]) -> dict[str, Any]:
    """Of one way's rounds, beside those of the way that ratios are to."""
    figures = pass_figures(runs[0]) | {"same_texts_as_ar": same_answers([base[0], runs[0]])}
    for clock, rate in RATES.items():
        own = list(map(rate, runs))
        figures[clock] = {"tokens_per_second": spread(own), "of_ar": ratios(own, list(map(rate, base)))}
    return figures


# Growth with the context.


class GrowingContext:
    """
    One text that is read on and on, and what passes behind it take.

    Args:
        model: on its device and in its dtype.
        seed: of the tokens.
    """

    def __init__(self, model: TwoTowerForBlockDiffusion, seed: int):
        self.model: Any = model
        self.generator = torch.Generator().manual_seed(seed)
        self.cache: Any = None
        self.read_seconds = Seconds(0.0, 0.0)

    def at(self, length: int, rounds: int) -> dict[str, Any]:
        """
        Read up to `length` tokens, in pieces of `CHUNK`, and time one denoiser pass over a block, one step of "ar",
        and as their floor the reading of as many bytes as the context's keys and values have.
        """
        self._read_up_to(length)
        model, cache = self.model, self.cache
        block = torch.full((1, model.config.block_size), model.config.mask_token_id, device=model.device)
        bytes_held = length * cache_size(model.config, model.dtype).key_value_per_token
        buffer = torch.ones(bytes_held // 4, device=model.device)

        # Each step reads for good; a few tokens more are nothing beside the context.
        def step() -> torch.Tensor:
            return model.context_lm_head(model.context_tower(block[:, :1], cache)[:, -1])

        ways: dict[str, Callable[[], Any]] = {
            "block pass": partial(model.denoise, block, cache),
            "ar step": step,
            "reading keys and values": buffer.sum,
        }
        with torch.inference_mode():
            seconds = in_turn(ways, rounds, model.device)
        return {
            "key_value_bytes": bytes_held,
            "seconds_to_read_up_to_here": {"wall": self.read_seconds.wall, "cpu": self.read_seconds.cpu},
            "ways": {name: milliseconds(each) for name, each in seconds.items()},
        }

    @torch.inference_mode()
    def _read_up_to(self, length: int) -> None:
        while (left := length - (0 if self.cache is None else self.cache.width)) > 0:
            ids = _random_ids(self.model, min(left, CHUNK), self.generator)
            read = partial(self.model, ids, cache=self.cache, use_cache=True, logits_to_keep=1)
            output, seconds = timed(read, self.model.device)
            self.cache = output.cache
            self.read_seconds = Seconds(
                *(before + new for before, new in zip(self.read_seconds, seconds, strict=True))
            )


# Reading of prompts.


def prefill(model: Any, length: int, rounds: int, seed: int) -> dict[str, Any]:
    """One prompt of random tokens read at once, in pieces of `CHUNK`, and by transformers at once."""
    ids = _random_ids(model, length, torch.Generator().manual_seed(seed))
    baseline: Any = context_tower_in_transformers(model)

    def in_pieces() -> Any:
        output = None
        for piece in ids.split(CHUNK, dim=1):
            output = model(piece, cache=None if output is None else output.cache, use_cache=True, logits_to_keep=1)
        return output

    ways: dict[str, Callable[[], Any]] = {
        "at once": partial(model, ids, use_cache=True, logits_to_keep=1),
        f"in pieces of {CHUNK}": in_pieces,
        BASELINE: partial(baseline, ids, use_cache=True, logits_to_keep=1),
    }
    with torch.inference_mode():
        seconds = in_turn(ways, rounds, model.device)
    return {"ways": {name: milliseconds(each) for name, each in seconds.items()}}


def milliseconds(seconds: list[Seconds]) -> dict[str, Any]:
    return {
        "wall": spread([1e3 * each.wall for each in seconds]),
        "cpu": spread([1e3 * each.cpu for each in seconds]),
    }


def _random_ids(model: TwoTowerForBlockDiffusion, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(model.device)


__all__ = ["BASELINE", "CHUNK", "COMPILED", "MODES", "RELEASED", "GrowingContext", "generation", "prefill"]
