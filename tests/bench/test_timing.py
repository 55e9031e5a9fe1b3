"""Clocks and statistics of benchmarks."""

import time

import pytest

from twotower.bench.timing import in_turn, ratios, spread, timed


def test_ways_take_turns_after_a_warm_up():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "ababab"
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_sleeping_takes_wall_time_and_none_of_the_threads_own():
    result, seconds = timed(lambda: time.sleep(0.05) or "done")
    assert result == "done"
    assert seconds.wall >= 0.05 > 10 * seconds.cpu >= 0


def test_spread_is_median_and_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["median"], found["quartiles"]) == (3.0, [2.0, 4.0])
    assert found["samples"] == [5.0, 1.0, 2.0, 4.0, 3.0]
    assert spread([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0], "samples": [2.0]}


def test_ratios_are_of_the_same_round():
    """A round that was slow for both says nothing about their ratio."""
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])["quartiles"] == [2.0, 2.0]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])
