"""The figures of `eval`: scripted answers whose figures are known, and the same tower run by transformers."""

import json
import math
from itertools import islice

import pytest
import torch
from tiny import tiny_config, tiny_model
from tolerances import assert_close
from transformers import BatchEncoding

from twotower import TwoTowerForBlockDiffusion
from twotower.demo import evaluation
from twotower.demo.evaluation import (
    BASELINE,
    Generated,
    Run,
    Variant,
    accuracy_figures,
    answer,
    answer_figures,
    are_correct,
    are_whole,
    baseline_variant,
    context_tower_in_transformers,
    cut_after_end,
    evaluate,
    median_runs,
    nemotron_config,
    pass_figures,
    speed_figures,
    speedup_figures,
    summarize,
    tokenized_batches,
)
from twotower.demo.problems import held_out_problems, training_problems
from twotower.demo.rules_evaluation import SAMPLED, compare_rules, rules_table, seeds_of_prompts
from twotower.demo.tokenizer import train_tokenizer
from twotower.evaluation.held_out import Seen, equations_of

pytestmark = pytest.mark.usefixtures("little_training")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(training_problems(0), 50), 280)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("all kinds", vocab_size=280)
    # Steps far below transformers' lower bound of 0.001, so that a clamp there would show.
    for layer in (model.context_tower.layers[0], model.context_tower.layers[6]):
        layer.mixer.dt_bias.data.fill_(-9.0)
    return model


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
    runs = answer(variants, batches(1)[0], batches(2, 1), ends={2})
    most = evaluation.MAX_NEW_TOKENS
    assert calls == [("a", 8), ("b", 8), ("a", most), ("b", most), ("a", most), ("b", most)]
    assert runs["a"].answers == [[5, 2], [6, 7, 8], [9, 2]]
    assert runs["b"].answers == [[5, 5, 2], [2], [4]]
    assert runs["a"].denoiser_forwards == []
    assert runs["b"].denoiser_forwards == [3, 3, 3]
    assert runs["a"].tokens == 7
    assert runs["a"].seconds > 0


def test_figures_of_known_answers(tokenizer):
    problems = held_out_problems(4, seed=0)
    right = [[*tokenizer(" " + p.answer, add_special_tokens=False).input_ids, 2] for p in problems]
    wrong = [*tokenizer(" #### 1000", add_special_tokens=False).input_ids, 2]
    variants = [scripted("ar", []), scripted("diffusion", []), scripted("baseline", [])]
    runs = {
        1: {
            "ar": Run([*right[:3], wrong], [], seconds=2.0),
            "diffusion": Run([*right[:2], wrong, wrong], [2, 3, 4, 1], seconds=1.0),
            "baseline": Run([right[0], wrong, right[2], wrong], [], seconds=4.0),
        },
        2: {
            "ar": Run([*right[:2], wrong, wrong], [], seconds=1.0),
            "diffusion": Run([*right[:2], wrong, wrong], [2, 3, 4, 1], seconds=0.5),
            "baseline": Run([right[0], wrong, right[2], wrong], [], seconds=2.0),
        },
    }
    report = summarize(variants, runs, problems, tokenizer)
    ar, diffusion, baseline = report["rows"]
    tokens = len(right[0]) + len(right[1]) + 2 * len(wrong)
    ar_at_2 = tokens
    assert [row["correct"] for row in report["rows"]] == [3, 2, 2]
    assert ar["accuracy_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert (ar["retention"], ar["retention_stderr"]) == (1.0, 0.0)
    assert diffusion["retention"] == pytest.approx(2 / 3)
    assert diffusion["tokens"] == tokens
    assert diffusion["denoiser_passes"] == 10
    assert diffusion["tokens_per_denoiser_pass"] == pytest.approx(tokens / 10)
    assert diffusion["tokens_per_second"] == {"1": tokens / 1.0, "2": tokens / 0.5}
    assert baseline["denoiser_passes"] is None
    assert [row["same_answers_at_every_batch_size"] for row in report["rows"]] == [3, 4, 4]
    assert [row["same_answers_as_first"] for row in report["rows"]] == [4, 3, 3]
    assert diffusion["speedup"] == pytest.approx({"1": 2 * tokens / ar["tokens"], "2": 2 * tokens / ar_at_2})
    assert diffusion["speedup_over_transformers"] == pytest.approx(
        {"1": 4 * tokens / baseline["tokens"], "2": 4 * tokens / baseline["tokens"]}
    )
    assert baseline["tokens_per_pass"] is None


def test_both_parts_of_an_answer_and_what_training_has_shown_are_figures(tokenizer):
    problems = held_out_problems(4, seed=0)
    texts = [" " + problem.answer for problem in problems]
    # Another thing counted, but the right result; and a wrong result.
    texts[1] = texts[1].replace(texts[1].split()[-3], "dragons.", 1)
    texts[2] += "0"
    answers = [[*tokenizer(text, add_special_tokens=False).input_ids, 2] for text in texts]
    correct, whole = are_correct(answers, problems, tokenizer), are_whole(answers, problems, tokenizer)
    assert (correct, whole) == ([True, True, False, True], [True, False, False, True])
    seen = Seen(frozenset(), frozenset(equations_of(problems[0]) + equations_of(problems[2])))
    figures = answer_figures({"ar": correct}, {"ar": whole}, "ar", "ar", problems, (5, 6), seen)
    assert (figures["accuracy"], figures["whole_text"]["accuracy"]) == (0.75, 0.5)
    assert [part["accuracy"] for part in figures["by_seed"].values()] == [1.0, 0.5]
    unseen = figures["with_unseen_equations"]
    assert (unseen["problems"], unseen["accuracy"]) == (2, 1.0)
    known = Seen(frozenset(), frozenset(equation for problem in problems for equation in equations_of(problem)))
    without = answer_figures({"ar": correct}, {"ar": whole}, "ar", "ar", problems, (5,), known)
    assert without["with_unseen_equations"] == {"problems": 0}


def test_passes_and_speeds_have_errors():
    figures = pass_figures(Run([[5, 6, 7], [5, 6]], [2, 1], [1, 2]))
    assert figures["passes_per_problem"] == 3.0 and figures["passes_per_problem_stderr"] == 0.0
    assert figures["tokens_per_pass_stderr"] == pytest.approx(1 / 6)
    # Twice as fast in every batch, however slow the machine was.
    ours = Run(seconds=6.0, answers=[[5]] * 4, batch_tokens=[2, 2], batch_seconds=[1.0, 5.0])
    theirs = Run(seconds=12.0, answers=[[5]] * 4, batch_tokens=[2, 2], batch_seconds=[2.0, 10.0])
    assert speed_figures({2: ours})["tokens_per_second_stderr"]["2"] > 0.3
    speedup = speedup_figures({2: {"a": ours, "b": theirs}}, "a", "speedup", "b")
    assert speedup["speedup"] == {"2": 2.0} and speedup["speedup_stderr"]["2"] == pytest.approx(0, abs=1e-9)


def test_older_reports_are_still_read():
    assert evaluation.title({"problems": 3, "seed": 5, "model": "x"}) == "3 held-out problems (seed 5), greedy, x"


def test_repeated_runs_report_the_median_of_their_times():
    repetitions = [{"a": Run([[5]], seconds=seconds)} for seconds in (3.0, 1.0, 2.0)]
    run = median_runs(repetitions)["a"]
    assert (run.seconds, run.seconds_of_runs, run.answers) == (2.0, [3.0, 1.0, 2.0], [[5]])
    figures = speed_figures({4: run})
    assert figures["tokens_per_second"] == {"4": 1 / 2}
    assert figures["tokens_per_second_of_runs"] == {"4": [1 / 3, 1.0, 1 / 2]}


def test_accepted_lengths_are_averaged_over_problems():
    lengths = [4.0, 2.0, math.nan, 9.0]  # the third problem's text ended before its first cycle
    assert pass_figures(Run([[5], [6], [2], [7]], accepted_lengths=lengths))["mean_accepted_length"] == 5.0
    assert pass_figures(Run([[5]]))["mean_accepted_length"] is None


def test_passes_count_both_towers_and_the_denoiser_alone():
    figures = pass_figures(Run([[5, 6, 7], [5, 6, 7]], [2, 1], [1, 2]))
    assert (figures["tokens_per_denoiser_pass"], figures["tokens_per_pass"]) == (2.0, 1.0)
    assert pass_figures(Run([[5, 6]], [], [2]))["tokens_per_pass"] == 1.0


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


def test_transformers_runs_the_same_tensors_to_the_same_logits(model):
    baseline = context_tower_in_transformers(model)
    ids = torch.randint(4, 280, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ours, theirs = model(ids, mask).logits, baseline(ids, attention_mask=mask).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert baseline.lm_head.weight.data_ptr() == model.context_lm_head.weight.data_ptr()
    assert baseline.model.layers[0].mixer.D.data_ptr() == model.context_tower.layers[0].mixer.D.data_ptr()
    for layer in (0, 6):
        baseline.model.layers[layer].mixer.time_step_limit = (0.001, math.inf)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(baseline(ids).logits[0], ours[0])


def test_nemotron_config_describes_one_tower(model):
    config = nemotron_config(model.config)
    assert config.model_type == "nemotron_h"
    assert not hasattr(config, "mask_token_id")
    for name in ("layers_block_type", "hidden_size", "routed_scaling_factor", "vocab_size"):
        assert getattr(config, name) == getattr(model.config, name)
    assert tuple(config.time_step_limit) == model.config.time_step_limit


def test_evaluate_asks_every_mode_and_transformers(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 12)
    seen = []

    def track(batches, description):
        seen.append((len(batches), description))
        return batches

    report = evaluate(model, tokenizer, problems=3, seed=5, batch_sizes=(1, 2), repeats=2, track=track)
    assert [row["name"] for row in report["rows"]] == [
        *("ar", "self_speculative", "mask_diffusion, threshold 0.8", "mask_diffusion, threshold 0.95", "mock_ar"),
        BASELINE,
    ]
    assert seen == [
        *((3, "batch 1, run 1"), (3, "batch 1, run 2"), (2, "batch 2, run 1"), (2, "batch 2, run 2")),
    ]
    assert all(len(row["seconds_of_runs"]["2"]) == 2 for row in report["rows"])
    assert (report["problems"], report["seed"], report["dtype"]) == (3, 5, "float32")
    # Greedy text of the same weights: transformers' and ours, verified drafts, in any batch.
    assert [report["rows"][idx]["same_answers_as_first"] for idx in (0, 1, -1)] == [3, 3, 3]
    assert all(row["same_answers_at_every_batch_size"] == 3 for row in report["rows"])
    assert all(row["tokens"] > 0 for row in report["rows"])
    assert report["rows"][4]["tokens_per_denoiser_pass"] == 1
    assert json.loads(json.dumps(report)) == report
    header, rows = evaluation.table(report)
    assert all(len(row) == len(header) for row in rows)
    assert "3 held-out problems (seed 5)" in evaluation.title({**report, "model": "x"})
    assert "median of 2 interleaved runs" in evaluation.footnote(report)
    lengths = [row["mean_accepted_length"] for row in report["rows"]]
    assert [length is None for length in lengths] == [True, False, True, True, True, True]
    assert 1 <= lengths[1] <= model.config.block_size
    assert f"A cycle of self_speculative adds {lengths[1]:.2f} tokens" in evaluation.footnote(report)


def test_baseline_ends_at_the_models_end_of_text(model):
    variant = baseline_variant(model)
    inputs = BatchEncoding({"input_ids": torch.tensor([[1, 9, 9]]), "attention_mask": torch.ones(1, 3).long()})
    first = int(variant.generate(inputs, 4).sequences[0, 3])
    ending = TwoTowerForBlockDiffusion(tiny_config("all kinds", vocab_size=280, eos_token_id=first)).eval()
    ending.load_state_dict(model.state_dict())
    assert baseline_variant(ending).generate(inputs, 4).sequences.shape == (1, 4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"problems": 0}, "problems is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch_sizes": ()}, "batch_sizes is"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes is \[1, 0\]"),
    ],
)
def test_impossible_settings(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, **settings)


def test_a_prompt_draws_with_a_seed_of_its_own_whatever_its_batch(model, tokenizer):
    asked = held_out_problems(5, 0)
    one_by_one, together = tokenized_batches(asked, 1, tokenizer, model), tokenized_batches(asked, 5, tokenizer, model)
    seeds = seeds_of_prompts(together[0], seed=3)
    assert seeds == [seed for batch in one_by_one for seed in seeds_of_prompts(batch, seed=3)]
    assert len(set(seeds) | set(seeds_of_prompts(together[0], seed=4))) == 10


def test_rules_of_no_problems_or_rows(model, tokenizer):
    for name in ("problems", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
            compare_rules(model, tokenizer, **{name: 0})


def test_relaxed_verification_stands_beside_the_rules(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 24)
    ratios = [{"draft_steps": 1, "acceptance_ratio": ratio} for ratio in (1.0, 0.001)]
    verified = {"greedy": ratios, "sampled": [values | SAMPLED for values in ratios]}
    settings = {"fixed": [{"tokens_per_step": 4}]}
    reports = [
        compare_rules(model, tokenizer, 5, batch_size=size, settings=settings, verified=verified) for size in (2, 5)
    ]
    report = reports[0]
    assert [row["line"] for row in report["rows"]] == ["fixed"]
    exact, relaxed, exact_sampled, relaxed_sampled = report["verified_rows"]
    for one, other in ((exact, relaxed), (exact_sampled, relaxed_sampled)):
        assert one["same_answers_as_ar"] == 5 and one["tokens_per_pass"] < other["tokens_per_pass"]
        assert other["same_answers_as_ar"] < 5, "which keeps what is not the choice of ar"
    assert exact["tokens"] / (exact["denoiser_passes"] + exact["context_passes"]) == exact["tokens_per_pass"]
    assert reports[1]["verified_rows"] == report["verified_rows"], "whatever the batch"
    header, rows = rules_table(report)
    assert [len(row) for row in rows] == [len(header)] * 5
    assert rows[-1][:2] == ["sampled", "draft_steps=1, acceptance_ratio=0.001, temperature=1.0"]
