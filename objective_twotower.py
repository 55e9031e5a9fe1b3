"""The masked-diffusion training objective, as pure functions of tokens and hidden states.

Corruption and loss follow NVIDIA's Megatron-LM training: t ~ U[0.001, 1], every token masked with probability t,
mean cross-entropy over masked positions against the token at the same position. Here each block draws its own t.

Shapes: B batch, T tokens (a multiple of S), S block, M masked positions, V vocabulary.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

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


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, timestep: torch.Tensor, weighting: LossWeighting = "mean"
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

    Returns:
        Scalar float32 (float64 for float64); 0 (with gradient 0) where nothing is masked.
    """
    losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
    weights = torch.ones_like(losses) if weighting == "mean" else 1 / timestep.to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


__all__ = ["LossWeighting", "check_objective", "masked_cross_entropy", "sample_masked"]
