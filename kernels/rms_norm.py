"""RMS norm over all channels.

    y = weight * x / sqrt(mean(x^2) + eps)

Shapes: ... any leading ones, C channels.
"""

import torch
import torch.nn.functional as F

from .backends import choose

# Up to so many numbers, what a norm takes on a CPU is the number of its operations.
FEW = 2**13


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
    return rms_norm_by_torch(x, weight, eps)


def rms_norm_by_torch(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same with torch's own operations, without a `weight` by 1."""
    size = x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() > FEW:
        return F.rms_norm(x, (size,), weight, eps)
    # On a CPU that is seven operations, and layer norm is one: the mean of [x, -x] is 0, and its variance mean(x^2).
    mirrored = torch.native_layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[0]
    normed = mirrored.narrow(-1, 0, size)
    return normed if weight is None else normed * weight
