"""Which masked positions of a block to commit after a denoiser pass: pure functions over rows, chosen by name.

A rule is one record in `UNMASKING_RULES`: its function, its parameters and their ranges, and whether it draws.

A rule ranks a row's masked positions and commits some of the first: the surest, the least uncertain, the leftmost. All
but NVIDIA's two scheduled ones commit at least max(1, ceil(masked / steps left)), so that the last step commits all.

Shapes: R rows, S block, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..cache_twotower import uploaded


@dataclass(eq=False)
class Prediction:
    """
    What one pass predicts for the positions of a block.

    Args:
        logits: (R, S, V) float32, untempered, the mask id at -inf; or (N, V), of `positions` alone.
        tokens: (R, S) the choice at each position.
        scores: (R, S, V) the logits after all logits processors; or (N, V).
        problems: (R, S) int8, why a position can hold no token: [`NOT_A_NUMBER`], [`FORBIDDEN`], [`NO_SCORE`], or 0
            where it can.
        certain: (R, S) bool, whether it was chosen after what is really chosen before it; None when all are.
        positions: (N,) of the R x S positions, those that are predicted; None for all. What follows is 0 elsewhere.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor | None = None
    problems: torch.Tensor | None = None
    certain: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    # Computed where something looks at them, each (R, S).

    @cached_property
    def confidence(self) -> torch.Tensor:
        """The probability of each choice by `logits`."""
        return self._at_positions(self.logits.softmax(-1).gather(-1, self._chosen)[..., 0])

    @cached_property
    def log_prob(self) -> torch.Tensor:
        """The log-probability of each choice by `scores`."""
        assert self.scores is not None
        return self._at_positions(self.scores.gather(-1, self._chosen)[..., 0] - self.scores.logsumexp(-1))

    @cached_property
    def margin(self) -> torch.Tensor:
        """The best probability less the second-best, by `logits`."""
        best = self.logits.softmax(-1).topk(2, dim=-1).values
        return self._at_positions(best[..., 0] - best[..., 1])

    @cached_property
    def entropy(self) -> torch.Tensor:
        """In nats, by `logits`."""
        return self._at_positions(entropy_of(self.logits))

    @property
    def _chosen(self) -> torch.Tensor:
        tokens = self.tokens if self.positions is None else self.tokens.flatten()[self.positions]
        return tokens[..., None]

    def _at_positions(self, values: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            return values
        return values.new_zeros(self.tokens.numel()).index_copy(0, self.positions, values).view(self.tokens.shape)


NOT_A_NUMBER, FORBIDDEN, DRAFT_NOT_A_NUMBER, NO_SCORE = 1, 2, 3, 4
NOISE_SCHEDULES = ("linear", "cosine", "exponential")
NOISING_ORDERS = ("confidence", "margin", "adaptive")


class Parameter(NamedTuple):
    """A parameter of rules: its default, what it must be, and whether a value is that."""

    default: Any
    requirement: str
    holds: Callable[[Any], bool]


def number_that(requirement: str, default: float, holds: Callable[[float], bool]) -> Parameter:
    """A parameter that is a number, and what else it must be."""
    return Parameter(
        default,
        f"it must {requirement}",
        # Of an int beyond what floats can be, nothing holds.
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value == math.inf or abs(value) <= sys.float_info.max)
            and holds(value)
        ),
    )


def whole_number_from(least: int, default: int | None = None) -> Parameter:
    return Parameter(
        default,
        f"it must be a whole number of at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def one_of(names: Sequence[str]) -> Parameter:
    return Parameter(names[0], f"use one of {', '.join(names)}", lambda value: value in names)


class UnmaskingRule:
    """
    A rule and its parameters.

    Args:
        config: with all names of [`UNMASKING_DEFAULTS`] set.
    """

    def __init__(self, config: Any):
        self.config = config
        chosen = config.unmasking_rule
        self.rule = Rule(_of_user, {}) if callable(chosen) else UNMASKING_RULES[chosen]

    def timestep(self, masked: torch.Tensor, step: int | Sequence[int], steps: int) -> torch.Tensor:
        """(R,) float32 the time the denoiser is told: the masked fraction, or what the noise schedule says."""
        if not self.rule.scheduled:
            return masked.float().mean(-1)
        noise = [noise_level(self.config.noise_schedule, number, steps) for number in _each_row(step, masked)]
        return uploaded(noise, masked.device, torch.float32)

    def commit(
        self,
        prediction: Prediction,
        masked: torch.Tensor,
        step: int | Sequence[int],
        steps: int,
        uniform: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            prediction: of this pass.
            masked: (R, S) bool, positions not committed yet.
            step: number of the pass within the block, from 0, of all rows or of each.
            steps: most passes of the block.
            uniform: gives (R, S) float32 noise in (0, 1), for rules that draw.

        Returns:
            (R, S) bool, a subset of `masked`; all of it on the last step.
        """
        if not isinstance(step, int) and min(step) == max(step):
            step = step[0]
        if step == steps - 1 and self.rule.commit is not _of_user:
            return masked
        if isinstance(step, int):
            left: Steps = steps - step
        else:  # more of them than positions are of no use, and might not fit into int64
            left = uploaded([min(steps - number, masked.shape[-1]) for number in step], masked.device)
        return self.rule.commit(self.config, prediction, masked, Progress(step, steps, left, uniform))


Steps = int | torch.Tensor  # one number for all rows, or (R,)


class Progress(NamedTuple):
    """
    How far a block is.

    Args:
        step: number of the pass within the block, from 0, of all rows or of each.
        steps: most passes of the block.
        left: how many are left, this one included.
        uniform: gives (R, S) float32 noise in (0, 1).
    """

    step: int | Sequence[int]
    steps: int
    left: Steps
    uniform: Callable[[], torch.Tensor]


class Rule(NamedTuple):
    """
    One unmasking rule.

    Args:
        commit: config, prediction, masked, progress -> what to commit.
        parameters: knobs of the generation config it goes by, with their defaults and ranges. Rules may share one.
        scheduled: whether the denoiser is told the noise schedule's time.
        draws: whether it draws, and so needs a seed.
    """

    commit: Callable[..., torch.Tensor]
    parameters: dict[str, Parameter]
    scheduled: bool = False
    draws: bool = False


def commit_confident(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: Steps, threshold: float
) -> torch.Tensor:
    """
    Commit every prediction surer than a threshold, and always enough to finish in time.

    Of a row's masked positions the max(#{confidence > threshold}, 1, ceil(masked / steps_left)) surest are committed,
    so that the last step commits all of them. This is the rule of NVIDIA's released code (`generate_mask_diffusion`).

    Args:
        confidence: (R, S) probability of each position's prediction.
        masked: (R, S) bool, positions not committed yet.
        steps_left: denoiser passes this block may still take, this one included; >= 1; also (R,).
        threshold: in (0, 1].

    Returns:
        (R, S) bool, a subset of `masked`; empty only in rows where nothing is masked.
    """
    return _commit_first(confidence, masked, (masked & (confidence > threshold)).sum(-1), steps_left)


def commit_fixed(confidence: torch.Tensor, masked: torch.Tensor, steps_left: Steps, tokens: int) -> torch.Tensor:
    """The `tokens` surest: a fixed number per step (Nie et al. 2025, LLaDA, arXiv 2502.09992); else as above."""
    return _commit_first(confidence, masked, torch.full_like(masked[:, 0], tokens, dtype=torch.long), steps_left)


def commit_low_entropy(entropy: torch.Tensor, masked: torch.Tensor, steps_left: Steps, bound: float) -> torch.Tensor:
    """
    By rising (R, S) entropy in nats, the most positions whose entropies without the largest sum to `bound` at most.

    That sum bounds the error of taking them as independent (Ben-Hamu et al. 2025, EB-Sampler, arXiv 2505.24857).
    """
    ascending = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True).values
    fits = ascending.nan_to_num(posinf=0.0).cumsum(-1) - ascending <= bound
    count = (fits & ascending.isfinite()).int().cumprod(-1).sum(-1)
    return _commit_first(-entropy, masked, count, steps_left)


def commit_by_margin(margin: torch.Tensor, masked: torch.Tensor, steps_left: Steps, threshold: float) -> torch.Tensor:
    """By falling (R, S) margin of the best over the second probability (Kim et al. 2025, arXiv 2502.06768)."""
    return _commit_first(margin, masked, (masked & (margin > threshold)).sum(-1), steps_left)


def commit_by_factor(confidence: torch.Tensor, masked: torch.Tensor, steps_left: Steps, factor: float) -> torch.Tensor:
    """
    The n surest for the largest n with (n + 1) (1 - c_n) < `factor`, c_n the n-th confidence.

    Below that bound greedy parallel and sequential decoding agree (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618).
    """
    descending = confidence.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).values
    numbers = torch.arange(1, masked.shape[-1] + 1, device=masked.device)
    count = ((numbers + 1) * (1 - descending) < factor).mul(numbers).amax(-1)
    return _commit_first(confidence, masked, count, steps_left)


def commit_left_to_right(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: Steps, threshold: float
) -> torch.Tensor:
    """
    The masked positions from the left up to the first whose confidence is not above `threshold`.

    The fixed order and the prefix taken at once are those of adaptive parallel decoding (Israel et al. 2025, APD,
    arXiv 2506.00413), which asks a second model instead of a threshold.
    """
    return commit_run(confidence > threshold, masked, steps_left)


def commit_run(wanted: torch.Tensor, masked: torch.Tensor, steps_left: Steps) -> torch.Tensor:
    """The masked positions from the left up to the first that is not `wanted` (R, S); else as above."""
    run = (wanted | ~masked).int().cumprod(-1).bool() & masked
    columns = torch.arange(masked.shape[-1], device=masked.device, dtype=torch.float32)
    return _commit_first(-columns.expand(masked.shape), masked, run.sum(-1), steps_left)


def commit_posterior(
    masked: torch.Tensor, step: int | Sequence[int], steps: int, schedule: str, uniform: torch.Tensor
) -> torch.Tensor:
    """
    Each masked position with probability (alpha_s - alpha_t) / (1 - alpha_t), whatever its confidence; last all.

    The ancestral sampler of masked diffusion (Sahoo et al. 2024, MDLM, arXiv 2406.07524), NVIDIA's "posterior".

    Args:
        uniform: (R, S) in (0, 1).
    """
    levels = [[noise_level(schedule, number + i, steps) for i in (0, 1)] for number in _each_row(step, masked)]
    last = [number == steps - 1 for number in _each_row(step, masked)]
    probability = [1.0 if ends else (now - then) / now for (now, then), ends in zip(levels, last, strict=True)]
    return masked & (uniform < uploaded(probability, masked.device, uniform.dtype)[:, None])


def commit_scheduled(
    priority: torch.Tensor, masked: torch.Tensor, step: int | Sequence[int], steps: int, schedule: str
) -> torch.Tensor:
    """
    Predict all, then mask again what ranks last until the noise schedule's share of the block is masked.

    One position at least is committed. "predict_and_noise" of NVIDIA's Megatron-LM code, after Arriola et al. 2025
    (E2D2, arXiv 2510.22852); (R, S) priority is the confidence or the margin.
    """
    due = [
        int(noise_level(schedule, number + 1, steps) * masked.shape[-1]) if number < steps - 1 else 0
        for number in _each_row(step, masked)
    ]
    return _commit_first(priority, masked, masked.sum(-1) - uploaded(due, masked.device), None)


def commit_adaptive(
    confidence: torch.Tensor, masked: torch.Tensor, step: int | Sequence[int], steps: int
) -> torch.Tensor:
    """The surest one per step in the first 40 % of the steps, then even shares: Megatron-LM's adaptive unmasking."""
    size = masked.shape[-1]  # so many steps left ask for one position at most
    left = [size if 5 * n < 2 * steps and n < steps - 1 else min(steps - n, size) for n in _each_row(step, masked)]
    one = torch.ones_like(masked[:, 0], dtype=torch.long)
    return _commit_first(confidence, masked, one, uploaded(left, masked.device))


def noise_level(schedule: str, step: int, steps: int) -> float:
    """Share of a block that is masked before a step, from 1 at step 0 to about 0 after the last: 1 - alpha."""
    time = 1 - step / steps * (1 - 1e-5)
    if schedule == "linear":
        return time
    if schedule == "cosine":
        return 1 - math.cos(time * math.pi / 2)
    return 1 - (math.exp(-3 * time) - math.exp(-3)) / (1 - math.exp(-3))


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """(R, S, V) -> (R, S) in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _commit_first(
    priority: torch.Tensor, masked: torch.Tensor, count: torch.Tensor, steps_left: Steps | None
) -> torch.Tensor:
    """Of each row's masked positions the `count` (R,) of highest priority, earlier ones first among equals; at least
    one, and with `steps_left` enough to finish in time."""
    count = count.clamp(min=1)
    if steps_left is not None:
        size = masked.shape[-1]  # more steps are of no use, and might not fit into int64
        steps_left = steps_left.clamp(max=size) if isinstance(steps_left, torch.Tensor) else min(steps_left, size)
        count = torch.maximum(count, (masked.sum(-1) + steps_left - 1) // steps_left)
    order = priority.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < count[:, None]) & masked


def _each_row(step: int | Sequence[int], masked: torch.Tensor) -> Sequence[int]:
    return [step] * len(masked) if isinstance(step, int) else step


def _of_user(c: Any, p: Prediction, masked: torch.Tensor, at: Progress) -> torch.Tensor:
    """A function's choice among the masked positions; on the last step all of them."""
    numbers = uploaded(_each_row(at.step, masked), masked.device)
    commit = c.unmasking_rule(p, masked.clone(), numbers, at.steps)
    if not isinstance(commit, torch.Tensor) or commit.dtype != torch.bool or commit.shape != masked.shape:
        given = f"{commit.dtype} of shape {tuple(commit.shape)}" if isinstance(commit, torch.Tensor) else repr(commit)
        raise ValueError(f"unmasking_rule returned {given}; return torch.bool of shape {tuple(masked.shape)}")
    return masked & (commit | (numbers == at.steps - 1)[:, None])


def _predict_and_noise(c: Any, p: Prediction, masked: torch.Tensor, at: Progress) -> torch.Tensor:
    if c.noising_order == "adaptive":
        return commit_adaptive(p.confidence, masked, at.step, at.steps)
    priority = p.margin if c.noising_order == "margin" else p.confidence
    return commit_scheduled(priority, masked, at.step, at.steps, c.noise_schedule)


THRESHOLD = {"confidence_threshold": number_that("lie in (0, 1]", 0.8, lambda value: 0 < value <= 1)}
SCHEDULE = {"noise_schedule": one_of(NOISE_SCHEDULES)}
UNMASKING_RULES: dict[str, Rule] = {
    "confidence": Rule(
        lambda c, p, m, at: commit_confident(p.confidence, m, at.left, c.confidence_threshold),
        THRESHOLD,
    ),
    "fixed": Rule(
        # More than positions are of no use, and might not fit into int64.
        lambda c, p, m, at: commit_fixed(p.confidence, m, at.left, min(c.tokens_per_step, m.shape[-1])),
        {"tokens_per_step": whole_number_from(1, 2)},
    ),
    "entropy": Rule(
        lambda c, p, m, at: commit_low_entropy(p.entropy, m, at.left, c.entropy_bound),
        {"entropy_bound": number_that("be a number of nats of at least 0", 0.1, lambda value: value >= 0)},
    ),
    "margin": Rule(
        lambda c, p, m, at: commit_by_margin(p.margin, m, at.left, c.margin_threshold),
        {"margin_threshold": number_that("lie in [0, 1]", 0.6, lambda value: 0 <= value <= 1)},
    ),
    "factor": Rule(
        lambda c, p, m, at: commit_by_factor(p.confidence, m, at.left, c.factor),
        {"factor": number_that("be a number above 0", 1.0, lambda value: value > 0)},
    ),
    "left_to_right": Rule(
        lambda c, p, m, at: commit_left_to_right(p.confidence, m, at.left, c.confidence_threshold),
        THRESHOLD,
    ),
    "posterior": Rule(
        lambda c, p, m, at: commit_posterior(m, at.step, at.steps, c.noise_schedule, at.uniform()),
        SCHEDULE,
        scheduled=True,
        draws=True,
    ),
    "predict_and_noise": Rule(
        _predict_and_noise, {**SCHEDULE, "noising_order": one_of(NOISING_ORDERS)}, scheduled=True
    ),
}
PARAMETERS = {name: parameter for rule in UNMASKING_RULES.values() for name, parameter in rule.parameters.items()}
UNMASKING_DEFAULTS: dict[str, Any] = {
    "unmasking_rule": "confidence",
    **{name: parameter.default for name, parameter in PARAMETERS.items()},
}

__all__ = [
    "NOISE_SCHEDULES",
    "PARAMETERS",
    "UNMASKING_DEFAULTS",
    "UNMASKING_RULES",
    "Parameter",
    "Prediction",
    "Rule",
    "UnmaskingRule",
    "commit_run",
    "number_that",
    "one_of",
    "whole_number_from",
]
