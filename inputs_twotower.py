"""What may be given to `forward` and `generate`: token ids and their mask, rows packed, and arguments by name.

Rows may be padded on either side, and are packed so that their tokens come first. Of arguments, transformers' own
models take any name and drop the unknown ones. Here a name must be known, so that a misspelled argument is not lost,
and an argument must be honoured, be without a meaning for every TwoTower, or be refused.

Shapes: B batch, T tokens, H hidden size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Without a meaning: there are neither positions nor segments to encode, and columns follow those of the cache.
MEANINGLESS = ("cache_position", "token_type_ids")

# What comes with several texts in a row.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

# Not supported, but for None and the value that says what is so anyway.
UNSUPPORTED: dict[str, Any] = {
    "output_attentions": False,
    "output_router_logits": False,
    "is_causal": True,
    **dict.fromkeys(PACKED),
}


class PackedTokens(NamedTuple):
    """Rows with their tokens first: `ids` (B, T); `counts` (B,) and `columns` (B, T), their origin, unless trivial."""

    ids: torch.Tensor
    counts: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens of each row."""
        return torch.full_like(self.ids[:, 0], self.ids.shape[1]) if self.counts is None else self.counts

    def mask(self) -> torch.Tensor | None:
        """(B, T) bool, True on tokens; None when all columns hold one."""
        if self.counts is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.counts[:, None]

    def pack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) from the columns the tokens came from."""
        if self.columns is None:
            return hidden_states
        return hidden_states.gather(1, self._places_in(hidden_states))

    def unpack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) back to the columns the tokens came from."""
        if self.columns is None:
            return hidden_states
        return torch.zeros_like(hidden_states).scatter(1, self._places_in(hidden_states), hidden_states)

    def _places_in(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`columns` for (B, T, H), which may be on another device than the ids."""
        assert self.columns is not None
        return self.columns.to(hidden_states.device)[..., None].expand_as(hidden_states)


def as_ids(name: str, value: Any) -> torch.Tensor:
    """Token ids as a tensor, from a list, say."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} is a {type(value).__name__} that makes no tensor ({error}); give token ids"
        ) from error


def check_ids(name: str, ids: Any) -> None:
    """
    Raise a ValueError that names what is no batch of token ids: (B, T) int64 or int32, what embeddings take; B >= 1.

    Whether they lie within the vocabulary is not looked at, which on an accelerator would wait for it.
    """
    if not isinstance(ids, torch.Tensor):
        raise _no_tensor(name, ids, "token ids")
    if ids.ndim != 2 or len(ids) == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected (batch, tokens) with at least one row")
    if ids.dtype not in (torch.int64, torch.int32) and ids.numel() > 0:  # tokenizers' empty texts are floats
        raise ValueError(f"{name} are {ids.dtype}; give token ids as torch.int64")


def _no_tensor(name: str, value: Any, content: str) -> ValueError:
    remedy = "unpack it, as model(**inputs)" if isinstance(value, Mapping) else f"give a tensor of {content}"
    return ValueError(f"{name} is a {type(value).__name__}; {remedy}")


def pack_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cached: int | None = None, holes: bool = False
) -> PackedTokens:
    """
    Move each row's tokens to the front.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), or (B, T + at least `cached`) of which the last T columns count: 1 on tokens, 0 on
            padding at either side. Default all ones.
        cached: tokens of the longest row of the cache the chunk continues; default no cache. With a cache, a row may
            have no token in this chunk.
        holes: allow padding between a row's tokens.

    Raises:
        ValueError: for a mask of another shape, with a hole, or without a cache with a row without tokens.
    """
    mask = check_attention_mask(input_ids, attention_mask, cached, holes)
    if mask is None:
        return PackedTokens(input_ids)
    columns = mask.int().argsort(dim=1, descending=True, stable=True)
    return PackedTokens(input_ids.gather(1, columns), mask.sum(1), columns)


def check_attention_mask(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cached: int | None = None,
    holes: bool = False,
) -> torch.Tensor | None:
    """
    The mask of the chunk's own columns, (B, T) bool, or None when all of them hold tokens; see [`pack_tokens`].

    `holes` allows padding between a row's tokens, as text has that continues a padded batch.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens)")
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise _no_tensor("attention_mask", attention_mask, "1 on tokens and 0 on padding")
    if attention_mask.ndim == 0:
        raise ValueError("attention_mask has shape (); give one of (batch, tokens)")
    if attention_mask.is_complex() or ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError("attention_mask holds other numbers than 1, on tokens, and 0, on padding")
    length, width = input_ids.shape[1], attention_mask.shape[-1]
    fits = width == length or (cached is not None and 0 < cached <= width - length)
    if attention_mask.shape != (len(input_ids), width) or not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids of shape {tuple(input_ids.shape)} "
            f"need a mask of that shape{f', or wider by the {cached} cached columns or more' if cached else ''}"
        )
    mask = attention_mask[:, width - length :].bool()
    if mask.all():
        return None
    runs = mask.int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1).int()).eq(1).sum(1)
    refused = runs == 0 if holes else runs > 1 if cached is not None else runs != 1
    if refused.any():
        row = int(refused.nonzero()[0])
        problem = "masks all of its tokens" if runs[row] == 0 else f"has holes: {mask[row].int().tolist()}"
        raise ValueError(f"row {row} of attention_mask {problem}; mask padding at the ends of a row only")
    return mask


def check_arguments(given: dict[str, Any]) -> None:
    """
    Refuse by name what a TwoTower cannot do.

    Raises:
        TypeError: for a name no transformers model knows, as Python does.
        ValueError: for what other models support.
    """
    for name, value in given.items():
        if name in MEANINGLESS:
            continue
        if name not in UNSUPPORTED:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not UNSUPPORTED[name]:
            if name in PACKED:
                raise ValueError(
                    f"{name} is not supported by a TwoTower: it says that a row holds several texts, as a trainer's "
                    "packing or padding_free makes them; give each text a row of its own"
                )
            raise ValueError(f"{name} is not supported by a TwoTower; leave it out")


def check_position_ids(position_ids: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """
    Accept positions, which have no effect, unless they would mean something else than one text per row.

    Args:
        position_ids: (B or 1, T).
        input_ids: (B, T).
        mask: (B, T) bool, True on tokens; None when all are.
    """
    if not isinstance(position_ids, torch.Tensor):
        raise _no_tensor("position_ids", position_ids, "positions")
    if position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected that of the tokens, "
            f"{tuple(input_ids.shape)}, or leave it out"
        )
    restarts = position_ids.diff(dim=1) <= 0
    if mask is not None:
        restarts = restarts & mask[:, 1:] & mask[:, :-1]
    if restarts.any():
        raise ValueError(
            "position_ids begin anew within a row: packed texts are not supported by a TwoTower, which would read "
            "them as one; give each text a row of its own"
        )


__all__ = [
    "PackedTokens",
    "as_ids",
    "check_arguments",
    "check_attention_mask",
    "check_ids",
    "check_position_ids",
    "pack_tokens",
]
