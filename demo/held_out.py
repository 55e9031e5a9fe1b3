"""
Which tasks evaluation asks, and which steps of theirs training has shown.

No training task has the given numbers of one that is asked, in any order, nor its composition of steps
(demo/word_problems.py, demo/functions.py). Its single steps may have been trained, alone or in another problem: to
know which, what training has shown is drawn again.
"""

from collections.abc import Sequence
from functools import cache

from .tasks import Skill, Stream, Task, held_out_tasks, training_skill, training_task

# By seed, what the runs of the context tower and of the denoiser drew: steps x batch_size x processes.
TRAINED_ON: dict[int, tuple[Stream, int]] = {
    0: ("tasks", 5000 * 128),
    1: ("tasks", 2600 * 128),
    2: ("tasks", 950 * 32),
    3: ("tasks", 525 * 32),
    4: ("tasks", 625 * 64),
    5: ("tasks", 520 * 64),
    6: ("carries", 600 * 64),
    7: ("carries", 2700 * 64),
    8: ("some carries", 3700 * 64),
}
# Of tasks nobody trained or chose anything on.
SEEDS = (101, 102, 103)
PROBLEMS = 2000


def asked_tasks(skill: Skill, count: int, seeds: Sequence[int]) -> list[Task]:
    """
    `count` held-out tasks with distinct questions, shared out evenly among the seeds, those of the first seed first.

    Raises:
        ValueError: for no task, no seed, fewer tasks than seeds, or a seed given twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give at least one, and none of them twice")
    if count < len(seeds):
        raise ValueError(f"problems is {count}; give at least {len(seeds)}, one per seed")
    asked: dict[str, Task] = {}
    for seed, share in zip(seeds, shares(count, len(seeds)), strict=True):
        wanted, drawn = len(asked) + share, share
        while len(asked) < wanted:
            # A longer list of a seed begins as a shorter one does.
            for each in held_out_tasks(skill, drawn, seed):
                if len(asked) < wanted:
                    asked.setdefault(each.question, each)
            drawn *= 2
    return list(asked.values())


def shares(count: int, parts: int) -> list[int]:
    """`count` in whole numbers as even as can be, the larger ones first."""
    return [count // parts + (place < count % parts) for place in range(parts)]


@cache
def equations_in_training() -> frozenset[str]:
    """Of all word problems that the embedded checkpoint was trained on; takes some minutes, once."""
    equations = set[str]()
    for seed, (stream, count) in TRAINED_ON.items():
        for number in range(count):
            if training_skill(seed, number, stream) == "words":
                equations.update(training_task(seed, number, stream).equations)
    return frozenset(equations)


def has_unseen_equation(problem: Task, seen: frozenset[str]) -> bool:
    return any(equation not in seen for equation in problem.equations)
