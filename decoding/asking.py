"""What logits processors and stopping criteria may be asked, and how a user says so.

transformers asks each of them once per new token, about the whole left-padded batch, and some count on it: a grammar's
matcher takes in one token per call, a list has one entry per row. Its own do not, nor do those that say so.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from ..compat_twotower import logits_process

# Processors of transformers that keep state.
STATEFUL = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class Stateless:
    """
    A logits processor or stopping criterion that is a function of its arguments alone.

    In every mode it is asked about one row at a time, (1, n) ids without padding, in any order, about drafts, too, and
    about what is then not kept. A class of one's own can say the same by an attribute `stateless = True`.

    Args:
        function: called with ids (1, n) and scores, (1, V) for a processor.
    """

    stateless = True

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        return self.function(input_ids, scores)


class PerRow:
    """
    A logits processor or stopping criterion that keeps state, one for every row.

    In every mode each is asked about its own row alone, (1, n) ids without padding, each call one token longer than
    the last, about tokens that are kept.

    Args:
        make: row of the batch, each of `num_return_sequences` counted -> a new processor or criterion.
    """

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def for_row(self, row: int, prompt_length: int) -> Any:
        """What a row, whose prompt has so many tokens, gets."""
        return self.make(row)


class RowsOwn:
    """What is asked about one row alone, each call one token longer than the last."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        return self.function(input_ids, scores)


def keeps_no_state(asked: Any) -> bool:
    """Whether a processor or criterion may be asked about any row at any time: transformers' own, or declared so."""
    if getattr(asked, "stateless", False) is True:
        return True
    kind = type(asked)
    return kind.__module__.partition(".")[0] == "transformers" and kind not in STATEFUL


def serves_all_rows(asked: Any) -> bool:
    """Whether one object may keep state about all rows of a batch, and so is asked about them together."""
    return not isinstance(asked, PerRow | RowsOwn) and not keeps_no_state(asked)


def is_plain(asked: Any) -> bool:
    """Whether a user's processor has no place for state: a function, or an object without attributes of its own."""
    if isinstance(asked, partial):
        return is_plain(asked.func)
    if isinstance(asked, MethodType | Stateless | PerRow | RowsOwn):
        return False
    return isinstance(asked, FunctionType | BuiltinFunctionType) or (hasattr(asked, "__dict__") and not vars(asked))


def asked_as(way: Any, asked: Any) -> Any:
    """
    A user's processor as a mode asks it, whose way with plain ones is [`Stateless`], [`RowsOwn`] or None.

    Where rows drift apart, a plain one can do without the calls of transformers: for `mask_diffusion` it keeps no
    state; in `self_speculative` it is nevertheless asked each row's calls in `ar`, and never about drafts.
    """
    return asked if way is None or keeps_no_state(asked) or not is_plain(asked) else way(asked)


def made_for(row: int, prompt_length: int, given: Sequence[Any], earlier: list[Any]) -> list[Any]:
    """
    Processors or criteria with what each [`PerRow`] makes for a row in its place.

    Args:
        row: of the batch.
        prompt_length: its tokens.
        given: by the user.
        earlier: what was made for other rows; grows.
    """
    made = []
    for asked in given:
        if isinstance(asked, PerRow):
            asked = asked.for_row(row, prompt_length)
            if not callable(asked):
                raise ValueError(f"PerRow made {asked!r} for row {row}, which cannot be called")
            if not keeps_no_state(asked):
                if any(asked is other for other in earlier):
                    raise ValueError(
                        f"PerRow made the same {name_of(asked)} for row {row} as for an earlier one; make a new one "
                        "for each row"
                    )
                earlier.append(asked)
                asked = RowsOwn(asked)
        made.append(asked)
    return made


def name_of(asked: Any) -> str:
    """The class of a processor or criterion, without what it is wrapped in."""
    return type(asked.function if isinstance(asked, Stateless | RowsOwn) else asked).__name__


__all__ = [
    "PerRow",
    "RowsOwn",
    "Stateless",
    "asked_as",
    "keeps_no_state",
    "made_for",
    "name_of",
    "serves_all_rows",
]
