"""
lm-eval: its `hf` model takes ours as it is, and our `twotower` gives what `hf` gives, with rows that leave and join.

Log-likelihoods are the context tower's, or estimates of the denoiser's.
"""

import json
import shutil
import sys
from functools import partial

import lm_eval
import pytest
import torch
from accelerate import cpu_offload
from grammars import PROMPTS
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import tiny_model, tiny_tokenizer

import twotower
from twotower import TwoTowerForBlockDiffusion
from twotower.evaluation import harness
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.evaluation.denoiser_likelihood import denoiser_log_likelihood
from twotower.evaluation.harness import TwoTowerLM
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
        # What mock_ar makes of a checkpoint that was not trained for it may begin with the stop.
        assert together == alone and (alone != "" or mode == "mock_ar")
    assert any(found[0])


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


STOPS = [["."], ["\n", " = ", "."], ["nowhere"], " apples", ["s. T", "<eos>"]]


def ours(model, tokenizer, **arguments):
    return TwoTowerLM(model, tokenizer, max_length=256, **arguments)


def test_the_model_is_found_by_name():
    assert get_model("twotower") is TwoTowerLM
    assert get_model("hf") is HFLM, "and those of lm-eval are, too"


@pytest.mark.parametrize("batch_size, until", list(zip([1, 3, 16, 3, 2], STOPS, strict=True)))
def test_our_texts_are_those_of_hf(model, tokenizer, baseline, batch_size, until):
    asked = {"until": until, "max_gen_toks": 70}
    expected = baseline.generate_until(requests("generate_until", asked), disable_tqdm=True)
    for mode in ("ar", "self_speculative"):
        lm = ours(model, tokenizer, batch_size=batch_size, mode=mode)
        assert lm.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected, mode


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_alike_at_any_batch_size(model, tokenizer, mode):
    # Of different lengths and stops, so that rows leave and join.
    asked = [
        Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": most}), idx)
        for idx, (prompt, until, most) in enumerate(
            zip(PROMPTS * 2, [*STOPS, "."], (9, 40, 17, 30, 5, 24), strict=True)
        )
    ]
    alone, together = (
        ours(model, tokenizer, batch_size=size, mode=mode).generate_until(asked, disable_tqdm=True) for size in (1, 4)
    )
    assert together == alone
    for text, request in zip(alone, asked, strict=True):
        assert not any(stop in text for stop in harness._until(request.args[1]))
        assert len(tokenizer(text, add_special_tokens=False).input_ids) <= request.args[1]["max_gen_toks"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_our_log_likelihoods_are_those_of_hf(model, tokenizer, baseline, batch_size):
    """To 2e-6 of the sum, or 1e-5: a float32 sum of up to 150 terms."""
    lm = ours(model, tokenizer, batch_size=batch_size)
    for continuation in (" 21 + 4", " Tom has 3 apples.", " no"):
        found, expected = (
            each.loglikelihood(requests("loglikelihood", continuation), disable_tqdm=True) for each in (lm, baseline)
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [number for number, _ in found] == pytest.approx([number for number, _ in expected], rel=2e-6, abs=1e-5)
    rolling = [
        each.loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True) for each in (lm, baseline)
    ]
    assert rolling[0] == pytest.approx(rolling[1], rel=2e-6, abs=1e-5)


def test_sampling_depends_on_seed_prompt_and_repetition(model, tokenizer):
    asked = {"do_sample": True, "temperature": 4.0, "max_gen_toks": 24}
    prompts = [Instance("generate_until", {}, (PROMPTS[0], asked), idx) for idx in range(3)]
    texts = {
        (seed, size): ours(model, tokenizer, batch_size=size, seed=seed, mode="ar").generate_until(prompts, True)
        for seed, size in ((0, 1), (0, 3), (1, 3))
    }
    assert texts[0, 1] == texts[0, 3] != texts[1, 3]
    assert len(set(texts[0, 1])) > 1, "repetitions of one request differ"
    cold = Instance("generate_until", {}, (PROMPTS[0], {"max_gen_toks": 24, "temperature": 0.0}), 0)
    hot = Instance("generate_until", {}, (PROMPTS[0], {"max_gen_toks": 24}), 0)
    (greedy,), (drawn,) = (
        ours(model, tokenizer, mode="ar", temperature=4.0).generate_until([one], True) for one in (cold, hot)
    )
    assert drawn == texts[0, 1][0] != greedy, "what the request says goes first"
    sampling = ours(model, tokenizer, mode="ar", do_sample=True, temperature=4.0)
    assert sampling.generate_until([cold], True) == [greedy], "0 asks not to sample, and not to do so at 1"
    torn = Instance("generate_until", {}, (PROMPTS[0], {"max_gen_toks": 24, "do_sample": True, "temperature": 0.0}), 0)
    with pytest.raises(ValueError, match="sampling needs it above 0"):
        sampling.generate_until([torn], True)


def test_a_long_prompt_is_cut_on_the_left(model, tokenizer):
    lm = TwoTowerLM(model, tokenizer, max_length=64, mode="ar")
    asked = {"max_gen_toks": 20}
    long = Instance("generate_until", {}, (" ".join(PROMPTS), asked), 0)
    kept = tokenizer(" ".join(PROMPTS)).input_ids[-44:]
    expected = model.generate(torch.tensor([kept]), max_new_tokens=20, mode="ar")[0, 44:]
    assert lm.generate_until([long], True) == [tokenizer.decode(expected, skip_special_tokens=True)]
    with pytest.raises(ValueError, match="64 new tokens were asked of a model of 64"):
        lm.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": 64}), 0)], True)
    estimating = TwoTowerLM(model, tokenizer, max_length=8, likelihood="denoiser", likelihood_samples=2)
    kept = estimating.loglikelihood([Instance("loglikelihood", {}, (PROMPTS[0], " 21"), 0)], True)
    ids = tokenizer(PROMPTS[0] + " 21").input_ids[-8:]
    assert kept[0][0] == denoiser_log_likelihood(model, ids[:-3], ids[-3:], samples=2).value
    with pytest.raises(ValueError, match=r"a continuation has \d+ tokens, the model room for 8"):
        estimating.loglikelihood([Instance("loglikelihood", {}, ("a", PROMPTS[0]), 0)], True)


def test_estimates_of_whole_texts_have_windows_as_long_as_the_model_reads(model, tokenizer):
    estimating = TwoTowerLM(model, tokenizer, max_length=8, likelihood="denoiser", likelihood_samples=2)
    text = Instance("loglikelihood_rolling", {}, (PROMPTS[0],), 0)
    ids = [estimating.prefix_token_id, *estimating.tok_encode(PROMPTS[0])]
    assert len(ids) > 9
    assert estimating.loglikelihood_rolling([text], True)[0] < 0
    whole = denoiser_log_likelihood(model, ids[:1], ids[1:9], samples=2)
    assert estimating.likelihood_errors[0] == whole.stderr


def test_an_offloaded_model_is_asked_where_it_computes(model, tokenizer):
    offloaded = TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), dtype=torch.float32)
    cpu_offload(offloaded, torch.device("cpu"))
    for likelihood in ("context", "denoiser"):
        asked, options = requests("loglikelihood", " 21")[:1], {"likelihood": likelihood, "likelihood_samples": 2}
        expected = ours(model, tokenizer, **options).loglikelihood(asked, True)
        assert ours(offloaded, tokenizer, **options).loglikelihood(asked, True) == expected


def test_estimates_come_with_their_errors(model, tokenizer):
    lm = ours(model, tokenizer, likelihood="denoiser", likelihood_samples=8)
    asked = requests("loglikelihood", " 21 + 4")
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert found == ours(model, tokenizer, likelihood="denoiser", likelihood_samples=8).loglikelihood(asked, True)
    assert len(lm.likelihood_errors) == len(asked) and all(error > 0 for error in lm.likelihood_errors)
    info = lm.get_model_info()
    assert (info["likelihood"], info["likelihood_samples"]) == ("denoiser", 8)
    assert info["likelihood_mean_stderr"] == pytest.approx(sum(lm.likelihood_errors) / len(asked))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"mode": "beam"}, "mode is 'beam'"),
        ({"likelihood": "mean"}, "likelihood is 'mean'; give one of context, denoiser"),
        ({"likelihood": "denoiser", "likelihood_samples": 1}, "likelihood_samples is 1"),
        ({"trust_remote_code": True}, "trust_remote_code was given with a model that is loaded already"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoTowerLM(model, tokenizer, **arguments)


def test_a_model_from_nowhere_needs_a_tokenizer():
    with pytest.raises(ValueError, match="says of no place where its tokenizer is; give tokenizer"):
        TwoTowerLM(tiny_model())


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATED = """
target_delimiter: ""
generation_kwargs: {until: ["."], max_gen_toks: 40}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path, model, tokenizer):
    """A folder with one task, whose answers are what the model writes for two of three questions."""
    text = ours(model, tokenizer, mode="ar")
    answers = text.generate_until(requests("generate_until", {"until": ["."], "max_gen_toks": 40})[:3], True)
    answers[1] = "something else"
    lines = [json.dumps({"question": q, "answer": a}) for q, a in zip(PROMPTS, answers, strict=True)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    task = TASK.format(name="three", kind="generate_until", file=tmp_path / "docs.jsonl", more=GENERATED)
    (tmp_path / "three.yaml").write_text(task)
    return tmp_path


def test_lm_evals_command_finds_the_model(tasks, monkeypatch, tmp_path):
    out = tmp_path / "out"
    arguments = f"run --model twotower --model_args mode=self_speculative --tasks {tasks}/three.yaml --batch_size 2"
    # Without the thousands of its own tasks, which it would read first.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split(), "--output_path", str(out)])
    harness.main()
    (written,) = out.rglob("results_*.json")
    figures = json.loads(written.read_text())
    assert figures["results"]["three"]["exact_match,none"] == pytest.approx(2 / 3)
    assert figures["config"]["knobs"] == {"mode": "self_speculative"}


def test_an_interrupted_run_goes_on_from_lm_evals_cache(tasks, model, tokenizer, tmp_path):
    lm, seen = ours(model, tokenizer, mode="ar"), []
    run_many = model.generate_many

    class Watched:
        def __getattr__(self, name):
            return getattr(model, name)

        def generate_many(self, asked, *arguments, **options):
            seen.append(len(asked))
            for count, answer in enumerate(run_many(asked, *arguments, **options)):
                if len(seen) == 1 and count == 2:
                    raise KeyboardInterrupt
                yield answer

    lm._model = Watched()
    settings = {"tasks": [f"{tasks}/three.yaml"], "use_cache": str(tmp_path / "cache"), "bootstrap_iters": 0}
    manager = TaskManager(include_defaults=False)
    with pytest.raises(KeyboardInterrupt):
        lm_eval.simple_evaluate(lm, task_manager=manager, **settings)
    results = lm_eval.simple_evaluate(lm, task_manager=manager, **settings)
    assert seen == [3, 1]
    assert results["results"]["three"]["exact_match,none"] == pytest.approx(2 / 3)


def test_a_subfolders_tokenizer_is_its_own(tmp_path):
    """The repository's root has another one."""
    shutil.copytree(twotower.demo_checkpoint(), tmp_path / "both")
    inner = tmp_path / "both" / "inner"
    tiny_model(vocab_size=280).save_pretrained(inner)
    tiny_tokenizer().save_pretrained(inner)
    lm = TwoTowerLM(str(tmp_path / "both"), subfolder="inner", device="cpu")
    assert lm.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    other = TwoTowerLM(str(tmp_path / "both"), subfolder="inner", device="cpu", tokenizer=str(inner))
    assert other.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_checkpoint_is_loaded_by_its_folder(tokenizer):
    lm = TwoTowerLM(str(twotower.demo_checkpoint()), dtype="float32", device="cpu", batch_size="2", mode="ar")
    assert lm.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (lm.model.dtype, lm.batch_size, lm.rank) == (torch.float32, 2, 0)
