"""Grade-school word problems with worked answers, written by templates from a seed.

A template is a question with named gaps and the equations that answer it. Numbers are drawn until every result is an
integer in range, and until their combination falls on the wanted side of the held-out split.
"""

import operator
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = {
    "she": ("Ana", "Mia", "Lucy", "Nora", "Emma", "Ruth", "Sara", "Zoe"),
    "he": ("Tom", "Ben", "Sam", "Leo", "Max", "Paul", "Omar", "Jack"),
}
ITEMS = (
    *("apples", "books", "stamps", "shells", "cards", "pencils", "coins", "beads"),
    *("buttons", "cookies", "eggs", "tickets", "stones", "flowers", "toys", "lemons"),
)
PLACES = ("market", "school", "library", "park", "fair", "museum", "farm", "station")
BOXES = ("boxes", "bags", "baskets", "jars")

LOWEST, HIGHEST = 2, 999
HELD_OUT_ONE_IN = 16
# Chances of a problem of one, two and three steps.
STEP_WEIGHTS = (25, 40, 35)


@dataclass(frozen=True)
class Problem:
    """One word problem: `numbers` are those of the question in order, `answer` ends in `#### result`."""

    question: str
    answer: str
    result: int
    numbers: tuple[int, ...]
    steps: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Step:
    """One line of an answer; `equation` is "left op right" over the given a, b, c, d, earlier r1, r2, and digits."""

    wording: str
    equation: str


@dataclass(frozen=True)
class Template:
    """A question with gaps; `kinds` says how its numbers a, b, c, d are drawn (see `_draw`), one word each."""

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


def extract_result(text: str) -> int | None:
    """Returns the integer after the last `####` of `text`, or None where no integer stands there."""
    _, mark, tail = text.rpartition("####")
    # A fraction is no integer, and a run of more than 18 digits is a model gone astray.
    found = re.match(r"\s*(-?[0-9]{1,18})(?![.,]?[0-9])", tail) if mark else None
    return int(found.group(1)) if found else None


def held_out(numbers: tuple[int, ...]) -> bool:
    """True for one in `HELD_OUT_ONE_IN` combinations of given numbers, the same ones in every run."""
    return zlib.crc32(",".join(map(str, numbers)).encode()) % HELD_OUT_ONE_IN == 0


def training_problems(seed: int) -> Iterator[Problem]:
    """Yields problems without end, none of them over a held-out combination of numbers."""
    rng = random.Random(seed)
    while True:
        yield _problem(rng, from_held_out=False)


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """Returns `count` problems with distinct questions, all over held-out combinations of numbers."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _problem(rng, from_held_out=True)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def _problem(rng: random.Random, from_held_out: bool) -> Problem:
    template = rng.choice(rng.choices(TEMPLATES, STEP_WEIGHTS)[0])
    numbers = _draw_numbers(rng, template, from_held_out)
    values = _solve(template, numbers)
    words = _draw_words(rng)
    result = values[f"r{len(template.steps)}"]
    lines = [_line(step, f"r{i}", values, words) for i, step in enumerate(template.steps, start=1)]
    return Problem(
        question=template.question.format(**words, **values),
        answer=" ".join([*lines, f"#### {result}"]),
        result=result,
        numbers=numbers,
        steps=len(template.steps),
    )


def _draw_numbers(rng: random.Random, template: Template, from_held_out: bool) -> tuple[int, ...]:
    while True:
        numbers = tuple(_draw(rng, kind) for kind in template.kinds.split())
        in_range = all(LOWEST <= value <= HIGHEST for value in _solve(template, numbers).values())
        if in_range and held_out(numbers) == from_held_out:
            return numbers


def _draw(rng: random.Random, kind: str) -> int:
    if kind == "factor":
        return rng.randint(2, 6)
    if kind == "divisor":
        return rng.randint(2, 5)
    if kind == "even":
        return 2 * rng.randint(2, 250)
    # Long numbers are drawn again more often; these chances leave about a third for each length.
    digits = rng.choices((1, 2, 3), (1, 2, 0) if kind == "small" else (2, 3, 5))[0]
    return rng.randint(max(LOWEST, 10 ** (digits - 1)), 10**digits - 1)


def _draw_words(rng: random.Random) -> dict[str, str]:
    pronoun = rng.choice(tuple(NAMES))
    name = rng.choice(NAMES[pronoun])
    other = rng.choice([each for names in NAMES.values() for each in names if each != name])
    return {
        "name": name,
        "other": other,
        "he": pronoun,
        "He": pronoun.capitalize(),
        "items": rng.choice(ITEMS),
        "place": rng.choice(PLACES),
        "boxes": rng.choice(BOXES),
    }


def _solve(template: Template, numbers: tuple[int, ...]) -> dict[str, int]:
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


def _line(step: Step, name: str, values: dict[str, int], words: dict[str, str]) -> str:
    left, sign, right = step.equation.split()
    equation = f"{_value(left, values)} {sign} {_value(right, values)} = {values[name]}"
    return f"{step.wording.format(**words)}, {equation} {words['items']}."
