"""Who computes an operation: a registry of backends by name, per operation, and the choice between them.

Every operation has "torch", its own code in the operation's file, on every device and in every dtype. Others are
written in Triton (ours), or come from the packages people install for such a model. `backend="auto"` takes the first
that was timed on a GPU and won there on what is asked, in bfloat16 and float16, whose rounding hides that products of
theirs are of TF32; and else torch, as in compiled passes and where gradients are wanted. A backend asked for by name
is never replaced by another one: where it cannot compute what is asked, a ValueError says why.

To add a backend, write a function with the operation's arguments, one that says why it cannot take some, and an entry
in `BACKENDS`; of a package that is new here also one in `MODULES`, and its name in pyproject.toml's `gpu`. What tests
are to show of it, see `tests/tools/test_mamba_ssm.py`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ._attention_triton import attention_with_triton, triton_cannot_attend
from ._causal_conv1d import causal_conv1d_cannot, causal_conv_with_package
from ._conv_triton import conv_with_triton, triton_cannot_convolve
from ._experts_triton import experts_with_triton, triton_cannot_route
from ._flash_attn import attention_with_flash_attn, flash_attn_cannot
from ._mamba_ssm import (
    gated_rms_norm_with_mamba_ssm,
    mamba_ssm_cannot_norm,
    mamba_ssm_cannot_scan,
    rms_norm_with_mamba_ssm,
    scan_with_mamba_ssm,
    step_with_mamba_ssm,
)
from ._routing_triton import route_with_triton, triton_cannot_choose
from ._ssd_triton import scan_with_triton, state_with_triton, triton_cannot_scan


@dataclass(frozen=True)
class Backend:
    """
    One way to compute an operation.

    Args:
        name: which is also the package's, on PyPI.
        run: takes the operation's arguments.
        cannot: takes them, too, and says why `run` cannot; None if it can.
        in_triton: whether it is all Triton, which on a CPU its interpreter runs.
        measured: on which GPU it was timed against torch and won, and when; empty if never, and then "auto" avoids it.
        wins: takes the operation's arguments and says whether it was faster on such; by default always.
        where: the same for `twotower info --kernels`.
    """

    name: str
    run: Callable[..., Any]
    cannot: Callable[..., str | None]
    in_triton: bool = False
    measured: str = ""
    wins: Callable[..., bool] = lambda *arguments: True
    where: str = "in 16 bits"


def _by_name(*backends: Backend) -> dict[str, Backend]:
    return {backend.name: backend for backend in backends}


# benchmarks/gpu.json, sections "kernels": at the released geometry, 1 to 16 rows of 1, 16 and 512 tokens.
H100 = "H100, 2026-11-27"


def _few_tokens(x: torch.Tensor, *_: Any) -> bool:
    """As in a block; of longer chunks ours lost to torch with many rows."""
    return x.shape[1] <= 64


def _tokens_of_a_block(x: torch.Tensor, *_: Any) -> bool:
    """Of 16 rows; of more, torch's grouped product reads the weights as often and multiplies faster."""
    return x.shape[0] <= 256


def _many_queries(query: torch.Tensor, *_: Any) -> bool:
    """Of fewer ours took less time."""
    return query.shape[2] > 64


OF_FEW_ROWS = "in 16 bits, up to 256 tokens in all"
OF_LONG_CHUNKS = "in 16 bits, more than 64 tokens"
OF_FEW_TOKENS: dict[str, Any] = {"measured": H100, "wins": _few_tokens, "where": "in 16 bits, up to 64 tokens"}


# Operation -> its backends beside torch, in the order in which "auto" would take them. "ssd_step" is a scan of one
# token, "ssd_state" the state after some of a chunk's tokens.
BACKENDS: dict[str, dict[str, Backend]] = {
    "ssd_scan": _by_name(
        Backend("triton", scan_with_triton, triton_cannot_scan, in_triton=True, **OF_FEW_TOKENS),
        Backend("mamba-ssm", scan_with_mamba_ssm, mamba_ssm_cannot_scan, in_triton=True, measured=H100),
    ),
    "ssd_step": _by_name(
        Backend("mamba-ssm", step_with_mamba_ssm, mamba_ssm_cannot_scan, in_triton=True, measured=H100),
        Backend("triton", scan_with_triton, triton_cannot_scan, in_triton=True, measured=H100),
    ),
    "ssd_state": _by_name(Backend("triton", state_with_triton, triton_cannot_scan, in_triton=True, **OF_FEW_TOKENS)),
    "causal_conv": _by_name(
        Backend("triton", conv_with_triton, triton_cannot_convolve, in_triton=True, measured=H100),
        Backend("causal-conv1d", causal_conv_with_package, causal_conv1d_cannot, measured=H100),
    ),
    "gated_rms_norm": _by_name(
        Backend("mamba-ssm", gated_rms_norm_with_mamba_ssm, mamba_ssm_cannot_norm, in_triton=True, measured=H100)
    ),
    "rms_norm": _by_name(
        Backend("mamba-ssm", rms_norm_with_mamba_ssm, mamba_ssm_cannot_norm, in_triton=True, measured=H100)
    ),
    "top_k_routing": _by_name(
        Backend("triton", route_with_triton, triton_cannot_choose, in_triton=True, measured=H100)
    ),
    "routed_experts": _by_name(
        Backend("triton", experts_with_triton, triton_cannot_route, True, H100, _tokens_of_a_block, OF_FEW_ROWS)
    ),
    "block_attention": _by_name(
        Backend(
            "flash-attn", attention_with_flash_attn, flash_attn_cannot, False, H100, _many_queries, OF_LONG_CHUNKS
        ),
        Backend("triton", attention_with_triton, triton_cannot_attend, in_triton=True, measured=H100),
    ),
}
# Package -> the module that shows whether it was built for this torch. mamba-ssm's Triton kernels need its CUDA
# extension only because the package imports it.
MODULES = {
    "triton": "triton",
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
    "flash-attn": "flash_attn",
}


def choose(op: str, backend: str, *arguments: Any) -> Callable[..., Any] | None:
    """
    Who is to compute an operation: a function that takes `arguments`, or None for the operation's own torch code.

    Args:
        op: one of `BACKENDS`.
        backend: "torch", "auto" or the name of another one.
        arguments: the operation's, in its order; the first is a tensor.

    Raises:
        ValueError: for an unknown backend, and for one that cannot compute this.
    """
    if is_torch(backend, arguments[0]):
        return None
    if backend == "auto":
        for each in BACKENDS[op].values():
            if each.measured and each.wins(*arguments) and _obstacle(each, arguments) is None:
                return each.run
        return None
    chosen = _named(op, backend)
    obstacle = _obstacle(chosen, arguments)
    if obstacle is not None:
        raise ValueError(f'{op} cannot be computed by "{backend}": it {obstacle}; use the backend "torch" or "auto"')
    return chosen.run


def is_torch(backend: str, x: torch.Tensor) -> bool:
    """Whether an operation on `x` is torch's by this choice, whatever else it is given."""
    if backend != "auto":
        return backend == "torch"
    return not x.is_cuda or x.element_size() > 2 or torch.compiler.is_compiling()


def check_kernels(kernels: str | Mapping[str, str]) -> dict[str, str]:
    """
    The backend of each operation, as a model's `kernels` argument says it.

    Args:
        kernels: operation -> backend, "auto" for those it does not name; or one backend for all that have it, "auto"
            for the others.

    Raises:
        ValueError: for an unknown operation or backend, and for one whose package is not here.
    """
    if isinstance(kernels, str):
        known = {"auto", "torch"} | {name for backends in BACKENDS.values() for name in backends}
        if kernels not in known:
            raise ValueError(f"kernels is {kernels!r}; use one of {_quoted(known)}, or a dict of operations")
        if kernels in ("auto", "torch"):
            return dict.fromkeys(BACKENDS, kernels)
        kernels = {op: kernels for op, backends in BACKENDS.items() if kernels in backends}
    if not isinstance(kernels, Mapping):
        raise ValueError(f"kernels is {kernels!r}; give the name of a backend, or a dict from operations to backends")
    for op, backend in kernels.items():
        if op not in BACKENDS:
            raise ValueError(f"kernels names the operation {op!r}; those there are: {_quoted(BACKENDS)}")
        if backend not in ("auto", "torch"):
            missing = _missing(_named(op, backend).name)
            if missing is not None:
                raise ValueError(f'{op} cannot be computed by "{backend}": it {missing}; use "torch" or "auto"')
    return dict.fromkeys(BACKENDS, "auto") | dict(kernels)


def kernel_table() -> list[tuple[str, str, str, str]]:
    """For `twotower info --kernels`: operation, backend, what that lacks here, where "auto" takes it."""
    rows = []
    for op, backends in BACKENDS.items():
        left, own = "everywhere", []
        for name, backend in backends.items():
            lacks, takes = _lacks_here(backend), "never"
            if not lacks and left != "in 32 bits":
                takes = backend.where if left == "everywhere" else f"else {backend.where}"
                left = "in 32 bits" if backend.where == Backend.where else "elsewhere"
            own.append(("", name, lacks or "ready", takes))
        rows += [(op, "torch", "everywhere", left), *own]
    return rows


def package_table() -> list[tuple[str, str, str, str]]:
    """For `twotower info --kernels`, of each package: name, version here, what it computes, where it was measured."""
    rows = []
    for package in MODULES:
        ops = [op for op, backends in BACKENDS.items() if package in backends]
        measured = sorted({BACKENDS[op][package].measured for op in ops} - {""})
        here = package_version(package) or "not installed"
        rows.append((package, here, ", ".join(ops), "; ".join(measured) or "never"))
    return rows


@functools.cache
def package_version(package: str) -> str | None:
    """The installed version; None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _named(op: str, backend: str) -> Backend:
    if not isinstance(backend, str) or backend not in BACKENDS[op]:
        raise ValueError(f"{op} has no backend {backend!r}; use one of {_quoted({'auto', 'torch', *BACKENDS[op]})}")
    return BACKENDS[op][backend]


def _obstacle(backend: Backend, arguments: tuple[Any, ...]) -> str | None:
    """Why a backend cannot compute an operation of these arguments; None if it can."""
    missing = _missing(backend.name)
    if missing is not None:
        return missing
    device = arguments[0].device.type
    if device != "cuda" and not (device == "cpu" and backend.in_triton and _interpreted()):
        remedy = " (on a CPU, in Triton's interpreter alone: set TRITON_INTERPRET=1)" if backend.in_triton else ""
        return f"runs on CUDA devices{remedy}, the tensors are on {arguments[0].device}"
    if torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in arguments):
        return "gives no gradients, and these tensors require them"
    if not torch.compiler.is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
        return "computes plain values, not within torch.func or forward-mode differentiation"
    return backend.cannot(*arguments)


# To a compiler, what is installed is a constant.
@torch.compiler.assume_constant_result
@functools.cache
def _missing(package: str) -> str | None:
    """Why a package's functions cannot be called here, on whatever device; None if they can."""
    if package_version(package) is None:
        return f"is not installed: pip install --no-build-isolation {package}"
    try:
        import_module(MODULES[package])
    except ImportError as error:
        install = f"pip install --no-build-isolation --force-reinstall {package}"
        return f"is installed, but does not import ({error}); build it for this torch: {install}"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Whether Triton interprets kernels rather than compiling them."""
    return bool(import_module("triton").knobs.runtime.interpret)


def _lacks_here(backend: Backend) -> str:
    """What stands against a backend on this machine, whatever it is asked to compute; empty if nothing does."""
    missing = _missing(backend.name)
    if missing is None and not torch.cuda.is_available():
        missing = "runs in Triton's interpreter" if backend.in_triton and _interpreted() else "needs a CUDA device"
    never = None if backend.measured else 'never timed on a GPU, so off in "auto"'
    return "; ".join(filter(None, (never, missing)))


def _quoted(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))


__all__ = ["BACKENDS", "Backend", "check_kernels", "choose", "is_torch", "kernel_table", "package_table"]
