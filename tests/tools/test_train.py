"""What a run from a recipe leaves for others: a repository on the Hub, curves in TensorBoard."""

import subprocess
import sys

from fake_hub import hub_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.runs import interrupted_after_step, lines, make_inputs, recipe

from twotower.training.run import train

UPLOAD = """
import sys
from pathlib import Path
from training.runs import recipe
from transformers import AutoModel, AutoTokenizer
from twotower.training.run import train
run = recipe(Path(sys.argv[1]), Path(sys.argv[2]), steps=2, hub={"repository": "lab/trained", "private": True})
trained, folder = AutoModel.from_pretrained(train(run)), "lab/trained"
fetched = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert all((a == b).all() for a, b in zip(trained.state_dict().values(), fetched.state_dict().values(), strict=True))
assert AutoTokenizer.from_pretrained(folder)("Question").input_ids
"""


def test_a_finished_model_is_uploaded_with_its_code(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    with hub_environment(tmp_path) as environment:
        command = [sys.executable, "-c", UPLOAD, inputs, tmp_path / "run"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_curves_in_tensorboard_are_those_of_the_log_also_of_a_run_that_was_resumed(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    again = recipe(inputs, tmp_path / "run", save__every=2, log__tensorboard=True)
    interrupted_after_step(3, again)
    train(again)  # from step 2 on, so that step 3 is logged twice
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = lines(tmp_path / "run" / "log.jsonl")
    for name in ("loss", "grad_norm", "lr"):
        shown = [(event.step, round(event.value, 5)) for event in board.Scalars(name)]
        assert shown == [(line["step"], round(line[name], 5)) for line in logged]
