"""`benchmarks/gpu.py` at toy sizes: every section leaves a record, whatever becomes of the others."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
DATA = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gpu():
    return load_script(SCRIPT)


def predict(sizes, rates):
    return {"seconds": 1}


def run(gpu, measures, file, minutes=1.0, limit=30.0):
    sections = {name: gpu.Section(limit, predict, measure) for name, measure in measures.items()}
    return gpu.run_sections(sections, gpu.sizes_of(DATA, toy=True), DATA, file, True, minutes, {"commit": "x"})[
        "sections"
    ]


def good(bench):
    bench.record({"measured": 1})


def raises_half_way(bench):
    bench.record({"half": 1})
    raise ValueError("the card is too small")


def dies(bench):
    os._exit(9)


def hangs(bench):
    bench.record({"half": 1})
    time.sleep(60)


@pytest.fixture
def dry_run(gpu, tmp_path, monkeypatch):
    """
    What a dry run writes. It needs no new process, since each section has one; and of NVIDIA's texts it generates one
    in six, which are of all modes.
    """
    goldens = tmp_path / "data" / "goldens"
    goldens.mkdir(parents=True)
    for place in [DATA / "nvidia_30b", *(DATA / "goldens").iterdir()]:
        (goldens.parent / place.relative_to(DATA)).symlink_to(place)
    (goldens / "generations.json").unlink()
    cases = json.loads((DATA / "goldens" / "generations.json").read_text())
    (goldens / "generations.json").write_text(json.dumps(cases[::6]))

    def report(*flags):
        file = tmp_path / "gpu.json"
        arguments = ["--dry-run", "--data", str(goldens.parent), "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, *arguments])
        gpu.main()
        return json.loads(file.read_text())

    return report


def test_the_dry_run_leaves_a_record_of_every_section(gpu, dry_run):
    report = dry_run()
    assert report["sizes"] == "toy" and report["versions"] and "commit" in report
    assert {name: section["status"] for name, section in report["sections"].items()} == dict.fromkeys(
        gpu.SECTIONS, "done"
    )
    outcomes = {name: section["outcome"] for name, section in report["sections"].items()}
    assert outcomes["machine"]["copy_bytes_per_second"] > 0
    exact = outcomes["goldens"]
    assert exact["worst relative error of logits"] < 1e-4
    assert all(count["equal"] == count["of"] > 0 for name, count in exact.items() if isinstance(count, dict))
    assert len(exact) == 2 + 2 * len(gpu.MODES) and list(outcomes["goldens in bfloat16"]) == list(exact)
    assert list(outcomes["synchronisation"]) == list(gpu.MODES)
    sizes = gpu.sizes_of(DATA, toy=True)
    assert list(outcomes["layers"]) == [name for name, *_ in gpu.layer_passes(sizes)]
    assert all(timing["ms"] >= timing["host_ms"] > 0 for timing in outcomes["layers"].values())
    assert len(outcomes["memory"]) == 3
    for rows in sizes.rows:
        passes, found = outcomes["passes"][f"{rows} rows"], outcomes["modes"][f"{rows} rows"]
        assert list(passes) == ["ar step", "block pass", "block read"]
        chosen, experts = [each["experts_chosen"] for each in passes.values()], sizes.geometry["n_routed_experts"]
        assert sizes.geometry["num_experts_per_tok"] <= chosen[0] <= chosen[1] <= experts
        assert list(found) == list(gpu.tower_ways())
        for way, figures in found.items():
            passes, tokens = figures["denoiser_forwards"], rows * sizes.new_tokens
            if way.startswith("mask_diffusion"):
                assert tokens / passes == pytest.approx(float(way.split()[1]), rel=0.1)
            if way.startswith("self_speculative"):
                assert tokens / passes > int(way.split()[1]) * 0.75


def test_the_dry_run_of_compiled_passes_leaves_a_record(dry_run):
    (section,) = dry_run("--compiled")["sections"].values()
    assert section["status"] == "done" and list(section["outcome"]) == ["1 rows", "2 rows"]
    for found in section["outcome"].values():
        assert len(found) == 3 and all(figures["of_eager"] > 0 for figures in found.values())


def test_predictions_of_compiled_passes_are_above_those_of_eager_ones(gpu):
    sizes, rates = gpu.sizes_of(DATA, toy=False), gpu.RATES["H200"]
    compiled, eager = gpu.predict_compiled(sizes, rates), gpu.predict_modes(sizes, rates)
    assert list(compiled) == list(eager) and gpu.predict_compiled(sizes, None) == {}
    for rows, predicted in compiled.items():
        assert predicted["ar"]["tokens_per_second"] >= eager[rows]["ar"]["tokens_per_second"]


def test_what_fails_is_recorded_and_the_next_section_goes_on(gpu, tmp_path):
    file = tmp_path / "gpu.json"
    found = run(gpu, {"raises": raises_half_way, "dies": dies, "good": good}, file)
    assert found["raises"]["status"] == "failed" and "the card is too small" in found["raises"]["error"]
    assert found["raises"]["outcome"] == {"half": 1}
    assert (found["dies"]["status"], found["dies"]["error"], found["dies"]["outcome"]) == ("failed", "exit 9", {})
    assert (found["good"]["status"], found["good"]["outcome"]) == ("done", {"measured": 1})
    assert json.loads(file.read_text())["sections"] == found


def test_a_section_that_takes_too_long_is_ended_and_keeps_what_it_has(gpu, tmp_path):
    found = run(gpu, {"hangs": hangs, "good": good}, tmp_path / "gpu.json", limit=2.0)
    assert found["hangs"]["status"] == "out of time after 2 s" and found["hangs"]["outcome"] == {"half": 1}
    assert found["good"]["status"] == "done"


def test_predictions_are_written_before_anything_is_measured(gpu, tmp_path):
    found = run(gpu, {"good": good}, tmp_path / "gpu.json", minutes=0)
    assert found == {"good": {"status": "not begun", "prediction": {"seconds": 1}, "outcome": {}}}
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"] == found


def test_floors_at_the_released_geometry_are_those_counted_by_hand(gpu):
    """Gigabytes of one AR step, of a 16-token pass, and of that with 4 and 16 rows."""
    sizes = gpu.sizes_of(DATA, toy=False)
    moved = [gpu.pass_work(sizes, rows, tokens, 0)[0] / 1e9 for rows, tokens in ((1, 1), (1, 16), (4, 16), (16, 16))]
    assert moved == pytest.approx([6.6, 35, 60, 63], rel=0.03)


def test_predictions_of_a_known_card(gpu):
    sizes, rates = gpu.sizes_of(DATA, toy=False), gpu.RATES["H200"]
    layers = gpu.predict_layers(sizes, rates)
    assert list(layers) == [name for name, *_ in gpu.layer_passes(sizes)]
    assert all(each["floor_ms"] > 0 for each in layers.values())
    one = gpu.predict_modes(sizes, rates)["1 rows"]
    ratios = [one[f"mask_diffusion, {each} tokens per pass"]["of_ar"] for each in gpu.TOKENS_PER_PASS]
    assert ratios == sorted(ratios)
    for section in gpu.SECTIONS.values():
        json.dumps(section.predict(sizes, rates)), json.dumps(section.predict(sizes, None))
    assert sum(section.seconds for section in gpu.SECTIONS.values()) < 600


def test_a_folder_without_goldens_is_refused(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no goldens/; give a checkout's folder tests as --data"):
        gpu.main()
