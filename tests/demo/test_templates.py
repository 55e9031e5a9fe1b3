"""Problems of the fixed templates: true equations, ranges; an oracle reads the questions."""

import operator
import random
import re

import pytest

from twotower.demo.marking import extract_result
from twotower.demo.templates import TEMPLATES
from twotower.demo.word_problems import word_problem

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

# Words that tell one question from all others, and its result computed from its numbers in order.
ORACLE = (
    ("at home", lambda a, b: a + b),
    ("in the morning", lambda a, b: a - b),
    (r"more \w+ does \w+ have than", lambda a, b: a - b),
    ("keeps", lambda a, b: a * b),
    (r"shares \d+", lambda a, b: a // b),
    ("and then gives", lambda a, b, c: a + b - c),
    ("took", lambda a, b, c: a - b - c),
    ("do they have together", lambda a, b: 2 * a + b),
    ("Each of . ", lambda a, b, c: a * b + c),
    ("twice as many", lambda a, b: 2 * a - b),
    ("and then finds", lambda a, b, c, d: a + b - c + d),
    ("on Tuesday", lambda a, b, c: 2 * a + b - c),
    ("fills", lambda a, b, c, d: a * b - c + d),
    ("half as many", lambda a, b: a + a // 2 + b),
    ("shares the rest", lambda a, b, c, d: (a + b - c) // d),
)


def take(count, held_out=False):
    """Problems of the fixed templates."""
    rng, found = random.Random(0), []
    while len(found) < count:
        problem = word_problem(rng, held_out)
        if problem.built_in:
            found.append(problem)
    return found


def equations(problem):
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer)
    return [(int(left), sign, int(right), int(value)) for left, sign, right, value in found]


def steps(problem):
    return problem.answer.count(" = ")


@pytest.fixture(scope="module")
def problems():
    return take(2000) + take(300, held_out=True)


def test_every_equation_is_true_and_the_last_is_the_result(problems):
    for problem in problems:
        lines = equations(problem)
        assert len(lines) == steps(problem)
        assert all(OPERATIONS[sign](left, right) == value for left, sign, right, value in lines), problem
        assert lines[-1][-1] == problem.result == extract_result(problem.answer)
        assert problem.answer.endswith(f" #### {problem.result}")


def test_equations_use_the_given_numbers_and_every_earlier_result(problems):
    for problem in problems:
        lines = equations(problem)
        known = {*problem.numbers, 2} if re.search("twice|half", problem.question) else set(problem.numbers)
        for left, _, right, value in lines:
            assert {left, right} <= known, problem
            known.add(value)
        used = {operand for left, _, right, _ in lines for operand in (left, right)}
        assert {*problem.numbers, *(value for *_, value in lines[:-1])} <= used, problem


def test_numbers_are_those_of_the_question(problems):
    for problem in problems:
        assert problem.numbers == tuple(map(int, re.findall(r"\d+", problem.question)))
        assert "{" not in problem.text


def test_the_question_alone_gives_the_result(problems):
    seen = set()
    for problem in problems:
        matching = [i for i, (words, _) in enumerate(ORACLE) if re.search(words, problem.question)]
        assert len(matching) == 1, problem.question
        assert ORACLE[matching[0]][1](*problem.numbers) == problem.result, problem
        seen.update(matching)
    assert len(seen) == len(ORACLE) == sum(map(len, TEMPLATES))


def test_ranges(problems):
    for problem in problems:
        results = [value for *_, value in equations(problem)]
        assert all(1 <= number <= 999 for number in (*problem.numbers, *results))
        for left, sign, right, _ in equations(problem):
            small, large = sorted((left, right))
            assert sign != "*" or (small <= 6 and large <= 99) or right == 2, problem
            assert sign != "/" or 2 <= right <= 5, problem


def test_mixture_of_steps_and_magnitudes(problems):
    shares = [sum(steps(problem) == count for problem in problems) / len(problems) for count in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.40, 0.35], abs=0.04)
    lengths = [len(str(number)) for problem in problems for number in problem.numbers]
    assert all(lengths.count(digits) / len(lengths) > 0.25 for digits in (1, 2, 3))
