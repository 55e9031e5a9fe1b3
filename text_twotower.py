"""What decoding writes on: the block in progress, the growing text of every row, and the result.

A row's text ends at its first stop (an end-of-text token, its length limit, a stopping criterion), and what has ended
leaves the batch. Criteria that keep no state see one row at a time, without padding; others what transformers shows
them: the whole left-padded batch, once for every column of new tokens, as soon as all rows have it.

Shapes: B batch, R rows still generating, P prompt columns, S block, N new tokens of the longest row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from .asking_twotower import RowsOwn, keeps_no_state, made_for, name_of, serves_all_rows
from .cache_twotower import TwoTowerCache
from .compat_twotower import CacheOutput, EosTokenCriteria, MaxTimeCriteria
from .padding_twotower import PackedTokens
from .unmasking_twotower import Prediction

# What can be recorded of each token, and how its padding is filled; the last two are (B, N, V).
RECORDS = {"commit_steps": -1, "confidences": torch.nan, "log_probs": torch.nan, "scores": 0.0, "logits": 0.0}


@dataclass
class TwoTowerGenerateOutput(CacheOutput):
    """
    Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: (B, P + N) the prompts as given, then the new tokens, padded after a row's end.
        denoiser_forwards: (B,) denoiser passes of each row.
        context_forwards: (B,) context tower passes of each row: the prompt's, then one per chunk read.
        tokens_per_forward: (B,) float32, new tokens (end-of-text included) per pass of either tower.
        tokens_per_denoiser_forward: (B,) float32, new tokens per denoiser pass; NaN for a row that took none (its
            text ended before), None in mode "ar".
        commit_steps: (B, N) the denoiser pass of its block, from 0, that proposed each token; -1 for what the context
            tower chose, what a starting block held, and padding.
        confidences: (B, N) float32, each token's probability, untempered and before logits processors, under the
            tower that decided it when it was committed; NaN on padding and what a starting block held.
        log_probs: (B, N) float32, its log-probability then under the distribution it was taken from: after all
            logits processors, temperature included; NaN likewise.
        accepted_lengths: (B,) float32, in mode "self_speculative": mean number of tokens a cycle added to the text;
            NaN for a row that ended before its first cycle.
        acceptance: (B, S - 1) float32, likewise: share of a row's cycles that added the draft at each position.
        scores, logits: N tensors (B, V) float32, with `output_scores` and `output_logits`: what the token was chosen
            from, after and before logits processors; zero on padding and what a starting block held.
        cache: also `past_key_values`; the cache after the last chunk read, for a next call.
    """

    sequences: torch.Tensor
    denoiser_forwards: torch.Tensor | None = None
    context_forwards: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    tokens_per_denoiser_forward: torch.Tensor | None = None
    commit_steps: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    accepted_lengths: torch.Tensor | None = None
    acceptance: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    cache: TwoTowerCache | None = None


class Block:
    """
    The canvas of the rows still generating.

    Args:
        ids: (R, S) tokens, the mask id where none is committed.
        masked: (R, S) bool, positions still open.
        recorded: names of what to keep of each token, of [`RECORDS`].
    """

    def __init__(self, ids: torch.Tensor, masked: torch.Tensor, recorded: tuple[str, ...] = ()):
        self.ids, self.masked, self.recorded = ids, masked, recorded
        self.checked = torch.zeros_like(ids[:, 0])  # how many committed tokens were looked at for a stop
        self.problems = torch.zeros_like(ids, dtype=torch.int8)  # why a position can hold no token, 0 where it can
        self.records: dict[str, torch.Tensor] = {}

    @classmethod
    def chosen(cls, prediction: Prediction, steps: torch.Tensor | int, recorded: tuple[str, ...] = ()) -> "Block":
        """A block whose every position is what was predicted, committed at `steps`, an int or (R, S)."""
        block = cls(prediction.tokens, torch.zeros_like(prediction.tokens, dtype=torch.bool), recorded)
        block.records = block._records_of(prediction, steps)
        if prediction.problems is not None:
            block.problems = prediction.problems
        return block

    def give(self, ids: torch.Tensor, mask_token_id: int, vocab_size: int) -> None:
        """Begin with the user's (R, at most S) tokens, of which nothing is to be recorded; the mask id stays open."""
        self.ids[:, : ids.shape[1]] = ids
        self.masked = self.ids == mask_token_id
        for name in self.recorded:
            shape = (*self.ids.shape, vocab_size) if name in ("scores", "logits") else self.ids.shape
            dtype = torch.long if name == "commit_steps" else torch.float32
            self.records[name] = torch.full(shape, RECORDS[name], dtype=dtype, device=ids.device)

    def commit(self, where: torch.Tensor, prediction: Prediction, step: int) -> None:
        """Fix the predicted tokens `where` (R, S) says."""
        self.ids = torch.where(where, prediction.tokens, self.ids)
        self.masked = self.masked & ~where
        if prediction.problems is not None:
            self.problems = torch.where(where, prediction.problems, self.problems)
        for name, new in self._records_of(prediction, step).items():
            old = self.records.get(name, torch.full((), RECORDS[name], dtype=new.dtype, device=new.device))
            self.records[name] = torch.where(where if new.ndim == 2 else where[..., None], new, old)

    def _records_of(self, prediction: Prediction, steps: torch.Tensor | int) -> dict[str, torch.Tensor]:
        if not self.recorded:
            return {}
        if not isinstance(steps, torch.Tensor):
            steps = torch.full_like(prediction.tokens, steps)
        known = {"commit_steps": steps, "confidences": prediction.confidence, **prediction._asdict()}
        return {name: known[name] for name in self.recorded}

    def commit_steps(self) -> torch.Tensor:
        """(R, S) as recorded; -1 if nothing is."""
        return self.records.get("commit_steps", torch.full_like(self.ids, -1))

    def prefix(self) -> torch.Tensor:
        """(R,) how many positions are committed before the first open one."""
        return (~self.masked).int().cumprod(1).sum(1)

    def select_rows(self, rows: torch.Tensor) -> None:
        if len(rows) == len(self.ids):
            return
        self.ids, self.masked, self.checked = self.ids[rows], self.masked[rows], self.checked[rows]
        self.problems = self.problems[rows]
        self.records = {name: record[rows] for name, record in self.records.items()}


class GeneratedText:
    """
    The growing texts of a batch: which rows still generate, and what each has cost.

    Args:
        prompt: the rows' prompts, packed.
        limits: (B,) most tokens of each row, prompt included.
        stopping_criteria: end-of-text, time and whatever the user gave; length limits are `limits`.
        pad_token_id: fills what follows a row's end.
        recorded: names of what to keep of each token, of [`RECORDS`].
        columns: (B, P) the prompts as transformers would show them, padded on the left.
    """

    def __init__(
        self,
        prompt: PackedTokens,
        limits: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        pad_token_id: int,
        recorded: tuple[str, ...],
        columns: torch.Tensor,
    ):
        ids = prompt.ids
        self.prompt, self.pad_token_id, self.recorded = ids, pad_token_id, recorded
        self.prompt_lengths = prompt.lengths
        self.most_new_tokens = limits - self.prompt_lengths
        self.eos_ids = [c.eos_token_id.to(ids.device) for c in stopping_criteria if type(c) is EosTokenCriteria]
        self.timers = [c for c in stopping_criteria if type(c) is MaxTimeCriteria]
        others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxTimeCriteria)]
        self.columns = columns
        self.rows = torch.arange(len(ids), device=ids.device)  # of the batch, those still generating
        self.new_tokens = torch.zeros_like(self.rows)
        made: list[Any] = []
        lengths = self.prompt_lengths.tolist()
        rows_lists = [made_for(row, length, others, made) for row, length in enumerate(lengths)]
        # Per row those that keep no state, and those that do and are its own; then those that serve all rows.
        self.criteria = [[c for c in criteria if keeps_no_state(c)] for criteria in rows_lists]
        self.rows_own = [[c for c in criteria if isinstance(c, RowsOwn)] for criteria in rows_lists]
        self.shared = [c for c in others if serves_all_rows(c)]
        # How many new tokens of each row, and of all, were shown to criteria that keep state, and where they ended it.
        self.shown = torch.zeros_like(self.rows)
        self.shown_to_all = 0
        self.ended_at = torch.full_like(self.rows, torch.iinfo(torch.long).max)
        self.denoiser_forwards = torch.zeros_like(self.rows)
        self.context_forwards = torch.zeros_like(self.rows)
        self.buffers: dict[str, torch.Tensor] = {}
        self.capacity_needed = 0

    @property
    def lengths(self) -> torch.Tensor:
        """(R,) tokens of the rows still generating, prompt included."""
        return (self.prompt_lengths + self.new_tokens)[self.rows]

    def row(self, row: int) -> torch.Tensor:
        """The tokens of one row of the batch, without padding."""
        prompt = self.prompt[row, : int(self.prompt_lengths[row])]
        if "ids" not in self.buffers:
            return prompt
        return torch.cat([prompt, self.buffers["ids"][row, : int(self.new_tokens[row])]])

    def texts(self) -> list[torch.Tensor]:
        """The tokens of the rows still generating."""
        return [self.row(row) for row in self.rows.tolist()]

    def ends(self, ids: torch.Tensor) -> torch.Tensor:
        """(R, S) bool, where the rows' next tokens are an end-of-text token or reach a length limit."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        ends = columns >= (self.most_new_tokens - self.new_tokens)[self.rows][:, None] - 1
        for eos in self.eos_ids:
            ends |= torch.isin(ids, eos)
        return ends

    @property
    def has_criteria(self) -> bool:
        """Whether a text may end elsewhere than at a token or a length."""
        return bool(self.criteria[0] or self.rows_own[0] or self.shared)

    def padded(self, more: torch.Tensor) -> torch.Tensor:
        """(B, P + n) all rows as transformers would show them, those going on with (R, S) `more` tokens."""
        width = int(self.new_tokens.max())
        ids = [self.columns] if width == 0 else [self.columns, self.new_columns(0, width)]
        if more.shape[1] > 0:
            column = more.new_full((len(self.columns), more.shape[1]), self.pad_token_id)
            column[self.rows] = more
            ids.append(column)
        return torch.cat(ids, dim=1)

    def first_stop(
        self, block: Block, counts: torch.Tensor, in_step: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where the rows' texts end within the next tokens.

        Args:
            block: (R, S) tokens to come; some of them may have been looked at before.
            counts: (R,) how many of them are final.
            in_step: keep no more of any row than of the one with the fewest.

        Returns:
            (R,) tokens up to and including each row's first stop, `counts` where there is none, and (R,) bool whether
            there is one. A criterion about all rows that is asked late may end a text before these tokens: then they
            are less than 0.
        """
        columns = torch.arange(block.ids.shape[1], device=block.ids.device)
        stops = (self.ends(block.ids) | (block.problems != 0)) & (columns < counts[:, None])
        stopped = stops.any(1)
        kept = torch.where(stopped, stops.int().argmax(1) + 1, counts)
        if self.criteria[0]:
            kept, stopped = self._first_criterion(block, kept, stopped)
        if in_step:
            kept, stopped = kept.min().expand_as(kept), stopped & (kept == kept.min())
        if self.rows_own[0] or self.shared:
            kept, stopped = self._show_in_order(block, kept, stopped)
        if any(bool(timer(block.ids, None).any()) for timer in self.timers):
            stopped = torch.ones_like(stopped)
        return kept, stopped

    def _first_criterion(
        self, block: Block, kept: torch.Tensor, stopped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask criteria that keep no state about every new length of every row; if there is none, the present one."""
        rows, checked, counts = self.rows.tolist(), block.checked.tolist(), kept.tolist()
        for idx, (row, done, count) in enumerate(zip(rows, checked, counts, strict=True)):
            text, scores = torch.cat([self.row(row), block.ids[idx, :count]]), self._scores_of(row, block, idx)
            before = len(text) - count
            written = before - int(self.prompt_lengths[row])
            for length in range(max(min(done + 1, count), written == 0), count + 1):
                kept_scores = None if scores is None else scores[: written + length]
                if _any_meets(self.criteria[row], text[None, : before + length], kept_scores):
                    kept[idx], stopped[idx] = length, True
                    break
        return kept, stopped

    def _show_in_order(
        self, block: Block, kept: torch.Tensor, stopped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Show criteria that keep state what is new, one token after the other and each once.

        A row's own are shown its text, shared ones the columns that all rows have by now, or will never have.
        """
        lengths, going_on = self.new_tokens.clone(), torch.zeros_like(self.new_tokens, dtype=torch.bool)
        lengths[self.rows] += kept
        going_on[self.rows] = ~stopped
        if self.rows_own[0]:
            for idx, row in enumerate(self.rows.tolist()):
                self._show_row(row, block, idx, int(lengths[row]))
        lengths = lengths.minimum(self.ended_at)
        going_on &= lengths < self.ended_at
        while self.shared and self.shown_to_all < _settled(lengths, going_on):
            self.shown_to_all += 1
            scores = (
                self._columns_with(block, "scores", self.shown_to_all, lengths) if "scores" in self.recorded else None
            )
            ids = self._columns_with(block, "ids", self.shown_to_all, lengths)
            ids = torch.cat([self.columns, ids], dim=1)
            ends = _meets_any(self.shared, ids, None if scores is None else scores.unbind(1))
            self.ended_at[ends & (self.ended_at > self.shown_to_all)] = self.shown_to_all
            lengths = lengths.minimum(self.ended_at)
            going_on &= lengths < self.ended_at
        # Of rows that have left, some may have gone on beyond what all rows have.
        self.new_tokens = self.new_tokens.minimum(self.ended_at).where(~self._is_going_on(), self.new_tokens)
        return (lengths - self.new_tokens)[self.rows], stopped | ~going_on[self.rows]

    def _is_going_on(self) -> torch.Tensor:
        """(B,) bool"""
        return torch.zeros_like(self.new_tokens, dtype=torch.bool).index_fill(0, self.rows, True)

    def _show_row(self, row: int, block: Block, idx: int, length: int) -> None:
        """Show a row's own criteria its text up to `length` new tokens."""
        text, scores = torch.cat([self.row(row), block.ids[idx]]), self._scores_of(row, block, idx)
        for shown in range(int(self.shown[row]) + 1, min(length, int(self.ended_at[row])) + 1):
            self.shown[row] = shown
            shown_text = text[None, : int(self.prompt_lengths[row]) + shown]
            if _any_meets(self.rows_own[row], shown_text, None if scores is None else scores[:shown]):
                self.ended_at[row] = shown

    def _columns_with(self, block: Block, name: str, stop: int, lengths: torch.Tensor) -> torch.Tensor:
        """(B, stop, ...) new tokens, or what was recorded of them, up to (B,) lengths, those of the block included."""
        values = block.ids if name == "ids" else block.records[name]
        columns = torch.arange(stop, device=lengths.device)
        shape = (len(lengths), stop, *values.shape[2:])
        found = values.new_full(shape, RECORDS.get(name, self.pad_token_id))
        if name in self.buffers:
            held = self.buffers[name][:, :stop]
            found[:, : held.shape[1]] = held
        # A row's place in the block of each column, if it has one.
        places = columns - self.new_tokens[self.rows][:, None]
        inside = (places >= 0) & (places < values.shape[1])
        rows, at = inside.nonzero(as_tuple=True)
        found[self.rows[rows], at] = values[rows, places[rows, at]]
        padding = columns >= lengths[:, None]
        fill = RECORDS.get(name, self.pad_token_id)
        return found.masked_fill(padding if found.ndim == 2 else padding[..., None], fill)

    def _scores_of(self, row: int, block: Block, idx: int) -> tuple[torch.Tensor, ...] | None:
        """Of the row's tokens and those of the block, as transformers gives them to stopping criteria, if recorded."""
        if "scores" not in self.recorded:
            return None
        written = [self.buffers["scores"][row, : int(self.new_tokens[row])]] if "scores" in self.buffers else []
        return tuple(torch.cat([*written, block.records["scores"][idx]]).unsqueeze(1).unbind(0))

    def write(self, block: Block, kept: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """
        Add each row's first `kept` (R,) tokens of the block; rows that `ended` (R,) generate no more.

        Returns:
            The indices of the rows that go on.
        """
        columns = self.new_tokens[self.rows][:, None] + torch.arange(block.ids.shape[1], device=block.ids.device)
        self.capacity_needed += block.ids.shape[1]
        for name, values in {"ids": block.ids, **block.records}.items():
            # Columns beyond `kept` are written, too, and written over by the next block, or cut from the output.
            self._buffer(name, values)[self.rows[:, None], columns] = values
        self.new_tokens[self.rows] += kept
        if not ended.any():
            return torch.arange(len(self.rows), device=self.rows.device)
        going_on = (~ended).nonzero()[:, 0]
        self.rows = self.rows[going_on]
        return going_on

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """(B, columns, ...) with room for what is to be written, doubled as it grows."""
        held = self.buffers.get(name)
        if held is None or held.shape[1] < self.capacity_needed:
            grown = like.new_zeros(len(self.prompt), max(2 * self.capacity_needed, 64), *like.shape[2:])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self.buffers[name] = held = grown
        return held

    def settled_columns(self) -> int:
        """How many columns of new tokens will not change: all rows that still generate have them."""
        return _settled(self.new_tokens, self._is_going_on())

    def new_columns(self, start: int, stop: int, name: str = "ids") -> torch.Tensor:
        """(B, stop - start, ...) of what was recorded of each new token, padded after a row's end."""
        values = self.buffers[name][:, start:stop]
        padding = torch.arange(start, stop, device=values.device) >= self.new_tokens[:, None]
        fill = RECORDS.get(name, self.pad_token_id)
        return values.masked_fill(padding if values.ndim == 2 else padding[..., None], fill)

    def output(self, prompt_columns: torch.Tensor) -> TwoTowerGenerateOutput:
        """The result after (B, P) prompts as they were given."""
        width = int(self.new_tokens.max())
        kept: dict[str, Any] = {name: self.new_columns(0, width, name) for name in self.recorded}
        for name in ("scores", "logits"):
            if name in kept:
                kept[name] = kept[name].unbind(1)
        return TwoTowerGenerateOutput(
            sequences=torch.cat([prompt_columns, self.new_columns(0, width)], dim=1),
            denoiser_forwards=self.denoiser_forwards,
            context_forwards=self.context_forwards,
            tokens_per_forward=per_pass(self.new_tokens, self.denoiser_forwards + self.context_forwards),
            **kept,
        )


def _settled(lengths: torch.Tensor, going_on: torch.Tensor) -> int:
    """How many columns the rows (B,) that go on have all; with none, how many there are."""
    return int(lengths[going_on].min() if going_on.any() else lengths.max())


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


def per_pass(counts: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
    """Float32 ratio; NaN where there was no pass."""
    return counts / torch.where(passes > 0, passes, torch.nan)


__all__ = ["Block", "GeneratedText", "TwoTowerGenerateOutput", "per_pass"]
