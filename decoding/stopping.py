"""Where a text ends: at an end-of-text token, its length limit, or where a stopping criterion says so.

Criteria that keep no state see one row at a time, without padding; others what transformers shows them: the whole
left-padded batch, once for every column of new tokens, as soon as all rows have it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ..compat_twotower import EosTokenCriteria, MaxTimeCriteria
from .asking import RowsOwn, keeps_no_state, made_for, name_of, serves_all_rows
from .state import ENDED, RECORDS, Canvas, Row

_NEVER = 2**62


class Stopping:
    """
    The stopping criteria of a request.

    Args:
        stopping_criteria: end-of-text, time and whatever the user gave; length limits are the rows'.
        prompt_lengths: tokens of each row's prompt.
    """

    def __init__(self, stopping_criteria: StoppingCriteriaList, prompt_lengths: Sequence[int]):
        self.timers = [c for c in stopping_criteria if type(c) is MaxTimeCriteria]
        others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxTimeCriteria)]
        made: list[Any] = []
        lists = [made_for(row, length, others, made) for row, length in enumerate(prompt_lengths)] if others else []
        # Per row those that keep no state, and those that do and are its own; then those that serve all rows.
        self.stateless = [[c for c in criteria if keeps_no_state(c)] for criteria in lists]
        self.rows_own = [[c for c in criteria if isinstance(c, RowsOwn)] for criteria in lists]
        self.shared = [c for c in others if serves_all_rows(c)]
        self.any = bool(others)
        # How many new tokens of each row, and of all, criteria that keep state were shown, and where they ended it.
        self.shown = [0] * len(prompt_lengths)
        self.shown_to_all = 0
        self.scores_shown: list[torch.Tensor] = []  # to all (B, V), by column
        self.ended_at = [_NEVER] * len(prompt_lengths)

    def ask(
        self, rows: Sequence[Row], canvases: Sequence[Canvas], stops: list[tuple[int, bool]], in_step: bool
    ) -> list[tuple[int, bool]]:
        """The criteria's word on `stops`; arguments and result as of [`first_stops`]."""
        if any(self.stateless):
            asked = zip(rows, canvases, stops, strict=True)
            stops = [self._first_criterion(row, canvas, *stop) for row, canvas, stop in asked]
        if in_step:
            fewest = min(kept for kept, _ in stops)
            stops = [(fewest, ended and kept == fewest) for kept, ended in stops]
        if self.shared or any(self.rows_own):
            stops = self._show_in_order(rows, canvases, stops)
        for canvas, (kept, _) in zip(canvases, stops, strict=True):
            canvas.checked = max(kept, 0)
        return stops

    def _first_criterion(self, row: Row, canvas: Canvas, kept: int, ended: bool) -> tuple[int, bool]:
        """Ask criteria that keep no state about every new length of a row; if there is none, the present one."""
        criteria, written = self.stateless[row.number], len(row.tokens)
        if not criteria:
            return kept, ended
        text, scores = _text_with(row, canvas, kept), _scores_of(row, canvas)
        before = len(text) - kept
        for length in range(max(min(canvas.checked + 1, kept), int(written == 0)), kept + 1):
            so_far = None if scores is None else scores[: written + length]
            if _any_meets(criteria, text[None, : before + length], so_far):
                return length, True
        return kept, ended

    def _show_in_order(
        self, rows: Sequence[Row], canvases: Sequence[Canvas], stops: list[tuple[int, bool]]
    ) -> list[tuple[int, bool]]:
        """
        Show criteria that keep state what is new, one token after the other and each once.

        A row's own are shown its text, shared ones the columns that all rows have by now, or will never have.
        """
        request = rows[0].request
        everyone = request.rows
        lengths = [len(row.tokens) for row in everyone]
        going_on = [row.phase != ENDED for row in everyone]
        held = dict(zip(rows, canvases, strict=True))
        for row, canvas, (kept, ended) in zip(rows, canvases, stops, strict=True):
            lengths[row.number] += kept
            going_on[row.number] = not ended
            if self.rows_own[row.number]:
                self._show_row(row, canvas, lengths[row.number])

        def bound() -> None:
            for number, end in enumerate(self.ended_at):
                lengths[number] = min(lengths[number], end)
                going_on[number] = going_on[number] and lengths[number] < end

        bound()
        while self.shared and self.shown_to_all < _settled(lengths, going_on):
            self.shown_to_all += 1
            ids, scores = self._columns_with(everyone, held, lengths)
            ends = _meets_any(self.shared, ids, scores).tolist()
            for number, end in enumerate(ends):
                if end and self.ended_at[number] > self.shown_to_all:
                    self.ended_at[number] = self.shown_to_all
            bound()
        for row in everyone:
            # Of rows that have left, some may have gone on beyond what all rows have.
            beyond = len(row.tokens) - self.ended_at[row.number]
            if row.phase == ENDED and beyond > 0:
                row.write(canvases[0], -beyond)
        return [
            (lengths[row.number] - len(row.tokens), ended or not going_on[row.number])
            for row, (_, ended) in zip(rows, stops, strict=True)
        ]

    def _show_row(self, row: Row, canvas: Canvas, length: int) -> None:
        """Show a row's own criteria its text up to `length` new tokens."""
        number = row.number
        text, scores = _text_with(row, canvas, len(canvas.ids)), _scores_of(row, canvas)
        for shown in range(self.shown[number] + 1, min(length, self.ended_at[number]) + 1):
            self.shown[number] = shown
            so_far = None if scores is None else scores[:shown]
            if _any_meets(self.rows_own[number], text[None, : len(row.prompt) + shown], so_far):
                self.ended_at[number] = shown
                return

    def _columns_with(
        self, everyone: Sequence[Row], held: dict[Row, Canvas], lengths: Sequence[int]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """(B, P + n) prompts and the first n columns of new tokens, and if recorded their n scores (B, V)."""
        request, stop = everyone[0].request, self.shown_to_all
        columns, newest = [], []
        nothing = torch.full((request.vocab_size,), RECORDS["scores"], dtype=torch.float32, device=request.device)
        for row in everyone:
            canvas, length = held.get(row), min(stop, lengths[row.number])
            tokens = (row.tokens + (canvas.ids if canvas else []))[:length]
            columns.append(tokens + [request.pad_token_id] * (stop - length))
            if "scores" in request.recorded:
                written = row.records.get("scores", [])
                of_canvas = canvas.records["scores"] if canvas else []
                at = stop - 1 - len(written)
                own = None if length < stop else of_canvas[at] if at >= 0 else written[at]
                newest.append(own if isinstance(own, torch.Tensor) else nothing)
        ids = torch.cat([request.prompts, torch.tensor(columns, device=request.device)], dim=1)
        if not newest:
            return ids, None
        # What was shown of a column stays so, and all of them are shown in order.
        self.scores_shown.append(torch.stack(newest))
        return ids, tuple(self.scores_shown)


def first_stops(
    rows: Sequence[Row],
    canvases: Sequence[Canvas],
    counts: Sequence[int],
    in_step: bool = False,
    timed: bool = True,
) -> list[tuple[int, bool]]:
    """
    Where texts end within their next tokens: at the first end-of-text token, length limit, problem, or criterion.

    Args:
        rows: R of a pass; where criteria of the user's are asked, of one request.
        canvases: their tokens to come; some of them may have been looked at before.
        counts: how many of them are final.
        in_step: keep no more of any row than of the one with the fewest.
        timed: also look at the time, which ends texts behind all of these tokens.

    Returns:
        Per row how many tokens there are up to and including its first stop, or its count where there is none, and
        whether there is one. A criterion about all rows that is asked late may end a text before these tokens: then
        they are less than 0.
    """
    stops = []
    for row, canvas, count in zip(rows, canvases, counts, strict=True):
        eos, left, ids, problems = row.request.eos, row.most_new_tokens - len(row.tokens), canvas.ids, canvas.problems
        ends = (kept for kept in range(1, count + 1) if kept >= left or ids[kept - 1] in eos or problems[kept - 1])
        stop = next(ends, None)
        stops.append((count, False) if stop is None else (stop, True))
    if rows[0].request.stopping.any:
        stops = rows[0].request.stopping.ask(rows, canvases, stops, in_step)
    requests = dict.fromkeys(row.request for row in rows if timed and row.request.stopping.timers)
    late = [
        request
        for request in requests
        if any(bool(timer(torch.empty(1, 0), None).any()) for timer in request.stopping.timers)
    ]
    return [(kept, ended or row.request in late) for row, (kept, ended) in zip(rows, stops, strict=True)]


def _settled(lengths: Sequence[int], going_on: Sequence[bool]) -> int:
    """How many columns the rows that go on have all; with none, how many there are."""
    return min((n for n, goes in zip(lengths, going_on, strict=True) if goes), default=max(lengths))


def _text_with(row: Row, canvas: Canvas, count: int) -> torch.Tensor:
    device = row.request.device
    return torch.cat([row.text(device), torch.tensor(canvas.ids[:count], dtype=torch.long, device=device)])


def _scores_of(row: Row, canvas: Canvas) -> tuple[torch.Tensor, ...] | None:
    """Of the row's tokens and those of the canvas, as transformers gives them to stopping criteria, if recorded."""
    if "scores" not in row.request.recorded:
        return None
    request = row.request
    nothing = torch.full((1, request.vocab_size), RECORDS["scores"], dtype=torch.float32, device=request.device)
    shown, written = row.scores_shown, row.records.get("scores", [])
    del shown[len(written) :]  # taken back
    for scores in written[len(shown) :]:
        shown.append(scores[None] if isinstance(scores, torch.Tensor) else nothing)
    return (*shown, *(one[None] if isinstance(one, torch.Tensor) else nothing for one in canvas.records["scores"]))


def _any_meets(criteria: list[Any], sequence: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> bool:
    """Whether a criterion ends the text (1, n)."""
    refusal = "gave {} answers about one row; every row of a batch is asked about by itself"
    return bool(_meets_any(criteria, sequence, scores, refusal).any())


def _meets_any(
    criteria: list[Any],
    ids: torch.Tensor,
    scores: tuple[torch.Tensor, ...] | None,
    refusal: str = "gave {} answers about a batch of {} rows; give one for each row, or one for all",
) -> torch.Tensor:
    """(n,) bool, which of the texts (n, T) a criterion ends; all are asked, as transformers does."""
    ends = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        given = criterion(ids, scores)
        try:
            answer = torch.as_tensor(given, device=ids.device).bool()
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"stopping criterion {name_of(criterion)} gave {given!r}; it must give bools") from error
        if answer.numel() not in (1, len(ids)):
            raise ValueError(f"stopping criterion {name_of(criterion)} " + refusal.format(answer.numel(), len(ids)))
        ends |= answer.flatten()
    return ends


__all__ = ["Stopping", "first_stops"]
