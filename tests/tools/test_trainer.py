"""transformers' Trainer: what is trained, resumed, accumulated, evaluated and refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import random_ids, student_model
from tolerances import GRADIENTS, assert_close
from transformers import Trainer, TrainingArguments, set_seed

from twotower.modeling_twotower import TwoTowerForBlockDiffusion
from twotower.objective_twotower import DiffusionObjective
from twotower.training.collator import BlockCollator

ROWS = [{"input_ids": ids, "labels": ids} for ids in random_ids(6, 12)]


def trainer(model, folder: Path, rows=ROWS, **arguments) -> Trainer:
    """Four steps of two rows on a CPU, saying nothing."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(folder, **{**defaults, **arguments})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_batches_of_one_row_train_the_denoiser_and_nothing_else(checkpointing, tmp_path):
    model = student_model("all kinds")
    before = weights(model)
    arguments = {"per_device_train_batch_size": 1, "max_steps": 2}
    if checkpointing is not None:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    run = trainer(model, tmp_path, **arguments)
    run.train()
    denoiser = {"denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables"}
    assert changed(model, before) == denoiser
    optimised = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    names = {name.split(".")[0] for name, parameter in model.named_parameters() if id(parameter) in optimised}
    assert names == denoiser


@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(shards, tmp_path):
    """The checkpoint is in NVIDIA's layout, a matrix per expert, of which many files hold some each."""

    def run(seed):
        model = student_model("all kinds", seed=seed)
        if shards == "many files":
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="80KB")
        set_seed(0)
        return model, trainer(model, tmp_path, save_strategy="steps", save_steps=2)

    model, whole = run(seed=0)
    whole.train()
    files = len(list((tmp_path / "checkpoint-2").glob("*.safetensors")))
    assert files == 1 if shards == "one file" else files > 2
    resumed, rest = run(seed=1)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), weights(model))


def test_with_our_collator_and_objective_it_resumes_as_exactly(tmp_path):
    """Layouts are no draws, so a resumed run does not repeat them; block lengths are mixed on the way."""
    objective = DiffusionObjective(confidence=0.1, distillation=0.2)

    def run(seed):
        model = student_model("all kinds", seed=seed)
        model.objective = objective
        set_seed(0)
        made = trainer(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=5)
        made.data_collator = BlockCollator(2, [4, 8])
        return model, made

    model, whole = run(seed=0)
    whole.train()
    resumed, rest = run(seed=1)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), weights(model))


@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_the_best_model_is_loaded_at_the_end(shards, tmp_path):
    model = student_model("all kinds")
    if shards == "many files":
        model.save_pretrained = partial(model.save_pretrained, max_shard_size="80KB")
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # Steps this large do harm: the first model evaluated is the best one.
    run = trainer(model, tmp_path, load_best_model_at_end=True, learning_rate=0.3, max_steps=3, **schedule)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "checkpoint-1")
    assert_equal(weights(model), weights(best))


def test_accumulated_batches_are_one_batch(tmp_path):
    """Of rows with unlike numbers of labels, under the same masks."""
    rows = [{**row, "labels": row["labels"].clone()} for row in ROWS[:3]]
    rows[1]["labels"][:9] = -100

    def gradient_steps(**arguments):
        model = student_model("all kinds")
        model.train = lambda mode=True: model  # an evaluation's masks do not depend on how rows are batched
        plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2}
        trainer(model, tmp_path, rows, **plain, **arguments).train()
        return weights(model)

    whole = gradient_steps(per_device_train_batch_size=3)
    accumulated = gradient_steps(per_device_train_batch_size=1, gradient_accumulation_steps=3)
    start = weights(student_model("all kinds"))
    for name, tensor in whole.items():
        assert_close(accumulated[name] - start[name], tensor - start[name], slack=10 * GRADIENTS)


def test_an_evaluation_gives_the_same_loss_every_time(tmp_path):
    losses = set()
    for size, seed in ((2, 0), (2, 1), (3, 2)):
        set_seed(seed)
        run = trainer(student_model("all kinds"), tmp_path, per_device_eval_batch_size=size)
        losses.add(round(run.evaluate()["eval_loss"], 5))
    assert len(losses) == 1


def test_metrics_get_the_labels(tmp_path):
    run = trainer(student_model("only -"), tmp_path)
    run.compute_metrics = lambda prediction: {"labels": int((prediction.label_ids != -100).sum())}
    assert run.evaluate()["eval_labels"] == 6 * 12


def test_label_smoothing_is_refused_by_name(tmp_path):
    """It would train the context tower, on labels that are not shifted."""
    for towers in ("denoiser", "both"):
        model = student_model("all kinds")
        model.set_trained_towers(towers)
        with pytest.raises(ValueError, match="set label_smoothing_factor to 0"):
            trainer(model, tmp_path, label_smoothing_factor=0.1).train()


def test_noise_in_the_embeddings_of_what_is_not_trained_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha puts noise into the context tower's embeddings"):
        trainer(student_model("only -"), tmp_path, neftune_noise_alpha=5.0).train()
