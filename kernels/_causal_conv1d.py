"""What we use of causal-conv1d: the convolution of a chunk, and the step of one token.

Both sum in float32 and round once, as we do. What the package asks for, by its source of 1.7.0: filters of 2 to 4
taps; a state only for inputs whose channels lie together, of which there are a multiple of 8, at strides that are
multiples of 8; a state and a bias of the dtype of inputs and filters. The step writes into the state it is given, so
that it gets a copy unless that is asked for.

Shapes: B batch, T tokens, C channels, K kernel width. The package's own order is (B, C, T).
"""

from importlib import import_module
from typing import Any

import torch


def causal_conv_with_package(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    return_inputs: bool = False,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What [`causal_conv`] does, with its arguments: y, and the new state where a step is asked for it, else None."""
    package = import_module("causal_conv1d")
    bias = None if bias is None else bias.to(weight.dtype)
    batch, tokens, channels = x.shape
    if state is None:
        state = x.new_zeros(batch, weight.shape[1] - 1, channels)
    # Channels together in memory, each token's at a multiple of 16 bytes; a part of a projection may be so already.
    odd = any(each % 8 for each in (x.storage_offset(), *x.stride()[:2]))
    if x.stride(2) != 1 or x.stride(1) == 0 or odd:
        x = x.clone(memory_format=torch.contiguous_format)  # what is contiguous may begin at any place
    if tokens == 1 and ends is None:
        after = state.to(x.dtype, copy=not in_place).contiguous()
        y = package.causal_conv1d_update(x[:, 0], after.transpose(1, 2), weight, bias, activation=activation)
        return y[:, None], None if return_inputs else after
    before = state.to(x.dtype).contiguous().transpose(1, 2)
    y = package.causal_conv1d_fn(x.transpose(1, 2), weight, bias, initial_states=before, activation=activation)
    return y.transpose(1, 2), None


def causal_conv1d_cannot(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    *_: Any,
) -> str | None:
    """Why it cannot take these arguments of [`causal_conv`]; None if it can."""
    if x.dtype == torch.float64:
        return "computes in float32, x is torch.float64"
    if activation not in ("silu", "swish"):
        return f"knows the activation silu, not {activation!r}"
    if not 2 <= weight.shape[1] <= 4:
        return f"takes filters of 2 to 4 taps, these have {weight.shape[1]}"
    if x.shape[2] % 8:
        return f"wants channels in multiples of 8, these are {x.shape[2]}"
    if 0 in x.shape:
        return "needs at least one row and one token"
    return None


__all__ = ["causal_conv1d_cannot", "causal_conv_with_package"]
