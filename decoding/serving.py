"""Requests that come and go: the [`Engine`] for a queue of them, with handles, a thread and results as they finish.

with TwoTowerEngine(model, slots=16) as engine:
    handle = engine.add_request(input_ids, max_new_tokens=64, mode="self_speculative")
    for token in handle: ...
    output = handle.result()
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from itertools import count
from queue import Full, SimpleQueue
from threading import Condition, Lock, Thread, current_thread
from typing import Any

import torch
from transformers import GenerationConfig

from ..cache_twotower import TwoTowerCache
from .config import STRATEGY_DEFAULTS
from .engine import Engine
from .state import ENDED, Request, Row, TwoTowerGenerateOutput

_END = object()


class RequestHandle(Future):
    """
    What will become of a request: a `concurrent.futures.Future` whose `result(timeout)` is what `generate` returns for
    it alone, or raises what it raised.

    Iterating gives the new tokens, ints, as they become final, and ends with the request; of several sequences
    (`num_return_sequences`) those of the first. Then what went wrong is raised, `CancelledError` if it was cancelled.
    """

    def __init__(self, request_id: str):
        super().__init__()
        self.request_id = request_id
        self._tokens: SimpleQueue = SimpleQueue()
        self.add_done_callback(lambda _: self._tokens.put(_END))

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not _END:
            yield token
        self._tokens.put(_END)  # for whoever iterates again
        if self.cancelled():
            raise CancelledError
        if (error := self.exception()) is not None:
            raise error


class TwoTowerEngine:
    """
    Runs requests of different lengths, settings and modes together, each giving the text it gives alone.

    Args:
        model: [`TwoTowerForBlockDiffusion`].
        slots: most sequences decoded at a time, at least 1.
        max_queue: most requests that wait for one, at least 1; default without bound.
        generation_config: of requests that bring none; default the model's.

    `start` and `stop`, or `with engine:`, let a thread of its own do the work; or call `step` until it is False.
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
        self.model, self.slots, self.max_queue, self.generation_config = model, slots, max_queue, generation_config
        device = model.context_tower.embeddings.weight.device
        self._device = model.device if device.type == "meta" else device
        self._engine = self._new_engine()
        self._queue: deque[tuple[RequestHandle, Request]] = deque()
        self._running: dict[str, tuple[RequestHandle, Request]] = {}
        self._ids = count()
        self._work = Condition()  # guards the queue; notified of new work
        self._stepping = Lock()
        self._thread: Thread | None = None
        self._stopping = False

    # Requests.

    def add_request(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        streamer: Any = None,
        **knobs: Any,
    ) -> RequestHandle:
        """
        Ask for what `generate` gives for one prompt.

        Args:
            input_ids: token ids of one prompt, a list, (n,) or (1, n), without padding.
            generation_config: as `generate`'s.
            request_id: default a new one.
            streamer: as `generate`'s.
            knobs: all other arguments of `generate`, but `past_key_values`.

        Raises:
            queue.Full: when `max_queue` requests wait already.
            ValueError: for what `generate` refuses, a request id in use, more sequences than slots, a stopped engine.
        """
        for name in ("cache", "past_key_values"):
            if knobs.get(name) is not None:
                raise ValueError(f"{name} is not supported by an engine, which holds all rows in a cache of its own")
        ids = torch.as_tensor(input_ids, device=self._device)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; a request is one prompt, (n,) or (1, n)")
        with self._work:
            self._check_room()
        request = self.model.generate(
            ids, generation_config=generation_config or self.generation_config, streamer=streamer, engine=self, **knobs
        )
        if len(request.rows) > self.slots:
            raise ValueError(f"the request has {len(request.rows)} sequences, the engine {self.slots} slots")
        with self._work:
            self._check_room()
            request_id = f"request-{next(self._ids)}" if request_id is None else request_id
            if request_id in self._running or any(handle.request_id == request_id for handle, _ in self._queue):
                raise ValueError(f"request_id {request_id!r} is in use; give another")
            handle = RequestHandle(request_id)
            self._connect(handle, request)
            self._queue.append((handle, request))
            self._work.notify_all()
        return handle

    def add_requests(self, prompts: Iterable[Any], **knobs: Any) -> list[RequestHandle]:
        """A request for each prompt, all with the same arguments of [`add_request`]."""
        return [self.add_request(prompt, **knobs) for prompt in prompts]

    def _check_room(self) -> None:
        if self._stopping:
            raise ValueError("the engine has been stopped; make a new one, or call start")
        if self.max_queue is not None and len(self._queue) >= self.max_queue:
            raise Full(f"{len(self._queue)} requests wait already, max_queue of the engine; try again later")

    def cancel_request(self, request_id: str) -> bool:
        """Cancel a request, which leaves within one pass; False where there is none, or none any more."""
        with self._work:
            held = [*self._running.values(), *self._queue]
        return any(handle.cancel() for handle, _ in held if handle.request_id == request_id)

    def _connect(self, handle: RequestHandle, request: Request) -> None:
        prompts = request.prompts

        def on_tokens(row: Row, tokens: list[int]) -> None:
            if row.number == 0:
                for token in tokens:
                    handle._tokens.put(token)

        def on_end(ended: Request) -> None:
            self._running.pop(handle.request_id, None)
            if handle.done():
                return
            try:
                if request.streamer is not None:
                    request.streamer.end()
                with_dict = request.config.return_dict_in_generate
                result = request.output(prompts, _caches(request)) if with_dict else request.sequences(prompts)
            except Exception as error:
                handle.set_exception(error)
                return
            handle.set_result(result)

        def on_error(failed: Request, error: Exception) -> None:
            self._running.pop(handle.request_id, None)
            if not handle.done():
                handle.set_exception(error)

        request.on_tokens, request.on_end, request.on_error = on_tokens, on_end, on_error
        request.key = _key(request)

    # Work.

    @torch.no_grad()
    def step(self) -> bool:
        """Let requests join and leave, and run at most one pass of each tower; whether there is more to do."""
        with self._stepping:
            self._admit()
            for handle, request in list(self._running.values()):
                if handle.cancelled():
                    self._running.pop(handle.request_id)
                    for row in request.rows:
                        row.phase = ENDED
            try:
                self._engine.release()
                if self._engine.rows:
                    self._engine.step()
            except Exception as error:  # of no request in particular, such as memory
                self._fail_all(error)
        with self._work:
            return bool(self._engine.rows or self._queue)

    def _admit(self) -> None:
        with self._work:
            while self._queue and len(self._engine.rows) + len(self._queue[0][1].rows) <= self.slots:
                handle, request = self._queue.popleft()
                if handle.cancelled():
                    continue
                self._running[handle.request_id] = (handle, request)
                self._engine.admit(request)

    def _new_engine(self) -> Engine:
        return Engine(self.model, TwoTowerCache(self.model.config), self._device, most_rows=self.slots)

    def _fail_all(self, error: Exception) -> None:
        for handle, _ in self._running.values():
            if not handle.done():
                handle.set_exception(error)
        self._running.clear()
        self._engine = self._new_engine()

    @property
    def useful_share(self) -> float:
        """Of the chances that rows had to take part in an iteration's passes, how many they took; 1.0 before any."""
        return self._engine.row_passes / self._engine.row_chances if self._engine.row_chances else 1.0

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> "TwoTowerEngine":
        """Begin to work in a thread of its own."""
        if not self.is_running():
            self._stopping = False
            self._thread = Thread(target=self._run, name="TwoTowerEngine", daemon=True)
            self._thread.start()
        return self

    def stop(self, finish: bool = False, timeout: float | None = None) -> None:
        """
        End the thread; requests that are not done are cancelled.

        Args:
            finish: first let all of them end, and take no more.
            timeout: seconds to wait for the thread; default without bound.
        """
        with self._work:
            self._stopping = True
            held = [*self._running.values(), *self._queue]
            if not finish:
                self._queue.clear()
            self._work.notify_all()
        if not finish:
            for handle, _ in held:
                handle.cancel()
        elif not self.is_running():
            while self.step():
                pass
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            busy = self.step()
            with self._work:
                if self._stopping and not busy:
                    return
                if not busy:
                    self._work.wait()

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
        waiting: dict[Future, int] = {}
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < 2 * self.slots:
                    item = next(coming, None)
                    if item is None:
                        more = False
                        break
                    number, prompt = item
                    own = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
                    waiting[self.add_request(**{**knobs, **own})] = number
                if not waiting:
                    break
                if self.is_running():
                    finished = wait(waiting, return_when=FIRST_COMPLETED).done
                else:
                    self.step()
                    finished = {handle for handle in waiting if handle.done()}
                for handle in sorted(finished, key=waiting.__getitem__):
                    yield waiting.pop(handle), handle.result()
        finally:
            for handle in waiting:
                handle.cancel()


def _key(request: Request) -> Any:
    """Equal for requests whose rows may share operations: those that ask for the same, and run no code of the user."""
    config = request.config
    asks_user = request.stopping.any or request.step_callback is not None or callable(config.unmasking_rule)
    if asks_user or request.processors.sees_text:
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
