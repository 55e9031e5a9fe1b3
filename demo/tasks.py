"""What the demonstration checkpoint is trained on and asked: word problems and short Python functions, side by side.

Task number i of a seed is drawn from seed and number alone, so that a resumed run goes on anywhere at once.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

Skill = Literal["words", "code"]
SKILLS: tuple[Skill, ...] = ("words", "code")
# Chance of a word problem in training. With 0.6 functions were learned long before sums; with 0.8 functions were
# forgotten.
WORDS_SHARE = 0.7
# What a run is given: tasks as they are asked, or with this share of problems whose sums carry. After 450,000 tasks 17
# of 21 errors of the denoiser's were digits of sums and differences, and most of these carried, as one step in six
# does; after 173,000 with most carrying, 1 of 49 did, and 15 were of sums that carry nothing.
Stream = Literal["tasks", "carries", "some carries"]
CARRIES_SHARE: dict[Stream, float] = {"tasks": 0.0, "carries": 0.6, "some carries": 0.2}
_EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")


@dataclass(frozen=True)
class Task:
    """
    One question with its reference answer.

    Args:
        skill: "words" or "code".
        question: of the user's turn.
        answer: of the assistant's; of a word problem it ends in `#### result`.
        composition: of which kinds of steps it is put together.
        numbers: given ones that are needed, of a word problem.
        result: of a word problem.
        checks: of code, expressions and the `repr` of what each must give.
        built_in: a word problem written by one of the fifteen fixed templates.
    """

    skill: Skill
    question: str
    answer: str
    composition: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    result: int | None = None
    checks: tuple[tuple[str, str], ...] = ()
    built_in: bool = False

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"

    @property
    def equations(self) -> list[str]:
        """Of a word problem's answer, as in "12 + 30 = 42"."""
        return _EQUATION.findall(self.answer)


def listed(words: str) -> list[str]:
    return words.split()


def training_tasks(seed: int, first: int = 0, stream: Stream = "tasks") -> Iterator[Task]:
    """Tasks without end, from number `first` on, nothing held out among them."""
    return (training_task(seed, number, stream) for number in count(first))


def training_task(seed: int, number: int, stream: Stream = "tasks") -> Task:
    rng = random.Random(f"{seed} {number}")
    skill, must_carry = _drawn_skill(rng, stream)
    drawn = task(rng, skill, held_out=False)
    while must_carry and not carries(drawn):
        drawn = task(rng, skill, held_out=False)
    return drawn


def training_skill(seed: int, number: int, stream: Stream = "tasks") -> Skill:
    """Of a training task, without drawing the rest of it."""
    return _drawn_skill(random.Random(f"{seed} {number}"), stream)[0]


def _drawn_skill(rng: random.Random, stream: Stream) -> tuple[Skill, bool]:
    """And whether its sums must carry."""
    share = CARRIES_SHARE[stream]
    if share and rng.random() < share:
        return "words", True
    return ("words" if rng.random() < WORDS_SHARE else "code"), False


def carries(problem: Task) -> bool:
    """Whether half of the steps or more are sums that carry into the hundreds or differences that borrow from them."""
    return 2 * sum(map(_step_carries, problem.equations)) >= len(problem.equations)


def _step_carries(equation: str) -> bool:
    left, sign, right, _, result = equation.split()
    if sign not in "+-":
        return False
    parts = (left, right) if sign == "+" else (result, right)
    return sum(int(part) % 100 for part in parts) >= 100


def held_out_tasks(skill: Skill, count: int, seed: int) -> list[Task]:
    """`count` tasks of a skill with distinct questions, each of them held out."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"held out {skill} {seed}")
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        drawn = task(rng, skill, held_out=True)
        tasks.setdefault(drawn.question, drawn)
    return list(tasks.values())


def task(rng: random.Random, skill: Skill, held_out: bool) -> Task:
    from .functions import function_task
    from .word_problems import word_problem

    return word_problem(rng, held_out) if skill == "words" else function_task(rng, held_out)
