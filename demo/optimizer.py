"""The optimiser of the demonstration model: Muon for matrices, AdamW for the rest, and expert balancing by bias."""

from collections.abc import Iterable

import torch
from torch import nn

from ..modeling_twotower import TwoTowerRouter


class MatrixOptimizer:
    """
    Muon (Jordan et al. 2024; torch's implementation) on every matrix of hidden layers, AdamW on everything else.

    Experts are stored as (E, out, in); each one is a matrix of its own to Muon, through a view of its storage.

    Args:
        model: its parameters with `requires_grad` are trained; embeddings and heads count as "the rest".
        matrix_lr: Muon's peak learning rate, in units of AdamW's (update RMS 0.2).
        other_lr: AdamW's peak learning rate.
        weight_decay: on matrices.
    """

    def __init__(self, model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float):
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        hidden = [param for name, param in named if _is_hidden_matrix(name, param)]
        self.views = [
            (param, idx, nn.Parameter(param.detach()[idx]))
            for param in hidden
            if param.ndim == 3
            for idx in range(len(param))
        ]
        matrices = [param for param in hidden if param.ndim == 2] + [view for _, _, view in self.views]
        others = [param for name, param in named if not _is_hidden_matrix(name, param)]
        self.params = [param for _, param in named]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [matrix_lr, other_lr]

    def step(self, factor: float, max_norm: float = 1.0) -> float:
        """Clip, update at `factor` times the peak learning rates, and forget the gradients; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.params, max_norm)
        for param, idx, view in self.views:
            view.grad = None if param.grad is None else param.grad[idx]
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        for param in self.params:
            param.grad = None
        return float(norm)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _is_hidden_matrix(name: str, param: nn.Parameter) -> bool:
    outside = ("embeddings", "lm_head", "scale_shift_tables", "conv1d", "gate.weight")
    return param.ndim in (2, 3) and not any(part in name for part in outside)


class ExpertBalancer:
    """
    Auxiliary-loss-free balancing (Wang et al. 2024): experts chosen too often lose choice bias, others gain it.

    Args:
        modules: where to look for routers.
        rate: change of bias per update.
    """

    def __init__(self, modules: Iterable[nn.Module], rate: float = 1e-3):
        self.rate = rate
        self.loads: dict[TwoTowerRouter, torch.Tensor] = {}
        for module in modules:
            if isinstance(module, TwoTowerRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: TwoTowerRouter, _: tuple, output: tuple[torch.Tensor, ...]) -> None:
        counts = torch.bincount(output[2].flatten(), minlength=router.num_experts)
        self.loads[router] = self.loads.get(router, 0) + counts

    @torch.no_grad()
    def update(self) -> None:
        for router, load in self.loads.items():
            router.e_score_correction_bias += self.rate * torch.sign(load.float().mean() - load)
        self.loads.clear()
