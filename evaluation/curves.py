"""
What a knob trades: accuracy, passes over both towers and speed of a checkpoint on held-out tasks of one skill against
the threshold, block size and steps of mask diffusion and against the relaxed acceptance of self-speculation.

Every batch goes through all settings before the next one does, so that a busy machine slows all of them alike, and
everything is compared with `ar` on the same problems.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..bench.reports import measured_on, new_figure
from ..demo import evaluation
from ..demo.evaluation import RIGHT, asked_text, conditions, figures_of
from ..demo.held_out import PROBLEMS, SEEDS, asked_tasks
from ..demo.tasks import Skill
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .answers import answer, end_ids, tokenized, variant_of
from .figures import cells


class Line(NamedTuple):
    """One knob and the values it takes; `options` are what stays."""

    knob: str
    values: tuple[float, ...]
    options: dict[str, Any]


DIFFUSION = {"mode": "mask_diffusion", "confidence_threshold": 0.8, "steps_per_block": 16}
LINES = {
    "threshold": Line("confidence_threshold", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), DIFFUSION),
    "block size": Line("block_size", (4, 8, 16, 32), DIFFUSION),
    "steps": Line("steps_per_block", (1, 2, 4, 8, 16), DIFFUSION),
    "acceptance": Line("acceptance_ratio", (1.0, 0.7, 0.5, 0.3, 0.1, 0.03), {"mode": "self_speculative"}),
}


def measure_curves(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    skill: Skill = "words",
    problems: int = PROBLEMS,
    seeds: Sequence[int] = SEEDS,
    batch_size: int = 64,
    lines: dict[str, Line] = LINES,
    track: Callable[[list[BatchEncoding], str], Iterable[BatchEncoding]] = lambda batches, _: batches,
) -> dict[str, Any]:
    """
    Answer held-out tasks, greedily, at every value of every knob.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        skill, problems, seeds: which tasks, as for `demo.evaluation.evaluate`.
        batch_size: rows at a time, of which speeds are.
        lines: by name.
        track: shows progress.

    Returns:
        A report that json can write: settings, `rows`, the first of which is `ar`, and where it ran.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    tasks = asked_tasks(skill, problems, seeds)
    # Whole blocks: what "auto" would choose on this machine is not the question here.
    fixed = {"self_speculative": {"draft_length": model.config.block_size}}
    settings: dict[str, dict[str, Any]] = {"ar": {"line": "ar", "knob": None, "value": None, "mode": "ar"}}
    for name, line in lines.items():
        for value in line.values:
            options = {**line.options, **fixed.get(line.options["mode"], {}), line.knob: value}
            settings[f"{name} {value}"] = {"line": name, "knob": line.knob, "value": value, **options}
    variants = [
        variant_of(model, name, {key: value for key, value in setting.items() if key not in ("line", "knob", "value")})
        for name, setting in settings.items()
    ]
    batches = tokenized([task.prompt for task in tasks], batch_size, tokenizer, model)
    runs = answer(variants, batches[0], track(batches, "curves"), end_ids(model), evaluation.MAX_NEW_TOKENS)
    figures = figures_of(runs, tasks, tokenizer, seeds)
    rows = [{**setting, **figures[name]} for name, setting in settings.items()]
    asked = {"skill": skill, "problems": problems, "seeds": list(seeds)}
    return {**asked, "batch_size": batch_size, "rows": rows} | conditions(model)


def title(report: dict[str, Any]) -> str:
    return f"{asked_text(report, report['skill'])}, greedy, batch {report['batch_size']}, {report['model']}"


def footnote(report: dict[str, Any]) -> str:
    """What the figures of a report are of."""
    return (
        "± is one standard error over problems, of speeds over batches; what is next to AR's is paired. Passes are "
        "over both towers. Thresholds, block sizes and steps are of mask_diffusion, which stays at threshold 0.8, "
        "the block size trained and 16 steps; acceptance is of self_speculative.\n"
        f"{measured_on(report)}; {report['date']}"
    )


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a report."""
    header = ["", "", RIGHT[report["skill"]], "of AR's", "whole text", "passes/problem", "fewer than AR's"]
    header += ["tokens/s", "of AR's"]
    figures = ("accuracy", "retention", "whole_text.accuracy", "passes_per_problem", "fewer_passes")
    rows = [
        [
            row["line"],
            "" if row["value"] is None else str(row["value"]),
            *cells(row, *figures, "tokens_per_second", "speedup"),
        ]
        for row in report["rows"]
    ]
    return header, rows


def draw(report: dict[str, Any], file: Path) -> None:
    """Write the curves as a PNG: both parts of the answers against passes saved and against speed."""
    figure = new_figure(12, 9, 110)
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    across = {
        "times fewer passes over both towers than ar": lambda row: (row["fewer_passes"], row["fewer_passes_stderr"]),
        "times as many tokens/s as ar": lambda row: (row["speedup"], row["speedup_stderr"]),
    }
    parts = {
        f"{RIGHT[report['skill']]} right (%)": lambda row: row,
        "whole text right (%)": lambda row: row["whole_text"],
    }
    for axes_row, (part_name, part) in zip(panels, parts.items(), strict=True):
        for axes, place in zip(axes_row, across.values(), strict=True):
            _draw_lines(axes, report["rows"], place, part)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(part_name)
    for axes, name in zip(panels[-1], across, strict=True):
        axes.set_xlabel(name)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{asked_text(report, report['skill'])}; bars: one standard error")
    figure.savefig(file, format="png")


def _draw_lines(axes: Any, rows: list[dict[str, Any]], place: Any, part: Any) -> None:
    axes.axhline(100 * part(rows[0])["accuracy"], color="black", linewidth=0.8, linestyle="-.", label="ar")
    for name in dict.fromkeys(row["line"] for row in rows[1:]):
        points = [(*place(row), part(row), row["value"]) for row in rows if row["line"] == name]
        axes.errorbar(
            [x for x, *_ in points],
            [100 * figures["accuracy"] for *_, figures, _ in points],
            xerr=[error or 0 for _, error, *_ in points],
            yerr=[100 * (figures["accuracy_stderr"] or 0) for *_, figures, _ in points],
            label=name,
            marker="o",
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
        )
        for x, _, figures, value in points:
            axes.annotate(f"{value:g}", (x, 100 * figures["accuracy"]), (3, 3), textcoords="offset points", fontsize=6)
