"""Attention of a chunk's queries over read-only context keys and the chunk's own keys.

    out = softmax( [Q Kc^T | Q Kb^T] * scale + mask ) [Vc ; Vb]

What a query may see is told by a length per row and by causality, not by a mask as wide as the context for every
query, and of a long context scores are held for a tile of columns at a time, under a running softmax. Two runs of
columns that were attended to apart, with outputs o1, o2 and logsumexps l1, l2 of their scores, are merged by

    out = o1 + (o2 - o1) * sigmoid(l2 - l1)

Query heads that share a key/value head are rows of one product, so keys and values are not repeated.

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), S chunk, L context, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import choose

# Up to so many columns, one call over copies of context and chunk is faster than two calls and a merge (on a CPU).
JOINED = 160
# Most scores that are held at a time: 128 MB in float32.
TILE_SCORES = 2**25

# By the queries' device, for how many columns.
Masks = dict[torch.device, tuple[int, torch.Tensor | None]]


class Columns(NamedTuple):
    """
    A run of columns, and what queries see of it.

    Args:
        key, value: (B or B / n, Hkv, columns, D); with fewer rows than the query, n consecutive query rows share one.
        lengths: (B,) how many of the first columns a row may see; None for all.
        mask: (B or B / n, columns) bool, the columns that hold tokens; None for all.
        causal: whether the chunk's own columns are among them, behind those `lengths`, or the last: then a query
            sees itself, too, and what is before it.
    """

    key: torch.Tensor
    value: torch.Tensor
    lengths: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    causal: bool = False

    def visible(self, query: torch.Tensor, first: int, end: int) -> torch.Tensor | None:
        """What queries see of some columns: bool, (B or 1, 1, S or 1, end - first); None for everything."""
        tokens, total = query.shape[2], self.key.shape[2]
        causal = self.causal and (tokens > 1 or self.lengths is not None)
        if self.lengths is None and self.mask is None and not causal:
            return None
        columns, visible = torch.arange(first, end, device=query.device), None
        if self.lengths is not None:
            ends = self.lengths.view(-1, 1, 1, 1)
            if tokens > 1 and causal:
                ends = ends + torch.arange(tokens, device=query.device)[:, None]
            visible = columns <= ends if causal else columns < ends
        elif causal:
            visible = columns <= torch.arange(total - tokens, total, device=query.device).view(1, 1, -1, 1)
        if self.mask is not None:
            mask = self.mask[:, None, None, first:end]
            if len(mask) != len(query):
                mask = mask.repeat_interleave(len(query) // len(mask), dim=0)
            visible = mask if visible is None else visible & mask
        return visible


def block_attention(
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
    masks: Masks | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """
    Attend over context and block.

    Args:
        query: (B, Hq, S, D).
        key, value: (B, Hkv, S, D), the chunk's own; None, of a causal chunk, where they stand among the context's
            columns, behind those a row may see, or the last.
        context_key, context_value: (B or B / n, Hkv, L, D), default no context; with fewer rows than the query,
            n consecutive query rows share one (the blocks of one training sequence).
        context_lengths: (B,) int, how many of the context's first columns a row may see; default all.
        context_mask: (B or B / n, L) bool, True on the context's columns that hold tokens; default all.
        block_mask: (B, S) bool, likewise of the chunk's.
        causal: whether a query sees only itself and earlier columns of the chunk.
        scale: of the scores, default D ** -0.5.
        masks: what queries see of all columns, by the device and how many these are, where an earlier call made one of
            the same lengths and masks as this; one that this call makes is added.
        backend: who computes it, see `backends.py`; of torch's ways "sdpa", as "torch", leaves to it what it has a
            kernel for, "eager" computes the equation for everything.

    Returns:
        (B, S, Hq * D) in query's dtype; softmax in float32 at least. Of a query that sees no column something finite.
    """
    within = key is None or value is None
    if within and not (causal and context_key is not None and context_key.shape[2] > 0):
        raise ValueError("block_attention got no key and value; leave them out of a causal chunk with a context only")
    context = (context_key, context_value, context_lengths, context_mask)
    arguments = (query, key, value, *context, block_mask, causal, scale)
    kernel = choose("block_attention", "torch" if backend in ("sdpa", "eager") else backend, *arguments)
    if kernel is not None:
        return kernel(*arguments)
    if backend != "eager" and within and query.shape[2] == 1 and context_key is not None:
        everything = context_lengths is None and context_mask is None and len(context_key) == len(query)
        # A step of autoregression is no more than this, and short enough for what else is asked here to be felt.
        if everything and context_value is not None:
            return _at_once(query, context_key, context_value, None, scale).view(len(query), 1, -1)
    runs = []
    if context_key is not None and context_value is not None and context_key.shape[2] > 0:
        runs.append(Columns(context_key, context_value, context_lengths, context_mask, within))
    if key is not None and value is not None:
        runs.append(Columns(key, value, None, block_mask, causal))
    if backend == "eager":
        return block_attention_reference(query, runs, scale).transpose(1, 2).flatten(2)
    return _by_torch(query, runs, scale, {} if masks is None else masks).transpose(1, 2).flatten(2)


def _by_torch(query: torch.Tensor, runs: Sequence[Columns], scale: float | None, masks: Masks) -> torch.Tensor:
    """With torch's kernels, where these neither repeat keys nor hold all scores of a long context."""
    run, tokens = runs[-1], query.shape[2]
    alone, total = len(runs) == 1, sum([each.key.shape[2] for each in runs])
    if len(runs[0].key) != len(query):
        return block_attention_reference(query, runs, scale)
    if total <= JOINED or (alone and (tokens == 1 or not run.causal)):
        key = run.key if alone else torch.cat([each.key for each in runs], dim=2)
        value = run.value if alone else torch.cat([each.value for each in runs], dim=2)
        # What is computed again has none of its first time's. Compilers find by themselves what is alike, and would
        # take what it is found by for constants.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _at_once(query, key, value, _visible(query, runs), scale)
        columns, mask = masks.get(query.device, (None, None))
        if columns != total:
            mask = _visible(query, runs)
            masks[query.device] = total, mask
        return _at_once(query, key, value, mask, scale)
    # In float32, kernels of other devices hold all scores where heads share keys.
    on_cpu = query.device.type == "cpu"
    if alone and total == tokens and run.mask is None and (on_cpu or query.element_size() == 2):
        return F.scaled_dot_product_attention(query, run.key, run.value, is_causal=True, scale=scale, enable_gqa=True)
    # In a causal run with holes a query may see nothing, of which torch's logsumexp is 0.
    holes = run.causal and run.mask is not None
    if on_cpu and run.key.shape[2] == tokens and not holes and not _wants_gradient(query, runs):
        return _by_flash_on_cpu(query, runs, scale)
    return block_attention_reference(query, runs, scale)


def _at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """All columns by torch's attention, query heads that share keys folded into rows where they see the same."""
    if mask is not None and mask.shape[2] > 1:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    out = F.scaled_dot_product_attention(_folded(query, key), key, value, mask, scale=scale)
    return out.reshape(query.shape)


def _by_flash_on_cpu(query: torch.Tensor, runs: Sequence[Columns], scale: float | None) -> torch.Tensor:
    """
    Each run by torch's flash attention for CPUs, which streams over columns itself, and merged.

    Without gradients, since torch has none of the logsumexps.
    """
    parts = [_flash_on_cpu(query, run, scale) for run in runs]
    out, sums = parts[0]
    for other, other_sums in parts[1:]:
        share = torch.sigmoid(other_sums - sums)[..., None]
        out = torch.lerp(out.to(share.dtype), other.to(share.dtype), share).to(query.dtype)
        assert len(parts) == 2, "a third part would need the sum of the first two"
    return out


def _flash_on_cpu(query: torch.Tensor, run: Columns, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Hq, S, D) and the logsumexps of scores (B, Hq, S)."""
    visible, bias = run._replace(causal=False).visible(query, 0, run.key.shape[2]), None
    if visible is not None:
        bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    # Places count in a causal chunk, so that its heads are not folded; its columns are few.
    rows = query if run.causal else _folded(query, run.key)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, run.key, run.value, is_causal=run.causal, attn_mask=bias, scale=scale
    )
    sums = sums.reshape(query.shape[:3])
    if visible is not None:
        # torch's logsumexp of nothing is 0.
        sums = sums.masked_fill(~visible.any(-1), torch.finfo(sums.dtype).min)
    return out.reshape(query.shape), sums


def block_attention_reference(
    query: torch.Tensor,
    runs: Sequence[Columns],
    scale: float | None = None,
    tile_scores: int = TILE_SCORES,
) -> torch.Tensor:
    """
    The equation above: (B, Hq, S, D).

    Where that would be more scores than `tile_scores`, in tiles of columns, at least one wide, of so many: of those
    before, each query keeps its largest score, the sum of its weights relative to that, and of these times the values.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = _folded(query * scale, runs[0].key)  # (B, Hkv, Hq/Hkv * S, D)
    columns = max(1, tile_scores // query.shape[:3].numel())
    if sum(run.key.shape[2] for run in runs) <= columns:
        return _untiled(query, grouped, runs)
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = torch.full((*grouped.shape[:3], 1), torch.finfo(wide).min, dtype=wide, device=query.device)
    total, out = torch.zeros_like(largest), torch.zeros(grouped.shape, dtype=wide, device=query.device)
    for run in runs:
        for first in range(0, run.key.shape[2], columns):
            end = min(first + columns, run.key.shape[2])
            weights = _scores(query, grouped, run, first, end).to(wide)
            before, largest = largest, torch.maximum(largest, weights.detach().amax(-1, keepdim=True))
            weights = weights.sub_(largest).exp_()
            decay = (before - largest).exp_()
            total = total * decay + weights.sum(-1, keepdim=True)
            out = out * decay + _product(weights.to(query.dtype), run.value[:, :, first:end])
    return (out / total).to(query.dtype).view(query.shape)


def _untiled(query: torch.Tensor, grouped: torch.Tensor, runs: Sequence[Columns]) -> torch.Tensor:
    scores = torch.cat([_scores(query, grouped, run, 0, run.key.shape[2]) for run in runs], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    parts = weights.split([run.key.shape[2] for run in runs], dim=-1)
    out = _product(parts[0], runs[0].value)
    for part, run in zip(parts[1:], runs[1:], strict=True):
        out = out + _product(part, run.value)
    return out.reshape(query.shape)


def _scores(query: torch.Tensor, grouped: torch.Tensor, run: Columns, first: int, end: int) -> torch.Tensor:
    """(B, Hkv, Hq/Hkv * S, end - first), the least number there is where a query may not look."""
    scores = _product(grouped, run.key[:, :, first:end].transpose(-1, -2))
    if (visible := run.visible(query, first, end)) is not None:
        # Not -inf, which less -inf is no number, as long as a query has seen nothing.
        least = torch.finfo(scores.dtype).min
        scores = scores.view(*query.shape[:3], -1).masked_fill_(~visible, least).view(scores.shape)
    return scores


def _product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, M, X) @ (B or B / n, Hkv, X, Y) -> (B, Hkv, M, Y), without repeating columns for n rows; contiguous."""
    if len(rows) == len(columns):
        return torch.matmul(rows, columns)
    folded = rows.unflatten(0, (len(columns), -1)).transpose(1, 2)
    product = folded.flatten(2, 3) @ columns
    return product.unflatten(2, folded.shape[2:4]).transpose(1, 2).flatten(0, 1).contiguous()


def _folded(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, Hq, S, D) -> (B, Hkv, Hq/Hkv * S, D)."""
    return query.reshape(len(query), key.shape[1], -1, query.shape[-1])


def _visible(query: torch.Tensor, runs: Sequence[Columns]) -> torch.Tensor | None:
    """What queries see of all columns: bool, (B or 1, 1, S or 1, columns); None for everything."""
    parts = [run.visible(query, 0, run.key.shape[2]) for run in runs]
    if len(runs) == 1 or all(part is None for part in parts):
        return parts[0]
    rows = max(len(part) for part in parts if part is not None)
    queries = max(part.shape[2] for part in parts if part is not None)
    everything = query.new_ones(1, dtype=torch.bool)
    sizes = [run.key.shape[2] for run in runs]
    filled = [everything if part is None else part for part in parts]
    return torch.cat([part.expand(rows, 1, queries, size) for part, size in zip(filled, sizes, strict=True)], dim=-1)


def _wants_gradient(query: torch.Tensor, runs: Sequence[Columns]) -> bool:
    tensors = [query, *(part for run in runs for part in (run.key, run.value))]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
