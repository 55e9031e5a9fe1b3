"""Which masked positions of a block to commit after a denoiser pass: pure functions over rows.

Shapes: B batch, S block.
"""

import torch


def commit_confident(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, threshold: float
) -> torch.Tensor:
    """
    Commit every prediction surer than a threshold, and always enough to finish in time.

    Of a row's masked positions the max(#{confidence > threshold}, 1, ceil(masked / steps_left)) surest are committed,
    so that the last step commits all of them. This is the rule of NVIDIA's released code (`generate_mask_diffusion`).

    Args:
        confidence: (B, S) probability of each position's prediction.
        masked: (B, S) bool, positions not committed yet.
        steps_left: denoiser passes this block may still take, this one included; >= 1.
        threshold: in (0, 1].

    Returns:
        (B, S) bool, a subset of `masked`; empty only in rows where nothing is masked.
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    sure = (confidence > threshold).sum(-1)
    due = (masked.sum(-1) + steps_left - 1) // steps_left
    count = torch.maximum(sure, due.clamp(min=1))
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return (rank < count[:, None]) & masked


from typing import NamedTuple, Any
import torch
class Prediction(NamedTuple):
    logits: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    log_probs: torch.Tensor | None = None
    scores: torch.Tensor | None = None
UNMASKING_DEFAULTS = {"unmasking_rule": "confidence", "confidence_threshold": 0.8}
def check_unmasking(config):
    threshold = config.confidence_threshold
    if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold <= 1):
        raise ValueError(f"confidence_threshold is {threshold!r}; it must lie in (0, 1]")
class UnmaskingRule(NamedTuple):
    threshold: float
    def timestep(self, masked, step, steps): return masked.float().mean(-1)
    def commit(self, p, masked, step, steps, uniform): return commit_confident(p.confidence, masked, steps-step, self.threshold)
def unmasking_rule(config): return UnmaskingRule(config.confidence_threshold)
