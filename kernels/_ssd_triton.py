"""What [`ssd_scan`] and [`ssd_state`] do as one Triton kernel: a short run of tokens from a state, to per-row ends.

Each program has one row, one head and a few of its channels. It reads what the equations of `ssd.py` need once, and
goes over the state's columns N in parts, so that a large state does not spill registers:

    y[t] = exp(l[t]) h[0] C[t] + sum_{s <= t} (C[t] . B[s]) exp(l[t] - l[s]) dt[s] x[s] + D x[t],    l = cumsum(dt A)
    h[end] = exp(l[end]) h[0] + sum_{s < end} exp(l[end] - l[s]) dt[s] x[s] B[s]^T

All arithmetic is float32. Of inputs in 16 bits, products run as three TF32 products each, on tensor cores. Of float32
they do not: emulated, that is float32 to its last bits, but an H200 gave errors of 6e-4 at 64 heads, as if of a single
TF32 product, for a cause we do not know.

Shapes: B batch, T tokens, H heads, P head dim, G groups, N state.
"""

from typing import Any

import torch

from ._triton import launched_beside, tl, triton

# So many tokens in one launch; longer runs take several, each from the state that the last one left.
TRITON_TOKENS = 64


if triton is not None:

    @triton.jit
    def softplus(x):
        """log(1 + exp(x)) as max(x, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|x|): exact where it is small, too."""
        e = tl.exp(-tl.abs(x))
        s = e / (2.0 + e)  # at most 1/3
        square = s * s
        series = 1 / 11 + square * (1 / 13 + square / 15)
        series = 1 / 5 + square * (1 / 7 + square * (1 / 9 + square * series))
        return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + square * (1 / 3 + square * series))

    @triton.jit(do_not_specialize=["tokens"])
    def ssd_kernel(
        x,
        dt,
        dt_bias,
        A,
        B,
        C,
        D,
        state,
        ends,
        y,
        state_after,
        tokens,
        x_row,
        x_token,
        dt_row,
        dt_token,
        B_row,
        B_token,
        C_row,
        C_token,
        y_row,
        H: tl.constexpr,
        P: tl.constexpr,
        G: tl.constexpr,
        N: tl.constexpr,
        T_TILE: tl.constexpr,
        P_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
        SEEDED: tl.constexpr,
        ENDED: tl.constexpr,
        OUTPUTS: tl.constexpr,
        KEPT: tl.constexpr,
        BIASED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        group = head // (H // G)
        t, p = tl.arange(0, T_TILE), tl.program_id(2) * P_TILE + tl.arange(0, P_TILE)
        # 1. The head's inputs and decays; columns behind `tokens`, and behind a row's end, count as dt 0.
        here = t < tokens
        here_x = here[:, None] & (p < P)[None, :]
        x_here = tl.load(x + row * x_row + t[:, None] * x_token + head * P + p[None, :], here_x, 0.0).to(tl.float32)
        counted = here
        if ENDED:
            counted = here & (t < tl.load(ends + row))
        step = tl.load(dt + row * dt_row + t * dt_token + head, counted, 0.0).to(tl.float32)
        if BIASED:
            step = tl.where(counted, softplus(step + tl.load(dt_bias + head).to(tl.float32)), 0.0)
        log_step = step * tl.load(A + head).to(tl.float32)
        weighted = x_here * step[:, None]
        B += row * B_row + group * N
        places = ((row * H + head) * P + p[:, None]) * N
        if OUTPUTS:
            # 2. Over the state's columns: what of it each token sees, and the scores C[t] . B[s]. At least two parts:
            # where Triton 3.6 does away with the loop, 64 tokens in 16 bits read shared memory that there is not.
            C += row * C_row + group * N
            scores = tl.zeros((T_TILE, T_TILE), tl.float32)
            carried = tl.zeros((T_TILE, P_TILE), tl.float32)
            for first in range(0, N + N_TILE * (N <= N_TILE), N_TILE):
                n = first + tl.arange(0, N_TILE)
                here_n = here[:, None] & (n < N)[None, :]
                C_here = tl.load(C + t[:, None] * C_token + n[None, :], here_n, 0.0).to(tl.float32)
                B_here = tl.load(B + t[:, None] * B_token + n[None, :], here_n, 0.0).to(tl.float32)
                scores = tl.dot(C_here, tl.trans(B_here), scores, input_precision=PRECISION)
                if SEEDED:
                    here_state = (p < P)[:, None] & (n < N)[None, :]
                    before = tl.load(state + places + n[None, :], here_state, 0.0).to(tl.float32)
                    carried = tl.dot(C_here, tl.trans(before), carried, input_precision=PRECISION)
            # Where the scores are cut off, the decay must be finite, which the minimum sees to.
            log_decay = tl.cumsum(log_step, 0)
            decay = tl.exp(tl.minimum(log_decay[:, None] - log_decay[None, :], 0.0))
            scores = tl.where(t[:, None] >= t[None, :], scores * decay, 0.0)
            out = tl.dot(scores, weighted, tl.exp(log_decay)[:, None] * carried, input_precision=PRECISION)
            out += tl.load(D + head).to(tl.float32) * x_here
            tl.store(y + row * y_row + (t[:, None] * H + head) * P + p[None, :], out.to(y.dtype.element_ty), here_x)
        if KEPT:
            # 3. The state after. Decays are summed from the end: the difference of two long sums is known less well.
            log_left = tl.cumsum(log_step, 0, reverse=True) - log_step
            to_end = tl.trans(weighted * tl.exp(log_left)[:, None])
            for first in range(0, N + N_TILE * (N <= N_TILE), N_TILE):
                n = first + tl.arange(0, N_TILE)
                here_n, here_state = here[:, None] & (n < N)[None, :], (p < P)[:, None] & (n < N)[None, :]
                B_here = tl.load(B + t[:, None] * B_token + n[None, :], here_n, 0.0).to(tl.float32)
                after = tl.zeros((P_TILE, N_TILE), tl.float32)
                if SEEDED:
                    before = tl.load(state + places + n[None, :], here_state, 0.0).to(tl.float32)
                    after = tl.exp(tl.sum(log_step, 0)) * before
                after = tl.dot(to_end, B_here, after, input_precision=PRECISION)
                tl.store(state_after + places + n[None, :], after, here_state)


def scan_with_triton(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = TRITON_TOKENS,
    return_state: bool = True,
    return_chunk_states: bool = False,
    dt_bias: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What [`ssd_scan`] does, with its arguments: y, and as asked the state and the chunks' states."""
    batch, tokens, heads, head_dim = x.shape
    y, chunk_states = x.new_empty(x.shape), []
    most = min(chunk_size, TRITON_TOKENS)
    for start, stop in _runs(tokens, chunk_size, most):
        if return_chunk_states and start % chunk_size == 0:
            before = x.new_zeros(batch, heads, head_dim, B.shape[3], dtype=torch.float32) if state is None else state
            chunk_states.append(before.float())
        x_run, dt_run, B_run, C_run, y_run = (part[:, start:stop] for part in (x, dt, B, C, y))
        kept = return_state or stop < tokens
        inputs = (x_run, dt_run, A, B_run, state, in_place)
        state = _launch(*inputs, C=C_run, D=D, y=y_run, kept=kept, dt_bias=dt_bias)
    return y, state, torch.stack(chunk_states, dim=1) if return_chunk_states else None


def state_with_triton(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    state: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """What [`ssd_state`] does, with its arguments."""
    for start, stop in _runs(x.shape[1], TRITON_TOKENS, TRITON_TOKENS):
        x_run, dt_run, B_run = (part[:, start:stop] for part in (x, dt, B))
        state = _launch(x_run, dt_run, A, B_run, state, in_place, ends=None if ends is None else ends - start)
    assert state is not None
    return state


def _runs(tokens: int, chunk_size: int, most: int) -> list[tuple[int, int]]:
    """Where each launch begins and stops: at a chunk's end, and after `most` tokens."""
    chunks = [(start, min(start + chunk_size, tokens)) for start in range(0, tokens, chunk_size)]
    return [(start, min(start + most, stop)) for first, stop in chunks for start in range(first, stop, most)]


def _launch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    state: torch.Tensor | None,
    in_place: bool,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    kept: bool = True,
    dt_bias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """One launch over at most TRITON_TOKENS tokens; fills y if given, and returns the state after them if `kept`."""
    batch, tokens, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    # Tokens may lie apart, as parts of one projection do; what a token has, only together.
    x, B = _dense_tokens(x), _dense_tokens(B)
    C = B if C is None else _dense_tokens(C)
    dt, A = dt if dt.stride(2) == 1 else dt.contiguous(), A.contiguous()
    held = None if state is None else state.contiguous()
    after = None
    if kept:
        # A program reads what it has of the state before it writes there, and nobody else's.
        own = in_place and held is not None and held.dtype == torch.float32
        after = held if own else x.new_empty(batch, heads, head_dim, states, dtype=torch.float32)
    tiles = ssd_tiles(tokens, head_dim, x.dtype)
    grid = (batch, heads, -(-head_dim // tiles["P_TILE"]))
    if batch > 0:
        # Pointers that a flag leaves unread are still to be some tensor's.
        with launched_beside(x):
            ssd_kernel[grid](
                x, dt, A if dt_bias is None else dt_bias.contiguous(), A, B, C,
                A if D is None else D.contiguous(), x if held is None else held,
                x if ends is None else ends.contiguous(), x if y is None else y, x if after is None else after,
                tokens, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), B.stride(0), B.stride(1),
                C.stride(0), C.stride(1), 0 if y is None else y.stride(0),
                H=heads, P=head_dim, G=groups, N=states, SEEDED=held is not None, ENDED=ends is not None,
                OUTPUTS=y is not None, KEPT=kept, BIASED=dt_bias is not None, **tiles,
            )  # fmt: skip
    return after


def ssd_tiles(tokens: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """
    Tile sizes and warps for so many tokens of x's dtype, powers of two of at least 16, as `tl.dot` wants them.

    None of these spills registers on sm_80 or sm_90 (`tests/kernels/test_ssd_triton.py` compiles them);
    benchmarks/gpu.json has what they take on an H100.
    """
    token_tile = max(16, triton.next_power_of_2(tokens))
    assert token_tile <= TRITON_TOKENS
    return {
        "T_TILE": token_tile,
        "P_TILE": 16 if head_dim <= 16 or token_tile == 64 or (token_tile == 16 and dtype == torch.float32) else 32,
        "N_TILE": 16,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",
        "num_warps": 4 if token_tile == 16 else 8,
        # Loads ahead of their use would take the registers that products need.
        "num_stages": 1,
    }


def _dense_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """(B, T, X, Y) with X and Y contiguous within a token."""
    dense = tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]
    return tensor if dense else tensor.contiguous()


def triton_cannot_scan(x: torch.Tensor, *others: Any) -> str | None:
    """Why the kernel above cannot take these arguments of [`ssd_scan`] or [`ssd_state`]; None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, x is {x.dtype}"
    if x.shape[1] < 1:
        return "needs at least one token"
    return None


__all__ = ["scan_with_triton", "state_with_triton", "triton_cannot_scan"]
