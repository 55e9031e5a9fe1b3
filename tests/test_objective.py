"""The training objective: all blocks at once as block by block through `denoise`, and who learns from it."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import GEOMETRIES, random_ids, student_model, tiny_model
from tolerances import GRADIENTS, assert_close

from twotower.cache_twotower import TwoTowerCache
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.objective_twotower import (
    MIN_TIMESTEP,
    DiffusionObjective,
    check_objective,
    content_masked,
    position_losses,
    sample_masked,
    weighted_mean,
)

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


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("geometry", ["all kinds", "odd", "only *"])
@pytest.mark.parametrize("trained", ["denoiser", "context"])
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
def test_either_kind_of_checkpointing_gives_the_same_gradients(trained, geometry, use_reentrant):
    model = tiny_model(geometry).train()
    model.set_trained_towers(trained)
    inputs = batch(12, "right", model.config.vocab_size)

    def gradients():
        model.zero_grad()
        if trained == "denoiser":
            model(**inputs, generator=seeded(), corruptions=2).loss.backward()
        else:
            model(inputs["input_ids"]).logits.square().mean().backward()
        return learning(model)

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_reentrant_checkpointing_of_a_text_in_pieces_is_refused():
    """The layers' states are in tuples, to which it gives no gradients: those of the first piece would be lost."""
    model, ids = tiny_model("all kinds").train(), random_ids(2, 8)

    def gradients(**kwargs):
        model.activation_checkpointing_enable(kwargs)
        model.zero_grad()
        cache = model(ids[:, :4]).cache
        (model(ids[:, 4:], cache=cache).logits.square().mean() + model.denoise(ids, cache).square().mean()).backward()
        return learning(model)

    expected = gradients(use_reentrant=False)
    assert len(expected) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="set use_reentrant to False, or train on each text in one piece"):
        gradients(use_reentrant=True)
    cache = model(ids).cache
    with pytest.raises(ValueError, match="set use_reentrant to False"):
        model.denoise(ids, cache)
    # Of a frozen context tower nothing is lost.
    model.set_trained_towers("denoiser")
    model.denoise(ids, cache).square().mean().backward()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_computes_every_denoiser_layer_twice_and_no_context_layer():
    model = student_model("all kinds").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    calls = []
    for layer in (*model.context_tower.layers, *model.denoiser_tower.layers):
        layer.norm.register_forward_hook(lambda module, *_: calls.append(module))
    ids = random_ids(2, 12)
    model(ids, labels=ids).loss.backward()
    assert [calls.count(layer.norm) for layer in model.context_tower.layers] == [1] * 7
    assert [calls.count(layer.norm) for layer in model.denoiser_tower.layers] == [2] * 7


# Who is trained


def trained_parts(model) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


CONTEXT_PARTS = {"context_tower", "context_lm_head"}
DENOISER_PARTS = {"denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables"}
PARTS = {"denoiser": DENOISER_PARTS, "context": CONTEXT_PARTS, "both": CONTEXT_PARTS | DENOISER_PARTS}


def test_the_context_tower_is_frozen_unless_asked_for(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for towers, parts in PARTS.items():
        chosen = {} if towers == "denoiser" else {"trained_towers": towers}
        assert trained_parts(type(model).from_pretrained(tmp_path, **chosen)) == parts
        assert trained_parts(type(model).from_backbone(context_tower_in_transformers(model), **chosen)) == parts
    for towers, parts in PARTS.items():
        model.set_trained_towers(towers)
        assert trained_parts(model) == parts
    with pytest.raises(ValueError, match="trained_towers is 'none'; use one of denoiser, context, both"):
        model.set_trained_towers("none")


def test_integer_weights_are_not_asked_for_gradients():
    model = tiny_model("only -")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    model.set_trained_towers("both")
    assert not model.lm_head.weight.requires_grad and model.context_lm_head.weight.requires_grad


def test_a_loss_on_the_logits_of_a_frozen_context_tower_fails():
    model = student_model()
    loss = model(random_ids(2, 8)).logits.square().mean()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_also_under_checkpointing(use_reentrant):
    """Which makes the embeddings require gradients, but not those of a tower of which nothing is trained."""
    model = student_model().train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(random_ids(2, 8)).logits.square().mean().backward()
    # As an adapter would be.
    model.context_tower.layers[2].mixer.q_proj.weight.requires_grad_(True)
    model(random_ids(2, 8)).logits.square().mean().backward()
    assert set(learning(model)) == {"context_tower.layers.2.mixer.q_proj.weight"}
    model.disable_input_require_grads()
    assert not model.context_tower.embeddings._forward_hooks


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("labelled", [True, False])
def test_every_trained_parameter_gets_a_gradient_at_every_step(labelled, geometry):
    """As DistributedDataParallel wants; also where nothing is masked, and from experts no token has chosen."""
    model = student_model(geometry).train()
    ids = random_ids(1, 2 * model.config.block_size, vocab_size=model.config.vocab_size)
    model(ids, labels=ids if labelled else torch.full_like(ids, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# One step of many batches


@pytest.mark.parametrize("weighting", ["mean", "inverse_timestep"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1)])
def test_batches_of_a_step_sum_to_the_step(sizes, weighting):
    """With the items of the whole step, and the same masks: those of eval() depend on a row alone."""
    model = tiny_model("all kinds")
    inputs = batch(18, "right")
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    items = int((inputs["labels"] != -100).sum())
    chosen = {"loss_weighting": weighting, "num_items_in_batch": items, "corruptions": 2}
    whole = model(**inputs, **chosen).loss
    gradient = torch.autograd.grad(whole, model.lm_head.weight)[0]
    parts = zip(*(tensor.split(sizes) for tensor in inputs.values()), strict=True)
    losses = [model(**dict(zip(inputs, part, strict=True)), **chosen).loss for part in parts]
    assert_close(sum(losses), whole)
    assert_close(torch.autograd.grad(sum(losses), model.lm_head.weight)[0], gradient, slack=GRADIENTS)


def test_labels_of_padding_that_a_trainer_counts_are_refused():
    """The step's loss would be divided by more than is trained on."""
    model, inputs = tiny_model("only -"), batch(12, "right")
    items = int((inputs["labels"] != -100).sum())
    with pytest.raises(ValueError, match=r"labels has tokens where attention_mask is 0.*; set labels to -100 there"):
        model(**inputs, num_items_in_batch=items)


@pytest.mark.parametrize("weighting", ["mean", "inverse_timestep"])
def test_the_loss_per_item_is_the_mean_in_expectation(weighting):
    """Over many masked blocks the sum of their weights is what it is expected to be."""
    model = tiny_model("only -").train()
    ids = random_ids(8, 1600)
    with torch.no_grad():
        chosen = {"labels": ids, "loss_weighting": weighting, "corruptions": 2}
        mean = model(ids, **chosen, generator=seeded()).loss
        per_item = model(ids, **chosen, generator=seeded(), num_items_in_batch=torch.tensor(ids.numel())).loss
    # Of all blocks of 4 tokens, a fifth has no masked one and weighs nothing.
    expected = mean if weighting == "mean" else mean * 4 / 5
    assert abs(per_item / expected - 1) < 0.03


def test_items_repeated_for_several_devices_count_once():
    model = tiny_model("only -")
    ids = random_ids(2, 8)
    once = model(ids, labels=ids, num_items_in_batch=16).loss
    assert model(ids, labels=ids, num_items_in_batch=torch.tensor([[16, 16]])).loss == once
    assert model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)).loss == 0


def test_items_without_labels_are_refused_with_the_flag_that_does_it():
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match=r"without labels.*label_smoothing_factor or compute_loss_func"):
        tiny_model()(ids, num_items_in_batch=6)


# Evaluation


def test_an_evaluation_masks_the_same_every_time():
    model = tiny_model("all kinds")
    inputs = batch(18, "right")
    torch.manual_seed(0)
    first = model(**inputs, corruptions=2).loss
    torch.manual_seed(1)
    assert model(**inputs, corruptions=2).loss == first
    model.train()
    assert model(**inputs, corruptions=2).loss != model(**inputs, corruptions=2).loss


def test_training_on_the_masks_of_an_evaluation_warns(warned):
    model = tiny_model("only -")
    ids = random_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    assert "masks are the same at every step; call model.train()" in warned.text


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


def test_ids_of_32_bits_have_the_same_loss():
    model, ids = tiny_model().eval(), random_ids(2, 9)
    expected = model(ids, labels=ids).loss
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, expected)


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


def test_content_masked_depends_on_a_rows_own_tokens_alone():
    ids, size = random_ids(4, 24), 8
    tokens = torch.ones_like(ids).bool()
    tokens[0, 13:], tokens[1, 8:] = False, False
    trainable = tokens & (torch.rand(4, 24, generator=seeded()) < 0.7)
    masked = content_masked(ids, tokens, trainable, size)
    assert masked.any() and not (masked & ~trainable).any()
    assert torch.equal(content_masked(ids.flip(0), tokens.flip(0), trainable.flip(0), size), masked.flip(0))
    for row in range(4):
        alone = slice(row, row + 1)
        assert torch.equal(content_masked(ids[alone], tokens[alone], trainable[alone], size), masked[alone])
    wider = [F.pad(part, (8, 16)) for part in (ids, tokens, trainable)]
    assert torch.equal(content_masked(*wider, size)[:, 8:32], masked)
    ids[2, 5] += 1
    changed = content_masked(ids, tokens, trainable, size) != masked
    assert changed.any(1).tolist() == [False, False, True, False]
    swapped = ids[:, [1, 0, *range(2, 24)]]
    assert not torch.equal(content_masked(swapped, None, torch.ones_like(tokens), size), masked)


def test_content_masked_masks_as_often_as_sample_masked():
    ids = random_ids(4000, 16)
    masked = content_masked(ids.repeat_interleave(2, dim=0), None, torch.ones(8000, 16, dtype=torch.bool), 8, 2)
    counts = masked.unflatten(1, (2, 8)).sum(-1)
    shares = torch.bincount(counts.flatten(), minlength=9) / counts.numel()
    assert (shares - 1 / 9).abs().max() < 0.02
    first, second = counts.float().unbind(1)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.06
    once, again = counts[:, 0].float().unflatten(0, (-1, 2)).unbind(1)
    assert torch.corrcoef(torch.stack([once, again]))[0, 1].abs() < 0.06


def masked_cross_entropy(logits, targets, time, weighting="mean"):
    return weighted_mean(position_losses(logits, targets, DiffusionObjective()), time, weighting)


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
    "labels that are no targets, as mlm=True makes them": (
        {"labels": torch.tensor([[-100, 0, -100, -100, -100, -100]])},
        r"labels differ from input_ids elsewhere than at -100; .*mlm=False",
    ),
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
