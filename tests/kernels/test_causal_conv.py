"""causal_conv against a loop over tokens in float64 and against transformers' own convolution."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_fn

from twotower.kernels.causal_conv import causal_conv, conv_state, inputs_after_state, inputs_before_blocks

BATCH, CHANNELS = 2, 6


def draw(tokens, taps, dtype=torch.float32, bias=True, state=True):
    torch.manual_seed(tokens * 100 + taps)
    x = torch.randn(BATCH, tokens, CHANNELS).to(dtype)
    weight = torch.randn(CHANNELS, taps).to(dtype)
    return (
        x,
        weight,
        torch.randn(CHANNELS).to(dtype) if bias else None,
        torch.randn(BATCH, taps - 1, CHANNELS).to(dtype) if state else None,
    )


def token_by_token(x, weight, bias, state, activation=F.silu):
    """Shift one input in, take the product with the filter, repeat."""
    weight = weight.double()
    window = torch.zeros(BATCH, weight.shape[1], CHANNELS, dtype=torch.float64)
    if state is not None:
        window[:, 1:] = state.double()
    outputs = []
    for token in x.double().unbind(1):
        window = torch.cat([window[:, 1:], token[:, None]], dim=1)
        y = (window * weight.T).sum(1)
        outputs.append(activation(y if bias is None else y + bias.double()))
    return torch.stack(outputs, dim=1), window[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 33])
def test_equals_the_recurrence(tokens, taps, bias, state, dtype):
    arguments = draw(tokens, taps, dtype, bias, state)
    y, after = causal_conv(*arguments)
    expected, expected_after = token_by_token(*arguments)
    assert y.dtype == after.dtype == dtype
    assert_close(y, expected, dtype)
    assert torch.equal(after.double(), expected_after)


@pytest.mark.parametrize("tokens", [1, 4, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_transformers(tokens, bias):
    x, weight, bias, _ = draw(tokens, 4, bias=bias, state=False)
    expected = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert_close(causal_conv(x, weight, bias)[0], expected)


def test_other_activations():
    x, weight, bias, state = draw(5, 4)
    expected, _ = token_by_token(x, weight, bias, state, F.gelu)
    assert_close(causal_conv(x, weight, bias, state, activation="gelu")[0], expected, torch.float32)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("split", [1, 2, 3, 8, 12])
def test_a_split_anywhere_changes_nothing(split, taps):
    x, weight, bias, state = draw(13, taps)
    whole, after = causal_conv(x, weight, bias, state)
    first, between = causal_conv(x[:, :split], weight, bias, state)
    second, after_second = causal_conv(x[:, split:], weight, bias, between)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert torch.equal(after_second, after)


@pytest.mark.parametrize("ends", [[0, 9], [1, 2], [4, 0], [9, 9]])
def test_the_state_ends_at_each_rows_last_token(ends):
    x, weight, bias, state = draw(9, 4)
    x = x * (torch.arange(9) < torch.tensor(ends)[:, None])[..., None]
    y, after = causal_conv(x, weight, bias, state, ends=torch.tensor(ends))
    for row, end in enumerate(ends):
        alone = slice(row, row + 1)
        if end == 0:
            assert torch.equal(after[alone], state[alone])
            continue
        expected, expected_after = causal_conv(x[alone, :end], weight, bias, state[alone])
        assert_close(y[alone, :end], expected)
        assert torch.equal(after[alone], expected_after)


@pytest.mark.parametrize("ends", [None, [0, 9], [3, 1]])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4, 12])
def test_the_state_without_the_outputs(taps, state, ends):
    x, weight, bias, before = draw(9, taps, state=state)
    padded = inputs_after_state(x, taps, before)
    assert padded.shape == (BATCH, taps - 1 + 9, CHANNELS)
    after = conv_state(padded, taps, None if ends is None else torch.tensor(ends))
    for row, end in enumerate(ends or [9, 9]):
        _, expected = token_by_token(x[:, :end], weight, bias, before) if end else (None, padded[:, : taps - 1])
        assert torch.equal(after[row], expected[row].float())


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 12])
def test_inputs_before_blocks_are_the_states_of_the_prefixes(block, taps):
    x, weight, _, _ = draw(4 * block, taps)
    before = inputs_before_blocks(x, taps, block)
    assert before.shape == (BATCH, 4, taps - 1, CHANNELS)
    assert not before[:, 0].any()
    for index in range(1, 4):
        _, expected = causal_conv(x[:, : index * block], weight)
        assert torch.equal(before[:, index], expected)
