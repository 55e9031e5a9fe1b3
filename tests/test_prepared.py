"""What passes compute once within `prepared()` is never seen after it, however weights were changed."""

import copy

import pytest
import torch
from tiny import random_ids, tiny_model
from tolerances import assert_close

from twotower.cache_twotower import TwoTowerCache
from twotower.modeling_twotower import Preparing

DEPENDS = ("A_log", "dt_bias", "gate.weight")  # what is prepared depends on these


def edit_data(model):
    for name, parameter in model.named_parameters():
        if name.endswith(DEPENDS):
            parameter.data += 0.5


def load(model):
    other = copy.deepcopy(model)
    edit_data(other)
    model.load_state_dict(other.state_dict())


def assign(model):
    other = copy.deepcopy(model)
    edit_data(other)
    model.load_state_dict(other.state_dict(), assign=True)


def step(model):
    parameters = [parameter for name, parameter in model.named_parameters() if name.endswith(DEPENDS)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()


def move(model):
    model.to(torch.bfloat16).to(torch.float32)
    edit_data(model)


@torch.no_grad()
def passes(model) -> list[torch.Tensor]:
    cache = TwoTowerCache(model.config)
    ids = random_ids(2, 9, seed=1)
    return [model(ids, cache=cache).logits, model.denoise(ids[:, :4], cache, 0.5)]


def kept(model) -> list[Preparing]:
    return [each for each in model.modules() if isinstance(each, Preparing) and each._prepared is not None]


@pytest.mark.parametrize("change", [edit_data, load, assign, step, move])
def test_changed_weights_are_seen_by_the_next_run(change):
    model = tiny_model("all kinds")
    with model.prepared():
        before = passes(model)
    change(model)
    expected = passes(copy.deepcopy(model))
    with model.prepared():
        within = passes(model)
    for old, new, run, wanted in zip(before, passes(model), within, expected, strict=True):
        assert (old - wanted).abs().max() > 1e-4
        assert torch.equal(new, wanted) and torch.equal(run, wanted)


def test_within_nothing_is_computed_twice_and_numbers_stay(monkeypatch):
    model = tiny_model("all kinds")
    expected = passes(model)
    with model.prepared():
        assert len(kept(model)) == sum(isinstance(each, Preparing) for each in model.modules()) > 0
        for module in kept(model):
            monkeypatch.setattr(module, "of_weights", None)
        for actual, wanted in zip(passes(model), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_an_error_within_leaves_nothing_prepared():
    model = tiny_model("all kinds")
    with pytest.raises(ZeroDivisionError), model.prepared():
        raise ZeroDivisionError
    assert not kept(model)


def test_within_a_pass_with_gradients_has_those_of_all_weights():
    model = tiny_model("all kinds")
    parameters = [parameter for name, parameter in model.named_parameters() if name.endswith(DEPENDS)]
    model.set_trained_towers("both")
    ids = random_ids(2, 9, seed=1)

    def gradients():
        with torch.enable_grad():
            loss = model(ids, labels=ids).loss + model(ids).logits.square().mean()
        return torch.autograd.grad(loss, parameters)

    expected = gradients()
    with model.prepared():
        for actual, wanted in zip(gradients(), expected, strict=True):
            assert_close(actual, wanted)
            assert actual.abs().max() > 0


def test_weights_that_come_and_go_are_not_kept():
    model = tiny_model("all kinds")
    mamba, router = model.context_tower.layers[0].mixer, model.denoiser_tower.layers[3].mixer.gate
    mamba._hf_hook = object()  # accelerate's, which offloads

    class Shard(torch.Tensor):
        pass

    router.weight = torch.nn.Parameter(router.weight.data.as_subclass(Shard))
    with model.prepared():
        assert mamba not in kept(model) and router not in kept(model) and kept(model)


def test_where_a_hook_may_fill_weights_in_nothing_is_kept():
    model = tiny_model("all kinds")
    router = model.context_tower.layers[3].mixer.gate
    hook = router.register_forward_pre_hook(lambda module, _: None)
    with model.prepared():
        assert router not in kept(model) and kept(model)
    hook.remove()


def test_another_weight_in_a_modules_place_is_seen_at_once():
    """As peft's adapters for parameters do it around a pass."""
    model = tiny_model("all kinds")
    routers = [layer.mixer.gate for layer in model.context_tower.layers if hasattr(layer.mixer, "gate")]
    with model.prepared():
        for router in routers:
            router.weight = torch.nn.Parameter(router.weight.detach() + 0.5 * torch.randn_like(router.weight))
        within = passes(model)
    for actual, wanted in zip(within, passes(model), strict=True):
        assert torch.equal(actual, wanted)


def test_a_copy_made_within_is_not_prepared():
    model = tiny_model("all kinds")
    with model.prepared():
        assert not kept(copy.deepcopy(model)) and kept(model)


def test_another_thread_may_end_it_at_any_moment():
    model = tiny_model("all kinds")
    module = next(each for each in model.modules() if isinstance(each, Preparing))

    class Ended(type(module)):
        looked_up = 0

        @property
        def _prepared(self):
            Ended.looked_up += 1
            return ([*self._parameters.values()], self.of_weights()) if Ended.looked_up == 1 else None

    module.__class__ = Ended
    with torch.no_grad():
        assert module.prepared()


def test_in_inference_mode_what_is_kept_can_be_used_outside_of_it():
    model = tiny_model("all kinds")
    with torch.inference_mode():
        context = model.prepared()
        context.__enter__()
    tensors = [tensor for module in kept(model) for tensor in module._prepared[1]]
    assert tensors and not any(tensor.is_inference() or tensor.grad_fn for tensor in tensors)
    context.__exit__(None, None, None)
