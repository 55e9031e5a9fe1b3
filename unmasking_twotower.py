"""Which masked positions of a block to commit after a denoiser pass: pure functions over rows, chosen by name.

A rule ranks a row's masked positions and commits some of the first: the surest, the least uncertain, the leftmost. All
but NVIDIA's two scheduled ones commit at least max(1, ceil(masked / steps left)), so that the last step commits all.

Shapes: R rows, S block, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Prediction(NamedTuple):
    """
    What one pass predicts for the positions of a block.

    Args:
        logits: (R, S, V) float32, untempered, the mask id at -inf.
        tokens: (R, S) the choice at each position.
        confidence: (R, S) its probability by `logits`.
        log_probs: (R, S) its log-probability by `scores`; None unless recorded.
        scores: (R, S, V) the logits after all logits processors.
        problems: (R, S) int8, why a position can hold no token: of [`NO_PROBLEM`], [`NOT_A_NUMBER`], [`FORBIDDEN`].
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    log_probs: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    problems: torch.Tensor | None = None


NO_PROBLEM, NOT_A_NUMBER, FORBIDDEN, DRAFT_NOT_A_NUMBER = range(4)
NOISE_SCHEDULES = ("linear", "cosine", "exponential")
NOISING_ORDERS = ("confidence", "margin", "adaptive")
UNMASKING_DEFAULTS: dict[str, Any] = {
    "unmasking_rule": "confidence",
    "confidence_threshold": 0.8,
    "tokens_per_step": 2,
    "entropy_bound": 0.1,
    "margin_threshold": 0.6,
    "factor": 1.0,
    "noise_schedule": "linear",
    "noising_order": "confidence",
}


def check_unmasking(config: Any) -> None:
    """Raise a ValueError for an unknown name or a parameter out of range; None means unset."""
    choices = (
        ("unmasking_rule", tuple(UNMASKING_RULES)),
        ("noise_schedule", NOISE_SCHEDULES),
        ("noising_order", NOISING_ORDERS),
    )
    for name, allowed in choices:
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
    tokens = config.tokens_per_step
    if tokens is not None and not (is_whole(tokens) and tokens >= 1):
        raise ValueError(f"tokens_per_step is {tokens!r}; it must be a whole number of at least 1")
    ranges: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        ("confidence_threshold", "lie in (0, 1]", lambda value: 0 < value <= 1),
        ("margin_threshold", "lie in [0, 1]", lambda value: 0 <= value <= 1),
        ("entropy_bound", "be a number of nats of at least 0", lambda value: value >= 0),
        ("factor", "be a number above 0", lambda value: value > 0),
    )
    for name, requirement, holds in ranges:
        value = getattr(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and holds(value)):
            raise ValueError(f"{name} is {value!r}; it must {requirement}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class UnmaskingRule:
    """
    A rule and its parameters.

    Args:
        config: with all names of [`UNMASKING_DEFAULTS`] set.
    """

    def __init__(self, config: Any):
        self.config = config
        self.scheduled = config.unmasking_rule in ("posterior", "predict_and_noise")

    def timestep(self, masked: torch.Tensor, step: int, steps: int) -> torch.Tensor:
        """(R,) float32 the time the denoiser is told: the masked fraction, or what the noise schedule says."""
        if self.scheduled:
            noise = noise_level(self.config.noise_schedule, step, steps)
            return torch.full((len(masked),), noise, dtype=torch.float32, device=masked.device)
        return masked.float().mean(-1)

    def commit(
        self,
        prediction: Prediction,
        masked: torch.Tensor,
        step: int,
        steps: int,
        uniform: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            prediction: of this pass.
            masked: (R, S) bool, positions not committed yet.
            step: number of the pass, from 0.
            steps: most passes of the block.
            uniform: gives (R, S) float32 noise in (0, 1), for rules that draw.

        Returns:
            (R, S) bool, a subset of `masked`; all of it on the last step.
        """
        return UNMASKING_RULES[self.config.unmasking_rule](self.config, prediction, masked, step, steps, uniform)


def commit_confident(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, threshold: float
) -> torch.Tensor:
    """
    Commit every prediction surer than a threshold, and always enough to finish in time.

    Of a row's masked positions the max(#{confidence > threshold}, 1, ceil(masked / steps_left)) surest are committed,
    so that the last step commits all of them. This is the rule of NVIDIA's released code (`generate_mask_diffusion`).

    Args:
        confidence: (R, S) probability of each position's prediction.
        masked: (R, S) bool, positions not committed yet.
        steps_left: denoiser passes this block may still take, this one included; >= 1.
        threshold: in (0, 1].

    Returns:
        (R, S) bool, a subset of `masked`; empty only in rows where nothing is masked.
    """
    return _commit_first(confidence, masked, (masked & (confidence > threshold)).sum(-1), steps_left)


def commit_fixed(confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, tokens: int) -> torch.Tensor:
    """The `tokens` surest: a fixed number per step (Nie et al. 2025, LLaDA, arXiv 2502.09992); else as above."""
    return _commit_first(confidence, masked, torch.full_like(masked[:, 0], tokens, dtype=torch.long), steps_left)


def commit_low_entropy(entropy: torch.Tensor, masked: torch.Tensor, steps_left: int, bound: float) -> torch.Tensor:
    """
    By rising (R, S) entropy in nats, the most positions whose entropies without the largest sum to `bound` at most.

    That sum bounds the error of taking them as independent (Ben-Hamu et al. 2025, EB-Sampler, arXiv 2505.24857).
    """
    ascending = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True).values
    fits = ascending.nan_to_num(posinf=0.0).cumsum(-1) - ascending <= bound
    count = (fits & ascending.isfinite()).int().cumprod(-1).sum(-1)
    return _commit_first(-entropy, masked, count, steps_left)


def commit_by_margin(margin: torch.Tensor, masked: torch.Tensor, steps_left: int, threshold: float) -> torch.Tensor:
    """By falling (R, S) margin of the best over the second probability (Kim et al. 2025, arXiv 2502.06768)."""
    return _commit_first(margin, masked, (masked & (margin > threshold)).sum(-1), steps_left)


def commit_by_factor(confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, factor: float) -> torch.Tensor:
    """
    The n surest for the largest n with (n + 1) (1 - c_n) < `factor`, c_n the n-th confidence.

    Below that bound greedy parallel and sequential decoding agree (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618).
    """
    descending = confidence.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).values
    numbers = torch.arange(1, masked.shape[-1] + 1, device=masked.device)
    count = ((numbers + 1) * (1 - descending) < factor).mul(numbers).amax(-1)
    return _commit_first(confidence, masked, count, steps_left)


def commit_left_to_right(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, threshold: float
) -> torch.Tensor:
    """
    The masked positions from the left up to the first whose confidence is not above `threshold`.

    The fixed order and the prefix taken at once are those of adaptive parallel decoding (Israel et al. 2025, APD,
    arXiv 2506.00413), which asks a second model instead of a threshold.
    """
    return commit_run(confidence > threshold, masked, steps_left)


def commit_run(wanted: torch.Tensor, masked: torch.Tensor, steps_left: int) -> torch.Tensor:
    """The masked positions from the left up to the first that is not `wanted` (R, S); else as above."""
    run = (wanted | ~masked).int().cumprod(-1).bool() & masked
    columns = torch.arange(masked.shape[-1], device=masked.device, dtype=torch.float32)
    return _commit_first(-columns.expand(masked.shape), masked, run.sum(-1), steps_left)


def commit_posterior(
    masked: torch.Tensor, step: int, steps: int, schedule: str, uniform: torch.Tensor
) -> torch.Tensor:
    """
    Each masked position with probability (alpha_s - alpha_t) / (1 - alpha_t), whatever its confidence; last all.

    The ancestral sampler of masked diffusion (Sahoo et al. 2024, MDLM, arXiv 2406.07524), NVIDIA's "posterior".

    Args:
        uniform: (R, S) in (0, 1).
    """
    now, then = (noise_level(schedule, number, steps) for number in (step, step + 1))
    probability = 1.0 if step == steps - 1 else (now - then) / now
    return masked & (uniform < probability)


def commit_scheduled(
    priority: torch.Tensor, masked: torch.Tensor, step: int, steps: int, schedule: str
) -> torch.Tensor:
    """
    Predict all, then mask again what ranks last until the noise schedule's share of the block is masked.

    One position at least is committed. "predict_and_noise" of NVIDIA's Megatron-LM code, after Arriola et al. 2025
    (E2D2, arXiv 2510.22852); (R, S) priority is the confidence or the margin.
    """
    due = int(noise_level(schedule, step + 1, steps) * masked.shape[-1]) if step < steps - 1 else 0
    return _commit_first(priority, masked, masked.sum(-1) - due, steps_left=None)


def commit_adaptive(confidence: torch.Tensor, masked: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """The surest one per step in the first 40 % of the steps, then even shares: Megatron-LM's adaptive unmasking."""
    one_each = 5 * step < 2 * steps and step < steps - 1
    one = torch.ones_like(masked[:, 0], dtype=torch.long)
    return _commit_first(confidence, masked, one, None if one_each else steps - step)


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


def margin_of(logits: torch.Tensor) -> torch.Tensor:
    """(R, S, V) -> (R, S) best less second-best probability."""
    best = logits.softmax(-1).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def log_prob(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(R, S, V) scores -> (R, S) log-probability of the tokens by their softmax."""
    return scores.gather(-1, tokens[..., None])[..., 0] - scores.logsumexp(-1)


def _commit_first(
    priority: torch.Tensor, masked: torch.Tensor, count: torch.Tensor, steps_left: int | None
) -> torch.Tensor:
    """Of each row's masked positions the `count` (R,) of highest priority, earlier ones first among equals; at least
    one, and with `steps_left` enough to finish in time."""
    count = count.clamp(min=1)
    if steps_left is not None:
        steps_left = min(steps_left, masked.shape[-1])  # more are of no use, and might not fit into int64
        count = torch.maximum(count, (masked.sum(-1) + steps_left - 1) // steps_left)
    order = priority.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < count[:, None]) & masked


def _predict_and_noise(c: Any, p: Prediction, masked: torch.Tensor, step: int, steps: int, _: Any) -> torch.Tensor:
    if c.noising_order == "adaptive":
        return commit_adaptive(p.confidence, masked, step, steps)
    priority = margin_of(p.logits) if c.noising_order == "margin" else p.confidence
    return commit_scheduled(priority, masked, step, steps, c.noise_schedule)


# What each rule needs of a pass: config, prediction, masked, step, steps and noise -> what to commit.
UNMASKING_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "confidence": lambda c, p, m, i, n, _: commit_confident(p.confidence, m, n - i, c.confidence_threshold),
    "fixed": lambda c, p, m, i, n, _: commit_fixed(p.confidence, m, n - i, c.tokens_per_step),
    "entropy": lambda c, p, m, i, n, _: commit_low_entropy(entropy_of(p.logits), m, n - i, c.entropy_bound),
    "margin": lambda c, p, m, i, n, _: commit_by_margin(margin_of(p.logits), m, n - i, c.margin_threshold),
    "factor": lambda c, p, m, i, n, _: commit_by_factor(p.confidence, m, n - i, c.factor),
    "left_to_right": lambda c, p, m, i, n, _: commit_left_to_right(p.confidence, m, n - i, c.confidence_threshold),
    "posterior": lambda c, p, m, i, n, uniform: commit_posterior(m, i, n, c.noise_schedule, uniform()),
    "predict_and_noise": _predict_and_noise,
}

__all__ = [
    "UNMASKING_DEFAULTS",
    "UNMASKING_RULES",
    "Prediction",
    "UnmaskingRule",
    "check_unmasking",
    "commit_run",
    "is_whole",
    "log_prob",
]
