"""
Word problems that training has not shown, whatever the order of their numbers.

The generator's own split (`demo/problems.py`) holds out ordered combinations: "57, then 124" may be asked after
"124, then 57" was trained on. So what training has shown is written down by drawing its problems again, and a problem
counts as held out if its set of given numbers, in any order, was not among them. Its single steps may have been:
`unseen_equations` says whether one of them was not.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

from ..demo.problems import Problem, held_out_problems, training_problems
from ..demo.training import CONTEXT, DENOISER, TOKENIZER_PROBLEMS

# By seed, how many problems `twotower train` draws with it: for the tokenizer, and for both stages the same ones.
TRAINED_ON = {0: TOKENIZER_PROBLEMS, 1: max(stage.steps * stage.batch_size for stage in (CONTEXT, DENOISER))}
# Of problems nobody trained or chose anything on.
SEEDS = (2, 3, 4)
PROBLEMS = 2000
_EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")


class Seen(NamedTuple):
    """What training has shown: given numbers, sorted, and equations."""

    numbers: frozenset[tuple[int, ...]]
    equations: frozenset[str]


@cache
def seen_in_training() -> Seen:
    """By the recipe of the demonstration checkpoint; takes some seconds, once."""
    numbers, equations = set[tuple[int, ...]](), set[str]()
    for seed, count in TRAINED_ON.items():
        for problem in islice(training_problems(seed), count):
            numbers.add(tuple(sorted(problem.numbers)))
            equations.update(equations_of(problem))
    return Seen(frozenset(numbers), frozenset(equations))


def equations_of(problem: Problem) -> list[str]:
    return _EQUATION.findall(problem.answer)


def has_unseen_equation(problem: Problem, seen: Seen) -> bool:
    return any(equation not in seen.equations for equation in equations_of(problem))


def strictly_held_out(count: int, seeds: Sequence[int], seen: Seen) -> list[Problem]:
    """
    `count` problems with distinct questions, shared out evenly among the seeds, those of the first seed first.

    Raises:
        ValueError: for no problem, no seed, fewer problems than seeds, or a seed given twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give at least one, and none of them twice")
    if count < len(seeds):
        raise ValueError(f"problems is {count}; give at least {len(seeds)}, one per seed")
    chosen: dict[str, Problem] = {}
    for place, seed in enumerate(seeds):
        wanted = len(chosen) + shares(count, len(seeds))[place]
        drawn = 0
        while len(chosen) < wanted:
            # A longer list of a seed begins as a shorter one does.
            drawn = 2 * drawn or wanted
            for problem in held_out_problems(drawn, seed):
                if len(chosen) < wanted and tuple(sorted(problem.numbers)) not in seen.numbers:
                    chosen.setdefault(problem.question, problem)
    return list(chosen.values())


def shares(count: int, parts: int) -> list[int]:
    """`count` in whole numbers as even as can be, the larger ones first."""
    return [count // parts + (place < count % parts) for place in range(parts)]
