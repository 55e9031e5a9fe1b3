"""Batches of worked problems, laid out on the grid of blocks the denoiser will be asked to fill.

A row is left padding, prompt, answer and end-of-text. While generating, the first block starts where the prompt
ends and the last one is filled up after the end-of-text, so rows are padded on the left until the prompt ends on a
block boundary (or, for a share of them, anywhere in a block) and filled up with end-of-text on the right.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .problems import training_problems

IGNORED = -100
# Rows are sorted by length within such a pool, so that a batch wastes little on padding.
POOL_BATCHES = 32


class Batch(NamedTuple):
    """`input_ids`, `attention_mask` and `labels` (-100 outside the answer), each (B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def training_batches(
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    block_size: int,
    aligned: float,
    seed: int,
    numbers_only: float = 0.0,
) -> Iterator[Batch]:
    """
    Yield batches without end.

    Args:
        tokenizer: of the problems.
        batch_size: B rows.
        block_size: S; T is a multiple of it.
        aligned: share of rows whose prompt ends on a block boundary; the others end anywhere.
        seed: of problems, order, offsets and labels.
        numbers_only: share of rows in which only digits are labelled. The denoiser commits words long before numbers,
            so this is the state in which it will find most blocks: words there, some digits masked.
    """
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    rng = random.Random(seed)
    problems = training_problems(seed)
    while True:
        pool = list(islice(problems, POOL_BATCHES * batch_size))
        prompts = tokenizer([problem.prompt for problem in pool]).input_ids
        answers = tokenizer([" " + problem.answer for problem in pool], add_special_tokens=False).input_ids
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: (len(row[1]) // block_size, len(row[0])))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            offsets = [0 if rng.random() < aligned else rng.randrange(block_size) for _ in batch]
            laid_out = collate(batch, offsets, block_size, tokenizer.pad_token_id, tokenizer.eos_token_id)
            if numbers_only:
                chosen = torch.tensor([rng.random() < numbers_only for _ in batch])
                laid_out.labels[chosen[:, None] & ~torch.isin(laid_out.labels, digits)] = IGNORED
            yield laid_out


def collate(
    rows: list[tuple[list[int], list[int]]], offsets: list[int], block_size: int, pad_id: int, eos_id: int
) -> Batch:
    """Lay out (prompt, answer) rows so that each prompt ends `offset` columns into a block; rows end together."""
    laid_out = []
    for (prompt, answer), offset in zip(rows, offsets, strict=True):
        target = [*answer, eos_id]
        target += [eos_id] * (-(offset + len(target)) % block_size)
        laid_out.append((prompt, target))
    width = max(len(prompt) + len(target) for prompt, target in laid_out)
    width += -width % block_size
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (pad_id, 0, IGNORED))
    for row, (prompt, target) in enumerate(laid_out):
        start = width - len(target)
        ids[row, start:] = labels[row, start:] = torch.tensor(target)
        ids[row, start - len(prompt) : start] = torch.tensor(prompt)
        mask[row, start - len(prompt) :] = 1
    return Batch(ids, mask, labels)
