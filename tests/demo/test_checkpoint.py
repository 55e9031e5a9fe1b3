"""The embedded checkpoint on a few tasks that training has not shown, and its card, which is what the files say."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import twotower
from twotower.configuration_twotower import TwoTowerConfig
from twotower.demo.evaluation import MAX_NEW_TOKENS, VALIDATION_SEED
from twotower.demo.held_out import TRAINED_ON
from twotower.demo.marking import Marks
from twotower.demo.model_card import card, results
from twotower.demo.release import ABLATIONS, BEGIN, END, FIGURES, TRAINING
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.answers import answer, end_ids, tokenized, variant_of
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
from twotower.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
COUNT = 24


@pytest.fixture(scope="module")
def folder():
    return twotower.demo_checkpoint()


@pytest.mark.parametrize("skill, ar, diffusion", [("words", 22, 21), ("code", 18, 17)])
def test_it_knows_both_skills(folder, skill, ar, diffusion):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, tasks = AutoTokenizer.from_pretrained(folder), held_out_tasks(skill, COUNT, VALIDATION_SEED)
    batches = tokenized([task.prompt for task in tasks], COUNT, tokenizer, model)
    ways = [variant_of(model, mode, {"mode": mode}) for mode in ("ar", "mask_diffusion")]
    runs = answer(ways, batches[0], batches, end_ids(model), MAX_NEW_TOKENS)
    right = [sum(Marks.of(run.answers, tasks, tokenizer).right) for run in runs.values()]
    assert right[0] >= ar and right[1] >= diffusion, right
    passes = [sum(run.context_forwards) + sum(run.denoiser_forwards) for run in runs.values()]
    assert passes[0] > 3 * passes[1]


def test_it_fits_the_wheel(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6


def test_card_and_readme_say_what_the_files_say(folder):
    training, figures = (json.loads((ROOT / name).read_text()) for name in (TRAINING, FIGURES))
    ablations = [json.loads((ROOT / name).read_text()) for name in ABLATIONS]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    made = card(TwoTowerConfig.from_pretrained(folder), size, training, figures, ablations)
    assert (folder / "README.md").read_text(encoding="utf-8") == made
    assert BEGIN + results(figures) + END in (ROOT / "README.md").read_text(encoding="utf-8")


def runs_of_training():
    training = json.loads((ROOT / TRAINING).read_text())
    return [*training["context"], *training["denoiser"]]


def test_it_was_trained_by_the_recipes():
    runs = {run["recipe"]["seed"]: run["recipe"] for run in runs_of_training()}
    for name in ("demo_context", "demo", "demo_context_continued", "demo_continued", "demo_balanced"):
        recipe = asdict(read_recipe(ROOT / "recipes" / f"{name}.yaml"))
        for key in ("steps", "batch_size", "accumulation", "objective", "optimizer"):
            assert runs[recipe["seed"]][key] == recipe[key], (name, key)
        assert runs[recipe["seed"]]["data"]["generated"] == recipe["data"]["generated"]


def test_what_training_has_shown_can_be_drawn_again():
    drawn = {}
    for run in runs_of_training():
        recipe = run["recipe"]
        tasks = run["step"] * recipe["batch_size"] * recipe["accumulation"] * run["processes"]
        drawn[recipe["seed"]] = (recipe["data"]["generated"], tasks)
    assert drawn == TRAINED_ON
