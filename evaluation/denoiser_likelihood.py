"""
A lower bound of the log-likelihood that the denoiser gives a text, estimated with its error.

The denoiser gives no text a probability in one pass: it predicts masked tokens from those that are not. Averaged over
all orders in which the L tokens of a block may be unmasked, log p is at least

    E over l uniform in 1..L and over which l tokens are masked of L / l * sum over masked i of log p(x_i | rest)

(Uria et al. 2014 for any order; Sahoo et al. 2024, MDLM, in the limit of many tokens), and a text is as likely as its
blocks, each after those before it. The average is over drawn masks.

Shapes: N samples, S block, V vocabulary.
"""

import math
from typing import NamedTuple
from zlib import crc32

import torch

from ..checkpoints.placement import prompts_device
from ..modeling_twotower import TwoTowerForBlockDiffusion


class LikelihoodEstimate(NamedTuple):
    """`value` in nats, its standard error, and whether the denoiser's first guess of every block is the text."""

    value: float
    stderr: float
    is_first_guess: bool


@torch.no_grad()
def denoiser_log_likelihood(
    model: TwoTowerForBlockDiffusion,
    context: list[int],
    continuation: list[int],
    samples: int = 32,
    block_size: int | None = None,
) -> LikelihoodEstimate:
    """
    Estimate the bound for a continuation, in blocks that begin where its context ends, as those of `generate` do.

    Args:
        model: on its device and in its dtype.
        context: token ids, at least 1.
        continuation: token ids, at least 1. Behind its end a block is masked, as nothing is known of it.
        samples: N masks per block, at least 2, drawn by the tokens themselves: the same every time.
        block_size: S; default the model's.

    Returns:
        [`LikelihoodEstimate`]; a block of one token needs no mask drawn, and has no error.
    """
    size = block_size or model.config.block_size
    ids = torch.tensor(context + continuation, device=prompts_device(model))
    generator = torch.Generator().manual_seed(crc32(str(ids.tolist()).encode()))
    value, variance, first_guess = 0.0, 0.0, True
    cache = model(ids[None, : len(context)], use_cache=True, logits_to_keep=1).cache
    for start in range(len(context), len(ids), size):
        block = ids[start : start + size]
        if start > len(context):
            model(ids[None, start - size : start], cache=cache, logits_to_keep=1)
        masked = _drawn_masks(len(block), samples, generator).to(ids.device)
        sums, guessed = _masked_sums(model, block, masked, size, cache)
        weighted = sums.double() * len(block) / masked.sum(dim=1)
        value += float(weighted.mean())
        variance += float(weighted.var()) / samples
        first_guess = first_guess and guessed
    return LikelihoodEstimate(value, math.sqrt(variance), first_guess)


def _drawn_masks(length: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """(N, L) bool, each row with a number of masked tokens that is uniform in 1..L, anywhere."""
    place = generator.device
    counts = torch.randint(1, length + 1, (samples, 1), generator=generator, device=place)
    drawn = torch.rand(samples, length, generator=generator, dtype=torch.float32, device=place)
    ranks = drawn.argsort(dim=1).argsort(dim=1)
    return ranks < counts


def _masked_sums(
    model: TwoTowerForBlockDiffusion, block: torch.Tensor, masked: torch.Tensor, size: int, cache: object
) -> tuple[torch.Tensor, bool]:
    """(N,) the sum of the masked tokens' log-probabilities, and whether those of an empty block are the likeliest."""
    canvases = torch.full((1 + len(masked), size), model.config.mask_token_id, device=block.device)
    canvases[1:, : len(block)][~masked] = block.expand_as(masked)[~masked]
    logits = _denoised(model, canvases, cache)[:, : len(block)]
    logits[..., model.config.mask_token_id] = -math.inf
    found = logits[1:].log_softmax(dim=-1).gather(-1, block.expand_as(masked)[..., None])[..., 0]
    return (found * masked).sum(dim=1), bool((logits[0].argmax(dim=-1) == block).all())


def _denoised(model: TwoTowerForBlockDiffusion, canvases: torch.Tensor, cache: object) -> torch.Tensor:
    """(N + 1, S, V) logits: all canvases behind the one context; where those are, wherever the denoiser is."""
    rows = cache.copy_rows([0] * len(canvases))  # type: ignore[attr-defined]
    return model.denoise(canvases, rows).to(canvases.device)
