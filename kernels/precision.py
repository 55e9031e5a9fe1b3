"""The dtype in which sums, exponentials and states are computed."""

import torch


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision in float32; float32 and float64 (a model after `double()`) as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


__all__ = ["at_least_float32"]
