"""What counts as held out: numbers that training has not shown in any order."""

from itertools import islice

import pytest

from twotower.demo.problems import held_out_problems, training_problems
from twotower.demo.training import CONTEXT, DENOISER, TOKENIZER_PROBLEMS
from twotower.evaluation import held_out
from twotower.evaluation.held_out import (
    Seen,
    equations_of,
    has_unseen_equation,
    seen_in_training,
    shares,
    strictly_held_out,
)


def test_training_is_drawn_again(little_training):
    seen = seen_in_training()
    trained = [*islice(training_problems(0), 20), *islice(training_problems(1), 30)]
    assert seen.numbers == {tuple(sorted(problem.numbers)) for problem in trained}
    assert seen.equations == {equation for problem in trained for equation in equations_of(problem)}
    assert not any(has_unseen_equation(problem, seen) for problem in trained)


def test_all_of_the_recipe_counts():
    assert {0: TOKENIZER_PROBLEMS, 1: DENOISER.steps * DENOISER.batch_size} == held_out.TRAINED_ON
    assert DENOISER.steps * DENOISER.batch_size >= CONTEXT.steps * CONTEXT.batch_size


def test_numbers_in_another_order_are_not_held_out():
    first = next(problem for problem in held_out_problems(50, 7) if len(set(problem.numbers)) == 2)
    seen = Seen(frozenset({tuple(sorted(first.numbers))}), frozenset(equations_of(first)))
    assert first not in strictly_held_out(50, [7], seen)
    nothing = Seen(frozenset(), frozenset())
    assert strictly_held_out(50, [7], nothing) == held_out_problems(50, 7)
    assert has_unseen_equation(first, nothing) and not has_unseen_equation(first, seen)


def test_seeds_share_out_the_problems():
    nothing = Seen(frozenset(), frozenset())
    asked = strictly_held_out(8, (2, 3, 4), nothing)
    assert asked[:3] == held_out_problems(3, 2) and asked[3:6] == held_out_problems(3, 3)
    assert asked[6:] == held_out_problems(2, 4)
    assert len({problem.question for problem in asked}) == 8
    assert shares(2000, 3) == [667, 667, 666]


def test_equations_are_whole(little_training):
    problem = next(problem for problem in held_out_problems(50, 0) if problem.steps == 3)
    assert len(equations_of(problem)) == 3
    assert all(equation in problem.answer for equation in equations_of(problem))


@pytest.mark.parametrize(
    "count, seeds, message",
    [(5, [], "seeds are"), (5, [1, 1], r"seeds are \[1, 1\]"), (2, [1, 2, 3], "problems is 2; give at least 3")],
)
def test_impossible_questions(count, seeds, message):
    with pytest.raises(ValueError, match=message):
        strictly_held_out(count, seeds, Seen(frozenset(), frozenset()))
