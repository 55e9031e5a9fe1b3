"""Gaps in functions: where they are, and what is made of what is written into them."""

import random

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from twotower.demo import infilling
from twotower.demo.infilling import gap_in, infilling_figures
from twotower.demo.tasks import held_out_tasks

SIZE = 8


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("all kinds", vocab_size=280, block_size=SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_a_gap_lies_within_a_block_and_the_rest_of_the_answer_is_given(tokenizer, seed):
    for task in held_out_tasks("code", 10, seed):
        gap = gap_in(task, tokenizer, SIZE, random.Random(seed))
        answer = tokenizer(" " + task.answer, add_special_tokens=False).input_ids
        assert gap.filled(gap.block[gap.first : gap.last]) == answer
        assert len(gap.block) == SIZE and 0 < gap.first < gap.last < SIZE
        assert 3 <= gap.last - gap.first <= 6
        assert gap.before[: gap.prompt] == tokenizer(task.prompt).input_ids


def test_both_ways_are_asked_for_the_gap_and_judged_by_the_whole_function(model, tokenizer, monkeypatch):
    """A model that knows the answer in one mode, and writes end-of-text in the other."""
    tasks, asked = held_out_tasks("code", 4, 0), []

    def known(requests, slots, progress, do_sample):
        asked.append(requests)
        for number, request in enumerate(requests):
            whole = tokenizer(tasks[number].prompt).input_ids
            whole += tokenizer(" " + tasks[number].answer, add_special_tokens=False).input_ids
            read = len(request["input_ids"])
            new = whole[read : read + request["max_new_tokens"]]
            yield number, torch.tensor([whole[:read] + (new if request["mode"] == "mask_diffusion" else [2])])

    monkeypatch.setattr(model, "generate_many", known, raising=False)
    figures = infilling_figures(model, tokenizer, tasks, seed=1)
    ar, diffusion = figures["rows"]["ar"], figures["rows"]["mask_diffusion"]
    assert (diffusion["accuracy"], diffusion["whole_text"]["accuracy"]) == (1.0, 1.0)
    assert ar["whole_text"]["accuracy"] == 0.0
    for left, both in zip(*asked, strict=True):
        masks = (both["starting_block"][0] == model.config.mask_token_id).tolist()
        assert sum(masks) == left["max_new_tokens"]
        before = both["starting_block"][0, : masks.index(True)].tolist()
        assert left["input_ids"] == both["input_ids"] + before


def test_a_model_is_asked(model, tokenizer):
    figures = infilling_figures(model, tokenizer, held_out_tasks("code", 2, 0), seed=1)
    assert (figures["problems"], set(figures["rows"])) == (2, {"ar", "mask_diffusion"})
    assert infilling.SHORTEST < infilling.LONGEST
