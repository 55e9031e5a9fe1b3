"""What we pass to causal-conv1d, checked on a stand-in that does and refuses what the package says it does."""

import sys

import pytest
import torch
from fake_packages import CausalConv1d
from tolerances import assert_close

from twotower.kernels._causal_conv1d import causal_conv1d_cannot, causal_conv_with_package
from twotower.kernels.causal_conv import causal_conv


@pytest.fixture
def package(monkeypatch):
    fake = CausalConv1d()
    monkeypatch.setitem(sys.modules, "causal_conv1d", fake)
    return fake


def draw(tokens, channels=16, taps=4, dtype=torch.float32, rows=2):
    torch.manual_seed(tokens + taps)
    x, state = torch.randn(rows, tokens, channels), torch.randn(rows, taps - 1, channels)
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    return {name: part.to(dtype) for name, part in {"x": x, "weight": weight, "bias": bias, "state": state}.items()}


def check(arguments, call, **options):
    before = None if arguments.get("state") is None else arguments["state"].clone()
    assert causal_conv1d_cannot(**arguments, ends=options.get("ends")) is None
    y, state = call(arguments, **options)
    expected, expected_state = causal_conv(**arguments, **options, backend="torch")
    assert y.dtype == expected.dtype
    assert_close(y, expected)
    assert before is None or torch.equal(arguments["state"], before)
    return state, expected_state


def adapter(arguments, **options):
    return causal_conv_with_package(**arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_chunk(package, tokens, taps, dtype):
    state, _ = check(draw(tokens, taps=taps, dtype=dtype), adapter)
    assert state is None
    assert package.calls == ["fn"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 4])
def test_step(package, taps, dtype):
    state, expected = check(draw(1, taps=taps, dtype=dtype), adapter)
    assert torch.equal(state, expected)
    assert package.calls == ["update"]


@pytest.mark.parametrize("left_out", ["bias", "state"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_without(package, tokens, left_out):
    check({name: part for name, part in draw(tokens).items() if name != left_out}, adapter)


@pytest.mark.parametrize("columns", [3, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_part_of_a_projection(package, tokens, columns):
    """Copied only where its tokens lie at strides that the package refuses."""
    arguments = draw(tokens)
    apart = torch.cat([arguments["x"], torch.zeros(2, tokens, columns)], dim=-1)[..., :-columns]
    check(arguments | {"x": apart}, adapter)


def test_filters_and_state_of_another_dtype(package):
    arguments = draw(4, dtype=torch.bfloat16)
    check(arguments | {name: arguments[name].float() for name in ("weight", "state")}, adapter)


def test_of_the_whole_operation_rows_end_where_they_end(package, monkeypatch):
    """The state at each row's end is ours to compute."""
    monkeypatch.setattr("twotower.kernels.causal_conv.choose", lambda op, backend, *arguments: chosen[backend])
    chosen = {"causal-conv1d": causal_conv_with_package, "torch": None}

    def operation(arguments, **options):
        return causal_conv(**arguments, **options, backend="causal-conv1d")

    for tokens, ends in ((5, [5, 2]), (1, [1, 0]), (5, None), (1, None)):
        options = {"ends": None if ends is None else torch.tensor(ends)}
        state, expected = check(draw(tokens), operation, **options)
        assert torch.equal(state, expected)
        inputs, expected = check(draw(tokens), operation, **options, return_inputs=True)
        assert torch.equal(inputs, expected)
    assert package.calls == ["fn"] * 6 + ["update"] * 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float64}, "computes in float32"),
        ({"taps": 5}, "2 to 4 taps, these have 5"),
        ({"channels": 12}, "multiples of 8, these are 12"),
        ({"rows": 0}, "at least one row"),
    ],
)
def test_what_it_cannot_compute(changed, reason):
    assert reason in causal_conv1d_cannot(**draw(**{"tokens": 3} | changed))


def test_an_activation_it_does_not_have():
    assert "not 'relu'" in causal_conv1d_cannot(**draw(3), activation="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_on_a_gpu(tokens, dtype):
    arguments = {name: part.cuda() for name, part in draw(tokens, dtype=dtype).items()}
    y, state = causal_conv(**arguments, backend="causal-conv1d")
    # In float64, as torch rounds bfloat16 twice there, before the activation and after it.
    expected, expected_state = causal_conv(
        **{name: part.double() for name, part in arguments.items()}, backend="torch"
    )
    assert_close(y, expected)
    assert torch.equal(state.double(), expected_state)
