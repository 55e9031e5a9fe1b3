"""The training objective: all blocks at once as block by block through `denoise`, and who learns from it."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import GEOMETRIES, random_ids, tiny_model
from tolerances import GRADIENTS, assert_close

from twotower.cache_twotower import TwoTowerCache
from twotower.objective_twotower import MIN_TIMESTEP, check_objective, masked_cross_entropy, sample_masked

MASK = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(length: int, padding: str | None, vocab_size: int = 48) -> dict[str, torch.Tensor]:
    """Three rows, the first third of each without labels."""
    ids = random_ids(3, length, vocab_size=vocab_size)
    labels = ids.masked_fill(torch.arange(length) < length // 3, -100)
    if padding is None:
        return {"input_ids": ids, "labels": labels}
    counts = torch.tensor([length, max(1, length - 5), max(1, length // 2)])[:, None]
    columns = torch.arange(length)
    mask = columns < counts if padding == "right" else columns >= length - counts
    return {"input_ids": ids.masked_fill(~mask, 0), "labels": labels, "attention_mask": mask.long()}


def block_by_block(model, input_ids, labels, attention_mask=None, weighting="mean", corruptions=1):
    """The same loss through the generation cache: each row, block and corruption by itself, padding left out."""
    size = model.config.block_size
    tokens = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    trainable = F.pad((labels != -100) & tokens, (0, -input_ids.shape[1] % size))
    masked = sample_masked(trainable.repeat_interleave(corruptions, dim=0), size, seeded())
    losses, weights = [], []
    for index, row_masked in enumerate(masked):
        ids, row_tokens = input_ids[index // corruptions], tokens[index // corruptions]
        for start in range(0, len(ids), size):
            block = ids[start : start + size][row_tokens[start : start + size]]
            block_masked = row_masked[start : start + size][: len(ids) - start][row_tokens[start : start + size]]
            if not block_masked.any():
                continue
            cache = TwoTowerCache(model.config)
            if row_tokens[:start].any():
                model(ids[:start][row_tokens[:start]][None], past_key_values=cache)
            time = block_masked.float().mean()
            logits = model.denoise(block.masked_fill(block_masked, MASK)[None], cache, timestep=time)[0]
            losses.append(F.cross_entropy(logits[block_masked], block[block_masked], reduction="none"))
            weights.append(torch.full_like(losses[-1], 1 if weighting == "mean" else 1 / time))
    losses, weights = torch.cat(losses), torch.cat(weights)
    return (losses * weights).sum() / weights.sum(), len(losses)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("length", [3, 12, 18])
def test_the_parallel_loss_is_the_loss_block_by_block(length, padding):
    model = tiny_model("all kinds")
    inputs = batch(length, padding)
    output = model(**inputs, generator=seeded())
    with torch.no_grad():
        expected, count = block_by_block(model, **inputs)
    assert output.loss.dtype == torch.float32
    assert output.masked_tokens == count
    assert output.logits is None
    assert output.past_key_values is None
    assert_close(output.loss, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_in_every_geometry(geometry):
    model = tiny_model(geometry)
    inputs = batch(14, "left", model.config.vocab_size)
    output = model(**inputs, generator=seeded())
    with torch.no_grad():
        expected, count = block_by_block(model, **inputs)
    assert output.masked_tokens == count
    assert_close(output.loss, expected)


@pytest.mark.parametrize("weighting", ["mean", "inverse_timestep"])
@pytest.mark.parametrize("corruptions", [1, 3])
@pytest.mark.parametrize("padding", [None, "left"])
def test_weightings_and_corruptions(padding, corruptions, weighting):
    model = tiny_model("all kinds")
    inputs = batch(18, padding)
    output = model(**inputs, generator=seeded(), loss_weighting=weighting, corruptions=corruptions)
    with torch.no_grad():
        expected, count = block_by_block(model, **inputs, weighting=weighting, corruptions=corruptions)
    assert output.masked_tokens == count
    assert_close(output.loss, expected)


@pytest.mark.parametrize("corruptions", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_any_number_of_rows(padding, rows, corruptions):
    """Also one: its blocks share a single row of the context."""
    model = tiny_model("all kinds")
    inputs = {name: tensor[-rows:] for name, tensor in batch(18, padding).items()}
    output = model(**inputs, generator=seeded(), corruptions=corruptions)
    with torch.no_grad():
        expected, count = block_by_block(model, **inputs, corruptions=corruptions)
    assert output.masked_tokens == count
    assert_close(output.loss, expected)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in learning(model).values())


def learning(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_are_those_block_by_block_and_reach_only_the_denoiser():
    model = tiny_model("all kinds")
    inputs = batch(18, "left")
    model(**inputs, generator=seeded(), corruptions=2).loss.backward()
    gradients = learning(model)
    for name, parameter in model.named_parameters():
        if name.startswith("context_"):
            assert parameter.grad is None, name
        else:
            assert name in gradients, name
    model.zero_grad()
    model.requires_grad_(False)
    for part in (model.denoiser_tower, model.lm_head, model.t_embedder, model.t_block, model.scale_shift_tables):
        part.requires_grad_(True)
    block_by_block(model, **inputs, corruptions=2)[0].backward()
    for name, expected in learning(model).items():
        assert_close(gradients[name], expected, slack=GRADIENTS)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model("all kinds").train()
    inputs = batch(12, "right")
    model(**inputs, generator=seeded()).loss.backward()
    expected = {name: gradient.clone() for name, gradient in learning(model).items()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**inputs, generator=seeded()).loss.backward()
    gradients = learning(model)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], slack=GRADIENTS)


def test_a_seeded_generator_is_reproducible():
    model = tiny_model()
    inputs = batch(18, None)
    losses = [model(**inputs, generator=seeded(seed)).loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(5)
    first = model(**inputs).loss.item()
    torch.manual_seed(5)
    assert model(**inputs).loss.item() == first


def test_what_has_no_label_is_never_corrupted_nor_counted():
    """Of a block's tokens without a label, the denoiser sees all and learns none."""
    model = tiny_model()
    ids = random_ids(2, 8)
    seen = []
    model.denoiser_tower.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    unlabelled = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1]]).bool().expand(2, -1)
    labels = ids.masked_fill(unlabelled, -100)
    total = 0
    for seed in range(30):
        total += model(ids, labels=labels, generator=seeded(seed)).masked_tokens.item()
        assert torch.equal(seen[-1].view(2, 8)[unlabelled], ids[unlabelled])
    corrupted = torch.stack(seen).view(30, 2, 8) == MASK
    assert corrupted.sum() == total
    assert corrupted[:, ~unlabelled].any(0).all()


def test_leading_blocks_without_a_label_are_not_denoised():
    model = tiny_model()
    ids = random_ids(2, 12)
    seen = []
    model.denoiser_tower.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    labels = ids.clone()
    labels[:, :9] = -100
    model(ids, labels=labels)
    model(ids, labels=ids)
    assert seen == [(2, 4), (6, 4)]


def test_without_a_label_the_loss_is_0():
    model = tiny_model()
    ids = random_ids(2, 10)
    output = model(ids, labels=torch.full_like(ids, -100))
    output.loss.backward()
    assert output.loss == 0
    assert output.masked_tokens == 0
    assert not learning(model)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_targets_at_a_masked_position_are_its_own_tokens():
    """A head that always answers with one token has that token's loss everywhere."""
    model = tiny_model("only -")
    ids = random_ids(1, 12)
    model.lm_head.weight.data.zero_()
    assert_close(model(ids, labels=ids, generator=seeded()).loss, torch.tensor(math.log(48)))


# The pure functions


def test_sample_masked_masks_only_what_is_trainable():
    trainable = torch.rand(5, 24, generator=seeded()) < 0.7
    masked = sample_masked(trainable, 8, seeded())
    assert masked.shape == trainable.shape
    assert not (masked & ~trainable).any()
    assert masked.any()
    assert torch.equal(sample_masked(trainable, 8, seeded()), masked)
    assert not torch.equal(sample_masked(trainable, 8, seeded(1)), masked)


def test_sample_masked_draws_a_uniform_probability_per_block():
    """A block of S then has any number of masks from 0 to S almost alike often."""
    masked = sample_masked(torch.ones(4000, 16, dtype=torch.bool), 8, seeded()).unflatten(1, (2, 8))
    counts = masked.sum(-1)
    shares = torch.bincount(counts.flatten(), minlength=9) / counts.numel()
    assert (shares - 1 / 9).abs().max() < 0.02
    # Blocks of one row are independent.
    first, second = counts.float().unbind(1)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.06
    assert MIN_TIMESTEP == 1e-3


def test_masked_cross_entropy_mean():
    logits, targets = torch.randn(7, 5, generator=seeded()), torch.arange(7) % 5
    time = torch.rand(7, generator=seeded()) + 0.1
    assert_close(masked_cross_entropy(logits, targets, time), F.cross_entropy(logits, targets))


def test_masked_cross_entropy_inverse_timestep():
    """Two positions of a block at t = 1/4 weigh as much as eight at t = 1."""
    logits, targets = torch.randn(10, 5, generator=seeded()), torch.arange(10) % 5
    time = torch.tensor([0.25] * 2 + [1.0] * 8)
    losses = F.cross_entropy(logits, targets, reduction="none")
    expected = (losses[:2].mean() + losses[2:].mean()) / 2
    assert_close(masked_cross_entropy(logits, targets, time, "inverse_timestep"), expected)


def test_masked_cross_entropy_of_bfloat16_logits_is_float32():
    logits, targets = torch.randn(7, 5, generator=seeded()).bfloat16(), torch.arange(7) % 5
    loss = masked_cross_entropy(logits, targets, torch.ones(7))
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(logits.float(), targets))


# What is refused

REFUSED = {
    "an unknown weighting": ({"loss_weighting": "sum"}, "loss_weighting is 'sum'; use one of mean, inverse_timestep"),
    "no corruption": ({"corruptions": 0}, "corruptions is 0; it must be at least 1"),
    "labels of another shape": (
        {"labels": torch.zeros(1, 5, dtype=torch.long)},
        r"labels have shape \(1, 5\), input_ids \(1, 6\)",
    ),
    "a cache": ({"past_key_values": TwoTowerCache}, "labels and past_key_values were both given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case):
    arguments, message = REFUSED[case]
    model = tiny_model()
    if "past_key_values" in arguments:
        arguments = {"past_key_values": TwoTowerCache(model.config)}
    model.context_tower = None
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match=message):
        model(ids, **{"labels": ids, **arguments})


def test_check_objective_accepts_what_is_documented():
    for weighting in ("mean", "inverse_timestep"):
        check_objective(weighting, 1)
