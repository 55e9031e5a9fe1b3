"""Triton, where it is installed; None where it is not, and our kernels are then not defined."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["tl", "triton"]
