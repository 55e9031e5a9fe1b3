"""Figures of both skills, from a model that writes what it is told, and infilling by one that is told nothing."""

from itertools import islice

import pytest
from tiny import tiny_model

from twotower.demo import skills_evaluation
from twotower.demo.evaluation import Run
from twotower.demo.skills_evaluation import evaluate_skill, infilled, is_right, line_of
from twotower.demo.tasks import SKILLS, held_out_tasks, training_tasks
from twotower.demo.tokenizer import train_tokenizer
from twotower.evaluation.figures import share_interval


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(training_tasks(0), 50), 280)


@pytest.mark.parametrize("skill", SKILLS)
def test_a_reference_answer_is_right_and_another_task_s_is_not(skill):
    first, second = held_out_tasks(skill, 2, 0)
    assert is_right(first, " " + first.answer)
    assert not is_right(first, " " + second.answer)


def test_right_and_whole_are_counted_apart(tokenizer, monkeypatch):
    """A mode that answers every question with another wording and the right result."""
    [task] = held_out_tasks("words", 1, 0)
    ids = tokenizer(f" It is easy. #### {task.result}", add_special_tokens=False).input_ids

    def answered(variants, *_):
        return {variant.name: Run(answers=[ids], context_forwards=[10]) for variant in variants}

    monkeypatch.setattr(skills_evaluation, "answer", answered)
    model = tiny_model("all kinds", vocab_size=280)
    [row] = evaluate_skill(model, tokenizer, "words", 1, seeds=(0,), modes=("ar",))
    assert (row["accuracy"], row["whole_text"]["accuracy"], row["tasks"]) == (1.0, 0.0, 1)
    assert row["accuracy_interval"] == list(share_interval(1, 1))
    assert "words ar" in line_of(row)


def test_every_mode_has_a_row(tokenizer, monkeypatch):
    monkeypatch.setattr(skills_evaluation, "MAX_NEW_TOKENS", 12)
    model = tiny_model("all kinds", vocab_size=280)
    rows = evaluate_skill(model, tokenizer, "code", 2, batch_size=2, modes=("ar", "mask_diffusion 0.8"))
    assert [row["name"] for row in rows] == ["ar", "mask_diffusion 0.8"]
    assert all(row["tokens"] > 0 and row["correct"] == 0 for row in rows)


def test_infilling_is_scored_with_what_stands_on_both_sides(tokenizer):
    model = tiny_model("all kinds", vocab_size=280)
    figures = infilled(model, tokenizer, 2)
    assert {name: row["correct"] for name, row in figures.items()} == {"mask_diffusion": 0, "ar": 0}
