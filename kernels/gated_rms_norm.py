"""Gated RMS norm over groups of channels, as Mamba-2 applies it to a scan's output.

    g = x * silu(gate);     y = weight * g / sqrt(mean_group(g^2) + eps)

Shapes: B batch, T tokens, C channels, in C / group_size groups.
"""

import torch
import torch.nn.functional as F

from .backends import choose
from .precision import at_least_float32


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
    # With the gate first, the product lies in memory as it does, and needs no copy to be seen as groups.
    gated = F.silu(at_least_float32(gate)).reshape(x.shape) * x
    normed = F.rms_norm(gated.reshape(-1, group_size), (group_size,), eps=eps)
    return weight * normed.reshape(gate.shape).to(gate.dtype)
