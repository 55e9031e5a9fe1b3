"""Choosing tokens: logits processors per row and position, and noise that depends on seed and position alone.

A token is drawn by the Gumbel-max trick: the argmax of scores plus Gumbel noise is a sample of their softmax. The
noise of a token is a hash of its row's seed, its position in the row's text and its id, so what a row draws depends
neither on the rest of the batch nor on the order in which positions are decided.

Shapes: R rows, S positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from ..compat_twotower import logits_process
from .asking import keeps_no_state, name_of, serves_all_rows

# Processors of transformers that look at a position's scores only: all positions go through them at once.
ELEMENTWISE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)
BY_ITSELF = "every row of a batch is processed by itself"  # why an answer of another shape is refused
_GOLDEN_GAMMA = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed number
_UNIFORM_STREAM = 0x5851F42D4C957F2D


class RowLogitsProcessors:
    """
    The logits processors of a batch.

    Args:
        build: row index -> the processors `generate` would make for that row alone. All rows' lists are alike in kind.
        rows: how many rows there are.
        given: the user's own, of which those that may keep state are asked about the whole batch.
    """

    def __init__(self, build: Callable[[int], LogitsProcessorList], rows: int, given: Sequence[Any] = ()):
        first, self.given = build(0), given
        self.sees_text = any(type(processor) not in ELEMENTWISE for processor in first)
        self.lists = [first, *(build(row) for row in range(1, rows))] if self.sees_text else [first]
        self.stateful = [not keeps_no_state(processor) for processor in first]
        self.shared = [serves_all_rows(processor) and any(processor is one for one in given) for processor in first]
        # What is known to keep no state may be asked about drafts, and more than once.
        self.known_sees_text = any(
            type(processor) not in ELEMENTWISE and not stateful
            for processor, stateful in zip(first, self.stateful, strict=True)
        )
        # The classes of the first that may keep state, and of the first such that all rows share.
        self.keeps_state = next((name_of(one) for one, kept in zip(first, self.stateful, strict=True) if kept), None)
        self.shared_by_rows = next(
            (name_of(one) for one, of_all in zip(first, self.shared, strict=True) if of_all), None
        )
        # None has a tensor of its own, which would be on the device it was made for.
        self.fit_any_device = not self.sees_text and not any(
            isinstance(value, torch.Tensor) for processor in first for value in vars(processor).values()
        )
        self.repairs = any(type(processor) is logits_process.InfNanRemoveLogitsProcessor for processor in first)

    def likeness(self) -> str:
        """Equal for elementwise processors that do the same."""
        # As lists, since of a long tensor only the ends are shown.
        plain = [
            {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(one).items()}
            for one in self.lists[0]
        ]
        kinds = [type(one).__name__ for one in self.lists[0]]
        return repr([(kind, sorted(own.items())) for kind, own in zip(kinds, plain, strict=True)])

    def text_readers(self) -> list[str]:
        """The classes of those that look at the text."""
        return [name_of(processor) for processor in self.lists[0] if type(processor) not in ELEMENTWISE]

    def __call__(
        self,
        logits: torch.Tensor,
        rows: Sequence[int] = (),
        texts: Sequence[torch.Tensor | None] = (),
        batch: Callable[[], torch.Tensor] | None = None,
        only_known: bool = False,
    ) -> torch.Tensor:
        """
        Process logits: of any number of positions, or of one where a processor looks at the text.

        Such a processor is called for one row at a time, with that row's own tokens (1, n), without padding; or, if it
        is the user's, may keep state and serves all rows, once, as transformers does.

        Args:
            logits: (R, S, V) float32; (R, 1, V) if `sees_text`.
            rows: R numbers of rows of the batch, if `sees_text`.
            texts: per row its tokens before the position, if `sees_text`; None where it does not matter.
            batch: gives the (B, T) left-padded tokens before the position, of rows that have ended, too.
            only_known: leave out processors that may keep state.

        Returns:
            (R, S, V), the argument itself where there is nothing to do.
        """
        if not self.lists[0]:
            return logits
        scores = logits.clone()
        for idx, processor in enumerate(self.lists[0]):
            if type(processor) in ELEMENTWISE:
                scores = elementwise(processor, scores)
            elif self.stateful[idx] and only_known:
                continue
            elif self.shared[idx]:
                if any(text is not None for text in texts):
                    assert batch is not None
                    ids = batch()
                    # Nothing was computed for rows that have ended, and nothing comes of what is answered.
                    whole = scores.new_zeros(len(ids), scores.shape[-1])
                    whole[list(rows)] = scores[:, 0]
                    scores[:, 0] = asked_about(processor, ids, whole, "all rows of a batch are processed together")[
                        list(rows)
                    ]
            else:
                for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                    if text is not None:
                        scores[place] = asked_about(self.lists[row][idx], text[None], scores[place], BY_ITSELF)
        return scores


def elementwise(processor: Any, scores: torch.Tensor) -> torch.Tensor:
    """(R, S, V) scores, all positions at once, as a processor makes them that does not look at the text."""
    flat = scores.flatten(0, 1)
    return processor(flat.new_empty(len(flat), 0, dtype=torch.long), flat).view_as(scores)


def asked_about(processor: Any, ids: torch.Tensor, scores: torch.Tensor, why: str) -> torch.Tensor:
    """(n, V) scores as a processor makes them of what follows (n, T) ids."""
    processed = processor(ids, scores)
    if not isinstance(processed, torch.Tensor):
        raise ValueError(f"{name_of(processor)} returned {processed!r}; a logits processor returns scores, a tensor")
    if processed.shape != scores.shape:
        raise ValueError(
            f"{name_of(processor)} returned scores of shape {tuple(processed.shape)} for {tuple(scores.shape)}; {why}"
        )
    return processed


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """
    Standard Gumbel noise for every token at some positions of some rows.

    Args:
        seeds: (R,) int64.
        positions: (R, S) int64, in the row's text.
        vocab_size: V.

    Returns:
        (R, S, V) float32, the same on every device.
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    hashed = _hash(_hash(_hash(seeds)[:, None] + positions)[..., None] + tokens)
    return -(-torch.log1p(-_unit(hashed))).log()


def uniform_noise(seeds: torch.Tensor, positions: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
    """(R, S) float32 in (0, 1), another one at every step (one, or (R, 1)), independent of [`gumbel_noise`]."""
    return _unit(_hash(_hash(_hash(seeds ^ _UNIFORM_STREAM)[:, None] + positions) + step))


def content_seeds(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T) token ids and where there are tokens, bool -> (B,) seeds: a hash of each row's tokens and their order."""
    hashed = _hash(_hash(ids.long()) + mask.cumsum(1))
    return _hash(hashed.masked_fill(~mask, 0).sum(1))


def derived_seeds(seeds: torch.Tensor, copies: int) -> torch.Tensor:
    """(R,) -> (R x copies,): the seed itself for a row's first copy, other ones for the others."""
    copy = torch.arange(copies, device=seeds.device)
    return torch.where(copy == 0, seeds[:, None], _hash(_hash(seeds)[:, None] - copy)).flatten()


def _hash(x: torch.Tensor) -> torch.Tensor:
    """One output of SplitMix64 (Steele et al. 2014) from each int64 state; products wrap around."""
    x = x + _GOLDEN_GAMMA
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical, where int64's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unit(hashed: torch.Tensor) -> torch.Tensor:
    """int64 -> float32 in (0, 1), finest near 0: there lie the largest Gumbel values."""
    return ((_shift_right(hashed, 11).float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)


__all__ = [
    "BY_ITSELF",
    "ELEMENTWISE",
    "RowLogitsProcessors",
    "asked_about",
    "content_seeds",
    "derived_seeds",
    "elementwise",
    "gumbel_noise",
    "uniform_noise",
]
