"""What [`block_attention`] does as two Triton kernels: runs of columns attended to apart, and their merge.

A few queries behind a long context are little work for each key that is read, and few rows: so a row's columns are
divided among programs, each of which goes over its own under a running softmax and leaves a weighted mean of values
and the logarithm of its sum of weights. The second kernel merges these as `block_attention.py` says. The block's own
columns are a part of their own. Query heads that share keys are rows of one product, so that keys are read once.

A part of which a row sees nothing leaves the logarithm -inf and is not read: rows of different lengths cost what they
hold, and which lengths they have only the device needs to know.

Shapes: B rows, Hq query heads, Hkv key/value heads, S queries, L columns of context, D head dim, W parts.
"""

from typing import Any

import torch

from ._triton import is_misread, launched_beside, tl, triton

# The least columns of a part of the context, and the most parts.
LEAST_SPAN = 256
MOST_PARTS = 64
# Programs that keep a large card busy.
PROGRAMS = 512


if triton is not None:

    @triton.jit
    def attend_to_columns(
        query,
        key,
        value,
        mask,
        starts,
        rows,
        row_mask,
        queries,
        means,
        log_sums,
        first,
        end,
        part,
        parts,
        key_row,
        key_head,
        key_column,
        value_row,
        value_head,
        value_column,
        mask_row,
        scale,
        limit,
        CAUSAL: tl.constexpr,
        ENDED: tl.constexpr,
        MASKED: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        D_TILE: tl.constexpr,
        COLUMN_TILE: tl.constexpr,
    ):
        """Rows of one key/value head over the columns from `first` up to `end`; see `attend` for the rest."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.arange(0, D_TILE)
        here_d = d < D
        own = tl.load(query + rows[:, None] * D + d[None, :], row_mask[:, None] & here_d[None, :], 0.0)
        length = limit
        if ENDED:
            length = tl.load(starts + row)
        # Behind the last column that each query sees.
        seen = length + tl.zeros((ROWS,), tl.int64)
        if CAUSAL:
            seen = length + queries + 1
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        out = tl.zeros((ROWS, D_TILE), tl.float32)
        end = tl.minimum(end, tl.max(tl.where(row_mask, seen, 0)))
        keys, values = key + row * key_row + head * key_head, value + row * value_row + head * value_head
        for at in range(first, end, COLUMN_TILE):
            column = at + tl.arange(0, COLUMN_TILE)
            here = column < end
            visible = here[None, :] & (column[None, :] < seen[:, None])
            if MASKED:
                visible = visible & (tl.load(mask + row * mask_row + column, here, 0) != 0)[None, :]
            held = here[:, None] & here_d[None, :]
            k = tl.load(keys + column[:, None].to(tl.int64) * key_column + d[None, :], held, 0.0)
            scores = tl.dot(own, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(visible, scores, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            # Of rows that have seen nothing yet, the largest score is no number to be subtracted.
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp(scores - base[:, None])
            decay = tl.exp(before - base)
            total = total * decay + tl.sum(weights, 1)
            v = tl.load(values + column[:, None].to(tl.int64) * value_column + d[None, :], held, 0.0)
            out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        base = tl.where(largest == float("-inf"), 0.0, largest)
        mean = out / tl.where(total == 0.0, 1.0, total)[:, None]
        place = rows * parts + part
        tl.store(means + place[:, None] * D + d[None, :], mean, row_mask[:, None] & here_d[None, :])
        tl.store(log_sums + place, tl.where(total == 0.0, float("-inf"), base + tl.log(total)), row_mask)

    @triton.jit(do_not_specialize=["tokens", "span", "context_parts", "context", "parts"])
    def attend(
        query,
        context_key,
        context_value,
        context_mask,
        lengths,
        key,
        value,
        block_mask,
        means,
        log_sums,
        tokens,
        span,
        context_parts,
        context,
        parts,
        context_key_row,
        context_key_head,
        context_key_column,
        context_value_row,
        context_value_head,
        context_value_column,
        context_mask_row,
        key_row,
        key_head,
        key_column,
        value_row,
        value_head,
        value_column,
        block_mask_row,
        scale,
        CAUSAL: tl.constexpr,
        WITHIN: tl.constexpr,
        ENDED: tl.constexpr,
        CONTEXT_MASKED: tl.constexpr,
        BLOCK_MASKED: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        D_TILE: tl.constexpr,
        COLUMN_TILE: tl.constexpr,
    ):
        """Each program: a row of the batch, a key/value head, a tile of its queries and a part of the columns."""
        tiles = tl.cdiv(GROUP * tokens, ROWS)
        part, tile = tl.program_id(2) // tiles, tl.program_id(2) % tiles
        folded = tile * ROWS + tl.arange(0, ROWS)
        row_mask = folded < GROUP * tokens
        first_row = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * GROUP * tokens
        rows, queries = first_row + folded, folded % tokens
        if part < context_parts:
            # Without lengths, a chunk that stands among the columns has the last ones.
            limit = context
            if WITHIN:
                limit = context - tokens
            attend_to_columns(
                query, context_key, context_value, context_mask, lengths, rows, row_mask, queries,
                means, log_sums, part * span, tl.minimum((part + 1) * span, context), part, parts,
                context_key_row, context_key_head, context_key_column,
                context_value_row, context_value_head, context_value_column, context_mask_row, scale, limit,
                WITHIN, ENDED, CONTEXT_MASKED, D, ROWS, D_TILE, COLUMN_TILE,
            )  # fmt: skip
        else:
            limit = tokens
            if CAUSAL:
                limit = 0
            attend_to_columns(
                query, key, value, block_mask, lengths, rows, row_mask, queries,
                means, log_sums, 0, tokens, part, parts,
                key_row, key_head, key_column, value_row, value_head, value_column, block_mask_row, scale, limit,
                CAUSAL, False, BLOCK_MASKED, D, ROWS, D_TILE, COLUMN_TILE,
            )  # fmt: skip

    @triton.jit(do_not_specialize=["parts"])
    def merge_parts(
        means,
        log_sums,
        out,
        parts,
        tokens,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        D_TILE: tl.constexpr,
        PARTS_TILE: tl.constexpr,
    ):
        """(B, Hq, S, W, D) -> (B, S, Hq, D); each program one query of one head."""
        place = tl.program_id(0).to(tl.int64)
        row, head, token = place // (HEADS * tokens), place // tokens % HEADS, place % tokens
        part, d = tl.arange(0, PARTS_TILE), tl.arange(0, D_TILE)
        sums = tl.load(log_sums + place * parts + part, part < parts, float("-inf"))
        largest = tl.max(sums, 0)
        weights = tl.exp(sums - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(weights, 0)
        held = (part < parts)[:, None] & (d < D)[None, :]
        each = tl.load(means + (place * parts + part[:, None]) * D + d[None, :], held, 0.0)
        mean = tl.sum(each * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        target = out + ((row * tokens + token) * HEADS + head) * D + d
        tl.store(target, mean.to(out.dtype.element_ty), d < D)


def attention_with_triton(
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
    """What [`block_attention`] does, with its arguments; of a query that sees no column zeros."""
    if is_misread(query):
        key, value, context_key, context_value = (
            part if part is None else part.float() for part in (key, value, context_key, context_value)
        )
        masks = (context_lengths, context_mask, block_mask)
        wide = (query.float(), key, value, context_key, context_value)
        return attention_with_triton(*wide, *masks, causal, scale).to(query.dtype)
    batch, heads, tokens, width = query.shape
    block = key is not None and value is not None
    context = 0 if context_key is None else context_key.shape[2]
    shared = key if context_key is None else context_key
    assert shared is not None, "block_attention asks for one of them"
    generation = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
    tiles = attention_tiles(heads // shared.shape[1] * tokens, width, query.dtype, generation)
    row_tiles = -(-heads // shared.shape[1] * tokens // tiles["ROWS"])
    parts = context_parts(context, batch * shared.shape[1] * row_tiles)
    span = 0 if parts == 0 else -(-context // parts)
    query = query.contiguous()
    # Pointers that a flag leaves unread are still to be some tensor's.
    k, v = (part if part is not None else query for part in (context_key, context_value))
    own_k, own_v = (part if part is not None else query for part in (key, value))
    lengths, mask, own_mask = (
        query if part is None else part if part.stride(-1) == 1 else part.contiguous()
        for part in (context_lengths, context_mask, block_mask)
    )
    everything = parts + block
    means = query.new_empty(batch, heads, tokens, everything, width, dtype=torch.float32)
    log_sums = query.new_empty(batch, heads, tokens, everything, dtype=torch.float32)
    out = query.new_empty(batch, tokens, heads * width)
    scale = width**-0.5 if scale is None else scale
    with launched_beside(query):
        attend[(batch, shared.shape[1], everything * row_tiles)](
            query, k, v, mask, lengths, own_k, own_v, own_mask, means, log_sums,
            tokens, span, parts, context, everything,
            *k.stride()[:3], *v.stride()[:3], mask.stride(0), *own_k.stride()[:3], *own_v.stride()[:3],
            own_mask.stride(0), scale,
            CAUSAL=causal, WITHIN=causal and not block, ENDED=context_lengths is not None,
            CONTEXT_MASKED=context_mask is not None, BLOCK_MASKED=block_mask is not None,
            GROUP=heads // shared.shape[1], D=width, **tiles,
        )  # fmt: skip
        merge_parts[(batch * heads * tokens,)](
            means, log_sums, out, everything, tokens, HEADS=heads, D=width, D_TILE=tiles["D_TILE"],
            PARTS_TILE=triton.next_power_of_2(everything), num_warps=4,
        )  # fmt: skip
    return out


def context_parts(context: int, programs: int) -> int:
    """Into how many parts a context is divided, of which each is work for so many programs."""
    if context == 0:
        return 0
    return max(1, min(MOST_PARTS, -(-context // LEAST_SPAN), -(-PROGRAMS // programs)))


def attention_tiles(rows: int, width: int, dtype: torch.dtype, generation: int = 9) -> dict[str, Any]:
    """
    Tile sizes, powers of two of at least 16, and warps, on cards of a generation (9: Hopper, 8: Ampere and Ada); none
    spills registers on either (`tests/kernels/test_attention_triton.py` compiles them).
    """
    wide = dtype == torch.float32
    row_tile = 16 if wide else min(64, max(16, triton.next_power_of_2(rows)))
    narrow = row_tile > 16 or generation < 9
    return {
        "ROWS": row_tile,
        "D_TILE": max(16, triton.next_power_of_2(width)),
        "COLUMN_TILE": 16 if wide else 32 if narrow else 64,
        "num_warps": 8 if row_tile == 64 else 4,
        "num_stages": 1 if wide else 2,
    }


def triton_cannot_attend(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    *_: Any,
) -> str | None:
    """Why the kernels above cannot take these arguments of [`block_attention`]; None if they can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the queries are {query.dtype}"
    return kernels_cannot_attend(query, key, value, context_key, context_value)


def kernels_cannot_attend(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
) -> str | None:
    """Why neither the kernels above nor flash-attn's can take such tensors; None if they can."""
    if query.shape[3] > 256:
        return f"takes heads of at most 256 dimensions, these have {query.shape[3]}"
    if 0 in query.shape:
        return "needs at least one row and one token"
    if context_key is not None and len(context_key) != len(query):
        return f"has {len(query)} rows share {len(context_key)} of context, which is for training alone"
    if any(part is not None and part.stride(3) != 1 for part in (key, value, context_key, context_value)):
        return "wants each head's dimensions together in memory"
    return None


__all__ = ["attention_with_triton", "kernels_cannot_attend", "triton_cannot_attend"]
