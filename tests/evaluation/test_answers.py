"""Scripted answers whose figures are known."""

import math

import pytest
import torch
from accelerate import cpu_offload
from tiny import tiny_model, tiny_tokenizer
from transformers import BatchEncoding

from twotower.evaluation.answers import (
    Generated,
    Run,
    Variant,
    answer,
    cut_after_end,
    fewer_passes,
    pass_figures,
    same_answers,
    speed_figures,
    tokenized,
)


def scripted(name, sequences, passes=None, calls=None):
    """A variant that answers row i of any batch with the next of `sequences`."""
    left = list(sequences)

    def generate(inputs, max_new_tokens):
        calls is None or calls.append((name, max_new_tokens))
        rows = [left.pop(0) for _ in inputs.input_ids] if max_new_tokens > 8 else [[]] * len(inputs.input_ids)
        width = max(map(len, rows))
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
        forwards = None if passes is None else torch.full((len(rows),), passes)
        return Generated(torch.cat([inputs.input_ids, new], dim=1), forwards)

    return Variant(name, {"mode": name}, generate)


def batches(*sizes):
    return [BatchEncoding({"input_ids": torch.ones(size, 4, dtype=torch.long)}) for size in sizes]


def test_cut_after_end():
    assert cut_after_end([5, 6, 2, 0, 2], {2}) == [5, 6, 2]
    assert cut_after_end([5, 6], {2}) == [5, 6]
    assert cut_after_end([5, 7, 2], {2, 7}) == [5, 7]
    assert cut_after_end([5], set()) == [5]


def test_answers_are_timed_in_turn_after_a_warm_up():
    calls = []
    variants = [
        scripted("a", [[5, 2], [6, 7, 8], [9, 2]], calls=calls),
        scripted("b", [[5, 5, 2], [2], [4]], passes=3, calls=calls),
    ]
    runs = answer(variants, batches(1)[0], batches(2, 1), ends={2}, max_new_tokens=20)
    assert calls == [("a", 8), ("b", 8), ("a", 20), ("b", 20), ("a", 20), ("b", 20)]
    assert runs["a"].answers == [[5, 2], [6, 7, 8], [9, 2]]
    assert runs["b"].answers == [[5, 5, 2], [2], [4]]
    assert runs["a"].denoiser_forwards == []
    assert runs["b"].denoiser_forwards == [3, 3, 3]
    assert runs["a"].tokens == 7
    assert runs["a"].seconds > 0


def test_passes_and_speeds_have_errors():
    figures = pass_figures(Run([[5, 6, 7], [5, 6]], [2, 1], [1, 2]))
    assert figures["passes_per_problem"] == 3.0 and figures["passes_per_problem_stderr"] == 0.0
    assert figures["tokens_per_pass_stderr"] == pytest.approx(1 / 6)
    # Twice as fast in every batch, however slow the machine was.
    ours = Run(seconds=6.0, answers=[[5]] * 4, batch_tokens=[2, 2], batch_seconds=[1.0, 5.0])
    theirs = Run(seconds=12.0, answers=[[5]] * 4, batch_tokens=[2, 2], batch_seconds=[2.0, 10.0])
    speed = speed_figures(ours, theirs)
    assert speed["tokens_per_second"] == pytest.approx(4 / 6) and speed["tokens_per_second_stderr"] > 0.3
    assert speed["speedup"] == 2.0 and speed["speedup_stderr"] == pytest.approx(0, abs=1e-9)


def test_accepted_lengths_are_averaged_over_problems():
    lengths = [4.0, 2.0, math.nan, 9.0]  # the third problem's text ended before its first cycle
    assert pass_figures(Run([[5], [6], [2], [7]], accepted_lengths=lengths))["mean_accepted_length"] == 5.0
    assert pass_figures(Run([[5]]))["mean_accepted_length"] is None


def test_passes_count_both_towers_and_the_denoiser_alone():
    figures = pass_figures(Run([[5, 6, 7], [5, 6, 7]], [2, 1], [1, 2]))
    assert (figures["tokens_per_denoiser_pass"], figures["tokens_per_pass"]) == (2.0, 1.0)
    assert pass_figures(Run([[5, 6]], [], [2]))["tokens_per_pass"] == 1.0


def test_passes_saved_are_paired_by_problem():
    reference, run = Run([[5]] * 3, [], [10, 20, 30]), Run([[5]] * 3, [1, 2, 3], [1, 2, 3])
    assert fewer_passes(run, reference) == {"fewer_passes": 5.0, "fewer_passes_stderr": pytest.approx(0, abs=1e-12)}
    assert fewer_passes(Run([[5]] * 3), reference)["fewer_passes"] is None, "where they are not counted"


def test_prompts_go_where_an_offloaded_model_takes_them():
    model = tiny_model()
    cpu_offload(model, torch.device("cpu"))
    assert model.device.type == "meta"
    (batch,) = tokenized(["Mia"], 1, tiny_tokenizer(), model)
    assert batch.input_ids.device.type == "cpu"


def test_answers_of_several_runs_are_compared_whole():
    assert same_answers([Run([[5, 6], [7], [8]]), Run([[5, 6], [7, 2], [8]])]) == 2
