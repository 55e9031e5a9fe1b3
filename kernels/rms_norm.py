"""RMS norm over all channels.

    y = weight * x / sqrt(mean(x^2) + eps)

Shapes: ... any leading ones, C channels.
"""

import torch

from .backends import choose


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
    """
    Normalise the last dimension.

    Args:
        x: (..., C).
        weight: (C,).
        eps: added to the mean square.
        backend: who computes it, see `backends.py`.

    Returns:
        (..., C) in x's dtype; computed in float32 at least.
    """
    kernel = choose("rms_norm", backend, x, weight, eps)
    if kernel is not None:
        return kernel(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = x.to(wide)
    normed = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide) * normed).to(x.dtype)
