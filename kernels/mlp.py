"""A layer of two products with an activation between them, as experts that every token goes through have.

    out = down act(up x)

Shapes: ... any leading ones, H hidden size, I intermediate size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .backends import choose


def mlp(
    x: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    backend: str = "auto",
) -> torch.Tensor:
    """
    Send tokens through both.

    Args:
        x: (..., H).
        up_proj: (I, H).
        down_proj: (H, I).
        act_fn: between the two, elementwise.
        backend: who computes it, see `backends.py`.

    Returns:
        (..., H) in x's dtype.
    """
    kernel = choose("mlp", backend, x, up_proj, down_proj, act_fn)
    if kernel is not None:
        return kernel(x, up_proj, down_proj, act_fn)
    return F.linear(act_fn(F.linear(x, up_proj)), down_proj)
