"""Arguments that callers of any transformers model may pass to its `forward`.

transformers' own models take any name and drop the unknown ones. Here a name must be known, so that a misspelled
argument is not lost, and an argument must be honoured, be without a meaning for every TwoTower, or be refused.

Shapes: B batch, T tokens.
"""

from typing import Any

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


__all__ = ["check_arguments", "check_position_ids"]
