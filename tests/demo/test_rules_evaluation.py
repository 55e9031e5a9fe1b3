"""The unmasking rules and verified drafts side by side, on a tiny random model."""

import pytest
from tiny import tiny_model, tiny_tokenizer

from twotower.demo import evaluation
from twotower.demo.rules_evaluation import SAMPLED, compare_rules, rules_table, seeds_of_prompts
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.answers import tokenized


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("all kinds", vocab_size=280)


def test_a_prompt_draws_with_a_seed_of_its_own_whatever_its_batch(model, tokenizer):
    prompts = [task.prompt for task in held_out_tasks("words", 5, 0)]
    one_by_one, together = tokenized(prompts, 1, tokenizer, model), tokenized(prompts, 5, tokenizer, model)
    seeds = seeds_of_prompts(together[0], seed=3)
    assert seeds == [seed for batch in one_by_one for seed in seeds_of_prompts(batch, seed=3)]
    assert len(set(seeds) | set(seeds_of_prompts(together[0], seed=4))) == 10


def test_rules_of_no_problems_or_rows(model, tokenizer):
    with pytest.raises(ValueError, match="problems is 0; give at least 3, one per seed"):
        compare_rules(model, tokenizer, problems=0)
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        compare_rules(model, tokenizer, batch_size=0)


def test_relaxed_verification_stands_beside_the_rules(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 24)
    ratios = [{"draft_steps": 1, "acceptance_ratio": ratio} for ratio in (1.0, 0.001)]
    verified = {"greedy": ratios, "sampled": [values | SAMPLED for values in ratios]}
    settings = {"fixed": [{"tokens_per_step": 4}]}
    reports = [
        compare_rules(model, tokenizer, "words", 5, batch_size=size, settings=settings, verified=verified)
        for size in (2, 5)
    ]
    report = reports[0]
    assert [row["line"] for row in report["rows"]] == ["fixed"]
    exact, relaxed, exact_sampled, relaxed_sampled = report["verified_rows"]
    for one, other in ((exact, relaxed), (exact_sampled, relaxed_sampled)):
        assert one["same_answers_as_ar"] == 5 and one["tokens_per_pass"] < other["tokens_per_pass"]
        assert other["same_answers_as_ar"] < 5, "which keeps what is not the choice of ar"
    assert exact["tokens"] / (exact["denoiser_passes"] + exact["context_passes"]) == exact["tokens_per_pass"]
    for ours, theirs in zip(report["verified_rows"], reports[1]["verified_rows"], strict=True):
        same = ("correct", "tokens", "denoiser_passes", "context_passes", "same_answers_as_ar")
        assert [ours[name] for name in same] == [theirs[name] for name in same], "whatever the batch"
    header, rows = rules_table(report)
    assert [len(row) for row in rows] == [len(header)] * 5
    assert rows[-1][:2] == ["sampled", "draft_steps=1, acceptance_ratio=0.001, temperature=1.0"]
