"""Checks of written functions: what passes, and what a function may not do."""

import time

import pytest

from twotower.demo.checking import passed

ONE = [("f(3)", "1")]


def test_a_right_function_passes_and_a_wrong_one_only_what_it_gets_right():
    checks = [("f([1, 2])", "3"), ("f([])", "0")]
    assert passed("def f(xs):\n    return sum(xs)", checks) == [True, True]
    assert passed("def f(xs):\n    return len(xs)", checks) == [False, True]
    assert passed("def f(xs):\n    return sum(xs", checks) == [False, False]


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
    assert passed(f"def f(x):\n    {body}", ONE) == [False]


def test_one_that_does_not_end_is_killed():
    started = time.monotonic()
    assert passed("def f(x):\n    while True: pass", ONE, seconds=0.5) == [False]
    assert time.monotonic() - started < 5


def test_the_order_of_a_set_is_no_matter_of_luck():
    """Which of two equal functions passes would change from run to run otherwise."""
    code = "def f(text):\n    return list(set(text))"
    given = [[passed(code, [("f('abc')", repr(list(order)))])[0] for order in ("abc", "acb", "bac")] for _ in range(4)]
    assert given == given[:1] * 4
