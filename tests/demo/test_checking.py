"""Checks of written functions: what passes, and what a function may not do."""

import time

import pytest

from twotower.demo.checking import passes

ONE = [("f(3)", "1")]


def test_a_right_function_passes_and_a_wrong_one_does_not():
    checks = [("f([1, 2])", "3"), ("f([])", "0")]
    assert passes("def f(xs):\n    return sum(xs)", checks)
    assert not passes("def f(xs):\n    return len(xs)", checks)
    assert not passes("def f(xs):\n    return sum(xs", checks)


@pytest.mark.parametrize(
    "body",
    [
        "import os\n    return 1",
        "return 1 if open('/etc/passwd') else 0",
        "return 1 if [0] * 10**9 else 0",
        "return print('1') or 0",
        "raise SystemExit",
    ],
)
def test_what_a_function_may_not_do_fails(body):
    assert not passes(f"def f(x):\n    {body}", ONE)


def test_one_that_does_not_end_is_killed():
    started = time.monotonic()
    assert not passes("def f(x):\n    while True: pass", ONE, seconds=0.5)
    assert time.monotonic() - started < 5
