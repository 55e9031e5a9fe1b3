"""Which experts a token goes to, and with what weights.

    s = sigmoid(W x);     the K experts of largest s + b;     w = s / sum of those s * factor

Computed in float64, as NVIDIA's code does; the correction bias b decides, but does not weigh.

Shapes: T tokens, H hidden size, E experts, K of them for each token.
"""

import torch
import torch.nn.functional as F

from .backends import choose
from .precision import may_give_out


def top_k_routing(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    groups: int = 1,
    groups_kept: int = 1,
    normalized: bool = True,
    factor: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Choose experts.

    Args:
        x: (T, H).
        weight: (E, H).
        bias: (E,), added to scores for the choice alone.
        top_k: K.
        groups, groups_kept: experts come in so many groups, and are chosen from so many of them: those whose best two
            score highest. Experts of the others score 0, as in NVIDIA's code.
        normalized: whether a token's weights are divided by their sum.
        factor: what they are multiplied by.
        backend: who computes it, see `backends.py`.

    Returns:
        Logits (T, E) float64, weights (T, K) float32 (float64 for float64 tokens) and indices (T, K) int64, the K in
        whatever order.
    """
    arguments = (x, weight, bias, top_k, groups, groups_kept, normalized, factor)
    kernel = choose("top_k_routing", backend, *arguments)
    if kernel is not None:
        return kernel(*arguments)
    logits = F.linear(x.double(), weight.double())
    scores = logits.sigmoid()
    choice = scores + bias.double()
    if groups != groups_kept:
        choice = without_weak_groups(choice, groups, groups_kept)
    indices = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if normalized:
        total = weights.sum(-1, keepdim=True) + 1e-20
        if factor == 1 and may_give_out(weights):
            return logits, torch.div(weights, total, out=torch.empty_like(weights, dtype=dtype)), indices
        weights = weights / total
    if factor != 1:
        weights = weights * factor
    return logits, weights.to(dtype), indices


def without_weak_groups(choice: torch.Tensor, groups: int, groups_kept: int) -> torch.Tensor:
    """(T, E) scores, 0 outside of the groups whose best two experts score highest."""
    grouped = choice.unflatten(-1, (groups, -1))
    strongest = grouped.topk(2, dim=-1).values.sum(-1).topk(groups_kept, dim=-1, sorted=False).indices
    weak = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, strongest, False)
    return grouped.masked_fill(weak[..., None], 0.0).flatten(-2)
