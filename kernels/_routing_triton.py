"""What [`top_k_routing`] does as two Triton kernels: a logit per program, then a token's choice per program.

Products and sums are float64, as the reference's. Of many tokens the logits are a product for torch, in which weights
are read once for all of them.

Shapes: T tokens, H hidden size, E experts, K of them for each token.
"""

import torch
import torch.nn.functional as F

from ._triton import launched_beside, tl, triton

# The most tokens for which each logit is a program, and the most experts that are chosen from.
FEW_TOKENS, MOST_EXPERTS = 32, 1024
LEAST = torch.finfo(torch.float64).min


if triton is not None:

    @triton.jit
    def router_logit(x, weight, logits, H: tl.constexpr, H_TILE: tl.constexpr):
        """One token's logit of one expert."""
        token, expert, experts = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
        total = tl.zeros((H_TILE,), tl.float64)
        for first in range(0, H, H_TILE):
            h = first + tl.arange(0, H_TILE)
            x_here = tl.load(x + token * H + h, h < H, 0.0).to(tl.float64)
            total += x_here * tl.load(weight + expert * H + h, h < H, 0.0).to(tl.float64)
        tl.store(logits + token * experts + expert, tl.sum(total, 0))

    @triton.jit
    def choose_experts(
        logits,
        bias,
        weights,
        indices,
        E: tl.constexpr,
        K: tl.constexpr,
        FACTOR: tl.constexpr,
        LEAST: tl.constexpr,
        NORMALIZED: tl.constexpr,
        E_TILE: tl.constexpr,
        K_TILE: tl.constexpr,
    ):
        """One token's experts, the strongest first; of equals the one that comes first."""
        token = tl.program_id(0).to(tl.int64)
        e, k = tl.arange(0, E_TILE), tl.arange(0, K_TILE)
        score = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * E + e, e < E, 0.0)))
        choice = score + tl.load(bias + e, e < E, 0.0).to(tl.float64)
        # What is no number comes first, as in torch: next to it nothing would be larger, nor less. And whatever there
        # is comes before what was chosen and what is no expert, so that experts differ, and exist.
        choice = tl.where(choice == choice, tl.maximum(choice, LEAST), float("inf"))
        choice = tl.where(e < E, choice, float("-inf"))
        chosen = tl.zeros((K_TILE,), tl.float64)
        for place in tl.static_range(K):
            best = tl.argmax(choice, 0)
            tl.store(indices + token * K + place, best.to(tl.int64))
            chosen = tl.where(k == place, tl.sum(tl.where(e == best, score, 0.0), 0), chosen)
            choice = tl.where(e == best, float("-inf"), choice)
        if NORMALIZED:
            chosen = chosen / (tl.sum(chosen, 0) + 1e-20)
        tl.store(weights + token * K + k, (chosen * FACTOR).to(tl.float32), k < K)


def route_with_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    groups: int = 1,
    groups_kept: int = 1,
    normalized: bool = True,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What [`top_k_routing`] does, with its arguments."""
    (tokens, hidden), experts = x.shape, len(weight)
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    with launched_beside(x):
        if tokens <= FEW_TOKENS:
            logits = x.new_empty(tokens, experts, dtype=torch.float64)
            tile = min(2048, triton.next_power_of_2(hidden))
            router_logit[(experts, tokens)](
                x.contiguous(), weight.contiguous(), logits, H=hidden, H_TILE=tile, num_warps=4
            )
        else:
            logits = F.linear(x.double(), weight.double())
        choose_experts[(tokens,)](
            logits, bias.contiguous(), weights, indices,
            E=experts, K=top_k, FACTOR=float(factor), LEAST=LEAST, NORMALIZED=normalized,
            E_TILE=triton.next_power_of_2(experts), K_TILE=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return logits, weights, indices


def triton_cannot_choose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    groups: int = 1,
    groups_kept: int = 1,
    normalized: bool = True,
    factor: float = 1.0,
) -> str | None:
    """Why the kernels above cannot take these arguments of [`top_k_routing`]; None if they can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"gives weights in float32, x is {x.dtype}"
    if groups != groups_kept:
        return f"chooses among all experts, these come in {groups} groups of which {groups_kept} are kept"
    if len(weight) > MOST_EXPERTS:
        return f"chooses among at most {MOST_EXPERTS} experts, these are {len(weight)}"
    if not 1 <= top_k <= len(weight):
        return f"chooses 1 to {len(weight)} of so many experts, not {top_k}"
    if len(x) == 0:
        return "needs at least one token"
    return None


__all__ = ["route_with_triton", "triton_cannot_choose"]
