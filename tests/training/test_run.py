"""Runs from recipes: what is trained and left behind, and that one that was stopped anyhow ends as if it was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerances import GRADIENTS, assert_close
from training.runs import interrupted_after_step, left_behind, lines, make_inputs, recipe
from transformers import AutoTokenizer

from twotower.modeling_twotower import TwoTowerForBlockDiffusion
from twotower.training import run as running
from twotower.training.run import train
from twotower.training.saving import FolderLock, checkpoints, delete

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def environment() -> dict[str, str]:
    """Of processes that find the tests' helpers."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return TwoTowerForBlockDiffusion.from_pretrained(folder).state_dict()


def test_a_finished_run_leaves_a_model_and_its_log(inputs, tmp_path):
    folder = train(recipe(inputs, tmp_path, samples={"prompts": ["Question:"], "every": 2, "max_new_tokens": 8}))
    assert folder == tmp_path / "model"
    model, tokenizer = TwoTowerForBlockDiffusion.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("Question:", return_tensors="pt"), max_new_tokens=8).shape[1] > 2
    before = weights(inputs / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.startswith("context_") or "correction_bias" in name), name
    logged = lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["items"] > 0 for line in logged)
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [2, 4]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000003", "checkpoint-00000004"]
    # Each of them is a model, too.
    assert_equal(weights(tmp_path / "checkpoint-00000004"), model.state_dict())


def assert_equal(actual, expected):
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_a_finished_run_is_not_run_again(inputs, tmp_path, monkeypatch):
    train(recipe(inputs, tmp_path))
    before = left_behind(tmp_path)
    monkeypatch.setattr(running.Run, "_take_step", None)
    train(recipe(inputs, tmp_path))
    assert left_behind(tmp_path) == before


def test_killed_at_ten_random_moments_and_at_every_change_of_its_folder_it_ends_the_same(fresh_python, tmp_path):
    """Bit for bit: weights, moments, tokenizer, log and samples; and nothing half-written stays."""
    inputs = make_inputs(tmp_path / "inputs", "only -")
    done = fresh_python(TESTS / "training" / "runs.py", inputs, tmp_path / "result.json", env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["stored"]) == 10 and len(set(result["stored"])) > 2, f"not at unlike moments: {result}"
    assert all(result["equal"]), result
    assert len(result["changes"]) > 3 and all(result["changes"]), result


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "muon", "lr": 1e-2, "balance_experts": 1e-3}},
        {"model__trained_towers": "context"},
        {"accumulation": 2, "data__block_sizes": [4, 8], "gradient_checkpointing": True},
        {"objective": {"decoded_masks": 0.5, "distillation": 0.3}},
        {"data__generated": "tasks", "data__files": None, "data__prompt": None, "data__completion": None},
    ],
    ids=["muon", "context tower", "accumulation", "objective", "generated"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(changes, inputs, tmp_path):
    """In the middle of the second epoch's pool."""
    train(recipe(inputs, tmp_path / "whole", steps=9, **changes))
    interrupted_after_step(7, recipe(inputs, tmp_path / "parts", steps=9, **changes))
    train(recipe(inputs, tmp_path / "parts", steps=9, **changes))
    whole, parts = left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")
    for name, content in whole.items():
        assert parts[name] == content, name


def test_what_a_resumed_run_needs_is_all_stored(inputs, tmp_path, monkeypatch):
    """Without the optimiser's moments, or from the beginning of the data, it would end otherwise."""
    train(recipe(inputs, tmp_path / "whole"))
    real = running.load_checkpoint
    for name, broken in (("optimizer", None), ("data", {"epoch": 0, "pool": 0, "done": 0, "start": None})):
        folder = tmp_path / name
        train(recipe(inputs, folder))
        for place in (folder / "model", folder / "checkpoint-00000004"):
            running.write_whole(place, lambda new: None)
            place.rmdir()

        def load(place, name=name, broken=broken):
            state = real(place)
            return state | {name: broken}

        with monkeypatch.context() as patch:
            patch.setattr(running, "load_checkpoint", load)
            if broken is None:
                patch.setattr("twotower.training.optimizer.PeakOptimizer.load_state_dict", lambda *_: None)
            train(recipe(inputs, folder))
        found, expected = weights(folder / "model"), weights(tmp_path / "whole" / "model")
        assert any(not torch.equal(found[key], expected[key]) for key in expected), name


def test_other_recipes_data_and_processes_are_refused_by_name(inputs, tmp_path):
    own = make_inputs(tmp_path / "own")
    folder = tmp_path / "run"
    train(recipe(own, folder, steps=1))
    for changes, message in (
        ({"steps": 2}, "steps is 2, but .* was begun with 1; put it back, or give another folder"),
        ({"optimizer": {"lr": 2e-2}}, "optimizer.lr is 0.02, but .* was begun with 0.01"),
        ({"data__aligned": 0.5}, "data.aligned is 0.5, but .* was begun with 0.6"),
        ({"objective": {"confidence": 0.1}}, "objective.confidence is 0.1, but"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe(own, folder, **{"steps": 1, **changes}))
    # What changes no weight may change.
    train(recipe(own, folder, steps=1, log__every=7, save={"every": 5, "keep": 1}))
    with open(own / "data.jsonl", "a") as file:
        file.write('{"question": "more", "answer": "text"}\n')
    with pytest.raises(ValueError, match=r"data.jsonl has \d+ bytes, but had \d+ when .* was begun"):
        train(recipe(own, folder, steps=1))


def test_steps_may_change_until_the_rate_decays(inputs, tmp_path):
    train(recipe(inputs, tmp_path / "whole", steps=8))
    interrupted_after_step(3, recipe(inputs, tmp_path / "parts", steps=20))
    train(recipe(inputs, tmp_path / "parts", steps=8))
    assert_equal(weights(tmp_path / "parts" / "model"), weights(tmp_path / "whole" / "model"))
    late = {"optimizer": {"lr": 1e-2, "decay": 0.5}}
    interrupted_after_step(6, recipe(inputs, tmp_path / "late", steps=8, **late))
    with pytest.raises(ValueError, match=r"steps is 9, but .* was begun with 8; put it back"):
        train(recipe(inputs, tmp_path / "late", steps=9, **late))


def test_a_file_more_that_a_pattern_names_is_other_data(tmp_path):
    own = make_inputs(tmp_path / "own", "only -")
    asked = {"data__files": [str(own / "*.jsonl")], "steps": 1}
    train(recipe(own, tmp_path / "run", **asked))
    (own / "another.jsonl").write_bytes((own / "data.jsonl").read_bytes())
    with pytest.raises(
        ValueError, match=r"another.jsonl has \d+ bytes, but had no when .* was begun; put the data back"
    ):
        train(recipe(own, tmp_path / "run", **asked))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": ["absent.jsonl"]}, "evaluation: data.files has 'absent.jsonl', which names no file"),
        ({"files": ["data.jsonl"], "text": "body"}, "evaluation: .*data.jsonl has no column 'body'"),
        ({"files": ["data.jsonl"], "max_tokens": 7}, "evaluation: data.max_tokens is 7, less than a block of 8"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_known_before_the_first_step(data, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    with pytest.raises(ValueError, match=message):
        train(recipe(inputs, tmp_path, evaluation={"data": data, "every": 3}))
    assert not checkpoints(tmp_path) and not (tmp_path / "log.jsonl").exists()


def test_a_resumed_run_reads_no_weights_but_its_own(inputs, tmp_path, monkeypatch):
    interrupted_after_step(2, recipe(inputs, tmp_path))
    read, real = [], TwoTowerForBlockDiffusion.from_pretrained

    def watched(name, *arguments, **options):
        read.append(Path(name).name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(TwoTowerForBlockDiffusion, "from_pretrained", watched)
    train(recipe(inputs, tmp_path))
    assert read == ["checkpoint-00000002"]


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_stored(inputs, tmp_path, monkeypatch):
    real = running.Run._loss

    def loss(run, *arguments):
        return real(run, *arguments) * (torch.nan if run.step == 2 else 1)

    monkeypatch.setattr(running.Run, "_loss", loss)
    with pytest.raises(
        ValueError, match=r"the loss of step 3 is nan; the last good checkpoint is .*checkpoint-00000002"
    ):
        train(recipe(inputs, tmp_path))
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000002"
    assert all(tensor.isfinite().all() for tensor in weights(checkpoints(tmp_path)[-1]).values())
    monkeypatch.undo()
    train(recipe(inputs, tmp_path))  # goes on from there


def test_a_gradient_that_is_no_number_stops_the_run_too(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(ValueError, match=r"the gradients' norm of step 1 is inf; there is no checkpoint yet"):
        train(recipe(inputs, tmp_path))
    assert not checkpoints(tmp_path)


def test_weights_that_are_no_numbers_are_not_stored(inputs, tmp_path, monkeypatch):
    real = running.Run._take_step

    def take(run):
        step = real(run)
        if run.step == 2:
            run.plain.lm_head.weight.data[0, 0] = torch.nan
        return step

    monkeypatch.setattr(running.Run, "_take_step", take)
    with pytest.raises(ValueError, match=r"lm_head.weight is no number after step 3.*checkpoint-00000002"):
        train(recipe(inputs, tmp_path))
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000002"


def test_two_trainers_in_one_folder_are_refused(inputs, tmp_path):
    with FolderLock(tmp_path), pytest.raises(ValueError, match=rf"is being trained in by process {os.getpid()} on .*"):
        train(recipe(inputs, tmp_path))


def test_the_lock_of_a_dead_process_is_taken_over(inputs, fresh_python, tmp_path):
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom twotower.training.saving import FolderLock\n"
        f"FolderLock(Path({str(tmp_path)!r})).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert fresh_python("-c", script).returncode == -9
    assert "process" in (tmp_path / "lock").read_text()
    train(recipe(inputs, tmp_path, steps=1))
    assert (tmp_path / "lock").read_text() == ""


def test_an_evaluation_is_the_same_every_time_and_takes_no_draws(inputs, tmp_path):
    asked = {"evaluation": {"data": {"files": [str(inputs / "data.jsonl")], "text": "text"}, "every": 2}}
    train(recipe(inputs, tmp_path / "with", **asked))
    train(recipe(inputs, tmp_path / "without"))
    assert_equal(weights(tmp_path / "with" / "model"), weights(tmp_path / "without" / "model"))
    logged = [line for line in lines(tmp_path / "with" / "log.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    run = running.Run(recipe(inputs, tmp_path / "with", **asked), tmp_path / "with", running.Accelerator(cpu=True))
    assert run.evaluate() == logged[-1]["eval_loss"]


def test_generated_tasks_of_an_evaluation_are_not_those_of_training(inputs, tmp_path):
    data = {"generated": "tasks", "examples": 8, "min_tokens": 1}
    asked = recipe(inputs, tmp_path, data={**data, "pool": 8}, batch_size=8, evaluation={"data": data})
    run, seen = running.Run(asked, tmp_path, running.Accelerator(cpu=True)), []
    run._evaluated = lambda _, batch: seen.append(batch) or torch.ones(2)
    run.evaluate()
    trained = run.tokenizer.batch_decode(next(run.batches)["input_ids"], skip_special_tokens=True)
    evaluated = run.tokenizer.batch_decode(seen[0]["input_ids"], skip_special_tokens=True)
    assert len(trained) == len(evaluated) == 8 and not set(trained) & set(evaluated)


def test_a_finished_model_without_checkpoints_is_not_trained_again_in_vain(inputs, tmp_path):
    train(recipe(inputs, tmp_path, steps=1))
    for place in checkpoints(tmp_path):
        delete(place)
    with pytest.raises(ValueError, match=r"model is there already, of a run without checkpoints .*; give another"):
        train(recipe(inputs, tmp_path, steps=1, optimizer={"lr": 3e-2}))


def test_accumulated_batches_are_those_of_a_larger_step(inputs, tmp_path):
    """Of the same two documents, from a pool of no others; of next tokens, which no draw masks."""
    same = {"model__trained_towers": "context", "data__pool": 2, "steps": 2}
    train(recipe(inputs, tmp_path / "one", batch_size=1, accumulation=2, **same))
    train(recipe(inputs, tmp_path / "two", batch_size=2, accumulation=1, **same))
    start, one, two = (weights(place / "model") for place in (inputs, tmp_path / "one", tmp_path / "two"))
    for name, tensor in one.items():
        # AdamW makes much of small gradients, and what rounds differs between machines.
        assert_close(two[name] - start[name], tensor - start[name], slack=500 * GRADIENTS)
    first, second = (lines(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert any(not torch.equal(tensor, start[name]) for name, tensor in one.items())
    for step, other in zip(first, second, strict=True):
        assert abs(step["loss"] - other["loss"]) < 1e-4 and step["items"] == other["items"]


def in_two_processes(inputs: Path, folder: Path, stop: int | None = None, **changes: object) -> None:
    """Train, or only up to a step."""
    script = folder.with_suffix(".py")
    script.write_text(
        "import os\nfrom pathlib import Path\nimport torch\nfrom training.runs import recipe, stopped_after_step\n"
        "from twotower.training.run import train\ntorch.set_num_threads(1)\n"
        f"asked = recipe(Path({str(inputs)!r}), Path({str(folder)!r}), **{changes})\n"
        + ("train(asked)\n" if stop is None else f"stopped_after_step({stop}, asked, lambda: os._exit(0))\n")
        + "os._exit(0)\n"  # as torch may wait for ever for a thread of gloo's while Python ends
    )
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one_that_accumulates(tmp_path, sharded):
    """And evaluate on one document, of which one of them has none; sharded, after a restart in the middle."""
    inputs = make_inputs(tmp_path)
    evaluation = {"data": {"files": [str(inputs / "data.jsonl")], "text": "text", "examples": 1}, "every": 2}
    asked = {"evaluation": evaluation, "optimizer": {"name": "muon", "lr": 1e-2, "balance_experts": 1e-3}}
    asked["samples"] = {"prompts": ["Question:"], "every": 2, "max_new_tokens": 8}
    train(recipe(inputs, tmp_path / "one", accumulation=2, **asked))
    if sharded:
        asked["sharded"] = True
        in_two_processes(inputs, tmp_path / "two", stop=2, **asked)
        assert len(lines(tmp_path / "two" / "log.jsonl")) == 3 and not (tmp_path / "two" / "model").exists()
    in_two_processes(inputs, tmp_path / "two", **asked)
    start, one, two = (weights(tmp_path / name) for name in ("model", "one/model", "two/model"))
    for name, tensor in one.items():
        assert_close(two[name] - start[name], tensor - start[name], slack=100 * GRADIENTS)
    assert lines(tmp_path / "one" / "samples.jsonl") == lines(tmp_path / "two" / "samples.jsonl")
    logged = [lines(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in logged[1] if "eval_loss" in line] == [2, 4]
    for first, second in zip(*logged, strict=True):
        for name in ("loss", "eval_loss"):
            assert abs(first.get(name, 0) - second.get(name, 0)) < 1e-4
        assert first.get("items") == second.get("items")


def test_sharded_weights_of_one_process_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"sharded is true, but there is one process .*; leave it out, or start"):
        train(recipe(inputs, tmp_path, sharded=True))


def test_an_adapter_is_trained_on_sharded_weights_as_on_whole_ones(tmp_path):
    inputs = make_inputs(tmp_path)
    asked = {"model": {"checkpoint": str(inputs / "model"), "lora": {"rank": 2}}, "steps": 2}
    train(recipe(inputs, tmp_path / "one", accumulation=2, **asked))
    in_two_processes(inputs, tmp_path / "two", sharded=True, gradient_checkpointing=True, **asked)
    for finished in ("adapter", "model"):
        one, two = (load_file(next((tmp_path / name / finished).glob("*.safetensors"))) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert_close(two[name], tensor, slack=1000 * GRADIENTS)
