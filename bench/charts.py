"""A report of `twotower bench` as one PNG: speeds next to ar's by batch size, and growth with the context."""

from pathlib import Path
from typing import Any

from .reports import new_figure, processor
from .texts import KINDS

TITLES = {"on": "held-out problems", "off": "text it knows nothing of"}


def draw_bench(report: dict[str, Any], file: Path) -> None:
    """Write what there is so far; bars are quartiles of the rounds."""
    figure = new_figure(11, 8, 110)
    panels = figure.subplots(2, 2).flat
    for kind, axes in zip(KINDS, panels, strict=False):
        _draw_speeds(axes, kind, report)
    for section, axes in zip(("context", "prefill"), panels, strict=False):
        _draw_growth(axes, section, report)
    figure.suptitle(f"{report['model']}, {report['dtype']}, {processor(report)}", fontsize=10)
    figure.savefig(file, format="png")


def _draw_speeds(axes: Any, kind: str, report: dict[str, Any]) -> None:
    steps = {
        int(name.rsplit(" ", 1)[1]): step["ways"]
        for name, step in report.get("generation", {}).items()
        if name.startswith(f"{kind},")
    }
    for way in dict.fromkeys(way for ways in steps.values() for way in ways):
        points = {size: ways[way][report["clock"]]["of_ar"] for size, ways in steps.items() if way in ways}
        _draw_line(axes, points, way)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(steps), [str(size) for size in steps])
    axes.set_xlabel("batch size")
    axes.set_ylabel("tokens/s, of ar's")
    axes.set_title(TITLES[kind], fontsize=10)
    _finish(axes)


def _draw_growth(axes: Any, section: str, report: dict[str, Any]) -> None:
    steps = {int(name): step["ways"] for name, step in report.get(section, {}).items()}
    for way in dict.fromkeys(way for ways in steps.values() for way in ways):
        _draw_line(axes, {length: ways[way][report["clock"]] for length, ways in steps.items()}, way)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of context" if section == "context" else "tokens of prompt")
    axes.set_ylabel("milliseconds")
    axes.set_title("one pass behind a context" if section == "context" else "reading a prompt", fontsize=10)
    _finish(axes)


def _draw_line(axes: Any, points: dict[int, dict[str, Any]], label: str) -> None:
    medians = [point["median"] for point in points.values()]
    bars = [[abs(point["median"] - point["quartiles"][side]) for point in points.values()] for side in (0, 1)]
    axes.errorbar(list(points), medians, yerr=bars, label=label, marker="o", markersize=4, linewidth=1, elinewidth=0.6)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


__all__ = ["draw_bench"]
