"""What the decoding methods share during one call: text, cache, knobs, and how tokens get from one to the other.

Shapes: B batch, R rows still generating, P prompt columns, S block, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from .cache_twotower import TwoTowerCache
from .compat_twotower import BaseStreamer
from .padding_twotower import PackedTokens
from .sampling_twotower import RowLogitsProcessors, gumbel_noise, uniform_noise
from .text_twotower import Block, GeneratedText, TwoTowerGenerateOutput, per_pass
from .unmasking_twotower import (
    DRAFT_NOT_A_NUMBER,
    FORBIDDEN,
    NO_PROBLEM,
    NOT_A_NUMBER,
    Prediction,
    UnmaskingRule,
    log_prob,
)


@dataclass
class BlockStep:
    """
    What `step_callback` sees after a denoiser pass and before its commits.

    All tensors are copies. It may change `commit` (veto: False; commit more: True) and `tokens` (replace), in place or
    by assignment of tensors of their shape, kind and device; nothing comes of what it does to the others. What the
    last step leaves open is committed by no later one, so a veto there is an error; replace the token instead. In mode
    "self_speculative" the block is a draft that begins with the text's newest token: what changes is how much of it is
    kept, never the text. If a logits processor looks at the text, what was chosen to the right of a replaced token is
    chosen again, and to the right of a veto it waits.

    Args:
        rows: (R,) of the batch, those still generating.
        block: number of the block, or of the draft, from 0.
        step: number of the pass within the block, from 0.
        steps: most passes of the block.
        ids: (R, S) the block before this step's commits, the mask id where open.
        committed: (R, S) bool, likewise.
        timestep: (R,) float32 given to the denoiser.
        logits: (R, S, V) float32, the mask id at -inf.
        tokens: (R, S) predictions.
        confidence: (R, S) their untempered probabilities.
        commit: (R, S) bool, open positions the unmasking rule commits now.
        mask_logits: (R, S) float32, the logits of the mask id.
    """

    rows: torch.Tensor
    block: int
    step: int
    steps: int
    ids: torch.Tensor
    committed: torch.Tensor
    timestep: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    commit: torch.Tensor
    mask_logits: torch.Tensor


@dataclass
class Decoding:
    """What the decoding methods share during one call."""

    text: GeneratedText
    cache: TwoTowerCache
    unread: PackedTokens
    config: GenerationConfig
    processors: RowLogitsProcessors
    rule: UnmaskingRule
    seeds: torch.Tensor | None
    mask_token_id: int
    vocab_size: int
    starting_block: torch.Tensor | None
    step_callback: Callable[[BlockStep], None] | None
    streamer: BaseStreamer | None
    keep_cache: bool
    synced: bool = False  # with other ranks
    streamed: int = 0  # how many columns of new tokens
    cycles: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # rows, (R, S - 1) drafts kept
    # Rows that have left the cache and what it held of them, and those it still holds.
    ended: list[tuple[torch.Tensor, TwoTowerCache]] = field(default_factory=list)
    cached_rows: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cached_rows = self.text.rows

    def open_block(self, known: torch.Tensor) -> Block:
        """A block that begins with `known` (R, n) tokens; the mask id among them is a token like any other."""
        rows, size = len(known), self.config.block_size
        masked = torch.arange(size, device=known.device).expand(rows, size) >= known.shape[1]
        open_columns = known.new_full((rows, size - known.shape[1]), self.mask_token_id)
        return Block(torch.cat([known, open_columns], dim=1), masked, self.text.recorded)

    def first_block(self) -> Block:
        """An open block, or the user's starting block."""
        rows = self.text.rows
        block = self.open_block(rows.new_empty(len(rows), 0))
        if self.starting_block is not None:
            block.give(self.starting_block.to(rows.device), self.mask_token_id, self.vocab_size)
            self.end_rows(block)
        return block

    def end_rows(self, block: Block) -> torch.Tensor:
        """Write and drop the rows whose text ends within the block's committed beginning; see `write`."""
        prefix = block.prefix()
        kept, ended = self.text.first_stop(block, prefix)
        block.checked = prefix
        if not ended.any():
            return self.text.rows
        return self.write(block, kept.where(ended, 0), ended)

    def ends_before(self, ids: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor, in_step: bool) -> torch.Tensor:
        """(R,) bool, whether the text ends within each row's first `kept` of (R, n) tokens to come."""
        block = Block(ids, torch.zeros_like(ids, dtype=torch.bool))
        if "scores" in self.text.recorded:
            block.records["scores"] = scores[:, : ids.shape[1]]
        block.checked = (kept - 1).clamp(min=0)
        return self.text.first_stop(block, kept, in_step)[1]

    def append(self, block: Block) -> torch.Tensor:
        """Write what is committed of a block from its beginning on, up to each row's first stop; see `write`."""
        return self.write(block, *self.text.first_stop(block, block.prefix()))

    def write(self, block: Block, kept: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """Add each row's first `kept` tokens to the text; rows that `ended` leave. Indices of those that go on."""
        rows = self.text.rows
        going_on = self.text.write(block, kept, ended)
        if len(going_on) < len(rows):  # a problem ends a row, too
            self._refuse_problems(rows, block, kept, ended)
        block.select_rows(going_on)
        if 0 < len(going_on) < len(rows):  # the last rows to end need not leave
            if self.keep_cache:
                left = ended.nonzero()[:, 0]
                self.ended.append((rows[left], self.cache.copy_rows(left)))
            self.cache.select_rows(going_on)
            self.cached_rows = self.text.rows
        self._stream()
        return going_on

    def _refuse_problems(self, rows: torch.Tensor, block: Block, kept: torch.Tensor, ended: torch.Tensor) -> None:
        """Raise for the first of the rows (R,) that could take no token as the last of its `kept`."""
        last = (kept - 1).clamp(min=0)
        problems = block.problems.gather(1, last[:, None])[:, 0].where(ended & (kept > 0), NO_PROBLEM)
        if not problems.any():
            return
        idx = int(problems.nonzero()[0])
        row, problem, text = int(rows[idx]), int(problems[idx]), self.text
        new = int(text.new_tokens[row]) - 1
        where = (
            f"at position {int(text.prompt_lengths[row]) + new} of row {row}, after {new} new tokens, "
            f"{int(text.context_forwards[row])} passes of the context tower and {int(text.denoiser_forwards[row])} of "
            "the denoiser"
        )
        if problem == FORBIDDEN:
            mask = f" but the mask id {self.mask_token_id}" if self.config.mode == "mask_diffusion" else ""
            raise ValueError(
                f"the logits processors forbid every token{mask} {where}; allow one, for example end-of-text"
            )
        denoiser = problem == DRAFT_NOT_A_NUMBER or self.config.mode in ("mask_diffusion", "mock_ar")
        raise ValueError(
            f"the {'denoiser' if denoiser else 'context tower'} gives no numbers (NaN or infinity) {where}; look for "
            "NaN in the model's weights, or try float32"
        )

    def _stream(self) -> None:
        """Hand out the columns of new tokens that by now every row has, or will never have."""
        if self.streamer is not None and self.streamed < (settled := self.text.settled_columns()):
            self.streamer.put(self.text.new_columns(self.streamed, settled).cpu())
            self.streamed = settled

    def choose(self, scores: torch.Tensor, first: int = 0) -> torch.Tensor:
        """(R, S) tokens by (R, S, V) scores of the positions from `first` after the text's end on: best, or drawn."""
        if self.config.do_sample:
            scores = scores + gumbel_noise(*self._seeds_and_positions(scores.shape[1], first), scores.shape[-1])
        return scores.argmax(-1)

    def uniform(self, block: Block, step: int, first: int) -> torch.Tensor:
        """(R, S) noise of a pass over a block that begins `first` after the text's end."""
        return uniform_noise(*self._seeds_and_positions(block.ids.shape[1], first), step)

    def _seeds_and_positions(self, positions: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(R,) seeds and (R, S) places in the rows' texts."""
        assert self.seeds is not None
        columns = first + torch.arange(positions, device=self.text.rows.device)
        return self.seeds[self.text.rows], self.text.lengths[:, None] + columns

    def forbid_mask(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Set the mask id to -inf again where logits processors may have made new scores (R, S, V).

        Returns:
            (R, S) bool, whether another token is possible; where none is, there can be no text, but a draft.
        """
        if not self.processors.lists[0]:
            return torch.ones_like(scores[..., 0], dtype=torch.bool)
        scores[..., self.mask_token_id] = -torch.inf
        return (scores > -torch.inf).any(-1)

    def prediction(self, logits: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor) -> Prediction:
        log_probs = log_prob(scores, tokens) if self.text.recorded else None
        confidence = log_prob(logits, tokens).exp()
        problems = torch.zeros_like(tokens, dtype=torch.int8)
        if self.processors.lists[0]:
            problems = problems.masked_fill(~(scores > -torch.inf).any(-1), FORBIDDEN)
        if not self.processors.repairs:
            problems = problems.masked_fill(confidence.isnan(), NOT_A_NUMBER)
        return Prediction(logits, tokens, confidence, log_probs, scores, problems)

    def ask(
        self,
        block: Block,
        prediction: Prediction,
        commit: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        steps: int,
        number: int,
        is_draft: bool,
        mask_logits: torch.Tensor,
    ) -> tuple[Prediction, torch.Tensor]:
        """What the user's callback makes of a pass."""
        assert self.step_callback is not None
        state = BlockStep(
            rows=self.text.rows.clone(),
            block=number,
            step=step,
            steps=steps,
            ids=block.ids.clone(),
            committed=~block.masked,
            timestep=timestep.clone(),
            logits=prediction.logits.clone(),
            tokens=prediction.tokens.clone(),
            confidence=prediction.confidence.clone(),
            commit=commit.clone(),
            mask_logits=mask_logits,
        )
        self.step_callback(state)
        _check_answer("commit", state.commit, block.masked)
        _check_answer("tokens", state.tokens, prediction.tokens)
        commit = state.commit & block.masked
        if step == steps - 1 and not is_draft and not torch.equal(commit, block.masked):
            row, column = (block.masked & ~commit).nonzero()[0].tolist()
            raise ValueError(
                f"step_callback vetoed position {column} of row {int(self.text.rows[row])} in the last of {steps} "
                "steps; replace its token or raise steps_per_block"
            )
        wrong = state.tokens[commit & ((state.tokens < 0) | (state.tokens >= prediction.logits.shape[-1]))]
        if len(wrong) > 0:
            raise ValueError(f"step_callback committed token {int(wrong[0])}, outside the vocabulary")
        if (state.tokens[commit] == self.mask_token_id).any():
            raise ValueError(f"step_callback committed the mask id {self.mask_token_id}; veto the position instead")
        assert prediction.scores is not None
        tokens = state.tokens.where(commit, prediction.tokens)
        return self.prediction(prediction.logits, prediction.scores, tokens), commit

    def count_cycle(self, drafted: torch.Tensor, kept: torch.Tensor) -> None:
        """Remember one cycle: (R, S - 1) 1 where a draft was verified, and how many tokens (R,) the text takes."""
        columns = torch.arange(drafted.shape[1], device=drafted.device)
        self.cycles.append((self.text.rows, drafted * (columns < kept[:, None])))

    def output(self, prompt_columns: torch.Tensor) -> TwoTowerGenerateOutput:
        """The result after (B, P) prompts as they were given."""
        output = self.text.output(prompt_columns)
        if self.config.mode != "ar":
            output.tokens_per_denoiser_forward = per_pass(self.text.new_tokens, self.text.denoiser_forwards)
        if self.config.mode == "self_speculative":
            cycles = torch.zeros_like(self.text.new_tokens)
            kept = cycles.new_zeros(len(cycles), self.config.block_size - 1)
            for rows, drafted in self.cycles:
                cycles[rows] += 1
                kept[rows] += drafted
            output.acceptance = per_pass(kept, cycles[:, None])
            # The first token is the context tower's, before all cycles.
            output.accepted_lengths = per_pass(self.text.new_tokens - 1, cycles)
        if self.keep_cache:
            output.cache = self.cache
        return output

    def show_draft(self, ids: torch.Tensor) -> None:
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(ids.cpu())

    def restore_cache(self) -> None:
        """Bring the rows that left the cache back, in the order of the batch."""
        if self.ended:
            remaining = torch.arange(len(self.cached_rows), device=self.cached_rows.device)
            self.cache.replace_rows([part for _, part in self.ended] + [self.cache.copy_rows(remaining)])
            self.cache.select_rows(torch.cat([rows for rows, _ in self.ended] + [self.cached_rows]).argsort())


def _check_answer(name: str, answer: Any, like: torch.Tensor) -> None:
    """Raise a ValueError for what a callback assigned that is not of the kind it was given."""
    if not isinstance(answer, torch.Tensor):
        raise ValueError(
            f"step_callback left {name} as a {type(answer).__name__}; assign a tensor, or change it in place"
        )
    for what in ("dtype", "shape", "device"):
        given, wanted = getattr(answer, what), getattr(like, what)
        if given != wanted:
            given, wanted = (tuple(size) if what == "shape" else size for size in (given, wanted))
            raise ValueError(f"step_callback left {name} with {what} {given}; it needs {wanted}")


__all__ = ["BlockStep", "Decoding"]
