"""lm-eval's `hf` model: its criterion answers for all rows; log-likelihoods are the context tower's."""

import pytest
from grammars import PROMPTS
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from twotower.demo.evaluation import context_tower_in_transformers
from twotower.generation_twotower import MODES


def evaluator(model, tokenizer, batch_size):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=256)


@pytest.fixture(scope="module")
def baseline(model, tokenizer):
    return evaluator(context_tower_in_transformers(model), tokenizer, 4)


def requests(kind, *arguments):
    prompts = [*PROMPTS, PROMPTS[1][: len(PROMPTS[1]) // 2]]
    return [Instance(kind, {}, (prompt, *arguments), idx) for idx, prompt in enumerate(prompts)]


@pytest.mark.parametrize("until", [["."], ["\n", " = ", "."], ["nowhere"]])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_generate_until_is_that_of_transformers(model, tokenizer, baseline, batch_size, until):
    asked = {"until": until, "max_gen_toks": 70}
    expected = baseline.generate_until(requests("generate_until", asked), disable_tqdm=True)
    lm = evaluator(model, tokenizer, batch_size)
    for mode in ("ar", "self_speculative"):
        found = lm.generate_until(requests("generate_until", {**asked, "mode": mode}), disable_tqdm=True)
        assert found == expected, mode


@pytest.mark.parametrize("mode", [None, *MODES])
def test_batches_answer_as_single_requests(model, tokenizer, mode):
    asked = {"until": ["."], "max_gen_toks": 32} | ({} if mode is None else {"mode": mode})
    found = [
        evaluator(model, tokenizer, size).generate_until(requests("generate_until", asked), disable_tqdm=True)
        for size in (1, 4)
    ]
    for alone, together in zip(*found, strict=True):
        assert together == alone != ""


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_the_context_towers(model, tokenizer, baseline, batch_size):
    lm = evaluator(model, tokenizer, batch_size)
    for continuation in (" 21 + 4", " Tom has 3 apples.", " no"):
        ours = lm.loglikelihood(requests("loglikelihood", continuation), disable_tqdm=True)
        theirs = baseline.loglikelihood(requests("loglikelihood", continuation), disable_tqdm=True)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [number for number, _ in ours] == pytest.approx([number for number, _ in theirs], abs=1e-3)
    rolling = [
        each.loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True) for each in (lm, baseline)
    ]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-2)
