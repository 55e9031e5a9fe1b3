"""The masked-diffusion training objective, as pure functions of tokens and hidden states.

Corruption and loss follow NVIDIA's Megatron-LM training: t ~ U[0.001, 1], every token masked with probability t,
mean cross-entropy over masked positions against the token at the same position. Here each block draws its own t.

Shapes: B batch, T tokens (a multiple of S), S block, M masked positions, V vocabulary.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from .decoding.sampling import content_seeds, derived_seeds, uniform_noise
from .kernels.precision import at_least_float32

MIN_TIMESTEP = 1e-3
LossWeighting = Literal["mean", "inverse_timestep"]


def check_objective(weighting: str, corruptions: int) -> None:
    """Raise a ValueError for an unknown weighting or a number of corruptions below 1."""
    if weighting not in get_args(LossWeighting):
        raise ValueError(f"loss_weighting is {weighting!r}; use one of {', '.join(get_args(LossWeighting))}")
    if corruptions < 1:
        raise ValueError(f"corruptions is {corruptions}; it must be at least 1")


def sample_masked(trainable: torch.Tensor, block_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Draw which positions to mask.

    Args:
        trainable: (B, T) bool, True where a token may be masked.
        block_size: S; one t ~ U[0.001, 1] is drawn per block of S columns.
        generator: for reproducible draws, on any device; default torch's global one.

    Returns:
        (B, T) bool.
    """
    batch, length = trainable.shape
    device = trainable.device if generator is None else generator.device
    draws = torch.rand(batch, length // block_size, 1 + block_size, generator=generator, device=device)
    probability = MIN_TIMESTEP + (1 - MIN_TIMESTEP) * draws[..., :1]
    return (draws[..., 1:] < probability).flatten(1).to(trainable.device) & trainable


def content_masked(
    ids: torch.Tensor, mask: torch.Tensor | None, trainable: torch.Tensor, block_size: int, corruptions: int = 1
) -> torch.Tensor:
    """
    Choose which positions to mask as [`sample_masked`] does, but by a hash of each row's own tokens.

    Neither the rest of a batch nor whole blocks of padding change what is masked in a row.

    Args:
        ids: (B, T).
        mask: (B, T) bool, True on tokens; None when all columns hold one.
        trainable: (B, T) bool, True where a token may be masked.
        block_size: S.
        corruptions: how many choices to make per row: consecutive rows here, B of them different.

    Returns:
        (B, T) bool.
    """
    tokens = torch.ones_like(trainable) if mask is None else mask
    seeds = derived_seeds(content_seeds(ids[::corruptions], tokens[::corruptions]), corruptions)
    blocks = tokens.unflatten(1, (-1, block_size)).any(-1).cumsum(1)
    probability = MIN_TIMESTEP + (1 - MIN_TIMESTEP) * uniform_noise(seeds, blocks, step=0)
    draws = uniform_noise(seeds, tokens.cumsum(1), step=1)
    return (draws < probability.repeat_interleave(block_size, dim=1)) & trainable


def expected_weight(items: torch.Tensor | int, weighting: LossWeighting, corruptions: int) -> torch.Tensor:
    """
    What the weights of masked positions are expected to sum to, of `items` trainable ones, `corruptions` times each.

    Each is masked with probability (0.001 + 1) / 2. Under "inverse_timestep" the masked share t of a block's tokens
    weighs 1 / t a piece: as much as the block has tokens, one for each of them.
    """
    share = (MIN_TIMESTEP + 1) / 2 if weighting == "mean" else 1.0
    # A Trainer on several devices of one process repeats the number for each.
    return torch.as_tensor(items).flatten()[0].clamp(min=1) * corruptions * share


def masked_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    timestep: torch.Tensor,
    weighting: LossWeighting = "mean",
    total_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Average the cross-entropy of masked positions.

    Args:
        logits: (M, V).
        targets: (M,) token ids.
        timestep: (M,) masked fraction of each position's block.
        weighting: "mean" counts every position alike (NVIDIA's objective); "inverse_timestep" divides each by its
            timestep, so that every block counts alike however much of it is masked (the 1 / t of masked diffusion's
            likelihood bound, Sahoo et al. 2024).
        total_weight: scalar, what to divide the weighted sum by; default the sum of the weights, for an average.

    Returns:
        Scalar float32 (float64 for float64); 0 (with gradient 0) where nothing is masked.
    """
    losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
    weights = torch.ones_like(losses) if weighting == "mean" else 1 / timestep.to(losses.dtype)
    if total_weight is None:
        total_weight = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (losses * weights).sum() / total_weight.to(losses.device)


__all__ = [
    "LossWeighting",
    "check_objective",
    "content_masked",
    "expected_weight",
    "masked_cross_entropy",
    "sample_masked",
]
