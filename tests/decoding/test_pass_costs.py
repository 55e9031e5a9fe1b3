"""Costs of passes: looked up, measured, kept, and what becomes of broken files."""

import copy
import json
import os
import pickle

import pytest
import torch
from huggingface_hub import constants
from tiny import tiny_model

from twotower.decoding import pass_costs
from twotower.decoding.pass_costs import PassCosts, costs_of, draft_lengths, pass_costs_file, row_buckets

TABLE = {"step": {1: {1: 1.0, 4: 2.0}}, "denoise": {2: {1: 3.0, 4: 6.0}}, "verify": {2: {1: 4.0}}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def measured(monkeypatch):
    """The rows that were measured, call by call."""
    calls = []
    measure = PassCosts.measure.__func__

    def spy(cls, model, lengths, rows, recorded):
        calls.append(tuple(rows))
        return measure(cls, model, lengths, rows, recorded)

    monkeypatch.setattr(PassCosts, "measure", classmethod(spy))
    return calls


def test_lengths_are_powers_of_two_and_the_block():
    assert draft_lengths(16) == (1, 2, 4, 8, 16)
    assert draft_lengths(12) == (1, 2, 4, 8, 12)
    assert draft_lengths(2) == (1, 2)
    assert draft_lengths(1) == (1,)


def test_rows_are_measured_up_to_what_covers_them():
    assert [row_buckets(rows) for rows in (1, 2, 4, 5, 16, 64, 65)] == [
        (1,),
        (1, 4),
        (1, 4),
        (1, 4, 16),
        (1, 4, 16),
        (1, 4, 16, 64),
        (1, 4, 16, 64, 256),
    ]


def test_between_and_beyond_measured_rows_lines_are_drawn():
    costs = PassCosts(TABLE)
    assert [costs.of("denoise", 2, rows) for rows in (1, 2, 4, 7)] == [3, 4, 6, 9]
    assert costs.of("verify", 2, 9) == 4
    assert costs.cycle(2, 1, draft_steps=3) == 3 * 3 + 4
    assert costs.cycle(1, 2) == pytest.approx(4 / 3)


def test_what_falls_with_the_rows_stays_positive():
    assert PassCosts({"step": {1: {1: 2.0, 2: 1.0}}}).of("step", 1, 100) > 0


def test_json_and_back():
    costs = PassCosts(TABLE)
    assert PassCosts.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    "table, says",
    [
        ({}, 'pass costs hold nothing of "step"'),
        (None, "pass costs are None; give {kind: {tokens: {rows: seconds}}}"),
        ({"step": 3.0}, r"pass costs are \{'step': 3.0\}; give"),
        ({**TABLE, "read": {2: {1: 1.0}}}, "'read'; the kinds of passes are denoise, verify, step"),
        ({"step": {2: {1: 1.0}}}, 'a "step" is over 1 token'),
        ({**TABLE, "verify": {1: {1: 1.0}}}, "any other pass over at least 2"),
        ({"step": {1: {}}}, "give seconds by number of rows"),
        ({"step": {1: {0: 1.0}}}, "0 rows; give a whole number"),
        ({"step": {1: {1: 0.0}}}, "0.0 seconds; give a positive number"),
        ({"step": {1: {1: float("nan")}}}, "nan seconds"),
        ({"step": {1: {1: "1"}}}, "'1' seconds"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table, says):
    with pytest.raises(ValueError, match=says):
        PassCosts(table)


@pytest.mark.parametrize("table", [{"step": 1.0}, {"step": {"one": {"1": 1.0}}}, {"step": {"1": [1.0]}}])
def test_a_malformed_dictionary_is_refused(table):
    with pytest.raises(ValueError, match="pass costs are malformed"):
        PassCosts.from_dict(table)


def test_a_length_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match=r"no 'denoise' pass over 3 tokens, only over \[2\]; measure them"):
        PassCosts(TABLE).cycle(3, 1)


def test_passes_over_nothing_are_not_measured(model):
    with pytest.raises(ValueError, match=r"lengths to measure are \[4, 0\]; give whole numbers of at least 1"):
        PassCosts.measure(model, [4, 0], [1])
    with pytest.raises(ValueError, match=r"rows to measure are \[0\]; give"):
        PassCosts.measure(model, [4], [0])
    with pytest.raises(ValueError, match=r"lengths to measure are \[2.5\]; give"):
        PassCosts.measure(model, [2.5], [1])
    with pytest.raises(ValueError, match=r"rows to measure are \[\]; give"):
        PassCosts.measure(model, [4], [])
    with pytest.raises(ValueError, match="rows are 0; give"):
        costs_of(model, 4, 0)


def test_every_pass_is_measured(model):
    state = torch.get_rng_state()
    costs = PassCosts.measure(model, lengths=[1, 2, 4], rows=[1, 4])
    kinds = {(kind, tokens, rows) for kind, tokens, rows, _ in costs.entries()}
    passes = [("denoise", 2), ("denoise", 4), ("verify", 2), ("verify", 4), ("step", 1)]
    assert kinds == {(*each, rows) for each in passes for rows in (1, 4)}
    assert all(seconds > 0 for *_, seconds in costs.entries())
    assert costs.of("verify", 2, 1) <= costs.of("verify", 4, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_whatever_torchs_default_device_they_are_measured_where_the_model_is(model):
    with torch.device("meta"):
        costs = PassCosts.measure(model, lengths=[1, 2], rows=[1])
    assert all(seconds > 0 for *_, seconds in costs.entries())


def test_the_file_is_as_others_may_read_it(model, measured):
    others = os.umask(0o022)
    try:
        costs_of(model, 4, rows=1)
        assert pass_costs_file().stat().st_mode & 0o777 == 0o644
        pass_costs_file().chmod(0o664)
        costs_of(model, 8, rows=1)
    finally:
        os.umask(others)
    assert pass_costs_file().stat().st_mode & 0o777 == 0o664


def test_what_is_measured_is_kept_with_the_model_and_in_the_file(model, measured):
    costs = costs_of(model, 4, rows=2)
    assert costs_of(model, 4, rows=4) is costs
    assert costs_of(tiny_model(seed=1), 4, rows=4) == costs  # of the file: weights make no difference
    assert measured == [(1, 4)]
    assert costs_of(model, 4, rows=16).of("step", 1, 4) > 0
    assert measured == [(1, 4), (1, 4, 16)]


def test_blocks_wider_than_texts_are_measured_for_few_lengths(model, measured):
    for tokens in (5, 6, 7, 8):
        model.generate(
            torch.ones(1, 3, dtype=torch.long), mode="self_speculative", block_size=16, max_new_tokens=tokens
        )
    assert len(measured) == 1


def test_anew_means_that_what_was_kept_is_dropped(model, measured):
    costs_of(model, 4, 16)
    costs_of(model, 4, 2, missing="anew")
    assert measured == [row_buckets(16), row_buckets(2)]
    assert costs_of(model, 4, 2) is costs_of(model, 4, 2) and len(measured) == 2
    vars(model).pop("_kept_pass_costs")
    costs_of(model, 4, 2)
    assert len(measured) == 2  # those in the file
    costs_of(model, 4, 16)
    assert len(measured) == 3


def test_another_geometry_dtype_or_number_of_threads_is_measured_anew(model, measured):
    costs_of(model, 4, rows=1)
    costs_of(tiny_model("only M"), 4, rows=1)
    costs_of(model.to(torch.bfloat16), 4, rows=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        costs_of(model, 4, rows=1)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 4
    assert len(json.loads(pass_costs_file().read_text())["tables"]) == 4


def test_other_kernels_are_measured_anew(model, measured):
    costs_of(model, 4, rows=1)
    model.set_kernels({"rms_norm": "torch"})
    costs_of(model, 4, rows=1)
    assert len(measured) == 2


def test_neither_state_config_copies_nor_pickles_hold_what_is_kept(model, measured):
    before = set(model.state_dict()), model.config.to_json_string()
    costs_of(model, 4, rows=1)
    assert (set(model.state_dict()), model.config.to_json_string()) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._kept_pass_costs
    assert model._kept_pass_costs


def test_what_the_user_sets_comes_first(model, measured):
    model.pass_costs = PassCosts(TABLE)
    assert costs_of(model, 2, rows=64) is model.pass_costs
    with pytest.raises(ValueError, match="no 'denoise' pass over 4 tokens"):
        costs_of(model, 4, rows=1)
    model.pass_costs = TABLE
    with pytest.raises(ValueError, match=r"model\.pass_costs is a dict; set a PassCosts"):
        costs_of(model, 2, rows=1)
    assert not measured


def test_where_nothing_may_be_measured_nothing_is(model, measured):
    assert costs_of(model, 4, rows=4, missing="none") is None
    assert not measured
    assert costs_of(model, 4, rows=4) == costs_of(model, 4, rows=4, missing="none")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 0}', '{"version": 1}', '{"version": 1, "tables": []}', "\0", '{"version": 1e999}'],
)
def test_a_file_that_can_not_be_read_is_told_of_and_left_alone(model, measured, content, warned):
    pass_costs_file().parent.mkdir()
    pass_costs_file().write_text(content)
    costs = costs_of(model, 4, rows=1)
    assert "Delete the file or make it writable" in warned.text
    warned.clear()
    assert costs_of(model, 4, rows=1) is costs and not warned.records
    assert pass_costs_file().read_text() == content
    assert len(measured) == 1


def test_a_malformed_table_is_measured_anew_and_others_are_kept(model, measured, warned):
    costs_of(model, 4, rows=1)
    content = json.loads(pass_costs_file().read_text())
    [key] = content["tables"]
    content["tables"] = {"other": content["tables"][key], key: {"seconds": {"step": {"1": {"1": -1}}}}}
    pass_costs_file().write_text(json.dumps(content))
    costs_of(tiny_model(), 4, rows=1)
    assert "give a positive number" in warned.text
    assert len(measured) == 2
    kept = json.loads(pass_costs_file().read_text())["tables"]
    assert kept["other"] == content["tables"]["other"] and PassCosts.from_dict(kept[key]["seconds"])


def test_a_home_that_can_not_be_written_is_told_of(model, home, measured, warned):
    (home / "twotower").write_text("no folder")
    costs = costs_of(model, 4, rows=1)
    assert "measured once in every process" in warned.text
    assert costs_of(model, 4, rows=1) is costs
    assert (home / "twotower").read_text() == "no folder"


def test_a_write_that_fails_leaves_the_file_whole(model, monkeypatch, warned):
    costs_of(model, 4, rows=1)
    before = pass_costs_file().read_text()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(pass_costs.os, "replace", full)
    costs_of(model, 4, rows=4)
    assert "no space left" in warned.text
    assert pass_costs_file().read_text() == before
    assert [file.name for file in pass_costs_file().parent.iterdir()] == ["pass_costs.json"]


def test_rows_that_do_not_fit_into_the_memory_are_extrapolated(model, monkeypatch, warned):
    measure = pass_costs._measure_rows

    def scarce(model, lengths, rows, recorded):
        if rows > 4:
            raise torch.OutOfMemoryError("full")
        return measure(model, lengths, rows, recorded)

    monkeypatch.setattr(pass_costs, "_measure_rows", scarce)
    costs = PassCosts.measure(model, [2], [1, 4, 16])
    assert "passes over 16 rows do not fit into the memory" in warned.text
    assert costs.of("step", 1, 16) > 0


def test_the_processor_is_asked_its_name_once(model, monkeypatch):
    pass_costs._description(model)
    monkeypatch.setattr("pathlib.Path.read_text", None)
    pass_costs._description(model)
