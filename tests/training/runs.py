"""Recipes of a tiny model on a few documents, what a run left behind, and runs in processes that are killed."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import student_model, tiny_tokenizer

from twotower.demo.tasks import training_tasks
from twotower.training import run as running
from twotower.training.recipe import Recipe, recipe_of

DOCUMENTS = 12


def make_inputs(folder: Path, geometry: str = "all kinds") -> Path:
    """A checkpoint, `model`, and documents, `data.jsonl`."""
    tokenizer = tiny_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    student_model(geometry, vocab_size=280, block_size=8).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = list(islice(training_tasks(1), DOCUMENTS))
    lines = [{"text": each.text, "question": each.prompt, "answer": " " + each.answer} for each in problems]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(inputs: Path, folder: Path, **changes: Any) -> Recipe:
    """Four steps of two documents; `changes` replace or add keys, those of `data__text` and the like within others."""
    content: dict[str, Any] = {
        "folder": str(folder),
        "model": {"checkpoint": str(inputs / "model")},
        "data": {"files": [str(inputs / "data.jsonl")], "prompt": "question", "completion": "answer", "pool": 8},
        "steps": 4,
        "batch_size": 2,
        "optimizer": {"lr": 1e-2},
        "save": {"every": 1},
        "log": {"every": 1},
        "device": "cpu",
    }
    for key, value in changes.items():
        place, *names = content, *key.split("__")
        for name in names[:-1]:
            place = place.setdefault(name, {})
        if value is None:
            place.pop(names[-1], None)
        else:
            place[names[-1]] = value
    return recipe_of(content)


def lines(file: Path) -> list[dict[str, Any]]:
    """Without what differs between two equal runs."""
    read = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read]


def left_behind(folder: Path) -> dict[str, Any]:
    """Everything of a finished run, by file: bytes, or lines."""
    found: dict[str, Any] = {"log": lines(folder / "log.jsonl"), "samples": lines(folder / "samples.jsonl")}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ("lock", "log.jsonl", "samples.jsonl", "state.json"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    found["folders"] = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return found


# Killed runs: `python runs.py INPUTS RESULT`, where forking after the imports makes a process cheap.


# Not of files: importing what reads them is most of what a short run takes.
GENERATED = {"data": {"generated": "tasks", "pool": 8}}


def in_process(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Run in a process of its own; whether it ended by itself rather than by SIGKILL."""
    assert len(os.listdir("/proc/self/task")) == 1, "a thread may hold a lock that no one opens in the other process"
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "a run failed"
    return True


def killed_at_random(inputs: Path, place: Path, kills: int) -> dict[str, Any]:
    """Kill runs at random moments, so many times in all, and let each go on to its end."""
    asked = {
        **GENERATED,
        "steps": 6,
        "save__keep": 2,
        "samples": {"prompts": ["Question:"], "every": 3, "max_new_tokens": 8},
    }
    times = []
    for _ in range(2):  # the second time there is nothing left but to begin
        began = time.monotonic()
        assert in_process(lambda: running.train(recipe(inputs, place / "whole", **asked)))
        times.append(time.monotonic() - began)
    expected, rng = left_behind(place / "whole"), random.Random()
    number, stored, slower, equal = 0, [], 1.0, []
    while len(stored) < kills:
        folder = place / f"parts-{number}"
        delay = rng.uniform(times[1] / 2, times[1] + 3 * (times[0] - times[1]) / kills) * slower
        if in_process(lambda: running.train(recipe(inputs, folder, **asked)), delay):  # noqa: B023
            equal.append(left_behind(folder) == expected)
            number += 1
            # A machine that has become faster would never be killed in time.
            slower *= 0.7
            continue
        found = running.checkpoints(folder) if folder.exists() else []
        stored.append(int(found[-1].name.split("-")[1]) if found else 0)
        # A machine that has become busier would never let it come further.
        slower *= 1.3 if len(stored) > 1 and stored[-1] == stored[-2] else 1.0
    assert in_process(lambda: running.train(recipe(inputs, folder, **asked)))
    return {"stored": stored, "equal": [*equal, left_behind(folder) == expected]}


def killed_at_every_change(inputs: Path, place: Path) -> list[bool]:
    """Kill a run before every other change of its folder while it stores its second checkpoint: is all the same?"""
    asked = {**GENERATED, "save__keep": 1, "steps": 2}
    assert in_process(lambda: running.train(recipe(inputs, place / "whole-2", **asked)))
    assert in_process(lambda: stopped_after_step(1, recipe(inputs, place / "begun", **asked), lambda: os._exit(0)))
    expected, equal, ended = left_behind(place / "whole-2"), [], False
    while not ended:
        folder = place / f"changes-{len(equal)}"
        shutil.copytree(place / "begun", folder)
        ended = in_process(lambda: killed_before_change(2 * len(equal) + 1, recipe(inputs, folder, **asked)))  # noqa: B023
        if not ended:
            assert in_process(lambda: running.train(recipe(inputs, folder, **asked)))  # noqa: B023
        equal.append(left_behind(folder) == expected)
    return equal


def stopped_after_step(step: int, asked: Recipe, stop: Callable[[], Any]) -> None:
    """Train up to a step and call `stop`, which does not return."""
    real = running.Run._take_step

    def take(run: running.Run) -> Any:
        if run.step == step:
            stop()
        return real(run)

    with mock.patch.object(running.Run, "_take_step", take):
        running.train(asked)


def interrupted_after_step(step: int, asked: Recipe) -> None:
    """As by Ctrl-C."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_after_step(step, asked, stop)


def killed_before_change(number: int, asked: Recipe) -> None:
    """Those of whole files and folders; what is written within a new one has no name yet."""
    left = number

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("rename", "replace", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    running.train(asked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs, result = Path(sys.argv[1]), Path(sys.argv[2])
    found = killed_at_random(inputs, result.parent, kills=10)
    result.write_text(json.dumps({**found, "changes": killed_at_every_change(inputs, result.parent)}))
