"""
The model card's table, measured: each of its benchmarks in `ar` and in mask diffusion, beside its two columns.

A cell, one benchmark in one mode, is written to the file of figures when it is done, all at once; a later run with the
same file goes on with the next. Within a cell lm-eval keeps every answer in a data base of its own beside that file,
from which an interrupted cell goes on.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from zlib import crc32

from ..bench.reports import write_json
from .benchmarks import CARD, Benchmark
from .examples import ASKED_ROWS, ROWS
from .figures import accuracy_figures, percent
from .harness import TooLong

try:
    import lm_eval
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError('evaluation.card needs lm-evaluation-harness; pip install "twotower[eval]"') from error

COLUMNS = ("ar", "diffusion")
# The card's operating point.
KNOBS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "mask_diffusion", "confidence_threshold": 0.8, "steps_per_block": 16},
}
FEWSHOT_SEED = 1234
# A dry run asks for little.
DRY_SHOTS, DRY_TOKENS = 2, 48


def settings_of(model: Any, name: str, limit: int | None, dry_run: bool) -> dict[str, Any]:
    """What cells of one file must agree in."""
    return {
        "model": name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "knobs": KNOBS,
        "limit": limit,
        "dry_run": dry_run,
        "fewshot_seed": FEWSHOT_SEED,
        "lm_eval": metadata.version("lm_eval"),
    }


def fingerprint(model: Any) -> int:
    """Of the config and a few numbers of every parameter that is in memory."""
    found = crc32(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        few = [] if parameter.is_meta else parameter.detach().flatten()[:8].float().tolist()
        found = crc32(f"{name}{tuple(parameter.shape)}{few}".encode(), found)
    return found


def open_report(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """
    What a former run has left in `file`, or an empty report.

    Raises:
        ValueError: where the file is no report of a card, or one of other settings.
    """
    if file is None or not file.is_file():
        return {"settings": settings, "cells": {}}
    try:
        report = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); give another --json") from error
    if not isinstance(report, dict) or not {"settings", "cells"} <= set(report):
        raise ValueError(f"{file} holds no figures of the card; give another --json")
    for name, value in json.loads(json.dumps(settings)).items():
        before = report["settings"].get(name)
        if before != value:
            raise ValueError(f"{file} was begun with {name} {before!r}, and now it is {value!r}; give another --json")
    return report


def measure_card(
    lms: dict[str, Any],
    report: dict[str, Any],
    file: Path | None = None,
    benchmarks: Sequence[Benchmark] = CARD,
    run_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """
    Fill in the cells a report has not.

    Args:
        lms: lm-eval's model of each column.
        report: [`open_report`]'s; its settings say whether it is a dry run, and how many questions a task gets.
        file: written after every cell; default nowhere.
        benchmarks: which lines.
        run_code: run programs that the model writes (see [`passes_tests`]); otherwise their cells stay empty.
        say: told what is done.

    Returns:
        The report: of every cell right or wrong per question, or why it is empty.
    """
    for benchmark in benchmarks:
        for column in COLUMNS:
            cells = report["cells"].setdefault(benchmark.key, {})
            if "right" in cells.get(column, {}):
                say(f"{benchmark.name}, {column}: there already")
                continue
            say(f"{benchmark.name}, {column}")
            requests = None if file is None else _requests_folder(file, benchmark, column, report["settings"])
            cells[column] = measure_cell(lms[column], benchmark, report["settings"], run_code, requests)
            report.setdefault("figures", {})[benchmark.key] = benchmark_figures(benchmark, cells)
            if file is not None:
                write_json(file, report)
                if "right" in cells[column] and requests is not None:
                    shutil.rmtree(requests, ignore_errors=True)
                    if requests.parent.is_dir() and not any(requests.parent.iterdir()):
                        requests.parent.rmdir()
    return report


def _requests_folder(file: Path, benchmark: Benchmark, column: str, settings: dict[str, Any]) -> Path:
    """Where the answers of a cell are kept until it is done: of these settings, and no others."""
    kind = crc32(json.dumps(settings, sort_keys=True).encode())
    return file.with_name(f"{file.name}.requests") / f"{benchmark.key}-{column}-{kind:08x}"


def measure_cell(
    lm: Any, benchmark: Benchmark, settings: dict[str, Any], run_code: bool, requests: Path | None
) -> dict[str, Any]:
    if benchmark.runs_code and not run_code:
        return {"empty": "runs what the model writes; allow it with --run-code"}
    shots = min(benchmark.shots, DRY_SHOTS) if settings["dry_run"] else benchmark.shots
    try:
        manager, tasks = load_tasks(benchmark, settings["dry_run"])
    except (ImportError, AssertionError, OSError, RuntimeError, ValueError) as error:
        # What lm-eval's tasks and datasets raise on loading; RuntimeError where a data set is a script.
        return {"empty": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    started = time.perf_counter()
    try:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=shots or None,
            gen_kwargs={"max_gen_toks": DRY_TOKENS} if settings["dry_run"] else None,
            limit=settings["limit"],
            use_cache=None if requests is None else str(requests / "answers"),
            bootstrap_iters=0,
            fewshot_random_seed=settings["fewshot_seed"],
        )
    except TooLong as error:
        return {"empty": str(error)}
    right = {
        task: "".join(
            str(round(sample[benchmark.metric])) for sample in samples if sample["filter"] == benchmark.filter
        )
        for task, samples in results["samples"].items()
    }
    return {
        "right": right,
        "shots": shots,
        "seconds": time.perf_counter() - started,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_tasks(benchmark: Benchmark, dry_run: bool) -> tuple[TaskManager, list[Any]]:
    """A manager that has read no more than it must, and task objects; of a dry run one, on rows of our own."""
    folder = Path(lm_eval.tasks.__file__).parent / (benchmark.folder or "")
    manager = TaskManager(include_defaults=False, include_path=None if benchmark.folder is None else [folder])
    specs: list[Any] = list(benchmark.tasks)
    if dry_run:
        own = {spec["task"]: spec for spec in specs if isinstance(spec, dict)}
        name = benchmark.dry_task or (next(iter(own)) if own else specs[0])
        local = {"custom_dataset": partial(_local_dataset, benchmark.key)}
        specs = [own[name] | local] if name in own else [{"group": "dry", "task": [{"task": name, **local}]}]
    return manager, list(manager.load(specs)["tasks"].values())


def _local_dataset(key: str, **_: Any) -> Any:
    from datasets import Dataset, DatasetDict

    shown, asked = Dataset.from_list(ROWS[key]()), Dataset.from_list(ASKED_ROWS.get(key, ROWS[key])())
    # Of WinoGrande what is asked is the validation split.
    return DatasetDict(dict.fromkeys(("train", "validation", "dev", "prompt"), shown) | {"test": asked})


def benchmark_figures(benchmark: Benchmark, cells: dict[str, Any]) -> dict[str, Any]:
    """For readers of the file: the card's columns and ours, mask diffusion's next to `ar`'s."""
    ar, diffusion = (cells.get(column, {}) for column in COLUMNS)
    card = {"ar": benchmark.ar, "diffusion": benchmark.diffusion, "shots": benchmark.shots}
    ours = {"ar": cell_figures(ar, ar), "diffusion": cell_figures(diffusion, ar)}
    return {"name": benchmark.name, "card": card, **ours}


def cell_figures(cell: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any] | None:
    """Of all questions of a benchmark together, also next to those of the reference; None where one is empty."""
    if "right" not in cell or "right" not in reference:
        return None
    ours, theirs = ([mark == "1" for marks in one["right"].values() for mark in marks] for one in (cell, reference))
    return {"questions": len(ours)} | accuracy_figures(ours, theirs)


def table(report: dict[str, Any], benchmarks: Sequence[Benchmark] = CARD) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the card's columns, ours, what is kept, and what to know."""
    header = [
        "benchmark",
        "shots",
        "questions",
        "card: ar",
        "ar",
        "card: diffusion",
        "diffusion",
        "card: kept",
        "kept",
        "",
    ]
    rows = []
    for benchmark in benchmarks:
        cells = report["cells"].get(benchmark.key, {})
        ar, diffusion = (cells.get(column, {"empty": "not run"}) for column in COLUMNS)
        ours, theirs, both = cell_figures(ar, ar), cell_figures(diffusion, diffusion), cell_figures(diffusion, ar)
        rows.append(
            [
                benchmark.name,
                str(ar.get("shots", diffusion.get("shots", benchmark.shots))),
                str((ours or theirs or {"questions": "-"})["questions"]),
                f"{benchmark.ar:.2f}",
                "-" if ours is None else percent(ours["accuracy"], ours["accuracy_stderr"]),
                f"{benchmark.diffusion:.2f}",
                "-" if theirs is None else percent(theirs["accuracy"], theirs["accuracy_stderr"]),
                percent(benchmark.diffusion / benchmark.ar, None),
                "-" if both is None else percent(both["retention"], both["retention_stderr"]),
                ar.get("empty") or diffusion.get("empty") or benchmark.note,
            ]
        )
    return header, rows


def title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    limit = "" if settings["limit"] is None else f", the first {settings['limit']} questions of a task"
    dry = "DRY RUN on questions of our own, " if settings["dry_run"] else ""
    return f"{dry}{settings['model']}{limit}, {settings['dtype']}, lm-eval {settings['lm_eval']}"


FOOTNOTE = (
    "± is one standard error over questions; what is kept is paired by question. The card's columns are NVIDIA's; it "
    "gives neither errors nor prompts, so prompts and what is taken for the answer are lm-eval's, or ours where said. "
    f"Greedy; examples of few-shot prompts drawn with seed {FEWSHOT_SEED}."
)
