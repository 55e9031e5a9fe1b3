"""The engine: rows of any number of requests, each at its own pace, through passes of the two towers.

An iteration runs at most one denoiser pass and one context pass, each over the rows that wait for it; what a row does
next is its strategy's to say. Rows lie at the front of one cache in the order of `rows`; one that ends changes places
with the last, so that passes over all rows look at views of the cache, and nothing is copied but that row.

What comes back from the device is read in one place, once per pass (`_host`); processors that read text, criteria and
callbacks, which are asked in between, cost reads of their own. Which rows share a pass is no more than
a matter of cost: no row's text depends on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..cache_twotower import TwoTowerCache, uploaded
from .choosing import Group
from .compiled import CompiledPasses, NotCompiled
from .rules import DRAFT_NOT_A_NUMBER, FORBIDDEN, NO_SCORE
from .state import DENOISE, ENDED, OPEN, READ, VERIFY, Canvas, Request, Row, padded

# Reading one row costs nearly what reading several does, so fewer rows than this share of all wait one denoiser pass.
WORTH_READING = 1 / 4
# Prompts so much longer than another are not padded to be read with it.
LONGER_BY, LONGER_TIMES = 64, 2


class Engine:
    """
    Args:
        model: [`TwoTowerForBlockDiffusion`].
        cache: of the rows admitted first, or a new one.
        device: of token ids.
        synced: keep passes in step with other ranks'.
        most_rows: that there will be at a time.
        alone: whether nobody else's code runs within and between steps.
    """

    def __init__(
        self,
        model: Any,
        cache: TwoTowerCache,
        device: torch.device,
        synced: bool = False,
        most_rows: int = 1,
        alone: bool = False,
    ):
        self.model, self.cache, self.device, self.synced = model, cache, device, synced
        # A pass; with other ranks, once it is its turn.
        self.run = model._pass if synced else lambda part, *args: getattr(model, part)(*args)
        self.compiled: CompiledPasses | None = None  # which runs those of rows that ask for it
        self.special_modules = synced
        self.rows: list[Row] = []  # that go on, in the order of the cache's rows
        self.parked: list[Row] = []  # behind them, those that have ended and whose cache is kept
        self.drafting: dict[Any, Any] = {}  # strategies' own: what was learnt about drafts
        self.most_rows, self.alone = most_rows, alone
        self.prompts_wait = False
        self.last_call = "denoise"
        self.passes = {"denoiser": 0, "context": 0}  # and of rows, how many took part and how many were there
        self.row_passes, self.row_chances = 0, 0

    # Admit.

    def admit(self, request: Request) -> None:
        """Let a request's rows begin: they are in the cache already, or are added to it."""
        # Quantised and sharded weights are more than tensors and not made for inference mode. Hooks may be the user's,
        # and registered since the last request.
        self.special_modules = self.synced or any(map(_is_special, self.model.modules()))
        if self.cache.batch_size != len(self.rows) + len(self.parked) + len(request.rows):
            self.cache.add_rows(len(request.rows))
        self.rows += request.rows
        self.cache.expect(max(len(row.prompt) for row in self.rows))
        for row in request.rows:
            row.phase = request.strategy.begin(row)
        if request.config.compile:
            self.compiled = self.compiled or CompiledPasses(self.model, self.alone)
            self.compiled.begin(request.config.compile_config)
        for slot, row in enumerate(self.rows):
            row.slot = slot

    # Step.

    def step(self) -> None:
        """One iteration: open canvases, at most one pass of each tower, and let the rows that have ended leave."""
        # In inference mode passes cost less, but what is shown to code of the user's could not be changed later, nor
        # be a gradient's beginning.
        ordinary = self.special_modules or any(row.request.runs_users_code for row in self.rows)
        with torch.no_grad() if ordinary else torch.inference_mode():
            for rows in _groups([row for row in self.rows if row.phase == OPEN]):
                with self.guarded(rows):
                    rows[0].request.strategy.open(self, rows)
            took_part = set()
            for waiting, run_pass in ((self._denoisers, self._denoiser_pass), (self._readers, self._context_pass)):
                if rows := waiting():
                    compiled = any(row.request.config.compile for row in rows)
                    try:
                        run_pass(rows, self.compiled if compiled else self.run)
                    except NotCompiled:
                        # Before anything was done; the others go on without.
                        with self.guarded([row for row in rows if row.request.config.compile]):
                            raise
                    took_part.update(rows)
            assert took_part or any(row.phase in (OPEN, ENDED) for row in self.rows), "rows wait for each other"
            self.row_passes += len(took_part)
            self.row_chances += len(self.rows)
            self.release()
        if not self.rows and self.compiled is not None:
            self.close()

    def close(self) -> None:
        """There are no rows any more, or none that go on."""
        if self.compiled is not None:
            self.compiled.close(self.cache)

    def _denoisers(self) -> list[Row]:
        """Those that wait for the denoiser, of one kind of pass; where there are two, in turn."""
        rows = [row for row in self.rows if row.phase == DENOISE]
        for request in {id(row.request): row.request for row in rows if row.request.in_step}.values():
            if any(map(_reads_prompt, request.going_on())):
                rows = [row for row in rows if row.request is not request]
        calls = dict.fromkeys(row.request.strategy.denoiser_call for row in rows)
        if len(calls) > 1:
            calls.pop(self.last_call, None)
        self.last_call = next(iter(calls), self.last_call)
        return [row for row in rows if row.request.strategy.denoiser_call == self.last_call]

    def _denoiser_pass(self, rows: list[Row], run: Any) -> None:
        groups = [Group(own, self.device) for own in _groups(rows)]
        # Where each group's rows are in the pass; a lone one has all.
        members: list[Any] = [slice(None)]
        if len(groups) > 1:
            members = [_members(group.rows, rows, self.device) for group in groups]
        if self.last_call == "predict_next":
            newest = uploaded([[row.newest] for row in rows], self.device)
            logits = run("predict_next", newest, self._part(rows))[:, None]
        else:
            logits = self._denoise(rows, groups, members, run)
        self.passes["denoiser"] += 1
        for row in rows:
            # A row that keeps in step with others may have nothing open on its canvas, where the mode has some.
            row.denoiser_forwards += not row.canvas.ids or True in row.canvas.open
        reports = []
        for group, own in zip(groups, members, strict=True):
            with self.guarded(group.rows):
                theirs = group.meet(logits[own if isinstance(own, slice) else own.to(logits.device)])
                reports.append((group, group.denoise_step(theirs)))
        for group, values in self._host(reports):
            with self.guarded(group.rows):
                group.request.strategy.after_denoise(self, group.rows, group.commit(values))

    def _denoise(self, rows: list[Row], groups: list[Group], members: list[Any], run: Any) -> torch.Tensor:
        """Logits (R, S, V) of the rows' canvases, or of a lone group (N, V) of its `positions`."""
        # Programs are of all positions.
        if len(groups) == 1 and run is self.run and self.model.may_leave_out_positions():
            groups[0].leave_out_settled()
        timesteps = []
        for group in groups:
            steps, request = [row.step for row in group.rows], group.request
            group.timestep = request.rule.timestep(group.canvas[1], steps, request.steps)
            timesteps.append(group.timestep)
        times, canvases = timesteps[0], [groups[0].canvas[0]]
        if len(groups) > 1:
            times, canvases = times.new_empty(len(rows)), self._canvases(rows)
            for own, at in zip(timesteps, members, strict=True):
                times[at] = own
        if groups[0].positions is None:
            return run("denoise", canvases[0], self._part(rows), times, *canvases[1:])
        return run("denoise", canvases[0], self._part(rows), times, None, groups[0].positions)

    def _canvases(self, rows: list[Row]) -> list[torch.Tensor]:
        """Of several groups; those of different sizes are padded, and only then masked."""
        sizes = [len(row.canvas.ids) for row in rows]
        width = max(sizes)
        canvases = [[padded(row.canvas.ids, width, 0) for row in rows]]
        if min(sizes) < width:
            canvases.append([padded([1] * size, width, 0) for size in sizes])
        return [uploaded(each, self.device) for each in canvases]

    def _readers(self) -> list[Row]:
        """
        Which of the rows that wait for the context tower it reads now.

        Few of many wait for more, once. Prompts are read apart from what is short, in turn. Rows of a request that
        take their passes together read once all of them can, and the ends of their prompts in one chunk.
        """
        waiting = [row for row in self.rows if row.phase in (READ, VERIFY)]
        for request in {id(row.request): row.request for row in waiting if row.request.in_step}.values():
            ready = own = request.going_on()
            if prompts := [row for row in own if _reads_prompt(row)]:
                most = max(map(_chunks_left, prompts))
                ready = [row for row in prompts if _chunks_left(row) == most]
            elif any(row.phase == DENOISE for row in own):
                ready = []
            waiting = [row for row in waiting if row.request is not request or row in ready]
        prompts = [row for row in waiting if _reads_prompt(row)]
        short = [row for row in waiting if row not in prompts] if prompts else waiting
        if prompts and (self.prompts_wait or not short):
            self.prompts_wait = False
            first = next((row for row in prompts if row.waited), prompts[0])
            now = [row for row in prompts if _may_be_padded(row, first) or row.request.in_step]
            for row in prompts:
                row.waited = row not in now
            return now
        self.prompts_wait = bool(prompts)
        few = 0 < len(short) < WORTH_READING * len(self.rows)
        if few and any(row.phase == DENOISE for row in self.rows) and not any(row.waited for row in short):
            for row in short:
                row.waited = True
            return []
        return short

    def _context_pass(self, rows: list[Row], run: Any) -> None:
        part = self._part(rows)
        chunks = [_chunk(row) for row in rows]
        counts = [len(chunk) for chunk in chunks]
        width = max(counts)
        tentative = width > 1 and any(row.phase == VERIFY for row in rows)
        ids = uploaded([chunk + [0] * (width - len(chunk)) for chunk in chunks], self.device)
        even = min(counts) == width
        hidden_states = run("context_tower", ids, part, None if even else counts, tentative)
        self.passes["context"] += 1
        for row in rows:
            row.context_forwards += 1
            row.waited = False
        kept = dict(zip(rows, counts, strict=True))
        reading = [row for row in rows if row.phase == READ]
        for row, count in zip(rows, counts, strict=True):
            if row.phase == READ:
                row.unread = row.unread[count:]
        reports = []
        for rows_of_group in _groups([row for row in rows if row.phase == VERIFY or not row.unread]):
            strategy = rows_of_group[0].request.strategy
            if rows_of_group[0].phase == READ and strategy.after_reading is not None:
                for row in rows_of_group:
                    row.phase = strategy.after_reading
                continue
            with self.guarded(rows_of_group):
                own = hidden_states
                if len(rows_of_group) < len(rows):
                    own = own[_members(rows_of_group, rows, own.device)]
                if rows_of_group[0].phase == VERIFY:
                    own = own[:, : kept[rows_of_group[0]]]
                else:
                    own = own[:, -1] if even else _last(own, [kept[row] for row in rows_of_group])
                logits = run("context_lm_head", own)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits = logits[:, None] if logits.ndim == 2 else logits
                group = Group(rows_of_group, self.device)
                reports.append((group, group.report(strategy.read(group, group.meet(logits)))))
        for row in rows:
            if row not in reading:
                kept[row] = 0  # unless its verification gets as far as to say otherwise
        for group, values in self._host(reports):
            with self.guarded(group.rows):
                kept.update(group.request.strategy.after_read(self, group, group.chosen(values), values))
        if tentative:
            counts = [kept[row] for row in rows]
            part.accept(counts) if run is self.run else run("accept", part, counts)

    def _part(self, rows: list[Row]) -> TwoTowerCache:
        """The cache as far as it is about some rows; all of it, or its beginning, are views."""
        if len(rows) == self.cache.batch_size:
            return self.cache
        if len(rows) == len(self.rows):
            return self.cache.part(slice(0, len(rows)))
        return self.cache.part([row.slot for row in rows])

    def _host(self, reports: list[tuple[Group, torch.Tensor]]) -> Iterator[tuple[Group, list[Any]]]:
        """What groups report, read back together."""
        if len(reports) == 1:
            yield reports[0][0], reports[0][1].tolist()
            return
        flat: list[float] = []
        if reports:
            device = reports[0][1].device
            flat = torch.cat([values.flatten().to(device) for _, values in reports]).tolist()
        start = 0
        for group, values in reports:
            stop = start + values.numel()
            yield group, _nested(flat[start:stop], values.shape)
            start = stop

    # Emit.

    def write(self, rows: Sequence[Row], canvases: Sequence[Canvas], stops: Sequence[tuple[int, bool]]) -> None:
        """Add to the texts of rows what is kept of their canvases, see [`first_stops`], and hand it out."""
        written: dict[Request, list[tuple[Row, list[int]]]] = {}
        for row, canvas, (kept, ended) in zip(rows, canvases, stops, strict=True):
            row.write(canvas, kept)
            if ended:
                row.phase = ENDED
                row.problem = canvas.problems[kept - 1] if kept > 0 else 0
            written.setdefault(row.request, []).append((row, canvas.ids[: max(kept, 0)]))
        for request, new in written.items():
            with self.guarded([row for row, _ in new]):
                for row, tokens in new:
                    if row.problem:
                        raise ValueError(_problem_message(row, row.problem))
                    if request.on_tokens is not None:
                        request.on_tokens(row, tokens)
                if request.streamer is not None:
                    request.stream()

    # Release.

    def release(self) -> None:
        """Let the rows that have ended leave their places to the last ones."""
        ended = [row for row in self.rows if row.phase == ENDED]
        if ended:
            going_on = [len(row.prompt) for row in self.rows if row.phase != ENDED]
            self.cache.expect(max(going_on, default=0))
        for row in ended:
            last = len(self.rows) - 1
            if row.slot < last:
                self.cache.swap_rows(row.slot, last)
                self.rows[row.slot], self.rows[last] = self.rows[last], row
                self.rows[row.slot].slot, row.slot = row.slot, last
            self.rows.pop()
            row.request.strategy.leave(self, row)
            if row.request.keep_cache and row.request.on_end is None:
                self.parked.append(row)
                continue
            if row.request.keep_cache:
                row.cache = self.cache.copy_rows([last])
            self.cache.drop_rows(1)
        for request in {id(row.request): row.request for row in ended}.values():
            if request.on_end is not None and not request.going_on():
                request.on_end(request)

    @contextmanager
    def guarded(self, rows: Sequence[Row]) -> Iterator[None]:
        """What fails on behalf of a request ends that request, where it wants to know of it, and no other."""
        try:
            yield
        except Exception as error:
            requests = {id(row.request): row.request for row in rows}.values()
            if any(request.on_error is None for request in requests):
                raise
            for request in requests:
                request.on_error(request, error)  # type: ignore[misc]
                for row in request.rows:
                    row.phase = ENDED


def _is_special(module: torch.nn.Module) -> bool:
    weights = (weight for weight in module._parameters.values() if weight is not None)
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or any(type(weight) is not torch.nn.Parameter for weight in weights)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may share operations: of the same settings, waiting for the same, with canvases of one size."""
    if len(rows) == 1:
        return [list(rows)]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        size = len(row.canvas.ids) if row.phase in (DENOISE, VERIFY) else 0
        groups.setdefault((row.request.key, row.phase, size), []).append(row)
    return list(groups.values())


def _members(some: Sequence[Row], rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """Where some rows are among those of a pass."""
    number = {row: idx for idx, row in enumerate(rows)}
    return uploaded([number[row] for row in some], device)


def _last(hidden_states: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(R, T, H) -> (R, H) of each row's last token."""
    last = uploaded(counts, hidden_states.device) - 1
    return hidden_states[torch.arange(len(counts), device=last.device), last]


def _chunk(row: Row) -> list[int]:
    if row.phase == VERIFY:
        return row.canvas.ids
    size = row.request.config.prefill_chunk_size
    return row.unread if size is None else row.unread[:size]


def _reads_prompt(row: Row) -> bool:
    return row.phase == READ and row.block < 0 and not row.tokens


def _chunks_left(row: Row) -> int:
    size = row.request.config.prefill_chunk_size
    return 1 if size is None else -(-len(row.unread) // size)


def _may_be_padded(row: Row, other: Row) -> bool:
    """Whether a prompt is not so much shorter or longer than another that they are better read apart."""
    shorter, longer = sorted((len(_chunk(row)), len(_chunk(other))))
    return longer <= LONGER_TIMES * shorter + LONGER_BY


def _nested(flat: list[float], shape: torch.Size) -> list[Any]:
    """Numbers in a list as lists within lists."""
    if len(shape) == 1:
        return flat
    size = len(flat) // shape[0]
    return [_nested(flat[start : start + size], shape[1:]) for start in range(0, len(flat), size)]


def _problem_message(row: Row, problem: int) -> str:
    request, strategy = row.request, row.request.strategy
    new = len(row.tokens) - 1
    where = (
        f"at position {len(row.prompt) + new} of row {row.number}, after {new} new tokens, "
        f"{row.context_forwards} passes of the context tower and {row.denoiser_forwards} of the denoiser"
    )
    if problem == FORBIDDEN:
        blocks = strategy.denoiser_chooses and strategy.steps_knob is not None
        mask = f" but the mask id {request.mask_token_id}" if blocks else ""
        return f"the logits processors forbid every token{mask} {where}; allow one, for example end-of-text"
    if problem == NO_SCORE:
        return (
            f"nothing can be drawn: the logits processors make scores that are no numbers (NaN or infinity) {where}; "
            "look for one that does, or for a temperature near 0"
        )
    denoiser = problem == DRAFT_NOT_A_NUMBER or strategy.denoiser_chooses
    return (
        f"the {'denoiser' if denoiser else 'context tower'} gives no numbers (NaN or infinity) {where}; look for "
        "NaN in the model's weights, or try float32"
    )


__all__ = ["Engine"]
