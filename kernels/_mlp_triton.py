"""What [`mlp`] does, for few tokens, as one Triton kernel, launched for each of the two products.

Of a few tokens the work is to read the weights. Each program reads a few rows of them for all tokens, and activates
what it has summed: a library's product of few rows divides the columns among programs and sums in another kernel, and
an activation of two operations is two more. Sums are float32; what is activated is rounded to x's dtype before and
after, as torch's is.

Shapes: T tokens, D columns and N rows of a matrix.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ..compat_twotower import ACT2FN
from ._triton import tl, triton

RELU2 = type(ACT2FN["relu2"])
# The most tokens: for more, weights are read again.
MOST_TOKENS = 64
# Programs that keep a large card busy.
PROGRAMS = 128


if triton is not None:

    @triton.jit
    def relu2(total, dtype: tl.constexpr):
        """max(total, 0) ** 2, of what is rounded as it would be between kernels."""
        total = tl.maximum(total.to(dtype).to(tl.float32), 0.0)
        return total * total

    @triton.jit(do_not_specialize=["tokens"])
    def few_rows_product(
        x,
        weight,
        out,
        tokens,
        D: tl.constexpr,
        N: tl.constexpr,
        ACTIVATED: tl.constexpr,
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
        D_TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """(T, D) by (N, D): (T, N)."""
        n, m = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE), tl.arange(0, M_TILE)
        here_m, here_n = m < tokens, n < N
        total = tl.zeros((M_TILE, N_TILE), tl.float32)
        for at in range(0, D, D_TILE):
            d = at + tl.arange(0, D_TILE)
            x_here = tl.load(x + m[:, None] * D + d[None, :], here_m[:, None] & (d < D)[None, :], 0.0)
            places = n.to(tl.int64)[:, None] * D + d[None, :]
            weight_here = tl.load(weight + places, here_n[:, None] & (d < D)[None, :], 0.0)
            total = tl.dot(x_here, tl.trans(weight_here), total, input_precision=PRECISION)
        if ACTIVATED:
            total = relu2(total, x.dtype.element_ty)
        tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), here_m[:, None] & here_n[None, :])


def mlp_with_triton(
    x: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What [`mlp`] does, with its arguments."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return _product(_product(x, up_proj, activated=True), down_proj)


def _product(x: torch.Tensor, weight: torch.Tensor, activated: bool = False) -> torch.Tensor:
    """(..., D) by (N, D): (..., N)."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, columns = weight.shape
    out, tokens = x.new_empty(*x.shape[:-1], rows), x.numel() // columns
    tiles = product_tiles(tokens, rows, x.dtype)
    few_rows_product[(triton.cdiv(rows, tiles["N_TILE"]),)](
        x, weight, out, tokens, D=columns, N=rows, ACTIVATED=activated, **tiles
    )
    return out


def product_tiles(tokens: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes, powers of two of at least 16, and warps."""
    row_tile = max(16, triton.next_power_of_2(tokens))
    if dtype == torch.float32:
        return {"M_TILE": row_tile, "N_TILE": 16, "D_TILE": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
    column_tile = 32 if rows >= 32 * PROGRAMS else 16
    tiles = {"M_TILE": row_tile, "N_TILE": column_tile, "D_TILE": 64 if row_tile == 64 else 128, "PRECISION": "tf32"}
    return tiles | {"num_warps": 4, "num_stages": 4}


def unusual_weights(
    x: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]
) -> str | None:
    """What of weights and activation our kernels, of this layer and of experts, cannot take; None if nothing."""
    if x.dtype != up_proj.dtype or x.dtype != down_proj.dtype:
        return f"wants tokens in the weights' dtype, {up_proj.dtype}, x is {x.dtype}"
    if not all(type(weight) in (torch.Tensor, torch.nn.Parameter) for weight in (up_proj, down_proj)):
        return f"reads plain weights, these are {type(up_proj).__name__} and {type(down_proj).__name__}"
    if not isinstance(act_fn, RELU2):
        return f"squares what is positive (relu2), not {type(act_fn).__name__}"
    return None


def triton_cannot_multiply(
    x: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> str | None:
    """Why the kernel above cannot take these arguments of [`mlp`]; None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, x is {x.dtype}"
    if obstacle := unusual_weights(x, up_proj, down_proj, act_fn):
        return obstacle
    tokens = x.numel() // x.shape[-1]
    if not 0 < tokens <= MOST_TOKENS:
        return f"takes 1 to {MOST_TOKENS} tokens, these are {tokens}"
    return None


__all__ = ["mlp_with_triton", "triton_cannot_multiply", "unusual_weights"]
