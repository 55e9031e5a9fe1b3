"""Where a report comes from, and files that are whole."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from twotower.bench.reports import check_writable, environment, git_commit, write_json, write_whole


def test_environment_is_written_down(tmp_path):
    found = environment(tiny_model())
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert git_commit(tmp_path) is None, "a folder that is no checkout has no commit"
    (tmp_path / ".git").mkdir()
    assert git_commit(tmp_path) is None, "nor has a broken one"


def test_figures_go_through_a_link_and_into_what_is_no_file(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    check_writable(link)
    write_whole(link, lambda file: file.write_text("new"))
    assert link.is_symlink() and target.read_text() == "new"
    check_writable(Path("/dev/null"))
    write_whole(Path("/dev/null"), lambda file: file.write_text("new"))
    assert not Path("/dev/null").is_file()
    with pytest.raises(IsADirectoryError, match="is a folder; give a file"):
        check_writable(tmp_path)


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path):
    file = tmp_path / "figures.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": {1, 2}})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [*tmp_path.iterdir()] == [file]
