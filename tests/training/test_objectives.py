"""The objective's options: each as block by block in plain Python, in expectation over masks, and refused by name."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import random_ids, tiny_model
from tolerances import GRADIENTS, assert_close

from twotower.cache_twotower import TwoTowerCache
from twotower.objective_twotower import (
    MIN_TIMESTEP,
    Corruption,
    DiffusionObjective,
    decoded_corruption,
    expected_weight,
    position_losses,
    sample_masked,
    weighted_mean,
)

MASK = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "NVIDIA's": {},
    "1/t": {"weighting": "inverse_timestep", "corruptions": 2},
    "distillation": {"distillation": 0.4, "distillation_temperature": 2.0},
    "nothing but distillation": {"distillation": 1.0, "corruptions": 2},
    "confidence": {"confidence": 0.7},
    "decoded masks": {"decoded_masks": 0.6, "confidence_threshold": 0.15, "corruptions": 2},
    "decoded masks over own tokens": {"decoded_masks": 1.0, "decoded_tokens": "own", "confidence_threshold": 0.15},
    "full masks": {"full_masks": 0.5, "corruptions": 2},
    "full masks beside decoded ones": {
        "full_masks": 0.5,
        "decoded_masks": 0.5,
        "confidence_threshold": 0.15,
        "weighting": "inverse_timestep",
        "corruptions": 3,
    },
    "all of them": {
        "weighting": "inverse_timestep",
        "corruptions": 2,
        "distillation": 0.3,
        "confidence": 0.5,
        "decoded_masks": 0.5,
        "confidence_threshold": 0.15,
    },
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(padding: str | None, length: int = 18) -> dict[str, torch.Tensor]:
    """Three rows, the first third of each without labels; padded ones are of unlike lengths."""
    ids = random_ids(3, length)
    labels = ids.masked_fill(torch.arange(length) < length // 3, -100)
    if padding is None:
        return {"input_ids": ids, "labels": labels}
    counts = torch.tensor([length, length - 5, length // 2])[:, None]
    columns = torch.arange(length)
    mask = columns < counts if padding == "right" else columns >= length - counts
    return {"input_ids": ids.masked_fill(~mask, 0), "labels": labels, "attention_mask": mask.long()}


class OneBlock:
    """One block of one row with what came before it, both without padding, for `denoise`."""

    def __init__(self, model, ids: torch.Tensor, tokens: torch.Tensor, start: int, size: int):
        self.model, self.before = model, ids[:start][tokens[:start]]
        self.inside = tokens[start : start + size]
        self.ids = ids[start : start + size][self.inside]
        self.cache = TwoTowerCache(model.config)
        if len(self.before):
            model(self.before[None], past_key_values=self.cache)

    def logits(self, shown: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        time = masked.float().mean()
        return self.model.denoise(shown.masked_fill(masked, MASK)[None], self.cache, timestep=time)[0]

    def decoded(self, trainable: torch.Tensor, objective: DiffusionObjective) -> tuple[torch.Tensor, torch.Tensor]:
        """What one pass of decoding shows and leaves masked."""
        with torch.no_grad():
            logits = self.logits(self.ids, trainable)
        logits[:, MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        wanted = sorted(trainable.nonzero()[:, 0].tolist(), key=lambda at: -confidence[at])
        sure = [at for at in wanted if confidence[at] > objective.confidence_threshold]
        shown, left = self.ids.clone(), trainable.clone()
        for at in sure or wanted[:1]:
            left[at] = False
            if objective.decoded_tokens == "own":
                shown[at] = tokens[at]
        return shown, left

    def losses(self, shown: torch.Tensor, masked: torch.Tensor, objective: DiffusionObjective) -> list[torch.Tensor]:
        logits = self.logits(shown, masked)
        teacher = self.model(torch.cat([self.before, self.ids])[None]).logits[0].detach()
        found = []
        for at in masked.nonzero()[:, 0].tolist():
            p = logits[at].softmax(-1)
            loss = -p[self.ids[at]].log()
            column = len(self.before) + at - 1
            if objective.distillation and column >= 0:
                T, w = objective.distillation_temperature, objective.distillation
                q, tempered = (teacher[column] / T).softmax(-1), (logits[at] / T).softmax(-1)
                loss = (1 - w) * loss + w * T**2 * (q * (q / tempered).log()).sum()
            if objective.confidence and p.argmax() == self.ids[at]:
                loss = loss - objective.confidence * (p * p.log()).sum()
            found.append(loss)
        return found


def block_by_block(model, objective, input_ids, labels, attention_mask=None, size=None):
    """The same loss through the generation cache, from the same draws: the objective in plain Python."""
    size = size or model.config.block_size
    padding = (0, -input_ids.shape[1] % size)
    tokens = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    input_ids, tokens, labels = (
        F.pad(input_ids, padding),
        F.pad(tokens, padding),
        F.pad(labels, padding, value=-100),
    )
    trainable = ((labels != -100) & tokens).repeat_interleave(objective.corruptions, dim=0)
    generator = seeded()
    masked = sample_masked(trainable, size, generator, objective.full_masks)
    starts = range(int(trainable.any(0).nonzero()[0]) // size * size, input_ids.shape[1], size)
    draws = iter(torch.rand(len(masked) * len(starts), generator=generator) if objective.decoded_masks else ())
    losses, weights = [], []
    for index, start in itertools.product(range(len(masked)), starts):
        row = index // objective.corruptions
        by_decoding = objective.decoded_masks and next(draws) < objective.decoded_masks
        block = OneBlock(model, input_ids[row], tokens[row], start, size)
        own, may = (part[index, start : start + size][block.inside] for part in (masked, trainable))
        shown = block.ids
        if by_decoding and may.any():
            decoded, left = block.decoded(may, objective)
            shown, own = (decoded, left) if left.any() else (shown, own)
        if own.any():
            found = block.losses(shown, own, objective)
            weight = 1.0 if objective.weighting == "mean" else 1 / own.float().mean().double()
            losses += found
            weights += [weight] * len(found)
    weights = torch.tensor(weights, dtype=torch.float64)
    return (torch.stack(losses) * weights).sum() / weights.sum(), len(losses)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_are_those_block_by_block(option, padding):
    model = tiny_model("all kinds").double()
    model.set_trained_towers("denoiser")
    model.objective = DiffusionObjective(**OPTIONS[option])
    inputs = batch(padding)
    output = model(**inputs, generator=seeded())
    output.loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    expected, count = block_by_block(model, model.objective, **inputs)
    expected.backward()
    assert output.masked_tokens == count
    assert_close(output.loss, expected)
    wanted = gradients(model)
    assert found.keys() == wanted.keys() and found
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, slack=GRADIENTS)


@pytest.mark.parametrize("size", [3, 4, 9])
def test_blocks_of_another_length(size):
    model = tiny_model("all kinds").double()
    inputs = batch("left")
    output = model(**inputs, generator=seeded(), block_size=size)
    with torch.no_grad():
        expected, count = block_by_block(model, model.objective, **inputs, size=size)
    assert output.masked_tokens == count
    assert_close(output.loss, expected)
    assert (output.loss != model(**inputs, generator=seeded()).loss) == (size != model.config.block_size)


@pytest.mark.parametrize("option", ["distillation", "confidence", "decoded masks"])
def test_options_train_only_the_denoiser(option):
    model = tiny_model("all kinds").train()  # not even frozen
    model.objective = DiffusionObjective(**OPTIONS[option])
    model(**batch("right")).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("context_"), name


def test_a_denoiser_that_is_the_context_tower_has_nothing_to_learn_from_it():
    """Of a block's last token alone, a fresh denoiser of blocks of 1 predicts as much as the context tower."""
    objective = DiffusionObjective(distillation=1.0, distillation_temperature=1.5)
    logits, targets = torch.randn(5, 7, generator=seeded()), torch.arange(5)
    taught = torch.tensor([True, True, False, True, True])
    losses = position_losses(logits, targets, objective, logits.clone(), taught)
    assert losses[taught].abs().max() < 1e-6
    assert_close(losses[2], F.cross_entropy(logits[2:3], targets[2:3]))


def test_an_evaluation_has_the_masks_it_always_had():
    model = tiny_model("all kinds")
    inputs = batch("right")
    usual = model(**inputs)
    model.objective = DiffusionObjective(decoded_masks=1.0)
    again = model(**inputs)
    assert (usual.loss, usual.masked_tokens) == (again.loss, again.masked_tokens)


def test_masks_by_decoding_hide_what_the_denoiser_is_unsure_of():
    """What is left masked is what it predicts less surely, at the rest the text stands."""
    model, seen = tiny_model("all kinds"), []
    model.objective = DiffusionObjective(decoded_masks=1.0, confidence_threshold=0.15)
    model.denoiser_tower.embeddings.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    ids = random_ids(2, 24)
    model(ids, labels=ids, generator=seeded())
    whole, partly = seen
    assert (whole == MASK).all()
    targets = ids.unflatten(1, (-1, 4)).flatten(0, 1)
    assert torch.equal(partly[partly != MASK], targets[partly != MASK])
    left = (partly == MASK).sum(-1)
    assert left.min() > 0 and left.max() < 4 and len(left.unique()) > 1


# In expectation


def chance_of(masked: int, size: int) -> float:
    """That exactly such `masked` positions of `size` are masked: the integral of t^k (1 - t)^(S - k) over t."""
    t = torch.linspace(MIN_TIMESTEP, 1, 20001, dtype=torch.float64)
    return float(torch.trapezoid(t**masked * (1 - t) ** (size - masked), t)) / (1 - MIN_TIMESTEP)


@pytest.mark.parametrize("option", ["NVIDIA's", "1/t", "distillation", "confidence"])
def test_the_expectation_over_masks_is_their_enumeration(option):
    """
    Of all 2^4 masks of each of two blocks, weighted by their chances; normalised by the expected weight, so that the
    expectation of a sum is what is compared and not that of a ratio.
    """
    model = tiny_model("all kinds", vocab_size=5).double()
    draws, size = 3000, 4
    model.objective = replace(DiffusionObjective(**OPTIONS[option]), corruptions=draws)
    ids = torch.tensor([[0, 4, 1, 2, 4, 4, 0, 1]])
    with torch.no_grad():
        estimate = model(ids, labels=ids, generator=seeded(), num_items_in_batch=8).loss
    objective, total, squares = model.objective, 0.0, 0.0
    share = (1 + MIN_TIMESTEP) / 2 if objective.weighting == "mean" else 1.0
    for start, bits in itertools.product((0, size), itertools.product((False, True), repeat=size)):
        if any(bits):
            masked = torch.tensor(bits)
            block = OneBlock(model, ids[0], torch.ones(8).bool(), start, size)
            with torch.no_grad():
                found = torch.stack(block.losses(block.ids, masked, objective)).sum()
            value = float(found if objective.weighting == "mean" else found / masked.float().mean().double()) / (
                8 * share
            )
            chance = chance_of(sum(bits), size)
            total, squares = total + chance * value, squares + chance * value**2
    deviation = (squares / draws) ** 0.5
    assert abs(estimate - total) < 4 * deviation
    assert deviation < 0.02 * total, "close enough to tell"


def test_full_masks_are_so_many_whole_blocks():
    trainable = torch.arange(16) >= 3
    masked = sample_masked(trainable.expand(2000, 16), 4, seeded(), full=0.3)
    whole = (masked == trainable).unflatten(1, (4, 4)).all(-1)[:, 1:].float().mean()
    by_chance = chance_of(4, 4)
    assert abs(whole - (0.3 + 0.7 * by_chance)) < 0.02
    assert not masked[:, :3].any()


@pytest.mark.parametrize("weighting", ["mean", "inverse_timestep"])
def test_the_expected_weight_is_that_of_full_masks_too(weighting):
    masked = sample_masked(torch.ones(20000, 4).bool(), 4, seeded(), full=0.3)
    counts = masked.sum(-1).double()
    weight = counts if weighting == "mean" else 4.0 * (counts > 0)
    expected = expected_weight(4, weighting, 1, full=0.3)
    # No mask at all, in one block of five drawn at random, has no weight under 1/t.
    unmasked = 0.7 * chance_of(0, 4) * 4 if weighting == "inverse_timestep" else 0.0
    assert abs(weight.mean() + unmasked - expected) < 0.03


def test_one_over_t_is_the_likelihood():
    """
    Of a distribution whose conditionals are known, three tokens of two: S / (S + 1) of the negative log-likelihood,
    since with one chance in S + 1 nothing is masked (Sahoo et al. 2024, in the limit of small steps all of it).
    """
    joint = torch.rand(2, 2, 2, generator=seeded(), dtype=torch.float64)
    joint /= joint.sum()
    text, total = (0, 1, 1), 0.0
    for bits in itertools.product((False, True), repeat=3):
        if not any(bits):
            continue
        seen = joint[
            tuple(slice(None) if hidden else slice(token, token + 1) for hidden, token in zip(bits, text, strict=True))
        ]
        rows = []
        for at in range(3):
            marginal = seen.sum([axis for axis in range(3) if axis != at])
            rows.append((marginal / marginal.sum()).log() if bits[at] else torch.zeros(2, dtype=torch.float64))
        masked = torch.tensor(bits)
        time = masked.double().mean().expand(int(masked.sum()))
        losses = position_losses(torch.stack(rows)[masked], torch.tensor(text)[masked], DiffusionObjective())
        loss = weighted_mean(losses, time, "inverse_timestep", torch.tensor(1.0))
        total += chance_of(sum(bits), 3) * float(loss)
    likelihood = -float(joint[text].log())
    assert abs(total / (likelihood * 3 / 4) - 1) < 2 * MIN_TIMESTEP


# What is refused

REFUSED = {
    "weighting": ("sum", "loss_weighting is 'sum'; use one of mean, inverse_timestep"),
    "corruptions": (0, "corruptions is 0; it must be at least 1"),
    "distillation": (1.5, r"distillation is 1.5; give a share in \[0, 1\]"),
    "distillation_temperature": (0.0, "distillation_temperature is 0.0; it must be positive and finite"),
    "confidence": (-0.1, "confidence is -0.1; it must be at least 0 and finite"),
    "decoded_masks": (-1, r"decoded_masks is -1; give a share in \[0, 1\]"),
    "decoded_tokens": ("mine", "decoded_tokens is 'mine'; use true or own"),
    "full_masks": (1.5, r"full_masks is 1.5; give a share in \[0, 1\]"),
    "confidence_threshold": (0, r"confidence_threshold is 0; it must be in \(0, 1\]"),
}


@pytest.mark.parametrize("name", [field.name for field in fields(DiffusionObjective)])
def test_values_out_of_range_are_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        DiffusionObjective(**{name: value})


def test_a_block_size_below_1_is_refused():
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="block_size is 0; it must be at least 1"):
        tiny_model()(ids, labels=ids, block_size=0)


def test_a_mask_that_bfloat16_cannot_count_to_is_never_committed():
    """257 would be 256 there."""
    logits = torch.zeros(1, 2, 260, dtype=torch.bfloat16)
    logits[..., 257], logits[..., 256] = 20.0, 10.0
    targets, everywhere = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    at_random = Corruption(torch.full((1, 2), 257), everywhere)
    objective = DiffusionObjective(decoded_masks=1.0, decoded_tokens="own", confidence_threshold=0.9)
    trainable = torch.tensor([[True, True]])
    found = decoded_corruption(at_random, logits, targets, trainable, 257, objective)
    # The whole block is committed, by 256, so that it stays masked at random.
    assert found.block_ids.tolist() == [[257, 257]] and found.masked.all()
    logits[:, 1, 256] = 0.0  # not sure of it
    found = decoded_corruption(at_random, logits, targets, trainable, 257, objective)
    assert found.block_ids.tolist() == [[256, 257]] and found.masked.tolist() == [[False, True]]
