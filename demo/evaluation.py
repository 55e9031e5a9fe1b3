"""Figures of a checkpoint on held-out word problems: accuracy, passes and speed of every mode, side by side.

Every batch of problems goes through all variants before the next batch does, so that a busy machine slows all of them
alike. The yardstick is transformers' own NemotronH with the same context tower's weights.

Shapes: B batch, P prompt columns, N new columns.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerBase

from ..bench.reports import environment
from ..bench.timing import timed
from ..configuration_twotower import TwoTowerConfig
from ..evaluation.figures import Estimate, accuracy_figures, mean, percent, plus_minus, quotient
from ..evaluation.held_out import (
    PROBLEMS,
    SEEDS,
    Seen,
    has_unseen_equation,
    seen_in_training,
    shares,
    strictly_held_out,
)
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .problems import Problem, extract_result

# The longest answer has under 70 tokens.
MAX_NEW_TOKENS = 96
BASELINE = "transformers NemotronH"


class Generated(NamedTuple):
    """
    `sequences` (B, P + N), padded after a row's end; (B,) passes of each tower and, of mode "self_speculative", mean
    tokens accepted per cycle; None where there is none.
    """

    sequences: torch.Tensor
    denoiser_forwards: torch.Tensor | None = None
    context_forwards: torch.Tensor | None = None
    accepted_lengths: torch.Tensor | None = None


@dataclass(frozen=True)
class Variant:
    """
    One way to answer.

    Args:
        name: as reported.
        options: of `generate`, as reported.
        generate: tokenized prompts and the most new tokens -> [`Generated`].
    """

    name: str
    options: dict[str, Any]
    generate: Callable[[BatchEncoding, int], Generated]


@dataclass
class Run:
    """
    What one variant answered at one batch size.

    Args:
        answers: per problem, its new tokens up to and including end-of-text.
        denoiser_forwards: per problem; empty without a denoiser.
        context_forwards: per problem; empty where they are not counted.
        accepted_lengths: per problem, the mean of its cycles, NaN if it took none; empty without drafts.
        seconds: wall time of all its `generate` calls, the median if the run was repeated.
        cpu_seconds: likewise, of this thread's own time.
        seconds_of_runs: of each repetition.
        batch_tokens, batch_seconds: of each batch, likewise.
    """

    answers: list[list[int]] = field(default_factory=list)
    denoiser_forwards: list[int] = field(default_factory=list)
    context_forwards: list[int] = field(default_factory=list)
    accepted_lengths: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    seconds_of_runs: list[float] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def evaluate(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: int = PROBLEMS,
    seed: int | Sequence[int] = SEEDS,
    batch_sizes: Sequence[int] = (1, 16),
    repeats: int = 1,
    track: Callable[[list[BatchEncoding], str], Iterable[BatchEncoding]] = lambda batches, _: batches,
) -> dict[str, Any]:
    """
    Answer held-out problems in every mode, and by transformers, at every batch size.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token; batches are padded on the left.
        problems: how many, at least 1 per seed.
        seed: of the problems; several share them out evenly.
        batch_sizes: accuracy and passes are those of the first one.
        repeats: how often everything is timed, in turn; speeds are those of the median run.
        track: wraps the batches of one batch size and a description, to show progress; default shows none.

    Returns:
        A report that json can write: settings, one row per variant, and where it ran.
    """
    if problems < 1:
        raise ValueError(f"problems is {problems}; give at least 1")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes is {list(batch_sizes)}; give whole numbers of at least 1")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    asked, whose = asked_problems(problems, seed)
    variants = [*twotower_variants(model), baseline_variant(model)]
    runs: dict[int, dict[str, Run]] = {}
    for batch_size in batch_sizes:
        batches = tokenized_batches(asked, batch_size, tokenizer, model)
        runs[batch_size] = median_runs(
            [
                answer(variants, batches[0], track(batches, f"batch {batch_size}, run {number + 1}"), end_ids(model))
                for number in range(repeats)
            ]
        )
    settings = {**whose, "batch_sizes": list(batch_sizes), "repeats": repeats}
    return settings | summarize(variants, runs, asked, tokenizer, whose["seeds"]) | conditions(model)


def asked_problems(problems: int, seed: int | Sequence[int]) -> tuple[list[Problem], dict[str, Any]]:
    """Those to ask, and for a report how many, of which seeds, and how many have a step training has not shown."""
    if problems < 1:
        raise ValueError(f"problems is {problems}; give at least 1")
    seeds = [seed] if isinstance(seed, int) else list(seed)
    seen = seen_in_training()
    asked = strictly_held_out(problems, seeds, seen)
    unseen = sum(has_unseen_equation(problem, seen) for problem in asked)
    return asked, {
        "problems": problems,
        "seed": seeds[0],
        "seeds": seeds,
        "held_out": "no training problem has these numbers, in any order",
        "with_unseen_equations": unseen,
        "with_unseen_equations_share": unseen / problems,
    }


_TOKENIZED: dict[str, Any] = {
    "return_tensors": "pt",
    "padding": True,
    "padding_side": "left",
    "return_token_type_ids": False,
}


def twotower_variants(model: TwoTowerForBlockDiffusion) -> list[Variant]:
    """The four modes, mask diffusion at two operating points; "ar" comes first: retention is against it."""
    settings: dict[str, dict[str, Any]] = {
        "ar": {"mode": "ar"},
        "self_speculative": {"mode": "self_speculative", "draft_steps": 1},
        "mask_diffusion, threshold 0.8": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
        "mask_diffusion, threshold 0.95": {"mode": "mask_diffusion", "confidence_threshold": 0.95},
        "mock_ar": {"mode": "mock_ar"},
    }

    return [variant_of(model, name, options) for name, options in settings.items()]


def variant_of(
    model: TwoTowerForBlockDiffusion,
    name: str,
    options: dict[str, Any],
    seeds: Callable[[BatchEncoding], list[int]] | None = None,
) -> Variant:
    """`generate` with some options, greedy unless they say otherwise; `seeds` are the rows', of what draws."""

    def generate(inputs: BatchEncoding, max_new_tokens: int) -> Generated:
        output: Any = model.generate(
            **inputs,
            **{"do_sample": False, **options},
            seed=None if seeds is None else seeds(inputs),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        denoiser_forwards = None if options["mode"] == "ar" else output.denoiser_forwards
        return Generated(output.sequences, denoiser_forwards, output.context_forwards, output.accepted_lengths)

    return Variant(name, options, generate)


def baseline_variant(model: TwoTowerForBlockDiffusion, options: dict[str, Any] | None = None) -> Variant:
    """The context tower run by transformers' own model and `generate`, with some options of that."""
    baseline: Any = context_tower_in_transformers(model)

    def generate(inputs: BatchEncoding, max_new_tokens: int) -> Generated:
        return Generated(baseline.generate(**inputs, **options or {}, max_new_tokens=max_new_tokens, do_sample=False))

    return Variant(BASELINE, {}, generate)


def context_tower_in_transformers(model: TwoTowerForBlockDiffusion) -> NemotronHForCausalLM:
    """transformers' NemotronH over the context tower's own tensors, with the Mamba step clamped as the config says."""
    with torch.device("meta"):
        baseline = NemotronHForCausalLM(nemotron_config(model.config))
    state = {f"model.{name}": tensor for name, tensor in model.context_tower.state_dict().items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in model.context_lm_head.state_dict().items()}
    baseline.load_state_dict(state, assign=True)
    for layer in baseline.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = model.config.time_step_limit
    # `generate` would warn about a padding id that differs from the model's own.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(baseline.generation_config, name, getattr(model.generation_config, name))
    return baseline.eval()


def nemotron_config(config: TwoTowerConfig) -> NemotronHConfig:
    """The fields of a TwoTower's config that describe one tower."""
    own = {"model_type", "architectures", "auto_map", *(TwoTowerConfig.__annotations__)}
    return NemotronHConfig(**{name: value for name, value in config.to_dict().items() if name not in own})


def end_ids(model: TwoTowerForBlockDiffusion) -> set[int]:
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def answer(
    variants: Sequence[Variant],
    warm_up: BatchEncoding,
    batches: Iterable[BatchEncoding],
    ends: set[int],
    max_new_tokens: int | None = None,
) -> dict[str, Run]:
    """
    Let every variant answer every batch, batch after batch; before the clock runs, a few tokens of `warm_up`.

    Args:
        variants: in the order in which they take their turns.
        warm_up: one of the batches.
        batches: tokenized prompts.
        ends: ids after which a row's answer is over.
        max_new_tokens: of each row; default `MAX_NEW_TOKENS`.
    """
    for variant in variants:
        variant.generate(warm_up, 8)
    runs = {variant.name: Run() for variant in variants}
    for batch in batches:
        for variant in variants:
            run = runs[variant.name]
            (generated, rows), seconds = timed(partial(_answer_one, variant, batch, max_new_tokens or MAX_NEW_TOKENS))
            run.batch_seconds.append(seconds.wall)
            run.seconds += seconds.wall
            run.cpu_seconds += seconds.cpu
            run.answers += [cut_after_end(row, ends) for row in rows]
            run.batch_tokens.append(sum(map(len, run.answers[-len(rows) :])))
            if generated.denoiser_forwards is not None:
                run.denoiser_forwards += generated.denoiser_forwards.tolist()
            if generated.context_forwards is not None:
                run.context_forwards += generated.context_forwards.tolist()
            if generated.accepted_lengths is not None:
                run.accepted_lengths += generated.accepted_lengths.tolist()
    return runs


def _answer_one(variant: Variant, batch: BatchEncoding, max_new_tokens: int) -> tuple[Generated, list[list[int]]]:
    generated = variant.generate(batch, max_new_tokens)
    # Fetching the tokens waits for the device.
    return generated, generated.sequences[:, batch.input_ids.shape[1] :].tolist()


def median_runs(repetitions: list[dict[str, Run]]) -> dict[str, Run]:
    """The first repetition's answers, with the median of the repetitions' times."""
    runs = repetitions[0]
    for name, run in runs.items():
        run.seconds_of_runs = [repetition[name].seconds for repetition in repetitions]
        run.seconds = statistics.median(run.seconds_of_runs)
        of_batches = zip(*(repetition[name].batch_seconds for repetition in repetitions), strict=True)
        run.batch_seconds = [statistics.median(seconds) for seconds in of_batches]
    return runs


def cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first end-of-text."""
    first = next((idx for idx, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def summarize(
    variants: Sequence[Variant],
    runs: dict[int, dict[str, Run]],
    problems: list[Problem],
    tokenizer: Any,
    seeds: Sequence[int] = (0,),
) -> dict[str, Any]:
    """
    Turn runs into figures.

    Args:
        variants: the first, "ar", is what retention is against; the last is transformers.
        runs: per batch size and variant name; accuracy and passes are taken from the first batch size.
        problems: in the order of the answers.
        tokenizer: to read the answers.
        seeds: that have shared out the problems.

    Returns:
        `rows`, one per variant, each with `same_answers_as_first`, how many answers of the first variant it gave
        token for token, `speedup`, tokens per second over the first variant's, and `speedup_over_transformers`.
    """
    first = next(iter(runs.values()))
    correct = {variant.name: are_correct(first[variant.name].answers, problems, tokenizer) for variant in variants}
    whole = {variant.name: are_whole(first[variant.name].answers, problems, tokenizer) for variant in variants}
    reference, yardstick = variants[0].name, variants[-1].name
    rows = [
        {"name": variant.name, **variant.options}
        | answer_figures(correct, whole, variant.name, reference, problems, seeds)
        | pass_figures(first[variant.name])
        | speed_figures({size: runs[size][variant.name] for size in runs})
        | {"same_answers_as_first": same_answers([first[reference], first[variant.name]])}
        | speedup_figures(runs, variant.name, "speedup", reference)
        | speedup_figures(runs, variant.name, "speedup_over_transformers", yardstick)
        for variant in variants
    ]
    return {"rows": rows}


def are_correct(answers: list[list[int]], problems: list[Problem], tokenizer: Any) -> list[bool]:
    """Whether the final result is right."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [extract_result(text) == problem.result for text, problem in zip(texts, problems, strict=True)]


def are_whole(answers: list[list[int]], problems: list[Problem], tokenizer: Any) -> list[bool]:
    """Whether the whole text is the worked answer, names and things included."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() == problem.answer for text, problem in zip(texts, problems, strict=True)]


def answer_figures(
    correct: dict[str, list[bool]],
    whole: dict[str, list[bool]],
    name: str,
    reference: str,
    problems: list[Problem],
    seeds: Sequence[int],
    seen: Seen | None = None,
) -> dict[str, Any]:
    """
    Of one variant's answers: the final result's figures, those of the `whole_text`, the final result's `by_seed`, and
    its figures on the problems that have a step training has not shown; each on its own and next to the reference's.
    """
    seen = seen or seen_in_training()
    figures = accuracy_figures(correct[name], correct[reference])
    figures["whole_text"] = accuracy_figures(whole[name], whole[reference])
    figures["by_seed"], start = {}, 0
    for seed, count in zip(seeds, shares(len(problems), len(seeds)), strict=True):
        part = slice(start, start + count)
        figures["by_seed"][str(seed)] = {"problems": count} | accuracy_figures(
            correct[name][part], correct[reference][part]
        )
        start += count
    unseen = [place for place, problem in enumerate(problems) if has_unseen_equation(problem, seen)]
    figures["with_unseen_equations"] = {"problems": len(unseen)}
    if unseen:
        ours, theirs = ([correct[each][place] for place in unseen] for each in (name, reference))
        figures["with_unseen_equations"] |= accuracy_figures(ours, theirs)
    return figures


def pass_figures(run: Run) -> dict[str, Any]:
    """Of both towers where they are counted, and of the denoiser alone; errors over problems."""
    tokens = [len(answer) for answer in run.answers]
    nothing = Estimate(None, None)
    per_pass, of_denoiser, passes = nothing, nothing, list[int]()
    if run.denoiser_forwards:
        of_denoiser = quotient([tokens], [run.denoiser_forwards])
    if run.context_forwards:
        denoiser = run.denoiser_forwards or [0] * len(tokens)
        passes = [ours + theirs for ours, theirs in zip(run.context_forwards, denoiser, strict=True)]
        per_pass = quotient([tokens], [passes])
    accepted = mean([length for length in run.accepted_lengths if not math.isnan(length)])
    return {
        "tokens": run.tokens,
        "denoiser_passes": sum(run.denoiser_forwards) if run.denoiser_forwards else None,
        "context_passes": sum(run.context_forwards) if run.context_forwards else None,
        "tokens_per_denoiser_pass": of_denoiser.value,
        "tokens_per_denoiser_pass_stderr": of_denoiser.stderr,
        "tokens_per_pass": per_pass.value,
        "tokens_per_pass_stderr": per_pass.stderr,
        "passes_per_problem": mean(passes).value,
        "passes_per_problem_stderr": mean(passes).stderr,
        "mean_accepted_length": accepted.value,
        "mean_accepted_length_stderr": accepted.stderr,
    }


def speed_figures(runs: dict[int, Run]) -> dict[str, Any]:
    """Of one variant's runs by batch size; errors over batches."""
    return {
        "tokens_per_second": {str(size): run.tokens_per_second for size, run in runs.items()},
        "tokens_per_second_stderr": {str(size): _speed(run).stderr for size, run in runs.items()},
        "tokens_per_second_of_runs": {
            str(size): [run.tokens / seconds for seconds in run.seconds_of_runs] for size, run in runs.items()
        },
        "seconds": {str(size): run.seconds for size, run in runs.items()},
        "seconds_of_runs": {str(size): run.seconds_of_runs for size, run in runs.items()},
        "same_answers_at_every_batch_size": same_answers(runs.values()),
    }


def _speed(run: Run) -> Estimate:
    return quotient([run.batch_tokens], [run.batch_seconds]) if run.batch_seconds else Estimate(None, None)


def speedup_figures(runs: dict[int, dict[str, Run]], name: str, figure: str, over: str) -> dict[str, Any]:
    """Of one variant over another, timed side by side, by batch size; paired by batch."""
    ratios: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for size, run in runs.items():
        ours, theirs = run[name], run[over]
        ratios[str(size)] = ours.tokens_per_second / theirs.tokens_per_second
        errors[str(size)] = None
        if ours.batch_seconds:
            above: list[Sequence[float]] = [ours.batch_tokens, theirs.batch_seconds]
            errors[str(size)] = quotient(above, [ours.batch_seconds, theirs.batch_tokens]).stderr
    return {figure: ratios, f"{figure}_stderr": errors}


def same_answers(runs: Iterable[Run]) -> int:
    """How many problems got the same answer, token for token, in all of the runs."""
    answers = zip(*(run.answers for run in runs), strict=True)
    return sum(all(answer == first for answer in others) for first, *others in answers)


def conditions(model: TwoTowerForBlockDiffusion) -> dict[str, Any]:
    """The length limit, and what [`environment`] says."""
    return {"max_new_tokens": MAX_NEW_TOKENS, **environment(model)}


def title(report: dict[str, Any]) -> str:
    return f"{asked_text(report)}, greedy, {report['model']}"


def asked_text(report: dict[str, Any]) -> str:
    seeds = report.get("seeds") or [report["seed"]]  # older reports have one
    named = ", ".join(map(str, seeds))
    return f"{report['problems']} held-out problems (seed{'s' * (len(seeds) > 1)} {named})"


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a report."""
    sizes = [str(size) for size in report["batch_sizes"]]
    header = ["mode", "final result", "of AR's", "whole text", "tokens/denoiser pass", "tokens/pass of either tower"]
    header += ["same text as AR", *(f"tokens/s, batch {size}" for size in sizes)]
    rows = [
        [
            row["name"],
            percent(row["accuracy"], row["accuracy_stderr"]),
            percent(row["retention"], row["retention_stderr"]),
            percent(row["whole_text"]["accuracy"], row["whole_text"]["accuracy_stderr"]),
            plus_minus(row["tokens_per_denoiser_pass"], row["tokens_per_denoiser_pass_stderr"]),
            plus_minus(row["tokens_per_pass"], row["tokens_per_pass_stderr"]),
            str(row["same_answers_as_first"]),
            *(_speed_text(row, size) for size in sizes),
        ]
        for row in report["rows"]
    ]
    return header, rows


def footnote(report: dict[str, Any]) -> str:
    """What the figures of a report are of."""
    machine, versions = report["machine"], report["versions"]
    first = report["batch_sizes"][0]
    processor = machine["gpu"] if report["device"].startswith("cuda") else machine["cpu"]
    return (
        f"± is one standard error, of ratios and speedups paired by problem or batch; accuracy and passes at batch "
        f"{first}. {held_out_text(report)}transformers' NemotronH is the same context tower. "
        f"{_accepted_text(report)}tokens/s counts tokens up to end-of-text, all problems at every batch size, "
        f"the median of {report['repeats']} interleaved runs, and next to AR's.\n"
        f"{report['dtype']} on {report['device']}, {processor}, {machine['threads']} of "
        f"{machine['cores']} cores; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{report['date']}"
    )


def held_out_text(report: dict[str, Any]) -> str:
    unseen, share = report["with_unseen_equations"], report["with_unseen_equations_share"]
    return f"Held out: {report['held_out']}; {unseen} ({100 * share:.0f} %) have a step that no training problem has. "


def _accepted_text(report: dict[str, Any]) -> str:
    lengths = {row["name"]: row["mean_accepted_length"] for row in report["rows"]}
    return "".join(
        f"A cycle of {name} adds {length:.2f} tokens on average. "
        for name, length in lengths.items()
        if length is not None
    )


def _speed_text(row: dict[str, Any], size: str) -> str:
    speed = plus_minus(row["tokens_per_second"][size], row["tokens_per_second_stderr"][size], digits=1)
    return f"{speed} ({plus_minus(row['speedup'][size], row['speedup_stderr'][size])}x)"


def tokenized_batches(
    problems: list[Problem], batch_size: int, tokenizer: PreTrainedTokenizerBase, model: TwoTowerForBlockDiffusion
) -> list[BatchEncoding]:
    return tokenized([problem.prompt for problem in problems], batch_size, tokenizer, model)


def tokenized(
    prompts: list[str], batch_size: int, tokenizer: PreTrainedTokenizerBase, model: TwoTowerForBlockDiffusion
) -> list[BatchEncoding]:
    starts = range(0, len(prompts), batch_size)
    return [tokenizer(prompts[start : start + batch_size], **_TOKENIZED).to(model.device) for start in starts]
