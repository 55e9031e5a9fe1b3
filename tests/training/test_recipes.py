"""The recipe that CI trains: a new denoiser learns within a minute of one core."""

from dataclasses import replace
from pathlib import Path

from training.runs import lines

from twotower.training.recipe import read_recipe
from twotower.training.run import train

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_smoke_recipe_lowers_its_loss_by_more_than_half(tmp_path):
    train(replace(read_recipe(RECIPES / "smoke.yaml"), folder=str(tmp_path)))
    logged = lines(tmp_path / "log.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert sum(losses[-3:]) / 3 < losses[0] / 2, losses
    assert lines(tmp_path / "samples.jsonl")[0]["text"]
