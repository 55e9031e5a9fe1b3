"""Programs of a model's, which may do anything."""

import time
from pathlib import Path

import pytest

from twotower.evaluation import running
from twotower.evaluation.running import passes_tests, run_limited


@pytest.mark.parametrize(
    "program, passes",
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("x = bytearray(2**31)", False),
        ("open('big', 'wb').write(bytes(2**22))", False),
        ("import os; os._exit(3)", False),
        ("import sys; sys.exit()\nassert False", False),
        ("import os; os._exit(0)", False),
        ("from __future__ import annotations", True),
        ("import os; assert not os.environ.get('HOME') and os.listdir() == []", True),
        ("import sys; assert sys.stdin.read() == ''", True),
        ("import torch", False),
        ("a = '\0'", False),
        (f"assert len({'a' * 300_000!r}) == 300_000", True),
    ],
)
def test_a_program_is_right_if_it_ends_without_an_error_within_its_limits(program, passes):
    assert passes_tests(program, seconds=2) is passes


def test_what_a_program_has_begun_ends_with_it(tmp_path):
    begun = tmp_path / "begun"
    program = (
        "import os, time\nif os.fork() == 0:\n    open(BEGUN, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
        "while not (os.path.exists(BEGUN) and open(BEGUN).read()):\n    time.sleep(0.01)"
    )
    assert passes_tests(program.replace("BEGUN", repr(str(begun))))
    stat = Path("/proc", begun.read_text(), "stat")
    until = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_still_writes_while_it_is_killed_ends_no_evaluation():
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    until, folder = time.monotonic() + 1, os.path.abspath("many")
    while time.monotonic() < until:
        os.makedirs(f"{folder}/{time.monotonic()}")
    os._exit(0)
while not (os.path.exists("many") and len(os.listdir("many")) > 9):
    time.sleep(0.01)
"""
    assert passes_tests(program)


def test_sets_of_words_have_the_same_order_every_time():
    given = {run_limited("print(list({*map(str, range(20))}))", {}, 10, b"")[1] for _ in range(3)}
    assert len(given) == 1 and given != {b""}


LOWER = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))\n"
UNKNOWN = """
import resource
known = resource.setrlimit
def setrlimit(kind, most):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    known(kind, most)
resource.setrlimit = setrlimit
"""


@pytest.mark.parametrize("system", [LOWER, UNKNOWN], ids=["lower", "unknown"])
def test_a_limit_that_the_system_has_lower_or_does_not_know_fails_no_program(system, monkeypatch):
    """macOS knows none on memory."""
    monkeypatch.setattr(running, "_LIMITS", system + running._LIMITS)
    assert passes_tests("assert True") and not passes_tests("assert False")


def test_a_system_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr(running, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"limits on time and memory, which this system has not; .*--skill words"):
        passes_tests("assert True")
