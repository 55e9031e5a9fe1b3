"""Muon on matrices, AdamW on the rest, and experts kept in balance."""

import pytest
import torch
from tiny import random_ids, tiny_model

from twotower.modeling_twotower import TwoTowerRouter
from twotower.training.optimizer import ExpertBalancer, MatrixOptimizer, StackedMuon, orthogonalized


def trained(steps, optimizer=None, model=None):
    model = model or tiny_model("all kinds")
    optimizer = optimizer or MatrixOptimizer(model, 1e-2, 1e-2, 0.1)
    for seed in range(steps):
        ids = random_ids(2, 12, seed=seed)
        loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(seed)).loss
        loss = loss + model.context_lm_head(model.context_tower(ids)).square().mean()
        loss.backward()
        optimizer.step(1.0)
    return model, optimizer


def test_every_parameter_is_in_one_group_and_is_updated():
    before = {name: param.clone() for name, param in tiny_model("all kinds").named_parameters()}
    model, optimizer = trained(1)
    unchanged = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
    assert unchanged == []
    sizes = [sum(p.numel() for group in each.param_groups for p in group["params"]) for each in optimizer.optimizers]
    assert sum(sizes) == sum(param.numel() for param in model.parameters())
    assert min(sizes) > 0


def test_each_expert_is_a_matrix_of_its_own_to_muon():
    model = tiny_model("only E")
    experts = model.denoiser_tower.layers[0].mixer.experts
    before = experts.up_proj.detach().clone()
    optimizer = MatrixOptimizer(model, 1e-2, 1e-2, 0.0)
    experts.up_proj.grad = torch.zeros_like(experts.up_proj)
    experts.up_proj.grad[1] = torch.randn(experts.up_proj[1].shape, generator=torch.Generator().manual_seed(0))
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    optimizer.step(1.0)
    change = experts.up_proj.detach() - before
    assert change[[0, 2, 3]].abs().max() == 0
    # Muon's update has all singular values near 1, whatever those of the gradient; here up to a common scale.
    singular = torch.linalg.svdvals(change[1])
    assert singular.max() / singular.min() < 2


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_stacked_matrices_are_updated_as_torchs_muon_does_one(shape):
    generator = torch.Generator().manual_seed(0)
    start, grads = (torch.randn(count, 3, *shape, generator=generator) for count in (1, 2))
    start = start[0]
    stack, alone = (torch.nn.Parameter(tensor.clone()) for tensor in (start, start[1]))
    ours = StackedMuon([stack], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon([alone], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        stack.grad, alone.grad = grad.clone(), grad[1].clone()
        ours.step()
        theirs.step()
    # It rounds to bfloat16 on the way; two steps change a number by about 1e-2.
    torch.testing.assert_close(stack[1], alone, atol=5e-4, rtol=0)


def test_nothing_but_a_direction_is_kept_of_a_matrix():
    matrices = torch.randn(2, 5, 9)
    torch.testing.assert_close(orthogonalized(matrices), orthogonalized(matrices * 1e3))
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_the_factor_scales_the_step():
    model = tiny_model("all kinds")
    optimizer = MatrixOptimizer(model, 1e-2, 1e-2, 0.0)
    before = {name: param.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step(0.0)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert all(param.grad is None for param in model.parameters())


def test_its_state_continues_a_run_exactly():
    whole, _ = trained(3)
    model, optimizer = trained(2)
    resumed = MatrixOptimizer(model, 1e-2, 1e-2, 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    ids = random_ids(2, 12, seed=2)
    loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(2)).loss
    (loss + model.context_lm_head(model.context_tower(ids)).square().mean()).backward()
    resumed.step(1.0)
    for (name, expected), param in zip(whole.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, msg=name)


def test_overloaded_experts_lose_bias_and_idle_ones_gain_it():
    model = tiny_model("only E")
    router = next(module for module in model.context_tower.modules() if isinstance(module, TwoTowerRouter))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    balancer = ExpertBalancer(model.context_tower.modules(), rate=0.5)
    model.context_tower(random_ids(2, 12))
    balancer.update()
    assert router.e_score_correction_bias.tolist() == [8.5, 8.5, 0.5, 0.5]
    balancer.update()  # nothing counted since
    assert router.e_score_correction_bias.tolist() == [8.5, 8.5, 0.5, 0.5]
