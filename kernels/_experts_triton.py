"""What [`routed_experts`] does, for few tokens, as Triton kernels that read the weights of chosen experts once.

    1. which of the T * K pairs of a token and an expert are an expert's (of a lone token each is its own)
    2. hidden[pair] = act(up[e] x[token])
    3. outputs[pair] = down[e] hidden[pair]
    4. out[token] = sum_k weights[token, k] outputs[token, k]

A program of 2 and 3 has one expert and a tile of its rows of weights, and goes over the expert's pairs in tiles of
rows; that of an expert which nobody chose ends at once. The host knows nothing of who chose what. Each sum is of one
program, in one order. Sums are float32; what is activated is rounded to x's dtype before and after, as torch's is.

Shapes: T tokens, K experts of each, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..compat_twotower import ACT2FN
from ._triton import is_misread, launched_beside, tl, triton

RELU2 = type(ACT2FN["relu2"])
# The most pairs that a program looks through; of more tokens some at a time.
MOST_PAIRS = 8192


if triton is not None:

    @triton.jit(do_not_specialize=["count"])
    def list_pairs(indices, pairs, counts, count, TILE: tl.constexpr):
        """By expert: which pairs are its, (E, T * K), and how many, (E,)."""
        expert = tl.program_id(0)
        pair = tl.arange(0, TILE)
        own = tl.load(indices + pair, pair < count, -1) == expert
        place = tl.cumsum(own.to(tl.int32), 0) - 1
        tl.store(pairs + expert.to(tl.int64) * count + place, pair, own)
        tl.store(counts + expert, tl.sum(own.to(tl.int32), 0))

    @triton.jit(do_not_specialize=["count"])
    def expert_product(
        x,
        weight,
        indices,
        pairs,
        counts,
        out,
        count,
        D: tl.constexpr,
        N: tl.constexpr,
        PAIRS_OF_ROW: tl.constexpr,
        ACTIVATED: tl.constexpr,
        LONE: tl.constexpr,
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
        D_TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """(rows, D) by the (N, D) of each pair's expert: (T * K, N); a row of x is so many pairs'."""
        n = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
        m = tl.arange(0, M_TILE)
        if LONE:
            expert, own = tl.load(indices + tl.program_id(1)).to(tl.int64), 1
        else:
            expert, own = tl.program_id(1).to(tl.int64), tl.load(counts + tl.program_id(1))
            pairs += expert * count
        weight += expert * N * D
        for first in range(0, own, M_TILE):
            here = first + m < own
            if LONE:
                pair = tl.program_id(1) + m
            else:
                pair = tl.load(pairs + first + m, here, 0)
            row = pair // PAIRS_OF_ROW  # of so few pairs that places fit 32 bits
            total = tl.zeros((M_TILE, N_TILE), tl.float32)
            for at in range(0, D, D_TILE):
                d = at + tl.arange(0, D_TILE)
                x_here = tl.load(x + row[:, None] * D + d[None, :], here[:, None] & (d < D)[None, :], 0.0)
                held = (n < N)[:, None] & (d < D)[None, :]
                weight_here = tl.load(weight + n[:, None] * D + d[None, :], held, 0.0)
                total = tl.dot(x_here, tl.trans(weight_here), total, input_precision=PRECISION)
            if ACTIVATED:
                total = total.to(x.dtype.element_ty).to(tl.float32)
                total = tl.where(total < 0.0, 0.0, total)  # a maximum on a GPU makes 0 of what is no number
                total = total * total
            place = pair[:, None] * N + n[None, :]
            tl.store(out + place, total.to(out.dtype.element_ty), here[:, None] & (n < N)[None, :])

    @triton.jit
    def sum_pairs(outputs, weights, out, H: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE,), tl.float32)
        for k in tl.static_range(K):
            total += tl.load(weights + token * K + k) * tl.load(outputs + (token * K + k) * H + h, h < H, 0.0)
        tl.store(out + token * H + h, total, h < H)


def experts_with_triton(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What [`routed_experts`] does, with its arguments: (T, H) float32."""
    if is_misread(x):
        return experts_with_triton(x.float(), indices, weights, up_proj.float(), down_proj.float(), act_fn)
    (tokens, chosen), (experts, inner, hidden) = indices.shape, up_proj.shape
    most = MOST_PAIRS // chosen
    if tokens > most:
        runs = [slice(first, first + most) for first in range(0, tokens, most)]
        outs = [experts_with_triton(x[run], indices[run], weights[run], up_proj, down_proj, act_fn) for run in runs]
        return torch.cat(outs)
    count, lone = tokens * chosen, tokens == 1
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
    up_proj, down_proj = up_proj.contiguous(), down_proj.contiguous()
    activated = x.new_empty(count, inner)
    outputs, out = x.new_empty(count, hidden, dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)
    pairs = counts = indices
    tiles = expert_tiles(count / experts, x.dtype)
    slots, options = chosen if lone else experts, {"LONE": lone, **tiles}
    with launched_beside(x):
        if not lone:
            pairs, counts = (indices.new_empty(experts, size, dtype=torch.int32) for size in (count, 1))
            list_pairs[(experts,)](indices, pairs, counts, count, TILE=triton.next_power_of_2(count), num_warps=4)
        expert_product[(triton.cdiv(inner, tiles["N_TILE"]), slots)](
            x, up_proj, indices, pairs, counts, activated, count,
            D=hidden, N=inner, PAIRS_OF_ROW=chosen, ACTIVATED=True, **options,
        )  # fmt: skip
        expert_product[(triton.cdiv(hidden, tiles["N_TILE"]), slots)](
            activated, down_proj, indices, pairs, counts, outputs, count,
            D=inner, N=hidden, PAIRS_OF_ROW=1, ACTIVATED=False, **options,
        )  # fmt: skip
        tile = min(512, triton.next_power_of_2(hidden))
        sum_pairs[(tokens, triton.cdiv(hidden, tile))](
            outputs, weights, out, H=hidden, K=chosen, TILE=tile, num_warps=4
        )
    return out


def expert_tiles(pairs_of_expert: float, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes, powers of two of at least 16, and warps, by how many pairs an expert has on average."""
    if dtype == torch.float32:
        return {"M_TILE": 16, "N_TILE": 16, "D_TILE": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
    return {
        "M_TILE": 16 if pairs_of_expert <= 8 else 32,
        "N_TILE": 32,
        "D_TILE": 128,
        "PRECISION": "tf32",
        "num_warps": 4,
        "num_stages": 4,
    }


def triton_cannot_route(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> str | None:
    """Why the kernels above cannot take these arguments of [`routed_experts`]; None if they can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weights.dtype != torch.float32:
        return f"computes in float32, x is {x.dtype}, weights are {weights.dtype}"
    if x.dtype != up_proj.dtype or x.dtype != down_proj.dtype:
        return f"wants tokens in the weights' dtype, {up_proj.dtype}, x is {x.dtype}"
    if not all(type(weight) in (torch.Tensor, torch.nn.Parameter) for weight in (up_proj, down_proj)):
        return f"reads plain weights, these are {type(up_proj).__name__} and {type(down_proj).__name__}"
    if type(act_fn) is not RELU2:
        return f"squares what is positive (relu2), not {type(act_fn).__name__}"
    if not 0 < indices.shape[1] <= MOST_PAIRS or len(x) == 0:
        return f"takes at least one token of 1 to {MOST_PAIRS} experts, indices have the shape {tuple(indices.shape)}"
    return None


__all__ = ["experts_with_triton", "triton_cannot_route"]
