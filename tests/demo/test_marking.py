"""What counts as right."""

import pytest
from tiny import tiny_tokenizer

from twotower.demo.marking import Marks, extract_result, share_right
from twotower.demo.tasks import SKILLS, held_out_tasks


@pytest.mark.parametrize("skill", SKILLS)
def test_a_reference_answer_is_right_and_another_task_s_is_not(skill):
    first, second = held_out_tasks(skill, 2, 0)
    assert share_right(first, " " + first.answer) == 1.0
    assert share_right(first, " " + second.answer) == 0.0


def test_a_function_may_pass_some_of_its_tests():
    [task] = held_out_tasks("code", 1, 0)
    call, result = task.checks[0]
    name, argument = call.split("(")[0], call[call.index("(") + 1 : -1]
    assert share_right(task, f"def {name}(x):\n    return {result} if x == {argument} else None") == 1 / 5
    assert share_right(task, task.answer + "  # in other words") == 1.0


def test_the_whole_text_counts_apart_from_what_is_right():
    """Another thing counted, but the right result; and a wrong result."""
    tokenizer, tasks = tiny_tokenizer(), held_out_tasks("words", 4, 0)
    texts = [" " + task.answer for task in tasks]
    texts[1] = f" It is easy. #### {tasks[1].result}"
    texts[2] += "0"
    answers = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    marks = Marks.of(answers, tasks, tokenizer)
    assert (marks.right, marks.whole) == ([True, True, False, True], [True, False, False, True])


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
