"""`twotower bench`: what is measured of a tiny model, in which order, and what is left where it is interrupted."""

import json
import sys

import pytest
from tiny import tiny_model, tiny_tokenizer
from transformers import CompileConfig

from twotower.bench import charts, running, sections
from twotower.bench.charts import draw_bench
from twotower.bench.running import Plan, bench, footnote, tables
from twotower.bench.sections import BASELINE, RELEASED, GrowingContext
from twotower.bench.texts import prompts

PLAN = Plan(batch_sizes=(1, 2), contexts=(20, 30), rounds=2, texts=2)
MODES = ["ar", "self_speculative", "mask_diffusion", "mock_ar"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("each kind once", vocab_size=280)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    """The report, and what it was after every step."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "MAX_NEW_TOKENS", 12)
        patch.setattr(sections, "OFF_TOKENS", 8)
        patch.setattr(sections, "CHUNK", 16)
        report = bench(model, tokenizer, PLAN, save=lambda report: saved.append(json.dumps(report)))
    return report, [json.loads(each) for each in saved]


def test_every_mode_is_timed_beside_transformers_and_the_released_loop(measured):
    report, _ = measured
    assert list(report["generation"]) == ["on, batch 1", "on, batch 2", "off, batch 1", "off, batch 2"]
    for name, step in report["generation"].items():
        alone = [RELEASED] if name.endswith(" 1") else []
        assert list(step["ways"]) == [*MODES, BASELINE, *alone]
        for way in step["ways"].values():
            for clock in ("wall", "cpu"):
                assert len(way[clock]["tokens_per_second"]["samples"]) == 2
                assert way[clock]["tokens_per_second"]["median"] > 0
        assert step["ways"]["ar"]["cpu"]["of_ar"]["samples"] == [1.0, 1.0]
        # Greedy text of the same weights.
        assert [step["ways"][way]["same_texts_as_ar"] for way in ("self_speculative", BASELINE)] == [2, 2]


def test_compiled_passes_are_timed_beside_the_others(model, tokenizer, monkeypatch):
    programs = CompileConfig(backend="eager", mode=None)
    monkeypatch.setattr(sections, "COMPILED", {"compile": True, "compile_config": programs})
    monkeypatch.setattr(sections, "OFF_TOKENS", 8)
    assert Plan(compiled=True).compiled and not Plan().compiled
    ways = sections.generation(model, tokenizer, "off", 1, texts=1, rounds=1, seed=7, compiled=True)["ways"]
    assert list(ways) == [*MODES, *(f"{mode}, compiled" for mode in MODES), BASELINE, RELEASED]
    for mode in MODES:
        passes = [ways[name]["denoiser_passes"] for name in (mode, f"{mode}, compiled")]
        assert passes[0] == passes[1]
        assert ways[f"{mode}, compiled"]["same_texts_as_ar"] == ways[mode]["same_texts_as_ar"]


def test_texts_off_the_training_have_one_length_whatever_comes(measured):
    report, _ = measured
    for step in (report["generation"]["off, batch 1"], report["generation"]["off, batch 2"]):
        assert {way["tokens"] for way in step["ways"].values()} == {2 * 8}
    released, ours = (report["generation"]["off, batch 1"]["ways"][way] for way in (RELEASED, "mask_diffusion"))
    assert released["denoiser_passes"] == ours["denoiser_passes"]
    rates = [way["cpu"]["tokens_per_second"]["samples"] for way in (ours, released)]
    assert ours["cpu"]["of_released_loop"]["samples"] == [mine / theirs for mine, theirs in zip(*rates, strict=True)]


def test_passes_are_timed_behind_each_context(measured, model):
    report, _ = measured
    assert list(report["context"]) == ["20", "30"]
    sizes = [step["key_value_bytes"] for step in report["context"].values()]
    assert sizes[1] / sizes[0] == 30 / 20
    assert all(
        list(step["ways"]) == ["block pass", "ar step", "reading keys and values"]
        for step in report["context"].values()
    )
    assert list(report["prefill"]) == ["20", "30"]
    assert list(report["prefill"]["20"]["ways"]) == ["at once", "in pieces of 16", BASELINE]


def test_a_context_grows_to_each_length(model):
    growing = GrowingContext(model, seed=0)
    first = growing.at(20, rounds=1)
    assert growing.cache.width == 22, "a step as a warm-up, and one that is timed"
    second = growing.at(40, rounds=1)
    assert growing.cache.width == 42
    assert second["seconds_to_read_up_to_here"]["wall"] > first["seconds_to_read_up_to_here"]["wall"] > 0


def test_the_report_is_saved_after_every_step(measured):
    report, saved = measured
    assert len(saved) == 8 and saved[-1] == report
    assert [each["finished"] for each in saved] == [False] * 7 + [True]
    assert list(saved[0]["generation"]) == ["on, batch 1"] and "context" not in saved[0]
    for name in ("machine", "versions", "commit", "date", "seed", "rounds", "texts", "batch_sizes", "contexts"):
        assert name in saved[0]


def test_tables_and_chart_show_what_there_is(measured, tmp_path):
    for report in (measured[1][0], measured[0]):
        for _, header, rows in tables(report):
            assert rows and all(len(row) == len(header) for row in rows)
        draw_bench({"model": "tiny", **report}, tmp_path / "bench.png")
        assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert len(tables(measured[0])) == 4
    assert "our mask_diffusion is " in footnote(measured[0]) and "times as fast (on, batch 1)" in footnote(measured[0])
    assert "our mask_diffusion" not in footnote({**measured[0], "generation": {}})


def test_a_drawing_names_what_computed(monkeypatch, tmp_path):
    """The demonstration checkpoint runs on the CPU, beside a GPU, too."""
    figure = charts.new_figure(11, 8, 20)
    monkeypatch.setattr(charts, "new_figure", lambda *_: figure)
    for device, name in (("cpu", "a CPU"), ("cuda:0", "a GPU")):
        report = {"model": "tiny", "dtype": "float32", "device": device, "machine": {"cpu": "a CPU", "gpu": "a GPU"}}
        charts.draw_bench(report, tmp_path / "bench.png")
        assert figure.get_suptitle() == f"tiny, float32, {name}"
        figure.clear()


def test_the_clock_is_the_threads_own_where_it_does_all_the_work(measured, model, tokenizer, monkeypatch):
    assert measured[0]["clock"] == "cpu"
    monkeypatch.setattr(running, "_steps", lambda *_: [])
    monkeypatch.setattr(running, "environment", lambda _: {"machine": {"threads": 2}})
    assert bench(model, tokenizer, PLAN)["clock"] == "wall"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rounds": 0}, "rounds is 0; give at least 1"),
        ({"texts": 0}, "texts is 0; give at least 1"),
        ({"batch_sizes": ()}, r"batch_sizes is \[\]; give whole numbers"),
        ({"contexts": (1, 0)}, r"contexts is \[1, 0\]; give whole numbers"),
        ({"contexts": (8, 8)}, r"contexts is \[8, 8\]; give each number once"),
    ],
)
def test_impossible_plans(settings, message):
    with pytest.raises(ValueError, match=message):
        Plan(**settings)


def test_drawing_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="drawing needs matplotlib"):
        charts.draw_bench({}, tmp_path / "bench.png")


def test_prompts_are_all_different():
    for kind in ("on", "off"):
        assert len(set(prompts(kind, 64, seed=7))) == 64
    assert prompts("on", 2, seed=7) != prompts("on", 2, seed=8)
