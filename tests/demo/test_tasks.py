"""Tasks of both skills: drawn by number, apart from what is held out, and with answers that are right."""

import random
import re
import zlib
from itertools import islice

import pytest

from twotower.demo.functions import combination_held_out
from twotower.demo.tasks import SKILLS, Task, carries, held_out_tasks, task, training_skill, training_tasks
from twotower.demo.word_problems import HE, SHE, composition_held_out, numbers_held_out

TRAINING = list(islice(training_tasks(0), 600))
WORDS = [each for each in TRAINING if each.skill == "words"]
CODE = [each for each in TRAINING if each.skill == "code"]
HELD_OUT = {skill: held_out_tasks(skill, 100, 0) for skill in SKILLS}


def test_a_task_is_drawn_from_its_number_alone():
    assert next(training_tasks(0, first=599)) == TRAINING[599]
    assert next(training_tasks(1)) != TRAINING[0]


def test_tasks_are_those_that_the_embedded_checkpoint_was_trained_on():
    """One number for all of their texts: they must not change under a checkpoint."""
    held = [task for skill in SKILLS for task in HELD_OUT[skill]]
    assert zlib.crc32("".join(f"{each.text}{each.checks}" for each in [*TRAINING, *held]).encode()) == 1422258960


def test_prompt_and_text_layout():
    asked = Task("words", question="How many?", answer="One. #### 1", composition=())
    assert asked.prompt == "Question: How many?\nAnswer:"
    assert asked.text == "Question: How many?\nAnswer: One. #### 1"


def test_nothing_held_out_is_trained_on():
    assert not any(numbers_held_out(each.numbers) for each in WORDS)
    assert not any(composition_held_out(each.composition) for each in WORDS if not each.built_in)
    assert not any(combination_held_out(each.composition) for each in CODE)


def test_what_is_asked_is_held_out_in_every_respect():
    assert all(numbers_held_out(each.numbers) for each in HELD_OUT["words"])
    assert all(composition_held_out(each.composition) for each in HELD_OUT["words"] if not each.built_in)
    assert all(combination_held_out(each.composition) for each in HELD_OUT["code"])


def test_the_order_of_numbers_does_not_matter_to_the_split():
    numbers = random.Random(0).sample(range(2, 999), 4)
    assert len({numbers_held_out(tuple(random.Random(seed).sample(numbers, 4))) for seed in range(20)}) == 1


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_questions_are_distinct_and_those_of_a_seed(skill):
    asked = HELD_OUT[skill]
    assert len({each.question for each in asked}) == 100
    assert held_out_tasks(skill, 10, 0) == asked[:10]
    assert held_out_tasks(skill, 10, 1) != asked[:10]


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        held_out_tasks("words", -1, 0)


@pytest.mark.parametrize("problem", [*WORDS[:200], *HELD_OUT["words"]])
def test_every_line_of_a_word_problem_is_right_and_the_last_is_its_result(problem):
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer)
    signs = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    assert all(signs[sign](int(left), int(right)) == int(result) for left, sign, right, result in equations)
    assert int(equations[-1][3]) == problem.result
    assert problem.answer.endswith(f"#### {problem.result}")
    assert 1 <= len(equations) <= 5
    told = re.findall(r"\d+", problem.question)
    assert all(str(number) in told for number in problem.numbers)


def test_some_word_problems_tell_a_number_that_is_not_needed():
    extra = [len(re.findall(r"\d+", each.question)) - len(each.numbers) for each in WORDS if not each.built_in]
    assert set(extra) == {0, 1}
    assert 0.1 < sum(extra) / len(extra) < 0.5


def test_most_names_of_an_answer_are_copied_from_the_question():
    names = set(SHE + HE)
    found = [(each, set(re.findall(r"\w+", each.answer)) & names) for each in WORDS]
    assert all(written <= set(re.findall(r"\w+", each.question)) for each, written in found)
    assert sum(map(bool, (written for _, written in found))) > len(found) / 2
    assert len({name for _, written in found for name in written}) > 150


@pytest.mark.parametrize("function", [*CODE[:60], *HELD_OUT["code"][:40]])
def test_a_function_passes_its_checks_and_shows_an_example_that_is_true(function):
    space: dict = {}
    exec(function.answer, space)
    assert len(function.checks) == 5
    assert all(repr(eval(call, space)) == result for call, result in function.checks)
    call, result = re.search(r">>> (.*)\n    (.*)\n", function.question).groups()
    assert repr(eval(call, space)) == result


def test_both_skills_are_trained():
    assert 0.65 < len(WORDS) / len(TRAINING) < 0.75
    assert [training_skill(0, number) for number in range(600)] == [each.skill for each in TRAINING]
    assert task(random.Random(0), "code", held_out=False).skill == "code"


@pytest.mark.parametrize("stream, words, carrying", [("carries", 0.89, 0.64), ("some carries", 0.76, 0.28)])
def test_sums_that_carry_are_trained_more_often(stream, words, carrying):
    drawn = list(islice(training_tasks(0, stream=stream), 600))
    assert [training_skill(0, number, stream) for number in range(600)] == [each.skill for each in drawn]
    assert abs(sum(each.skill == "words" for each in drawn) / 600 - words) < 0.05
    share, before = (
        sum(each.skill == "words" and carries(each) for each in tasks) / 600 for tasks in (drawn, TRAINING)
    )
    assert abs(share - carrying) < 0.05 and before < 0.2


@pytest.mark.parametrize(
    "equation, does",
    [("55 + 152 = 207", True), ("7 + 235 = 242", False), ("600 - 2 = 598", True), ("59 - 17 = 42", False)],
)
def test_what_carries(equation, does):
    problem = Task("words", "", f"There are {equation} beads. #### 1", ())
    assert carries(problem) is does
