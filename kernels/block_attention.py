"""Attention of a chunk's queries over read-only context keys and the chunk's own keys.

    out = softmax( [Q Kc^T | Q Kb^T] * scale + mask ) [Vc ; Vb]

The context's keys and values are never copied next to the block's, so a denoiser pass over 16 tokens costs no copy
of a long context.

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), S chunk, L context, D head dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .backends import choose


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """
    Attend over context and block.

    Args:
        query: (B, Hq, S, D).
        key, value: (B, Hkv, S, D), the chunk's own; without a separate context also more columns than the query's.
        context_key, context_value: (B or B / n, Hkv, L, D), default no context; with fewer rows than the query,
            n consecutive query rows share one (the blocks of one training sequence).
        context_mask: bool, broadcastable to (B, 1, S, L), True where a query may look; default everywhere.
        block_mask: bool, broadcastable to (B, 1, S, S), likewise; not together with `causal`.
        causal: whether a query sees only itself and earlier columns of the chunk.
        scale: of the scores, default D ** -0.5.
        backend: who computes it, see `backends.py`; of torch's ways "sdpa", as "torch", leaves to it what it has a
            kernel for, "eager" computes the equation for everything.

    Returns:
        (B, S, Hq * D) in query's dtype; softmax in float32 at least.
    """
    if causal and block_mask is not None:
        raise ValueError("block_attention got both causal=True and a block_mask; give one of them")
    arguments = (query, key, value, context_key, context_value, None, context_mask, block_mask, causal, scale)
    kernel = choose("block_attention", "torch" if backend in ("sdpa", "eager") else backend, *arguments)
    if kernel is not None:
        return kernel(*arguments)
    own = (key, value, block_mask)
    parts = []
    if context_key is not None and context_value is not None and context_key.shape[2] > 0:
        parts.append((context_key, context_value, context_mask))
    # With a mask, torch may repeat all keys and values for the query heads that share them.
    repeats = block_mask is not None and key.shape[2] > query.shape[2] and query.device.type != "cpu"
    if parts or repeats or backend == "eager":
        if causal and query.shape[2] > 1:
            own = (
                key,
                value,
                torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril(),
            )
        out = block_attention_reference(query, [*parts, own], scale)
    else:
        out = F.scaled_dot_product_attention(query, *own, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def block_attention_reference(
    query: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    scale: float | None = None,
) -> torch.Tensor:
    """
    The equation above, the query heads of one key/value head folded into its rows: (B, Hq, S, D).

    `parts` are runs of columns, each its key and value, and its mask.
    """
    kv_heads, dtype = parts[0][0].shape[1], query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = (query * scale).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # (B, Hkv, Hq/Hkv * S, D)
    # Products of rows that share a context may lie in memory in another order, which only reshape puts right.
    scores = []
    for key, _, mask in parts:
        product = torch.matmul if len(key) == len(query) else _shared_matmul
        score = product(grouped, key.transpose(-1, -2)).reshape(*query.shape[:3], -1)  # (B, Hq, S, columns)
        scores.append(score if mask is None else score.masked_fill_(~mask, -torch.inf))
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    weights = weights.view(*grouped.shape[:3], -1)
    columns = [key.shape[2] for key, _, _ in parts]
    out = None
    for weight, (_, value, _) in zip(weights.split(columns, -1), parts, strict=True):
        product = torch.matmul if len(value) == len(query) else _shared_matmul
        out = product(weight, value) if out is None else out + product(weight, value)
    assert out is not None
    return out.reshape(query.shape)


def _shared_matmul(rows: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, M, X) @ (B / n, Hkv, X, Y) -> (B, Hkv, M, Y), without repeating the context for its n rows."""
    folded = rows.unflatten(0, (len(context), -1)).transpose(1, 2)
    product = folded.flatten(2, 3) @ context
    return product.unflatten(2, folded.shape[2:4]).transpose(1, 2).flatten(0, 1)
