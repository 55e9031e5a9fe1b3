"""Which tasks are asked, and which of their steps training has shown."""

import re
from itertools import islice
from pathlib import Path

import pytest

from twotower.demo import held_out
from twotower.demo.held_out import asked_tasks, equations_in_training, has_unseen_equation, shares
from twotower.demo.tasks import held_out_tasks, training_tasks

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def little_training(monkeypatch):
    """As if the embedded checkpoint had been trained on few tasks, which are quickly drawn again."""
    monkeypatch.setattr(held_out, "TRAINED_ON", {0: ("tasks", 20), 1: ("carries", 30)})
    equations_in_training.cache_clear()
    yield
    equations_in_training.cache_clear()


def test_training_is_drawn_again(little_training):
    tasks = [
        task
        for seed, (stream, count) in held_out.TRAINED_ON.items()
        for task in islice(training_tasks(seed, stream=stream), count)
    ]
    problems = [task for task in tasks if task.skill == "words"]
    assert equations_in_training() == {equation for problem in problems for equation in problem.equations}
    assert len(equations_in_training()) > 30
    assert not any(has_unseen_equation(problem, equations_in_training()) for problem in problems)


def test_seeds_share_out_the_tasks():
    asked = asked_tasks("words", 8, (2, 3, 4))
    assert asked[:3] == held_out_tasks("words", 3, 2) and asked[3:6] == held_out_tasks("words", 3, 3)
    assert asked[6:] == held_out_tasks("words", 2, 4)
    assert shares(2000, 3) == [667, 667, 666]


def test_a_question_that_two_seeds_ask_is_asked_once(monkeypatch):
    drawn = held_out_tasks("code", 6, 2)
    monkeypatch.setattr(held_out, "held_out_tasks", lambda skill, count, seed: drawn[:count])
    assert asked_tasks("code", 6, (2, 3)) == drawn


def test_equations_are_whole():
    for problem in held_out_tasks("words", 20, 0):
        assert len(problem.equations) == problem.answer.count("=")
        assert all(re.fullmatch(r"\d+ [-+*/] \d+ = \d+", equation) for equation in problem.equations)


@pytest.mark.parametrize(
    "count, seeds, message",
    [(5, [], "seeds are"), (5, [1, 1], r"seeds are \[1, 1\]"), (2, [1, 2, 3], "problems is 2; give at least 3")],
)
def test_impossible_questions(count, seeds, message):
    with pytest.raises(ValueError, match=message):
        asked_tasks("words", count, seeds)
