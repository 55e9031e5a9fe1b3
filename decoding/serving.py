"""Requests that come and go: the [`Engine`] for a queue of them, with handles, a thread and results as they finish.

with TwoTowerEngine(model, slots=16) as engine:
    handle = engine.add_request(input_ids, max_new_tokens=64, mode="self_speculative")
    for token in handle: ...
    output = handle.result()
"""

import asyncio
import atexit
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from queue import Full
from threading import Condition, Lock, RLock, Thread, get_ident
from traceback import walk_tb
from types import FrameType, SimpleNamespace
from typing import Any
from weakref import ref

import torch
from transformers import GenerationConfig

from ..cache_twotower import TwoTowerCache
from ..checkpoints.placement import prompts_device
from ..compat_twotower import GenerationOutput, RequestStatus
from ..inputs_twotower import as_ids
from .config import STRATEGY_DEFAULTS
from .engine import Engine
from .state import ENDED, Request, Row, TwoTowerGenerateOutput

# How long a process that ends waits for the pass of an engine that was not stopped.
MOST_SECONDS_AT_EXIT = 60


class _Turn:
    """Of threads that want to make an engine step, one at a time may; it knows which."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None

    def is_mine(self) -> bool:
        return self._owner == get_ident()

    def is_free(self) -> bool:
        return not self._lock.locked()

    @contextmanager
    def taken(self) -> Iterator[None]:
        if self.is_mine():
            raise RuntimeError(
                "step was called within a step, as by a streamer or a callback; leave it to the outer one"
            )
        with self._lock:
            self._owner = get_ident()
            try:
                yield
            finally:
                self._owner = None


class RequestHandle(Future):
    """
    What will become of a request: a `concurrent.futures.Future` whose `result(timeout)` is what `generate` returns for
    it alone, or raises what it raised. Unlike others it can be cancelled while it is running, too.

    Iterating gives the new tokens, ints, from the first one on, as they become final, and ends with the request; of
    several sequences (`num_return_sequences`) those of the first. Then what went wrong is raised, `CancelledError` if
    it was cancelled.

    Whoever waits for a token, the result or the exception of an engine without a thread takes its steps meanwhile; not
    so `concurrent.futures.wait`, `as_completed` and asyncio, which want an engine with a thread.
    """

    def __init__(self, request_id: str, engine: "TwoTowerEngine", prompt_ids: list[int], streaming: bool):
        super().__init__()
        self.request_id, self.prompt_ids, self.streaming = request_id, prompt_ids, streaming
        self._reports: list[Callable[[GenerationOutput], Any]] = []
        self._turn = engine._turn
        self._engine = ref(engine)  # whose memory a result must not keep
        self._tokens: list[int] = []
        self._news = Condition()
        self._admitted = False
        self._cancelling = RLock()
        self.add_done_callback(_wake)

    def running(self) -> bool:
        return self._admitted and not self.done()

    def cancel(self) -> bool:
        with self._cancelling:
            first = not self.cancelled()
            if not super().cancel():
                return False
            if first:
                # Else `concurrent.futures.wait` and `as_completed` would wait for it for ever.
                self.set_running_or_notify_cancel()
            return True

    def result(self, timeout: float | None = None) -> Any:
        self._check_may_wait()
        return super().result(self._take_steps(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_may_wait()
        return super().exception(self._take_steps(timeout))

    def _take_steps(self, timeout: float | None) -> float | None:
        """Take steps until it is done or the time is over, of which what is left is returned."""
        if timeout is None:
            while self._step_if_nobody_else():
                pass
            return None
        end = time.monotonic() + timeout
        while time.monotonic() < end and self._step_if_nobody_else():
            pass
        return max(0.0, end - time.monotonic())

    def _step_if_nobody_else(self) -> bool:
        """A step of an engine without a thread, which would be waited for in vain; whether one has passed, perhaps."""
        if self.done():
            return False
        engine = self._engine()
        if engine is None:
            raise RuntimeError(f"{self.request_id} has not been done, and its engine is gone; keep the engine")
        if engine.is_running():
            return False
        if self._turn.is_free():
            engine.step()
        else:  # of another thread, which may be waiting for this one, and for no longer than it was told to
            with self._news:
                self._news.wait(0.01)
        return True

    def _check_may_wait(self) -> None:
        if self._turn.is_mine() and not self.done():
            raise RuntimeError(
                f"{self.request_id} was waited for within a step of its engine, which could then never end; wait in "
                "another thread, or use add_done_callback"
            )

    def __iter__(self) -> Iterator[int]:
        self._check_may_wait()
        given = 0
        while True:
            while len(self._tokens) == given and self._step_if_nobody_else():
                pass
            with self._news:
                while len(self._tokens) == given and not self.done():
                    self._news.wait()
                new = self._tokens[given:]
            if not new:
                break
            yield from new
            given += len(new)
        if self.cancelled():
            raise CancelledError
        if (error := self.exception()) is not None:
            raise error

    def report_to(self, report: Callable[[GenerationOutput], Any]) -> None:
        """Call back, in whatever thread, once it is done, and with `streaming` also whenever there are new tokens."""
        with self._news:
            self._reports.append(report)
            if self.streaming and self._tokens:
                report(self._output())
        self.add_done_callback(lambda handle: report(handle._output()))  # type: ignore[attr-defined]

    def _output(self) -> GenerationOutput:
        error, status = None, RequestStatus.DECODING
        if self.done():
            failure = CancelledError() if self.cancelled() else super().exception()
            error = None if failure is None else str(failure) or type(failure).__name__
            status = RequestStatus.FINISHED if failure is None else RequestStatus.FAILED
        return GenerationOutput(self.request_id, self.prompt_ids, [*self._tokens], error=error, status=status)

    def _give(self, tokens: list[int]) -> None:
        with self._news:
            self._tokens += tokens
            self._news.notify_all()
            if self.streaming:
                for report in self._reports:
                    report(self._output())

    # The engine's; whoever cancels at the same moment is first.

    def _succeed(self, result: Any) -> None:
        with suppress(InvalidStateError):
            self.set_result(result)

    def _fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.set_exception(error)


class TwoTowerEngine:
    """
    Runs requests of different lengths, settings and modes together, each giving the text it gives alone.

    Args:
        model: [`TwoTowerForBlockDiffusion`].
        slots: most sequences decoded at a time, at least 1.
        max_queue: most requests that wait for one, at least 1; default without bound.
        generation_config: of requests that bring none; default the model's.

    `start` and `stop`, or `with engine:`, let a thread of its own do the work; or call `step` until it is False, or
    ask a handle for its result, which does.
    """

    def __init__(
        self,
        model: Any,
        slots: int = 16,
        max_queue: int | None = None,
        generation_config: GenerationConfig | None = None,
    ):
        for name, value in (("slots", slots), ("max_queue", max_queue)):
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if model._is_synced(False):
            raise ValueError(
                "the model's parameters are spread over ranks, whose engines would have to take the same passes; call "
                "generate, which keeps ranks in step"
            )
        self.model, self.slots, self.max_queue, self.generation_config = model, slots, max_queue, generation_config
        self._engine = self._new_engine()
        self._queue: deque[tuple[RequestHandle, Request]] = deque()
        self._running: dict[str, tuple[RequestHandle, Request]] = {}
        self._ids = count()
        # Guards the queue and what runs; notified when a request comes, begins or ends, and of a stop.
        self._work = Condition()
        self._turn = _Turn()
        self._failures: list[BaseException] = []  # of the present step
        self._thread: Thread | None = None
        self._stopping = False
        self._reports: dict[str, Callable[[GenerationOutput], Any]] = {}  # for requests to come
        # As of transformers' manager: what has ended the thread, if anything has.
        self.background_thread_status = SimpleNamespace(fatal_error=None)

    # Requests.

    def add_request(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        streamer: Any = None,
        streaming: bool = False,
        **knobs: Any,
    ) -> RequestHandle:
        """
        Ask for what `generate` gives for one prompt.

        Args:
            input_ids: token ids of one prompt, a list, (n,) or (1, n), without padding.
            generation_config: as `generate`'s.
            request_id: default a new one.
            streamer: as `generate`'s, but its `end` is also called where the request fails or is cancelled: who reads
                the stream in another thread would wait for ever.
            streaming: see `register_result_handler`.
            knobs: all other arguments of `generate`, but `past_key_values`. As for transformers' manager, None for
                `max_new_tokens` or `eos_token_id` is what the engine's `generation_config` says, if it has one.

        Raises:
            queue.Full: when `max_queue` requests wait already.
            ValueError: for what `generate` refuses, a request id in use, more sequences than slots, a stopped engine.

        `max_time` counts from when the request gets its slots.
        """
        for name in ("cache", "past_key_values"):
            if knobs.get(name) is not None:
                raise ValueError(f"{name} is not supported by an engine, which holds all rows in a cache of its own")
        ids = as_ids("input_ids", input_ids).to(self._device)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; a request is one prompt, (n,) or (1, n)")
        with self._work:
            self._check_room(request_id)
        config = self.generation_config if generation_config is None else generation_config
        if config is not None and config is self.generation_config:  # `transformers serve` always gives both
            for name in ("max_new_tokens", "eos_token_id"):
                if knobs.get(name) is None:
                    knobs.pop(name, None)
        request = self.model.generate(ids, generation_config=config, streamer=streamer, engine=self, **knobs)
        if len(request.rows) > self.slots:
            raise ValueError(f"the request has {len(request.rows)} sequences, the engine {self.slots} slots")
        with self._work:
            self._check_room(request_id)
            if request_id is None:
                request_id = next(name for name in map("request-{}".format, self._ids) if not self._holds(name))
            handle = RequestHandle(request_id, self, ids[0].tolist(), streaming)
            if (report := self._reports.pop(request_id, None)) is not None:
                handle.report_to(report)
            # As they came, where `generate` has taken padding from them, or begun an empty one.
            self._connect(handle, request, ids.repeat_interleave(len(request.rows), 0) if ids.shape[1] else None)
            self._queue.append((handle, request))
            self._work.notify_all()
        if streamer is not None:
            handle.add_done_callback(partial(_end_stream, streamer))
        return handle

    def add_requests(self, prompts: Iterable[Any], **knobs: Any) -> list[RequestHandle]:
        """A request for each prompt, all with the same arguments of [`add_request`]."""
        return [self.add_request(prompt, **knobs) for prompt in prompts]

    def _check_room(self, request_id: str | None) -> None:
        if self._stopping:
            raise ValueError("the engine has been stopped; make a new one, or call start")
        self._forget_cancelled()
        if self.max_queue is not None and len(self._queue) >= self.max_queue:
            raise Full(f"{len(self._queue)} requests wait already, max_queue of the engine; try again later")
        if request_id is not None and self._holds(request_id):
            raise ValueError(f"request_id {request_id!r} is in use; give another")

    def _holds(self, request_id: str) -> bool:
        return request_id in self._running or any(handle.request_id == request_id for handle, _ in self._queue)

    def _forget_cancelled(self) -> None:
        """Those that wait."""
        if any(handle.cancelled() for handle, _ in self._queue):
            self._queue = deque(item for item in self._queue if not item[0].cancelled())

    def cancel_request(self, request_id: str | RequestHandle) -> bool:
        """Cancel a request, which leaves within one pass; False where there is none, or none any more."""
        name = getattr(request_id, "request_id", request_id)
        with self._work:
            held = [*self._running.values(), *self._queue]
        return any(handle.cancel() for handle, _ in held if handle.request_id == name)

    def register_result_handler(
        self, request_id: str | RequestHandle, callback: Callable[[GenerationOutput], Any]
    ) -> None:
        """
        As transformers' manager: call back on the event loop that runs now when a request is done, and if it was added
        with `streaming` whenever it has new tokens. An id may be that of a request to come.
        """
        loop = asyncio.get_running_loop()

        def report(output: GenerationOutput) -> None:
            if not loop.is_closed():  # else nobody is there to be told
                loop.call_soon_threadsafe(callback, output)

        if isinstance(request_id, RequestHandle):
            return request_id.report_to(report)
        with self._work:
            held = [handle for handle, _ in [*self._running.values(), *self._queue]]
            handle = next((handle for handle in held if handle.request_id == request_id), None)
            if handle is None:
                self._reports[request_id] = report
        if handle is not None:
            handle.report_to(report)

    def _connect(self, handle: RequestHandle, request: Request, prompts: torch.Tensor | None) -> None:
        request.on_tokens = partial(_give_tokens, handle)
        request.on_end = partial(self._end, handle, prompts)
        request.on_error = partial(self._on_error, handle)
        request.key = _key(request)

    # Within a step, which may be in inference mode: of that mode, nobody could change a result, or train on it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _end(self, handle: RequestHandle, prompts: torch.Tensor | None, request: Request) -> None:
        """All rows of a request have left, as it ended, failed or was cancelled."""
        result, failure = None, None
        if not handle.done():
            try:
                result = self._result(handle, request, request.prompts if prompts is None else prompts)
            except Exception as error:
                failure = error
                self._failures.append(error)
        self._leave(handle)
        _break_cycles(request)
        if failure is None:
            handle._succeed(result)
        else:
            handle._fail(failure)

    def _result(self, handle: RequestHandle, request: Request, prompts: torch.Tensor) -> Any:
        if request.streamer is not None:
            request.streamer.end()
        handle._give(request.rows[0].tokens[len(handle._tokens) :])
        prompts = prompts.to(request.device)
        if not request.config.return_dict_in_generate:
            return request.sequences(prompts)
        return request.output(prompts, _caches(request))

    def _on_error(self, handle: RequestHandle, request: Request, error: Exception) -> None:
        self._failures.append(error)
        request.keep_cache = False
        self._leave(handle)
        handle._fail(error)

    def _leave(self, handle: RequestHandle) -> None:
        with self._work:
            if handle.request_id in self._running and self._running[handle.request_id][0] is handle:
                del self._running[handle.request_id]
            self._work.notify_all()

    # Work.

    @torch.no_grad()
    def step(self) -> bool:
        """Let requests leave and join, and run at most one pass of each tower; whether there is more to do."""
        with self._turn.taken():
            try:
                self._drop_cancelled()
                self._engine.release()
                self._admit()
                if self._engine.rows:
                    self._engine.step()
            except BaseException as error:  # of no request in particular, such as memory, or an interrupt
                self._fail_running(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                # Tracebacks keep what was computed, of all rows of the pass, for as long as someone keeps an error.
                for failure in self._failures:
                    _forget_locals(failure)
                self._failures.clear()
        with self._work:
            return bool(self._engine.rows or self._queue)

    def _drop_cancelled(self) -> None:
        with self._work:
            self._forget_cancelled()
            cancelled = [(handle, request) for handle, request in self._running.values() if handle.cancelled()]
        for handle, request in cancelled:
            self._leave(handle)
            request.keep_cache = False
            for row in request.rows:
                row.phase = ENDED

    def _admit(self) -> None:
        if self._queue and not self._engine.rows and not self._fits_model():
            self._renew_engine()
        with self._work:
            while self._queue and len(self._engine.rows) + len(self._queue[0][1].rows) <= self.slots:
                handle, request = self._queue.popleft()
                self._running[handle.request_id] = (handle, request)
                handle._admitted = True
                for timer in request.stopping.timers:
                    timer.initial_timestamp = time.time()
                self._engine.admit(request)
                self._work.notify_all()

    def _new_engine(self) -> Engine:
        self._device = prompts_device(self.model)
        return Engine(self.model, TwoTowerCache(self.model.config), self._device, most_rows=self.slots)

    def _fits_model(self) -> bool:
        """Whether the room that rows have left is of use to the model, which may have been moved or cast."""
        device = self.model.context_tower.embeddings.weight.device
        try:
            self._engine.cache.check_model(self.model.config, self.model.context_tower)
        except ValueError:
            return False
        return device.type == "meta" or device == self._device

    def _renew_engine(self) -> None:
        counters = {name: getattr(self._engine, name) for name in ("passes", "row_passes", "row_chances")}
        self._engine.close()
        self._engine = self._new_engine()
        vars(self._engine).update(counters)

    def _fail_running(self, error: BaseException) -> None:
        """A step has ended anywhere in it, so nothing of what it was about can be relied on."""
        failure = error
        if not isinstance(error, Exception):
            failure = RuntimeError(f"the engine was interrupted by {type(error).__name__} in a step; ask again")
        with self._work:
            running = list(self._running.values())
            self._running.clear()
            self._work.notify_all()
        self._renew_engine()
        self._failures.append(error)
        for handle, request in running:
            _break_cycles(request)
            handle._fail(failure)

    @property
    def useful_share(self) -> float:
        """Of the chances that rows had to take part in an iteration's passes, how many they took; 1.0 before any."""
        return self._engine.row_passes / self._engine.row_chances if self._engine.row_chances else 1.0

    def is_running(self) -> bool:
        """Whether a thread of the engine's own does the work."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> "TwoTowerEngine":
        """Begin to work in a thread of its own, also again after a stop."""
        with self._work:
            self._stopping = False
            self.background_thread_status.fatal_error = None
            if not self.is_running():
                self._thread = Thread(target=self._run, name="TwoTowerEngine", daemon=True)
                self._thread.start()
                # An interpreter that ended within a pass would abort the process.
                atexit.register(self._stop_at_exit)
        return self

    def _stop_at_exit(self) -> None:
        # In a forked process the thread is not, and what it held there is held for ever.
        if self.is_running():
            self.stop(timeout=MOST_SECONDS_AT_EXIT)

    def stop(self, finish: bool = False, timeout: float | None = None, block: bool = True) -> None:
        """
        End the thread; requests that are not done are cancelled.

        Args:
            finish: first let all of them end, and take no more.
            timeout: seconds to wait for the thread; default without bound.
            block: wait for it.
        """
        with self._work:
            self._stopping = True
            thread = self._thread if self.is_running() else None
            held = [] if finish else [*self._running.values(), *self._queue]
            self._work.notify_all()
        for handle, _ in held:
            handle.cancel()
        if self._turn.is_mine():
            return  # within a step, whose caller goes on
        if thread is not None:
            if block:
                thread.join(timeout)
            return
        while self.step():
            pass

    def _run(self) -> None:
        try:
            while True:
                busy = self.step()
                with self._work:
                    self._work.wait_for(lambda: busy or self._queue or self._stopping)  # noqa: B023
                    if self._stopping and not busy and not self._queue:
                        self._thread = None
                        atexit.unregister(self._stop_at_exit)
                        return
        except BaseException as error:
            with self._work:
                waiting, self._queue = self._queue, deque()
                self._thread, self.background_thread_status.fatal_error = None, error
                atexit.unregister(self._stop_at_exit)
            for handle, _ in waiting:
                handle._fail(RuntimeError(f"the engine's thread was ended by {type(error).__name__}; ask again"))
            raise

    def __enter__(self) -> "TwoTowerEngine":
        return self.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.stop(finish=kind is None)

    # Whole workloads.

    def run_all(self, prompts: Iterable[Any], **knobs: Any) -> Iterator[tuple[int, Any]]:
        """
        Results as they finish, each with the number of its prompt; prompts are taken as slots become free.

        Args:
            prompts: of each its ids, as for [`add_request`], or a dict of its own arguments, `input_ids` among them.
            knobs: of all.
        """
        coming = enumerate(prompts)
        item = next(coming, None)
        waiting: dict[Future, int] = {}
        try:
            while item is not None or waiting:
                while item is not None and len(waiting) < 2 * self.slots:
                    number, prompt = item
                    own = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
                    try:
                        with _said_of(number):
                            handle = self.add_request(**{**knobs, **own})
                    except Full:
                        break
                    waiting[handle] = number
                    item = next(coming, None)
                for done in sorted(self._some_done(waiting), key=waiting.__getitem__):
                    number = waiting.pop(done)
                    with _said_of(number):
                        result = done.result()
                    yield number, result
        finally:
            for left in waiting:
                left.cancel()

    def _some_done(self, waiting: Iterable[Future]) -> set[Future]:
        """Those of the requests that are done, after work on them by whoever does it."""
        if not self.is_running():
            self.step()
        elif waiting:
            return wait(waiting, return_when=FIRST_COMPLETED).done
        else:
            with self._work:  # of others, with which the queue is full
                self._work.wait(timeout=1.0)
        return {handle for handle in waiting if handle.done()}


@contextmanager
def _said_of(number: int) -> Iterator[None]:
    """What goes wrong says which prompt it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"It is about prompt {number}, counted from 0.")
        raise


def _wake(handle: Any) -> None:
    """Whoever iterates is to see that there is no more to come."""
    with handle._news:
        handle._news.notify_all()


def _give_tokens(handle: RequestHandle, row: Row, _: list[int]) -> None:
    """Of the first row what is final: a criterion about all rows may take back what not all of them have yet."""
    request = row.request
    first = request.rows[0]
    final = request.settled() if request.stopping.shared else len(first.tokens)
    if not handle.done() and len(handle._tokens) < final:
        handle._give(first.tokens[len(handle._tokens) : final])


def _end_stream(streamer: Any, handle: RequestHandle) -> None:
    """Of a request that has failed or was cancelled; one that succeeds does so within [`TwoTowerEngine._result`]."""
    if handle.cancelled() or handle.exception() is not None:
        with suppress(Exception):  # the request has its outcome already, of the streamer perhaps
            streamer.end()


def _forget_locals(error: BaseException) -> None:
    """Of all calls that have ended in an error, and of those they came from."""
    for frame, _ in walk_tb(error.__traceback__):
        caller: FrameType | None = frame
        while caller is not None:
            try:
                caller.clear()
            except RuntimeError:  # it goes on
                break
            caller = caller.f_back


def _break_cycles(request: Request) -> None:
    """What a request held, on the device, too, is not to wait for Python's collector of cycles."""
    request.on_tokens = request.on_end = request.on_error = None
    request.rows = []


def _key(request: Request) -> Any:
    """Equal for requests whose rows may share operations: those that ask for the same, and run no code of the user."""
    config = request.config
    asks_user = request.stopping.any or request.step_callback is not None or callable(config.unmasking_rule)
    if asks_user or request.processors.sees_text or hasattr(request.streamer, "put_draft"):
        return id(request)
    knobs = tuple(str(getattr(config, name)) for name in STRATEGY_DEFAULTS if name != "seed")
    return (*knobs, config.do_sample, request.recorded, request.processors.likeness())


def _caches(request: Request) -> TwoTowerCache | None:
    """The caches rows left behind, as one."""
    caches = [row.cache for row in request.rows if row.cache is not None]
    if not caches:
        return None
    whole = caches[0]
    if len(caches) > 1:
        whole.replace_rows(caches)
    return whole


__all__ = ["RequestHandle", "TwoTowerEngine", "TwoTowerGenerateOutput"]
