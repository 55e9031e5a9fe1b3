"""
Accuracy against passes on held-out tasks of one skill, as figures and as curves: of every unmasking rule, and of
drafts that the context tower verifies, exactly or not.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..bench.reports import new_figure
from ..decoding.rules import NOISE_SCHEDULES, UNMASKING_DEFAULTS
from ..evaluation.answers import Variant, answer, end_ids, tokenized, variant_of
from ..evaluation.figures import cells
from ..modeling_twotower import TwoTowerForBlockDiffusion
from . import evaluation
from .evaluation import RIGHT, asked_text, conditions, figures_of
from .held_out import PROBLEMS, SEEDS, asked_tasks
from .tasks import Skill

# Per line of the chart: its rule, and the values that trade passes for accuracy along it.
Setting = dict[str, Any]
SETTINGS: dict[str, list[Setting]] = {
    "confidence": [{"confidence_threshold": value} for value in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)],
    "fixed": [{"tokens_per_step": value} for value in (1, 2, 4, 8, 16)],
    "entropy": [{"entropy_bound": value} for value in (0.01, 0.1, 0.3, 1.0, 3.0)],
    "margin": [{"margin_threshold": value} for value in (0.3, 0.6, 0.8, 0.9, 0.98)],
    "factor": [{"factor": value} for value in (0.1, 0.3, 1.0, 2.0, 4.0)],
    "left_to_right": [{"confidence_threshold": value} for value in (0.5, 0.8, 0.9, 0.95, 0.99)],
    **{
        f"posterior, {schedule}": [{"noise_schedule": schedule, "steps_per_block": steps} for steps in (4, 8, 16)]
        for schedule in NOISE_SCHEDULES
    },
    **{
        f"predict_and_noise, {schedule}": [
            {"noise_schedule": schedule, "steps_per_block": steps} for steps in (4, 8, 16)
        ]
        for schedule in NOISE_SCHEDULES
    },
    **{
        f"predict_and_noise by {order}": [{"noising_order": order, "steps_per_block": steps} for steps in (4, 8, 16)]
        for order in ("margin", "adaptive")
    },
}
# Drafts of mode "self_speculative": at 1 those stay that are the context tower's choice, below also plausible others.
RATIOS = (1.0, 0.5, 0.1)
SAMPLED: Setting = {"do_sample": True, "temperature": 1.0}
AR_SAMPLED: Setting = {"mode": "ar", **SAMPLED}
VERIFIED: dict[str, list[Setting]] = {
    "verified, 1 draft pass": [{"draft_steps": 1, "acceptance_ratio": ratio} for ratio in RATIOS],
    "verified, up to 16 draft passes": [{"draft_steps": 16, "acceptance_ratio": ratio} for ratio in RATIOS],
    "verified, 1 draft pass, sampled": [{"draft_steps": 1, "acceptance_ratio": r, **SAMPLED} for r in RATIOS],
}


def compare_rules(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    skill: Skill = "words",
    problems: int = PROBLEMS,
    seeds: Sequence[int] = SEEDS,
    batch_size: int = 64,
    settings: dict[str, list[Setting]] = SETTINGS,
    verified: dict[str, list[Setting]] = VERIFIED,
    track: Callable[[list[BatchEncoding], str], Iterable[BatchEncoding]] = lambda batches, _: batches,
) -> dict[str, Any]:
    """
    Answer held-out tasks with every rule at every setting, greedily, and by drafts that are verified.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        skill, problems, seeds: which tasks, as for [`evaluate`]. The first seed is also that of what is drawn.
        batch_size: rows at a time; a row's answer does not depend on it.
        settings: per line, named after its rule, the parameters to try.
        verified: per line those of mode "self_speculative".
        track: as in [`evaluate`].

    Returns:
        A report that json can write: settings, `rows`, one per line and setting of rules, `verified_rows`, likewise,
        and where it ran. Retention is against mode "ar", of what is sampled against its sampled answers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    tasks = asked_tasks(skill, problems, seeds)
    draws = partial(seeds_of_prompts, seed=seeds[0])
    variants = _variants(model, settings, verified, draws)
    ways = [variant_of(model, "ar", {"mode": "ar"}), variant_of(model, "ar, sampled", AR_SAMPLED, draws)]
    ways += variants.values()
    batches = tokenized([task.prompt for task in tasks], batch_size, tokenizer, model)
    runs = answer(ways, batches[0], track(batches, "rules"), end_ids(model), evaluation.MAX_NEW_TOKENS)
    references = {way.name: "ar, sampled" if way.options.get("do_sample") else "ar" for way in ways}
    figures = figures_of(runs, tasks, tokenizer, seeds, references)
    rows = [
        {"line": line, **(settings if line in settings else verified)[line][number], **figures[variant.name]}
        for (line, number), variant in variants.items()
    ]
    settled: dict[str, Any] = {"skill": skill, "problems": problems, "seeds": list(seeds), "batch_size": batch_size}
    settled |= {"ar_accuracy": figures["ar"]["accuracy"], "ar_sampled_accuracy": figures["ar, sampled"]["accuracy"]}
    of_rules = sum(map(len, settings.values()))
    return settled | {"rows": rows[:of_rules], "verified_rows": rows[of_rules:]} | conditions(model)


def _variants(
    model: TwoTowerForBlockDiffusion,
    settings: dict[str, list[Setting]],
    verified: dict[str, list[Setting]],
    seeds: Callable[[BatchEncoding], list[int]],
) -> dict[tuple[str, int], Variant]:
    """By line and number of the setting on it."""
    variants = {}
    for line, tried in settings.items():
        rule = line.split(",")[0].split()[0]
        options: Setting = {"mode": "mask_diffusion", "unmasking_rule": rule}
        for number, values in enumerate(tried):
            drawn = seeds if rule == "posterior" else None
            variants[line, number] = variant_of(model, f"{line} {number}", options | values, drawn)
    # Whole blocks: what is fastest on this machine, as "auto" would choose, is not the question here.
    options = {"mode": "self_speculative", "draft_length": model.config.block_size}
    for line, tried in verified.items():
        for number, values in enumerate(tried):
            drawn = seeds if values.get("do_sample") else None
            variants[line, number] = variant_of(model, f"{line} {number}", options | values, drawn)
    return variants


def seeds_of_prompts(inputs: BatchEncoding, seed: int) -> list[int]:
    """A seed for each row that depends on its prompt and `seed` alone, so that no two problems share their noise."""
    rows = zip(inputs.input_ids, inputs.attention_mask.bool(), strict=True)
    return [crc32(str(ids[mask].tolist()).encode(), seed) for ids, mask in rows]


def rules_title(report: dict[str, Any]) -> str:
    return f"{asked_text(report, report['skill'])}, greedy where a line does not say sampled, {report['model']}"


def rules_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a report."""
    parameters = {"steps_per_block", "draft_steps", "acceptance_ratio", "temperature", *UNMASKING_DEFAULTS}
    header = ["rule", "parameters", RIGHT[report["skill"]], "of AR's", "whole text", "same text as AR"]
    header += ["tokens/denoiser pass", "tokens/pass of either tower"]
    rows = [
        [
            row["line"],
            ", ".join(f"{name}={value}" for name, value in row.items() if name in parameters),
            *cells(row, "accuracy", "retention", "whole_text.accuracy"),
            str(row["same_answers_as_ar"]),
            *cells(row, "tokens_per_denoiser_pass", "tokens_per_pass"),
        ]
        for row in [*report["rows"], *report["verified_rows"]]
    ]
    return header, rows


def draw_rules(report: dict[str, Any], file: Path) -> None:
    """Write the curves as a PNG: accuracy, with one standard error, against tokens per pass of either tower."""
    figure = new_figure(9, 6, 120)
    axes = figure.add_subplot()
    drawn = [*report["rows"], *report["verified_rows"]]
    lines = list(dict.fromkeys(row["line"] for row in drawn))
    for number, line in enumerate(lines):
        rows = sorted((row for row in drawn if row["line"] == line), key=lambda row: row["tokens_per_pass"])
        axes.errorbar(
            [row["tokens_per_pass"] for row in rows],
            [100 * row["accuracy"] for row in rows],
            yerr=[100 * (row["accuracy_stderr"] or 0) for row in rows],
            label=line,
            marker="os^Dv<>"[number % 7],
            linestyle=("-", "--", ":")[number // 7 % 3],
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
        )
    axes.axhline(100 * report["ar_accuracy"], color="black", linewidth=0.8, linestyle="-.", label="ar, greedy")
    axes.set_xlabel("new tokens per pass of either tower")
    axes.set_ylabel(f"{RIGHT[report['skill']]} right (%), bars: one standard error")
    axes.set_title(f"Unmasking rules and verified drafts on {asked_text(report, report['skill'])}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, format="png")
