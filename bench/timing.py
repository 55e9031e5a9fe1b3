"""Clocks and statistics: wall time and the thread's own time of what runs in turn, as medians with quartiles."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Seconds(NamedTuple):
    """
    What something took.

    Args:
        wall: until its result was there.
        cpu: of this thread alone, which leaves out that others were given the core; it does not count what the
            device or torch's other threads did.
    """

    wall: float
    cpu: float


def timed(run: Callable[[], Result], device: torch.device | None = None) -> tuple[Result, Seconds]:
    """What it returns, and how long it took; with an accelerator as `device` until that has done it."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.thread_time()
    result = run()
    _wait(device)
    return result, Seconds(time.perf_counter() - wall, time.thread_time() - cpu)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def in_turn(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> dict[str, list[Seconds]]:
    """Every way once a round, so that what disturbs the machine disturbs all alike; before that once as a warm-up."""
    for run in ways.values():
        run()
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(timed(run, device)[1])
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the samples they are of."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": cuts[1], "quartiles": [cuts[0], cuts[2]], "samples": list(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The [`spread`] of one way's values over another's of the same round."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


__all__ = ["Seconds", "in_turn", "ratios", "spread", "timed"]
