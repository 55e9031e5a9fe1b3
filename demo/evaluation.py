"""Figures of a checkpoint on held-out tasks of both skills: what is right, and for how many passes over both towers.

A word problem is right if its final result is; a function is right if it passes all of its tests. `whole_text` is the
share of answers that are the reference, letter for letter. Retention is next to mode "ar" on the same tasks; the
yardstick is transformers' own NemotronH with the same context tower's weights.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..bench.reports import environment, measured_on
from ..evaluation.answers import (
    Run,
    answer,
    end_ids,
    fewer_passes,
    pass_figures,
    same_answers,
    speed_figures,
    tokenized,
    variant_of,
)
from ..evaluation.baseline import baseline_variant
from ..evaluation.figures import accuracy_figures, cells, mean, percent, quotient
from ..generation_twotower import MODES
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .held_out import (
    PROBLEMS,
    SEEDS,
    asked_tasks,
    equations_in_training,
    has_unseen_equation,
    shares,
)
from .infilling import infilling_figures
from .marking import Marks
from .tasks import SKILLS, Skill, Task

# On which checkpoints and thresholds are chosen; what is reported has other seeds.
VALIDATION_SEED = 900
# The longest answer has 130 tokens.
MAX_NEW_TOKENS = 160
# Of a figure's name in reports, and in tables.
RIGHT = {"words": "final result", "code": "all tests"}

Track = Callable[[list[BatchEncoding], str], Iterable[BatchEncoding]]


def modes(model: TwoTowerForBlockDiffusion) -> dict[str, dict[str, Any]]:
    """Options of `generate` by name, of all modes and operating points; "ar" comes first: retention is against it."""
    # Whole blocks: what "auto" would choose on this machine is not the question here.
    size = model.config.block_size
    draft = {"mode": "self_speculative", "draft_steps": 1, "draft_length": size}
    # The embedded checkpoint was trained on such blocks, too. Passes and thresholds are chosen on the validation seed.
    two = {**draft, "block_size": 2 * size, "draft_length": 2 * size, "draft_steps": 2, "confidence_threshold": 0.6}
    return {
        "ar": {"mode": "ar"},
        "self_speculative": draft,
        "self_speculative, acceptance 0.5": {**draft, "acceptance_ratio": 0.5},
        "self_speculative, 2 blocks in 2 passes": two,
        "self_speculative, 2 blocks in 2 passes, acceptance 0.5": {**two, "acceptance_ratio": 0.5},
        "mask_diffusion, threshold 0.8": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
        "mask_diffusion, threshold 0.95": {"mode": "mask_diffusion", "confidence_threshold": 0.95},
        "mask_diffusion, left to right, threshold 0.75": {
            "mode": "mask_diffusion",
            "unmasking_rule": "left_to_right",
            "confidence_threshold": 0.75,
        },
        "mock_ar": {"mode": "mock_ar"},
    }


def evaluate(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: int = PROBLEMS,
    seeds: Sequence[int] = SEEDS,
    skills: Sequence[Skill] = SKILLS,
    batch_size: int = 64,
    unseen: bool = False,
    only: Sequence[str] = (),
    track: Track = lambda batches, _: batches,
) -> dict[str, Any]:
    """
    Answer held-out tasks in every mode, and by transformers; of code, fill gaps, too.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        problems: how many tasks per skill, at least 1 per seed.
        seeds: of the tasks, which share them out evenly.
        skills: "words", "code".
        batch_size: rows at a time; answers do not depend on it.
        unseen: also count the word problems with a step that no training problem has, which are drawn again for it.
        only: of the modes those, beside "ar", and not transformers; default all. Gaps are filled by mask diffusion.
        track: wraps the batches and a description, to show progress; default shows none.

    Returns:
        A report that json can write: settings, `rows`, one per skill and variant, `infilling`, and where it ran.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    if unknown := set(only) - set(MODES):
        raise ValueError(f"modes are {', '.join(sorted(unknown))}; use {', '.join(MODES)}")
    asked = {skill: asked_tasks(skill, problems, seeds) for skill in skills}
    variants = [
        variant_of(model, name, options)
        for name, options in modes(model).items()
        if not only or options["mode"] in ("ar", *only)
    ]
    variants += [] if only else [baseline_variant(model)]
    rows: list[dict[str, Any]] = []
    for skill, tasks in asked.items():
        batches = tokenized([task.prompt for task in tasks], batch_size, tokenizer, model)
        runs = answer(variants, batches[0], track(batches, skill), end_ids(model), MAX_NEW_TOKENS)
        figures = figures_of(runs, tasks, tokenizer, seeds, unseen=unseen)
        rows += [{"skill": skill, "name": each.name, **each.options, **figures[each.name]} for each in variants]
    report: dict[str, Any] = {
        "problems": problems,
        "seeds": list(seeds),
        "skills": list(skills),
        "batch_size": batch_size,
        "rows": rows,
    }
    # A gap has a token of its block on either side.
    if "code" in asked and (not only or "mask_diffusion" in only) and model.config.block_size > 2:
        report["infilling"] = infilling_figures(model, tokenizer, asked["code"], seeds[0], batch_size)
    return report | conditions(model)


def conditions(model: TwoTowerForBlockDiffusion) -> dict[str, Any]:
    """The length limit, and what [`environment`] says."""
    return {"max_new_tokens": MAX_NEW_TOKENS, **environment(model)}


def figures_of(
    runs: dict[str, Run],
    tasks: Sequence[Task],
    tokenizer: Any,
    seeds: Sequence[int],
    references: dict[str, str] | None = None,
    unseen: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Every run's figures: answers, passes and speed, on their own and next to a reference's.

    Args:
        runs: by name, on the same tasks.
        tokenizer: to read the answers.
        seeds: that have shared out the tasks.
        references: each run's by name; default "ar".
        unseen: as of [`evaluate`].
    """
    marks = {name: Marks.of(run.answers, tasks, tokenizer) for name, run in runs.items()}
    places = _unseen_places(tasks) if unseen and tasks[0].skill == "words" else None
    figures = {}
    for name, run in runs.items():
        reference = (references or {}).get(name, "ar")
        figures[name] = answer_figures(marks[name], marks[reference], tasks, seeds, places)
        figures[name] |= pass_figures(run) | fewer_passes(run, runs[reference]) | speed_figures(run, runs[reference])
        figures[name] |= {"same_answers_as_ar": same_answers([runs[reference], run])}
    return figures


def answer_figures(
    marks: Marks, reference: Marks, tasks: Sequence[Task], seeds: Sequence[int], unseen: Sequence[int] | None = None
) -> dict[str, Any]:
    """
    Of answers: what is right, also `by_seed` and of the tasks at the places `unseen`; the `whole_text`; of code the
    share of `tests_passed`; each on its own and next to the reference's.
    """
    figures = accuracy_figures(marks.right, reference.right)
    figures["whole_text"] = accuracy_figures(marks.whole, reference.whole)
    if tasks[0].skill == "code":
        share, kept = mean(marks.tests), quotient([marks.tests], [reference.tests])
        figures["tests_passed"] = {
            "share": share.value,
            "share_stderr": share.stderr,
            "retention": kept.value,
            "retention_stderr": kept.stderr,
        }
    figures["by_seed"], start = {}, 0
    for seed, count in zip(seeds, shares(len(tasks), len(seeds)), strict=True):
        figures["by_seed"][str(seed)] = _part(marks, reference, range(start, start + count))
        start += count
    if unseen is not None:
        figures["with_unseen_equations"] = _part(marks, reference, unseen)
    return figures


def _part(marks: Marks, reference: Marks, places: Sequence[int]) -> dict[str, Any]:
    """Of the tasks at some places, of which there may be none."""
    ours, theirs = ([each.right[place] for place in places] for each in (marks, reference))
    return {"problems": len(places)} | (accuracy_figures(ours, theirs) if places else {})


def _unseen_places(tasks: Sequence[Task]) -> list[int]:
    seen = equations_in_training()
    return [place for place, task in enumerate(tasks) if has_unseen_equation(task, seen)]


# What is shown.


def title(report: dict[str, Any], skill: Skill) -> str:
    return f"{asked_text(report, skill)}, greedy, {report['model']}"


def asked_text(report: dict[str, Any], skill: Skill) -> str:
    seeds = report["seeds"]
    what = {"words": "word problems", "code": "functions to write"}[skill]
    return f"{report['problems']} held-out {what} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def table(report: dict[str, Any], skill: Skill) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one skill."""
    tests = skill == "code"
    header = ["mode", RIGHT[skill], "of AR's", *["tests"] * tests, "whole text", "passes/problem", "fewer than AR's"]
    header += ["same text as AR", "tokens/s", "of AR's"]
    quality = ["accuracy", "retention", *["tests_passed.share"] * tests, "whole_text.accuracy"]
    quality += ["passes_per_problem", "fewer_passes"]
    rows = [
        [
            row["name"],
            *cells(row, *quality),
            str(row["same_answers_as_ar"]),
            *cells(row, "tokens_per_second", "speedup"),
        ]
        for row in report["rows"]
        if row["skill"] == skill
    ]
    return header, rows


def footnote(report: dict[str, Any], speeds: bool = True) -> str:
    """What the figures of a report are of, with or without its speeds."""
    counted = f"tokens/s counts tokens up to end-of-text, {report['batch_size']} rows at a time. " if speeds else ""
    return (
        "± is one standard error, of what is next to AR's paired by problem or batch. Held out: no training problem "
        "has these numbers, in any order, no chain this composition of steps, no training function these parts. "
        f"{_unseen_text(report)}Passes are over both towers, the reading of prompt and blocks included; drafts are "
        "whole blocks, of one pass where nothing else is said. transformers' NemotronH is the same context tower. "
        f"{counted}{_infilling_text(report)}\n"
        f"{measured_on(report)}; {report['date']}"
    )


def _unseen_text(report: dict[str, Any]) -> str:
    parts = [row["with_unseen_equations"] for row in report["rows"] if "with_unseen_equations" in row]
    if not parts:
        return ""
    count = parts[0]["problems"]
    right = f", of which ar gets {percent(parts[0]['accuracy'], parts[0]['accuracy_stderr'])}" if count else ""
    return f"{count} word problems have a step that no training problem has{right}. "


def _infilling_text(report: dict[str, Any]) -> str:
    if "infilling" not in report:
        return ""
    parts = (f"{percent(row['accuracy'], row['accuracy_stderr'])} by {name}" for name, row in infilled(report))
    return f"Functions with a gap that pass their tests once it is filled: {', '.join(parts)}."


def infilled(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(report["infilling"]["rows"].items())
