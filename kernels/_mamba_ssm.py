"""What we use of mamba-ssm's Triton kernels: the chunked scan, the step of one token, and RMS norms.

Differences from our torch code, as read in mamba-ssm 2.3.2 and seen in Triton's interpreter:

- The scan rounds the state it begins with, and each chunk's part of the state, to the dtype of C and x. A state of 1e3
  does not survive bfloat16, so the scan is handed float32 throughout.
- Its products name no precision, so that a GPU with TF32 multiplies float32 in TF32, with 10 bits: errors of 4e-4 of
  the largest y and state, emulated. The environment variable TRITON_F32_DEFAULT=ieee, set before Triton compiles,
  avoids it.
- The step takes no `dt_limit`, and fails without a `dt_bias`: finished step sizes are handed a bias of zeros. It
  writes into the state it is given, so that it gets a copy unless that is asked for. Its sums are float32.
- The gated norm multiplies by the weight before it rounds to bfloat16, we (and NVIDIA's code) after it.

Shapes: B batch, T tokens, H heads, P head dim, G groups, N state, C channels.
"""

from importlib import import_module
from typing import Any

import torch

# The widest row, in bytes, that the norms take.
NORM_BYTES = 65536


def scan_with_mamba_ssm(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = 128,
    return_state: bool = True,
    return_chunk_states: bool = False,
    dt_bias: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """What [`ssd_scan`] does, with its arguments, but of whole chunks' states: y and as asked the state."""
    combined = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # A power of two, as its kernels want it, of few values, since each is compiled and tuned for anew.
    length = min(max(16, 1 << (min(chunk_size, x.shape[1]) - 1).bit_length()), 256)
    x32, dt32, A32, B32, C32, D32 = (part.float() for part in (x, dt, A, B, C, D))
    before = None if state is None else state.float().contiguous()
    steps = {"dt_bias": dt_bias, "dt_softplus": dt_bias is not None}
    y, after = combined(
        x32, dt32, A32, B32, C32, length, D=D32, initial_states=before, return_final_states=True, **steps
    )
    return y.to(x.dtype), after if return_state else None, None


def step_with_mamba_ssm(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = 128,
    return_state: bool = True,
    return_chunk_states: bool = False,
    dt_bias: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """What [`ssd_scan`] does for one token, with its arguments: y and as asked the state."""
    update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    batch, _, heads, head_dim = x.shape
    states = B.shape[3]
    if state is None:
        after = x.new_zeros(batch, heads, head_dim, states, dtype=torch.float32)
    else:
        after = state.to(torch.float32, copy=not in_place)
    # Expanded, not repeated: by these strides of 0 it knows that a head has one decay and one step size.
    y = update(
        after,
        x[:, 0],
        dt[:, 0, :, None].expand(batch, heads, head_dim),
        A[:, None, None].expand(heads, head_dim, states),
        B[:, 0],
        C[:, 0],
        D=D[:, None].expand(heads, head_dim),
        dt_bias=(torch.zeros_like(A) if dt_bias is None else dt_bias)[:, None].expand(heads, head_dim),
        dt_softplus=dt_bias is not None,
    )
    return y[:, None], after if return_state else None, None


def gated_rms_norm_with_mamba_ssm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float
) -> torch.Tensor:
    """What [`gated_rms_norm`] does, with its arguments."""
    norm = import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
    # x may still be float32, and by heads, where the gate is neither.
    y = norm(x.reshape(gate.shape), weight, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)
    return y.to(gate.dtype)


def rms_norm_with_mamba_ssm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What [`rms_norm`] does, with its arguments."""
    return import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn(x, weight, None, eps=eps)


def mamba_ssm_cannot_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = 128,
    return_state: bool = True,
    return_chunk_states: bool = False,
    dt_bias: torch.Tensor | None = None,
    in_place: bool = False,
) -> str | None:
    """Why its scan or its step cannot take these arguments of [`ssd_scan`]; None if they can."""
    if x.dtype == torch.float64:
        return "computes in float32, x is torch.float64"
    if return_chunk_states:
        return "returns no states between chunks"
    if 0 in (x.shape[0], x.shape[1]):
        return "needs at least one row and one token"
    return None


def mamba_ssm_cannot_norm(x: torch.Tensor, *others: Any) -> str | None:
    """Why its norms cannot take these arguments of [`gated_rms_norm`] or [`rms_norm`]; None if they can."""
    if x.dtype == torch.float64:
        return "computes in float32, x is torch.float64"
    # Of a gated norm the group's channels, else all of them.
    channels = others[2] if len(others) == 4 else x.shape[-1]
    if channels * x.element_size() > NORM_BYTES:
        return f"norms at most {NORM_BYTES} bytes at once, these are {channels} channels of {x.element_size()} bytes"
    if x.numel() == 0:
        return "needs at least one row"
    return None


__all__ = [
    "gated_rms_norm_with_mamba_ssm",
    "mamba_ssm_cannot_norm",
    "mamba_ssm_cannot_scan",
    "rms_norm_with_mamba_ssm",
    "scan_with_mamba_ssm",
    "step_with_mamba_ssm",
]
