"""Functions with a gap, filled by mask diffusion, which sees both sides of it, and by "ar", which sees the left."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.figures import accuracy_figures
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .marking import Marks
from .tasks import Task

# Tokens of a gap.
SHORTEST, LONGEST = 3, 8


@dataclass(frozen=True)
class Gap:
    """
    A span of a function's answer that is left out of a block.

    Args:
        before: tokens up to the block, of the prompt and the answer's beginning.
        block: tokens of the block.
        behind: tokens of the answer after it.
        first, last: the gap's, within the block.
        prompt: how many of `before` are the prompt.
    """

    before: list[int]
    block: list[int]
    behind: list[int]
    first: int
    last: int
    prompt: int

    def filled(self, tokens: list[int]) -> list[int]:
        """The whole answer with these tokens in the gap."""
        inside = [*self.block[: self.first], *tokens, *self.block[self.last :]]
        return [*self.before[self.prompt :], *inside, *self.behind]


def gap_in(task: Task, tokenizer: Any, size: int, rng: random.Random) -> Gap:
    """A gap of 3 to 8 tokens, with a token of the block at least on either side, somewhere in a task's answer."""
    prompt = tokenizer(task.prompt).input_ids
    ids = tokenizer(" " + task.answer, add_special_tokens=False).input_ids
    start = rng.randint(0, max(0, len(ids) - size))
    block = ids[start : start + size]
    most = min(LONGEST, len(block) - 2)
    length = rng.randint(min(SHORTEST, most), most)
    first = rng.randint(1, len(block) - length - 1)
    return Gap([*prompt, *ids[:start]], block, ids[start + size :], first, first + length, len(prompt))


def infilling_figures(
    model: TwoTowerForBlockDiffusion, tokenizer: Any, tasks: Sequence[Task], seed: int, batch_size: int = 64
) -> dict[str, Any]:
    """
    How many functions pass all their tests, and have the very tokens that were left out, once a gap is filled.

    Args:
        tasks: of skill "code".
        seed: of where the gaps are.
        batch_size: rows at a time.

    Returns:
        `problems` and `rows`, by mode the figures of what passes, with those of the `whole_text`.
    """
    rng = random.Random(seed)
    gaps = [gap_in(task, tokenizer, model.config.block_size, rng) for task in tasks]
    written = {
        mode: _written(model, list(map(request, gaps)), batch_size) for mode, request in _requests(model).items()
    }
    spans = {
        "ar": written["ar"],
        "mask_diffusion": [
            block[gap.first : gap.last] for gap, block in zip(gaps, written["mask_diffusion"], strict=True)
        ],
    }
    marks = {
        mode: Marks.of([gap.filled(span) for gap, span in zip(gaps, filled, strict=True)], tasks, tokenizer)
        for mode, filled in spans.items()
    }
    rows = {
        mode: accuracy_figures(own.right, marks["ar"].right)
        | {"whole_text": accuracy_figures(own.whole, marks["ar"].whole)}
        for mode, own in marks.items()
    }
    return {"problems": len(tasks), "seed": seed, "rows": rows}


def _requests(model: TwoTowerForBlockDiffusion) -> dict[str, Callable[[Gap], dict[str, Any]]]:
    """By mode what `generate` is asked about a gap."""

    def of_ar(gap: Gap) -> dict[str, Any]:
        left = [*gap.before, *gap.block[: gap.first]]
        return {"mode": "ar", "input_ids": left, "max_new_tokens": gap.last - gap.first}

    def of_diffusion(gap: Gap) -> dict[str, Any]:
        masks = [model.config.mask_token_id] * (gap.last - gap.first)
        block = torch.tensor([[*gap.block[: gap.first], *masks, *gap.block[gap.last :]]])
        wanted = {"starting_block": block, "max_new_tokens": len(gap.block)}
        return {"mode": "mask_diffusion", "input_ids": gap.before, **wanted}

    return {"ar": of_ar, "mask_diffusion": of_diffusion}


def _written(model: TwoTowerForBlockDiffusion, requests: list[dict[str, Any]], slots: int) -> list[list[int]]:
    """New tokens of each request."""
    found = dict(model.generate_many(requests, slots, progress=False, do_sample=False))
    return [found[number][0, len(each["input_ids"]) :].tolist() for number, each in enumerate(requests)]
