"""Recipes: what is read, and that every mistake is one line that names the value and the remedy."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from twotower.training.recipe import changed_key, read_recipe, recipe_of

ROOT = Path(__file__).parents[2]


def content(**changes: Any) -> dict[str, Any]:
    return {"folder": "run", "steps": 3, "model": {"checkpoint": "demo"}, "data": {"files": ["a.jsonl"]}, **changes}


def test_defaults_numbers_and_parts():
    recipe = recipe_of(content(optimizer={"lr": 1, "betas": [0, 0.5]}, objective={"confidence": 0.1}))
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.objective.confidence) == (1.0, [0.0, 0.5], 0.1)
    assert (recipe.seed, recipe.data.pool, recipe.evaluation, recipe.model.lora) == (0, 1024, None, None)


def test_numbers_as_people_write_them(tmp_path):
    """YAML takes 1e-4 for text."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "folder: run\nsteps: 3\nmodel: {checkpoint: demo}\ndata: {files: [a.txt]}\noptimizer: {lr: 1e-4}\n"
    )
    assert read_recipe(file).optimizer.lr == 1e-4


def test_no_is_a_word_and_keys_may_be_shared(tmp_path):
    """YAML 1.1 takes it for false; what is shared may be changed, but nothing be given twice."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "folder: run\nsteps: 3\nmodel: {checkpoint: demo}\nmixed_precision: no\n"
        "data: &data {files: [a.txt], pool: 4}\nevaluation: {data: &other {<<: *data, pool: 7}}\n"
    )
    recipe = read_recipe(file)
    assert recipe.mixed_precision == "no"
    assert (recipe.data.pool, recipe.evaluation.data.pool, recipe.evaluation.data.files) == (4, 7, ["a.txt"])
    file.write_text("folder: run\ndata: &data {files: [a.txt]}\nevaluation: {<<: *data, every: 1, every: 2}\n")
    with pytest.raises(ValueError, match="is no YAML: every is given twice"):
        read_recipe(file)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_the_recipes_we_ship_are_read(file):
    recipe = read_recipe(file)
    assert recipe_of(_plain(asdict(recipe))) == recipe


def _plain(value: Any) -> Any:
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


WRONG = {
    "no mapping": ([1], r"the recipe is \[1\]; give keys and values, of folder, model"),
    "a key nobody knows": (content(step=3), "step is no key of a recipe; did you mean steps"),
    "one within": (
        content(data={"files": ["a"], "colum": "x"}),
        "data.colum is no key of a recipe; (use|did you mean)",
    ),
    "a missing key": ({"folder": "run"}, "model is missing in the recipe; see docs/training.md"),
    "one missing within": (content(hub={}), "hub.repository is missing"),
    "text for a number": (content(steps="many"), "steps is 'many'; give a whole number"),
    "a fraction of steps": (content(steps=2.5), "steps is 2.5; give a whole number"),
    "true for a number": (content(seed=True), "seed is True; give a whole number"),
    "a number for text": (content(folder=3), "folder is 3; give text"),
    "a number for a flag": (content(gradient_checkpointing=1), "gradient_checkpointing is 1; give true or false"),
    "text for a fraction": (content(optimizer={"lr": "small"}), "optimizer.lr is 'small'; give a number"),
    "no list": (content(data={"files": "a.jsonl"}), "data.files is 'a.jsonl'; give a list"),
    "a wrong item": (content(data={"files": ["a", 1]}), r"data.files\[1\] is 1; give text"),
    "no config": (content(model={"config": 3}), "model.config is 3; give keys and values"),
    "an unknown choice": (content(device="tpu"), "device is 'tpu'; use one of auto, cpu"),
    "nothing for a part": (content(data=None), "data is None; give keys and values"),
    "no steps": (content(steps=0), "steps is 0; it must be at least 1"),
    "a negative seed": (content(seed=-1), "seed is -1; it must be at least 0"),
    "no model": (content(model={}), "model.none given; give one of checkpoint, backbone, config"),
    "two models": (
        content(model={"checkpoint": "a", "backbone": "b"}),
        "model.checkpoint and backbone given; give one",
    ),
    "a backbone without a mask": (content(model={"backbone": "b"}), r"model.mask_token_id is missing; .*for \[MASK\]"),
    "a mask with a checkpoint": (
        content(model={"checkpoint": "a", "mask_token_id": 3}),
        "model.block_size and mask_token_id go with backbone",
    ),
    "a config without tokenizer": (content(model={"config": {}}), "model.tokenizer is missing"),
    "adapters on the context tower": (
        content(model={"checkpoint": "a", "trained_towers": "context", "lora": {}}),
        "model.lora and reset_denoiser are of the denoiser",
    ),
    "an objective for it": (
        content(model={"checkpoint": "a", "trained_towers": "context"}, objective={"confidence": 1}),
        "objective is the denoiser's",
    ),
    "a rank of 0": (
        content(model={"checkpoint": "a", "lora": {"rank": 0}}),
        "model.lora.rank is 0; it must be at least 1",
    ),
    "no targets": (content(model={"checkpoint": "a", "lora": {"targets": []}}), "model.lora.targets is empty"),
    "too much dropout": (
        content(model={"checkpoint": "a", "lora": {"dropout": 2}}),
        r"model.lora.dropout is 2.0; give a",
    ),
    "dropout of experts": (
        content(model={"checkpoint": "a", "lora": {"dropout": 0.1}}),
        "model.lora.dropout cannot be of routed_experts",
    ),
    "an unmerged upload": (
        content(model={"checkpoint": "a", "lora": {"merge": False}}, hub={"repository": "r"}),
        "hub uploads a whole model",
    ),
    "no data": (content(data={}), "data.none given; give one of files, dataset, generated"),
    "no files": (content(data={"files": []}), "data.files is empty"),
    "half a prompt": (content(data={"files": ["a"], "prompt": "p"}), "data.prompt and completion go together"),
    "text and prompt": (
        content(data={"files": ["a"], "prompt": "p", "completion": "c", "text": "t"}),
        "data.text and prompt are both given",
    ),
    "no pool": (content(data={"files": ["a"], "pool": 0}), "data.pool is 0; it must be at least 1"),
    "blocks of 0": (content(data={"files": ["a"], "block_sizes": [0]}), r"data.block_sizes is \[0\]; give lengths"),
    "a share above 1": (
        content(data={"files": ["a"], "aligned": 2}),
        r"data.aligned is 2.0; give a share in \[0, 1\]",
    ),
    "no learning": (content(optimizer={"lr": 0}), "optimizer.lr is 0.0; it must be positive and finite"),
    "a rising end": (content(optimizer={"last_lr": 1}), "optimizer.last_lr is 1.0; it must lie between 0 and lr"),
    "one beta": (content(optimizer={"betas": [0.9]}), r"optimizer.betas is \[0.9\]; give two numbers in \[0, 1\)"),
    "no norm": (content(optimizer={"max_norm": 0}), "optimizer.max_norm is 0.0; it must be positive"),
    "a wrong objective": (content(objective={"distillation": 2}), "objective.distillation is 2.0; give a share"),
    "endless evaluation": (
        content(evaluation={"data": {"generated": "tasks"}}),
        "evaluation.data.examples is missing; generated tasks have no end",
    ),
    "no norm at all": (content(optimizer={"max_norm": float("nan")}), "optimizer.max_norm is nan; it must be"),
    "a rate of no optimiser": (
        content(optimizer={"other_lr": 1e-3}),
        "optimizer.other_lr is 0.001, which goes with name: muon; leave it out",
    ),
    "a rate that is no number": (
        content(optimizer={"name": "muon", "other_lr": float("nan")}),
        "optimizer.other_lr is nan; it must be positive and finite",
    ),
    "documents longer than they may be": (
        content(data={"files": ["a"], "min_tokens": 4096}),
        "data.min_tokens is 4096, more than max_tokens, 2048, to which documents are cut; lower it",
    ),
    "a split of files": (content(data={"files": ["a"], "split": "test"}), "data.subset and split go with dataset"),
    "a subset of tasks": (
        content(data={"generated": "tasks", "subset": "words"}),
        "data.subset and split go with dataset; leave them out",
    ),
    "paragraphs of a dataset": (
        content(data={"dataset": "a", "text_by": "paragraph"}),
        "data.text_by goes with files, of .txt; leave it out",
    ),
    "an evaluation of other blocks": (
        content(evaluation={"data": {"files": ["a"], "block_sizes": [4]}}),
        "evaluation.data.block_sizes and data.aligned are of training; leave them out",
    ),
    "samples of a denoiser that is not trained": (
        content(model={"checkpoint": "a", "trained_towers": "context"}, samples={"prompts": ["a"]}),
        "samples.mode is mask_diffusion, of a denoiser that is not trained; set it to ar",
    ),
    "an adapter of what is not stored": (
        content(model={"checkpoint": "a", "reset_denoiser": True, "lora": {"merge": False}}),
        "model.lora.merge is false, and what the adapter is of would be stored nowhere.*; set it to true",
    ),
    "adapters and moved routers": (
        content(model={"checkpoint": "a", "lora": {}}, optimizer={"balance_experts": 1e-3}),
        "optimizer.balance_experts moves routers, which an adapter does not hold; leave it out",
    ),
    "a seed of too many bits": (content(seed=2**64), r"seed is 18446744073709551616; it must be .* below 2\*\*64"),
    "no prompts": (content(samples={"prompts": [" "]}), "samples.prompts holds nothing, or an empty one"),
    "a folder without a name": (content(folder=""), "folder is ''; give text"),
    "a block size of a checkpoint's": (
        content(model={"checkpoint": "demo", "block_size": 0}),
        "model.block_size and mask_token_id go with backbone",
    ),
    "adapters without an effect": (
        content(model={"checkpoint": "demo", "lora": {"alpha": 0}}),
        "model.lora.alpha is 0.0; it must be positive",
    ),
    "an impossible repository": (
        content(hub={"repository": "a/b/c"}),
        "hub.repository is 'a/b/c'; give NAME or OWNER/NAME",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        recipe_of(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "is no YAML: .*line 1"),
        ("steps: 1\nsteps: 2", "is no YAML: steps is given twice"),
        ("", "recipe.yaml is None; give keys and values"),
    ],
)
def test_files_that_are_no_recipe(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no UTF-8 text; save it as such"):
        read_recipe(file)


def test_changed_keys_are_named_and_free_ones_are_not():
    before = asdict(recipe_of(content()))
    assert changed_key(before, recipe_of(content(folder="other", save={"every": 7}, log={"every": 1}))) is None
    assert changed_key(before, recipe_of(content(optimizer={"lr": 1e-3}))) == ("optimizer.lr", 1e-4, 1e-3)
    lora = recipe_of(content(model={"checkpoint": "demo", "lora": {}}))
    key, old, new = changed_key(before, lora)
    assert (key.startswith("model.lora") and old is None) or new is None


def test_a_run_begun_before_a_key_existed_is_the_same_run():
    before = asdict(recipe_of(content()))
    del before["objective"]["full_masks"], before["data"]["workers"]
    assert changed_key(before, recipe_of(content())) is None
    assert changed_key(before, recipe_of(content(objective={"full_masks": 0.5}))) == ("objective.full_masks", 0.0, 0.5)
