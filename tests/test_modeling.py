"""Both towers: NVIDIA's numbers, transformers' NemotronH, chunks, padding, the denoiser, and what is refused.

The tiny models have random weights in every part, time conditioning included; see tiny.py.
"""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    GEOMETRIES,
    UNLIKE_TRANSFORMERS,
    random_block,
    random_ids,
    randomize,
    tiny_config,
    tiny_model,
    use_config_step_limit,
)
from tolerances import GRADIENTS, assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune, weight_norm
from transformers import FineGrainedFP8Config, NemotronHConfig, NemotronHForCausalLM
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from twotower.cache_twotower import KeyValues, TwoTowerCache
from twotower.checkpoints.loading import spare_modules
from twotower.checkpoints.pretrained import UNQUANTIZED_MODULES
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

MASK = 3


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.no_grad():
        yield


def context(model: TwoTowerForBlockDiffusion, ids: torch.Tensor, **kwargs) -> TwoTowerCache:
    return model(ids, use_cache=True, **kwargs).past_key_values


def left_padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask of rows of different length, padded in front."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask


def right_padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = left_padded(*(row.flip(0) for row in rows))
    return ids.flip(1), mask.flip(1)


def tensors_of(cache: TwoTowerCache) -> list[torch.Tensor]:
    """Everything a cache holds, unused capacity included."""
    held = []
    for layer in cache.layers:
        state = getattr(layer, "buffers", None) or getattr(layer, "state", None)
        held.extend(state or ())
    return [*held, cache.lengths]


# NVIDIA's numbers


@pytest.fixture(scope="module")
def nvidia(goldens):
    return TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")


@pytest.fixture(scope="module")
def numbers(goldens):
    return load_file(goldens / "tensors.safetensors")


@pytest.mark.parametrize("prompt", range(5))
def test_nvidias_context_tower(prompt, nvidia, numbers):
    output = nvidia(numbers[f"p{prompt}.ids"][None], logits_to_keep=1)
    assert_close(output.logits[0, 0], numbers[f"p{prompt}.context_last_logits"])


@pytest.mark.parametrize("prompt", range(5))
def test_nvidias_denoiser(prompt, nvidia, numbers):
    cache = context(nvidia, numbers[f"p{prompt}.ids"][None])
    blocks = [name for name in numbers if re.fullmatch(rf"p{prompt}\.den\.L\d+\.m\d+\.block", name)]
    assert len(blocks) > 5
    for name in blocks:
        block, logits = numbers[name][None], numbers[name.replace(".block", ".logits")]
        masks = int(re.search(r"\.m(\d+)\.", name)[1])
        assert (block == MASK).sum() == masks
        assert_close(nvidia.denoise(block, cache)[0], logits)
        assert_close(nvidia.denoise(block, cache, timestep=masks / block.shape[1])[0], logits)


@pytest.mark.parametrize("prompt", range(5))
def test_nvidias_denoiser_after_a_block_was_read(prompt, nvidia, numbers):
    cache = context(nvidia, numbers[f"p{prompt}.ids"][None])
    nvidia(numbers[f"p{prompt}.ext.ids"][None], past_key_values=cache)
    logits = nvidia.denoise(numbers[f"p{prompt}.ext.block"][None], cache)
    assert_close(logits[0], numbers[f"p{prompt}.ext.logits"])


def test_every_number_of_nvidias_is_used(numbers):
    used = r"p\d\.(ids|context_last_logits|ext\.(ids|block|logits)|den\.L\d+\.m\d+\.(block|logits))"
    assert all(re.fullmatch(used, name) for name in numbers)
    assert len(numbers) == 115


# transformers' NemotronH


def transformers_model(model: TwoTowerForBlockDiffusion) -> NemotronHForCausalLM:
    """transformers' NemotronH with the weights of a context tower."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    reference = NemotronHForCausalLM(NemotronHConfig(**fields)).eval()
    reference.set_experts_implementation("eager")
    reference.model.load_state_dict(model.context_tower.state_dict())
    reference.lm_head.load_state_dict(model.context_lm_head.state_dict())
    use_config_step_limit(reference)
    return reference


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES.keys() - UNLIKE_TRANSFORMERS))
def test_the_context_tower_is_transformers_nemotron_h(geometry):
    model = tiny_model(geometry)
    reference = transformers_model(model)
    vocab_size = model.config.vocab_size
    for length in (1, 2, 19):
        ids = random_ids(2, length, vocab_size=vocab_size, seed=length)
        assert_close(model(ids).logits, reference(ids, use_cache=False).logits)


def test_attention_biases_are_honoured():
    """As NVIDIA's code does; transformers reads the flag and builds none."""
    model = tiny_model("attention biases")
    attention = model.context_tower.layers[2].mixer
    ids = random_ids(1, 9)
    before = model(ids).logits
    for projection in (attention.q_proj, attention.v_proj, attention.o_proj):
        assert projection.bias.abs().max() > 0
        kept = projection.bias.clone()
        projection.bias.zero_()
        assert (model(ids).logits - before).abs().max() > 1e-3
        projection.bias.copy_(kept)
    # Of one query all scores move alike with the keys' bias, so it has no effect.
    attention.k_proj.bias.zero_()
    assert_close(model(ids).logits, before)


def test_the_released_step_clamp_matters():
    """The correction SPEC.md section 2 asks for: transformers' own clamp gives other logits."""
    model = tiny_model()
    model.context_tower.layers[0].mixer.dt_bias.fill_(-12.0)
    reference = transformers_model(model)
    ids = random_ids(1, 9)
    assert_close(model(ids).logits, reference(ids, use_cache=False).logits)
    for layer in reference.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (model.config.time_step_min, float("inf"))
    assert (model(ids).logits - reference(ids, use_cache=False).logits).abs().max() > 1e-3


def test_the_router_decides_in_float64():
    """Two experts a float32 product cannot tell apart, in either order."""
    model = tiny_model(num_experts_per_tok=1)
    gate = model.context_tower.layers[1].mixer.gate
    gate.e_score_correction_bias.zero_()
    hidden_states = torch.zeros(1, 32)
    hidden_states[0, :2] = 1.0
    for better, worse in ((1, 2), (2, 1)):
        gate.weight.zero_()
        gate.weight[better, :2] = torch.tensor([1.0, 1e-9])
        gate.weight[worse, :2] = torch.tensor([1.0, 0.0])
        _, weights, indices = gate(hidden_states)
        assert indices.tolist() == [[better]]
        assert weights.dtype == torch.float32


def test_the_correction_bias_decides_but_does_not_weigh():
    model = tiny_model(norm_topk_prob=False, routed_scaling_factor=1.0)
    gate = model.context_tower.layers[1].mixer.gate
    hidden_states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    gate.e_score_correction_bias.copy_(torch.tensor([10.0, -10.0, 10.0, -10.0]))
    logits, weights, indices = gate(hidden_states)
    assert indices.sort().values.tolist() == [[0, 2]] * 5
    assert_close(weights, logits.sigmoid().gather(1, indices), torch.float32)


def test_experts_outside_the_best_groups_score_zero():
    """As in NVIDIA's code: they go before experts of the best groups whose own score is below zero."""
    gate = tiny_model("expert groups", routed_scaling_factor=1.0).context_tower.layers[1].mixer.gate
    gate.weight.zero_()  # all sigmoids are 1 / 2
    # In pairs, groups 0 and 2 are best, with one expert above zero, and 1 and 3 score zero.
    gate.e_score_correction_bias.copy_(torch.tensor([-0.6, -0.7, -2.0, -2.0, 0.1, -0.8, -3.0, -3.0]))
    chosen = gate(torch.zeros(1, 32))[2][0].tolist()
    assert 4 in chosen
    assert set(chosen) - {4} <= {2, 3, 6, 7}
    # Above zero, the best groups' experts are all there is.
    gate.e_score_correction_bias.add_(3.0)
    assert set(gate(torch.zeros(1, 32))[2][0].tolist()) == {4, 0, 1}


def test_expert_sizes_torch_cannot_group():
    odd, even = tiny_model("odd").config, tiny_model().config
    assert odd._experts_implementation == even._experts_implementation == "grouped_mm_or_all"
    with pytest.raises(ValueError, match=r"multiples of 8, not \(30, 9\)"):
        TwoTowerForBlockDiffusion(tiny_config("odd", experts_implementation="grouped_mm"))


# Chunks and padding


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("split", [1, 2, 9, 18])
def test_chunks_of_the_same_tokens_give_the_same_logits(split, geometry):
    model = tiny_model(geometry)
    ids = random_ids(2, 19, vocab_size=model.config.vocab_size)
    whole = model(ids)
    first = model(ids[:, :split])
    second = model(ids[:, split:], past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    for actual, expected in zip(tensors_of(second.past_key_values), tensors_of(whole.past_key_values), strict=True):
        if actual.ndim == 4 and actual.shape != expected.shape:
            actual, expected = actual[:, :, :19], expected[:, :, :19]
        assert_close(actual, expected, torch.float32)


def test_one_token_at_a_time():
    model = tiny_model("all kinds")
    ids = random_ids(2, 19)
    cache, logits = TwoTowerCache(model.config), []
    for token in ids.split(1, dim=1):
        logits.append(model(token, past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1), model(ids).logits)


@pytest.mark.parametrize("geometry", ["all kinds", "odd", "convolution longer than a block", "pure attention"])
@pytest.mark.parametrize("pad", [left_padded, right_padded])
def test_padded_rows_equal_single_rows(pad, geometry):
    model = tiny_model(geometry)
    rows = [random_ids(length, vocab_size=model.config.vocab_size, seed=length) for length in (1, 13, 4, 9)]
    ids, mask = pad(*rows)
    output = model(ids, attention_mask=mask)
    more = random_ids(4, 3, vocab_size=model.config.vocab_size, seed=1)
    after = model(more, past_key_values=output.past_key_values)
    for index, row in enumerate(rows):
        alone = model(row[None])
        assert_close(output.logits[index][mask[index].bool()], alone.logits[0])
        after_alone = model(more[index : index + 1], past_key_values=alone.past_key_values)
        assert_close(after.logits[index], after_alone.logits[0])


@pytest.mark.parametrize("pad", [left_padded, right_padded])
@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_padded_rows_in_chunks(chunk, pad):
    """With the whole mask of the columns so far, as transformers passes it; a row may have no token in a chunk."""
    model = tiny_model("all kinds")
    rows = [random_ids(length, seed=length) for length in (2, 13, 7)]
    ids, mask = pad(*rows)
    cache, logits = TwoTowerCache(model.config), []
    for end in range(chunk, 13 + chunk, chunk):
        columns = slice(end - chunk, end)
        logits.append(model(ids[:, columns], attention_mask=mask[:, :end], past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    assert cache.lengths.tolist() == [2, 13, 7]
    for index, row in enumerate(rows):
        assert_close(logits[index][mask[index].bool()], model(row[None]).logits[0])


def test_padding_in_the_middle_of_a_conversation():
    """Rows padded on the right, then continued by rows padded on the left."""
    model = tiny_model("all kinds")
    first = [random_ids(length, seed=length) for length in (5, 2)]
    second = [random_ids(length, seed=10 + length) for length in (1, 4)]
    ids, mask = right_padded(*first)
    cache = context(model, ids, attention_mask=mask)
    ids, mask = left_padded(*second)
    output = model(ids, attention_mask=mask, past_key_values=cache)
    for index in range(2):
        alone = model(torch.cat([first[index], second[index]])[None], logits_to_keep=len(second[index]))
        assert_close(output.logits[index][mask[index].bool()], alone.logits[0])


# A block read tentatively, of which each row keeps a prefix


def draft_by_draft(model, ids, lengths, drafts) -> tuple[TwoTowerCache, list[torch.Tensor]]:
    """Read prompts of `lengths`, then each draft tentatively; the cache, and each row's tokens that count."""
    cache = context(model, ids, attention_mask=(torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long())
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    for draft, counts in drafts:
        hidden_states = model.context_tower(draft, cache, tentative=True)
        assert hidden_states.shape == (*draft.shape, model.config.hidden_size)
        cache.accept(torch.tensor(counts))
        rows = [torch.cat([row, new[:count]]) for row, new, count in zip(rows, draft, counts, strict=True)]
    return cache, rows


def assert_reads_on_as(model, cache, rows, slack=1.0):
    """The cache holds what reading each row of tokens plainly gives, and everything after it follows."""
    vocab_size = model.config.vocab_size
    following, block = random_ids(1, 2, vocab_size=vocab_size), random_block(1, 3, vocab_size=vocab_size)
    batch = len(rows)
    denoised = model.denoise(block.expand(batch, -1), cache)
    held = [cache.view(layer) for layer in range(len(cache.layers))]
    logits = model(following.expand(batch, -1), past_key_values=cache).logits
    for index, row in enumerate(rows):
        alone = context(model, row[None])
        for layer, expected in enumerate(held):
            for part, own in zip(expected or (), alone.view(layer) or (), strict=True):
                part = part[index : index + 1, :, : len(row)] if isinstance(expected, KeyValues) else part[[index]]
                assert_close(part, own, slack=slack)
        assert_close(denoised[index], model.denoise(block, alone)[0], slack=slack)
        assert_close(logits[index], model(following, past_key_values=alone).logits[0], slack=slack)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 1, 4)])
def test_what_is_accepted_is_what_reading_it_plainly_gives(lengths, geometry):
    model = tiny_model(geometry)
    vocab_size = model.config.vocab_size
    drafts = [
        (random_ids(3, 5, vocab_size=vocab_size, seed=1), [0, 5, 2]),
        (random_ids(3, 9, vocab_size=vocab_size, seed=2), [9, 1, 3]),
        (random_ids(3, 1, vocab_size=vocab_size, seed=3), [1, 1, 0]),
    ]
    assert_reads_on_as(model, *draft_by_draft(model, random_ids(3, 6, vocab_size=vocab_size), lengths, drafts))


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_cycle_after_cycle(size):
    model = tiny_model("all kinds")
    drafts = [(random_ids(2, size, seed=cycle), [cycle % (size + 1), size - cycle % size]) for cycle in range(7)]
    assert_reads_on_as(model, *draft_by_draft(model, random_ids(2, 3), (3, 2), drafts), slack=2.0)


@pytest.mark.parametrize("counts", [[0, 0], [3, 3], [4, 4]])
def test_rows_that_keep_equally_much_stay_equally_long(counts):
    model = tiny_model("all kinds")
    cache, rows = draft_by_draft(model, random_ids(2, 3), (3, 3), [(random_ids(2, 4, seed=1), counts)])
    assert cache.context_lengths() is None
    assert cache.width == 3 + counts[0]
    assert_reads_on_as(model, cache, rows)


@pytest.mark.parametrize("geometry", ["all kinds", "odd"])
def test_a_tentative_read_sees_what_a_plain_one_sees(geometry):
    model = tiny_model(geometry)
    vocab_size = model.config.vocab_size
    ids, draft = random_ids(2, 5, vocab_size=vocab_size), random_ids(2, 7, vocab_size=vocab_size, seed=1)
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    plain, cache = (context(model, ids, attention_mask=mask) for _ in range(2))
    hidden_states = model.context_tower(draft, cache, tentative=True)
    assert cache.width == 5
    assert_close(hidden_states, model.context_tower(draft, plain))
    # The denoiser sees only what counts, before as after.
    block = random_block(2, 3, vocab_size=vocab_size)
    expected = model.denoise(block, context(model, ids, attention_mask=mask))
    assert_close(model.denoise(block, cache), expected)
    cache.accept(torch.tensor([0, 0]))
    assert_close(model.denoise(block, cache), expected)


def test_a_tentative_read_from_the_beginning():
    model = tiny_model("all kinds")
    cache, draft = TwoTowerCache(model.config), random_ids(2, 6)
    model.context_tower(draft, cache, tentative=True)
    cache.accept(torch.tensor([2, 6]))
    assert_reads_on_as(model, cache, [draft[0, :2], draft[1]])


def test_a_prompt_read_at_once_leaves_only_its_last_inputs_in_the_cache():
    cache = context(tiny_model("all kinds"), random_ids(1, 200))
    for part in (part for layer in (0, 6) for part in cache.view(layer)):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)])
def test_a_cache_filled_in_inference_mode_serves_outside_of_it(lengths):
    model = tiny_model("all kinds")
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    ids, draft, block = random_ids(2, 6), random_ids(2, 3, seed=1), random_block(2, 3)

    def read(cache):
        model(ids, attention_mask=mask, past_key_values=cache)
        model.context_tower(draft, cache, tentative=True)
        cache.accept(torch.tensor([3, 1]))
        cache.replace_rows([cache.copy_rows(torch.tensor([1, 0]))])
        cache.select_rows(torch.tensor([1, 0]))
        return cache

    plain = read(TwoTowerCache(model.config))
    with torch.inference_mode():
        cache = read(TwoTowerCache(model.config))
    assert_close(model(draft, past_key_values=cache).logits, model(draft, past_key_values=plain).logits)
    parameter = model.denoiser_tower.layers[0].mixer.in_proj.weight
    with torch.enable_grad():
        gradients = [torch.autograd.grad(model.denoise(block, held).sum(), parameter) for held in (cache, plain)]
    assert_close(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_context_tower_has_gradients_also_with_a_cache(checkpointing):
    model, ids = tiny_model("all kinds"), random_ids(2, 7)
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
    parameters = [parameter for parameter in model.context_tower.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        gradients, expected = (
            torch.autograd.grad(model(ids, use_cache=cached).logits.square().sum(), parameters)
            for cached in (True, False)
        )
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other, slack=GRADIENTS)


def test_gradients_of_a_text_read_in_chunks_are_those_of_whole_reads():
    """What one pass needs for its gradients is not written over by the next."""
    model, ids, block = tiny_model("all kinds").double(), random_ids(2, 7), random_block(2, 3)
    parameters = list(model.parameters())
    with torch.enable_grad():
        cache, in_chunks, whole = TwoTowerCache(model.config), 0.0, model(ids).logits.square().sum()
        for start, stop in ((0, 1), (1, 4), (4, 6), (6, 7)):
            in_chunks += model(ids[:, start:stop], past_key_values=cache).logits.square().sum()
            in_chunks += model.denoise(block, cache).square().sum()
            whole += model.denoise(block, model(ids[:, :stop]).cache).square().sum()
        for gradient, expected in zip(
            torch.autograd.grad(in_chunks, parameters), torch.autograd.grad(whole, parameters), strict=True
        ):
            assert_close(gradient, expected)


def test_accepted_states_of_a_bfloat16_model():
    """Rounded as they come, the chunk's inputs give states as precise as a plain read's."""
    model = tiny_model("pure Mamba").to(torch.bfloat16)
    ids, draft = random_ids(2, 5), random_ids(2, 7, seed=1)
    cache, rows = draft_by_draft(model, ids, (5, 3), [(draft, [4, 7])])
    for index, row in enumerate(rows):
        alone = context(model, ids[index : index + 1, : (5, 3)[index]])
        model(row[None, (5, 3)[index] :], past_key_values=alone)
        held, expected = cache.view(0), alone.view(0)
        assert held.ssm.dtype == torch.float32
        assert held.conv.dtype == torch.bfloat16
        assert torch.equal(held.conv[index], expected.conv[0])
        assert_close(held.ssm[index], expected.ssm[0])
        assert_close(cache.view(1).ssm[index], alone.view(1).ssm[0], torch.bfloat16)


def test_an_attention_mask_of_ones_changes_nothing():
    model = tiny_model()
    ids = random_ids(2, 7)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


def test_logits_to_keep():
    model = tiny_model()
    ids = random_ids(2, 7)
    logits = model(ids).logits
    assert logits.shape == (2, 7, 48)
    assert logits.dtype == torch.float32
    assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_use_cache():
    model = tiny_model()
    ids = random_ids(1, 7)
    assert model(ids, use_cache=False).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, TwoTowerCache)
    assert isinstance(model(ids).past_key_values, TwoTowerCache)
    assert_close(model(ids, use_cache=False).logits, model(ids).logits)
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_bfloat16_follows_float32():
    model = tiny_model("all kinds")
    ids = random_ids(2, 19)
    expected = model(ids).logits
    block = random_block(2, 6)
    expected_block = model.denoise(block, context(model, ids))
    model = model.to(torch.bfloat16)
    output = model(ids)
    assert output.logits.dtype == torch.float32
    for actual, reference in (
        (output.logits, expected),
        (model.denoise(block, output.past_key_values), expected_block),
    ):
        # Expert choices may flip, so most of the logits are compared, not all.
        assert (actual - reference).abs().median() < 0.05 * reference.abs().max()
        assert actual.isfinite().all()


# The denoiser


def denoise_by_hand(model, block, ids, timestep):
    """
    SPEC.md section 3 for one row without a cache: (1, S) block after (1, L) context, in the order it is written there.

    Keys, values and states come from a context pass by itself; attention is written out, and Mamba runs over context
    and block at once with the block's own inputs, starting from the context tower's state.
    """
    cache = context(model, ids)
    features = torch.arange(model.config.timestep_features // 2)
    frequencies = model.config.timestep_max_period ** (-features / (model.config.timestep_features // 2))
    angles = timestep * model.config.timestep_scale * frequencies
    embedded = model.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()])[None])
    offsets = model.t_block(embedded).view(3, -1)
    x = model.denoiser_tower.embeddings(block)
    for index, layer in enumerate(model.denoiser_tower.layers):
        shift, scale, gate = model.scale_shift_tables[index] + offsets
        kind = model.config.layers_block_type[index]
        past = cache.view(index)
        if kind in ("moe", "mlp"):
            mixed = layer.mixer(layer.norm(x) * (1 + scale) + shift)
        elif kind == "full_attention":
            mixed = attention_by_hand(layer.mixer, layer.norm(x * (1 + scale) + shift), past)
        else:
            mixed = mamba_by_hand(layer.mixer, layer.norm(x * (1 + scale) + shift), past)
        x = x + gate * mixed
    return model.lm_head(model.denoiser_tower.norm_f(x))


def attention_by_hand(mixer, x, past):
    groups = mixer.num_key_value_groups
    query, key, value = (
        projection(x).view(1, x.shape[1], -1, mixer.head_dim).transpose(1, 2)
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) / mixer.head_dim**0.5
    out = scores.softmax(-1) @ value.repeat_interleave(groups, dim=1)
    return mixer.o_proj(out.transpose(1, 2).flatten(2))


def mamba_by_hand(mixer, x, past):
    projected = mixer.in_proj(x)
    gate, inputs, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    dt = torch.nn.functional.softplus(dt + mixer.dt_bias).clamp(*mixer.config.time_step_limit)
    padded = torch.cat([past.conv, inputs], dim=1).transpose(1, 2)
    convolved = torch.nn.functional.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.conv_dim)
    convolved = mixer.act(convolved).transpose(1, 2)
    state_size = mixer.n_groups * mixer.ssm_state_size
    u, B, C = convolved.split([mixer.intermediate_size, state_size, state_size], dim=-1)
    u = u.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    B, C = (
        part.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(mixer.num_heads // mixer.n_groups, dim=2)
        for part in (B, C)
    )
    h, outputs = past.ssm, []
    for t in range(x.shape[1]):
        h = torch.exp(-mixer.A_log.exp() * dt[:, t])[..., None, None] * h
        h = h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1) + mixer.D[:, None] * u[:, t])
    return mixer.out_proj(mixer.norm(torch.stack(outputs, dim=1).flatten(2), gate))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_denoiser_is_the_specification_written_out(size, geometry):
    model = tiny_model(geometry)
    vocab_size = model.config.vocab_size
    ids, block = random_ids(1, 11, vocab_size=vocab_size), random_block(1, size, vocab_size=vocab_size)
    logits = model.denoise(block, context(model, ids), timestep=0.3)
    assert logits.dtype == torch.float32
    assert_close(logits, denoise_by_hand(model, block, ids, 0.3))


@pytest.mark.parametrize("size", range(1, 41))
def test_blocks_of_any_size_leave_the_cache_as_it_is(size):
    model = tiny_model("all kinds")
    rows = [random_ids(length, seed=length) for length in (3, 8)]
    ids, mask = right_padded(*rows)
    cache = context(model, ids, attention_mask=mask)
    before = [tensor.clone() for tensor in tensors_of(cache)]
    width = cache.width
    block = random_block(2, size, seed=size)
    logits = model.denoise(block, cache)
    assert logits.shape == (2, size, 48)
    assert cache.width == width
    for after, expected in zip(tensors_of(cache), before, strict=True):
        assert torch.equal(after, expected)
    for index, row in enumerate(rows):
        alone = model.denoise(block[index : index + 1], context(model, row[None]))
        assert_close(logits[index], alone[0])


def test_the_time_is_each_rows_masked_fraction():
    model = tiny_model()
    cache = context(model, random_ids(3, 5))
    block = random_ids(3, 8)
    block[0, :2], block[1, 1:], block[2, 0] = MASK, MASK, MASK
    logits = model.denoise(block, cache)
    assert_close(model.denoise(block, cache, timestep=torch.tensor([0.25, 0.875, 0.125])), logits)
    assert (model.denoise(block, cache, timestep=0.25) - logits)[1:].abs().max() > 1e-2
    assert_close(model.denoise(block, cache, timestep=0.25)[0], logits[0])
    assert_close(model.denoise(block, cache, timestep=torch.tensor(0.25))[0], logits[0])


@pytest.mark.parametrize(("masked", "size", "time"), [(15, 16, 936.0), (3, 11, 274.0), (13, 24, 544.0)])
def test_the_time_is_rounded_to_the_models_dtype_before_it_is_scaled(masked, size, time):
    """SPEC.md section 3. Scaled first, the last two would be 272 and 540."""
    embedder = tiny_model().t_embedder.to(torch.bfloat16)
    features = []
    embedder.mlp.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    embedder(torch.tensor([masked / size]))
    assert features[0].dtype == torch.bfloat16
    half = embedder.features // 2
    assert torch.equal(
        features[0][0, [0, half]], torch.stack([torch.tensor(time).cos(), torch.tensor(time).sin()]).bfloat16()
    )


@pytest.mark.parametrize("geometry", ["all kinds", "only -", "pure Mamba", "pure attention", "odd"])
def test_an_empty_context(geometry):
    model = tiny_model(geometry)
    block = random_block(2, 5, vocab_size=model.config.vocab_size)
    logits = model.denoise(block, TwoTowerCache(model.config))
    assert logits.shape == (2, 5, model.config.vocab_size)
    for row in range(2):
        assert_close(model.denoise(block[row : row + 1], TwoTowerCache(model.config))[0], logits[row])


@pytest.mark.parametrize("pad", [left_padded, right_padded])
def test_padding_in_a_block_is_not_seen(pad):
    model = tiny_model("all kinds")
    prompts = [random_ids(length, seed=length) for length in (6, 3)]
    blocks = [random_block(5), random_block(2, seed=1)]
    ids, mask = left_padded(*prompts)
    cache = context(model, ids, attention_mask=mask)
    block, block_mask = pad(*blocks)
    logits = model.denoise(block, cache, attention_mask=block_mask)
    whole = torch.cat([mask, block_mask], dim=1)
    assert torch.equal(model.denoise(block, cache, attention_mask=whole), logits)
    for index in range(2):
        alone = model.denoise(blocks[index][None], context(model, prompts[index][None]))
        assert_close(logits[index][block_mask[index].bool()], alone[0])


def test_every_position_of_a_block_sees_every_other():
    model = tiny_model("attention first")
    cache = context(model, random_ids(1, 5))
    block = random_block(1, 6)
    logits = model.denoise(block, cache, timestep=0.5)
    for changed in range(6):
        other = block.clone()
        other[0, changed] = 7 if block[0, changed] != 7 else 8
        assert ((model.denoise(other, cache, timestep=0.5) - logits).abs().amax(-1) > 1e-4).all()


def test_mamba_scans_a_block_forward():
    model = tiny_model("pure Mamba")
    cache = context(model, random_ids(1, 5))
    block = random_block(1, 6)
    logits = model.denoise(block, cache, timestep=0.5)
    other = block.clone()
    other[0, 3] = 7 if block[0, 3] != 7 else 8
    changed = (model.denoise(other, cache, timestep=0.5) - logits).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 3


def test_predict_next_is_a_plain_layer_stack_on_the_context_before_the_token():
    """With both towers equal, it is the context tower's own next-token prediction."""
    model = tiny_model("all kinds")
    model.reset_denoiser()
    randomize(model.scale_shift_tables)
    rows = [random_ids(length, seed=length) for length in (4, 9)]
    ids, mask = right_padded(*rows)
    token = random_ids(2, 1, seed=1)
    cache = context(model, ids, attention_mask=mask)
    logits = model.predict_next(token, cache)
    assert logits.shape == (2, 48)
    assert_close(logits, model(token, past_key_values=cache).logits[:, -1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_untrained_denoiser_computes_what_the_context_tower_does(geometry):
    """Identity conditioning: a block of one token sees what that token sees in the context tower."""
    model = tiny_model(geometry)
    model.reset_denoiser()
    vocab_size = model.config.vocab_size
    cache = context(model, random_ids(2, 7, vocab_size=vocab_size))
    token = random_ids(2, 1, vocab_size=vocab_size, seed=1)
    logits = model.denoise(token, cache, timestep=0.7)
    assert_close(logits, model(token, past_key_values=cache).logits)


def test_fresh_weights_are_the_identity_conditioning():
    model = TwoTowerForBlockDiffusion(tiny_config())
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.load_state_dict(model.context_lm_head.state_dict())
    cache = context(model, random_ids(1, 7))
    token = random_ids(1, 1, seed=1)
    logits = model.denoise(token, cache, timestep=0.7)
    assert_close(logits, model(token, past_key_values=cache).logits)


def test_prompts_of_one_token():
    model = tiny_model("all kinds")
    ids = random_ids(1, 1)
    assert_close(
        model.denoise(random_block(1, 3), context(model, ids), 0.3),
        denoise_by_hand(model, random_block(1, 3), ids, 0.3),
    )


# What is refused


def test_tentative_reads_that_are_refused():
    model = tiny_model()
    ids, cache = random_ids(2, 5), TwoTowerCache(model.config)
    for arguments in ((ids, None), (ids, None, torch.tensor([1, 2]))):
        with pytest.raises(ValueError, match="tentative=True needs past_key_values, whose accept"):
            model.context_tower(*arguments, tentative=True)
    model.context_tower(ids, cache, tentative=True)
    for tentative in (True, False):
        with pytest.raises(ValueError, match="holds 5 tokens read tentatively"):
            model.context_tower(ids, cache, tentative=tentative)


MASKS = {
    "a hole": ([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]], r"row 1 of attention_mask has holes: \[1, 0, 1, 1, 1\]"),
    "two holes": ([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], r"row 0 of attention_mask has holes: \[0, 1, 0, 1, 0\]"),
    "a row of padding": ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], "row 1 of attention_mask masks all of its tokens"),
    "too few columns": (
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        r"attention_mask has shape \(2, 4\); input_ids of shape \(2, 5\)",
    ),
    "too many columns": ([[1] * 6] * 2, r"attention_mask has shape \(2, 6\)"),
    "too few rows": ([[1] * 5], r"attention_mask has shape \(1, 5\)"),
    "no batch": ([1] * 5, r"attention_mask has shape \(5,\)"),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("training", [False, True])
def test_attention_masks_that_are_refused(training, case):
    mask, message = MASKS[case]
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids, attention_mask=torch.tensor(mask), labels=ids if training else None)


def test_masks_after_a_cache_that_are_refused():
    model = tiny_model()
    cache = context(model, random_ids(2, 6))
    ids = random_ids(2, 5)
    for width in (4, 6, 10):
        mask = torch.ones(2, width, dtype=torch.long)
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(2, {width}\).*wider by the 6 cached"):
            model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(2, {width}\).*wider by the 6 cached"):
            model.denoise(ids, cache, attention_mask=mask)
    with pytest.raises(ValueError, match="row 0 of attention_mask has holes"):
        model.denoise(ids, cache, attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 2))
    assert cache.width == 6


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3), (2, 0)])
def test_ids_of_another_shape_are_refused(shape):
    model = tiny_model()
    ids = torch.zeros(shape, dtype=torch.long)
    cache = context(model, random_ids(2, 6))
    with pytest.raises(ValueError, match=re.escape(f"input_ids has shape {shape}")):
        model(ids)
    with pytest.raises(ValueError, match=re.escape(f"input_ids has shape {shape}")):
        model.predict_next(ids, cache)
    with pytest.raises(ValueError, match=re.escape(f"block_ids has shape {shape}")):
        model.denoise(ids, cache)


def test_what_the_denoiser_is_not_made_for_is_refused():
    model, block = tiny_model(), random_ids(2, 4)
    cache = context(model, random_ids(2, 6))
    for call in (model.denoise, model.predict_next):
        with pytest.raises(ValueError, match="past_key_values is a NoneType; give the TwoTowerCache"):
            call(block, None)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 4\); predict_next reads one token of each row"):
        model.predict_next(block, cache)
    for timestep in (1.5, -0.1, [0.5, 2.0], math.nan):
        with pytest.raises(ValueError, match=r"timestep is .*; give numbers in \[0, 1\]"):
            model.denoise(block, cache, timestep=timestep)


def test_other_rows_than_the_caches_are_refused():
    model = tiny_model()
    cache = context(model, random_ids(2, 6))
    ids = random_ids(3, 2)
    for call, name in ((model.denoise, "block_ids"), (model.predict_next, "input_ids")):
        with pytest.raises(ValueError, match=f"{name} has 3 rows, but past_key_values holds 2"):
            call(ids, cache)
    with pytest.raises(ValueError, match="input_ids has 3 rows, but past_key_values holds 2"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", ["base", "latent experts", "expert groups", "one expert", "all experts"])
def test_a_lone_token_gets_from_its_experts_what_it_gets_among_others(geometry, dtype):
    model = tiny_model(geometry).to(dtype)
    moe = model.context_tower.layers[1].mixer
    hidden_states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = moe(hidden_states)
    alone = torch.cat([moe(hidden_states[:, idx : idx + 1]) for idx in range(5)], dim=1)
    assert_close(alone, together)


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_expert_that_no_token_chose_has_no_say(tokens):
    moe = tiny_model().context_tower.layers[1].mixer
    hidden_states = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moe.gate.e_score_correction_bias[0] = -torch.inf
        expected = moe(hidden_states)
        moe.experts.down_proj[0] = torch.inf
        assert torch.equal(moe(hidden_states), expected)


def test_the_shares_of_experts_that_all_score_next_to_nothing_are_nvidias():
    router = tiny_model().context_tower.layers[1].mixer.gate
    with torch.no_grad():
        router.weight.zero_()[:, 0] = -50.0  # sigmoids of 2e-22, against an epsilon of 1e-20
        _, weights, _ = router(torch.eye(32)[:1])
    assert 0 < float(weights.sum()) < 0.1


def test_a_lone_token_has_gradients():
    moe = tiny_model().context_tower.layers[1].mixer
    hidden_states = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    parameters = [*moe.experts.parameters(), moe.gate.weight]
    with torch.enable_grad():
        alone = torch.autograd.grad(moe(hidden_states).square().sum(), parameters)
        twice = torch.autograd.grad(moe(hidden_states.expand(1, 2, -1)).square().sum() / 2, parameters)
    for gradient, expected in zip(alone, twice, strict=True):
        assert_close(gradient, expected, slack=GRADIENTS)


def test_an_experts_implementation_asked_for_by_name_is_kept(monkeypatch):
    def refuse(*args):
        raise AssertionError("another implementation was called")

    for name in ("eager", "batched_mm", "grouped_mm", "grouped_mm_or_all"):
        model = TwoTowerForBlockDiffusion(tiny_config(experts_implementation=name))
        assert model.config._experts_implementation == name
        with monkeypatch.context() as patch:
            for other in {"batched_mm", "grouped_mm", "grouped_mm_or_all"} - {name}:
                patch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, other, refuse)
            model(random_ids(1, 1))


def test_fp8_takes_the_layers_of_the_towers_and_nothing_else():
    """Which modules become which; to compute in fp8 takes a GPU."""
    with torch.device("meta"):
        model = tiny_model("each kind once")
    spared = spare_modules(FineGrainedFP8Config(), UNQUANTIZED_MODULES)
    replace_with_fp8_linear(model, spared.modules_to_not_convert, spared)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {name for name in linear if kinds[name] == "Linear"}
    assert kept == {"context_lm_head", "lm_head", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1"}
    assert len(linear - kept) == 2 * (2 + 4 + 2 + 2)
    for tower in (model.context_tower, model.denoiser_tower):
        moe = next(layer.mixer for layer in tower.layers if hasattr(layer.mixer, "experts"))
        assert type(moe.experts).__name__ == "FP8Experts" and type(moe.gate).__name__ == "TwoTowerRouter"
        assert moe.experts.up_proj.shape == (4, 16, 32)
        assert type(moe.experts.act_fn) is type(moe.shared_experts.act_fn)


def test_quantised_experts_keep_transformers_default():
    config = tiny_config()
    config.quantization_config = {"quant_method": "fp8"}
    assert TwoTowerForBlockDiffusion(config).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_without_gradients_go_through_vmap(dtype):
    model, ids = tiny_model("base").to(dtype), random_ids(3, 9)
    weights = dict(model.named_parameters())

    def logits(row):
        return torch.func.functional_call(model, weights, (row[None],), {"use_cache": False}).logits[0]

    assert_close(torch.vmap(logits)(ids), model(ids, use_cache=False).logits, slack=100)


def test_a_fake_pass_leaves_nothing_behind():
    model, ids = tiny_model("base"), random_ids(1, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(ids), use_cache=False)
    assert type(model(ids, use_cache=False).logits) is torch.Tensor


def _prune(module):
    prune.l1_unstructured(module, "weight", amount=0.5)


@pytest.mark.parametrize("change", [_prune, weight_norm], ids=["pruning", "weight norm"])
@pytest.mark.parametrize("part", ["conv1d", "norm"])
def test_weights_that_hooks_make_are_those_of_the_pass(change, part):
    if change is weight_norm and part == "norm":
        pytest.skip("of weights of two dimensions")
    model, ids = tiny_model("only M"), random_ids(2, 9)
    mixer = model.context_tower.layers[0].mixer
    change(getattr(mixer, part))
    if change is weight_norm:
        with torch.no_grad():
            mixer.conv1d.weight_g.mul_(0.2)
    plain = tiny_model("only M")
    made = getattr(mixer, part)
    for hook in made._forward_pre_hooks.values():
        hook(made, ())
    with torch.no_grad():
        plain.context_tower.layers[0].mixer.get_submodule(part).weight.copy_(made.weight)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    flags = {"mode": "ar", "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    assert torch.equal(
        torch.stack(model.generate(ids, **flags).logits), torch.stack(plain.generate(ids, **flags).logits)
    )
    with torch.enable_grad():
        for _ in range(2):  # the hook makes a new graph for each pass
            model(ids).logits.sum().backward()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_nobody_calls_is_told_of(register, warned):
    model = tiny_model("only M")
    getattr(model.context_tower.layers[0].mixer.conv1d, register)(lambda module, inputs, *output: inputs[0])
    model(random_ids(1, 4))
    assert "a forward hook is on the Conv1d of a Mamba layer" in warned.text


def test_layers_without_parameters_embed_the_time():
    """As torch's dynamically quantised ones are."""

    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.packed = (linear,)

        def forward(self, hidden_states):
            return self.packed[0](hidden_states)

    model, ids = tiny_model("base"), random_ids(1, 5)
    expected = model.generate(ids, max_new_tokens=4)
    for idx in (0, 2):
        model.t_embedder.mlp[idx] = Packed(model.t_embedder.mlp[idx])
    assert torch.equal(model.generate(ids, max_new_tokens=4), expected)
