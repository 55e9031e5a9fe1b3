"""
Figures with their errors. What is compared on the same problems, or timed side by side, is compared problem by
problem, so that what makes a problem hard, or the machine slow, for both sides does not count.

Errors are one standard error over problems; None where there is but one of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

Numbers = Sequence[float]


class Estimate(NamedTuple):
    """A value and its standard error; None where there is none."""

    value: float | None
    stderr: float | None


def quotient(above: Sequence[Numbers], below: Sequence[Numbers]) -> Estimate:
    """
    The product of the sums of some columns over the product of those of others, by the delta method.

    Args:
        above: columns of n numbers each, of the same n problems.
        below: likewise; none of them may be empty.

    Returns:
        None for the value where a sum below is 0.
    """
    tops, bottoms = [sum(column) for column in above], [sum(column) for column in below]
    if not all(bottoms):
        return Estimate(None, None)
    value, count = math.prod(tops) / math.prod(bottoms), len(below[0])
    if count < 2:
        return Estimate(value, None)
    if not value:
        return Estimate(value, 0.0)
    pulls = (
        sum(column[i] / total for column, total in zip(above, tops, strict=True))
        - sum(column[i] / total for column, total in zip(below, bottoms, strict=True))
        for i in range(count)
    )
    return Estimate(value, abs(value) * math.sqrt(count / (count - 1) * sum(pull**2 for pull in pulls)))


def mean(values: Numbers) -> Estimate:
    count = len(values)
    if not count:
        return Estimate(None, None)
    middle = sum(values) / count
    spread = sum((value - middle) ** 2 for value in values)
    return Estimate(middle, math.sqrt(spread / (count - 1) / count) if count > 1 else None)


def difference(ours: Numbers, theirs: Numbers) -> Estimate:
    """The mean of the differences, problem by problem."""
    return mean([our - their for our, their in zip(ours, theirs, strict=True)])


def share_interval(right: int, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, by default at 95 %: of width above 0 also where all or none are right."""
    share, squared = right / count, deviations**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = deviations / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_figures(right: Sequence[bool], reference: Sequence[bool]) -> dict[str, Any]:
    """Of answers to n problems: their share of right ones, and that next to a reference's on the same problems."""
    count, accuracy = len(right), sum(right) / len(right)
    kept, gained = quotient([right], [reference]), difference(right, reference)
    return {
        "correct": sum(right),
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / count) if count > 1 else None,
        "accuracy_interval": list(share_interval(sum(right), count)),
        "retention": kept.value,
        "retention_stderr": kept.stderr,
        "difference": gained.value,
        "difference_stderr": gained.stderr,
    }


def percent(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def plus_minus(value: float | None, stderr: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if stderr is None else f"{value:.{digits}f} ± {stderr:.{digits}f}"


def times(value: float | None, stderr: float | None) -> str:
    return plus_minus(value, stderr) + "x" * (value is not None)


# How each figure of a report is shown in its tables.
SHOWN: dict[str, Callable[[float | None, float | None], str]] = {
    "accuracy": percent,
    "retention": percent,
    "share": percent,
    "passes_per_problem": partial(plus_minus, digits=1),
    "fewer_passes": times,
    "tokens_per_pass": plus_minus,
    "tokens_per_denoiser_pass": plus_minus,
    "tokens_per_second": partial(plus_minus, digits=0),
    "speedup": times,
}


def cells(row: dict[str, Any], *names: str) -> list[str]:
    """Of a table: a row's figures with their errors; "part.name" is a figure of a part of them."""
    found = []
    for part, _, name in (each.rpartition(".") for each in names):
        figures = row[part] if part else row
        found.append(SHOWN[name](figures[name], figures[f"{name}_stderr"]))
    return found
