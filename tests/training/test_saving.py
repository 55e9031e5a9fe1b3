"""A run's folder: optimiser state through files, and checkpoints that are broken named as such."""

import errno
import json
import os
import sys

import pytest
import torch
from training.runs import make_inputs, recipe

from twotower.training.run import train
from twotower.training.saving import FolderLock, checkpoints, cut_lines, load_checkpoint, save_checkpoint


def test_state_comes_back_as_it_was(tmp_path):
    optimizer = [
        {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}}, "param_groups": [{"lr": 0.1, "b": None}]}
    ]
    place = save_checkpoint(tmp_path, 7, lambda new: None, optimizer, {"recipe": {}, "data": {"a": [1]}}, keep=1)
    state = load_checkpoint(place)
    assert (state["step"], state["data"]) == (7, {"a": [1]})
    assert state["optimizer"][0]["param_groups"] == optimizer[0]["param_groups"]
    for name, tensor in optimizer[0]["state"][0].items():
        assert torch.equal(state["optimizer"][0]["state"][0][name], tensor)


def test_a_system_without_locks_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ValueError, match="cannot lock and sync a run's folder, as Windows cannot; train on Linux"):
        FolderLock(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_no_other_process(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ValueError, match=r"lock cannot be locked \(No locks available\); give a folder on"):
        FolderLock(tmp_path).__enter__()


@pytest.mark.parametrize("folder", ["run", "run/within"])
def test_a_file_where_the_folder_is_to_be_is_named(folder, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=f"folder is .*{folder}, where a file is in the way; give another folder"):
        FolderLock(tmp_path / folder).__enter__()


def test_lines_of_later_steps_and_a_broken_one_are_cut(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_lines(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


BROKEN = {
    "cut off state": ("state.json", lambda data: data[: len(data) // 2], "state.json cannot be read"),
    "no object": ("state.json", lambda _: b"[1]", "state.json cannot be read"),
    "empty object": ("state.json", lambda _: b"{}", r"state.json cannot be read \(KeyError"),
    "a changed value": (
        "state.json",
        lambda data: data.replace(b'"seconds": ', b'"seconds": 9'),
        "its checksum is another",
    ),
    "a lost key": ("state.json", lambda data: data.replace(b'"processes"', b'"porcesses"'), "its checksum is another"),
    "cut off moments": (
        "optimizer.safetensors",
        lambda data: data[:-5],
        r"optimizer.safetensors has \d+ bytes of \d+",
    ),
    "other moments": (
        "optimizer.safetensors",
        lambda data: b"x" * len(data),
        "optimizer.safetensors does not hold what",
    ),
    "cut off weights": ("model.safetensors", lambda data: data[:-5], r"model.safetensors has \d+ bytes of \d+"),
    "no weights": ("model.safetensors", None, "model.safetensors is missing"),
    "no state": ("state.json", None, "state.json is missing"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"), "only -")
    train(recipe(inputs, inputs / "run", steps=1))
    return inputs


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_named(case, finished):
    name, broken, message = BROKEN[case]
    place = checkpoints(finished / "run")[-1]
    good = (place / name).read_bytes()
    try:
        if broken is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(broken(good))
        with pytest.raises(
            ValueError, match=rf"{message}.*; copy the checkpoint again, or delete .*{place.name}"
        ) as caught:
            train(recipe(finished, finished / "run", steps=1))
        assert "\n" not in str(caught.value)
    finally:
        (place / name).write_bytes(good)
    assert json.loads((place / "state.json").read_text())["step"] == 1
