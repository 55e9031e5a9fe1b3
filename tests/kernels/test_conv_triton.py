"""Our Triton kernel of the convolution in Triton's interpreter, against torch in float64; and compiled ahead of time.

Only float32 and float16 count there: of bfloat16 the interpreter cuts off what a GPU rounds.
"""

import pytest
import torch
import torch.nn.functional as F
from ahead import assert_nothing_spills
from tolerances import assert_close

from twotower.kernels import _conv_triton
from twotower.kernels._conv_triton import conv_tiles, triton_cannot_convolve
from twotower.kernels.causal_conv import causal_conv

pytestmark = pytest.mark.usefixtures("nan_where_nothing_is_written")

# (rows, tokens, channels, taps)
SIZES = [
    (2, 1, 6, 4),
    (3, 1, 65, 8),
    (1, 2, 64, 4),
    (3, 5, 70, 2),
    (2, 8, 5, 1),
    (2, 9, 33, 3),
    (1, 16, 130, 4),
    (2, 64, 3, 8),
    (1, 70, 64, 4),
]
# Of the largest output.
FLOAT32 = 1e-6


@pytest.fixture
def launches(monkeypatch):
    """The arguments of each launch of the kernel."""
    kernel, seen = _conv_triton.conv_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args) or kernel[grid](*args, **options)

    monkeypatch.setattr(_conv_triton, "conv_kernel", Recorded())
    return seen


def draw(sizes, device="cpu", dtype=torch.float32):
    """Inputs between other columns of one projection, behind which there is more than it may read."""
    rows, tokens, channels, taps = sizes
    torch.manual_seed(sum(sizes))
    arguments = {
        "x": torch.randn(rows, tokens, channels),
        "weight": torch.randn(channels, 1, taps),
        "bias": torch.randn(channels),
        "state": torch.randn(rows, taps - 1, channels),
    }
    arguments = {name: tensor.to(device, dtype) for name, tensor in arguments.items()}
    apart = torch.full((rows, tokens + 1, channels + 24), torch.nan, dtype=dtype, device=device)
    apart[:, :tokens, 16 : 16 + channels] = arguments["x"]
    return arguments | {"x": apart[:, :tokens, 16 : 16 + channels], "weight": arguments["weight"].squeeze(1)}


def without(arguments, *names):
    return {name: tensor for name, tensor in arguments.items() if name not in names}


def exact(arguments, **options):
    return causal_conv(**{name: tensor.double() for name, tensor in arguments.items()}, **options, backend="torch")


def error(actual, expected):
    """Relative to the largest; not a number where the kernel wrote nothing."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def check(arguments, **options):
    given = {name: tensor.clone() for name, tensor in arguments.items()}
    y, kept = causal_conv(**arguments, **options, backend="triton")
    expected, expected_kept = exact(arguments, **options)
    assert y.dtype == kept.dtype == arguments["x"].dtype
    assert y.shape == expected.shape
    assert error(y, expected) < FLOAT32
    assert torch.equal(kept.double(), expected_kept)
    assert all(torch.equal(tensor, given[name]) for name, tensor in arguments.items())


@pytest.mark.parametrize("return_inputs", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_convolution(sizes, return_inputs):
    check(draw(sizes), return_inputs=return_inputs)


@pytest.mark.parametrize("return_inputs", [False, True])
@pytest.mark.parametrize("left_out", [("state",), ("bias",), ("state", "bias")])
@pytest.mark.parametrize("sizes", SIZES[:6])
def test_without(sizes, left_out, return_inputs):
    check(without(draw(sizes), *left_out), return_inputs=return_inputs)


@pytest.mark.parametrize("left_out", [(), ("state",)])
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 9])
def test_each_row_ends_where_it_ends(tokens, taps, left_out):
    """From no token to all of them; where inputs are asked for, ends are of no matter."""
    arguments = without(draw((tokens + 1, tokens, 3, taps)), *left_out)
    for dtype in (torch.int64, torch.int32):
        ends = torch.arange(tokens + 1, dtype=dtype)
        check(arguments, ends=ends)
        check(arguments, ends=ends, return_inputs=True)
    check(arguments, ends=ends.flip(0).repeat_interleave(2)[::2])


@pytest.mark.parametrize("tokens", [1, 8, 70])
def test_one_launch_that_reads_inputs_and_state_as_they_lie(launches, tokens):
    arguments = draw((2, tokens, 6, 4))
    assert not arguments["x"].is_contiguous()
    arguments["state"] = torch.randn(2, 9, 8)[:, 4:7, 1:7]
    check(arguments)
    assert len(launches) == 1
    assert launches[0][0] is arguments["x"] and launches[0][3] is arguments["state"]
    assert launches[0][1].data_ptr() == arguments["weight"].data_ptr()


def test_channels_that_lie_apart():
    arguments = draw((2, 5, 6, 4))
    check(arguments | {name: arguments[name].mT.contiguous().mT for name in ("x", "weight", "state")})


def test_half_precision_is_rounded_once():
    """What the float32 sum gives under its activation, and not what the rounded sum does."""
    arguments = draw((2, 16, 70, 4), dtype=torch.float16)
    y, kept = causal_conv(**arguments, backend="triton")
    expected, expected_kept = exact(arguments)
    assert y.dtype == kept.dtype == torch.float16
    assert torch.equal(kept.double(), expected_kept)
    # Half a step of float16, or half of its smallest number; and what float32 had lost before.
    allowed = (2**-11 + 1e-6) * expected.abs() + 2**-25
    assert ((y.double() - expected).abs() <= allowed).all()
    padded = torch.cat([arguments["state"], arguments["x"]], dim=1).double()
    sums = F.conv1d(padded.mT, arguments["weight"].double()[:, None], arguments["bias"].double(), groups=70).mT
    assert ((F.silu(sums.half()).double() - expected).abs() > allowed).any()


def test_filters_and_state_of_another_dtype():
    arguments = draw((2, 5, 6, 4))
    y, kept = causal_conv(**arguments | {"x": arguments["x"].half()}, backend="triton")
    rounded = arguments | {name: arguments[name].half() for name in ("x", "state")}
    expected, expected_kept = exact(rounded)
    assert error(y, expected) < 2**-11
    assert torch.equal(kept.double(), expected_kept)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_sums_of_which_an_exponential_is_infinite(value):
    arguments = draw((1, 3, 2, 2)) | {"bias": torch.full((2,), value)}
    assert_close(causal_conv(**arguments, backend="triton")[0], exact(arguments)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # one that it takes, and one that needs a copy
@pytest.mark.parametrize("tokens", [1, 2, 9, 20])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_state_in_place(tokens, dtype, backend):
    x, weight, bias, state = (draw((2, tokens, 33, 4))[name] for name in ("x", "weight", "bias", "state"))
    ends = torch.tensor([tokens, tokens // 2])
    for own in (None, ends):
        held = state.contiguous().to(dtype)
        expected = causal_conv(x, weight, bias, state, own, backend="torch")
        y, after = causal_conv(x, weight, bias, held, own, in_place=True, backend=backend)
        assert after is held
        assert_close(y, expected[0])
        assert torch.equal(after.float(), expected[1])


@pytest.mark.parametrize("return_inputs", [False, True])
def test_no_rows(return_inputs):
    y, kept = causal_conv(**draw((0, 5, 6, 4)), return_inputs=return_inputs, backend="triton")
    assert y.shape == (0, 5, 6) and kept.shape == (0, 8 if return_inputs else 3, 6)


def test_the_activations_other_name():
    check(draw((1, 3, 6, 4)), activation="swish")


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((1, 3, 6, 4), {"dtype": torch.float64}, "computes in float32, x is torch.float64"),
        ((1, 3, 6, 9), {}, "takes filters of 1 to 8 taps, these have 9"),
        ((1, 0, 6, 4), {}, "needs at least one token"),
    ],
)
def test_what_it_cannot_compute(sizes, options, reason):
    with pytest.raises(ValueError, match=rf'causal_conv cannot be computed by "triton": it {reason}'):
        causal_conv(**draw(sizes, **options), backend="triton")


def test_another_activation_and_gradients_it_cannot():
    arguments = draw((1, 3, 6, 4))
    with pytest.raises(ValueError, match=r"it knows the activation silu, not 'gelu'"):
        causal_conv(**arguments, activation="gelu", backend="triton")
    with pytest.raises(ValueError, match=r"gives no gradients"):
        causal_conv(**arguments | {"bias": arguments["bias"].requires_grad_()}, backend="triton")


def test_more_tokens_than_a_launch_has_runs_for_it_cannot():
    x, weight = torch.zeros(1, 1, 1).expand(1, 524281, 1), torch.ones(1, 4)
    assert "at most 524280 tokens at once, these are 524281" in triton_cannot_convolve(x, weight)
    assert triton_cannot_convolve(x[:, 1:], weight) is None


STATE = {"INPUTS": False, "ENDED": True}
INPUTS = {"INPUTS": True, "ENDED": False}
COMPILED = [
    (90, "bf16", 1, 4, STATE),
    (90, "bf16", 16, 4, STATE),
    (90, "bf16", 16, 4, INPUTS),
    (90, "fp32", 512, 8, STATE),
    (80, "bf16", 16, 4, STATE),
    (80, "fp32", 512, 8, INPUTS),
]


def ahead(architecture, dtype, tokens, taps, flags):
    tiles = conv_tiles(tokens)
    options = {"num_warps": tiles.pop("num_warps")}
    types = dict.fromkeys(["x", "weight", "bias", "state", "y", "kept"], "*" + dtype) | {"ends": "*i64"}
    constants = {"C": 6144, "K": taps, "BIASED": True, "SEEDED": True, **flags, **tiles}
    return architecture, "conv_kernel", types, constants, options


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    assert_nothing_spills(_conv_triton, tmp_path, [ahead(*case) for case in COMPILED])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SIZES, (16, 1, 6144, 4), (16, 16, 6144, 4), (2, 512, 6144, 4)])
def test_on_a_gpu(sizes, dtype):
    arguments = draw(sizes, "cuda", dtype)
    for options in ({}, {"return_inputs": True}, {"ends": torch.arange(sizes[0], device="cuda") % (sizes[1] + 1)}):
        y, kept = causal_conv(**arguments, **options, backend="triton")
        expected, expected_kept = exact(arguments, **options)
        assert_close(y, expected, dtype)
        assert torch.equal(kept.double(), expected_kept)
