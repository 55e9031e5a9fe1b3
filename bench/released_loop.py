"""Mask diffusion as the released code runs it, with all that it does for nothing: a yardstick, not an alternative.

What that is, section 5 of the model's description says: logits of every prompt position, the whole context cache
cloned for every block, a loop over experts, a wait for the device at every step, blocks that are finished beyond the
end of the text, and a last block that the context tower reads though nobody asks it again. The commit rule and so the
tokens are those of mode "mask_diffusion", whose passes this calls. One prompt at a time: the released code has no
padding, and one step count for all rows.

Shapes: P prompt, N new tokens, S block, V vocabulary.
"""

import copy
import math
from typing import NamedTuple

import torch

from ..modeling_twotower import TwoTowerForBlockDiffusion


class Released(NamedTuple):
    """`sequences` (1, P + N), uncut after an end-of-text, and the passes of each tower."""

    sequences: torch.Tensor
    denoiser_forwards: int
    context_forwards: int


def with_expert_loop(model: TwoTowerForBlockDiffusion) -> TwoTowerForBlockDiffusion:
    """The same tensors in a model that runs its experts one after another, by transformers' own loop."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        looped = TwoTowerForBlockDiffusion(config)
    looped.load_state_dict(model.state_dict(), assign=True)
    looped.set_experts_implementation("eager")
    return looped.eval()


@torch.no_grad()
def released_mask_diffusion(
    model: TwoTowerForBlockDiffusion,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    ends: set[int],
    confidence_threshold: float = 0.8,
    steps_per_block: int = 16,
) -> Released:
    """
    Greedy mask diffusion of one prompt.

    Args:
        model: best of all [`with_expert_loop`].
        input_ids: (1, P), all of them tokens.
        max_new_tokens: a multiple of the block size.
        ends: a block that holds one of these is the last.
        confidence_threshold, steps_per_block: as in [`TwoTowerGenerationConfig`].
    """
    size = model.config.block_size
    if len(input_ids) != 1:
        raise ValueError(f"input_ids has {len(input_ids)} rows; the released loop takes one prompt at a time")
    if max_new_tokens % size:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; the released loop needs a multiple of {size}")
    # 1. Read the prompt, with logits of all its positions.
    cache = model(input_ids, use_cache=True).cache
    passes, blocks = 0, []
    for _ in range(max_new_tokens // size):
        # 2. A copy of the context for each block, which starts all masked.
        copied = cache.copy_rows([0])
        block = torch.full((1, size), model.config.mask_token_id, device=input_ids.device)
        for step in range(steps_per_block):
            masked = block == model.config.mask_token_id
            open_count = int(masked.sum())  # waits for the device
            if open_count == 0:
                break
            # 3. Predict, and commit the surest.
            logits = model.denoise(block, copied, timestep=open_count / size)
            least = math.ceil(open_count / (steps_per_block - step))
            block = _commit(block, masked, logits, least, confidence_threshold, model.config.mask_token_id)
            passes += 1
        # 4. The context tower reads the block, be it the last.
        model.context_tower(block, cache)
        blocks.append(block)
        if ends & set(block[0].tolist()):
            break
    return Released(torch.cat([input_ids, *blocks], dim=1), passes, 1 + len(blocks))


def _commit(
    block: torch.Tensor, masked: torch.Tensor, logits: torch.Tensor, least: int, threshold: float, mask_token_id: int
) -> torch.Tensor:
    """(1, S) with the surest masked predictions filled in: all above `threshold`, but at least `least`."""
    logits[..., mask_token_id] = -math.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~masked, -1.0)
    count = max(int((confidence > threshold).sum()), 1, least)
    places = confidence.topk(count, dim=-1).indices
    return block.scatter(1, places, tokens.gather(1, places))


__all__ = ["Released", "released_mask_diffusion", "with_expert_loop"]
