"""The figures of `eval` on both skills: of known answers, and of a tiny random model that is asked in every mode."""

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from twotower.demo import evaluation, held_out
from twotower.demo.evaluation import answer_figures, evaluate, figures_of, footnote, modes, table, title
from twotower.demo.held_out import equations_in_training
from twotower.demo.marking import Marks
from twotower.demo.tasks import SKILLS, held_out_tasks
from twotower.evaluation.answers import Run
from twotower.evaluation.baseline import BASELINE


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("all kinds", vocab_size=280)


@pytest.fixture(scope="module")
def report(model, tokenizer):
    patch, tracked = pytest.MonkeyPatch(), []
    patch.setattr(evaluation, "MAX_NEW_TOKENS", 12)
    patch.setattr(held_out, "TRAINED_ON", {0: ("tasks", 20)})
    equations_in_training.cache_clear()

    def track(batches, description):
        tracked.append((len(batches), description))
        return batches

    found = evaluate(model, tokenizer, problems=3, seeds=(5, 6), batch_size=2, unseen=True, track=track)
    patch.undo()
    equations_in_training.cache_clear()
    assert tracked == [(2, "words"), (2, "code")]
    return found | {"model": "tiny"}


def test_every_mode_and_transformers_answer_both_skills(model, report):
    names = [*modes(model), BASELINE]
    assert {row["mode"] for row in report["rows"] if "mode" in row} == {
        *("ar", "self_speculative", "mask_diffusion", "mock_ar")
    }
    assert [(row["skill"], row["name"]) for row in report["rows"]] == [(skill, n) for skill in SKILLS for n in names]
    # Greedy text of the same weights: transformers' and ours, verified drafts.
    same = {(row["skill"], row["name"]): row["same_answers_as_ar"] for row in report["rows"]}
    assert all(same[skill, name] == 3 for skill in SKILLS for name in ("ar", "self_speculative", BASELINE))
    assert all(row["tokens"] > 0 and row["tokens_per_second"] > 0 for row in report["rows"])
    for row in report["rows"]:
        if row["name"] != BASELINE:
            assert row["passes_per_problem"] == (row["context_passes"] + (row["denoiser_passes"] or 0)) / 3
    assert report["infilling"]["problems"] == 3


def test_a_report_says_of_what_it_is(report):
    assert (report["problems"], report["seeds"], report["skills"]) == (3, [5, 6], ["words", "code"])
    assert (report["batch_size"], report["dtype"], report["max_new_tokens"]) == (2, "float32", 12)
    assert [part["problems"] for part in report["rows"][0]["by_seed"].values()] == [2, 1]
    assert json.loads(json.dumps(report)) == report
    assert title(report, "words") == "3 held-out word problems (seeds 5, 6), greedy, tiny"
    for skill in SKILLS:
        header, rows = table(report, skill)
        assert [len(row) for row in rows] == [len(header)] * len({row["name"] for row in report["rows"]})
    assert "word problems have a step that no training problem has" in footnote(report)
    assert "Functions with a gap that pass their tests once it is filled" in footnote(report)
    first = next(row for row in report["rows"] if row["skill"] == "words")
    assert 0 <= first["with_unseen_equations"]["problems"] <= 3


def test_figures_of_known_answers(tokenizer):
    tasks = held_out_tasks("words", 4, seed=0)
    right = [[*tokenizer(" " + task.answer, add_special_tokens=False).input_ids, 2] for task in tasks]
    wrong = [*tokenizer(" #### 1000", add_special_tokens=False).input_ids, 2]
    clocks = {"batch_tokens": [4, 4], "batch_seconds": [1.0, 1.0]}
    runs = {
        "ar": Run([*right[:3], wrong], [], [20] * 4, **clocks),
        "diffusion": Run([*right[:2], wrong, wrong], [2, 3, 4, 1], [3, 2, 1, 4], **clocks),
    }
    ar, diffusion = figures_of(runs, tasks, tokenizer, (0,)).values()
    assert (ar["correct"], diffusion["correct"]) == (3, 2)
    assert (ar["retention"], ar["retention_stderr"]) == (1.0, 0.0)
    assert diffusion["retention"] == pytest.approx(2 / 3)
    assert diffusion["tokens"] == len(right[0]) + len(right[1]) + 2 * len(wrong)
    assert (diffusion["denoiser_passes"], diffusion["context_passes"]) == (10, 10)
    assert (ar["fewer_passes"], diffusion["fewer_passes"]) == (1.0, 4.0)
    assert (ar["same_answers_as_ar"], diffusion["same_answers_as_ar"]) == (4, 3)
    other = figures_of(runs, tasks, tokenizer, (0,), references={"ar": "diffusion"})["ar"]
    assert (other["retention"], other["fewer_passes"]) == (1.5, 0.25)


def test_tests_of_functions_and_the_parts_of_an_evaluation_are_figures():
    tasks = held_out_tasks("code", 4, seed=0)
    marks = Marks([True, False, False, True], [True, False, False, False], [1.0, 0.6, 0.0, 1.0])
    reference = Marks([True] * 4, [True] * 4, [1.0] * 4)
    figures = answer_figures(marks, reference, tasks, (5, 6), [1, 3])
    assert (figures["accuracy"], figures["whole_text"]["accuracy"]) == (0.5, 0.25)
    assert figures["tests_passed"]["share"] == figures["tests_passed"]["retention"] == pytest.approx(0.65)
    assert [part["accuracy"] for part in figures["by_seed"].values()] == [0.5, 0.5]
    assert (figures["with_unseen_equations"]["problems"], figures["with_unseen_equations"]["accuracy"]) == (2, 0.5)
    assert answer_figures(marks, marks, tasks, (5,), [])["with_unseen_equations"] == {"problems": 0}
    words = answer_figures(marks, reference, held_out_tasks("words", 4, 0), (5,))
    assert "tests_passed" not in words and "with_unseen_equations" not in words


def test_steps_that_training_has_shown_do_not_count_as_unseen(tokenizer, monkeypatch):
    tasks = held_out_tasks("words", 3, seed=0)
    shown = frozenset(tasks[0].equations + tasks[2].equations)
    monkeypatch.setattr(evaluation, "equations_in_training", lambda: shown)
    run = Run([[5]] * 3, context_forwards=[1] * 3, batch_tokens=[3], batch_seconds=[1.0])
    figures = figures_of({"ar": run}, tasks, tokenizer, (0,), unseen=True)["ar"]
    assert figures["with_unseen_equations"]["problems"] == 1


def test_some_modes_are_asked_beside_ar(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 4)
    rows = evaluate(model, tokenizer, 1, (5,), ("words",), only=("mock_ar",))["rows"]
    assert [row["name"] for row in rows] == ["ar", "mock_ar"]
    for only, fills in (("ar", False), ("mask_diffusion", True)):
        assert ("infilling" in evaluate(model, tokenizer, 1, (5,), ("code",), only=(only,))) is fills


def test_blocks_too_short_for_a_gap_lose_no_other_figures(tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 4)
    model = tiny_model("only -", vocab_size=280, block_size=2)
    report = evaluate(model, tokenizer, 1, (5,), ("code",), only=("mask_diffusion",))
    assert report["rows"] and "infilling" not in report


def test_impossible_settings(model, tokenizer):
    impossible = (
        ({"problems": 0}, "problems is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"only": ("arr",)}, "modes are arr; use mask_diffusion, "),
    )
    for settings, message in impossible:
        with pytest.raises(ValueError, match=message):
            evaluate(model, tokenizer, **settings)
