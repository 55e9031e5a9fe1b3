"""Causal depthwise convolution over a short chunk, with state in and state out.

    y[t] = act( sum_k weight[:, k] * x[t - K + 1 + k] + bias ),     x[t < 0] taken from the state

Shapes: B batch, T tokens, C channels, K kernel width.
"""

import torch
import torch.nn.functional as F

from ..compat_twotower import ACT2FN
from .backends import choose
from .precision import at_least_float32


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    return_inputs: bool = False,
    in_place: bool = False,
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
        return_inputs: return the inputs with those before them, from which [`conv_state`] cuts states, instead of one.
        in_place: write the new state over `state`, and return that; without inputs.
        backend: who computes it, see `backends.py`.

    Returns:
        y (B, T, C) in x's dtype (the sum is taken in float32 at least), and in x's dtype the new state (B, K - 1, C)
        or the inputs (B, K - 1 + T, C).
    """
    assert not in_place or (state is not None and not return_inputs)
    arguments = (x, weight, bias, state, ends, activation, return_inputs, in_place)
    kernel, after = choose("causal_conv", backend, *arguments), None
    if kernel is not None:
        y, after = kernel(*arguments)
    if kernel is None or after is None:
        padded = inputs_after_state(x, weight.shape[1], state)  # (B, K - 1 + T, C)
        if kernel is None:
            convolve = causal_conv_reference if x.device.type == "cpu" else _depthwise
            # ACT2FN builds a module at every look-up.
            act = F.silu if activation == "silu" else ACT2FN[activation]
            y = act(convolve(padded, weight, bias)).to(x.dtype)
        after = padded if return_inputs else conv_state(padded, weight.shape[1], ends)
    if in_place and state is not None and after is not state:
        after = state.copy_(after)
    return y, after


def causal_conv_reference(padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The sum above, tap by tap in float32 at least: (B, K - 1 + T, C) -> (B, T, C)."""
    tokens = padded.shape[1] - (weight.shape[1] - 1)
    y = at_least_float32(padded.new_zeros(len(weight)) if bias is None else bias)
    if tokens == 1:
        return y + (at_least_float32(padded) * weight.t()).sum(1, keepdim=True)
    # Channels lie side by side in memory, as in the inputs: else what follows takes three times as long.
    taps = weight.t().contiguous()
    # Of lower precision than `y`, inputs and taps are multiplied in its dtype.
    y = torch.addcmul(y, padded[:, :tokens], taps[0])
    for tap in range(1, len(taps)):
        y.addcmul_(padded[:, tap : tap + tokens], taps[tap])
    return y


def _depthwise(padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same as one kernel of torch's, which sums in float32 and rounds to the inputs' dtype."""
    return F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(1, 2)


def inputs_after_state(x: torch.Tensor, taps: int, state: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T, C) inputs behind the (B, K - 1, C) before them, default zeros: (B, K - 1 + T, C)."""
    if state is None:
        return F.pad(x, (0, 0, taps - 1, 0))
    return torch.cat([state.to(x.dtype), x], dim=1)


def conv_state(padded: torch.Tensor, taps: int, ends: torch.Tensor | None = None) -> torch.Tensor:
    """The state (B, K - 1, C) after each row's first `ends` (B,) of T inputs, default all: from (B, K - 1 + T, C)."""
    if ends is None:
        last = padded[:, padded.shape[1] - (taps - 1) :]
        # Of many inputs no view, which would keep all of them alive.
        return last.clone() if padded.shape[1] > 2 * taps else last
    columns = ends[:, None] + torch.arange(taps - 1, device=padded.device)
    return padded.gather(1, columns[..., None].expand(-1, -1, padded.shape[2]))


def inputs_before_blocks(x: torch.Tensor, taps: int, block_size: int) -> torch.Tensor:
    """The convolution state at each block's start, zeros before the first: (B, T, C) -> (B, T / S, K - 1, C)."""
    padded = inputs_after_state(x, taps)
    starts = torch.arange(0, x.shape[1], block_size, device=x.device)
    return padded[:, starts[:, None] + torch.arange(taps - 1, device=x.device)]
