"""The generator's promises: seeds, the held-out split, true equations, ranges; an oracle reads the questions."""

import itertools
import operator
import re

import pytest

from twotower.demo.problems import (
    TEMPLATES,
    Problem,
    extract_result,
    held_out,
    held_out_problems,
    training_problems,
)

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

# All held-out pairs below (12, 6), so that the split cannot drift unnoticed.
HELD_OUT_PAIRS = [(3, 4), (4, 2), (9, 5), (10, 3)]

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


def take(count, seed=0):
    return list(itertools.islice(training_problems(seed), count))


def equations(problem):
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer)
    return [(int(left), sign, int(right), int(value)) for left, sign, right, value in found]


@pytest.fixture(scope="module")
def problems():
    return take(2000) + held_out_problems(300, seed=1)


def test_prompt_and_text_layout():
    problem = Problem(question="How many?", answer="One. #### 1", result=1, numbers=(1,), steps=1)
    assert problem.prompt == "Question: How many?\nAnswer:"
    assert problem.text == "Question: How many?\nAnswer: One. #### 1"


def test_a_seed_fixes_the_problems():
    assert take(50, seed=3) == take(50, seed=3)
    assert take(50, seed=3) != take(50, seed=4)
    assert held_out_problems(50, seed=3) == held_out_problems(50, seed=3)
    assert held_out_problems(50, seed=3) != held_out_problems(50, seed=4)


def test_two_streams_do_not_disturb_each_other():
    one, two = training_problems(3), training_problems(3)
    woven = [next(stream) for _ in range(20) for stream in (one, two)]
    assert woven[::2] == woven[1::2] == take(20, seed=3)


def test_training_and_held_out_combinations_are_disjoint():
    training = {problem.numbers for problem in take(5000)}
    held = {problem.numbers for problem in held_out_problems(1000, seed=0)}
    assert not training & held
    assert not any(map(held_out, training))
    assert all(map(held_out, held))


def test_held_out_is_one_combination_in_sixteen_and_never_changes():
    combinations = list(itertools.product(range(2, 202), range(2, 102)))
    assert sum(map(held_out, combinations)) / len(combinations) == pytest.approx(1 / 16, rel=0.05)
    assert [pair for pair in itertools.product(range(2, 12), range(2, 6)) if held_out(pair)] == HELD_OUT_PAIRS


def test_held_out_questions_are_distinct():
    # Enough of them that some question comes up twice by chance.
    questions = [problem.question for problem in held_out_problems(6000, seed=0)]
    assert len(set(questions)) == len(questions) == 6000


def test_held_out_count():
    assert held_out_problems(0, seed=0) == []
    with pytest.raises(ValueError, match="-1"):
        held_out_problems(-1, seed=0)


def test_every_equation_is_true_and_the_last_is_the_result(problems):
    for problem in problems:
        lines = equations(problem)
        assert len(lines) == problem.steps
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
    shares = [sum(problem.steps == steps for problem in problems) / len(problems) for steps in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.40, 0.35], abs=0.04)
    lengths = [len(str(number)) for problem in problems for number in problem.numbers]
    assert all(lengths.count(digits) / len(lengths) > 0.25 for digits in (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("After buying, 1 + 2 = 3 eggs. #### 3", 3),
        ("#### 3 and then #### 14", 14),
        ("####-5</s>", -5),
        ("#### 143.", 143),
        ("no mark, 143", None),
        ("#### 3 and then ####", None),
        ("#### 3 and then #### eggs 4", None),
        ("#### 14.5", None),
        ("#### " + "9" * 5000, None),
        ("", None),
    ],
)
def test_extract_result(text, result):
    assert extract_result(text) == result
