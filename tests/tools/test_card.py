"""The card by lm-eval, on questions of our own: what is right is counted, and a run goes on where it ended."""

import json
import sys

import pytest
from lm_eval.api.model import LM
from typer.testing import CliRunner

from twotower.cli.commands import app
from twotower.evaluation import card
from twotower.evaluation.benchmarks import CARD, chosen
from twotower.evaluation.card import COLUMNS, cell_figures, fingerprint, measure_card, open_report, settings_of, table
from twotower.evaluation.examples import ROWS
from twotower.evaluation.harness import TwoTowerLM

# What loads without lm-eval's own extras.
RUNNABLE = [benchmark.key for benchmark in CARD if benchmark.key != "math_500"]
PROGRAMS = {"Return the sum of a and b.": "    return a + b", "Return a times two.": "    return 2 * a"}
SETTINGS = {"model": "scripted", "limit": None, "dry_run": True, "fewshot_seed": 1234, "lm_eval": "x", "dtype": "y"}


class Scripted(LM):
    """Answers as the questions' own rows say, or always wrongly; writes down what it was asked."""

    def __init__(self, right, until_interrupted=None):
        super().__init__()
        self.right, self.left, self.asked = right, until_interrupted, []

    def loglikelihood(self, requests):
        # Of the options of a sentence, the right one's context is the likelier.
        return [(float((request.idx == int(request.doc["answer"]) - 1) == self.right), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError("the card asks for no whole text")

    def generate_until(self, requests):
        texts = []
        for request in requests:
            if self.left is not None and len(self.asked) == self.left:
                raise KeyboardInterrupt
            self.asked.append(request)
            texts.append(self._text(request.doc) if self.right else " none")
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _text(self, doc):
        if "answer_number" in doc:
            return f" It is so. The answer is {doc['answer_number']}."
        if "entry_point" in doc:
            return next(code for what, code in PROGRAMS.items() if what in doc["prompt"])
        if "code" in doc:
            return doc["code"] + "\n"
        if "cot_content" in doc:
            return f" Well, the answer is ({doc['answer']})."
        if "answerKey" in doc:
            return f" {doc['answerKey']}"
        if isinstance(doc["answer"], int):
            return f" {'ABCD'[doc['answer']]}"
        if len(doc["answer"]) == 1:
            return f" {doc['answer']}."
        return f" It is so. The answer is {doc['answer'].split('#### ')[-1]}."


def scripted(diffusion=True, **options):
    return {"ar": Scripted(True, **options), "diffusion": Scripted(diffusion)}


def test_the_card_is_nvidias():
    assert len(CARD) == 11 and {benchmark.key for benchmark in CARD} == set(ROWS)
    assert [benchmark.shots for benchmark in CARD] == [5, 5, 25, 5, 0, 0, 3, 8, 4, 5, 8]
    kept = sum(benchmark.diffusion for benchmark in CARD) / sum(benchmark.ar for benchmark in CARD)
    assert kept == pytest.approx(0.987, abs=2e-3), "98.7 %, as the card says"


def test_right_answers_are_right_and_wrong_ones_wrong(tmp_path):
    file = tmp_path / "card.json"
    lms = scripted(diffusion=False)
    report = measure_card(lms, open_report(file, SETTINGS), file, chosen(RUNNABLE), run_code=True)
    for benchmark in chosen(RUNNABLE):
        right, wrong = (report["cells"][benchmark.key][column]["right"] for column in COLUMNS)
        assert set("".join(right.values())) == {"1"}, benchmark.name
        assert set("".join(wrong.values())) == {"0"}, benchmark.name
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    assert report["figures"]["gsm8k"]["diffusion"]["retention"] == 0.0
    prompts = [request.args[0] for request in lms["ar"].asked]
    assert all(prompt for prompt in prompts) and any(prompt.count("Answer:") == 3 for prompt in prompts), "two shots"
    header, rows = table(report)
    assert len(rows) == 11 and all(len(row) == len(header) for row in rows)
    assert "78.56" in rows[0] and "not run" in rows[8], "a cell without a figure says so"


def test_code_runs_only_when_allowed():
    report = measure_card(scripted(), open_report(None, SETTINGS), None, chosen(["humaneval", "mbpp"]))
    for cells in report["cells"].values():
        assert all("--run-code" in cells[column]["empty"] for column in COLUMNS)
    assert cell_figures(report["cells"]["mbpp"]["ar"], {}) is None


@pytest.mark.parametrize("kind", [ModuleNotFoundError, RuntimeError, ValueError])
def test_what_cannot_be_loaded_is_said_and_tried_again(kind, tmp_path, monkeypatch):
    file, whole = tmp_path / "card.json", card.load_tasks

    def missing(*_):
        raise kind("No module named 'math_verify'")

    monkeypatch.setattr(card, "load_tasks", missing)
    report = measure_card(scripted(), open_report(file, SETTINGS), file, chosen(["mgsm"]))
    assert report["cells"]["mgsm"]["ar"] == {"empty": f"{kind.__name__}: No module named 'math_verify'"}
    monkeypatch.setattr(card, "load_tasks", whole)
    report = measure_card(scripted(), open_report(file, SETTINGS), file, chosen(["mgsm"]))
    assert set(report["cells"]["mgsm"]["ar"]["right"].values()) == {"1111"}


def test_an_interrupted_run_goes_on_with_the_next_question(tmp_path):
    file, benchmarks = tmp_path / "card.json", chosen(["gsm8k", "mgsm"])
    first = scripted(until_interrupted=6)  # two of the second benchmark's four
    with pytest.raises(KeyboardInterrupt):
        measure_card(first, open_report(file, SETTINGS), file, benchmarks)
    written = json.loads(file.read_text())
    assert set(written["cells"]["gsm8k"]) == set(COLUMNS) and "mgsm" not in written["cells"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "card.json.requests"]
    second, said = scripted(), []
    report = measure_card(second, open_report(file, SETTINGS), file, benchmarks, say=said.append)
    assert said[:2] == ["GSM8K, ar: there already", "GSM8K, diffusion: there already"]
    assert (len(second["ar"].asked), len(second["diffusion"].asked)) == (2, 4)
    assert set(report["cells"]["mgsm"]["ar"]["right"].values()) == {"1111"}
    assert not (tmp_path / "card.json.requests").exists(), "answers are kept no longer than needed"


def test_answers_of_other_settings_are_not_taken_over(tmp_path):
    file, benchmarks = tmp_path / "card.json", chosen(["gsm8k"])
    with pytest.raises(KeyboardInterrupt):
        measure_card(scripted(until_interrupted=2), open_report(file, SETTINGS), file, benchmarks)
    other = scripted()
    report = measure_card(other, open_report(file, {**SETTINGS, "model": "another"}), file, benchmarks)
    assert len(other["ar"].asked) == 4 and report["settings"]["model"] == "another"


def test_a_benchmark_that_asks_for_longer_texts_than_there_can_be_says_so(model, tokenizer):
    lms = dict.fromkeys(COLUMNS, TwoTowerLM(model, tokenizer, mode="ar", max_length=40))
    report = measure_card(lms, open_report(None, SETTINGS), None, chosen(["gsm8k"]))
    assert report["cells"]["gsm8k"]["ar"]["empty"].startswith("48 new tokens were asked of a model of 40")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no JSON"),
        ("[1]", "holds no figures of the card"),
        (
            json.dumps({"settings": {**SETTINGS, "limit": 5}, "cells": {}}),
            "was begun with limit 5, and now it is None",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_report(tmp_path / "card.json", SETTINGS)
    assert (tmp_path / "card.json").read_text() == content


def test_other_weights_are_other_settings(model):
    before = fingerprint(model)
    assert settings_of(model, "demo", None, False)["weights"] == before == fingerprint(model)
    weight = model.lm_head.weight
    weight.data[0, 0] += 1
    assert fingerprint(model) != before
    weight.data[0, 0] -= 1


def test_the_model_itself_answers_a_dry_run(model, tokenizer):
    lms = {column: TwoTowerLM(model, tokenizer, 2, **knobs) for column, knobs in card.KNOBS.items()}
    settings = settings_of(model, "demo", 1, True)
    report = measure_card(lms, open_report(None, settings), None, chosen(["gsm8k", "winogrande"]))
    for cells in report["cells"].values():
        assert all(len("".join(cells[column]["right"].values())) == 1 for column in COLUMNS)
    assert report["cells"]["winogrande"]["ar"]["right"] == report["cells"]["winogrande"]["diffusion"]["right"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_the_table_and_resumes(tmp_path):
    file = tmp_path / "card.json"
    arguments = ("--card", "--dry-run", "--limit", 1, "--benchmarks", "winogrande,humaneval", "--json", file)
    result = run(*arguments)
    assert result.stdout.startswith("DRY RUN on questions of our own, demonstration checkpoint")
    assert "WinoGrande" in result.stdout and "76.09" in result.stdout and "--run-code" in result.stdout
    assert "there already" in run(*arguments).stderr
    assert "was begun with limit 1" in run(*arguments[:2], "--limit", 2, "--json", file, code=2).stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--card",), "--card takes hours and goes on where it ended; give --json FILE"),
        (("--card", "--dry-run", "--benchmarks", "gsm8k,chess"), "'chess' is no benchmark of the card"),
        (("--dry-run",), "are about --card"),
        (("--card", "--curve"), "give one of --rules, --curve and --card"),
        (("--curve", "--modes", "ar"), "--unseen and --modes go without --rules, --curve and --card"),
        (("--seeds", "1,x"), "--seeds is '1,x'"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_the_work(arguments, message):
    assert message in run(*arguments, code=2).stderr


def test_the_card_misses_lm_eval_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("twotower.cli.evaluating.find_spec", lambda _: None)
    assert 'pip install "twotower[eval]"' in run("--card", "--dry-run", code=2).stderr
