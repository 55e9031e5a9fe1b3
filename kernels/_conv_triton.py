"""What [`causal_conv`] does as one Triton kernel: the convolution, and what of the inputs is to be kept.

A thread has one channel of a run of one row's tokens. It reads their inputs once, as they lie, with the K - 1 before
them, of x or, before the chunk, of the state. Where all inputs are asked for, it writes them from what it has read;
else the programs of a row's first run also write the state, the K - 1 inputs before the row's end.

Sum and activation are float32, and y is rounded once, to x's dtype. Torch's own path on a GPU rounds the sum to x's
dtype before the activation and then again, so that in 16 bits it is the less exact of the two.

Shapes: B batch, T tokens, C channels, K kernel width.
"""

from typing import Any

import torch

from ._triton import launched_beside, tl, triton

# The widest filters; taps are unrolled.
MOST_TAPS = 8
# Tokens of a run, and how many runs a launch has at most.
RUN, MOST_RUNS = 8, 65535
# The activation's names in `ACT2FN`.
SILU = ("silu", "swish")


if triton is not None:

    @triton.jit
    def inputs_at(at, x, state, x_token, state_token, tokens, here, K: tl.constexpr, MAY_PRECEDE: tl.constexpr):
        """The inputs of column `at`: x's, behind them zeros, and before them the state's where these MAY_PRECEDE."""
        inputs = tl.load(x + at * x_token, here & (at >= 0) & (at < tokens), 0.0)
        if MAY_PRECEDE:
            before = tl.load(state + (at + K - 1) * state_token, here & (at < 0), 0.0)
            inputs = tl.where(at < 0, before.to(inputs.dtype), inputs)
        return inputs

    @triton.jit(do_not_specialize=["tokens"])
    def conv_kernel(
        x,
        weight,
        bias,
        state,
        ends,
        y,
        kept,
        tokens,
        x_row,
        x_token,
        state_row,
        state_token,
        kept_row,
        C: tl.constexpr,
        K: tl.constexpr,
        BIASED: tl.constexpr,
        SEEDED: tl.constexpr,
        ENDED: tl.constexpr,
        INPUTS: tl.constexpr,
        T_TILE: tl.constexpr,
        C_TILE: tl.constexpr,
    ):
        """`kept` becomes the new state (B, K - 1, C), or where INPUTS the inputs (B, K - 1 + T, C)."""
        row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = tl.program_id(2) * C_TILE + tl.arange(0, C_TILE)
        here = c < C
        # Of each channel the same: of masks with a scalar among them the interpreter of Triton 3.9 makes numbers.
        first = run.to(tl.int64) * T_TILE + tl.zeros((C_TILE,), tl.int64)
        x, state = x + row * x_row + c, state + row * state_row + c
        y, kept = y + row * tokens * C + c, kept + row * kept_row + c
        # 1. Everything is read before anything is written, so that reads wait for memory at once.
        taps, inputs = (), ()
        for tap in tl.static_range(K):
            taps += (tl.load(weight + c * K + tap, here, 0.0).to(tl.float32),)  # type: ignore[assignment]
        for column in tl.static_range(K - 1 + T_TILE):
            at = first - (K - 1) + column
            read = inputs_at(at, x, state, x_token, state_token, tokens, here, K, SEEDED and column < K - 1)
            inputs += (read,)  # type: ignore[assignment]
        start = tl.zeros((C_TILE,), tl.float32)
        if BIASED:
            start = tl.load(bias + c, here, 0.0).to(tl.float32)
        # 2. What is to be kept: the inputs, of those before the run only what precedes the chunk; or the state.
        if INPUTS:
            for column in tl.static_range(K - 1 + T_TILE):
                own = here & (first + column < K - 1 + tokens)
                if column < K - 1:
                    own = own & (first == 0)
                tl.store(kept + (first + column) * C, inputs[column], own)
        elif run == 0:
            end = first + tokens
            if ENDED:
                end = first + tl.load(ends + row)
            for column in tl.static_range(K - 1):
                at = end - (K - 1) + column
                read = inputs_at(at, x, state, x_token, state_token, tokens, here, K, SEEDED)
                tl.store(kept + column * C, read, here)
        # 3. The sum over taps and its activation.
        for t in tl.static_range(T_TILE):
            total = start
            for tap in tl.static_range(K):
                total += inputs[t + tap].to(tl.float32) * taps[tap]
            out = total / (1.0 + tl.exp(-total))
            tl.store(y + (first + t) * C, out.to(y.dtype.element_ty), here & (first + t < tokens))


def conv_with_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    return_inputs: bool = False,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`causal_conv`] does, with its arguments."""
    assert activation in SILU
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    # Tokens may lie apart, as parts of a projection do; a token's channels only together.
    x = x if x.stride(2) == 1 else x.contiguous()
    held = None if state is None or taps == 1 else state if state.stride(2) == 1 else state.contiguous()
    y = x.new_empty(batch, tokens, channels)
    # A program reads of the state what it overwrites, and each column before it writes to an earlier one.
    if in_place and held is not None and held.dtype == x.dtype and held.stride(1) == channels:
        kept = held
    else:
        kept = x.new_empty(batch, taps - 1 + (tokens if return_inputs else 0), channels)
    tiles = conv_tiles(tokens)
    grid = (batch, -(-tokens // tiles["T_TILE"]), -(-channels // tiles["C_TILE"]))
    if y.numel() > 0:
        # Pointers that a flag leaves unread are still to be some tensor's.
        with launched_beside(x):
            conv_kernel[grid](
                x, weight.contiguous(), weight if bias is None else bias.contiguous(), x if held is None else held,
                x if ends is None else ends.contiguous(), y, kept, tokens, x.stride(0), x.stride(1),
                0 if held is None else held.stride(0), 0 if held is None else held.stride(1), kept.stride(0),
                C=channels, K=taps, BIASED=bias is not None, SEEDED=held is not None,
                ENDED=ends is not None and not return_inputs, INPUTS=return_inputs, **tiles,
            )  # fmt: skip
    return y, kept


def conv_tiles(tokens: int) -> dict[str, int]:
    """Tile sizes, and warps of as many threads as a tile has channels: none waits for what another one has read."""
    return {"T_TILE": 1 if tokens == 1 else RUN, "C_TILE": 64, "num_warps": 2}


def triton_cannot_convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    *_: Any,
) -> str | None:
    """Why the kernel above cannot take these arguments of [`causal_conv`]; None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, x is {x.dtype}"
    if activation not in SILU:
        return f"knows the activation silu, not {activation!r}"
    if not 1 <= weight.shape[1] <= MOST_TAPS:
        return f"takes filters of 1 to {MOST_TAPS} taps, these have {weight.shape[1]}"
    if x.shape[1] < 1:
        return "needs at least one token"
    if x.shape[1] > RUN * MOST_RUNS:
        return f"takes at most {RUN * MOST_RUNS} tokens at once, these are {x.shape[1]}"
    return None


__all__ = ["conv_with_triton", "triton_cannot_convolve"]
