"""Mamba-2's selective scan as a state space dual, chunk by chunk, with state in and state out.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T,     y[t] = h[t] C[t] + D x[t]

Within a chunk the recurrence is an attention-like product with the decay as its mask; only the state crosses
chunks (Dao & Gu 2024, "Transformers are SSMs", section 6). A column with dt = 0 leaves the state as it is, which is
how columns without a token are skipped. The state alone, after T tokens, is one sum:

    h[T] = exp(sum_t dt[t] A) h[0] + sum_t exp(sum_{r > t} dt[r] A) dt[t] x[t] B[t]^T

Shapes: B batch, T tokens, H heads, P head dim, G groups (H a multiple of G), N state, L chunk length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import choose
from .precision import at_least_float32, may_give_out


class ScanOutput(NamedTuple):
    """`y` (B, T, H, P), and as asked `state` (B, H, P, N) after the last token, `chunk_states` (B, T / L, H, P, N)."""

    y: torch.Tensor
    state: torch.Tensor | None = None
    chunk_states: torch.Tensor | None = None


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = 128,
    return_state: bool = True,
    return_chunk_states: bool = False,
    dt_bias: torch.Tensor | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> ScanOutput:
    """
    Scan T tokens from `state`.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) float32 step sizes, already positive (softplus and clamp applied); 0 where there is no token. Or
            with `dt_bias` what they are made of, softplus(dt + dt_bias), in any dtype.
        A: (H,) float32 negative decay rates.
        B, C: (B, T, G, N) input and output projections; each group serves H / G heads.
        D: (H,) skip weights.
        state: (B, H, P, N) state before the first token, default zeros.
        chunk_size: tokens per chunk; y and state do not depend on it.
        return_state: whether to return the state after the last token.
        return_chunk_states: whether to return the state before each chunk.
        dt_bias: (H,) float32; default none, of step sizes that are finished.
        in_place: write the state after the last token over `state`, and return that; without chunks' states.
        backend: who computes it, see `backends.py`; of one token the backend of "ssd_step".

    Returns:
        [`ScanOutput`]; y in x's dtype, states in float32. All arithmetic is float32 (float64 for float64): a seeded
        state grows to 1e3 and more over a long context, which bfloat16 does not survive.
    """
    assert not in_place or (state is not None and return_state and not return_chunk_states)
    arguments = (x, dt, A, B, C, D, state, chunk_size, return_state, return_chunk_states, dt_bias, in_place)
    kernel = choose("ssd_step" if x.shape[1] == 1 and not return_chunk_states else "ssd_scan", backend, *arguments)
    if kernel is not None:
        output = ScanOutput(*kernel(*arguments))
        return output._replace(state=_in_place_of(state, output.state)) if in_place else output
    before, dtype, tokens = state, x.dtype, x.shape[1]
    if dt_bias is not None:
        dt = F.softplus(dt + dt_bias)
    x, B, C = at_least_float32(x), at_least_float32(B), at_least_float32(C)
    if tokens == 1 and not return_chunk_states:
        large = state is not None and state.dtype == x.dtype and state.numel() > TILE and x.device.type == "cpu"
        if state is not None and large and may_give_out(state):
            y, state = ssd_step_by_tiles(x, dt, A, B, C, state)
        else:
            y, state = ssd_step_reference(x, dt, A, B, C, state)
        y = torch.addcmul(y, D[:, None], x).to(dtype)
        state = _in_place_of(before, state) if in_place else state
        return ScanOutput(y, state if return_state else None)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if state is None else state.to(x.dtype)
    outputs, chunk_states = [], []
    for start in range(0, tokens, chunk_size):
        chunk_x, chunk_dt, chunk_B, chunk_C = (part[:, start : start + chunk_size] for part in (x, dt, B, C))
        if return_chunk_states:
            chunk_states.append(state)
        outputs.append(ssd_chunk_reference(chunk_x, chunk_dt, A, chunk_B, chunk_C, state))
        if return_state or start + chunk_size < tokens:
            state = ssd_state(chunk_x, chunk_dt, A, chunk_B, state, backend="torch")
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    y = torch.addcmul(y, D[:, None], x).to(dtype)
    state = _in_place_of(before, state) if in_place else state
    return ScanOutput(
        y, state if return_state else None, torch.stack(chunk_states, dim=1) if return_chunk_states else None
    )


def _in_place_of(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
    """The state after, where the one before lies; kernels may have written it there already."""
    assert before is not None and after is not None
    return before if after is before else before.copy_(after)


def ssd_state(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """
    The state after each row's first few tokens, without outputs: the sum above.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, as in [`ssd_scan`].
        A: (H,) negative decay rates.
        B: (B, T, G, N) input projections.
        state: (B, H, P, N) state before the first token, default zeros.
        ends: (B,) tokens of each row that count, 0 to T; default T for all.
        in_place: write it over `state`, and return that.
        backend: who computes it, see `backends.py`.

    Returns:
        (B, H, P, N) float32, as is all arithmetic (float64 for float64).
    """
    assert not (in_place and state is None)
    arguments = (x, dt, A, B, state, ends, in_place)
    kernel = choose("ssd_state", backend, *arguments)
    if kernel is not None:
        after = kernel(*arguments)
        return _in_place_of(state, after) if in_place else after
    x, dt, A, B = at_least_float32(x), at_least_float32(dt), at_least_float32(A), at_least_float32(B)
    batch, tokens, heads, head_dim = x.shape
    if ends is not None:
        dt = dt * (torch.arange(tokens, device=dt.device) < ends[:, None])[..., None]
    log_decay = (dt * A).cumsum(1)
    total = log_decay[:, -1:]  # (B, 1, H)
    weighted = x * (dt * (total - log_decay).exp())[..., None]
    grouped = weighted.reshape(batch, tokens, B.shape[2], -1).permute(0, 2, 3, 1)  # (B, G, H/G * P, T)
    added = (grouped @ B.transpose(1, 2)).view(batch, heads, head_dim, B.shape[-1])
    if state is None:
        return added
    after = torch.addcmul(added, total.exp().view(batch, heads, 1, 1), state.to(x.dtype))
    return _in_place_of(state, after) if in_place else after


def ssd_step_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence for one token, in float32 without the skip term: y (B, 1, H, P) and state (B, H, P, N)."""
    batch, _, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    after = (x * dt.unsqueeze(-1)).reshape(batch, groups, -1, 1) * B.reshape(batch, groups, 1, states)
    after = after.view(batch, heads, head_dim, states)
    if state is not None:
        after = torch.addcmul(after, (dt * A).exp().view(batch, heads, 1, 1), state.to(x.dtype))
    # A product with one row is several times as fast on a CPU as one with one column.
    y = torch.bmm(C.reshape(batch * groups, 1, states), after.reshape(batch * groups, -1, states).transpose(1, 2))
    return y.view(x.shape), after


# States of so many numbers lie in a processor's cache from when they are read to when they give the output.
TILE = 2**18


def ssd_step_by_tiles(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for large float32 states and without gradients, some rows at a time."""
    batch, _, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    out = torch.empty_like(state)
    decay = (dt * A).exp_().view(batch, heads, 1, 1)
    added = (x * dt.unsqueeze(-1)).reshape(batch, groups, -1, 1)
    B, C = B.reshape(batch, groups, 1, states), C.reshape(batch, groups, 1, states)
    y, rows = x.new_empty(batch, groups, 1, heads // groups * head_dim), max(1, TILE // state[0].numel())
    for first in range(0, batch, rows):
        tile = slice(first, first + rows)
        after = torch.mul(state[tile], decay[tile], out=out[tile]).view(-1, *added.shape[1:3], states)
        after.addcmul_(added[tile], B[tile])
        y[tile] = torch.matmul(C[tile], after.transpose(2, 3))
    return y.view(x.shape), out


def ssd_chunk_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One chunk's outputs in float32, without the skip term: (B, L, H, P)."""
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    B, C = (part.transpose(1, 2).reshape(batch * groups, length, states) for part in (B, C))
    log_decay = (dt * A).transpose(1, 2).cumsum(-1).view(batch, groups, -1, length)  # (B, G, H/G, L)
    # 1. within the chunk: y[l] += sum_{s <= l} (C[l] . B[s]) exp(decay from s to l) dt[s] x[s]
    decay = log_decay[..., :, None] - log_decay[..., None, :]
    # What decays backwards in time may be infinite. It is dropped, but its gradient would not be.
    decay = decay.clamp(max=0).exp() if decay.requires_grad else decay.exp_()
    scores = torch.bmm(C, B.transpose(1, 2)).view(batch, groups, 1, length, length)
    weights = (scores * decay).tril_().view(batch * heads, length, length)
    within = torch.bmm(weights, (x * dt[..., None]).transpose(1, 2).reshape(batch * heads, length, head_dim))
    # 2. from the state before the chunk: y[l] += exp(decay from the start to l) h C[l]
    carried = torch.bmm(C, state.reshape(batch * groups, -1, states).transpose(1, 2))  # (B * G, L, H/G * P)
    carried = carried.view(batch, groups, length, -1, head_dim).transpose(2, 3)
    y = torch.addcmul(within.view(carried.shape), log_decay.exp()[..., None], carried)
    return y.flatten(1, 2).transpose(1, 2)
