"""The dtype in which sums, exponentials and states are computed."""

import torch
from torch._C._functorch import is_functorch_wrapped_tensor


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision in float32; float32 and float64 (a model after `double()`) as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def may_give_out(tensor: torch.Tensor) -> bool:
    """
    Whether torch's operations take `out=` here, to round to its dtype in the same kernel: not with gradients, nor
    under `torch.func`, nor in a program that is being compiled, which does so by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not is_functorch_wrapped_tensor(tensor)


__all__ = ["at_least_float32", "may_give_out"]
