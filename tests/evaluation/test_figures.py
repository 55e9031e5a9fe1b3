"""Errors against the spread over redrawn problems, and against what is known."""

import math

import pytest
import torch

from twotower.evaluation.figures import (
    accuracy_figures,
    difference,
    mean,
    percent,
    plus_minus,
    quotient,
    share_interval,
)


def drawn(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(rows, columns, generator=generator)
    return [20 + 30 * difficulty + torch.rand(rows, columns, generator=generator) for _ in range(2)]


def test_errors_of_a_paired_quotient_are_its_spread():
    ours, theirs = drawn(4000, 60, seed=0)
    spread = float((ours.sum(1) / theirs.sum(1)).std())
    found = [quotient([ours[i].tolist()], [theirs[i].tolist()]) for i in range(200)]
    assert sum(one.stderr for one in found) / 200 == pytest.approx(spread, rel=0.1)
    assert found[0].value == pytest.approx(float(ours[0].sum() / theirs[0].sum()))
    alone = quotient([ours[0].tolist()], [[1.0] * 60]).stderr * 60 / float(theirs[0].sum())
    assert found[0].stderr < alone / 3, "what makes a problem hard for both does not count"


def test_errors_of_a_quotient_of_quotients_are_its_spread():
    (tokens, seconds), (others, their_seconds) = drawn(4000, 60, seed=1), drawn(4000, 60, seed=2)
    ratios = tokens.sum(1) * their_seconds.sum(1) / seconds.sum(1) / others.sum(1)
    above, below = ([each[0].tolist() for each in pair] for pair in ((tokens, their_seconds), (seconds, others)))
    assert quotient(above, below).stderr == pytest.approx(float(ratios.std()), rel=0.3)


def test_what_has_no_error_has_none():
    assert quotient([[3.0]], [[2.0]]) == (1.5, None)
    assert quotient([[1, 2]], [[0, 0]]) == (None, None)
    assert quotient([[0, 0]], [[1, 2]]) == (0.0, 0.0)
    assert mean([]) == (None, None)
    assert mean([4]) == (4, None)
    errors = {name: value for name, value in accuracy_figures([True], [True]).items() if name.endswith("stderr")}
    assert set(errors.values()) == {None} and len(errors) == 3


def test_mean_and_difference():
    assert mean([1, 2, 6]) == (3, pytest.approx(math.sqrt(7 / 3)))
    assert difference([True, True, False], [True, False, False]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert difference([True, False], [True, False]) == (0, 0)


def test_wilsons_interval():
    # Wilson's numbers for 8 of 10, and that all right of few is not certainty.
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    low, high = share_interval(20, 20)
    assert high == 1.0 and 0.8 < low < 0.85
    assert share_interval(0, 20) == pytest.approx((0.0, 1 - low))


def test_accuracy_stands_beside_its_reference():
    right, reference = [True] * 8 + [False] * 2, [True] * 6 + [False] * 2 + [True] * 2
    figures = accuracy_figures(right, reference)
    assert (figures["correct"], figures["accuracy"], figures["retention"]) == (8, 0.8, 1.0)
    assert figures["accuracy_stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 10))
    assert figures["difference"] == 0 and figures["difference_stderr"] == pytest.approx(math.sqrt(4 / 9 / 10))
    assert accuracy_figures(right, [False] * 10)["retention"] is None


def test_figures_are_shown_with_their_errors():
    assert (percent(0.5, 0.01), percent(0.5, None), percent(None, None)) == ("50.0 ± 1.0 %", "50.0 %", "-")
    assert (plus_minus(1.5, 0.25), plus_minus(1.5, None), plus_minus(None, None)) == ("1.50 ± 0.25", "1.50", "-")


def test_retention_has_a_paired_standard_error():
    # Against the spread of the ratio over redrawn problems.
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(20_000, 100, generator=generator) < 0.85
    correct = torch.where(torch.rand(20_000, 100, generator=generator) < 0.1, ~reference, reference)
    spread = (correct.float().mean(1) / reference.float().mean(1)).std()
    figures = accuracy_figures(correct[0].tolist(), reference[0].tolist())
    errors = [accuracy_figures(correct[i].tolist(), reference[i].tolist())["retention_stderr"] for i in range(200)]
    assert figures["retention"] == pytest.approx(int(correct[0].sum()) / int(reference[0].sum()))
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(spread), rel=0.05)


def test_retention_of_nothing_is_unknown():
    figures = accuracy_figures([True, False], [False, False])
    assert (figures["retention"], figures["retention_stderr"]) == (None, None)
