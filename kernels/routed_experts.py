"""A mixture of experts: each token through the few experts that were chosen for it, summed by weight.

    out[t] = sum_k weights[t, k] * down[e] act(up[e] x[t]),     e = indices[t, k]

Of a few tokens most of the work is to read the weights of those experts once. Tokens are therefore grouped by expert;
or, where that costs more than it saves, all experts compute all tokens, and most of what they compute weighs nothing.

Shapes: T tokens, K experts of each, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..compat_twotower import grouped_mm
from ._experts_triton import RELU2
from .backends import choose
from .precision import may_give_out

# On a CPU, fewer needless products, or fewer weights of all experts or copied ones, cost less than to sort tokens.
FEW_PRODUCTS, FEW_WEIGHTS = 2**20, 2**17
# On a GPU torch groups products in bfloat16; of other dtypes the host would wait to learn where each expert's tokens
# end, which takes longer than so many products (unmeasured), and cannot be recorded.
FEW_PRODUCTS_ON_A_GPU = 2**34


def routed_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    backend: str = "auto",
) -> torch.Tensor:
    """
    Send tokens through their experts.

    Args:
        x: (T, H).
        indices: (T, K) int64, of experts; those of a token differ.
        weights: (T, K) float32, or float64.
        up_proj: (E, I, H).
        down_proj: (E, H, I).
        act_fn: between the two, elementwise.
        backend: who computes it, see `backends.py`.

    Returns:
        (T, H) in the dtype of weights where tokens are grouped, whose sums are not rounded to x's yet, or x's.
    """
    arguments = (x, indices, weights, up_proj, down_proj, act_fn)
    kernel = choose("routed_experts", backend, *arguments)
    if kernel is not None:
        return kernel(*arguments)
    (tokens, chosen), size = indices.shape, up_proj[0].numel()
    if x.device.type == "cpu":
        if tokens == 1 and chosen * size < FEW_WEIGHTS:
            return copied_experts(*arguments)
        needless = tokens * (len(up_proj) - chosen) * size
        if tokens > 1 and len(up_proj) * size < FEW_WEIGHTS and needless < FEW_PRODUCTS:
            return all_experts(*arguments)
    elif x.dtype != torch.bfloat16 and tokens * up_proj.numel() < FEW_PRODUCTS_ON_A_GPU:
        return all_experts(*arguments)
    if x.dtype == torch.float64:  # which torch does not group
        return all_experts(*arguments)
    # Where the host may look, which waits for nobody on a CPU, weights need no filling up. A trace would keep it.
    odd = any(each % (16 // up_proj.element_size()) for each in up_proj.shape[1:])
    if (
        odd
        and x.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode())
        and not any(map(is_functorch_wrapped_tensor, arguments[:5]))
    ):
        return experts_in_turn(*arguments)
    return grouped_experts(*arguments)


def copied_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Of a lone token: the (K, I, H) and (K, H, I) of its experts alone; which they are, the host need not know."""
    chosen = indices.view(-1)
    up_proj, down_proj = up_proj.index_select(0, chosen), down_proj.index_select(0, chosen)
    activated = act_fn(F.linear(x, up_proj.flatten(0, 1)))
    outputs = torch.bmm(activated.view(up_proj.shape[0], 1, -1), down_proj.transpose(1, 2)).squeeze(1)
    return (weights @ outputs.to(weights.dtype)).to(x.dtype)


def all_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Every expert's output for every token, times its weight, which may be none."""
    shares = weights.new_zeros(len(weights), len(up_proj)).scatter(1, indices, weights)
    activated = act_fn(F.linear(x, up_proj.flatten(0, 1)))  # (T, E * I)
    by_expert = activated.unflatten(-1, (len(up_proj), -1)).transpose(0, 1)  # (E, T, I); of no token, too
    outputs = torch.bmm(by_expert, down_proj.transpose(1, 2))  # (E, T, H)
    # What an expert that was not chosen makes of a token may be no number.
    weighted = (outputs * shares.t()[..., None]).masked_fill_((shares == 0).t()[..., None], 0.0)
    return weighted.sum(0).to(x.dtype)


def experts_in_turn(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One expert after the other, of those that were chosen; the host reads which."""
    chosen, order = indices.flatten().sort()
    experts, counts = (each.tolist() for each in chosen.unique_consecutive(return_counts=True))
    out = weights.new_zeros(x.shape)
    for expert, places in zip(experts, order.split(counts), strict=True):
        tokens = places // indices.shape[1]
        outputs = F.linear(act_fn(F.linear(x.index_select(0, tokens), up_proj[expert])), down_proj[expert])
        out.index_add_(0, tokens, outputs.to(weights.dtype) * weights.flatten().index_select(0, places)[:, None])
    return out


def grouped_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Tokens sorted by expert, one product for all experts, and each token's outputs summed by weight."""
    size = x.shape[1]
    inner, outer = (-each % (16 // up_proj.element_size()) for each in up_proj.shape[1:])
    if inner or outer:  # the product wants rows of whole 16 bytes
        # Of what the inner ones are filled up with nothing comes: it meets zeros.
        x, up_proj = F.pad(x, (0, outer)), F.pad(up_proj, (0, outer, 0, inner))
        down_proj = F.pad(down_proj, (0, inner, 0, outer))
        return grouped_experts(x, indices, weights, up_proj, down_proj, act_fn)[:, :size]
    # A token's place among its K outputs, in the order of experts; and where each expert's tokens end.
    chosen, order = indices.flatten().sort()
    ends = torch._convert_indices_from_coo_to_csr(chosen, len(up_proj), out_int32=True)[1:]
    # A lone token's need no indices.
    lone, top_k = len(indices) == 1, indices.shape[1]
    grouped = x.expand(len(order), -1).contiguous() if lone else x.index_select(0, order // top_k)
    activated = grouped_mm(grouped, up_proj.transpose(1, 2), ends)
    module: Any = act_fn
    # Where nobody would miss a call of it.
    if type(module) is RELU2 and not (module._forward_hooks or module._forward_pre_hooks) and may_give_out(activated):
        activated = activated.relu_().square_()
    else:
        activated = act_fn(activated)
    outputs = grouped_mm(activated, down_proj.transpose(1, 2), ends)
    # Weights are of NVIDIA's precision, float32, so the outputs are summed in it.
    if x.device.type == "cpu":  # where many small products take longer than to add outputs where they belong
        outputs, shares = outputs.to(weights.dtype), weights.flatten().index_select(0, order)[:, None]
        weighted = outputs.mul_(shares) if may_give_out(outputs) and may_give_out(shares) else outputs * shares
        return weighted.new_zeros(x.shape).index_add(0, order // top_k, weighted)
    by_token = torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, indices.shape)  # (T, K, H)
    return torch.bmm(weights[:, None], by_token.to(weights.dtype))[:, 0]
