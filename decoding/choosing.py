"""What a pass's logits become: tokens, and which of them are committed.

Shapes: R rows of a group, S positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..cache_twotower import uploaded
from .rules import FORBIDDEN, NO_SCORE, NOT_A_NUMBER, Prediction, commit_run
from .sampling import gumbel_noise, uniform_noise
from .state import RECORDS, WIDE_RECORDS, BlockStep, Canvas, Request, Row
from .stopping import first_stops
from .text_processors import PreparedProcessors, TextProcessors, Texts

# How often tokens are guessed anew where text-reading processors change them.
GUESSES = 2
# In the place of a token that a draft does not have.
ANY = -1
# Tables by position, of a processor that has one, are no longer than this.
LONGEST_TEXT = 2**18


class Group:
    """
    Rows of a pass that may share its operations, since all that they ask for is alike.

    Args:
        rows: R of them, with canvases of one size S.
        device: of logits and what comes of them.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self.rows, self.device = rows, device
        self.request: Request = rows[0].request
        self.timestep: torch.Tensor | None = None  # (R,) float32 that the denoiser is told
        self.positions: torch.Tensor | None = None  # (N,) of R x S positions, those whose logits are made; default all
        self.wide: dict[str, torch.Tensor] = {}  # of the pass reported last, (R, S, V)

    @cached_property
    def canvas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, S) ids, and bool where they are open."""
        canvases = [row.canvas for row in self.rows]
        ids = uploaded([canvas.ids for canvas in canvases], self.device)
        return ids, uploaded([canvas.open for canvas in canvases], self.device, torch.bool)

    def leave_out_settled(self) -> None:
        """Ask for logits of open positions alone, unless something looks at others; see `positions`."""
        request, canvases = self.request, [row.canvas for row in self.rows]
        asked = request.processors.lists[0] or request.step_callback or callable(request.config.unmasking_rule)
        # What is recorded is to be the same to the last bit, with a callback or without: products of fewer rows round
        # otherwise.
        if asked or request.recorded or request.config.do_sample or all(all(canvas.open) for canvas in canvases):
            return
        size = len(canvases[0].ids)
        starts = range(0, len(canvases) * size, size)
        self.positions = uploaded(
            [start + at for start, own in zip(starts, canvases, strict=True) for at in range(size) if own.open[at]],
            self.device,
        )

    @property
    def watched(self) -> bool:
        return any(row.watched for row in self.rows)

    def meet(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Logits (R, S, V) where this group works. They are large, so it goes to them where it can, with its few ids; not
        where code of the user's, or a processor with tensors of its own, expects them beside the prompt.
        """
        if logits.device == self.device or not self.request.works_anywhere:
            return logits.to(self.device)
        self.device = logits.device
        if "canvas" in vars(self):
            self.canvas = (self.canvas[0].to(self.device), self.canvas[1].to(self.device))
        if self.positions is not None:
            self.positions = self.positions.to(self.device)
        if self.timestep is not None:
            self.timestep = self.timestep.to(self.device)
        return logits

    def denoise_step(self, logits: torch.Tensor) -> torch.Tensor:
        """
        What one denoiser pass over the rows' canvases commits: what the rule and the user say. Without canvases it
        chooses the next token.

        Args:
            logits: (R, at least S, V) float32, or (N, V) of `positions`, to be written to.

        Returns:
            What [`Group.commit`] takes, see [`Group.report`].
        """
        request, rule, processors, steps = self.request, self.request.rule, self.request.processors, self.request.steps
        if request.strategy.steps_knob is None:
            return self.report(self.predict(logits))
        known, (ids, masked) = request.strategy.known, self.canvas
        if self.positions is None:
            logits = logits[:, : ids.shape[1]]
        numbers = [row.step for row in self.rows]
        mask_logits = logits[..., request.mask_token_id]
        if request.step_callback is not None:
            mask_logits = mask_logits.clone()  # only a callback is shown what is overwritten here
        logits[..., request.mask_token_id] = -torch.inf
        # Processors that may keep state are asked about tokens that are kept, so first the rule decides without them.
        in_order = processors.keeps_state is not None
        is_draft = known > 0
        due = [1 if is_draft else -(-sum(row.canvas.open) // (steps - row.step)) for row in self.rows]
        prediction = self.predict(logits, (ids, masked), known, only_known=in_order, due=due)
        commit = rule.commit(prediction, masked, numbers, steps, lambda: self._uniform(ids, numbers, -known))
        if processors.known_sees_text or (in_order and not is_draft):
            # What processors saw before a position must be the text that comes to stand there; and what leads to a
            # position where they allow nothing, a later pass may choose otherwise.
            left = uploaded([min(steps - number, ids.shape[1]) for number in numbers], self.device)
            holds = prediction.problems == 0
            if prediction.certain is not None:
                holds = holds & prediction.certain
            commit = commit_run(commit & holds, masked, left)
        if in_order and not is_draft:
            is_last = uploaded([number == steps - 1 for number in numbers], self.device, torch.bool)
            prediction, commit = self._predict_in_order(logits, ids, prediction, commit, is_last)
        if request.step_callback is not None:
            assert self.timestep is not None
            state = BlockStep(
                rows=uploaded([row.number for row in self.rows], self.device),
                block=self.rows[0].block,
                step=numbers[0],
                steps=steps,
                ids=ids.clone(),
                committed=~masked,
                timestep=self.timestep.clone(),
                logits=prediction.logits.clone(),
                tokens=prediction.tokens.clone(),
                confidence=prediction.confidence.clone(),
                commit=commit.clone(),
                mask_logits=mask_logits,
            )
            prediction, commit = self._ask_callback(
                state, prediction, masked, numbers[0] == steps - 1 and not is_draft
            )
            if processors.known_sees_text:
                commit = commit & ((masked & ~commit).cumsum(-1) == 0)  # behind a veto it must wait
        return self.report(prediction, commit)

    def _predict_in_order(
        self, logits: torch.Tensor, ids: torch.Tensor, guess: Prediction, commit: torch.Tensor, is_last: torch.Tensor
    ) -> tuple[Prediction, torch.Tensor]:
        """
        Choose a token for a run of positions to commit, asking processors that may keep state about each once.

        The run ends where they choose another token than was guessed without them, but in rows (R,) whose last step
        this is.
        """
        draft = guess.tokens.where(commit & ~is_last[:, None], ANY)
        prediction = self.predict(logits, (ids, commit), draft=draft)
        differs = (draft != ANY) & (prediction.tokens != draft)
        return prediction, commit & (differs.cumsum(-1) - differs.int() == 0)

    def predict(
        self,
        logits: torch.Tensor,
        canvas: tuple[torch.Tensor, torch.Tensor] | None = None,
        known: int = 0,
        draft: torch.Tensor | None = None,
        only_known: bool = False,
        in_step: bool = False,
        due: Sequence[int] = (),
    ) -> Prediction:
        """
        Choose a token per position.

        Logits processors that look at the text see the row's own text and what stands or was chosen before a position.
        transformers' own answer about all positions together, given a guess of these choices; others are asked
        position after position from the left, not about what follows the end of the text or the first choice that is
        not the draft's.

        Args:
            logits: (R, S, V) float32; or with a canvas (N, V) of `positions`.
            canvas: (R, S) ids and where they are open: choose for these, and never the mask; default S positions
                after the text.
            known: how many of the canvas's first tokens the text holds already.
            draft: (R, at least S - 1) tokens to verify, [`ANY`] where there is none; in their place what is likely
                enough counts as one's own choice.
            only_known: leave out processors that may keep state.
            in_step: stop for all rows where one stops.
            due: with a canvas, how many of each row's open positions must be certain: chosen after what is really
                chosen before them.
        """
        processors = self.request.processors
        if not (processors.known_sees_text if only_known else processors.sees_text):
            scores = logits
            if processors.lists[0]:
                scores = processors(logits, only_known=only_known)
                if canvas is not None:
                    self._forbid_mask(scores)
            tokens = self._choose(scores, -known)
            if draft is not None:
                tokens[:, :-1] = self._or_draft(tokens[:, :-1], draft, scores[:, :-1])
            return self._prediction(logits, scores, tokens)
        text_processors = self._text_processors()
        if not text_processors.kinds & ({"asked"} if only_known else {"asked", "stateful"}):
            return self._predict_by_guess(text_processors, logits, canvas, known, draft, due)
        return self._predict_in_text(logits, canvas, known, draft, only_known, in_step)

    def _text_processors(self) -> TextProcessors:
        """Those of the group's rows, all of one request."""
        request = self.request
        if request.text_processors is None:
            rows = [
                PreparedProcessors(own, request.vocab_size, min(len(row.prompt) + row.most_new_tokens, LONGEST_TEXT))
                for own, row in zip(request.processors.lists, request.rows, strict=True)
            ]
            request.text_processors = TextProcessors(rows, self.device)
        return request.text_processors.select([row.number for row in self.rows])

    def _predict_by_guess(
        self,
        text_processors: TextProcessors,
        logits: torch.Tensor,
        canvas: tuple[torch.Tensor, torch.Tensor] | None,
        known: int,
        draft: torch.Tensor | None,
        due: Sequence[int],
    ) -> Prediction:
        """
        Guess all tokens, and choose them again after the guess, which is right up to the first that differs.

        To verify a draft, that is all. Else each round makes certain one open position more than the last, at least. A
        row has as many as are due to itself: those that its neighbours need beyond repeat its last.
        """
        texts = [row.text(self.device) for row in self.rows]
        text = pad_sequence(texts, batch_first=True)
        lengths = uploaded([row.length for row in self.rows], self.device)
        if canvas is None:
            guess = logits.argmax(-1)[:, :-1] if draft is None else draft
            scores = text_processors(logits, Texts.with_guess(text, lengths, guess))
            tokens = self._choose(scores)
            if draft is not None:
                tokens[:, :-1] = self._or_draft(tokens[:, :-1], draft, scores[:, :-1])
            return self._prediction(logits, scores, tokens)
        ids, masked = canvas
        tokens = guess = self._choose(logits, -known).where(masked, ids)
        rounds = uploaded([[max(each, GUESSES)] for each in due], self.device)
        for number in range(max(GUESSES, *due)):
            guess, scores = tokens.where(number < rounds, guess), logits.clone()
            texts_seen = Texts.with_guess(text, lengths, guess[:, known:])
            scores[:, known:] = text_processors(logits[:, known:], texts_seen)
            self._forbid_mask(scores)
            tokens = self._choose(scores, -known).where(masked, ids)
        differs = tokens != guess
        certain = differs.cumsum(-1) - differs.int() == 0
        return self._prediction(logits, scores, tokens, certain)

    def _predict_in_text(
        self,
        logits: torch.Tensor,
        canvas: tuple[torch.Tensor, torch.Tensor] | None,
        known: int,
        draft: torch.Tensor | None,
        only_known: bool,
        in_step: bool,
    ) -> Prediction:
        request, processors = self.request, self.request.processors
        scores, texts = logits.clone(), [row.text(self.device) for row in self.rows]
        ids = self._choose(scores, -known)
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if canvas is not None:
            wanted, ids = canvas[1], ids.where(canvas[1], canvas[0])
        goes_on, kept = torch.ones_like(wanted[:, 0]), torch.zeros_like(ids[:, 0])
        # What is beyond a stop that only a criterion knows of must not be asked of a processor that may keep state.
        watched = request.stopping.any and draft is not None and processors.keeps_state
        if watched and canvas is not None:  # what is settled at the front of a block comes before what is asked about
            kept = (~self.canvas[1]).int().cumprod(-1).sum(-1)
        for column in range(known, ids.shape[1]):
            asked = wanted[:, column] & goes_on
            before = [
                torch.cat([text, row[known:column]]) if ask else None
                for text, row, ask in zip(texts, ids, asked.tolist(), strict=True)
            ]
            here = slice(column, column + 1)
            numbers = [row.number for row in self.rows]

            def batch(chosen: torch.Tensor = ids[:, known:column]) -> torch.Tensor:
                return request.padded(zip(self.rows, chosen.tolist(), strict=True))

            scores[:, here] = processors(logits[:, here], numbers, before, batch, only_known)
            if canvas is not None:
                goes_on = goes_on & self._forbid_mask(scores[:, here])[:, 0]
            chosen = self._choose(scores[:, here], column - known)[:, 0]
            ids[:, column] = chosen.where(asked, ids[:, column])
            if draft is not None and column < draft.shape[1]:
                ids[:, here] = self._or_draft(ids[:, here], draft[:, here], scores[:, here]).where(
                    asked[:, None], ids[:, here]
                )
            goes_on = goes_on & ~self._ends(ids[:, known : column + 1])
            if draft is not None and column < draft.shape[1]:
                goes_on = goes_on & ((ids[:, column] == draft[:, column]) | (draft[:, column] == ANY))
            if watched:
                kept = kept + asked
                goes_on = goes_on & ~self._ends_by_criterion(ids, scores, kept, wanted, in_step)
            if in_step:
                goes_on = goes_on & goes_on.all()
        return self._prediction(logits, scores, ids)

    def _ends(self, ids: torch.Tensor) -> torch.Tensor:
        """(R,) bool, whether the last of (R, n) tokens to come ends the row's text."""
        size = ids.shape[1]
        ends = [
            size >= row.most_new_tokens - len(row.tokens) or token in self.request.eos
            for row, token in zip(self.rows, ids[:, -1].tolist(), strict=True)
        ]
        return uploaded(ends, self.device, torch.bool)

    def _ends_by_criterion(
        self, ids: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor, in_step: bool
    ) -> torch.Tensor:
        """(R,) bool, whether the text ends within each row's first `kept` of (R, S) tokens to come, some `wanted`."""
        counts, canvases = kept.tolist(), []
        for idx, (count, own, new) in enumerate(zip(counts, ids.tolist(), wanted.tolist(), strict=True)):
            size = len(own)
            records: dict[str, list[Any]] = {name: [RECORDS[name]] * size for name in self.request.recorded}
            if "scores" in records:
                records["scores"] = [
                    scores[idx, at] if is_new else self.rows[idx].canvas.records["scores"][at]
                    for at, is_new in enumerate(new)
                ]
            canvases.append(Canvas(own, [False] * size, [0] * size, records, checked=max(count - 1, 0)))
        # Not by time, which may be over here, but ends the text behind what this pass keeps.
        stops = first_stops(self.rows, canvases, counts, in_step, timed=False)
        return uploaded([ended for _, ended in stops], self.device, torch.bool)

    def _choose(self, scores: torch.Tensor, first: int = 0) -> torch.Tensor:
        """(R, S) tokens by (R, S, V) scores of the positions from `first` after the text's end on: best, or drawn."""
        if self.request.config.do_sample:
            scores = scores + gumbel_noise(*self._seeds_and_positions(scores.shape[1], first), scores.shape[-1])
        return scores.argmax(-1)

    def _or_draft(self, tokens: torch.Tensor, draft: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The draft's (R, n) instead of one's own tokens where their (R, n, V) scores make it likely enough."""
        ratio = self.request.config.acceptance_ratio
        if ratio == 1:
            return tokens
        log_ratio = scores.gather(-1, draft[..., None]) - scores.gather(-1, tokens[..., None])
        likely = log_ratio[..., 0] >= math.log(ratio)
        # Where a callback has vetoed what was drafted, the mask stands.
        return torch.where(likely & (draft != self.request.mask_token_id), draft, tokens)

    def _uniform(self, ids: torch.Tensor, steps: list[int], first: int) -> torch.Tensor:
        """(R, S) noise of a pass over a canvas that begins `first` after the text's end."""
        numbers = uploaded(steps, self.device)[:, None]
        return uniform_noise(*self._seeds_and_positions(ids.shape[1], first), numbers)

    def _seeds_and_positions(self, positions: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(R,) seeds and (R, S) places in the rows' texts."""
        seeds = uploaded([row.seed for row in self.rows], self.device)
        starts = uploaded([row.length + first for row in self.rows], self.device)
        return seeds, starts[:, None] + torch.arange(positions, device=self.device)

    def _forbid_mask(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Set the mask id to -inf again where logits processors may have made new scores (R, S, V).

        Returns:
            (R, S) bool, whether another token is possible; where none is, there can be no text, but a draft.
        """
        scores[..., self.request.mask_token_id] = -torch.inf
        return (scores > -torch.inf).any(-1)

    def _prediction(
        self, logits: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, certain: torch.Tensor | None = None
    ) -> Prediction:
        processors, problems = self.request.processors, torch.zeros_like(tokens, dtype=torch.int8)
        if processors.lists[0]:
            problems = problems.masked_fill(~(scores > -torch.inf).any(-1), FORBIDDEN)
            if self.request.config.do_sample:  # the best of such is that of who made them, but nothing can be drawn
                best = scores.amax(-1)
                problems = problems.masked_fill(best.isnan() | (best == torch.inf), NO_SCORE)
        if not processors.repairs:
            # What is no number, or infinite, less itself is no number: fewer operations than `isfinite`.
            largest = logits.amax(-1)
            problems = problems.masked_fill((largest - largest) != 0, NOT_A_NUMBER)
        if self.positions is not None:  # of (N,) tokens; what is elsewhere stays as it is
            ids = self.canvas[0]
            tokens = ids.flatten().index_copy(0, self.positions, tokens).view(ids.shape)
            problems = problems.new_zeros(ids.numel()).index_copy(0, self.positions, problems).view(ids.shape)
        return Prediction(logits, tokens, scores, problems, certain, self.positions)

    def report(self, prediction: Prediction, committed: torch.Tensor | None = None) -> torch.Tensor:
        """
        All that the host wants to know of a pass in one tensor, (R, n, S) float64.

        These are tokens and problems; of a denoiser pass where they are committed now, (R, S); then confidences, and
        log-probabilities, where something wants them.
        """
        request = self.request
        assert prediction.problems is not None and prediction.scores is not None
        parts = [prediction.tokens, prediction.problems]
        if committed is not None:
            parts.append(committed)
        if request.recorded or (committed is None and self.watched):
            parts.append(prediction.confidence)
        if request.recorded:
            parts.append(prediction.log_prob)
            wide = {"scores": prediction.scores, "logits": prediction.logits}
            self.wide = {name: wide[name] for name in WIDE_RECORDS if name in request.recorded}
        return torch.stack([part.double() for part in parts], dim=1)

    def commit(self, values: list[list[list[float]]]) -> list[Canvas]:
        """
        Fix on the rows' canvases, which are returned, what a denoiser pass committed, and show them. Without canvases
        new ones hold what was chosen.

        Args:
            values: what [`report`] became on the host.
        """
        request, known = self.request, self.request.strategy.known
        if request.strategy.steps_knob is None:
            return self.chosen(values, step=0)
        for idx, (row, (tokens, problems, committed, *recorded)) in enumerate(zip(self.rows, values, strict=True)):
            canvas = row.canvas
            for column in (column for column, now in enumerate(committed) if now):
                canvas.ids[column] = int(tokens[column])
                canvas.open[column] = False
                canvas.problems[column] = int(problems[column])
                if request.recorded:
                    canvas.records["commit_steps"][column] = row.step
                    canvas.records["confidences"][column] = recorded[0][column]
                    canvas.records["log_probs"][column] = recorded[1][column]
                for name, record in self.wide.items():
                    canvas.records[name][column] = record[idx, column]
            row.step += 1
        if request.streamer is not None and hasattr(request.streamer, "put_draft"):
            with torch.inference_mode(False), torch.no_grad():
                request.streamer.put_draft(torch.tensor([row.canvas.ids[known:] for row in self.rows]))
        return [row.canvas for row in self.rows]

    def chosen(self, values: list[list[list[float]]], step: int = -1) -> list[Canvas]:
        """Canvases of which every position is what was chosen, from what [`report`] became on the host."""
        canvases = []
        for idx, (tokens, problems, *recorded) in enumerate(values):
            records: dict[str, list[Any]] = {}
            if self.request.recorded:
                steps = [step] * len(tokens)
                records = {"commit_steps": steps, "confidences": recorded[0], "log_probs": recorded[1]}
            records |= {name: list(record[idx]) for name, record in self.wide.items()}
            canvases.append(Canvas(list(map(int, tokens)), [False] * len(tokens), list(map(int, problems)), records))
        return canvases

    def _ask_callback(
        self, state: BlockStep, prediction: Prediction, masked: torch.Tensor, must_commit: bool
    ) -> tuple[Prediction, torch.Tensor]:
        """What the user's callback makes of a pass; with `must_commit` no position may stay open."""
        request = self.request
        rows, steps = state.rows.clone(), state.steps
        assert request.step_callback is not None
        request.step_callback(state)
        _check_answer("commit", state.commit, masked)
        _check_answer("tokens", state.tokens, prediction.tokens)
        commit = state.commit & masked
        if must_commit and not torch.equal(commit, masked):
            row, column = (masked & ~commit).nonzero()[0].tolist()
            raise ValueError(
                f"step_callback vetoed position {column} of row {int(rows[row])} in the last of {steps} "
                "steps; replace its token or raise steps_per_block"
            )
        wrong = state.tokens[commit & ((state.tokens < 0) | (state.tokens >= prediction.logits.shape[-1]))]
        if len(wrong) > 0:
            raise ValueError(f"step_callback committed token {int(wrong[0])}, outside the vocabulary")
        if (state.tokens[commit] == request.mask_token_id).any():
            raise ValueError(f"step_callback committed the mask id {request.mask_token_id}; veto the position instead")
        assert prediction.scores is not None
        tokens = state.tokens.where(commit, prediction.tokens)
        if request.processors.known_sees_text and (commit & (tokens != prediction.tokens)).any():
            names = ", ".join(request.processors.text_readers())
            raise ValueError(
                f"step_callback replaced a token while {names} reads the text, so that what was chosen behind it "
                "would have to be chosen again; veto positions instead, or leave one of them out"
            )
        return self._prediction(prediction.logits, prediction.scores, tokens), commit


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


__all__ = ["Group"]
