"""Requests that come and go: each gives what it gives alone, and what becomes of one is nobody else's affair."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import CancelledError, as_completed, wait
from queue import Full
from random import Random

import pytest
import torch
from accelerate import cpu_offload
from mixed_requests import Request, differences, mixed_model, mixed_request, sequences_of
from tiny import random_ids
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from twotower import TwoTowerEngine
from twotower.decoding.asking import PerRow, Stateless
from twotower.decoding.engine import Engine

WAIT = 60  # seconds after which a test is taken to hang
IDS = random_ids(1, 6)


@pytest.fixture(scope="module")
def model():
    return mixed_model()


@pytest.fixture
def engine(model):
    return TwoTowerEngine(model, slots=4)


def run(engine):
    while engine.step():
        pass


class Streamer(BaseStreamer):
    """Takes down what it is given; fails at a new token, at the end, or never."""

    def __init__(self, fails_at=None, fails_at_end=False):
        self.fails_at, self.fails_at_end = fails_at, fails_at_end
        self.prompts, self.tokens, self.ended = 0, [], False

    def put(self, value):
        if not self.prompts:
            self.prompts = value.numel()
            return
        self.tokens += value.flatten().tolist()
        if self.fails_at is not None and len(self.tokens) > self.fails_at:
            raise OSError("the other side has hung up")

    def end(self):
        self.ended = True
        if self.fails_at_end:
            raise OSError("the other side has hung up at the end")


class DraftStreamer(Streamer):
    def put_draft(self, block):
        if self.fails_at is not None:
            raise OSError("no drafts, please")


def fails_beyond(length, answer):
    def asked(ids, scores):
        if ids.shape[1] > length:
            raise KeyError(f"text of {ids.shape[1]} tokens")
        return answer(scores)

    return asked


FAILURES = {
    "streamer": lambda at: {"streamer": Streamer(fails_at=at)},
    "streamer's end": lambda at: {"streamer": Streamer(fails_at_end=True)},
    "processor": lambda at: {"logits_processor": [Stateless(fails_beyond(at, lambda scores: scores))]},
    "processor per row": lambda at: {
        "logits_processor": [PerRow(lambda row: fails_beyond(at, lambda scores: scores))]
    },
    "criterion": lambda at: {"stopping_criteria": [Stateless(fails_beyond(at, lambda scores: False))]},
    "criterion per row": lambda at: {"stopping_criteria": [PerRow(lambda row: fails_beyond(at, lambda _: False))]},
}


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Everything at once.


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_comes_and_goes_every_request_ends_as_it_does_alone(model, seed):
    rng = Random(seed)
    engine = TwoTowerEngine(model, slots=rng.choice([3, 6]))
    wanted = []
    for _ in range(40):
        request, failure = mixed_request(rng, most_new_tokens=14), {}
        if rng.random() < 0.2 and not request.of_code:
            name, at = rng.choice(list(FAILURES)), rng.randint(0, 10)
            if "num_return_sequences" not in request.plain:
                failure = {"name": name, "at": at + (request.ids.shape[1] if "streamer" not in name else 0)}

        def arguments(request=request, failure=failure):
            return request.arguments() | (FAILURES[failure["name"]](failure["at"]) if failure else {})

        handle = engine.add_request(request.ids, **arguments())
        if rng.random() < 0.15:
            for _ in range(rng.randint(0, 4)):
                engine.step()
            if handle.cancel():
                with pytest.raises(CancelledError):
                    handle.result(0)
                continue
        wanted.append((handle, request, arguments))
        for _ in range(rng.randint(0, 2)):
            engine.step()
            assert len(engine._engine.rows) <= engine.slots
    run(engine)
    assert not engine._running and not engine._queue and not engine._engine.rows
    failures = 0
    for handle, request, arguments in wanted:
        expected = outcome(lambda: model.generate(request.ids, **arguments()))  # noqa: B023
        got = outcome(lambda: handle.result(0))  # noqa: B023
        if isinstance(expected, str) or isinstance(got, str):
            assert got == expected, request.plain
            failures += 1
            continue
        assert differences(got, expected) == [], (request.plain, request.of_code)
        text, tokens = sequences_of(expected)[0, request.ids.shape[1] :].tolist(), list(handle)
        assert tokens == text[: len(tokens)]
        assert len(tokens) == len(text) or "num_return_sequences" in request.plain
    assert failures > 0 and len(wanted) > 30


def test_from_many_threads_too(model):
    rng, wrong = Random(3), []
    engine = TwoTowerEngine(model, slots=5)

    def client(requests):
        handles = []
        for number, request in enumerate(requests):
            handle = engine.add_request(request.ids, **request.arguments())
            if number % 4 == 3:
                handle.cancel()
                engine.cancel_request(handle.request_id)
            else:
                handles.append((handle, request, list(handle) if number % 2 else None))
        for handle, request, tokens in handles:
            got, expected = handle.result(WAIT), model.generate(request.ids, **request.arguments())
            text = sequences_of(expected)[0, request.ids.shape[1] :].tolist()
            if differences(got, expected) or tokens not in (None, text[: len(tokens or ())]):
                wrong.append(request)

    lists = [[mixed_request(rng, 8) for _ in range(6)] for _ in range(3)]
    with engine:
        threads = [threading.Thread(target=client, args=(requests,)) for requests in lists]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()
    assert wrong == [] and not engine.is_running()


# Handles.


def test_a_handle_is_a_future(model, engine):
    handle = engine.add_request(IDS, max_new_tokens=6, mode="ar")
    called = []
    handle.add_done_callback(called.append)
    assert not handle.done() and not handle.running()
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)
    assert not handle.running()
    engine.step()
    assert handle.running()
    run(engine)
    assert handle.done() and not handle.running() and not handle.cancel() and called == [handle]
    assert torch.equal(handle.result(), model.generate(IDS, max_new_tokens=6, mode="ar"))
    assert handle.exception() is None and not engine.cancel_request(handle.request_id)


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative", "ar"])
def test_a_result_can_be_changed_and_trained_on(model, engine, mode):
    """Passes are run in inference mode, whose tensors could be neither."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2, "do_sample": True}
    handle = engine.add_request(IDS, max_new_tokens=6, mode=mode, **flags)
    modes_of_callbacks = []
    handle.add_done_callback(lambda _: modes_of_callbacks.append(torch.is_inference_mode_enabled()))
    run(engine)
    result = handle.result(0)
    tensors = [result.sequences, result.log_probs, result.denoiser_forwards, *result.scores]
    assert not any(tensor.is_inference() for tensor in tensors) and modes_of_callbacks == [False]
    model(result.sequences).logits.sum().backward()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative", "ar"])
def test_what_is_recorded_of_a_token_keeps_nothing_of_its_pass(model, engine, mode):
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for _ in range(2):
        engine.add_request(IDS, max_new_tokens=9, mode=mode, **flags)
    held = []
    while engine.step():
        for row in engine._engine.rows:
            held += [each for name in ("scores", "logits") for each in row.records.get(name, ())]
    assert held and all(each.untyped_storage().nbytes() == each.nbytes for each in held)


def test_a_hook_that_comes_later_is_shown_ordinary_tensors(model, engine):
    seen = []
    with model.context_tower.layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0])):
        engine.add_request(IDS, mode="ar", max_new_tokens=2)
        run(engine)
    assert seen and not any(each.is_inference() for each in seen)


def test_every_iteration_gives_all_tokens(model, engine):
    handle = engine.add_request(IDS, max_new_tokens=6, mode="ar")
    expected = model.generate(IDS, max_new_tokens=6, mode="ar")[0, 6:].tolist()
    with engine:
        both = [[], []]
        threads = [threading.Thread(target=lambda out=out: out.extend(handle)) for out in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert both == [expected, expected] and list(handle) == expected


def test_tokens_come_as_they_become_final(engine):
    handle = engine.add_request(IDS, max_new_tokens=5, mode="ar")
    tokens = iter(handle)
    for number in range(5):
        engine.step()
        assert len(handle._tokens) == number + 1 and next(tokens) == handle._tokens[-1]
    assert list(tokens) == []


@pytest.mark.parametrize("way", ["result", "result in time", "exception", "tokens"])
def test_whoever_waits_for_an_engine_without_a_thread_takes_its_steps(model, engine, way):
    """It was waited for in vain."""
    before, handle = engine.add_requests([random_ids(9), IDS], max_new_tokens=5, mode="ar")
    alone = model.generate(IDS, max_new_tokens=5, mode="ar")
    if way == "tokens":
        tokens = iter(handle)
        assert [next(tokens)] == handle._tokens  # a step at a time
        assert [*handle._tokens, *tokens] == alone[0, 6:].tolist()
    elif way == "exception":
        assert handle.exception() is None
    else:
        assert torch.equal(handle.result(WAIT if way == "result in time" else None), alone)
    assert handle.done() and before._admitted


def test_nobody_waits_for_an_engine_that_is_gone(model):
    handle = TwoTowerEngine(model).add_request(IDS, max_new_tokens=5)
    gc.collect()
    with pytest.raises(RuntimeError, match="request-0 has not been done, and its engine is gone; keep the engine"):
        handle.result()
    with pytest.raises(RuntimeError, match="keep the engine"):
        next(iter(handle))


def test_tokens_that_a_criterion_about_all_rows_takes_back_are_never_given(model):
    class Third:
        """Ends row 0 at its third token; asked once all rows have it."""

        def __call__(self, ids, scores):
            return torch.tensor([ids.shape[1] - 6 == 3, False])

    knobs = {"mode": "self_speculative", "draft_length": 4, "num_return_sequences": 2, "do_sample": True}
    for seed in range(6):
        call = {**knobs, "seed": seed, "max_new_tokens": 9, "acceptance_ratio": 1e-9 if seed % 2 else 1.0}
        engine = TwoTowerEngine(model, slots=2)
        handle = engine.add_request(IDS, stopping_criteria=[Third()], **call)
        run(engine)
        alone = model.generate(IDS, stopping_criteria=StoppingCriteriaList([Third()]), **call)
        assert torch.equal(handle.result(0), alone)
        assert list(handle) == alone[0, 6:9].tolist()


def test_concurrent_futures_and_asyncio_wait_for_handles(model, engine):
    handles = engine.add_requests([IDS, random_ids(9), [4, 5]], max_new_tokens=4)
    gone = engine.add_request(IDS, max_new_tokens=400)
    with engine:
        gone.cancel()
        assert wait([*handles, gone], timeout=WAIT).not_done == set()
        assert set(as_completed([*handles, gone], timeout=WAIT)) == {*handles, gone}

        async def ask():
            return await asyncio.wait_for(asyncio.wrap_future(engine.add_request([4, 5], max_new_tokens=4)), WAIT)

        assert torch.equal(asyncio.run(ask()), handles[2].result(0))


# Leaving.


def test_cancelled_before_it_is_admitted_a_request_never_runs(model):
    engine = TwoTowerEngine(model, slots=1, max_queue=1)
    engine.add_request(IDS, max_new_tokens=9)
    engine.step()
    waiting = engine.add_request(IDS, max_new_tokens=9, request_id="waiting")
    assert engine.cancel_request("waiting") and waiting.cancel() and waiting.cancelled()
    # Neither its place in the queue nor its id is taken any more.
    again = engine.add_request(IDS, max_new_tokens=9, request_id="waiting")
    run(engine)
    assert again.done() and list(again) and not waiting._admitted


def test_cancelled_while_it_runs_a_request_leaves_within_a_pass(engine):
    handle = engine.add_request(IDS, max_new_tokens=500)
    other = engine.add_request(random_ids(9), max_new_tokens=5)
    for _ in range(3):
        engine.step()
    assert engine.cancel_request(handle.request_id) and engine.cancel_request(handle.request_id)
    known = len(handle._tokens)
    engine.step()
    assert handle.request_id not in engine._running and len(engine._engine.rows) == 1
    assert not engine.cancel_request(handle.request_id)
    with pytest.raises(CancelledError):
        list(handle)
    assert len(handle._tokens) == known
    run(engine)
    assert other.result(0).shape == (1, 14)


def test_a_long_prompt_that_leaves_unread_is_expected_no_more(engine):
    """Else the others' keys and values would be given room for as many tokens."""
    engine.add_request(IDS, mode="ar", max_new_tokens=90)
    engine.step()
    long = engine.add_request(random_ids(1, 5000), mode="ar", max_new_tokens=1, prefill_chunk_size=64)
    cache, admit = engine._engine.cache, engine._engine.admit

    def cancelled_at_once(request):
        admit(request)
        assert cache.tokens.expected == 5000
        long.cancel()

    engine._engine.admit = cancelled_at_once
    run(engine)
    assert cache.tokens.expected == 0 and cache.tokens.buffers.key.shape[2] <= 128


def test_a_result_that_comes_as_it_is_cancelled_harms_nobody(model, engine):
    """Between the engine's look at a handle and its result, another thread cancels."""
    racing = engine.add_request(IDS, max_new_tokens=4, mode="ar", streamer=(streamer := Streamer()))
    streamer.end = racing.cancel
    failing = engine.add_request(
        IDS, mode="ar", logits_processor=[Stateless(lambda ids, scores: failing.cancel() and 1 / 0)]
    )
    other = engine.add_request(IDS, max_new_tokens=6, mode="ar")
    run(engine)
    assert racing.cancelled() and failing.cancelled() and not engine._running
    assert torch.equal(other.result(0), model.generate(IDS, max_new_tokens=6, mode="ar"))


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion", "self_speculative", "mock_ar"])
@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_ends_its_request_alone(model, mode, failure):
    engine = TwoTowerEngine(model, slots=3)
    knobs = {"mode": mode, "max_new_tokens": 10}
    others = [engine.add_request(random_ids(1, n), **knobs) for n in (6, 9)]
    failing = engine.add_request(IDS, **knobs, **FAILURES[failure](3 if "streamer" in failure else 9))
    run(engine)
    assert isinstance(failing.exception(0), OSError if "streamer" in failure else KeyError)
    with pytest.raises((OSError, KeyError)):
        list(failing)
    for handle, n in zip(others, (6, 9), strict=True):
        assert torch.equal(handle.result(0), model.generate(random_ids(1, n), **knobs))


def test_a_failing_streamer_of_drafts_ends_its_request_alone(model, engine):
    other = engine.add_request(IDS, max_new_tokens=6)
    failing = engine.add_request(IDS, max_new_tokens=6, streamer=DraftStreamer(fails_at=0))
    run(engine)
    assert isinstance(failing.exception(0), OSError) and other.exception(0) is None


def test_numbers_that_are_none_end_their_request_alone():
    model = mixed_model()
    model.get_input_embeddings().weight.data[40] = torch.nan
    prompts = [ids.masked_fill(ids == 40, 41) for ids in (random_ids(1, 6), random_ids(1, 9, seed=1))]
    for mode in ("ar", "mask_diffusion", "self_speculative", "mock_ar"):
        knobs = {"mode": mode, "max_new_tokens": 6, "suppress_tokens": [40]}
        engine = TwoTowerEngine(model, slots=2)
        handles = [engine.add_request(ids, **knobs) for ids in (prompts[0], torch.tensor([[5, 40, 6]]), prompts[1])]
        run(engine)
        with pytest.raises(ValueError, match="gives no numbers"):
            handles[1].result(0)
        for handle, ids in zip(handles[::2], prompts, strict=True):  # the last in the place of what failed
            assert torch.equal(handle.result(0), model.generate(ids, **knobs))


@pytest.mark.parametrize("where", ["denoise", "admit"])
def test_without_memory_all_that_run_fail_and_the_engine_goes_on(model, engine, where, monkeypatch):
    running = [engine.add_request(random_ids(1, n), max_new_tokens=9) for n in (4, 7)]
    later = [engine.add_request(random_ids(1, n), max_new_tokens=9) for n in (5, 30, 8)]
    with monkeypatch.context() as patch:
        if where == "denoise":
            engine.step()
        owner = model if where == "denoise" else Engine

        def fails(*args):
            raise torch.OutOfMemoryError("no memory")

        patch.setattr(owner, where, fails)
        assert engine.step()
    assert isinstance(running[0].exception(0), torch.OutOfMemoryError)
    failed = sum(handle.done() for handle in (*running, *later))
    assert failed == (4 if where == "denoise" else 1)
    run(engine)
    assert torch.equal(later[-1].result(0), model.generate(random_ids(1, 8), max_new_tokens=9))


def test_an_interrupt_in_a_step_leaves_no_broken_rows_behind(model, engine):
    def interrupt(ids, scores):
        raise KeyboardInterrupt

    other = engine.add_request(IDS, max_new_tokens=6)
    engine.add_request(IDS, mode="ar", logits_processor=[Stateless(interrupt)])
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    with pytest.raises(RuntimeError, match=r"interrupted by KeyboardInterrupt.*ask again"):
        other.result(0)
    again = engine.add_request(IDS, max_new_tokens=6)
    run(engine)
    assert torch.equal(again.result(0), model.generate(IDS, max_new_tokens=6))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_its_thread_ends_nobody_waits_for_ever(model):
    def leave(ids, scores):
        raise SystemExit

    engine = TwoTowerEngine(model, slots=1)
    handles = [engine.add_request(IDS, mode="ar", logits_processor=[Stateless(leave)]), engine.add_request(IDS)]
    engine.start()
    for handle in handles:
        with pytest.raises(RuntimeError, match=r"SystemExit.*ask again"):
            handle.result(WAIT)
    with engine.start():
        assert engine.add_request(IDS, max_new_tokens=3).result(WAIT).shape == (1, 9)


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_an_engine_at_rest_goes_on_with_a_model_that_was_cast(mode):
    model = mixed_model()
    engine = TwoTowerEngine(model, slots=2)
    for cast in (torch.float32, torch.bfloat16, torch.float64):
        model.to(cast)
        handle = engine.add_request(IDS, mode=mode, max_new_tokens=5)
        run(engine)
        assert torch.equal(handle.result(0), model.generate(IDS, mode=mode, max_new_tokens=5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        handle = engine.add_request(IDS, mode=mode, max_new_tokens=5)
        run(engine)
    assert handle.result(0).shape == (1, 11)


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_an_engine_serves_a_model_that_is_offloaded(mode):
    model = mixed_model()
    expected = model.generate(IDS, mode=mode, max_new_tokens=5)
    cpu_offload(model, torch.device("cpu"))
    assert model.context_tower.embeddings.weight.device.type == "meta"
    assert torch.equal(dict(model.generate_many([IDS], progress=False, mode=mode, max_new_tokens=5))[0], expected)


# Callbacks that call back.


def test_callbacks_may_ask_cancel_and_stop_but_not_wait(model, engine):
    said, more = [], []

    def call_back(step):
        said.append(outcome(engine.step))
        said.append(outcome(lambda: handle.result(1)))
        said.append(outcome(lambda: list(handle)))
        if not more:
            more.append(engine.add_request(IDS, max_new_tokens=3))
            engine.cancel_request(gone.request_id)

    gone = engine.add_request(IDS, max_new_tokens=90)
    handle = engine.add_request(IDS, max_new_tokens=4, block_size=4, steps_per_block=1, step_callback=call_back)
    run(engine)
    assert "step was called within a step" in said[0]
    assert all("waited for within a step" in one for one in said[1:3])
    assert gone.cancelled() and more[0].result(0).shape == (1, 9) and handle.result(0).shape == (1, 10)


def test_a_callback_may_wait_for_a_thread_that_waits_no_longer_than_it_was_told_to(engine):
    said = []

    def call_back(step):
        if not said:
            waiter = threading.Thread(target=lambda: said.append(outcome(lambda: handle.result(0.05))))
            waiter.start()
            waiter.join(WAIT)

    handle = engine.add_request(IDS, max_new_tokens=4, block_size=4, steps_per_block=1, step_callback=call_back)
    run(engine)
    assert said == ["TimeoutError: "]


@pytest.mark.parametrize("finish", [True, False])
def test_a_callback_may_stop_the_engine(engine, finish):
    with engine:
        handle = engine.add_request(IDS, max_new_tokens=8, step_callback=lambda step: engine.stop(finish))
        deadline = time.time() + WAIT
        while engine.is_running() and time.time() < deadline:
            time.sleep(0.01)
        assert not engine.is_running() and handle.cancelled() is not finish


def test_a_new_request_may_be_asked_for_as_another_ends(engine):
    handles = []

    def ask(done):
        if len(handles) < 3:
            handles.append(engine.add_request(IDS, max_new_tokens=2, request_id="mine"))
            handles[-1].add_done_callback(ask)

    with engine:
        ask(None)
        deadline = time.time() + WAIT
        while (len(handles) < 3 or not handles[-1].done()) and time.time() < deadline:
            time.sleep(0.01)
    assert [handle.result(0).shape for handle in handles] == [(1, 8)] * 3


# Starting and stopping.


def test_stopped_an_engine_takes_nothing_and_can_be_started_again(model, engine):
    handles = [engine.add_request(IDS, max_new_tokens=400) for _ in range(6)]
    engine.start().start()
    while not handles[0]._tokens:
        time.sleep(0.001)
    engine.stop()
    engine.stop()
    assert all(handle.cancelled() for handle in handles) and not engine.is_running()
    assert not engine._engine.rows and not engine._queue
    with pytest.raises(ValueError, match="stopped; make a new one, or call start"):
        engine.add_request(IDS)
    with engine.start():
        handle = engine.add_request(IDS, max_new_tokens=4)
    assert torch.equal(handle.result(0), model.generate(IDS, max_new_tokens=4))


def test_a_stop_that_was_not_waited_for_can_be_taken_back(engine):
    entered, holding = threading.Event(), threading.Event()
    held = engine.add_request(IDS, max_new_tokens=4, step_callback=lambda step: entered.set() or holding.wait(WAIT))
    engine.start()
    assert entered.wait(WAIT)
    engine.stop(timeout=0.01)
    assert engine.is_running()
    engine.start()
    handle = engine.add_request(IDS, max_new_tokens=4)
    holding.set()
    assert handle.result(WAIT).shape == (1, 10) and held.cancelled()
    engine.stop()


@pytest.mark.parametrize("started", [True, False])
def test_stopping_may_let_all_end(engine, started):
    handles = [engine.add_request(IDS, max_new_tokens=5) for _ in range(6)]
    if started:
        engine.start()
    engine.stop(finish=True)
    assert [handle.result(0).shape for handle in handles] == [(1, 11)] * 6


def test_an_error_in_a_with_block_cancels_what_is_left(engine):
    with pytest.raises(ZeroDivisionError), engine:
        handle = engine.add_request(IDS, max_new_tokens=4000)
        raise ZeroDivisionError
    assert handle.cancelled() and not engine.is_running()


def test_no_request_is_missed_by_a_thread_that_was_about_to_wait(engine):
    """A request that comes between a step that found nothing and the wait for one."""
    step, once = engine.step, []

    def slow_step():
        busy = step()
        if not busy and not once:
            once.append(engine.add_request(IDS, max_new_tokens=3))
        return busy

    engine.step = slow_step
    with engine:
        deadline = time.time() + WAIT
        while not once and time.time() < deadline:
            time.sleep(0.001)
        assert once[0].result(WAIT).shape == (1, 9)


def test_a_result_handler_is_told_on_its_event_loop_as_by_transformers_manager(model):
    told = {"late": [], "early": [], "cancelled": []}

    async def ask():
        with TwoTowerEngine(model, slots=2) as engine:
            engine.register_result_handler("early", told["early"].append)
            engine.add_request(IDS, request_id="early", mode="ar", max_new_tokens=5)
            late = engine.add_request(IDS, request_id="late", streaming=True, mode="ar", max_new_tokens=5)
            engine.register_result_handler(late, told["late"].append)
            endless = engine.add_request(IDS, request_id="cancelled", mode="ar", max_new_tokens=10**6)
            engine.register_result_handler("cancelled", told["cancelled"].append)
            assert engine.cancel_request(endless)
            while not all(outputs and outputs[-1].is_finished() for outputs in told.values()):
                await asyncio.sleep(0.001)
            assert engine.background_thread_status.fatal_error is None
            engine.stop(block=True, timeout=WAIT)

    asyncio.run(asyncio.wait_for(ask(), WAIT))
    expected = model.generate(IDS, mode="ar", max_new_tokens=5)[0, IDS.shape[1] :].tolist()
    assert [output.generated_tokens for output in told["early"]] == [expected]
    *steps, last = [output.generated_tokens for output in told["late"]]
    assert last == expected and all(step == expected[: len(step)] for step in steps) and steps[-1] == expected
    assert told["late"][-1].error is None and told["late"][-1].prompt_ids == IDS[0].tolist()
    assert [output.error for output in told["cancelled"]] == ["CancelledError"]


def test_a_handler_whose_event_loop_is_closed_is_left_out(model, caplog):
    """As of a program that ends, or a client that has gone: the request goes on, and nothing is logged."""
    told, engine = [], TwoTowerEngine(model, slots=1)

    async def ask():
        handle = engine.add_request(IDS, streaming=True, mode="ar", max_new_tokens=4)
        engine.register_result_handler(handle, told.append)
        return handle

    handle = asyncio.run(ask())
    assert handle.result().shape == (1, IDS.shape[1] + 4)
    assert not told and not caplog.records


def test_a_second_handler_of_a_request_takes_nothing_from_the_first(model):
    """As of a client that names a request of another's, which is then refused."""
    first, second = [], []

    async def ask():
        engine = TwoTowerEngine(model, slots=1)
        handle = engine.add_request(IDS, request_id="mine", streaming=True, mode="ar", max_new_tokens=4)
        engine.register_result_handler(handle, first.append)
        engine.register_result_handler("mine", second.append)
        with pytest.raises(ValueError, match="'mine' is in use"):
            engine.add_request(IDS, request_id="mine")
        run(engine)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), WAIT))
    for told in (first, second):
        assert [len(output.generated_tokens) for output in told][:4] == [1, 2, 3, 4] and told[-1].is_finished()


def test_a_thread_that_was_ended_is_known_by_its_error(model, monkeypatch):
    engine = TwoTowerEngine(model, slots=2)
    monkeypatch.setattr(engine, "step", lambda: sys.exit("enough"))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine.start()
    engine._thread and engine._thread.join(WAIT)
    assert isinstance(engine.background_thread_status.fatal_error, SystemExit)


def test_a_result_handler_outlives_a_request_that_was_refused(model):
    """As by a full queue, after which it is asked again."""
    told = []

    async def ask():
        engine = TwoTowerEngine(model, slots=1, max_queue=1)
        engine.register_result_handler("again", told.append)
        engine.add_request(IDS, max_new_tokens=2)
        with pytest.raises(Full):
            engine.add_request(IDS, request_id="again", max_new_tokens=2)
        run(engine)
        engine.add_request(IDS, request_id="again", max_new_tokens=2).result()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), WAIT))
    assert [output.request_id for output in told] == ["again"]


# What is refused.


def test_a_full_queue_raises(model):
    engine = TwoTowerEngine(model, slots=1, max_queue=2)
    engine.add_requests([IDS, IDS], max_new_tokens=3)
    with pytest.raises(Full, match="2 requests wait already"):
        engine.add_request(IDS)
    engine.step()
    engine.add_request(IDS, max_new_tokens=3)
    run(engine)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"input_ids": random_ids(2, 4)}, r"input_ids has shape \(2, 4\); a request is one prompt"),
        ({"input_ids": None}, "input_ids is a NoneType that makes no tensor"),
        ({"input_ids": "what?"}, "input_ids is a str that makes no tensor .*; give token ids"),
        ({"input_ids": [[[4]]]}, r"input_ids has shape \(1, 1, 1\)"),
        ({"input_ids": IDS, "num_return_sequences": 5, "do_sample": True}, "has 5 sequences, the engine 4 slots"),
        ({"input_ids": IDS, "mode": "fast"}, "mode is 'fast'"),
        ({"input_ids": IDS, "past_key_values": object()}, "past_key_values is not supported by an engine"),
        ({"input_ids": IDS, "cache": object()}, "cache is not supported by an engine"),
        ({"input_ids": IDS, "request_id": "taken"}, "request_id 'taken' is in use"),
    ],
)
def test_what_is_no_request_is_refused(engine, arguments, said):
    engine.add_request(IDS, request_id="taken", max_new_tokens=2)
    with pytest.raises(ValueError, match=said):
        engine.add_request(**arguments)
    assert len(engine._queue) == 1


@pytest.mark.parametrize("arguments", [{"slots": 0}, {"slots": True}, {"slots": 1.5}, {"max_queue": 0}])
def test_what_is_no_number_of_slots_is_refused(model, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*whole number of at least 1"):
        TwoTowerEngine(model, **arguments)


def test_a_config_of_transformers_batching_is_refused_but_not_its_word_on_the_cache(model):
    with pytest.raises(ValueError, match=r"continuous_batching_config=7 is about pages.* give slots and max_queue"):
        model.init_continuous_batching(continuous_batching_config=7)
    config = GenerationConfig(use_cache=False, max_new_tokens=3)
    engine = model.init_continuous_batching(config)
    handle = engine.add_request(IDS)
    run(engine)
    assert torch.equal(handle.result(0), model.generate(IDS, max_new_tokens=3)) and config.use_cache is False


def test_ids_that_are_given_are_left_out_of_those_that_are_made(engine):
    engine.add_request(IDS, request_id="request-0", max_new_tokens=2)
    assert engine.add_request(IDS, max_new_tokens=2).request_id == "request-1"
    run(engine)
    assert engine.add_request(IDS, request_id="request-0", max_new_tokens=2).request_id == "request-0"


# What comes back.


@pytest.mark.parametrize("prompt", [[], [4], [0, 0, 5, 6], torch.tensor([5, 6], dtype=torch.int32)])
def test_prompts_come_back_as_generate_gives_them_back(prompt):
    model = mixed_model()
    model.generation_config.update(bos_token_id=1, pad_token_id=0)
    ids = torch.as_tensor(prompt)[None]
    engine = TwoTowerEngine(model, slots=1)
    handle = engine.add_request(prompt, max_new_tokens=4)
    run(engine)
    expected = model.generate(ids, max_new_tokens=4)
    assert torch.equal(handle.result(0), expected) and handle.result(0).dtype == expected.dtype


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("mode", ["ar", "mask_diffusion", "self_speculative", "mock_ar"])
def test_a_cache_that_comes_back_goes_on_with_the_text(model, mode, sequences):
    knobs = {"mode": mode, "max_new_tokens": 7, "return_dict_in_generate": True, "eos_token_id": [7, 20]}
    knobs |= {"do_sample": True, "seed": 2, "num_return_sequences": sequences}
    engine = TwoTowerEngine(model, slots=4)
    engine.add_request(random_ids(1, 20), max_new_tokens=30)
    handle = engine.add_request(IDS, **knobs)
    run(engine)
    got, alone = handle.result(0), model.generate(IDS, **knobs)
    assert differences(got, alone) == []
    for ours, theirs in zip(got.cache.views(), alone.cache.views(), strict=True):
        for part, other in zip(ours or (), theirs or (), strict=True):
            for row, length in enumerate(alone.cache.lengths.tolist()):
                if part.ndim == 4 and part.shape[2] == alone.cache.width and part.dtype == other.dtype:
                    torch.testing.assert_close(part[row, :, :length], other[row, :, :length], atol=1e-4, rtol=1e-3)


def test_time_in_the_queue_is_not_counted_as_time_to_write(model):
    engine = TwoTowerEngine(model, slots=1)
    handle = engine.add_request(IDS, max_new_tokens=3, mode="ar", max_time=30.0)
    ((_, request),) = engine._queue
    (timer,) = request.stopping.timers
    assert type(timer) is MaxTimeCriteria
    timer.initial_timestamp -= 60.0
    run(engine)
    assert handle.result(0).shape == (1, 9)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_stream_ends_with_a_request_that_does_not_succeed(model, engine, how, running):
    def fail(ids, scores):
        raise KeyError("a processor failed")

    streamer = Streamer()
    asked = {"logits_processor": [fail]} if how == "failed" else {}
    handle = engine.add_request(IDS, max_new_tokens=600, mode="ar", streamer=streamer, **asked)
    if running:
        engine.step()
        engine.step()
    if how == "cancelled":
        assert handle.cancel()
    while not handle.done():
        engine.step()
    assert streamer.ended and not handle.running()


def test_a_streamer_gets_the_text_and_its_end(model, engine):
    streamer = Streamer()
    handle = engine.add_request(IDS, max_new_tokens=6, streamer=streamer)
    run(engine)
    assert streamer.tokens == handle.result(0)[0, 6:].tolist() == list(handle)
    assert streamer.prompts == 6 and streamer.ended


def test_settings_that_differ_in_the_middle_of_a_long_list_are_told_apart():
    from tiny import tiny_model, without_special_tokens

    model = without_special_tokens(tiny_model("each kind once", vocab_size=2400))
    likely = model.generate(IDS, mode="ar", max_new_tokens=1)[0, -1]
    low = [token for token in range(4, 2300) if token != likely]
    calls = [{"suppress_tokens": low}, {"suppress_tokens": sorted([*low[:1000], int(likely), *low[1001:]])}]
    engine = TwoTowerEngine(model, slots=2)
    handles = [engine.add_request(IDS, mode="ar", max_new_tokens=3, **call) for call in calls]
    run(engine)
    for handle, call in zip(handles, calls, strict=True):
        assert torch.equal(handle.result(0), model.generate(IDS, mode="ar", max_new_tokens=3, **call))


# What is left behind.


def test_nothing_of_a_request_outlives_it(model, engine):
    """Without the collector of cycles, which does not know how full a device's memory is."""
    gc.collect()
    gc.disable()
    try:
        held = []
        for fate in ("ends", "fails", "is cancelled"):
            failing = FAILURES["processor"](8) if fate == "fails" else {}
            handle = engine.add_request(
                IDS, max_new_tokens=6, mode="self_speculative", return_dict_in_generate=True, **failing
            )
            ((_, request),) = engine._queue
            held += [weakref.ref(request), *map(weakref.ref, request.rows)]
            del request
            engine.step()
            held += [weakref.ref(row.cache) for row in engine._engine.rows if row.cache is not None]
            if fate == "is cancelled":
                handle.cancel()
            run(engine)
            assert handle.done()
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_an_error_that_is_kept_keeps_no_tensors(model, engine):
    handle = engine.add_request(IDS, mode="ar", **FAILURES["processor"](8))
    run(engine)
    frame, locals_held = handle.exception(0).__traceback__, []
    while frame is not None:
        if "twotower" in frame.tb_frame.f_globals.get("__name__", ""):
            locals_held += [value for value in frame.tb_frame.f_locals.values() if isinstance(value, torch.Tensor)]
        frame = frame.tb_next
    assert locals_held == [] and handle.exception(0).__traceback__ is not None


def test_memory_does_not_grow(model, engine):
    def work(first):
        for number in range(first, first + 12):
            engine.add_request(random_ids(1, 5 + number % 3), max_new_tokens=4, mode="self_speculative")
        run(engine)

    work(0)
    tracemalloc.start()
    try:
        work(0)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for round_ in range(3):
            work(12 * round_)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 30_000
    finally:
        tracemalloc.stop()


# Whole workloads.


def test_many_prompts_give_what_they_give_alone_as_they_finish(model):
    prompts = [random_ids(1, 3 + n % 5, seed=n) for n in range(9)]
    own = {"input_ids": prompts[4][0].tolist(), "max_new_tokens": 1, "mode": "ar"}
    taken = []

    def coming():
        for number, ids in enumerate(prompts):
            taken.append(number)
            yield own if number == 4 else ids

    results = model.generate_many(coming(), slots=2, progress=False, max_new_tokens=6)
    order = []
    for number, result in results:
        call = {"max_new_tokens": 1, "mode": "ar"} if number == 4 else {"max_new_tokens": 6}
        assert torch.equal(result, model.generate(prompts[number], **call))
        order.append(number)
        assert len(taken) <= len(order) + 2 * 2 + 1  # no more than are needed soon
    assert sorted(order) == list(range(9))


def test_many_prompts_show_their_progress(model, capsys):
    assert len(list(model.generate_many([[4], [5]], max_new_tokens=2))) == 2
    assert "2/2" in capsys.readouterr().err
    list(model.generate_many([[4], [5]], progress=False, max_new_tokens=2))
    assert capsys.readouterr().err == ""


def test_what_is_wrong_with_one_of_many_says_which(model):
    with pytest.raises(ValueError, match="outside the vocabulary") as caught:
        list(model.generate_many([[4], [5], [99]], progress=False, max_new_tokens=2))
    assert caught.value.__notes__ == ["It is about prompt 2, counted from 0."]


def test_what_goes_wrong_with_one_of_many_later_says_which_too(model):
    failing = {"input_ids": [5], "logits_processor": [Stateless(fails_beyond(2, lambda scores: scores))]}
    with pytest.raises(KeyError, match="text of 3 tokens") as caught:
        list(model.generate_many([[4], failing, [6]], progress=False, max_new_tokens=9, mode="ar"))
    assert caught.value.__notes__ == ["It is about prompt 1, counted from 0."]


@pytest.mark.parametrize("running", [True, False])
def test_a_workload_shares_an_engine_with_a_short_queue_and_other_requests(model, running):
    engine = model.init_continuous_batching(slots=2, max_queue=1)
    if running:
        engine.start()
    other = engine.add_request(IDS, max_new_tokens=9)
    results = dict(engine.run_all([random_ids(5, seed=n) for n in range(6)], max_new_tokens=3))
    assert sorted(results) == list(range(6)) and {tuple(one.shape) for one in results.values()} == {(1, 8)}
    engine.stop(finish=True)
    assert other.result(0).shape == (1, 15)


def test_a_workload_that_is_left_early_cancels_the_rest(model, engine):
    results = engine.run_all([random_ids(5, seed=n) for n in range(20)], max_new_tokens=3)
    next(results)
    results.close()
    engine.step()
    assert not engine._running and not engine._queue and not engine._engine.rows


def test_generate_batch_gives_what_generate_gives(model):
    prompts = [[4, 5, 6], [7, 8], random_ids(11).tolist()]
    outputs = model.generate_batch(prompts, GenerationConfig(max_new_tokens=5), mode="ar")
    assert list(outputs) == ["req_0", "req_1", "req_2"]
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), GenerationConfig(max_new_tokens=5), mode="ar")
        assert output.prompt_ids == prompt and output.prompt_ids + output.generated_tokens == expected[0].tolist()
        assert output.is_finished()


def test_the_engine_of_a_generation_config(model):
    config = GenerationConfig(max_new_tokens=3, mode="ar")
    with model.continuous_batching_context_manager(generation_config=config, slots=2, max_queue=5) as engine:
        assert isinstance(engine, TwoTowerEngine) and engine.is_running()
        assert (engine.slots, engine.max_queue) == (2, 5)
        handle = engine.add_request(IDS)
        longer = engine.add_request(IDS, GenerationConfig(max_new_tokens=5, mode="ar"))
        assert handle.result(WAIT).shape == (1, 9) and longer.result(WAIT).shape == (1, 11)
    assert not engine.is_running()
    assert isinstance(model.init_continuous_batching(config), TwoTowerEngine)


def test_none_is_what_the_engines_config_says_as_for_transformers_manager(model):
    """`transformers serve` gives both, None where a chat does not ask for them."""
    text = model.generate(IDS, mode="ar", max_new_tokens=30)[0, IDS.shape[1] :].tolist()
    end = next(token for token in text[3:] if token not in text[:3])
    config = GenerationConfig(max_new_tokens=30, mode="ar", eos_token_id=end)
    unset = {"max_new_tokens": None, "eos_token_id": None}
    configured = model.init_continuous_batching(config).add_request(IDS, **unset).result()
    assert torch.equal(configured, model.generate(IDS, config)) and configured.shape[1] < IDS.shape[1] + 30
    bare = TwoTowerEngine(model).add_request(IDS, mode="ar", **unset).result()
    assert torch.equal(bare, model.generate(IDS, mode="ar", **unset))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_what_is_no_generation_config_is_refused(model, name):
    arguments = ([IDS],) if name == "generate_batch" else ()
    with pytest.raises(ValueError, match=r"generation_config is {'max_new_tokens': 3}; give a GenerationConfig"):
        getattr(model, name)(*arguments, generation_config={"max_new_tokens": 3})


def test_a_config_of_a_batch_is_left_as_it_is_and_warned_of_by_nobody(model, warned):
    config = GenerationConfig(max_new_tokens=3, mode="ar", return_dict_in_generate=True)
    answer = model.generate_batch([IDS], config)["req_0"].generated_tokens
    assert answer == model.generate(IDS, max_new_tokens=3, mode="ar")[0, IDS.shape[1] :].tolist()
    assert config.return_dict_in_generate and not warned.records


BUSY_ENGINE = """
import os, signal, sys, twotower
model = twotower.TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint())
engine = twotower.TwoTowerEngine(model).start()
handles = engine.add_requests([[1] * 50] * 8, mode="ar", max_new_tokens=10**4, eos_token_id=1023)
next(iter(handles[-1]))
"""


def process_with_a_busy_engine(goes_on=""):
    # Not `fresh_python`, whose processes end otherwise.
    code = BUSY_ENGINE + goes_on
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)


def test_a_process_may_end_while_an_engine_works():
    done = process_with_a_busy_engine()
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_does_not_wait_for_an_engine_that_it_does_not_have():
    done = process_with_a_busy_engine("""
engine._turn._lock.acquire()  # as in the midst of a step
if (child := os.fork()) == 0:
    signal.alarm(30)
    sys.exit(3)
engine._turn._lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_prompts_of_very_different_lengths_read_in_chunks_or_whole(model, engine):
    requests = [
        Request(random_ids(1, length, seed=length), {"mode": mode, "max_new_tokens": 4, "prefill_chunk_size": chunk})
        for length, chunk in ((1, None), (2, 1), (500, 64), (7, 3), (400, None), (3, None))
        for mode in ("ar", "mask_diffusion")
    ]
    handles = [engine.add_request(request.ids, **request.arguments()) for request in requests]
    run(engine)
    for handle, request in zip(handles, requests, strict=True):
        assert torch.equal(handle.result(0), model.generate(request.ids, **request.arguments()))


def test_generate_batch_gives_one_text_per_prompt(model):
    with pytest.raises(ValueError, match="num_return_sequences is 2; generate_batch gives one"):
        model.generate_batch([[5, 6]], num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 3\); a request is one prompt"):
        model.generate_batch([random_ids(2, 3)], max_new_tokens=2)
    with pytest.raises(ValueError, match="return_dict_in_generate is true, but generate_batch gives"):
        model.generate_batch([[5, 6]], return_dict_in_generate=True)
    several = mixed_model()
    several.generation_config.update(num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="num_return_sequences is 2; generate_batch gives one"):
        several.generate_batch([[5, 6]], max_new_tokens=2)
    assert len(several.generate_batch([[5, 6]], max_new_tokens=2, num_return_sequences=1)) == 1


def test_a_model_spread_over_ranks_is_refused(model, monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    TwoTowerEngine(model)  # whole on every rank
    monkeypatch.setattr(model, "_is_synced", lambda synced_gpus: True)
    with pytest.raises(ValueError, match=r"spread over ranks.*call generate"):
        TwoTowerEngine(model)
