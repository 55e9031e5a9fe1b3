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


class ScanOutput(NamedTuple):
    """`y` (B, T, H, P), `state` (B, H, P, N) after the last token; if asked, `chunk_states` (B, T / L, H, P, N)."""

    y: torch.Tensor
    state: torch.Tensor
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
    return_chunk_states: bool = False,
) -> ScanOutput:
    """
    Scan T tokens from `state`.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, already positive (softplus and clamp applied); 0 where there is no token.
        A: (H,) negative decay rates.
        B, C: (B, T, G, N) input and output projections; each group serves H / G heads.
        D: (H,) skip weights.
        state: (B, H, P, N) state before the first token, default zeros.
        chunk_size: tokens per chunk; y and state do not depend on it.
        return_chunk_states: also return the state before each chunk.

    Returns:
        [`ScanOutput`]; y in x's dtype, states in float32. All arithmetic is float32: a seeded state grows to 1e3 and
        more over a long context, which bfloat16 does not survive.
    """
    dtype = x.dtype
    x, dt, A, B, C = (tensor.float() for tensor in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    state = state.float()
    if x.shape[1] == 1 and not return_chunk_states:
        y, state = ssd_step_reference(x, dt, A, B, C, state)
        return ScanOutput(torch.addcmul(y, D.float()[:, None], x).to(dtype), state)
    outputs, chunk_states = [], []
    for start in range(0, x.shape[1], chunk_size):
        columns = slice(start, start + chunk_size)
        if return_chunk_states:
            chunk_states.append(state)
        y, state = ssd_chunk_reference(x[:, columns], dt[:, columns], A, B[:, columns], C[:, columns], state)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    y = (y + D.float()[:, None] * x).to(dtype)
    return ScanOutput(y, state, torch.stack(chunk_states, dim=1) if return_chunk_states else None)


def ssd_state(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The state after each row's first few tokens, without outputs.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, as in [`ssd_scan`].
        A: (H,) negative decay rates.
        B: (B, T, G, N) input projections.
        state: (B, H, P, N) state before the first token, default zeros.
        ends: (B,) tokens of each row that count, 0 to T; default T for all.

    Returns:
        (B, H, P, N) float32, as is all arithmetic.
    """
    x, dt, A, B = (tensor.float() for tensor in (x, dt, A, B))
    if ends is not None:
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < ends[:, None])[..., None]
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    return ssd_state_reference(x, dt, A, B, state.float())


def ssd_state_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """The sum above in float32: (B, H, P, N)."""
    log_decay = (dt * A).cumsum(1)
    total = log_decay[:, -1]
    weighted = x * (dt * (total[:, None] - log_decay).exp())[..., None]  # (B, T, H, P)
    grouped = weighted.unflatten(2, (B.shape[2], -1)).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, G, H/G * P, T)
    return total.exp()[..., None, None] * state + (grouped @ B.transpose(1, 2)).view_as(state)


def ssd_step_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence itself for one token, T = 1, in float32 without the skip term: as [`ssd_chunk_reference`]."""
    batch, _, heads, head_dim = x.shape
    groups = B.shape[2]
    xdt = (x * dt[..., None]).view(batch, groups, -1, 1)  # (B, G, H/G * P, 1)
    decayed = (state * (dt * A).exp().view(batch, heads, 1, 1)).view(batch, groups, xdt.shape[2], -1)
    state = torch.addcmul(decayed, xdt, B.transpose(1, 2))  # (B, G, H/G * P, N)
    y = state @ C.transpose(1, 2).transpose(-1, -2)
    return y.view(batch, 1, heads, head_dim), state.view(batch, heads, head_dim, -1)


def ssd_chunk_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk in float32, without the skip term: (y (B, L, H, P), state (B, H, P, N) after it)."""
    batch, length, heads, head_dim = x.shape
    groups = B.shape[2]
    per_group = heads // groups
    # Heads first, grouped: every product below is then one batched matrix product.
    xdt = (x * dt[..., None]).permute(0, 2, 1, 3).reshape(batch, groups, per_group, length, head_dim)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, G, L, N)
    log_decay = (dt * A).transpose(1, 2).cumsum(-1).view(batch, groups, per_group, length)
    # 1. within the chunk: y[l] += sum_{s <= l} (C[l] . B[s]) exp(decay from s to l) dt[s] x[s]
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2))[:, :, None] * between  # (B, G, H/G, L, L)
    y = scores @ xdt
    # 2. from the state before the chunk: y[l] += exp(decay from the start to l) h C[l]
    state = state.view(batch, groups, per_group, head_dim, -1)
    y = y + log_decay.exp()[..., None] * (C[:, :, None] @ state.transpose(-1, -2))
    # 3. the state after the chunk
    total = log_decay[..., -1:]
    carried = total.exp()[..., None] * state
    added = (xdt * (total - log_decay).exp()[..., None]).transpose(-1, -2) @ B[:, :, None]
    y = y.reshape(batch, heads, length, head_dim).transpose(1, 2)
    return y, (carried + added).view(batch, heads, head_dim, -1)
