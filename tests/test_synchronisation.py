"""Generating with parameters sharded over ranks, whose rows need different numbers of passes."""

import json
from pathlib import Path

import pytest
import torch
from generate_sharded import CASES, model_of_all, text
from tiny import random_ids

SCRIPT = Path(__file__).with_name("generate_sharded.py")


@pytest.fixture(scope="module")
def sharded(fresh_python, tmp_path_factory):
    """Per rank, its text in every case; two processes that would hang if they did not keep in step."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    ranks = [fresh_python.start(SCRIPT, rank, folder) for rank in range(2)]
    try:
        for process in ranks:
            assert process.wait(240) == 0, process.stderr
    finally:
        for process in ranks:
            process.kill()
    return [json.loads(process.stdout.splitlines()[-1]) for process in ranks]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_writes_the_text_of_the_unsharded_model(name, sharded):
    for rank, (shape, given) in enumerate(CASES[name][1:]):
        expected = text(model_of_all(), rank, shape, given)
        assert sharded[rank][name] == expected
        assert isinstance(expected, str) == (given.get("step_callback") == "fails")


def test_without_other_ranks_there_is_nothing_to_keep_in_step():
    model = model_of_all()
    ids = random_ids(2, 5)
    expected = model.generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, synced_gpus=True), expected)
