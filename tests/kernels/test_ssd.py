"""ssd_scan against the recurrence token by token in float64, and against transformers' own scan."""

import pytest
import torch
from tolerances import assert_close
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from twotower.kernels.ssd import TILE, ssd_chunk_reference, ssd_scan, ssd_state, ssd_step_by_tiles, ssd_step_reference

BATCH, HEADS, HEAD_DIM, STATE, CHUNK = 2, 4, 5, 6, 8
RAGGED = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def draw(tokens, groups=2, state=True, dtype=torch.float32):
    torch.manual_seed(tokens * 10 + groups)
    arguments = {
        "x": torch.randn(BATCH, tokens, HEADS, HEAD_DIM).to(dtype),
        "dt": torch.rand(BATCH, tokens, HEADS) + 0.01,
        "A": -torch.rand(HEADS) * 2 - 0.1,
        "B": torch.randn(BATCH, tokens, groups, STATE).to(dtype),
        "C": torch.randn(BATCH, tokens, groups, STATE).to(dtype),
        "D": torch.randn(HEADS),
    }
    return {**arguments, "state": torch.randn(BATCH, HEADS, HEAD_DIM, STATE) if state else None}


def token_by_token(x, dt, A, B, C, D, state):
    """h = exp(dt A) h + dt x B^T, y = h C + D x, one token after the other."""
    x, dt, A, B, C, D = (tensor.double() for tensor in (x, dt, A, B, C, D))
    B, C = (tensor.repeat_interleave(HEADS // B.shape[2], dim=2) for tensor in (B, C))
    h = torch.zeros(BATCH, HEADS, HEAD_DIM, STATE, dtype=torch.float64) if state is None else state.double()
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("tokens", RAGGED)
def test_equals_the_recurrence(tokens, groups, state, dtype):
    arguments = draw(tokens, groups, state, dtype)
    y, after, chunk_states = ssd_scan(**arguments, chunk_size=CHUNK)
    expected, expected_after = token_by_token(**arguments)
    assert y.dtype == dtype
    assert after.dtype == torch.float32
    assert chunk_states is None
    assert_close(y, expected, dtype)
    assert_close(after, expected_after, torch.float32)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("tokens", RAGGED)
def test_equals_transformers(tokens, state):
    arguments = draw(tokens, state=state)
    initial = arguments.pop("state")
    x, dt, A, B, C, D = arguments.values()
    expected, expected_after = mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=CHUNK, D=D, initial_states=initial, return_final_states=True
    )
    y, after, _ = ssd_scan(**arguments, state=initial, chunk_size=CHUNK)
    assert_close(y, expected)
    assert_close(after, expected_after)


@pytest.mark.parametrize("split", [1, 7, 8, 9, 20, 28])
def test_a_split_anywhere_changes_nothing(split):
    arguments = draw(29)
    whole = ssd_scan(**arguments, chunk_size=CHUNK)
    state = arguments.pop("state")
    outputs = []
    for columns in (slice(split), slice(split, None)):
        part = {name: tensor[:, columns] if tensor.ndim > 1 else tensor for name, tensor in arguments.items()}
        y, state, _ = ssd_scan(**part, state=state, chunk_size=CHUNK)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), whole.y)
    assert_close(state, whole.state)


@pytest.mark.parametrize("chunk_size", [1, 3, 29, 128])
def test_the_chunk_size_changes_nothing(chunk_size):
    arguments = draw(29)
    expected, actual = ssd_scan(**arguments, chunk_size=CHUNK), ssd_scan(**arguments, chunk_size=chunk_size)
    assert_close(actual.y, expected.y)
    assert_close(actual.state, expected.state)


def test_columns_with_dt_0_leave_the_state():
    arguments = draw(12)
    hole = torch.tensor([0, 4, 5, 11])
    tokens = torch.ones(12, dtype=torch.bool).index_fill(0, hole, False)
    arguments["dt"] = arguments["dt"] * tokens[:, None]
    y, after, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    only_tokens = {
        name: tensor[:, tokens] if name in ("x", "dt", "B", "C") else tensor for name, tensor in arguments.items()
    }
    expected, expected_after = token_by_token(**only_tokens)
    assert_close(y[:, tokens], expected, torch.float32)
    assert_close(after, expected_after, torch.float32)
    nothing = {**arguments, "dt": torch.zeros_like(arguments["dt"])}
    assert torch.equal(ssd_scan(**nothing, chunk_size=CHUNK).state, arguments["state"])


@pytest.mark.parametrize("tokens", RAGGED)
def test_outputs_without_the_state(tokens):
    arguments = draw(tokens)
    y, after, chunk_states = ssd_scan(**arguments, chunk_size=CHUNK, return_state=False)
    assert torch.equal(y, ssd_scan(**arguments, chunk_size=CHUNK).y)
    assert after is None
    assert chunk_states is None


def test_chunk_states_are_those_before_each_chunk():
    arguments = draw(3 * CHUNK)
    _, _, chunk_states = ssd_scan(**arguments, chunk_size=CHUNK, return_chunk_states=True)
    assert chunk_states.shape == (BATCH, 3, HEADS, HEAD_DIM, STATE)
    assert torch.equal(chunk_states[:, 0], arguments["state"])
    for chunk in (1, 2):
        prefix = {
            name: tensor[:, : chunk * CHUNK] if name in ("x", "dt", "B", "C") else tensor
            for name, tensor in arguments.items()
        }
        assert_close(chunk_states[:, chunk], token_by_token(**prefix)[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("tokens", RAGGED)
def test_the_state_without_the_outputs(tokens, groups, state, dtype):
    arguments = draw(tokens, groups, state, dtype)
    _, expected = token_by_token(**arguments)
    after = ssd_state(*(arguments[name] for name in ("x", "dt", "A", "B", "state")))
    assert after.dtype == torch.float32
    assert_close(after, expected, torch.float32)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("ends", [[0, 12], [5, 0], [1, 11], [7, 7]])
def test_the_state_after_each_rows_end(ends, state):
    arguments = draw(12, state=state)
    after = ssd_state(*(arguments[name] for name in ("x", "dt", "A", "B", "state")), torch.tensor(ends))
    for row, end in enumerate(ends):
        if end == 0:
            assert torch.equal(after[row], arguments["state"][row] if state else torch.zeros_like(after[row]))
            continue
        prefix = {
            name: arguments[name][:, :end] if name in ("x", "dt", "B", "C") else arguments[name] for name in arguments
        }
        assert_close(after[row], token_by_token(**prefix)[1][row], torch.float32)


@pytest.mark.parametrize("tokens", RAGGED)
def test_in_place_the_state_after_is_where_the_one_before_was(tokens):
    arguments = draw(tokens)
    expected = ssd_scan(**arguments, chunk_size=CHUNK)
    alone = {name: arguments[name].clone() for name in ("x", "dt", "A", "B", "state")}
    ends = torch.tensor([tokens, tokens // 2])
    expected_at_ends = ssd_state(**alone, ends=ends)
    y, after, _ = ssd_scan(**arguments, chunk_size=CHUNK, in_place=True)
    assert after is arguments["state"]
    assert torch.equal(y, expected.y) and torch.equal(after, expected.state)
    assert ssd_state(**alone, ends=ends, in_place=True) is alone["state"]
    assert torch.equal(alone["state"], expected_at_ends)


def test_a_large_state_survives_bfloat16_inputs():
    arguments = draw(16, dtype=torch.bfloat16)
    arguments["state"] = arguments["state"] * 1e3
    y, after, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    expected, expected_after = token_by_token(**arguments)
    assert_close(y, expected, torch.bfloat16)
    assert_close(after, expected_after, torch.float32)


def test_strong_decay_stays_finite():
    arguments = draw(2 * CHUNK)
    arguments["A"] = torch.tensor([-1e-4, -1.0, -50.0, -500.0])
    arguments["dt"] = arguments["dt"] * 10
    y, after, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    expected, expected_after = token_by_token(**arguments)
    assert_close(y, expected, torch.float32)
    assert_close(after, expected_after, torch.float32)
    alone = ssd_state(*(arguments[name] for name in ("x", "dt", "A", "B", "state")))
    assert_close(alone, expected_after, torch.float32)


def test_gradients_equal_those_of_the_recurrence():
    arguments = draw(CHUNK + 3)
    inputs = [tensor.requires_grad_() for tensor in arguments.values()]
    y, after, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    gradients = torch.autograd.grad(y.square().sum() + after.sum(), inputs)
    expected, expected_after = token_by_token(**arguments)
    expected_gradients = torch.autograd.grad(expected.square().sum() + expected_after.sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, torch.float32)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_is_the_recurrence_and_a_chunk_of_one(batch, groups):
    generator = torch.Generator().manual_seed(0)
    heads, head_dim, states = 4, 5, 6
    x = torch.randn(batch, 1, heads, head_dim, generator=generator)
    dt = torch.rand(batch, 1, heads, generator=generator)
    A, D = -torch.rand(heads, generator=generator), torch.randn(heads, generator=generator)
    B, C = torch.randn(2, batch, 1, groups, states, generator=generator)
    state = torch.randn(batch, heads, head_dim, states, generator=generator)
    y, after = ssd_step_reference(x, dt, A, B, C, state)
    chunk_y, chunk_after = ssd_chunk_reference(x, dt, A, B, C, state), ssd_state(x, dt, A, B, state)
    assert_close(y, chunk_y)
    assert_close(after, chunk_after)
    scan = ssd_scan(x, dt, A, B, C, D, state)
    assert_close(scan.y, chunk_y + D[:, None] * x)
    assert_close(scan.state, chunk_after)


@pytest.mark.parametrize("tokens", [1, 5])
def test_inputs_may_lie_anyhow_in_memory(tokens):
    arguments = draw(tokens)
    expected = ssd_scan(**arguments)
    otherwise = {name: arguments[name].transpose(1, -1).contiguous().transpose(1, -1) for name in ("x", "B", "C")}
    otherwise["x"] = arguments["x"].transpose(2, 3).contiguous().transpose(2, 3)
    scan = ssd_scan(**{**arguments, **otherwise})
    assert_close(scan.y, expected.y)
    assert_close(scan.state, expected.state)


@pytest.mark.parametrize("groups", [1, 4])
def test_one_token_of_large_states_is_taken_some_rows_at_a_time(groups, monkeypatch):
    """Also by `ssd_scan`."""
    torch.manual_seed(0)
    batch, heads, head_dim, states = 5, 8, 64, 128
    x, state = torch.randn(batch, 1, heads, head_dim), torch.randn(batch, heads, head_dim, states)
    dt, A, D = torch.rand(batch, 1, heads), -torch.rand(heads), torch.randn(heads)
    B, C = torch.randn(2, batch, 1, groups, states)
    assert TILE // state[0].numel() not in (0, 1, batch) and state.numel() > TILE
    expected, expected_after = ssd_step_reference(x, dt, A, B, C, state)
    y, after = ssd_step_by_tiles(x, dt, A, B, C, state)
    assert_close(y, expected)
    assert_close(after, expected_after)
    monkeypatch.setattr("twotower.kernels.ssd.ssd_step_reference", None)
    with torch.no_grad():
        assert_close(ssd_scan(x, dt, A, B, C, D, state).state, expected_after)
