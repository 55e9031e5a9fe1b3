"""Gated RMS norm over groups of channels, as Mamba-2 applies it to a scan's output.

    g = x * silu(gate);     y = weight * g / sqrt(mean_group(g^2) + eps)

Shapes: B batch, T tokens, C channels, in C / group_size groups.
"""

import torch
import torch.nn.functional as F

from .backends import choose
from .precision import at_least_float32
from .rms_norm import rms_norm_by_torch


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """
    Gate, then normalise each group of channels.

    Args:
        x: (B, T, C) scan output, or (B, T, heads, C / heads), however it lies in memory.
        gate: (B, T, C).
        weight: (C,).
        group_size: channels per group; divides C.
        eps: added to the mean square.
        backend: who computes it, see `backends.py`.

    Returns:
        (B, T, C) in gate's dtype. Normalised in float32 at least, rounded to gate's dtype before the weight, as
        NVIDIA's code does.
    """
    arguments = (x, gate, weight, group_size, eps)
    kernel = choose("gated_rms_norm", backend, *arguments)
    if kernel is not None:
        return kernel(*arguments)
    return gated_rms_norm_by_torch(*arguments)


def gated_rms_norm_by_torch(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float
) -> torch.Tensor:
    """The same with torch's own operations."""
    # With the gate first, the product lies in memory as it does, and needs no copy to be seen as groups.
    gated = F.silu(at_least_float32(gate)).view(x.shape) * x
    normed = rms_norm_by_torch(gated.view(-1, len(weight) // group_size, group_size), None, eps)
    return (weight.view(-1, group_size) * normed.to(gate.dtype)).view(gate.shape)
