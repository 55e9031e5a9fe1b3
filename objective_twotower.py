"""The masked-diffusion training objective: [`diffusion_loss`] of a model, and the pure functions it is made of.

Corruption and loss follow NVIDIA's Megatron-LM training: t ~ U[0.001, 1], every token masked with probability t,
mean cross-entropy over masked positions against the token at the same position. Here each block draws its own t. What
a [`DiffusionObjective`] adds to it are options.

Shapes: B batch, T tokens (a multiple of S), S block, R blocks, M masked positions, V vocabulary, H hidden size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from .compat_twotower import logger
from .decoding.rules import commit_confident, entropy_of
from .decoding.sampling import content_seeds, derived_seeds, uniform_noise
from .inputs_twotower import check_attention_mask, check_ids
from .kernels.precision import at_least_float32

MIN_TIMESTEP = 1e-3
LossWeighting = Literal["mean", "inverse_timestep"]


@dataclass(frozen=True)
class DiffusionObjective:
    """
    What the training loss is, beyond NVIDIA's; `model.objective` is the one that `model(..., labels=...)` computes.

    Args:
        weighting: "mean" or "inverse_timestep", see [`weighted_mean`].
        corruptions: how often each block is masked and denoised per pass of the context tower.
        distillation: w in [0, 1], how much of the cross-entropy is replaced by the divergence from the context
            tower's own next-token distribution at the same position, (1 - w) CE + w T^2 KL (Hinton et al. 2015,
            arXiv 1503.02531). Its logits come from the one frozen pass that is taken anyway. For text of high entropy,
            of which a token tells less than a distribution does; the first token of a text has no such distribution.
        distillation_temperature: T, which divides both towers' logits in the divergence.
        confidence: weight of the entropy of those predictions that are right (LLaDA 2.0's confidence-aware loss, arXiv
            2512.15745; dParallel, arXiv 2509.26488). It makes them sure enough to be committed together, and leaves
            alone what is wrong or undecided.
        decoded_masks: share of blocks, in [0, 1], that are masked as decoding leaves them: all masked, denoised once
            without gradients, predictions committed by the released code's rule, and trained on the rest. For one
            more denoiser pass per batch. Where the pass commits a whole block, it is masked at random as the others.
        decoded_tokens: what such a block shows at committed positions: the "true" tokens, so that the loss stays a
            conditional likelihood of the text, or the denoiser's "own", right or wrong, as in generating (scheduled
            sampling, Bengio et al. 2015, arXiv 1506.03099).
        confidence_threshold: in (0, 1], above which such a pass commits.
        full_masks: share of all other blocks, in [0, 1], that are masked whole: as decoding begins each of them, and
            as it stays for drafts of one pass, while random masks seldom come close to it.

    Raises:
        ValueError: for a value outside its range.
    """

    weighting: LossWeighting = "mean"
    corruptions: int = 1
    distillation: float = 0.0
    distillation_temperature: float = 1.0
    confidence: float = 0.0
    decoded_masks: float = 0.0
    decoded_tokens: Literal["true", "own"] = "true"
    confidence_threshold: float = 0.8
    full_masks: float = 0.0

    def __post_init__(self) -> None:
        check_objective(self.weighting, self.corruptions)
        for name in ("distillation", "decoded_masks", "full_masks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share in [0, 1]")
        if not 0 < self.distillation_temperature < float("inf"):
            raise ValueError(
                f"distillation_temperature is {self.distillation_temperature}; it must be positive and finite"
            )
        if not 0 <= self.confidence < float("inf"):
            raise ValueError(f"confidence is {self.confidence}; it must be at least 0 and finite")
        if self.decoded_tokens not in ("true", "own"):
            raise ValueError(f"decoded_tokens is {self.decoded_tokens!r}; use true or own")
        if not 0 < self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}; it must be in (0, 1]")


class Corruption(NamedTuple):
    """Blocks as the denoiser gets them, (R, S) ids, and which of their positions are masked, (R, S) bool."""

    block_ids: torch.Tensor
    masked: torch.Tensor


def check_objective(weighting: str, corruptions: int) -> None:
    """Raise a ValueError for an unknown weighting or a number of corruptions below 1."""
    if weighting not in get_args(LossWeighting):
        raise ValueError(f"loss_weighting is {weighting!r}; use one of {', '.join(get_args(LossWeighting))}")
    if corruptions < 1:
        raise ValueError(f"corruptions is {corruptions}; it must be at least 1")


def check_heads(model: Any) -> None:
    """
    Refuse to train on where peft has taken both heads for the denoiser's: it goes by how names end, so that
    `modules_to_save=["lm_head"]` also makes the context tower's head, `context_lm_head`, a copy that is trained.
    """
    if not any(parameter.requires_grad for parameter in model.context_lm_head.parameters()):
        return
    for config in getattr(model, "peft_config", {}).values():
        saved = getattr(config, "modules_to_save", None) or ()
        if "lm_head" in saved and "context_lm_head" not in saved:
            raise ValueError(
                'modules_to_save=["lm_head"] also makes context_lm_head trained, whose name ends so; put lm_head into '
                "target_modules instead, freeze it by model.context_lm_head.requires_grad_(False), or name it, too"
            )


def diffusion_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    generator: torch.Generator | None,
    objective: DiffusionObjective,
    block_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    all_hidden_states: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    All blocks from the first one with a label on, denoised at once from one frozen pass of the context tower.

    Args:
        model: [`TwoTowerForBlockDiffusion`]; the others are its forward's.
        all_hidden_states: a list to which what each of the context tower's layers is given is added.

    Returns:
        The loss, a scalar, and the number of masked tokens.

    Raises:
        ValueError: for labels that are not the tokens, for labels of padding that are counted as items, and for noise
            in the context tower's embeddings (NEFTune).
    """
    corruptions, fixed = objective.corruptions, generator is None and not model.training
    mask_token_id = model.config.mask_token_id
    # 1. Whole blocks; the padding this adds is masked out of the context and of the loss.
    ids, mask, trainable = _whole_blocks(input_ids, attention_mask, labels, block_size)
    if num_items_in_batch is not None and mask is not None and int(trainable.sum()) != int((labels != -100).sum()):
        raise ValueError(
            "labels has tokens where attention_mask is 0, which num_items_in_batch counts, but none is trained on; "
            "set labels to -100 there"
        )
    model.check_dtypes()
    if getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):  # as transformers' Trainer sets it
        raise ValueError(
            "neftune_noise_alpha puts noise into the context tower's embeddings, of which the objective trains "
            "nothing; leave it out"
        )
    # 2. What each block finds in the context tower's cache.
    with torch.no_grad():
        hidden_states, presents = model.context_tower.read_blocks(ids, mask, block_size, all_hidden_states)
    # 3. Corrupt each block so many times: always at random, so that draws do not depend on what decoding would do.
    texts, all_trainable = (part.repeat_interleave(corruptions, dim=0) for part in (ids, trainable))
    if fixed:
        tokens = None if mask is None else mask.repeat_interleave(corruptions, dim=0)
        masked = content_masked(texts, tokens, all_trainable, block_size, corruptions)
    else:
        masked = sample_masked(all_trainable, block_size, generator, objective.full_masks)
    # 4. Fold the blocks from the first one in which a row has a label on into rows (R, S).
    count = ids.shape[1] // block_size
    first = int(trainable.any(0).nonzero()[0]) // block_size if trainable.any() else count - 1
    blocks = range(first, count)
    masked, targets, trainable = (
        part.unflatten(1, (count, block_size))[:, first:].flatten(0, 1) for part in (masked, texts, all_trainable)
    )
    corruption = Corruption(targets.masked_fill(masked, mask_token_id), masked)
    if objective.decoded_masks and not fixed:
        # Decoding's first pass, which is the same for all corruptions of a block.
        shape = (-1, corruptions, len(blocks), block_size)
        once, whole = (part.view(shape)[:, 0].flatten(0, 1) for part in (targets, trainable))
        with torch.no_grad():
            hidden, _ = model.denoise_blocks(once.masked_fill(whole, mask_token_id), whole, presents, mask, blocks)
            logits = model.lm_head(hidden).to(ids.device).unflatten(0, (-1, 1, len(blocks)))
            logits = logits.expand(-1, corruptions, -1, -1, -1).flatten(0, 2)
        corruption = decoded_corruption(corruption, logits, targets, trainable, mask_token_id, objective, generator)
    # 5. Denoise and average over the masked positions, of which there may be none.
    block_ids, masked = corruption
    hidden, timestep = model.denoise_blocks(block_ids, masked, presents, mask, blocks)
    logits = model.lm_head(hidden[masked.to(hidden.device)]).to(ids.device)
    teaching: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if objective.distillation:
        teaching = _teaching(model.context_lm_head, hidden_states, mask, masked, blocks, corruptions)
    total_weight = None
    if num_items_in_batch is not None:
        full_masks = 0.0 if fixed else objective.full_masks
        total_weight = expected_weight(num_items_in_batch, objective.weighting, corruptions, full_masks)
    losses = position_losses(logits, targets[masked].long(), objective, *teaching)
    timestep = timestep[:, None].expand_as(masked)[masked]
    loss = weighted_mean(losses, timestep, objective.weighting, total_weight)
    if fixed and loss.requires_grad:
        loss.register_hook(_warn_of_fixed_masks)
    return loss, masked.sum()


@torch.no_grad()
def _teaching(
    head: torch.nn.Module,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
    masked: torch.Tensor,
    blocks: range,
    corruptions: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The context tower's prediction of each masked position, from the token before it.

    Args:
        head: the context tower's.
        hidden_states: (B, T, H) the context tower's.
        mask: (B, T) bool, True on tokens; None when all are.
        masked: (R, S), of each text `blocks`, `corruptions` times.

    Returns:
        (M, V) logits, and (M,) bool, False where there is no token before.
    """
    rows, offsets = masked.nonzero(as_tuple=True)
    texts, numbers = rows // len(blocks) // corruptions, rows % len(blocks) + blocks.start
    before = numbers * masked.shape[1] + offsets - 1
    taught = before >= 0
    before = before.clamp(min=0)
    if mask is not None:
        taught = taught & mask[texts, before]
    texts, before = (each.to(hidden_states.device) for each in (texts, before))
    return head(hidden_states[texts, before]).to(masked.device), taught


def _whole_blocks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pad on the right to a multiple of `size`: ids, mask of tokens (None when all are), and trainable positions."""
    check_ids("labels", labels)
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; make them equal"
        )
    mask = check_attention_mask(input_ids, attention_mask)
    trainable = labels != -100 if mask is None else (labels != -100) & mask
    if (trainable & (labels != input_ids)).any():
        raise ValueError(
            "labels differ from input_ids elsewhere than at -100; give unmasked input_ids, which are the targets: the "
            "objective masks tokens itself (of DataCollatorForLanguageModeling, mlm=False)"
        )
    padding = -input_ids.shape[1] % size
    if padding:
        mask = torch.ones_like(trainable) if mask is None else mask
        input_ids, mask, trainable = (F.pad(tensor, (0, padding)) for tensor in (input_ids, mask, trainable))
    return input_ids, mask, trainable


def sample_masked(
    trainable: torch.Tensor, block_size: int, generator: torch.Generator | None = None, full: float = 0.0
) -> torch.Tensor:
    """
    Draw which positions to mask.

    Args:
        trainable: (B, T) bool, True where a token may be masked.
        block_size: S; one t ~ U[0.001, 1] is drawn per block of S columns.
        generator: for reproducible draws, on any device; default torch's global one.
        full: share of blocks with a t of 1 instead.

    Returns:
        (B, T) bool.
    """
    batch, length = trainable.shape
    device = trainable.device if generator is None else generator.device
    # Of float32, whatever the default dtype is: others would draw other masks, or hardly any t.
    draw = partial(torch.rand, generator=generator, device=device, dtype=torch.float32)
    draws = draw(batch, length // block_size, 1 + block_size)
    probability = MIN_TIMESTEP + (1 - MIN_TIMESTEP) * draws[..., :1]
    if full:
        whole = draw(probability.shape) < full
        probability = probability.masked_fill(whole, 1.0)
    return (draws[..., 1:] < probability).flatten(1).to(trainable.device) & trainable


def content_masked(
    ids: torch.Tensor, mask: torch.Tensor | None, trainable: torch.Tensor, block_size: int, corruptions: int = 1
) -> torch.Tensor:
    """
    Choose which positions to mask as [`sample_masked`] does, but by a hash of each row's own tokens.

    Neither the rest of a batch nor whole blocks of padding change what is masked in a row.

    Args:
        ids: (B, T).
        mask: (B, T) bool, True on tokens; None when all columns hold one.
        trainable: (B, T) bool, True where a token may be masked.
        block_size: S.
        corruptions: how many choices to make per row: consecutive rows here, B of them different.

    Returns:
        (B, T) bool.
    """
    tokens = torch.ones_like(trainable) if mask is None else mask
    seeds = derived_seeds(content_seeds(ids[::corruptions], tokens[::corruptions]), corruptions)
    blocks = tokens.unflatten(1, (-1, block_size)).any(-1).cumsum(1)
    probability = MIN_TIMESTEP + (1 - MIN_TIMESTEP) * uniform_noise(seeds, blocks, step=0)
    draws = uniform_noise(seeds, tokens.cumsum(1), step=1)
    return (draws < probability.repeat_interleave(block_size, dim=1)) & trainable


def expected_weight(
    items: torch.Tensor | int, weighting: LossWeighting, corruptions: int, full: float = 0.0
) -> torch.Tensor:
    """
    What the weights of masked positions are expected to sum to, of `items` trainable ones, `corruptions` times each.

    Each is masked with probability (0.001 + 1) / 2, in a share `full` of the blocks for certain. Under
    "inverse_timestep" the masked share t of a block's tokens weighs 1 / t a piece: as much as the block has tokens,
    one for each of them.
    """
    share = full + (1 - full) * (MIN_TIMESTEP + 1) / 2 if weighting == "mean" else 1.0
    # A Trainer on several devices of one process repeats the number for each.
    return torch.as_tensor(items).flatten()[0].clamp(min=1).float() * corruptions * share


def decoded_corruption(
    at_random: Corruption,
    logits: torch.Tensor,
    targets: torch.Tensor,
    trainable: torch.Tensor,
    mask_token_id: int,
    objective: DiffusionObjective,
    generator: torch.Generator | None = None,
) -> Corruption:
    """
    Replace some blocks' random masks by those that one pass of decoding leaves.

    Args:
        at_random: (R, S) what blocks are otherwise.
        logits: (R, S, V) the denoiser's, of the blocks with all `trainable` positions masked.
        targets: (R, S) the tokens of the text.
        trainable: (R, S) bool, True where a token may be masked.
        mask_token_id: which is never committed.
        objective: its `decoded_masks`, `decoded_tokens` and `confidence_threshold`.
        generator: of the choice of blocks; default torch's global one.
    """
    mask = torch.tensor([mask_token_id], device=logits.device)
    confidence, tokens = at_least_float32(logits).index_fill(-1, mask, -torch.inf).softmax(-1).max(-1)
    committed = commit_confident(confidence, trainable, trainable.shape[1], objective.confidence_threshold)
    left = trainable & ~committed
    device = None if generator is None else generator.device
    draws = torch.rand(len(left), generator=generator, device=device, dtype=torch.float32)
    # A share of 1 is all blocks: draws lie in [0, 1).
    chosen = ((draws.to(left.device) < objective.decoded_masks) & left.any(-1))[:, None]
    shown = tokens if objective.decoded_tokens == "own" else targets
    block_ids = torch.where(committed, shown, targets).masked_fill(left, mask_token_id)
    return Corruption(torch.where(chosen, block_ids, at_random.block_ids), torch.where(chosen, left, at_random.masked))


def position_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: DiffusionObjective,
    teacher_logits: torch.Tensor | None = None,
    taught: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Each masked position's loss, before it is weighted.

    Args:
        logits: (M, V) the denoiser's.
        targets: (M,) token ids.
        objective: its `distillation`, `distillation_temperature` and `confidence`.
        teacher_logits: (M, V) the context tower's for the same positions, with `distillation`.
        taught: (M,) bool, False where there are none: there it is the cross-entropy alone.

    Returns:
        (M,) float32 (float64 for float64).
    """
    logits = at_least_float32(logits)
    losses = F.cross_entropy(logits, targets, reduction="none")
    if teacher_logits is not None and taught is not None:
        temperature = objective.distillation_temperature
        teacher = (at_least_float32(teacher_logits) / temperature).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
        losses = torch.where(taught, losses.lerp(divergence, objective.distillation), losses)
    if objective.confidence:
        right = logits.detach().argmax(-1) == targets
        losses = losses + objective.confidence * torch.where(right, entropy_of(logits), 0)
    return losses


def weighted_mean(
    losses: torch.Tensor,
    timestep: torch.Tensor,
    weighting: LossWeighting = "mean",
    total_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Average the losses of masked positions.

    Args:
        losses: (M,).
        timestep: (M,) masked fraction of each position's block.
        weighting: "mean" counts every position alike (NVIDIA's objective); "inverse_timestep" divides each by its
            timestep, so that every block counts alike however much of it is masked (the 1 / t of masked diffusion's
            likelihood bound, Sahoo et al. 2024, arXiv 2406.07524).
        total_weight: scalar, what to divide the weighted sum by; default the sum of the weights, for an average.

    Returns:
        Scalar; 0 (with gradient 0) where nothing is masked.
    """
    weights = torch.ones_like(losses) if weighting == "mean" else 1 / timestep.to(losses.dtype)
    if total_weight is None:
        total_weight = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (losses * weights).sum() / total_weight.to(losses.device)


def _warn_of_fixed_masks(gradient: torch.Tensor) -> None:
    logger.warning_once(
        "backward through a loss of eval() mode, whose masks are the same at every step; call model.train(), or give "
        "a generator"
    )


__all__ = [
    "Corruption",
    "DiffusionObjective",
    "LossWeighting",
    "check_heads",
    "check_objective",
    "content_masked",
    "decoded_corruption",
    "diffusion_loss",
    "expected_weight",
    "position_losses",
    "sample_masked",
    "weighted_mean",
]
