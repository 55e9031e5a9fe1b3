"""Gated RMS norm over groups of channels, as Mamba-2 applies it to a scan's output.

    g = x * silu(gate);     y = weight * g / sqrt(mean_group(g^2) + eps)

Shapes: B batch, T tokens, C channels, in C / group_size groups.
"""

import torch
import torch.nn.functional as F

from .backends import choose


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """
    Gate, then normalise each group of channels.

    Args:
        x: (B, T, C) scan output.
        gate: (B, T, C).
        weight: (C,).
        group_size: channels per group; divides C.
        eps: added to the mean square.
        backend: who computes it, see `backends.py`.

    Returns:
        (B, T, C) in x's dtype. Normalised in float32 at least, rounded to x's dtype before the weight, as NVIDIA's
        code does.
    """
    kernel = choose("gated_rms_norm", backend, x, gate, weight, group_size, eps)
    if kernel is not None:
        return kernel(x, gate, weight, group_size, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(wide) * F.silu(gate.to(wide))
    grouped = gated.reshape(-1, group_size)
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return weight * normed.view(x.shape).to(x.dtype)
