"""Padding on either side of a row, and rows packed so that their tokens come first.

Shapes: B batch, T tokens, H hidden size.
"""

from typing import NamedTuple

import torch


class PackedTokens(NamedTuple):
    """Rows with their tokens first: `ids` (B, T); `counts` (B,) and `columns` (B, T), their origin, unless trivial."""

    ids: torch.Tensor
    counts: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) back to the columns the tokens came from."""
        if self.columns is None:
            return hidden_states
        return torch.zeros_like(hidden_states).scatter(1, self.columns[..., None].expand_as(hidden_states), hidden_states)


def pack_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> PackedTokens:
    """
    Move each row's tokens to the front.

    Args:
        input_ids: (B, T).
        attention_mask: (B, >= T), its last T columns 1 on tokens and 0 on padding at either side; default all ones.

    Raises:
        ValueError: for a mask of another shape, with a hole, or with a row without tokens.
    """
    mask = check_attention_mask(input_ids, attention_mask)
    if mask is None:
        return PackedTokens(input_ids)
    counts = mask.sum(1)
    starts = mask.int().argmax(1)
    columns = (torch.arange(mask.shape[1], device=mask.device) + starts[:, None]) % mask.shape[1]
    return PackedTokens(input_ids.gather(1, columns), counts, columns)


def check_attention_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of the chunk's own columns, (B, T) bool, or None when all of them hold tokens."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens)")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != len(input_ids) or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids of shape {tuple(input_ids.shape)} "
            "need a mask of that shape, or wider by the cached columns"
        )
    mask = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :].bool()
    if mask.all():
        return None
    runs = mask.int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1).int()).eq(1).sum(1)
    if (runs != 1).any():
        row = int((runs != 1).nonzero()[0])
        problem = "masks all of its tokens" if runs[row] == 0 else f"has holes: {mask[row].int().tolist()}"
        raise ValueError(f"row {row} of attention_mask {problem}; mask padding at the ends of a row only")
    return mask


__all__ = ["PackedTokens", "check_attention_mask", "pack_tokens"]
