"""What of an answer is right: a word problem's final result, the tests a function passes, the whole text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .checking import passed
from .tasks import Task

_passed = cache(passed)


@dataclass(frozen=True)
class Marks:
    """Of the answers to some tasks: which are right, which are the reference, and the share of tests each passes."""

    right: list[bool]
    whole: list[bool]
    tests: list[float]

    @classmethod
    def of(cls, answers: list[list[int]], tasks: Sequence[Task], tokenizer: Any) -> "Marks":
        """
        Args:
            answers: new tokens of each task.
            tokenizer: to read them.
        """
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        shares = [share_right(task, text) for task, text in zip(tasks, texts, strict=True)]
        whole = [text.strip() == task.answer for task, text in zip(tasks, texts, strict=True)]
        return cls([share == 1.0 for share in shares], whole, shares)


def share_right(task: Task, text: str) -> float:
    """Of code the share of tests passed; of a word problem 1.0 for the right final result, 0.0 for another."""
    if task.skill == "words":
        return float(extract_result(text) == task.result)
    if text.strip() == task.answer:
        return 1.0  # what the tests were made of, which need not be run
    right = _passed(text.strip(), task.checks)
    return sum(right) / len(right)


def extract_result(text: str) -> int | None:
    """Returns the integer after the last `####` of `text`, or None where no integer stands there."""
    _, mark, tail = text.rpartition("####")
    # A fraction is no integer, and a run of more than 18 digits is a model gone astray.
    found = re.match(r"\s*(-?[0-9]{1,18})(?![.,]?[0-9])", tail) if mark else None
    return int(found.group(1)) if found else None
