"""RMS norm over all channels.

    y = weight * x / sqrt(mean(x^2) + eps)

Shapes: ... any leading ones, C channels.
"""

import torch
import torch.nn.functional as F

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
    return F.rms_norm(x, weight.shape, weight, eps)
