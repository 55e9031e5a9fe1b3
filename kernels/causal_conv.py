"""Causal depthwise convolution over a short chunk, with state in and state out.

    y[t] = act( sum_k weight[:, k] * x[t - K + 1 + k] + bias ),     x[t < 0] taken from the state

Shapes: B batch, T tokens, C channels, K kernel width.
"""

import torch
import torch.nn.functional as F

from ..compat_twotower import ACT2FN
from .backends import choose


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Convolve each channel with its own causal filter.

    Args:
        x: (B, T, C) inputs; columns that hold no token must be zero.
        weight: (C, K) filters, the last tap meets the newest input.
        bias: (C,), default none.
        state: (B, K - 1, C) the inputs before `x`, default zeros.
        ends: (B,) for each row the column after its last token; default T for all. The new state ends there.
        activation: name in transformers' `ACT2FN`.
        backend: who computes it, see `backends.py`.

    Returns:
        y (B, T, C) in x's dtype (the sum is taken in float32 at least), and the new state (B, K - 1, C) in x's dtype.
    """
    taps = weight.shape[1]
    kernel = choose("causal_conv", backend, x, weight, bias, state, ends, activation)
    if kernel is not None:
        y, after = kernel(x, weight, bias, state, ends, activation)
        return y, conv_state(inputs_after_state(x, taps, state), taps, ends) if after is None else after
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = inputs_after_state(x, taps, state)  # (B, K - 1 + T, C)
    inputs, weight = padded.to(wide), weight.to(wide)
    y = inputs.new_zeros(()) if bias is None else bias.to(wide)
    if x.shape[1] == 1:
        y = y + (inputs * weight.T).sum(1, keepdim=True)
    else:
        for start, tap in enumerate(weight.unbind(1)):
            y = torch.addcmul(y, inputs[:, start : start + x.shape[1]], tap)
    # ACT2FN builds a module at every look-up.
    act = F.silu if activation == "silu" else ACT2FN[activation]
    return act(y).to(x.dtype), conv_state(padded, taps, ends)


def inputs_after_state(x: torch.Tensor, taps: int, state: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T, C) inputs behind the (B, K - 1, C) before them, default zeros: (B, K - 1 + T, C)."""
    if state is None:
        state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    return torch.cat([state.to(x.dtype), x], dim=1)


def conv_state(padded: torch.Tensor, taps: int, ends: torch.Tensor | None = None) -> torch.Tensor:
    """The state (B, K - 1, C) after each row's first `ends` (B,) of T inputs, default all: from (B, K - 1 + T, C)."""
    if ends is None:
        # Not a view, which would keep all T inputs alive.
        return padded[:, padded.shape[1] - (taps - 1) :].clone()
    columns = ends[:, None] + torch.arange(taps - 1, device=padded.device)
    return padded.gather(1, columns[..., None].expand(-1, -1, padded.shape[2]))


def inputs_before_blocks(x: torch.Tensor, taps: int, block_size: int) -> torch.Tensor:
    """The convolution state at each block's start, zeros before the first: (B, T, C) -> (B, T / S, K - 1, C)."""
    padded = inputs_after_state(x, taps)
    starts = torch.arange(0, x.shape[1], block_size, device=x.device)
    return padded[:, starts[:, None] + torch.arange(taps - 1, device=x.device)]
