"""Optimisers: AdamW, or Muon for matrices beside it, under one schedule; and expert balancing by bias."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..modeling_twotower import TwoTowerRouter
from .recipe import OptimizerRecipe
from .sharding import divided_as, whole


def lr_factor(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Warmup-stable-decay: what the peak learning rates are multiplied by in step `step` of `steps`, from 0."""
    last = recipe.last_lr / recipe.lr
    left = (steps - step) / (recipe.decay * steps) if recipe.decay else 1.0
    rising = (step + 1) / recipe.warmup if recipe.warmup else 1.0
    return min(1.0, rising, last + (1 - last) * min(1.0, left))


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> "PeakOptimizer":
    """A recipe's optimiser of those parameters of a model that require a gradient."""
    if recipe.name == "muon":
        other = recipe.lr / 2 if recipe.other_lr is None else recipe.other_lr
        return MatrixOptimizer(model, recipe.lr, other, recipe.weight_decay, tuple(recipe.betas))
    return DecayedOptimizer(model, recipe.lr, recipe.weight_decay, tuple(recipe.betas))


class PeakOptimizer:
    """Optimisers that step together, each at a factor of its own peak learning rate."""

    optimizers: Sequence[torch.optim.Optimizer]
    peaks: Sequence[float]
    params: Sequence[nn.Parameter]

    def step(self, factor: float, max_norm: float = 1.0) -> float:
        """Clip, update at `factor` times the peak learning rates, and forget the gradients; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.params, max_norm)
        self.update(factor)
        return float(norm)

    def update(self, factor: float) -> None:
        """Update at `factor` times the peak learning rates, and forget the gradients."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        for param in self.params:
            param.grad = None

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            for param, held in optimizer.state.items():
                held |= {name: divided_as(param, each) for name, each in held.items() if each.shape == param.shape}


class DecayedOptimizer(PeakOptimizer):
    """
    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on everything, with weight decay on hidden matrices alone.

    Args:
        model: its parameters with `requires_grad` are trained.
        lr: the peak learning rate.
        weight_decay: on matrices.
        betas: AdamW's.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, ...]):
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        groups = [
            {
                "params": [param for name, param in named if _is_hidden_matrix(name, param) == decays],
                "weight_decay": each,
            }
            for decays, each in ((True, weight_decay), (False, 0.0))
        ]
        self.params = [param for _, param in named]
        self.optimizers = [
            torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(betas[0], betas[1]))
        ]
        self.peaks = [lr]


class MatrixOptimizer(PeakOptimizer):
    """
    [`StackedMuon`] on every matrix of hidden layers, AdamW on everything else.

    Args:
        model: its parameters with `requires_grad` are trained; embeddings and heads count as "the rest".
        matrix_lr: Muon's peak learning rate, in units of AdamW's (update RMS 0.2).
        other_lr: AdamW's peak learning rate.
        weight_decay: on matrices.
        betas: AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        matrix_lr: float,
        other_lr: float,
        weight_decay: float,
        betas: tuple[float, ...] = (0.9, 0.98),
    ):
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        self.params = [param for _, param in named]
        matrices = [param for name, param in named if _is_hidden_matrix(name, param)]
        rest = [param for name, param in named if not _is_hidden_matrix(name, param)]
        # Of adapters there is no rest.
        parts: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            parts.append((StackedMuon(matrices, matrix_lr, weight_decay), matrix_lr))
        if rest:
            betas = (betas[0], betas[1])
            parts.append((torch.optim.AdamW(rest, lr=other_lr, betas=betas, weight_decay=0.0), other_lr))
        self.optimizers, self.peaks = [each for each, _ in parts], [peak for _, peak in parts]


class StackedMuon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024), its updates scaled to an RMS of 0.2 (Liu et al. 2025, arXiv 2502.16982).

    Experts are stored as (E, out, in); each one is a matrix of its own. All matrices of one shape are orthogonalized
    together, in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 is slow: with experts as small as the
    demonstration model's, that is most of a step. Of parameters that are divided among processes, each process
    orthogonalizes all of a matrix and keeps its part.

    Args:
        params: (out, in) or (E, out, in) each.
        lr: in units of AdamW's.
        weight_decay: decoupled.
        momentum: Nesterov's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    alike.setdefault((param.shape[-2:], param.dtype, param.device), []).append(param)
            for params in alike.values():
                updates = [self._momentum(param, group["momentum"]) for param in params]
                orthogonal = orthogonalized(torch.cat(updates))
                scale = group["lr"] * 0.2 * max(params[0].shape[-2:]) ** 0.5
                counts = [len(update) for update in updates]
                for param, update in zip(params, orthogonal.split(counts), strict=True):
                    update = divided_as(param, update.view(param.shape))
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)

    def _momentum(self, param: nn.Parameter, momentum: float) -> torch.Tensor:
        """The direction of a parameter as (E, out, in)."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].lerp_(param.grad, 1 - momentum)
        return whole(param.grad.lerp(state["momentum"], momentum)).view(-1, *param.shape[-2:])


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, about, of (N, out, in): five Newton-Schulz steps of Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _is_hidden_matrix(name: str, param: nn.Parameter) -> bool:
    outside = ("embeddings", "lm_head", "scale_shift_tables", "conv1d", "gate.weight")
    return param.ndim in (2, 3) and not any(part in name for part in outside)


class ExpertBalancer:
    """
    Auxiliary-loss-free balancing (Wang et al. 2024): experts chosen too often lose choice bias, others gain it.

    Args:
        modules: where to look for routers.
        rate: change of bias per update; 0 leaves the biases alone.
    """

    def __init__(self, modules: Iterable[nn.Module], rate: float = 1e-3):
        self.rate = rate
        self.loads: dict[TwoTowerRouter, torch.Tensor] = {}
        for module in modules:
            if rate and isinstance(module, TwoTowerRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: TwoTowerRouter, _: tuple, output: tuple[torch.Tensor, ...]) -> None:
        counts = torch.bincount(output[2].flatten(), minlength=router.num_experts)
        self.loads[router] = self.loads.get(router, 0) + counts

    @torch.no_grad()
    def update(self, summed: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone) -> None:
        """Move the biases; `summed` adds up a router's counts over processes."""
        for router, load in self.loads.items():
            load = summed(load)
            router.e_score_correction_bias += self.rate * torch.sign(load.float().mean() - load)
        self.loads.clear()


__all__ = ["DecayedOptimizer", "ExpertBalancer", "MatrixOptimizer", "PeakOptimizer", "build_optimizer", "lr_factor"]
