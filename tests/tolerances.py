"""How far results may be apart, by dtype, in one place; relative to the largest magnitude of what is expected."""

import torch

# float32 is the bound SPEC.md sets against NVIDIA's numbers; bfloat16 is one rounding of a float32 result, twice over.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}
# Gradients sum over many terms, in an order that differs.
GRADIENTS = 10.0


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, slack: float = 1.0
) -> None:
    """
    Compare, element by element, at a tolerance relative to the largest expected magnitude.

    Args:
        dtype: whose tolerance; default the less precise of the two tensors'.
        slack: how many times the tolerance is allowed.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if dtype is None:
        dtype = max(actual.dtype, expected.dtype, key=TOLERANCES.__getitem__)
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), "not finite"
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    allowed = slack * TOLERANCES[dtype]
    assert error <= allowed, f"relative error {error:.2e} exceeds {allowed:.0e} of {dtype}"
