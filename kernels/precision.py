"""The dtype in which sums, exponentials and states are computed."""

import torch


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision in float32; float32 and float64 (a model after `double()`) as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["at_least_float32"]
