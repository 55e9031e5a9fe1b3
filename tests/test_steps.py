"""A step through prepared weights is a step of the layers; where it would not be, the layers take it."""

import copy

import pytest
import torch
from tiny import GEOMETRIES, random_ids, tiny_model
from tolerances import assert_close

from twotower.cache_twotower import TwoTowerCache
from twotower.steps_twotower import PreparedStep

LEFT_TO_LAYERS = {"latent experts", "latent biases", "expert groups", "other activations", "odd"}


def read(model, counts=None, rows=2) -> TwoTowerCache:
    cache = TwoTowerCache(model.config)
    model.context_tower(random_ids(rows, 9, seed=1), cache, counts)
    return cache


@torch.no_grad()
def steps(model, cache, number=3) -> torch.Tensor:
    ids = random_ids(cache.batch_size, number, seed=2)
    return torch.stack([model.context_tower(ids[:, at : at + 1], cache) for at in range(number)])


def calls_of(module, model, cache) -> int:
    """How often a hook on one of the tower's modules hears of a step."""
    calls = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    steps(model, cache, 1)
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("counts", [None, [9, 4], "one row"])
@torch.no_grad()
def test_steps_are_those_of_the_layers_and_leave_the_same_cache(geometry, counts):
    model = tiny_model(geometry)
    rows, counts = (1, None) if counts == "one row" else (2, counts)
    caches = read(model, counts, rows), read(model, counts, rows)
    expected = steps(model, caches[0])
    with model.prepared():
        assert (model.context_tower._step is None) == (geometry in LEFT_TO_LAYERS)
        assert_close(steps(model, caches[1]), expected)
    for one, other in zip(*(cache.views() for cache in caches), strict=True):
        for part, same in zip(one or (), other or (), strict=True):
            assert_close(same, part)


@torch.no_grad()
def test_rows_of_a_part_take_their_steps_alone():
    model = tiny_model("base")
    cache, whole = read(model, rows=3), read(model, rows=3)
    expected = steps(model, whole.part([2, 0]))
    with model.prepared():
        assert_close(steps(model, cache.part([2, 0])), expected)
    assert cache.host_lengths == whole.host_lengths == [12, 9, 12]


@torch.no_grad()
def test_a_hook_within_is_called_wherever_it_is():
    model = tiny_model("all kinds")
    for module in model.context_tower.modules():
        expected = calls_of(module, model, read(model))
        with model.prepared():
            assert calls_of(module, model, read(model)) == expected


@torch.no_grad()
def test_another_weight_in_a_weights_place_is_seen_by_the_next_step():
    model = tiny_model("all kinds")
    for name, _ in list(model.context_tower.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.context_tower.get_submodule(owner)
        cache, expected = read(model), read(model)
        with model.prepared():
            weight = getattr(module, leaf)
            setattr(module, leaf, torch.nn.Parameter(weight + 0.3 * torch.randn_like(weight)))
            within = steps(model, cache, 1)
        assert_close(within, steps(model, expected, 1))


@torch.no_grad()
def test_it_ends_with_what_is_prepared_and_no_copy_has_it():
    model = tiny_model("base")
    with model.prepared():
        assert copy.deepcopy(model).context_tower._step is None and model.context_tower._step is not None
    assert model.context_tower._step is None


@pytest.mark.parametrize("change", ["dtype", "kernels", "attention", "adapter"])
@torch.no_grad()
def test_what_is_written_for_one_case_is_used_in_no_other(change):
    model = tiny_model("base")
    if change == "dtype":
        model.to(torch.bfloat16)
    elif change == "attention":
        model.set_attn_implementation("eager")
    elif change == "adapter":

        class Adapted(torch.nn.Linear):
            pass

        model.context_tower.layers[0].mixer.in_proj.__class__ = Adapted
    with model.prepared():
        if change == "kernels":
            assert model.context_tower._step.fits()
            model.set_kernels("torch")
            assert not model.context_tower._step.fits()
        else:
            assert model.context_tower._step is None


def test_with_gradients_the_layers_take_it():
    model = tiny_model("base")
    model.set_trained_towers("both")
    with torch.no_grad():
        cache = read(model)
    with model.prepared(), torch.enable_grad():
        model.context_tower(random_ids(2, 1), cache).sum().backward()
    assert model.context_tower.layers[0].mixer.in_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_generation_takes_its_steps_so_unless_somebody_listens(monkeypatch):
    model, taken = tiny_model("base"), []
    run = PreparedStep.run
    monkeypatch.setattr(PreparedStep, "run", lambda *args: taken.append(1) or run(*args))
    options = {"mode": "ar", "max_new_tokens": 6, "eos_token_id": None}
    text = model.generate(random_ids(2, 5, seed=3), **options)
    assert len(taken) == 5
    model.context_tower.layers[1].mixer.register_forward_hook(lambda *_: None)
    assert torch.equal(model.generate(random_ids(2, 5, seed=3), **options), text)
    assert len(taken) == 5


@torch.no_grad()
def test_states_are_written_to_the_memory_of_those_before_the_last_unless_somebody_may_want_them_back(monkeypatch):
    monkeypatch.setattr("twotower.steps_twotower.TILE", 1)
    model = tiny_model("base")
    caches = read(model), read(model)
    expected = [steps(model, caches[0], 1) for _ in range(3)]
    layer = caches[1].layers[0]

    def place() -> int:
        return layer.state.ssm.data_ptr()

    with model.prepared():
        within = [steps(model, caches[1], 1) for _ in range(2)]
        spare, kept = layer.spare.data_ptr(), place()
        within += [steps(model, caches[1], 1)]
        assert (place(), layer.spare.data_ptr()) == (spare, kept)
        held = layer.state.ssm.clone()
        with pytest.raises(ZeroDivisionError), caches[1].undone_on_error():
            steps(model, caches[1], 3)
            raise ZeroDivisionError
        assert torch.equal(layer.state.ssm, held)
        steps(model, caches[1].copy_rows([0, 1]), 3)  # writes to nothing of the other's
        assert torch.equal(layer.state.ssm, held)
    assert_close(torch.cat(within), torch.cat(expected))
