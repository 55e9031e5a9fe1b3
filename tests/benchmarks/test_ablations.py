"""`benchmarks/ablations.py` at toy size: what it trains, what it asks, and that it goes on where it was stopped."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from scripts import load_script

from twotower.training.recipe import recipe_of

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ablations.py"


@pytest.fixture(scope="module")
def ablations():
    return load_script(SCRIPT)


def test_problems_have_small_numbers_and_name_nobody_where_that_is_asked(ablations):
    problems = list(islice(ablations.problems(0, 19, named=False), 200))
    assert all(max(*problem.numbers, problem.result) < 20 for problem in problems)
    kinds = {problem.composition[0].removeprefix("template ") for problem in problems}
    assert kinds == {"1.1", "1.2", "1.3", "1.4", "1.5", "2.1", "2.4", "2.5"}
    named = {problem.composition[0] for problem in islice(ablations.problems(0, 99, named=True), 200)}
    assert {"template 2.2", "template 2.3"} < named


def test_every_ablation_is_a_recipe_of_its_own(ablations):
    base = {"folder": "f", "steps": 1, "data": {"files": ["x.jsonl"]}, "model": {"checkpoint": "demo"}}
    base = ablations.merged(base, ablations.DENOISER)
    changed = [each for each in ablations.ABLATIONS if each.changes]
    recipes = [recipe_of(ablations.merged(base, each.changes)) for each in changed]
    assert all(recipe != recipe_of(base) for recipe in recipes)
    assert len({(each.part, each.setting) for each in ablations.ABLATIONS}) == len(ablations.ABLATIONS)


def test_the_dry_run_measures_each_ablation_and_goes_on_behind_those_it_has(ablations, tmp_path, monkeypatch):
    parts = [each for each in ablations.ABLATIONS if each.part in ("masks", "capacity")][:2]
    file = tmp_path / "found.json"

    def report(*wanted):
        monkeypatch.setattr(ablations, "ABLATIONS", wanted)
        monkeypatch.setattr(sys, "argv", ["x", "--dry-run", "--json", str(file), "--work", str(tmp_path / "runs")])
        ablations.main()
        return json.loads(file.read_text())

    first = report(parts[0])
    both = report(*parts)
    assert both["rows"][0] == first["rows"][0]
    assert [(row["part"], row["setting"]) for row in both["rows"]] == [(each.part, each.setting) for each in parts]
    for row in both["rows"]:
        assert row["figures"]["ar right %"] == [0.0, 0.0] and row["figures"]["kept %"] == [None, None]
        assert row["figures"]["nats per answer"][0] > 50, "an untrained denoiser knows no answer"
    with pytest.raises(SystemExit, match=r"is of the scale .*; move it away"):
        monkeypatch.setattr(sys, "argv", ["x", "--json", str(file), "--work", str(tmp_path / "runs")])
        ablations.main()
