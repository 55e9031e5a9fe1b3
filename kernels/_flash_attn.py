"""What we use of flash-attn: attention over the cache, whose columns are only read, to a length of each row's own.

The block is not written behind the context, as `flash_attn_with_kvcache` offers to, since the denoiser must not write
to what the context tower holds. Instead context and block are attended to in two calls, and their softmaxes joined by
their logarithms of sums e:

    out = sigmoid(e_context - e_block) out_context + sigmoid(e_block - e_context) out_block

For a row without any context the package returns e = +inf where -inf is meant (`softmax.h` of 2.8.3), which is put
right. A causal chunk whose keys are in the cache already is one call: the package's causal mask ends with each row's
last column, "aligned to the bottom right corner". It knows no other masks, so that a block with one is attended to in
torch, in float32, and only its context by the package.

Shapes: B batch, Hq query heads, Hkv key/value heads, S chunk, L context, D head dim. The package has (B, S, H, D).
"""

from importlib import import_module

import torch

from ._attention_triton import kernels_cannot_attend


def attention_with_flash_attn(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    context_lengths: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """
    What [`block_attention`] does, with its arguments; those that differ or are new:

    Args:
        key, value: (B, Hkv, S, D), or None of a causal chunk whose columns stand in the context, behind those that
            `context_lengths` counts, or as the last.
        context_lengths: (B,) how many of the context's columns each row has, from the first; default all.
        block_mask: (B, S) bool, the chunk's columns that hold tokens; not of a causal chunk.

    Returns:
        (B, S, Hq * D) in query's dtype. A query that may see nothing at all gets zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key is None or value is None:
        assert context_key is not None and context_value is not None
        ends = None if context_lengths is None else context_lengths + query.shape[2]
        return _attend(query, context_key, context_value, ends, causal, scale)[0].flatten(2)
    if block_mask is None:
        out, log_sums = _attend(query, key, value, None, causal, scale)
    else:
        out, log_sums = _attend_in_torch(query, key, value, block_mask, scale)
    if context_key is not None and context_value is not None and context_key.shape[2] > 0:
        before, log_sums_before = _attend(query, context_key, context_value, context_lengths, False, scale)
        share = torch.sigmoid(log_sums_before - log_sums).transpose(1, 2)[..., None]  # (B, S, Hq, 1)
        # Both may be without columns, and inf - inf is no number.
        share = share.nan_to_num(0.0)
        out = share * before.float() + (1 - share) * out.float()
    return out.to(query.dtype).flatten(2)


def _attend_in_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_attend` over the few columns of a block with a mask, in float32."""
    grouped = (query.float() * scale).unflatten(1, (key.shape[1], -1))  # (B, Hkv, Hq / Hkv, S, D)
    scores = (grouped @ key.float().mT[:, :, None]).flatten(1, 2)  # (B, Hq, S, S)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    log_sums = scores.logsumexp(-1)
    weights = (scores - log_sums[..., None]).exp().nan_to_num(0.0).unflatten(1, grouped.shape[1:3])
    return (weights @ value.float()[:, :, None]).flatten(1, 2).transpose(1, 2), log_sums


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the package: (B, S, Hq, D), and (B, Hq, S) the logarithms of the sums, -inf where there are none."""
    attend = import_module("flash_attn").flash_attn_with_kvcache
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    seqlens = None if lengths is None else lengths.to(torch.int32)
    out, log_sums = attend(
        query, key, value, cache_seqlens=seqlens, softmax_scale=scale, causal=causal, return_softmax_lse=True
    )
    # No sum of these is infinite but that of no columns.
    return out, log_sums.masked_fill(log_sums == torch.inf, -torch.inf)


def flash_attn_cannot(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    context_lengths: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> str | None:
    """Why it cannot take these arguments of [`block_attention`]; None if it can."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, the queries are {query.dtype}"
    if context_mask is not None or (causal and block_mask is not None):
        return "takes rows that differ in length by their lengths, not by a mask"
    return kernels_cannot_attend(query, key, value, context_key, context_value)


__all__ = ["attention_with_flash_attn", "flash_attn_cannot"]
