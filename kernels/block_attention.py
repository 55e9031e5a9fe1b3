"""Attention of a chunk's queries over read-only context keys and the chunk's own keys.

    out = softmax( [Q Kc^T | Q Kb^T] * scale + mask ) [Vc ; Vb]

The context's keys and values are never copied next to the block's, so a denoiser pass over 16 tokens costs no copy
of a long context.

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), S chunk, L context, D head dim.
"""

import torch
import torch.nn.functional as F


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
) -> torch.Tensor:
    """
    Attend over context and block.

    Args:
        query: (B, Hq, S, D).
        key, value: (B, Hkv, S, D), the chunk's own.
        context_key, context_value: (B or B / n, Hkv, L, D), default no context; with fewer rows than the query,
            n consecutive query rows share one (the blocks of one training sequence).
        context_mask: bool, broadcastable to (B, 1, S, L), True where a query may look; default everywhere.
        block_mask: bool, broadcastable to (B, 1, S, S), likewise; not together with `causal`.
        causal: whether a query sees only itself and earlier columns of the chunk.
        scale: of the scores, default D ** -0.5.

    Returns:
        (B, S, Hq * D) in query's dtype; softmax in float32.
    """
    if causal and block_mask is not None:
        raise ValueError("block_attention got both causal=True and a block_mask; give one of them")
    if context_key is None or context_value is None or context_key.shape[2] == 0:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=block_mask, is_causal=causal, scale=scale, enable_gqa=True
        )
    else:
        if causal and query.shape[2] > 1:
            block_mask = _lower_triangle(query.shape[2], query.device)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = block_attention_reference(query, key, value, context_key, context_value, context_mask, block_mask, scale)
    return out.transpose(1, 2).flatten(2)


def block_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    context_mask: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The equation above, the query heads of one key/value head folded into its rows: (B, Hq, S, D)."""
    batch, heads, length, head_dim = query.shape
    context_length = context_key.shape[2]
    grouped = (query * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, Hkv, Hq/Hkv * S, D)
    context_scores = _shared_matmul(grouped, context_key.transpose(-1, -2))
    scores = torch.cat([context_scores, grouped @ key.transpose(-1, -2)], dim=-1)
    scores = scores.view(batch, heads, length, context_length + length)
    if context_mask is not None:
        scores[..., :context_length].masked_fill_(~context_mask, -torch.inf)
    if block_mask is not None:
        scores[..., context_length:].masked_fill_(~block_mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = weights.view(batch, key.shape[1], -1, context_length + length)
    out = _shared_matmul(weights[..., :context_length], context_value) + weights[..., context_length:] @ value
    return out.view(batch, heads, length, head_dim)


def _shared_matmul(rows: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, M, X) @ (B / n, Hkv, X, Y) -> (B, Hkv, M, Y), without repeating the context for its n rows."""
    if len(rows) == len(context):
        return rows @ context
    folded = rows.unflatten(0, (len(context), -1)).transpose(1, 2)
    product = folded.flatten(2, 3) @ context
    return product.unflatten(2, folded.shape[2:4]).transpose(1, 2).flatten(0, 1)


def _lower_triangle(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
