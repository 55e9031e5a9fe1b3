"""
What ways to generate answer, side by side: every batch of prompts goes through all of them before the next one does,
so that a busy machine slows all of them alike. What they answered, and their passes and speed as figures.

Shapes: B batch, P prompt columns, N new columns.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..bench.timing import timed
from ..checkpoints.placement import prompts_device
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .figures import Estimate, mean, quotient


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
    What one variant answered.

    Args:
        answers: per problem, its new tokens up to and including end-of-text.
        denoiser_forwards: per problem; empty without a denoiser.
        context_forwards: per problem; empty where they are not counted.
        accepted_lengths: per problem, the mean of its cycles, NaN if it took none; empty without drafts.
        seconds: wall time of all its `generate` calls.
        cpu_seconds: likewise, of this thread's own time.
        batch_tokens, batch_seconds: of each batch.
    """

    answers: list[list[int]] = field(default_factory=list)
    denoiser_forwards: list[int] = field(default_factory=list)
    context_forwards: list[int] = field(default_factory=list)
    accepted_lengths: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    batch_tokens: list[int] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


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


def end_ids(model: TwoTowerForBlockDiffusion) -> set[int]:
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def answer(
    variants: Sequence[Variant],
    warm_up: BatchEncoding,
    batches: Iterable[BatchEncoding],
    ends: set[int],
    max_new_tokens: int,
) -> dict[str, Run]:
    """
    Let every variant answer every batch, batch after batch; before the clock runs, a few tokens of `warm_up`.

    Args:
        variants: in the order in which they take their turns.
        warm_up: one of the batches.
        batches: tokenized prompts.
        ends: ids after which a row's answer is over.
        max_new_tokens: of each row.
    """
    for variant in variants:
        # Blocks much larger than trained are refused where a text is shorter than they are.
        variant.generate(warm_up, max(8, variant.options.get("block_size") or 0))
    runs = {variant.name: Run() for variant in variants}
    for batch in batches:
        for variant in variants:
            run = runs[variant.name]
            (generated, rows), seconds = timed(partial(_answer_one, variant, batch, max_new_tokens))
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


def cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first end-of-text."""
    first = next((idx for idx, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def pass_figures(run: Run) -> dict[str, Any]:
    """Of both towers where they are counted, and of the denoiser alone; errors over problems."""
    tokens = [len(answer) for answer in run.answers]
    nothing = Estimate(None, None)
    passes = _passes(run)
    of_denoiser = quotient([tokens], [run.denoiser_forwards]) if run.denoiser_forwards else nothing
    per_pass = quotient([tokens], [passes]) if passes else nothing
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


def _passes(run: Run) -> list[int]:
    """Of both towers for each problem, the reading of prompt and blocks included; none where they are not counted."""
    denoiser = run.denoiser_forwards or [0] * len(run.context_forwards)
    return [ours + theirs for ours, theirs in zip(run.context_forwards, denoiser, strict=True)]


def fewer_passes(run: Run, reference: Run) -> dict[str, Any]:
    """How many times fewer passes over both towers than the reference's, problem by problem."""
    fewer = quotient([_passes(reference)], [_passes(run)]) if run.context_forwards else Estimate(None, None)
    return {"fewer_passes": fewer.value, "fewer_passes_stderr": fewer.stderr}


def speed_figures(run: Run, reference: Run) -> dict[str, Any]:
    """Tokens per second of wall time, and next to those of a reference timed side by side; errors over batches."""
    speed = quotient([run.batch_tokens], [run.batch_seconds])
    above: list[Sequence[float]] = [run.batch_tokens, reference.batch_seconds]
    speedup = quotient(above, [run.batch_seconds, reference.batch_tokens])
    return {
        "tokens_per_second": speed.value,
        "tokens_per_second_stderr": speed.stderr,
        "speedup": speedup.value,
        "speedup_stderr": speedup.stderr,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
    }


def same_answers(runs: Iterable[Run]) -> int:
    """How many problems got the same answer, token for token, in all of the runs."""
    answers = zip(*(run.answers for run in runs), strict=True)
    return sum(all(answer == first for answer in others) for first, *others in answers)


def tokenized(
    prompts: Sequence[str], batch_size: int, tokenizer: PreTrainedTokenizerBase, model: TwoTowerForBlockDiffusion
) -> list[BatchEncoding]:
    """Batches, padded on the left, where the model takes them."""
    layout: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    batches = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    device = prompts_device(model)
    return [tokenizer(list(batch), **layout, return_token_type_ids=False).to(device) for batch in batches]
