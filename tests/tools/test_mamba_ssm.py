"""What we use of mamba-ssm, from its own Triton sources in Triton's interpreter, against our reference in float64.

The package is installed without its CUDA extension, which the kernels used here do not need. What is left out
therefore: its `__init__`, which imports the extension; the choice between configurations by time; and entering a CUDA
device.
"""

import sys
import types
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import triton
from golden_cases import QUICKEST, assert_quickest_golden
from triton.runtime import interpreter

from twotower.kernels._mamba_ssm import gated_rms_norm_with_mamba_ssm
from twotower.kernels.backends import _missing, choose, package_version
from twotower.kernels.gated_rms_norm import gated_rms_norm
from twotower.kernels.rms_norm import rms_norm
from twotower.kernels.ssd import ssd_scan

pytestmark = pytest.mark.usefixtures("mamba_ssm")
# (rows, tokens, heads, head dim, groups, state)
SIZES = [(2, 16, 4, 16, 2, 16), (1, 5, 3, 8, 1, 24), (2, 37, 6, 20, 3, 16)]
FLOAT32 = 2e-6


# Where there is a GPU its own products are of TF32, and nothing is left out or stubbed.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    FLOAT32 = 1e-3


@pytest.fixture(scope="module")
def mamba_ssm():
    if DEVICE == "cuda":
        yield
        return
    root = find_spec("mamba_ssm").submodule_search_locations[0]
    with pytest.MonkeyPatch.context() as patch:
        # What others have imported was decorated without what is put in place here.
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            patch.delitem(sys.modules, name)
        _missing.cache_clear()
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
            module = types.ModuleType(name)
            module.__path__ = ["/".join([root, *name.split(".")[1:]])]
            patch.setitem(sys.modules, name, module)
        tuned = triton.autotune
        patch.setattr(triton, "autotune", lambda configs, key, **options: tuned(configs[:1], key, **options))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            del sys.modules[name]
    _missing.cache_clear()


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch):
    """What a kernel should write, but does not, is then no number."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **options: poisoned(make(*args, **options)))


def poisoned(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def draw(sizes, state_scale=1000.0):
    rows, tokens, heads, head_dim, groups, states = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {
        "x": normal(rows, tokens, heads, head_dim),
        "dt": torch.rand(rows, tokens, heads, generator=generator),
        "A": -4 * torch.rand(heads, generator=generator) - 0.1,
        "B": normal(rows, tokens, groups, states),
        "C": normal(rows, tokens, groups, states),
        "D": normal(heads),
        "state": state_scale * normal(rows, heads, head_dim, states),
    }
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def check_scan(arguments, tolerance=FLOAT32, **options):
    before = arguments["state"].clone()
    y, state, _ = ssd_scan(**arguments, backend="mamba-ssm", **options)
    expected = ssd_scan(**{name: tensor.double() for name, tensor in arguments.items()}, backend="torch")
    assert error(y, expected.y) < tolerance
    assert error(state, expected.state) < tolerance
    assert state.dtype == torch.float32
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("sizes", SIZES)
def test_scan(sizes):
    check_scan(draw(sizes))


def test_scan_over_several_chunks():
    check_scan(draw((1, 41, 2, 16, 1, 16)), chunk_size=16)


def test_scan_of_columns_without_a_token_and_parts_of_a_projection():
    arguments = draw((2, 9, 4, 16, 2, 16))
    arguments["dt"][1, 5:] = 0
    apart = torch.cat([arguments["x"].flatten(2), torch.zeros(2, 9, 3, device=DEVICE)], dim=-1)
    check_scan(arguments | {"x": apart[..., :-3].unflatten(-1, (4, 16))})


@pytest.mark.parametrize("sizes", [(2, 1, 4, 16, 2, 16), (1, 1, 6, 20, 3, 24)])
def test_step(sizes):
    check_scan(draw(sizes))


@pytest.mark.parametrize("tokens", [1, 6])
def test_without_a_state(tokens):
    arguments = draw((2, tokens, 4, 16, 2, 16)) | {"state": None}
    y, state, _ = ssd_scan(**arguments, backend="mamba-ssm")
    expected = ssd_scan(**arguments, backend="torch")
    assert error(y, expected.y.double()) < FLOAT32
    assert error(state, expected.state.double()) < FLOAT32


@pytest.mark.parametrize("tokens", [1, 6])
def test_in_place(tokens):
    arguments = draw((2, tokens, 4, 16, 2, 16))
    expected = ssd_scan(**arguments, backend="mamba-ssm")
    y, state, _ = ssd_scan(**arguments, in_place=True, backend="mamba-ssm")
    assert state is arguments["state"]
    assert torch.equal(y, expected.y) and torch.equal(state, expected.state)


@pytest.mark.parametrize("tokens", [1, 6])
def test_step_sizes_made_within(tokens):
    arguments = draw((2, tokens, 4, 16, 2, 16))
    arguments |= {"dt": arguments["dt"] * 8 - 6, "dt_bias": torch.tensor([0.0, -3.0, 2.0, 0.5], device=DEVICE)}
    y, state, _ = ssd_scan(**arguments, backend="mamba-ssm")
    expected = ssd_scan(**arguments, backend="torch")
    assert error(y, expected.y.double()) < FLOAT32
    assert error(state, expected.state.double()) < FLOAT32


def test_the_scan_gets_float32_whatever_the_model_computes_in(monkeypatch):
    """Of bfloat16 it would round the state it begins with."""
    module = choose_module("ssd_combined")
    seen = {}

    def scan(x, dt, A, B, C, chunk_size, **options):
        tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, **options}
        seen.update({name: part.dtype for name, part in tensors.items() if isinstance(part, torch.Tensor)})
        return torch.zeros_like(x), options["initial_states"]

    monkeypatch.setattr(module, "mamba_chunk_scan_combined", scan)
    arguments = draw((2, 16, 4, 16, 2, 16))
    halves = {name: arguments[name].bfloat16() for name in ("x", "B", "C", "D")}
    assert ssd_scan(**arguments | halves, backend="mamba-ssm").y.dtype == torch.bfloat16
    assert len(seen) == 7
    assert set(seen.values()) == {torch.float32}


def choose_module(name):
    assert choose("ssd_scan", "mamba-ssm", *draw((1, 2, 1, 1, 1, 1)).values()) is not None
    return sys.modules[f"mamba_ssm.ops.triton.{name}"]


@pytest.mark.skipif(DEVICE == "cuda", reason="emulates what the GPU does")
def test_with_products_in_tf32_as_on_a_gpu(monkeypatch):
    """The kernels name no precision, and then Triton multiplies in TF32: the error that this makes, bounded."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def in_tf32(handle):
        bits = torch.from_numpy(handle.data.copy()).view(torch.int32)
        rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
        return interpreter.TensorHandle(rounded.view(torch.float32).numpy(), handle.dtype)

    def dot(self, a, b, d, precision, most):
        return multiply(self, in_tf32(a), in_tf32(b), d, precision, most)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    arguments = draw((2, 64, 4, 32, 2, 64))
    y, state, _ = ssd_scan(**arguments, backend="mamba-ssm")
    expected = ssd_scan(**{name: tensor.double() for name, tensor in arguments.items()}, backend="torch")
    assert 1e-5 < error(y, expected.y) < 1e-3
    assert error(state, expected.state) < 1e-3


@pytest.mark.parametrize(("channels", "group_size"), [(64, 32), (60, 20), (24, 24)])
def test_gated_rms_norm(channels, group_size):
    torch.manual_seed(0)
    x, gate, weight = (
        torch.randn(2, 5, channels),
        torch.randn(2, 5, channels + 8)[..., :channels],
        torch.randn(channels),
    )
    x, gate, weight = x.to(DEVICE), gate.to(DEVICE), weight.to(DEVICE)
    y = gated_rms_norm(x, gate, weight, group_size, 1e-5, backend="mamba-ssm")
    expected = gated_rms_norm(x.double(), gate.double(), weight.double(), group_size, 1e-5, backend="torch")
    assert error(y, expected) < FLOAT32


def test_gated_rms_norm_of_a_scan_in_float32_by_heads():
    torch.manual_seed(0)
    x, gate, weight = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 32).half(), torch.randn(32)
    x, gate, weight = x.to(DEVICE), gate.to(DEVICE), weight.to(DEVICE)
    y = gated_rms_norm_with_mamba_ssm(x, gate, weight, 16, 1e-5)
    expected = gated_rms_norm(x.flatten(2).double(), gate.double(), weight.double(), 16, 1e-5, backend="torch")
    assert y.dtype == torch.float16
    assert error(y, expected) < 1e-3


@pytest.mark.parametrize("channels", [64, 60])
def test_rms_norm(channels):
    torch.manual_seed(0)
    x, weight = 100 * torch.randn(2, 5, channels, device=DEVICE), torch.randn(channels, device=DEVICE)
    expected = rms_norm(x.double(), weight.double(), 1e-5, backend="torch")
    assert error(rms_norm(x, weight, 1e-5, backend="mamba-ssm"), expected) < FLOAT32


def test_what_it_cannot_compute():
    arguments, wide = draw((1, 16, 2, 16, 1, 16)), torch.zeros(2, 20000, device=DEVICE)
    with pytest.raises(ValueError, match=r'ssd_scan cannot .* "mamba-ssm": it returns no states between chunks'):
        ssd_scan(**arguments, return_chunk_states=True, backend="mamba-ssm")
    with pytest.raises(ValueError, match=r"computes in float32, x is torch.float64"):
        ssd_scan(**{name: tensor.double() for name, tensor in arguments.items()}, backend="mamba-ssm")
    with pytest.raises(ValueError, match=r"gives no gradients"):
        ssd_scan(**arguments | {"x": arguments["x"].requires_grad_()}, backend="mamba-ssm")
    with pytest.raises(ValueError, match=r"norms at most 65536 bytes at once, these are 20000 channels of 4 bytes"):
        rms_norm(wide[:1], wide[0], 1e-5, backend="mamba-ssm")
    with pytest.raises(ValueError, match=r"at most 65536 bytes"):
        gated_rms_norm(wide, wide, wide[0], 20000, 1e-5, backend="mamba-ssm")


@QUICKEST
def test_nvidias_tokens(goldens, mode, tokens):
    assert_quickest_golden("mamba-ssm", goldens, mode, tokens)


def test_the_package_is_the_one_that_was_read():
    assert package_version("mamba-ssm").startswith("2.3.")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_in_bfloat16_on_a_gpu(tokens):
    arguments = draw((2, tokens, 64, 64, 8, 128))
    arguments |= {name: arguments[name].bfloat16() for name in ("x", "B", "C", "D")}
    y, state, _ = ssd_scan(**arguments, backend="mamba-ssm")
    expected = ssd_scan(**{name: tensor.double() for name, tensor in arguments.items()}, backend="torch")
    assert error(y, expected.y) < 2**-8
    assert error(state, expected.state) < FLOAT32
