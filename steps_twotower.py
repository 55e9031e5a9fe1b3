"""One token of every row through the context tower, straight through its weights.

A step of autoregression is little arithmetic. On a CPU half of its time goes to modules that call each other, and to
what only longer chunks need. Here each layer is one function over tensors prepared once, with as few operations as
torch has for it. What it computes is what the layers compute, within rounding.

Only within [`~TwoTowerForBlockDiffusion.prepared`], in float32, and only as long as nobody has hooked anything to the
tower or put another weight in a weight's place, which every step makes sure of.

Shapes: B batch, H hidden size, C channels of the convolution, K its width, Hm Mamba heads, P their dim, G groups, N
state, Hkv key/value heads, D head dim, k experts of a token.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from .cache_twotower import KeyValues, KeyValueSlot, MambaState, Past, Present
from .compat_twotower import implementations
from .kernels.backends import ALWAYS_TORCH
from .kernels.block_attention import block_attention
from .kernels.ssd import TILE, ssd_step_by_tiles, ssd_step_reference

# What attention and experts are computed by.
USUAL = ("sdpa", "grouped_mm_or_loop")


class PreparedStep:
    """
    Args:
        tower: the context tower.
        modules: all of its modules but itself.
        experts: computes those of a layer: module, (B, H) tokens, (B, k) indices and weights -> (B, H).
    """

    def __init__(self, tower: Any, modules: Sequence[nn.Module], experts: Callable[..., torch.Tensor]):
        self.tower, self.kernels = tower, tower.kernels
        self.flags = vars(tower.config)
        self.holders: list[dict[str, Any]] = [
            holder for module in modules for holder in (module._parameters, module._buffers) if holder
        ]
        self.weights = list(chain.from_iterable(map(dict.values, self.holders)))
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.layers = [_step_of(layer, experts) for layer in tower.layers]
        self.embeddings, self.norm = tower.embeddings.weight, _norm_of(tower.norm_f)

    @classmethod
    def of(
        cls, tower: Any, modules: Sequence[nn.Module], experts: Callable[..., torch.Tensor]
    ) -> "PreparedStep | None":
        """None where a step is something else than what is written here."""
        holders = [holder for module in modules for holder in (module._parameters, module._buffers)]
        weights = [weight for holder in holders for weight in holder.values() if weight is not None]
        plain = all(
            type(weight) in (nn.Parameter, torch.Tensor)
            and weight.device.type == "cpu"
            and weight.dtype == torch.float32
            for weight in weights
        )
        by_torch = all(backend in ALWAYS_TORCH[op] for op, backend in tower.kernels.items())
        usual = all(_is_usual(layer.mixer) for layer in tower.layers)
        if not (plain and by_torch and usual and implementations(vars(tower.config)) == USUAL):
            return None
        with torch.inference_mode(False), torch.no_grad():
            return cls(tower, modules, experts)

    def fits(self) -> bool:
        """Whether the tower is still as it was, and the step one without gradients."""
        now = list(chain.from_iterable(map(dict.values, self.holders)))
        return (
            not torch.is_grad_enabled()
            and self.tower.kernels is self.kernels
            and implementations(self.flags) == USUAL
            and not (any(self.hooks) or has_any_global_hook())
            and len(now) == len(self.weights)
            and all(map(is_, now, self.weights))
        )

    def run(
        self,
        input_ids: torch.Tensor,
        pasts: Sequence[Past],
        lengths: torch.Tensor | None,
        spares: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, list[Present]]:
        """
        Args:
            input_ids: (B, 1).
            pasts: the cache's `slots()`.
            spares: the cache's `spares()`, where scan states may be written to.
            lengths: the cache's `context_lengths()`.

        Returns:
            (B, 1, H) normed hidden states, and per layer what it adds to the cache.
        """
        x, presents = torch.embedding(self.embeddings, input_ids.view(-1)), []
        for layer, past, spare in zip(self.layers, pasts, spares, strict=True):
            x, present = layer(x, past, spare if isinstance(past, MambaState) else lengths)
            presents.append(present)
        return _normed(x, *self.norm).unsqueeze(1), presents


def _is_usual(mixer: Any) -> bool:
    """Whether a layer has nothing that is seldom enough to be left to its module."""
    if hasattr(mixer, "gate"):
        return mixer.gate.num_group == mixer.gate.topk_group and not mixer.is_latent
    return not hasattr(mixer, "A_log") or mixer.activation == "silu"


def _step_of(layer: Any, experts: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, Present]]:
    """A layer's function: (B, H), what it reads with and lengths of contexts -> (B, H), what it adds to the cache."""
    mixer, norm = layer.mixer, _norm_of(layer.norm)
    if hasattr(mixer, "A_log"):
        return partial(_mamba_step, norm, _Mamba.of(mixer))
    if hasattr(mixer, "q_proj"):
        return partial(
            _attention_step, norm, mixer.prepared(), mixer.head_dim, mixer.scaling, _product_of(mixer.o_proj)
        )
    if hasattr(mixer, "gate"):
        shared, routed = _Mlp.of(mixer.shared_experts), partial(experts, mixer.experts)
        return partial(_experts_step, norm, mixer, shared, routed, mixer.gate.prepared())
    return partial(_mlp_step, norm, _Mlp.of(mixer))


class _Product(NamedTuple):
    """A linear layer that comes last: its weight transposed, a view, and its bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def add(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """x (B, H) and what the layer makes of its inputs."""
        out = torch.addmm(x, inputs, self.weight)
        return out if self.bias is None else out.add_(self.bias)


def _product_of(layer: nn.Linear) -> _Product:
    return _Product(layer.weight.t(), layer.bias)


def _norm_of(norm: Any) -> tuple[torch.Tensor, float]:
    return torch.cat((norm.weight, norm.weight)), norm.variance_epsilon


def _normed(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of (B, H) as a layer norm, see [`rms_norm_by_torch`], whose weights are there twice."""
    mirrored = torch.native_layer_norm(torch.cat((x, -x), 1), weights.shape, weights, None, eps)[0]
    return mirrored.narrow(1, 0, x.shape[1])


class _Mamba(NamedTuple):
    """
    What a step needs of a Mamba layer.

    Args:
        sizes: of gate, convolution inputs and step sizes; and of x, B and C.
        taps: (K, C) of the convolution.
        biases: (K, C), zeros but for one row.
        A, dt_bias, D: of the scan; D (Hm, 1).
        limits: of the step size, None for none.
        norm_weight: (G, channels per group).
        groups: G.
    """

    in_weight: torch.Tensor
    in_bias: torch.Tensor | None
    sizes: tuple[list[int], list[int]]
    taps: torch.Tensor
    biases: torch.Tensor
    A: torch.Tensor
    dt_bias: torch.Tensor
    D: torch.Tensor
    limits: tuple[float, float] | None
    norm_weight: torch.Tensor
    eps: float
    groups: int
    out: _Product

    @classmethod
    def of(cls, mixer: Any) -> "_Mamba":
        channels, states, conv1d = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size, mixer.conv1d
        taps = conv1d.weight.squeeze(1).t().contiguous()
        A, dt_bias = mixer.prepared()
        biases = torch.zeros_like(taps)
        if conv1d.bias is not None:
            biases[0] = conv1d.bias
        return cls(
            mixer.in_proj.weight,
            mixer.in_proj.bias,
            ([channels, mixer.conv_dim, mixer.num_heads], [channels, states, states]),
            taps,
            biases,
            A,
            dt_bias,
            mixer.D[:, None],
            None if mixer.time_step_limit == (0.0, math.inf) else mixer.time_step_limit,
            mixer.norm.weight.view(mixer.n_groups, -1),
            mixer.norm.variance_epsilon,
            mixer.n_groups,
            _product_of(mixer.out_proj),
        )


def _mamba_step(
    norm: tuple[torch.Tensor, float], layer: _Mamba, x: torch.Tensor, past: MambaState, spare: torch.Tensor | None
) -> tuple[torch.Tensor, MambaState]:
    rows, groups = x.shape[0], layer.groups
    projected = F.linear(_normed(x, *norm), layer.in_weight, layer.in_bias)
    gate, inputs, dt = projected.split_with_sizes(layer.sizes[0], 1)
    dt = F.softplus(dt + layer.dt_bias)
    if layer.limits is not None:
        dt = dt.clamp(*layer.limits)
    # 1. Convolve.
    padded = torch.cat((past.conv, inputs.unsqueeze(1)), 1)  # (B, K, C)
    convolved = F.silu(torch.addcmul(layer.biases, padded, layer.taps).sum(1), inplace=True)
    values, B, C = convolved.split_with_sizes(layer.sizes[1], 1)
    # 2. Scan.
    values = values.view(rows, 1, layer.A.shape[0], -1)
    B, C = B.view(rows, 1, groups, -1), C.view(rows, 1, groups, -1)
    scanned = (values, dt.unsqueeze(1), layer.A, B, C, past.ssm)
    y, state = ssd_step_by_tiles(*scanned, spare) if past.ssm.numel() > TILE else ssd_step_reference(*scanned)
    # 3. Gate and norm.
    y = torch.addcmul(y, layer.D, values).view(rows, -1) * F.silu(gate)
    y = y.view(rows * groups, -1)
    mirrored = torch.native_layer_norm(torch.cat((y, -y), 1), (2 * y.shape[1],), None, None, layer.eps)[0]
    y = mirrored.narrow(1, 0, y.shape[1]).view(rows, groups, -1) * layer.norm_weight
    return layer.out.add(x, y.view(rows, -1)), MambaState(padded.narrow(1, 1, padded.shape[1] - 1), state)


def _attention_step(
    norm: tuple[torch.Tensor, float],
    projection: Sequence[torch.Tensor],
    head_dim: int,
    scale: float,
    out: _Product,
    x: torch.Tensor,
    past: KeyValueSlot,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    rows, heads = x.shape[0], out.weight.shape[0] // head_dim
    # (B, heads of queries, keys and values, D)
    projected = F.linear(_normed(x, *norm), *projection).view(rows, -1, head_dim)
    shared = (projected.shape[1] - heads) // 2
    query, key, value = projected.unsqueeze(2).split_with_sizes([heads, shared, shared], 1)
    held = past.update(KeyValues(key, value))
    if lengths is None:
        # Queries that share keys are rows of one head.
        attended = F.scaled_dot_product_attention(query.view(rows, shared, -1, head_dim), *held, scale=scale)
    else:
        attended = block_attention(query, None, None, *held, lengths, causal=True, scale=scale)
    return out.add(x, attended.reshape(rows, -1)), None


class _Mlp(NamedTuple):
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: _Product

    @classmethod
    def of(cls, mlp: Any) -> "_Mlp":
        return cls(mlp.up_proj.weight, mlp.up_proj.bias, mlp.act_fn.forward, _product_of(mlp.down_proj))

    def add(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return self.down.add(x, self.activation(F.linear(normed, self.up_weight, self.up_bias)))


def _mlp_step(
    norm: tuple[torch.Tensor, float], mlp: _Mlp, x: torch.Tensor, past: None, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    return mlp.add(x, _normed(x, *norm)), None


def _experts_step(
    norm: tuple[torch.Tensor, float],
    mixer: Any,
    shared: _Mlp,
    experts: Callable[..., torch.Tensor],
    router: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    past: None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    normed = _normed(x, *norm)
    weights, indices = mixer.gate.choose(F.linear(normed.double(), router[0]), router[1], torch.float32)
    if x.shape[0] == 1:
        x = shared.add(x, normed)
        up_proj, down_proj = mixer.experts.up_proj, mixer.experts.down_proj
        for expert, weight in zip(indices[0].tolist(), weights[0].tolist(), strict=True):
            activated = shared.activation(F.linear(normed, up_proj[expert]))
            x = torch.addmm(x, activated, down_proj[expert].t(), alpha=weight * mixer.scale)
        return x, None
    routed = experts(normed, indices, weights)
    return torch.add(shared.add(x, normed), routed, alpha=mixer.scale), None
