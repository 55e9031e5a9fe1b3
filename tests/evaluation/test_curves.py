"""Curves over the knobs, on a tiny random model: figures that hang together, a table and a drawing."""

import json
import sys

import pytest
from tiny import tiny_model, tiny_tokenizer

from twotower.demo import evaluation
from twotower.evaluation.curves import (
    DIFFUSION,
    LINES,
    Line,
    draw,
    footnote,
    measure_curves,
    table,
    title,
)

FEW = {
    "threshold": Line("confidence_threshold", (0.001, 1.0), DIFFUSION),
    "block size": Line("block_size", (4, 8), DIFFUSION),
    "acceptance": Line("acceptance_ratio", (1.0, 0.001), {"mode": "self_speculative"}),
}


@pytest.fixture(scope="module")
def report():
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluation, "MAX_NEW_TOKENS", 24)
    model = tiny_model(vocab_size=280, block_size=8)
    tokenizer = tiny_tokenizer()
    found = measure_curves(model, tokenizer, "words", 6, (2, 3), batch_size=3, lines=FEW)
    patch.undo()
    return found | {"model": "tiny"}


def test_every_value_is_measured_beside_ar(report):
    rows = report["rows"]
    assert [(row["line"], row["value"]) for row in rows] == [
        *(("ar", None), ("threshold", 0.001), ("threshold", 1.0), ("block size", 4), ("block size", 8)),
        *(("acceptance", 1.0), ("acceptance", 0.001)),
    ]
    ar, bold, careful, _, _, exact, relaxed = rows
    assert (ar["fewer_passes"], ar["fewer_passes_stderr"], ar["speedup"]) == (1.0, 0.0, 1.0)
    assert bold["fewer_passes"] > careful["fewer_passes"]
    assert exact["same_answers_as_ar"] == 6 and relaxed["fewer_passes"] > exact["fewer_passes"]
    for row in rows:
        passes = row["context_passes"] + (row["denoiser_passes"] or 0)
        assert row["fewer_passes"] == pytest.approx(ar["context_passes"] / passes)
        assert row["passes_per_problem"] == pytest.approx(passes / 6)
        assert row["tokens_per_second_stderr"] is not None and row["passes_per_problem_stderr"] is not None
        assert {"accuracy", "accuracy_stderr", "accuracy_interval"} <= set(row["whole_text"])


def test_blocks_much_larger_than_trained_are_measured_too_and_drawn_of_one_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 32)
    lines = {"block size": LINES["block size"]}
    found = measure_curves(
        tiny_model("only -", vocab_size=280, block_size=2), tiny_tokenizer(), "words", 1, (2,), lines=lines
    )
    assert [row["value"] for row in found["rows"][1:]] == [4, 8, 16, 32]
    draw(found | {"model": "tiny"}, tmp_path / "curves.png")  # without errors, which one problem has none of


def test_a_report_says_of_what_it_is(report):
    assert (report["problems"], report["seeds"], report["batch_size"]) == (6, [2, 3], 3)
    assert [part["problems"] for part in report["rows"][0]["by_seed"].values()] == [3, 3]
    assert json.loads(json.dumps(report)) == report
    assert title(report) == "6 held-out word problems (seeds 2, 3), greedy, batch 3, tiny"
    assert "stays at threshold 0.8" in footnote(report)
    header, rows = table(report)
    assert [len(row) for row in rows] == [len(header)] * 7


def test_curves_are_drawn(report, tmp_path, monkeypatch):
    draw(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "twotower\[eval\]"'):
        draw(report, tmp_path / "other.png")


def test_the_lines_are_what_a_user_asks_about():
    assert {line.knob for line in LINES.values()} == {
        *("confidence_threshold", "block_size", "steps_per_block", "acceptance_ratio")
    }
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        measure_curves(None, None, batch_size=0)
