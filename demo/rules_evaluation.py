"""Accuracy against denoiser passes of every unmasking rule on held-out word problems, as figures and as a curve."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..decoding.rules import NOISE_SCHEDULES, UNMASKING_DEFAULTS
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .evaluation import (
    accuracy_figures,
    answer,
    are_correct,
    end_ids,
    environment,
    pass_figures,
    percent,
    ratio_text,
    tokenized_batches,
    variant_of,
)
from .problems import held_out_problems

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


def compare_rules(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: int = 208,
    seed: int = 0,
    batch_size: int = 16,
    settings: dict[str, list[Setting]] = SETTINGS,
    track: Callable[[list[BatchEncoding], str], Iterable[BatchEncoding]] = lambda batches, _: batches,
) -> dict[str, Any]:
    """
    Answer held-out problems with every rule at every setting, greedily.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        problems, seed: which problems.
        batch_size: rows at a time; a row's answer does not depend on it.
        settings: per line, named after its rule, the parameters to try.
        track: as in [`evaluate`].

    Returns:
        A report that json can write: settings, `rows`, one per line and setting, and where it ran.
    """
    for name, number in (("problems", problems), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}; give at least 1")
    asked = held_out_problems(problems, seed)
    variants = {}
    for line, tried in settings.items():
        rule = line.split(",")[0].split()[0]
        options = {"mode": "mask_diffusion", "unmasking_rule": rule}
        seeds = partial(seeds_of_prompts, seed=seed) if rule == "posterior" else None
        for number, values in enumerate(tried):
            variants[line, number] = variant_of(model, f"{line} {number}", options | values, seeds)
    reference = variant_of(model, "ar", {"mode": "ar"})
    batches = tokenized_batches(asked, batch_size, tokenizer, model)
    runs = answer([reference, *variants.values()], batches[0], track(batches, "rules"), end_ids(model))
    base = are_correct(runs["ar"].answers, asked, tokenizer)
    rows = [
        {"line": line, **settings[line][number]}
        | accuracy_figures(are_correct(runs[variant.name].answers, asked, tokenizer), base)
        | pass_figures(runs[variant.name])
        for (line, number), variant in variants.items()
    ]
    settled = {"problems": problems, "seed": seed, "batch_size": batch_size}
    return settled | {"ar_accuracy": sum(base) / problems, "rows": rows} | environment(model)


def seeds_of_prompts(inputs: BatchEncoding, seed: int) -> list[int]:
    """A seed for each row that depends on its prompt and `seed` alone, so that no two problems share their noise."""
    rows = zip(inputs.input_ids, inputs.attention_mask.bool(), strict=True)
    return [crc32(str(ids[mask].tolist()).encode(), seed) for ids, mask in rows]


def rules_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a report."""
    parameters = {"steps_per_block", *UNMASKING_DEFAULTS}
    header = ["rule", "parameters", "exact match", "tokens/denoiser pass", "tokens/pass of either tower"]
    rows = [
        [
            row["line"],
            ", ".join(f"{name}={value}" for name, value in row.items() if name in parameters),
            percent(row["accuracy"], row["accuracy_stderr"]),
            ratio_text(row["tokens_per_denoiser_pass"]),
            ratio_text(row["tokens_per_pass"]),
        ]
        for row in report["rows"]
    ]
    return header, rows


def draw_rules(report: dict[str, Any], file: Path) -> None:
    """Write the curves as a PNG: accuracy, with one standard error, against tokens per denoiser pass."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('drawing needs matplotlib; pip install "twotower[eval]"') from error
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lines = list(dict.fromkeys(row["line"] for row in report["rows"]))
    for number, line in enumerate(lines):
        rows = sorted(
            (row for row in report["rows"] if row["line"] == line), key=lambda row: row["tokens_per_denoiser_pass"]
        )
        axes.errorbar(
            [row["tokens_per_denoiser_pass"] for row in rows],
            [100 * row["accuracy"] for row in rows],
            yerr=[100 * row["accuracy_stderr"] for row in rows],
            label=line,
            marker="os^Dv<>"[number % 7],
            linestyle=("-", "--", ":")[number // 7 % 3],
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
        )
    axes.axhline(100 * report["ar_accuracy"], color="black", linewidth=0.8, linestyle="-.", label="ar")
    axes.set_xlabel("new tokens per denoiser pass")
    axes.set_ylabel("exact match (%), bars: one standard error")
    axes.set_title(f"Unmasking rules on {report['problems']} held-out problems (seed {report['seed']}), greedy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, format="png")
