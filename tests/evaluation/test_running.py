"""Programs of a model's, which may do anything."""

import pytest

from twotower.evaluation.running import passes_tests


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
        ("import os; assert not os.environ.get('HOME') and os.listdir() == []", True),
        ("import sys; assert sys.stdin.read() == ''", True),
        ("import torch", False),
        ("a = '\0'", False),
    ],
)
def test_a_program_is_right_if_it_ends_without_an_error_within_its_limits(program, passes):
    assert passes_tests(program, seconds=2) is passes
