"""Triton, where it is installed; None where it is not, and our kernels are then not defined."""

from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def is_misread(tensor: torch.Tensor) -> bool:
    """Whether `tl.dot` takes a tensor's bits for integers, as Triton's interpreter does those of bfloat16."""
    return tensor.dtype == torch.bfloat16 and not tensor.is_cuda


def launched_beside(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; within, that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


__all__ = ["is_misread", "launched_beside", "tl", "triton"]
