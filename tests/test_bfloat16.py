"""
In bfloat16 "self_speculative" and "ar" round differently, the same tokens in chunks of different lengths. Where their
texts part, two choices tied within that rounding: those of the next token, or those of an expert on the way to it.
"""

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

import twotower
from twotower.demo.tasks import held_out_tasks
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

NEW_TOKENS = 32
ROWS, DRAFT_LENGTH = 40, 8  # of a pass, and a number, as passes measured here would choose others elsewhere


@dataclass
class Reading:
    """
    What one mode's context tower made of a row, by place in its text: per mixture of experts the router's scores
    (layers, E) and the experts chosen; and the logits (V,) of each new token.
    """

    text: list[int] = field(default_factory=list)
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, list[set[int]]] = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(scope="module")
def model():
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    return [tokenizer(problem.prompt)["input_ids"] for problem in held_out_tasks("words", 120, seed=0)]


def read(model, prompts: list[list[int]], mode: str) -> list[Reading]:
    """
    Generate from prompts of one length, all different, and listen to the context tower's routers; what was read again
    counts as read last.
    """
    tower, readings, length = model.context_tower, {tuple(prompt): Reading() for prompt in prompts}, len(prompts[0])
    routers = [layer.mixer.gate for layer in tower.layers if hasattr(layer.mixer, "gate")]
    rows, routed = [], []

    def begin(_, args):
        ids, cache = args[:2]
        # Engines may swap rows, which are known by their prompts.
        of_rows = ids if cache.width == 0 else cache.ids
        starts = cache.host_lengths or [0] * len(ids)
        rows[:] = [
            (readings[tuple(row)], start) for row, start in zip(of_rows[:, :length].tolist(), starts, strict=True)
        ]
        routed.clear()

    def listen(router, _, output):
        routed.append((output[0].sigmoid() + router.e_score_correction_bias, output[2]))

    def end(*_):
        scores, experts = (
            torch.stack(each, dim=1).unflatten(0, (len(rows), -1)) for each in zip(*routed, strict=True)
        )
        for (reading, start), of_row, chosen in zip(rows, scores, experts.tolist(), strict=True):
            reading.scores.update(enumerate(of_row, start))
            reading.experts.update((place, [*map(set, each)]) for place, each in enumerate(chosen, start))

    hooks = [tower.register_forward_pre_hook(begin), tower.register_forward_hook(end)]
    hooks += [router.register_forward_hook(listen) for router in routers]
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "output_logits": True}
    if mode == "self_speculative":
        options["draft_length"] = DRAFT_LENGTH
    output = model.generate(torch.tensor(prompts), mode=mode, return_dict_in_generate=True, **options)
    for hook in hooks:
        hook.remove()
    for row, reading in enumerate(readings.values()):
        reading.text, reading.logits = output.sequences[row].tolist(), [step[row] for step in output.logits]
    return list(readings.values())


@pytest.fixture(scope="module")
def readings(model, prompts):
    """By both modes, of beginnings of questions, which the model was not trained to go on from: it is unsure."""
    beginnings = list(dict.fromkeys(tuple(prompt[:12]) for prompt in prompts))
    pairs = []
    for start in range(0, len(beginnings), ROWS):
        rows = beginnings[start : start + ROWS]
        pairs += zip(read(model, rows, "ar"), read(model, rows, "self_speculative"), strict=True)
    return pairs


def parting(one: Reading, other: Reading) -> int:
    """The first place where the texts differ, or their length."""
    pairs = enumerate(zip(one.text, other.text, strict=True))
    return next((place for place, (token, others) in pairs if token != others), len(one.text))


def flip(one: Reading, other: Reading) -> tuple[int, int] | None:
    """Place, before the texts part, and number of the first router that chose other experts."""
    for place in range(min(parting(one, other), len(one.text) - 1)):
        for number, (experts, others) in enumerate(zip(one.experts[place], other.experts[place], strict=True)):
            if experts != others:
                return place, number
    return None


def token_gap(reading: Reading, place: int, first: int, second: int) -> float:
    """How far the logits of two candidates for a place are apart."""
    logits = reading.logits[place - len(reading.text)]
    return abs(float(logits[first] - logits[second]))


def expert_gap(reading: Reading, place: int, number: int, first: int, second: int) -> float:
    scores = reading.scores[place][number]
    return abs(float(scores[first] - scores[second]))


@pytest.fixture(scope="module")
def undisturbed(readings):
    """
    The gaps that decided in mode "ar", and those between the same two in the other mode, at all places up to which
    both modes chose alike: between the two best tokens, and between the last expert chosen and the first that was not.
    """
    tokens, experts = [], []
    for one, other in readings:
        flipped = flip(one, other)
        for place in range(parting(one, other) if flipped is None else flipped[0]):
            for number, chosen in enumerate(one.experts.get(place, [])):
                pair = one.scores[place][number].topk(len(chosen) + 1).indices[-2:].tolist()
                experts.append([expert_gap(reading, place, number, *pair) for reading in (one, other)])
            if place >= len(one.text) - NEW_TOKENS:
                pair = one.logits[place - len(one.text)].topk(2).indices.tolist()
                tokens.append([token_gap(reading, place, *pair) for reading in (one, other)])
    return torch.tensor(tokens), torch.tensor(experts)


def test_texts_part_only_where_two_choices_tied_within_rounding(readings, undisturbed):
    # How much rounding alone moved a gap, anywhere.
    token_tie, expert_tie = ((gaps[:, 0] - gaps[:, 1]).abs().max() for gaps in undisturbed)
    parted = 0
    for one, other in readings:
        place, flipped = parting(one, other), flip(one, other)
        if place == len(one.text):
            continue
        parted += 1
        if flipped is None:
            pair = one.text[place], other.text[place]
            assert max(token_gap(reading, place, *pair) for reading in (one, other)) <= token_tie
        else:
            experts, others = (reading.experts[flipped[0]][flipped[1]] for reading in (one, other))
            pairs = product(experts - others, others - experts)
            assert max(expert_gap(one, *flipped, *pair) for pair in pairs) <= expert_tie
    # Measured: 3 of 120, and 14 on a CPU that multiplies in bfloat16.
    assert 0 < parted <= 0.2 * len(readings)


def test_ties_are_so_rare_that_differences_elsewhere_would_show(undisturbed):
    for gaps, share in zip(undisturbed, (0.1, 0.3), strict=True):  # measured: 0.044 and 0.146
        tie = (gaps[:, 0] - gaps[:, 1]).abs().max()
        assert (gaps[:, 0] <= tie).float().mean() < share
