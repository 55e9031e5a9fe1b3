"""Decoding: blocks filled by the denoiser, drafts verified by the context tower, or one token at a time by either.

One class per mode. Its methods advance rows by one pass and never loop: the engine runs the passes, and calls `begin`
for a row that joins, `open` for rows that need a canvas, `after_denoise` once a denoiser pass has left its mark on
canvases, and `after_read` with what was read back from the device after a pass of the context tower; on the device
before, `read` chooses tokens.

Shapes: R rows of a pass, S block, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .decoding.adapter import TwoTowerGenerationAdapter
from .decoding.asking import RowsOwn, Stateless
from .decoding.choosing import Group
from .decoding.config import MODES, TwoTowerGenerationConfig
from .decoding.drafting import DraftController
from .decoding.engine import Engine
from .decoding.pass_costs import costs_of, draft_lengths
from .decoding.rules import DRAFT_NOT_A_NUMBER, NOT_A_NUMBER, Prediction
from .decoding.state import (
    DENOISE,
    ENDED,
    OPEN,
    READ,
    VERIFY,
    BlockStep,
    Canvas,
    Request,
    Row,
    TwoTowerGenerateOutput,
)
from .decoding.stopping import first_stops


class Strategy:
    """
    What the modes share, and what others ask about a mode. Phases that methods return say what a row waits for next.
    """

    # Of `generate`'s knobs and arguments, those that not every mode looks at; the knob that bounds the passes over a
    # canvas, of a mode that fills some, so that rows take tokens in any number; and as what it then asks a processor
    # without attributes.
    knobs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    steps_knob: str | None = None
    asks_plain_as: Any = None
    # Whether it needs the denoiser, whether that chooses what is written, and whether a part of drafts is kept.
    needs_denoiser, denoiser_chooses, verifies = True, True, False
    least_unread = 1  # tokens of a text that a cache it is given must not hold yet
    denoiser_call = "denoise"  # the model's method that a denoiser pass is a call of
    known = 0  # how many of a canvas's first tokens the text holds already
    after_reading: str | None = None  # what a row waits for once it has been read; by default its next token is chosen

    def write_first_stop(self, engine: Engine, rows: Sequence[Row], canvases: Sequence[Canvas]) -> None:
        """Write what is chosen up to the first stop; rows that go on take `after_writing`'s phase."""
        stops = first_stops(rows, canvases, [len(canvas.ids) for canvas in canvases])
        for row, canvas, (_, ended) in zip(rows, canvases, stops, strict=True):
            if not ended:
                row.phase = self.after_writing(row, canvas)
        engine.write(rows, canvases, stops)

    def after_writing(self, row: Row, canvas: Canvas) -> str:
        raise NotImplementedError

    def leave(self, engine: Engine, row: Row) -> None:
        """A row has ended, also as failed or cancelled."""


class MaskDiffusion(Strategy):
    """
    The context tower reads the prompt; then, block after block, each row at its own pace:

    1. denoise the block, step by step; a row whose text ends within what is committed leaves;
    2. once none of it is open, write it;
    3. read it, unless the text has ended.
    """

    knobs, steps_knob = ("block_size", "steps_per_block", "unmasking_rule"), "steps_per_block"
    arguments, asks_plain_as = ("starting_block", "step_callback"), Stateless
    least_unread, after_reading = 0, OPEN

    def begin(self, row: Row) -> str:
        return READ if row.unread else OPEN

    def open(self, engine: Engine, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if row.starting_block is not None]
        for row in rows:
            row.phase = DENOISE
            given, row.starting_block = row.starting_block, None
            row.open_canvas([], row.request.config.block_size)
            if given is not None:
                mask = row.request.mask_token_id
                row.canvas.ids[: len(given)] = given
                row.canvas.open = [token == mask for token in row.canvas.ids]
        if begun:
            self.after_denoise(engine, begun, [row.canvas for row in begun])

    def after_denoise(self, engine: Engine, rows: Sequence[Row], canvases: Sequence[Canvas]) -> None:
        prefixes = [[*canvas.open, True].index(True) for canvas in canvases]
        stops = first_stops(rows, canvases, prefixes)
        # A block is written as a whole, or up to where the text ends in it.
        leaving = [row for row, (_, ended) in zip(rows, stops, strict=True) if ended]
        settled = [row in leaving or not _is_open(row, leaving) for row in rows]
        for row, canvas, full in zip(rows, canvases, settled, strict=True):
            if full:
                row.unread, row.phase = canvas.ids, READ
        kept = [stop if full or stop[0] < 0 else (0, False) for stop, full in zip(stops, settled, strict=True)]
        engine.write(rows, canvases, kept)


class SelfSpeculative(Strategy):
    """
    The context tower reads the prompt and chooses a token; then, cycle after cycle:

    1. draft: a canvas that begins with the newest token, which is not read yet, is filled by the denoiser;
    2. verify: the context tower reads it tentatively and chooses its own token after every position;
    3. keep the drafted tokens that are its own choice up to the first that is not, and then its choice there;
    4. let the cache keep as much, which leaves the newest token unread.

    A stopping criterion about all rows ends a row when all have come as far; a cache that is wanted afterwards
    must not hold more than the text, so then all rows keep as much as the one that keeps least.

    Choices are those of mode "ar": the same logits, processors and noise, so the text is, too. With `acceptance_ratio`
    below 1, 3. also keeps drafted tokens that are so much as likely as the context tower's choice.
    """

    knobs = ("block_size", "draft_steps", "draft_length", "acceptance_ratio", "unmasking_rule")
    steps_knob, arguments, asks_plain_as = "draft_steps", ("step_callback",), RowsOwn
    denoiser_chooses, verifies, known = False, True, 1

    def begin(self, row: Row) -> str:
        row.watched = True
        return READ

    def open(self, engine: Engine, rows: Sequence[Row]) -> None:
        """The newest token and open positions behind it; without any, the token is read, as in a step of mode "ar"."""
        drafting = self._drafting(engine, rows[0].request)
        size = drafting.choose(rows) if isinstance(drafting, DraftController) else drafting
        watched = isinstance(drafting, DraftController) and drafting.watches
        for row in rows:
            row.watched = watched
            if size == 1:
                row.unread, row.phase = [row.newest], READ
                continue
            row.open_canvas([row.newest], size)
            row.phase = DENOISE

    def _drafting(self, engine: Engine, request: Request) -> DraftController | int:
        """What chooses the lengths of drafts, or their one length."""
        config = request.config
        size, steps = config.block_size, config.draft_steps
        if config.draft_length != "auto":
            return config.draft_length
        if config.acceptance_ratio < 1:
            return size  # the text depends on it
        # What a compiler makes costs half a minute to try, and is taken to cost what eager passes do.
        recorded = config.compile and engine.compiled is not None and engine.compiled.records
        if (size, steps, recorded) not in engine.drafting:
            # Ranks that keep in step cannot measure, nor know what the others would choose.
            missing: Literal["none", "measure"] = "none" if engine.synced else "measure"
            costs = costs_of(engine.model, size, engine.most_rows, missing, recorded)
            engine.drafting[size, steps, recorded] = size
            if costs is not None:

                def cycle(length: int, rows: int) -> float:
                    return costs.cycle(length, rows, min(steps, length - 1))  # each pass fills a position at least

                engine.drafting[size, steps, recorded] = DraftController(draft_lengths(size), cycle)
        return engine.drafting[size, steps, recorded]

    def after_denoise(self, engine: Engine, rows: Sequence[Row], canvases: Sequence[Canvas]) -> None:
        for row in rows:
            if not _is_open(row) or row.step == row.request.steps:
                row.phase = VERIFY

    def read(self, group: Group, logits: torch.Tensor) -> Prediction:
        """The context tower's own choices; of a draft also where it keeps the tokens drafted."""
        if group.rows[0].phase == READ:
            return group.predict(logits)
        draft = group.canvas[0][:, 1:]
        return group.predict(logits, draft=draft, in_step=_all_keep_as_much(group.request))

    def after_read(
        self, engine: Engine, group: Group, canvases: Sequence[Canvas], values: list[Any]
    ) -> dict[Row, int]:
        """Returns how many tokens of a draft each row keeps."""
        rows, drafting = group.rows, self._drafting(engine, group.request)
        confidences = [reported[2] for reported in values] if group.watched else None
        kept, drafted, begins = {}, [0] * len(rows), not rows[0].tokens
        for row in rows:
            row.cycles += not begins
        if rows[0].phase == READ:
            self.write_first_stop(engine, rows, canvases)
        else:
            drafted = self._agreed(rows, canvases)
            counts = [accepted + 1 for accepted in drafted]
            stops = first_stops(rows, canvases, counts, _all_keep_as_much(group.request))
            for row, canvas, accepted, (count, ended) in zip(rows, canvases, drafted, stops, strict=True):
                row.drafts_kept += [0] * (len(canvas.ids) - 1 - len(row.drafts_kept))
                for column in range(min(accepted, max(count, 0))):
                    row.drafts_kept[column] += 1
                kept[row] = max(count, 0)
                if not ended:
                    row.newest, row.phase = canvas.ids[count - 1], OPEN
            engine.write(rows, canvases, stops)
        if not isinstance(drafting, DraftController):
            return kept
        if begins:
            assert confidences is not None
            for row, (confidence, *_) in zip(rows, confidences, strict=True):
                drafting.start(row, confidence)
            return kept
        drafting.learn(rows, len(canvases[0].ids), drafted, confidences)
        for row in rows:
            if row.phase == ENDED:
                drafting.forget(row)
        return kept

    def _agreed(self, rows: Sequence[Row], canvases: Sequence[Canvas]) -> list[int]:
        """How many drafted tokens of each row are those that the context tower chose, up to the first that is not."""
        drafted = []
        for row, canvas in zip(rows, canvases, strict=True):
            draft = row.canvas
            agrees = [ours == theirs for ours, theirs in zip(canvas.ids, draft.ids[1:], strict=False)]
            drafted.append(agrees.index(False) if False in agrees else len(agrees))
            if "commit_steps" in canvas.records:
                steps = draft.records["commit_steps"][1:]
                canvas.records["commit_steps"] = [s if a else -1 for s, a in zip(steps, agrees, strict=True)] + [-1]
            if NOT_A_NUMBER in draft.problems:
                canvas.problems = [problem or DRAFT_NOT_A_NUMBER for problem in canvas.problems]
        return drafted

    def after_writing(self, row: Row, canvas: Canvas) -> str:
        row.newest = canvas.ids[0]
        return OPEN

    def leave(self, engine: Engine, row: Row) -> None:
        for drafting in engine.drafting.values():
            if isinstance(drafting, DraftController):
                drafting.by_row.pop(row, None)  # of a row that did not end with a draft, nothing was learnt


class MockAr(Strategy):
    """
    One token per denoiser pass: 1. the denoiser reads the newest token and chooses the next; 2. the context tower, one
    token behind, reads the former.
    """

    denoiser_call, after_reading = "predict_next", DENOISE

    def begin(self, row: Row) -> str:
        row.newest = row.unread.pop()
        return READ if row.unread else DENOISE

    def after_denoise(self, engine: Engine, rows: Sequence[Row], canvases: Sequence[Canvas]) -> None:
        self.write_first_stop(engine, rows, canvases)

    def after_writing(self, row: Row, canvas: Canvas) -> str:
        row.unread, row.newest = [row.newest], canvas.ids[0]
        return READ


class Ar(Strategy):
    """The context tower alone: 1. it reads the prompt, or the newest token, 2. and chooses the next."""

    needs_denoiser, denoiser_chooses = False, False

    def begin(self, row: Row) -> str:
        return READ

    def read(self, group: Group, logits: torch.Tensor) -> Prediction:
        return group.predict(logits)

    def after_read(
        self, engine: Engine, group: Group, canvases: Sequence[Canvas], values: list[Any]
    ) -> dict[Row, int]:
        self.write_first_stop(engine, group.rows, canvases)
        return {}

    def after_writing(self, row: Row, canvas: Canvas) -> str:
        row.unread = canvas.ids
        return READ


def _is_open(row: Row, leaving: Sequence[Row] = ()) -> bool:
    """Whether a position of its canvas is open, or if rows keep in step, of any row that does not leave."""
    rows = row.request.going_on() if row.request.in_step else [row]
    return any(True in one.canvas.open for one in rows if one not in leaving)


def _all_keep_as_much(request: Request) -> bool:
    return request.keep_cache and len(request.stopping.shared) > 0


STRATEGIES = {
    "mask_diffusion": MaskDiffusion(),
    "self_speculative": SelfSpeculative(),
    "mock_ar": MockAr(),
    "ar": Ar(),
}


class TwoTowerGenerationMixin(TwoTowerGenerationAdapter):
    """`generate` in the modes above."""

    strategies = STRATEGIES


__all__ = ["MODES", "BlockStep", "TwoTowerGenerateOutput", "TwoTowerGenerationConfig", "TwoTowerGenerationMixin"]
