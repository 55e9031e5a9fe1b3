"""What decoding writes on: the block in progress, the growing text of every row, and the result.

A row's text ends at its first stop (an end-of-text token, its length limit, a stopping criterion), and what has ended
leaves the batch. All criteria see one row at a time, without padding.

Shapes: B batch, R rows still generating, P prompt columns, S block, N new tokens of the longest row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

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
        self.records: dict[str, torch.Tensor] = {}

    @classmethod
    def chosen(cls, prediction: Prediction, steps: torch.Tensor | int, recorded: tuple[str, ...] = ()) -> "Block":
        """A block whose every position is what was predicted, committed at `steps`, an int or (R, S)."""
        block = cls(prediction.tokens, torch.zeros_like(prediction.tokens, dtype=torch.bool), recorded)
        block.records = block._records_of(prediction, steps)
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
    """

    def __init__(
        self,
        prompt: PackedTokens,
        limits: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        pad_token_id: int,
        recorded: tuple[str, ...] = (),
    ):
        ids = prompt.ids
        self.prompt, self.pad_token_id, self.recorded = ids, pad_token_id, recorded
        self.prompt_lengths = prompt.lengths
        self.most_new_tokens = limits - self.prompt_lengths
        self.eos_ids = [c.eos_token_id.to(ids.device) for c in stopping_criteria if type(c) is EosTokenCriteria]
        self.timers = [c for c in stopping_criteria if type(c) is MaxTimeCriteria]
        self.criteria = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxTimeCriteria)]
        self.rows = torch.arange(len(ids), device=ids.device)  # of the batch, those still generating
        self.new_tokens = torch.zeros_like(self.rows)
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

    def first_stop(self, block: Block, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where the rows' texts end within the next tokens.

        Args:
            block: (R, S) tokens to come; some of them may have been looked at before.
            counts: (R,) how many of them are final.

        Returns:
            (R,) tokens up to and including each row's first stop, `counts` where there is none, and (R,) bool whether
            there is one.
        """
        columns = torch.arange(block.ids.shape[1], device=block.ids.device)
        stops = self.ends(block.ids) & (columns < counts[:, None])
        stopped = stops.any(1)
        kept = torch.where(stopped, stops.int().argmax(1) + 1, counts)
        if self.criteria:
            kept, stopped = self._first_criterion(block, kept, stopped)
        if any(bool(timer(block.ids, None).any()) for timer in self.timers):
            stopped = torch.ones_like(stopped)
        return kept, stopped

    def _first_criterion(
        self, block: Block, kept: torch.Tensor, stopped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the user's criteria about every new length of every row; if there is none, the present one."""
        rows, checked, counts = self.rows.tolist(), block.checked.tolist(), kept.tolist()
        for idx, (row, done, count) in enumerate(zip(rows, checked, counts, strict=True)):
            text, scores = torch.cat([self.row(row), block.ids[idx, :count]]), self._scores_of(row, block, idx)
            before = len(text) - count
            written = before - int(self.prompt_lengths[row])
            for length in range(max(min(done + 1, count), written == 0), count + 1):
                kept_scores = None if scores is None else scores[: written + length]
                if self._meets_criterion(text[None, : before + length], kept_scores):
                    kept[idx], stopped[idx] = length, True
                    break
        return kept, stopped

    def _meets_criterion(self, sequence: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> bool:
        for criterion in self.criteria:
            answer = torch.as_tensor(criterion(sequence, scores))
            if answer.numel() != 1:
                raise ValueError(
                    f"stopping criterion {type(criterion).__name__} gave {answer.numel()} answers about one row; "
                    "every row of a batch is asked about by itself"
                )
            if answer.any():
                return True
        return False

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
        return int(self.new_tokens[self.rows].min() if len(self.rows) > 0 else self.new_tokens.max())

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


def per_pass(counts: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
    """Float32 ratio; NaN where there was no pass."""
    return counts / torch.where(passes > 0, passes, torch.nan)


__all__ = ["Block", "GeneratedText", "TwoTowerGenerateOutput", "per_pass"]
