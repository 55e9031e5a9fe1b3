"""Fifteen fixed word problems of one to three steps: questions with named gaps, and the equations that answer them."""

import operator
import random
from dataclasses import dataclass

LOWEST, HIGHEST = 2, 999


@dataclass(frozen=True)
class Step:
    """One line of an answer; `equation` is "left op right" over the given a, b, c, d, earlier r1, r2, and digits."""

    wording: str
    equation: str


@dataclass(frozen=True)
class Template:
    """A question with gaps; `kinds` says how its numbers a, b, c, d are drawn (see `draw`), one word each."""

    kinds: str
    question: str
    steps: tuple[Step, ...]


ONE_STEP = (
    Template(
        "any any",
        "{name} has {a} {items} at home. At the {place}, {he} buys {b} more {items}. "
        "How many {items} does {name} have now?",
        (Step("After buying", "a + b"),),
    ),
    Template(
        "any any",
        "There were {a} {items} at the {place} in the morning. By the evening, {b} of them were sold. "
        "How many {items} are left at the {place}?",
        (Step("After selling", "a - b"),),
    ),
    Template(
        "any any",
        "{name} has {a} {items} and {other} has {b} {items}. How many more {items} does {name} have than {other}?",
        (Step("Comparing them", "a - b"),),
    ),
    Template(
        "factor small",
        "{name} keeps {a} {boxes} at the {place}. Each of the {boxes} holds {b} {items}. "
        "How many {items} does {name} have in all?",
        (Step("In the {boxes}", "a * b"),),
    ),
    Template(
        "small divisor",
        "{name} shares {a} {items} equally among {b} friends at the {place}. How many {items} does each friend get?",
        (Step("For each friend", "a / b"),),
    ),
)
TWO_STEPS = (
    Template(
        "any any any",
        "{name} has {a} {items}. {He} buys {b} more and then gives {c} to {other}. "
        "How many {items} does {name} have now?",
        (Step("After buying", "a + b"), Step("After giving", "r1 - c")),
    ),
    Template(
        "any any any",
        "There were {a} {items} at the {place}. {name} took {b} of them and {other} took {c}. "
        "How many {items} are left at the {place}?",
        (Step("After {name}", "a - b"), Step("After {other}", "r1 - c")),
    ),
    Template(
        "any any",
        "{name} has {a} {items}. {other} has {b} more {items} than {name}. How many {items} do they have together?",
        (Step("For {other}", "a + b"), Step("Together", "a + r1")),
    ),
    Template(
        "factor small any",
        "Each of {a} {boxes} holds {b} {items}. {name} finds {c} more {items} at the {place}. "
        "How many {items} are there in all?",
        (Step("In the {boxes}", "a * b"), Step("After finding", "r1 + c")),
    ),
    Template(
        "any any",
        "{name} has {a} {items}. {other} has twice as many but loses {b} of them at the {place}. "
        "How many {items} does {other} have now?",
        (Step("Twice as many", "a * 2"), Step("After losing", "r1 - b")),
    ),
)
THREE_STEPS = (
    Template(
        "any any any any",
        "{name} has {a} {items}. {He} buys {b} more, gives {c} to {other} and then finds {d} at the {place}. "
        "How many {items} does {name} have now?",
        (Step("After buying", "a + b"), Step("After giving", "r1 - c"), Step("After finding", "r2 + d")),
    ),
    Template(
        "any any any",
        "At the {place}, {name} sold {a} {items} on Monday and {b} more than that on Tuesday. "
        "{c} of all these {items} were returned. How many {items} were sold in the end?",
        (Step("On Tuesday", "a + b"), Step("On both days", "a + r1"), Step("After returning", "r2 - c")),
    ),
    Template(
        "factor small any any",
        "{name} fills {a} {boxes} with {b} {items} each. {He} loses {c} {items} at the {place} and buys {d} more. "
        "How many {items} does {name} have now?",
        (Step("In the {boxes}", "a * b"), Step("After losing", "r1 - c"), Step("After buying", "r2 + d")),
    ),
    Template(
        "even any",
        "{name} has {a} {items} and {other} has half as many. Together they find {b} more at the {place}. "
        "How many {items} do they have in all?",
        (Step("For {other}", "a / 2"), Step("Together", "a + r1"), Step("After finding", "r2 + b")),
    ),
    Template(
        "small small small divisor",
        "{name} has {a} {items}. {He} buys {b} more, loses {c} and shares the rest equally among {d} friends. "
        "How many {items} does each friend get?",
        (Step("After buying", "a + b"), Step("After losing", "r1 - c"), Step("For each friend", "r2 / d")),
    ),
)
TEMPLATES = (ONE_STEP, TWO_STEPS, THREE_STEPS)


def draw(rng: random.Random, kind: str) -> int:
    if kind == "factor":
        return rng.randint(2, 6)
    if kind == "divisor":
        return rng.randint(2, 5)
    if kind == "even":
        return 2 * rng.randint(2, 250)
    # Long numbers are drawn again more often; these chances leave about a third for each length.
    digits = rng.choices((1, 2, 3), (1, 2, 0) if kind == "small" else (2, 3, 5))[0]
    return rng.randint(max(LOWEST, 10 ** (digits - 1)), 10**digits - 1)


def solve(template: Template, numbers: tuple[int, ...]) -> dict[str, int]:
    """Returns the given numbers as a, b, c, d and the result of each step as r1, r2, r3."""
    values = dict(zip("abcd", numbers, strict=False))
    for i, step in enumerate(template.steps, start=1):
        left, sign, right = step.equation.split()
        values[f"r{i}"] = _apply(_value(left, values), sign, _value(right, values))
    return values


def _value(term: str, values: dict[str, int]) -> int:
    return int(term) if term.isdigit() else values[term]


def _apply(left: int, sign: str, right: int) -> int:
    if sign == "/":
        # Zero is below the range, so an inexact division is drawn again.
        return left // right if right and left % right == 0 else 0
    return {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](left, right)


def line_of(step: Step, name: str, values: dict[str, int], words: dict[str, str]) -> str:
    left, sign, right = step.equation.split()
    equation = f"{_value(left, values)} {sign} {_value(right, values)} = {values[name]}"
    return f"{step.wording.format(**words)}, {equation} {words['items']}."
