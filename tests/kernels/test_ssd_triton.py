"""Our Triton kernel of the scan in Triton's interpreter, against the reference in float64; and compiled ahead of time.

Only float32 counts there: of bfloat16 the interpreter cuts off what a GPU rounds.
"""

import pytest
import torch
from ahead import assert_nothing_spills
from tolerances import assert_close

from twotower.kernels import _ssd_triton
from twotower.kernels.ssd import ssd_scan, ssd_state

pytestmark = pytest.mark.usefixtures("nan_where_nothing_is_written")

# (rows, tokens, heads, head dim, groups, state)
SIZES = [
    (2, 16, 4, 16, 2, 16),
    (2, 1, 4, 8, 4, 6),
    (1, 5, 3, 5, 1, 7),
    (3, 17, 6, 24, 3, 20),
    (1, 64, 2, 40, 1, 33),
    (1, 70, 2, 16, 2, 16),
]
# Of the largest output, for a state of 1e3; the reference's own in float32 is 5e-7 for y, 2e-6 for the state.
FLOAT32 = 1e-6


def draw(sizes, scale=1000.0, device="cpu"):
    rows, tokens, heads, head_dim, groups, states = sizes
    torch.manual_seed(sum(sizes))
    arguments = {
        "x": torch.randn(rows, tokens, heads, head_dim),
        "dt": torch.rand(rows, tokens, heads),
        "A": -4 * torch.rand(heads) - 0.1,
        "B": torch.randn(rows, tokens, groups, states),
        "C": torch.randn(rows, tokens, groups, states),
        "D": torch.randn(heads),
        "state": scale * torch.randn(rows, heads, head_dim, states),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def exact(arguments):
    return {name: tensor.double() for name, tensor in arguments.items() if tensor is not None}


def without(arguments, *names):
    return {name: tensor for name, tensor in arguments.items() if name not in names}


def error(actual, expected):
    """Relative to the largest; not a number where the kernel wrote nothing."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("sizes", SIZES)
def test_scan(sizes):
    arguments = draw(sizes)
    before = arguments["state"].clone()
    y, state, chunk_states = ssd_scan(**arguments, backend="triton")
    expected = ssd_scan(**exact(arguments), backend="torch")
    assert error(y, expected.y) < FLOAT32
    assert error(state, expected.state) < FLOAT32
    assert chunk_states is None
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("sizes", SIZES)
def test_state_at_each_rows_end(sizes):
    arguments = without(draw(sizes), "C", "D")
    for ends in (None, torch.arange(sizes[0]) * 7 % (sizes[1] + 1), torch.full(sizes[:1], sizes[1])):
        expected = ssd_state(**exact(arguments), ends=ends, backend="torch")
        assert error(ssd_state(**arguments, ends=ends, backend="triton"), expected) < FLOAT32


def test_of_no_tokens_the_state_is_the_one_before():
    arguments = without(draw((2, 3, 2, 16, 1, 16)), "C", "D")
    after = ssd_state(**arguments, ends=torch.tensor([0, 0]), backend="triton")
    assert torch.equal(after, arguments["state"])


@pytest.mark.parametrize("tokens", [1, 9])
def test_without_a_state(tokens):
    arguments = draw((2, tokens, 4, 16, 2, 16)) | {"state": None}
    y, state, _ = ssd_scan(**arguments, backend="triton")
    expected = ssd_scan(**exact(arguments), backend="torch")
    assert error(y, expected.y) < FLOAT32
    assert error(state, expected.state) < FLOAT32


def test_without_the_state_after():
    arguments = draw((1, 70, 2, 16, 1, 16))
    y, state, _ = ssd_scan(**arguments, return_state=False, backend="triton")
    assert state is None
    assert error(y, ssd_scan(**exact(arguments), backend="torch").y) < FLOAT32


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_in_place(tokens, apart):
    arguments = draw((2, tokens, 2, 24, 1, 20))
    if apart:
        arguments["state"] = arguments["state"].transpose(2, 3).contiguous().transpose(2, 3)
    names, ends = ("x", "dt", "A", "B", "state"), torch.tensor([tokens, tokens // 2])
    alone = {name: arguments[name].clone() for name in names}
    expected, at_ends = ssd_scan(**arguments, backend="triton"), ssd_state(**alone, ends=ends, backend="triton")
    y, after, _ = ssd_scan(**arguments, in_place=True, backend="triton")
    assert after is arguments["state"]
    assert torch.equal(y, expected.y) and torch.equal(after, expected.state)
    assert ssd_state(**alone, ends=ends, in_place=True, backend="triton") is alone["state"]
    assert torch.equal(alone["state"], at_ends)


@pytest.mark.parametrize("chunk_size", [8, 80])
def test_states_before_each_chunk(chunk_size):
    arguments = draw((1, 90, 2, 16, 1, 16))
    options = {"chunk_size": chunk_size, "return_chunk_states": True}
    states = ssd_scan(**arguments, **options, backend="triton").chunk_states
    assert error(states, ssd_scan(**exact(arguments), **options, backend="torch").chunk_states) < FLOAT32


def test_parts_of_one_projection_and_columns_without_a_token():
    arguments = draw((2, 9, 4, 16, 2, 16))
    arguments["dt"][1, 5:] = 0
    joined = torch.cat([arguments[name].flatten(2) for name in ("x", "B", "C")], dim=-1).split((64, 32, 32), dim=-1)
    parts = {"x": joined[0].unflatten(-1, (4, 16))}
    parts |= {name: part.unflatten(-1, (2, 16)) for name, part in zip("BC", joined[1:], strict=True)}
    assert not parts["x"].is_contiguous()
    y, state, _ = ssd_scan(**arguments | parts, backend="triton")
    expected = ssd_scan(**exact(arguments), backend="torch")
    assert error(y, expected.y) < FLOAT32
    assert error(state, expected.state) < FLOAT32


@pytest.mark.parametrize("tokens", [1, 9])
def test_step_sizes_made_within(tokens):
    arguments = draw((2, tokens, 4, 16, 2, 16))
    # Of projections from -30 to 30, of which the smallest make steps of 1e-13.
    arguments["dt"] = torch.linspace(-30, 30, 2 * tokens * 4).view(2, tokens, 4)
    bias = torch.tensor([0.0, -3.0, 2.0, 0.5])
    steps = torch.nn.functional.softplus(arguments["dt"].double() + bias.double())
    y, state, _ = ssd_scan(**arguments, dt_bias=bias, backend="triton")
    expected = ssd_scan(**exact(arguments) | {"dt": steps}, backend="torch")
    assert error(y, expected.y) < FLOAT32
    assert error(state, expected.state) < FLOAT32
    torch_y, *_ = ssd_scan(**exact(arguments), dt_bias=bias.double(), backend="torch")
    assert error(torch_y, expected.y) < 1e-12


def test_small_step_sizes_are_as_exact_as_large_ones():
    arguments = draw((1, 1, 8, 16, 1, 16)) | {"state": None}
    arguments["dt"] = torch.linspace(-40, 5, 8).view(1, 1, 8)
    y, *_ = ssd_scan(**arguments | {"D": torch.zeros(8)}, dt_bias=torch.zeros(8), backend="triton")
    steps = torch.nn.functional.softplus(arguments["dt"].double())
    expected = ssd_scan(**exact(arguments) | {"dt": steps, "D": torch.zeros(8).double()}, backend="torch").y
    for head in range(8):
        assert error(y[:, :, head], expected[:, :, head]) < FLOAT32


def test_no_rows():
    arguments = draw((0, 4, 2, 16, 1, 16))
    assert ssd_scan(**arguments, backend="triton").y.shape == (0, 4, 2, 16)


def test_half_precision_is_computed_in_float32():
    arguments = draw((2, 16, 4, 16, 2, 16))
    halves = arguments | {name: arguments[name].half() for name in ("x", "B", "C", "D")}
    y, state, _ = ssd_scan(**halves, backend="triton")
    expected = ssd_scan(**exact(halves), backend="torch")
    assert y.dtype == torch.float16
    assert error(y, expected.y) < 1e-3
    assert error(state, expected.state) < FLOAT32


def test_what_it_cannot_compute():
    arguments = draw((1, 4, 2, 16, 1, 16))
    with pytest.raises(ValueError, match=r'ssd_scan cannot be computed by "triton": it computes in float32'):
        ssd_scan(**exact(arguments), backend="triton")
    none = {name: tensor[:, :0] if name in "x dt B C" else tensor for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=r'ssd_state cannot .* "triton": it needs at least one token'):
        ssd_state(**without(none, "C", "D"), backend="triton")
    with pytest.raises(ValueError, match=r"gives no gradients"):
        ssd_scan(**arguments | {"D": arguments["D"].requires_grad_()}, backend="triton")


BOTH = {"OUTPUTS": True, "KEPT": True, "ENDED": False}
REPLAY = {"OUTPUTS": False, "KEPT": True, "ENDED": True}
# The hungriest of what is launched: at each tile of tokens, outputs and state at once; and the replay.
COMPILED = [
    (90, "bf16", 16, BOTH),
    (90, "fp32", 16, BOTH),
    (90, "fp32", 32, BOTH),
    (90, "bf16", 64, BOTH),
    (90, "bf16", 16, REPLAY),
    (80, "bf16", 16, BOTH),
    (80, "fp32", 64, BOTH),
]


def ahead(architecture, dtype, tokens, flags):
    tiles = _ssd_triton.ssd_tiles(tokens, 64, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(["x", "B", "C", "D", "y"], "*" + dtype) | {"ends": "*i64"}
    types |= dict.fromkeys(["dt", "dt_bias", "A", "state", "state_after"], "*fp32")
    constants = {"BIASED": flags["OUTPUTS"], "H": 64, "P": 64, "G": 8, "N": 128, "SEEDED": True, **flags, **tiles}
    return architecture, "ssd_kernel", types, constants, options


def test_compiled_for_sm_90_and_sm_80_nothing_spills(tmp_path):
    assert_nothing_spills(_ssd_triton, tmp_path, [ahead(*case) for case in COMPILED])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SIZES, (2, 16, 64, 64, 8, 128), (2, 64, 64, 64, 8, 128)])
def test_on_a_gpu(sizes, dtype):
    arguments = draw(sizes, device="cuda")
    arguments |= {name: arguments[name].to(dtype) for name in ("x", "B", "C", "D")}
    y, state, _ = ssd_scan(**arguments, backend="triton")
    expected = ssd_scan(**exact(arguments), backend="torch")
    assert_close(y, expected.y, dtype)
    assert_close(state, expected.state, torch.float32)
    # Programs that read and write one state: none may write what another one has yet to read.
    in_place = ssd_scan(**arguments, in_place=True, backend="triton")
    assert torch.equal(in_place.y, y) and torch.equal(arguments["state"], state)
