"""
What this model does on a GPU, for whoever gets one for ten minutes: written to gpu.json beside this file, or where
--json says.

    python benchmarks/gpu.py              everything, at the released geometry, with bfloat16 weights that are random
    python benchmarks/gpu.py --compiled   instead, both towers by a compiler's passes; an hour, most of it compiling
    python benchmarks/gpu.py --only ...   these sections alone, such as: goldens kernels
    python benchmarks/gpu.py --dry-run    the same code at toy sizes, on a CPU in seconds; so without a GPU, too

Predictions are in the file before anything is measured; each outcome comes beside its prediction, as soon as it is
known. Every section runs in a process of its own under its own time limit: one that dies or runs out of time is
recorded as such, with what it had measured, and the next one goes on.

A machine with nothing but Python 3.12, torch 2.11 and an older transformers, and no network, needs two wheels and a
checkout (for tests/goldens and tests/nvidia_30b, to which --data points elsewhere). Here, in the checkout:

    python -m pip download --no-deps -d .whl transformers==5.23.0
    python -m pip wheel --no-deps -w .whl .

And there, once both are copied:

    python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --json gpu.json

Shapes: B rows, T tokens of a pass, S block, L context, H hidden size, E experts, k of them per token.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompileConfig
from transformers import logging as transformers_logging

from twotower import TwoTowerConfig, TwoTowerEngine, TwoTowerForBlockDiffusion
from twotower.bench.reports import environment, write_json
from twotower.checkpoints.inspection import cache_size, model_size
from twotower.compat_twotower import ACT2FN
from twotower.decoding.compiled import CompiledPasses
from twotower.kernels.backends import BACKENDS
from twotower.kernels.block_attention import block_attention
from twotower.kernels.causal_conv import causal_conv
from twotower.kernels.gated_rms_norm import gated_rms_norm
from twotower.kernels.rms_norm import rms_norm
from twotower.kernels.routed_experts import routed_experts
from twotower.kernels.ssd import ssd_scan, ssd_state
from twotower.kernels.top_k_routing import top_k_routing
from twotower.modeling_twotower import TwoTowerRouter

MODES = ("ar", "mask_diffusion", "self_speculative", "mock_ar")
TOKENS_PER_PASS = (1.8, 2.5, 3.3)
# Copy bandwidth in bytes/s, read and written ones counted, and bfloat16 products in flop/s: as measured on such cards
# by others before this script was written. Of others we predict nothing in seconds.
RATES = {"H200": (4.3e12, 790e12), "H100": (3.0e12, 790e12)}
# Of a recorded pass: the share of bandwidth that its large kernels reach, seconds that each kernel costs beside, and
# how many there are at 52 layers: four times those of the first 13, by torch's profiler.
SHARE, PER_KERNEL = 0.85, 1.5e-6
KERNELS = {"ar step": 580, "block pass": 690, "block read": 660}
# Below these bytes of GPU memory the towers share their weights, or are not run at all.
BOTH_TOWERS, ONE_TOWER = 135e9, 70e9

# On a GPU timed by eager passes, too.
EAGER = ("ar",)

# Of more, the experts' products in float64 take too much memory.
MOST_EXACT_TOKENS = 512

# Seconds that a section's process may take to begin.
IMPORTING = 120


@dataclass(frozen=True)
class Sizes:
    """
    How large everything is.

    Args:
        geometry: fields of the config, for whatever pattern of layers.
        pattern: of the full towers.
        copy_bytes, matrix: of the bandwidth and the product that are measured.
        layers: of one kind, that are timed together.
        batches, tokens: of which operations are timed, and layers.
        contexts: behind which layers are.
        chunk, behind: of the memory peak.
        rows, prompt, new_tokens: of the full towers.
        golden_tokens: how much is written of each of NVIDIA's prompts, where it is compared with the CPU's.
        small_vocabulary: where no head is to be timed.
        rounds: how often everything is timed.
        every_golden: 1 for all of NVIDIA's texts, 2 for every other, ...
    """

    geometry: dict[str, Any]
    pattern: str
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    layers: int = 4
    batches: tuple[int, ...] = (1, 4, 16)
    tokens: tuple[int, ...] = (1, 16, 512)
    contexts: tuple[int, ...] = (1024, 32768, 131072)
    chunk: int = 2048
    behind: int = 32768
    rows: tuple[int, ...] = (1, 16)
    prompt: int = 256
    new_tokens: int = 128
    small_vocabulary: int = 256
    golden_tokens: int = 16
    rounds: int = 5
    every_golden: int = 1

    def config(self, pattern: str, **fields: Any) -> TwoTowerConfig:
        return TwoTowerConfig(**{**self.geometry, **fields}, hybrid_override_pattern=pattern)


TOY_GEOMETRY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}
TOY: dict[str, Any] = {"copy_bytes": 1 << 16, "matrix": 64, "layers": 1, "batches": (1, 2), "contexts": (16, 32)}
TOY |= {
    "chunk": 16,
    "behind": 32,
    "prompt": 8,
    "new_tokens": 16,
    "small_vocabulary": 64,
    "every_golden": 12,
    "golden_tokens": 8,
    "tokens": (1, 4),
}
TOY |= {"rows": (1, 2), "rounds": 1}


def sizes_of(data: Path, toy: bool) -> Sizes:
    if toy:
        return Sizes(TOY_GEOMETRY, "ME*", **TOY)
    geometry = json.loads((data / "nvidia_30b" / "config.json").read_text())
    pattern = geometry.pop("hybrid_override_pattern")
    for name in (
        "architectures",
        "auto_map",
        "model_type",
        "num_hidden_layers",
        "torch_dtype",
        "transformers_version",
    ):
        geometry.pop(name, None)
    return Sizes(geometry, pattern)


@dataclass(frozen=True)
class Bench:
    """What a section is given: sizes, the folder of the goldens, the device, and where its outcome goes."""

    sizes: Sizes
    data: Path
    device: torch.device
    outcome_file: Path

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def record(self, outcome: dict[str, Any]) -> None:
        """Keep what has been measured so far, for who is ended later."""
        write_json(self.outcome_file, outcome)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clock(self, run: Callable[[], Any], repeats: int = 4) -> dict[str, float]:
        """
        Milliseconds of one run, medians of rounds of `repeats` each; "host_ms" until all was launched. Where the two
        are equal, launching is what it takes.
        """
        run()
        run()
        both = []
        for _ in range(self.sizes.rounds):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            launched = time.perf_counter()
            self.synchronize()
            both.append((time.perf_counter() - started, launched - started))
        whole, host = (statistics.median(each) * 1e3 / repeats for each in zip(*both, strict=True))
        return {"ms": whole, "host_ms": host}

    def model(self, config: TwoTowerConfig, share: bool = False) -> Any:
        """A model of random weights on the device; with `share` both towers have the same, and half the memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        held = model.state_dict()
        state: dict[str, torch.Tensor] = {}
        # The context tower's come first.
        for name in sorted(held):
            twin = name.replace("denoiser_tower.", "context_tower.")
            twin = "context_lm_head.weight" if name == "lm_head.weight" else twin
            state[name] = state[twin] if share and twin in state else random_weight(name, held[name], self.device)
        model.load_state_dict(state, assign=True)
        model.reset_time_conditioning()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, None)  # texts end at their limit
        return model.eval()

    def ids(self, *shape: int) -> torch.Tensor:
        """Without the mask id, 3, nor padding."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(4, self.sizes.small_vocabulary, shape, generator=generator).to(self.device)


def random_weight(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    weight = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim > 1:
        return weight.normal_(0, like.shape[-1] ** -0.5)
    if name.endswith("dt_bias"):
        return weight.fill_(-4.0)  # steps of about 0.02
    return weight.fill_(0.0 if name.endswith(("bias", "A_log")) else 1.0)


# What it must take at least, on paper.


def layer_work(
    sizes: Sizes, kind: str, rows: int, tokens: int, context: int, chosen: float | None = None
) -> tuple[float, float]:
    """
    Bytes and flops of one layer ("M", "E" or "*") in a pass over `tokens` of each of `rows` rows, whose tokens chose
    so many experts in all; default as many as under uniform routing.
    """
    config = sizes.config(kind, vocab_size=sizes.small_vocabulary)
    name = config.layers_block_type[0]
    weights = active = model_size(config).context[name]
    count = rows * tokens
    if kind == "E":
        of_experts = 2 * config.n_routed_experts * config.moe_intermediate_size * config.hidden_size
        share = config.num_experts_per_tok / config.n_routed_experts
        active = weights - of_experts * (1 - share)
        chosen = config.n_routed_experts * (1 - (1 - share) ** count) if chosen is None else chosen
        weights -= of_experts * (1 - chosen / config.n_routed_experts)
    held = cache_size(config, torch.bfloat16)
    moved = 2.0 * weights + rows * (held.per_sequence + context * held.key_value_per_token)
    flops = 2.0 * count * active
    if kind == "*":
        flops += 4.0 * count * (context + tokens) * config.num_attention_heads * config.head_dim
    return moved, flops


def pass_work(sizes: Sizes, rows: int, tokens: int, context: int, chosen: float | None = None) -> tuple[float, float]:
    """Bytes and flops of one pass of a full tower, with its head; `chosen` as of `layer_work`, of each layer."""
    head = sizes.geometry["vocab_size"] * sizes.geometry["hidden_size"]
    moved, flops = 2.0 * head, 2.0 * rows * tokens * head
    for kind, layers in Counter(sizes.pattern).items():
        of_one = layer_work(sizes, kind, rows, tokens, context, chosen)
        moved, flops = moved + layers * of_one[0], flops + layers * of_one[1]
    return moved, flops


def floor_ms(work: tuple[float, float], rates: tuple[float, float]) -> float:
    return 1e3 * max(amount / rate for amount, rate in zip(work, rates, strict=True))


def known_rates() -> tuple[float, float] | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rates for card, rates in RATES.items() if card in name), None)


# Copy bandwidth and matrix rate.


def predict_machine(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    return {} if rates is None else {"copy_bytes_per_second": rates[0], "matrix_flops_per_second": rates[1]}


def measure_machine(bench: Bench) -> None:
    sizes = bench.sizes
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(sizes.matrix, sizes.matrix, device=bench.device).to(bench.dtype) for _ in range(2))
    copied, product = bench.clock(partial(target.copy_, source)), bench.clock(partial(torch.mm, left, right))
    small = torch.ones(1, device=bench.device)
    launched = bench.clock(partial(small.add_, 1), repeats=1000)
    bench.record(
        {
            "copy_bytes_per_second": 2e3 * sizes.copy_bytes / copied["ms"],
            "matrix_flops_per_second": 2e3 * sizes.matrix**3 / product["ms"],
            "seconds_per_launch": launched["host_ms"] / 1e3,
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if bench.device.type == "cuda" else None,
        }
    )


# NVIDIA's numbers.


def predict_goldens(dtype: torch.dtype, sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    if dtype == torch.float32:
        return {"all": "texts and numbers of passes NVIDIA's, CPU's in every mode, a row's alone; logits within 1e-4"}
    return {"all": "logits within 5e-2; texts may part where two choices nearly tie"}


def measure_goldens(dtype: torch.dtype, bench: Bench) -> None:
    found: dict[str, Any] = {}
    # Float32 is to mean float32; of products it does by default, of convolutions not.
    torch.backends.cudnn.allow_tf32 = False
    folder = bench.data / "goldens"
    tensors, cases = load_file(folder / "tensors.safetensors"), json.loads((folder / "generations.json").read_text())
    cases, count = cases[:: bench.sizes.every_golden], bench.sizes.golden_tokens
    prompts = [tensors[f"p{idx}.ids"].long() for idx in range(5)]
    on_cpu = TwoTowerForBlockDiffusion.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    on_cpu.generation_config.eos_token_id = None
    model = TwoTowerForBlockDiffusion.from_pretrained(folder / "checkpoint", dtype=dtype).to(bench.device)
    model.generation_config.eos_token_id = None
    found["worst relative error of logits"] = worst_error(model, tensors)
    # Each by eager passes or by recorded ones, in turn; in bfloat16, where texts may part, a part of them.
    step = 2 if dtype == torch.float32 else 6
    found["texts and passes as NVIDIA's"] = counted(as_golden(model, case, tensors) for case in cases[::step])
    if bench.device.type == "cuda":
        found["the same by recorded passes"] = counted(
            as_golden(model, case, tensors, compile=True) for case in cases[1::step]
        )
    bench.record(found)
    for mode in MODES:
        alone = [written(model, [prompt], mode, count)[0] for prompt in prompts]
        on_host = [written(on_cpu, [prompt], mode, count)[0] for prompt in prompts]
        found[f"{mode}: texts as on the CPU in float32"] = counted(map(list.__eq__, alone, on_host))
        together = written(model, prompts, mode, count)
        found[f"{mode}: texts of ragged rows as alone"] = counted(map(list.__eq__, together, alone))
        bench.record(found)


def counted(each: Any) -> dict[str, int]:
    values = [bool(value) for value in each]
    return {"equal": sum(values), "of": len(values)}


@torch.inference_mode()
def worst_error(model: Any, tensors: dict[str, torch.Tensor]) -> float:
    """Over the context tower's last logits and the denoiser's of every block in the file."""
    errors = []
    for idx in range(5):
        output = model(tensors[f"p{idx}.ids"].long()[None].to(model.device), use_cache=True, logits_to_keep=1)
        errors.append(relative(output.logits[0, -1], tensors[f"p{idx}.context_last_logits"]))
        for name in tensors:
            if name.startswith(f"p{idx}.den.") and name.endswith(".block"):
                logits = model.denoise(tensors[name].long()[None].to(model.device), output.cache)[0]
                errors.append(relative(logits, tensors[name.removesuffix("block") + "logits"]))
    return max(errors)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


def as_golden(model: Any, case: dict[str, Any], tensors: dict[str, torch.Tensor], **flags: Any) -> bool:
    prompt = tensors[f"p{case['prompt']}.ids"].long()[None].to(model.device)
    knobs = ("mode", "max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id")
    options = {name: case[name] for name in knobs if name in case}
    output = model.generate(prompt, **options, **flags, pad_token_id=0, return_dict_in_generate=True)
    expected = case["new_tokens"]
    if case.get("eos_token_id") in expected:
        expected = expected[: expected.index(case["eos_token_id"]) + 1]
    passes = case["nfe"] is None or output.denoiser_forwards.tolist() == [case["nfe"]]
    return passes and output.sequences[0, prompt.shape[1] :].tolist() == expected


def written(model: Any, prompts: list[torch.Tensor], mode: str, tokens: int) -> list[list[int]]:
    """So many new tokens of each, all in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    options = {"mode": mode, "max_new_tokens": tokens, "pad_token_id": 0}
    # Which drafts pay on this machine is not the question.
    options |= {"draft_length": model.config.block_size} if mode == "self_speculative" else {}
    ids, mask = ids.to(model.device), mask.to(model.device)
    return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()


# Waits for the device.


def predict_synchronisation(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    return dict.fromkeys(MODES, "one wait for each pass of an iteration")


def measure_synchronisation(bench: Bench) -> None:
    outcome: dict[str, Any] = {}
    model = bench.model(bench.sizes.config("ME*", vocab_size=bench.sizes.small_vocabulary))
    for mode in MODES:
        engine = TwoTowerEngine(model, slots=2)
        for _ in range(2):
            engine.add_request(bench.ids(1, 12), mode=mode, max_new_tokens=64, **drafts(mode, 8))
        for _ in range(4):
            engine.step()
        outcome[mode] = {"waits_of_iterations": [waits(bench, engine.step) for _ in range(4)]}
        bench.record(outcome)


def waits(bench: Bench, run: Callable[[], Any]) -> list[str] | None:
    """Where torch waited for the device, as it says itself; None on a CPU, where nobody waits."""
    with warnings.catch_warnings(record=True) as caught, sync_debug(bench):
        warnings.simplefilter("always")
        run()
    if bench.device.type != "cuda":
        return None
    return [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


@contextmanager
def sync_debug(bench: Bench) -> Iterator[None]:
    if bench.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drafts(mode: str, length: int) -> dict[str, Any]:
    """
    Random weights draft nothing that is accepted, so with these knobs nearly every draft is, and a cycle has `length`
    tokens.
    """
    return {"draft_length": length, "acceptance_ratio": 1e-30} if mode == "self_speculative" else {}


# Memory.


def predict_memory(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    return {"peak_bytes_of_a_layer": "under 2e9; 36e9 where scores of the whole context are built"}


def measure_memory(bench: Bench) -> None:
    sizes, outcome = bench.sizes, dict[str, Any]()
    for kind in "M*E":
        cache = None  # before the next model is made
        model = bench.model(sizes.config(kind, vocab_size=sizes.small_vocabulary))
        cache = read_in_pieces(bench, model, sizes.behind)
        bench.synchronize()
        before = allocated(bench)
        with torch.inference_mode():
            model(bench.ids(1, sizes.chunk), cache=cache, use_cache=True, logits_to_keep=1)
        outcome[f"peak_bytes_of_a_layer {kind}"] = (
            None if before is None else torch.cuda.max_memory_allocated() - before
        )
        bench.record(outcome)


def allocated(bench: Bench) -> int | None:
    if bench.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.inference_mode()
def read_in_pieces(bench: Bench, model: Any, length: int) -> Any:
    """A cache of one row that has read so many tokens."""
    cache = None
    for piece in bench.ids(1, length).split(bench.sizes.chunk, dim=1):
        cache = model(piece, cache=cache, use_cache=True, logits_to_keep=1).cache
    return cache


# Operations by backend.


def predict_kernels(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    return {"every backend": "error against float64 as torch's; faster than torch wherever torch runs several kernels"}


@dataclass(frozen=True)
class Operation:
    """An operation of the registry on some arguments, the backend left out."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]

    def computed_by(self, backend: str, exact: bool = False) -> tuple[torch.Tensor, ...]:
        """The tensors it gives; `exact` in float64."""
        arguments = [each.double() if exact and is_float(each) else each for each in self.arguments]
        output = self.run(*arguments, backend=backend)
        if self.name == "top_k_routing":  # whose experts come in whatever order
            logits, weights, indices = output
            output = logits, torch.zeros_like(logits).scatter(1, indices, weights.double())
        return tuple(each for each in ((output,) if isinstance(output, torch.Tensor) else output) if each is not None)


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def operations(bench: Bench) -> Iterator[tuple[str, Operation]]:
    """Of the shapes that passes of the full towers have, by a name that tells them."""
    config = bench.sizes.config("M")
    heads, width, groups, states = (
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.n_groups,
        config.ssm_state_size,
    )
    hidden, inner = config.hidden_size, heads * width
    channels = inner + 2 * groups * states
    draw = partial(torch.randn, device=bench.device)
    rate, skip = -torch.rand(heads, device=bench.device) - 0.5, draw(heads).to(bench.dtype)
    weight, norm = draw(channels, config.conv_kernel).to(bench.dtype), draw(hidden).to(bench.dtype)
    for rows in bench.sizes.batches:
        for tokens in bench.sizes.tokens:
            size = f"{rows} rows, {tokens} tokens"
            x = draw(rows, tokens, heads, width).to(bench.dtype)
            b, c = (draw(rows, tokens, groups, states).to(bench.dtype) for _ in range(2))
            dt = torch.rand(rows, tokens, heads, device=bench.device) * 0.1
            state = draw(rows, heads, width, states) * 10
            scan = partial(ssd_scan, chunk_size=config.chunk_size)
            yield size, Operation("ssd_step" if tokens == 1 else "ssd_scan", scan, (x, dt, rate, b, c, skip, state))
            if 1 < tokens <= 16:
                ends = torch.arange(rows, device=bench.device) % (tokens + 1)
                yield size, Operation("ssd_state", ssd_state, (x, dt, rate, b, state, ends))
            inputs = draw(rows, tokens, channels).to(bench.dtype)
            before = draw(rows, config.conv_kernel - 1, channels).to(bench.dtype)
            bias = draw(channels).to(bench.dtype)
            yield size, Operation("causal_conv", causal_conv, (inputs, weight, bias, before))
            gate, scale = draw(rows, tokens, inner).to(bench.dtype), draw(inner).to(bench.dtype)
            yield size, Operation("gated_rms_norm", gated_rms_norm, (x, gate, scale, inner // groups, 1e-5))
            yield size, Operation("rms_norm", rms_norm, (draw(rows, tokens, hidden).to(bench.dtype), norm, 1e-5))
        for tokens in bench.sizes.tokens:
            for context in bench.sizes.contexts[:2]:
                # Of all chunks behind all contexts the longest take seconds in torch.
                if tokens > 16 and (rows > 4 or context > bench.sizes.contexts[0]):
                    continue
                size = f"{rows} rows, {tokens} tokens, {context} context"
                query = draw(rows, config.num_attention_heads, tokens, config.head_dim).to(bench.dtype)
                key, value = (
                    draw(rows, config.num_key_value_heads, tokens, config.head_dim).to(bench.dtype) for _ in range(2)
                )
                behind = [
                    draw(rows, config.num_key_value_heads, context, config.head_dim).to(bench.dtype) for _ in range(2)
                ]
                lengths = torch.full((rows,), context - 3, device=bench.device)
                attend = partial(block_attention, causal=tokens > 16)
                yield size, Operation("block_attention", attend, (query, key, value, *behind, lengths))


def operations_of_experts(bench: Bench) -> Iterator[tuple[str, Operation]]:
    """The choice of experts, of which each is as likely as another, and what they make of tokens."""
    config, draw = bench.sizes.config("E"), partial(torch.randn, device=bench.device)
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    up, down = (draw(experts, *shape).to(bench.dtype) / hidden**0.5 for shape in ((inner, hidden), (hidden, inner)))
    weight, bias = draw(experts, hidden).to(bench.dtype) / hidden**0.5, 0.01 * draw(experts)
    for rows in bench.sizes.batches:
        for tokens in bench.sizes.tokens:
            size, x = f"{rows} rows, {tokens} tokens", draw(rows * tokens, hidden).to(bench.dtype)
            choose = (x, weight, bias, config.num_experts_per_tok)
            yield size, Operation("top_k_routing", top_k_routing, choose)
            if len(x) <= MOST_EXACT_TOKENS:
                _, weights, indices = top_k_routing(*choose, backend="torch")
                each = (x, indices, weights, up, down, ACT2FN["relu2"])
                yield size, Operation("routed_experts", routed_experts, each)


def measure_kernels(operations: Callable[[Bench], Iterator[tuple[str, Operation]]], bench: Bench) -> None:
    """Of each operation and backend: worst relative error against float64, and milliseconds of the device alone."""
    outcome: dict[str, Any] = {}
    for size, operation in operations(bench):
        exact = operation.computed_by("torch", exact=True)
        for backend in ("torch", *BACKENDS[operation.name]):
            try:
                found = operation.computed_by(backend)
            except Exception as error:
                outcome[f"{operation.name}, {size}, {backend}"] = {"cannot": str(error).splitlines()[0][:200]}
                continue
            outcome[f"{operation.name}, {size}, {backend}"] = {
                "error": max(map(relative, found, [each.cpu().float() for each in exact])),
                "ms": device_ms(bench, partial(operation.computed_by, backend)),
            }
        bench.record(outcome)


def device_ms(bench: Bench, run: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds of one run without what the host takes to launch it: so many in one CUDA graph."""
    if bench.device.type != "cuda":
        return bench.clock(run, repeats=1)["ms"]
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return bench.clock(graph.replay, repeats=2)["ms"] / repeats


# Layers.


def predict_layers(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    if rates is None:
        return {}
    return {
        name: {"floor_ms": floor_ms(layer_work(sizes, kind, rows, tokens, context), rates)}
        for name, kind, rows, tokens, context, _ in layer_passes(sizes)
    }


def layer_passes(sizes: Sizes) -> Iterator[tuple[str, str, int, int, int, str]]:
    """Name, kind of layer, rows, tokens, context, pass; the context is of no matter to layers without attention."""
    for kind in "M*E":
        for context in sizes.contexts if kind == "*" else sizes.contexts[:1]:
            for rows in sizes.batches:
                for tokens, done in ((1, "ar step"), (16, "block pass"), (16, "block read")):
                    yield f"{kind}, {context} context, {rows} rows, {done}", kind, rows, tokens, context, done


def measure_layers(bench: Bench) -> None:
    """Milliseconds of one layer: a tower of a few of its kind with a tiny vocabulary, divided by their number."""
    sizes, outcome, last = bench.sizes, dict[str, Any](), ("", 0)
    model = cache = grown = None
    for name, kind, rows, tokens, context, done in layer_passes(sizes):
        if (kind, context) != last:
            grown = None
            model = bench.model(sizes.config(kind * sizes.layers, vocab_size=sizes.small_vocabulary))
            cache = recorded_if_out_of_memory(outcome, name, partial(read_in_pieces, bench, model, context))
            last = (kind, context)
        if cache is None:
            continue
        if grown is None or grown.batch_size != rows:
            grown = None  # before the next one is made
            grown = recorded_if_out_of_memory(outcome, name, partial(cache.copy_rows, [0] * rows))
        if grown is not None:
            run = partial(time_recorded, bench, model, grown, bench.ids(rows, tokens), done, head=False)
            timing = recorded_if_out_of_memory(outcome, name, run)
            if timing is not None:
                outcome[name] = {of: value / sizes.layers for of, value in timing.items()}
        bench.record(outcome)


@torch.inference_mode()
def one_pass(model: Any, cache: Any, ids: torch.Tensor, done: str, passes: Any = None, head: bool = True) -> Any:
    """By `passes`, such as recorded ones, or eager; with the head. What is read grows the cache, by a few tokens."""
    if done == "block pass":
        timestep = torch.full((len(ids),), 0.5, device=ids.device)
        return model.denoise(ids, cache, timestep) if passes is None else passes("denoise", ids, cache, timestep)
    hidden_states = model.context_tower(ids, cache) if passes is None else passes("context_tower", ids, cache)
    return model.context_lm_head(hidden_states[:, -1:]) if head else hidden_states


def time_recorded(
    bench: Bench, model: Any, cache: Any, ids: torch.Tensor, done: str, head: bool = True
) -> dict[str, float]:
    """As a CUDA graph; on a CPU, where there are none, an eager pass."""
    passes = None
    if bench.device.type == "cuda":
        passes = CompiledPasses(model)
        passes.begin()
    return bench.clock(partial(one_pass, model, cache, ids, done, passes, head), repeats=8)


def recorded_if_out_of_memory(outcome: dict[str, Any], name: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except torch.OutOfMemoryError as error:
        outcome[name] = {"out of memory": str(error).split(". ")[0]}
        return None


# Full towers.


def predict_passes(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    """Each takes what its bytes and its kernels do."""
    if rates is None:
        return {}
    tokens = {"ar step": 1, "block pass": 16, "block read": 16}
    return {
        f"{rows} rows": {
            name: floor_ms(pass_work(sizes, rows, count, sizes.prompt), rates) / SHARE
            + 1e3 * PER_KERNEL * KERNELS[name]
            for name, count in tokens.items()
        }
        for rows in sizes.rows
    }


def predict_modes(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    """Passes alone; a block of 16 is read once it is full."""
    predicted: dict[str, Any] = {}
    for rows, passes in predict_passes(sizes, rates).items():
        ar, denoise, read = passes["ar step"], passes["block pass"], passes["block read"]
        predicted[rows] = {
            "ar": {"tokens_per_second": int(rows.split()[0]) * 1e3 / ar},
            "mock_ar": {"of_ar": ar / (ar + ar * KERNELS["block pass"] / KERNELS["ar step"])},
        }
        for each in TOKENS_PER_PASS:
            predicted[rows][f"mask_diffusion, {each} tokens per pass"] = {
                "of_ar": 16 * ar / (read + denoise * 16 / each)
            }
    return predicted


def measure_passes(bench: Bench) -> None:
    """Each kind of pass, eager and recorded as a CUDA graph, beside what it must take at least."""
    model, outcome = full_towers(bench)
    for rows in bench.sizes.rows:
        outcome[f"{rows} rows"] = time_passes(bench, model, rows)
        bench.record(outcome)


def measure_modes(bench: Bench) -> None:
    """Tokens/s of each mode in turn, at a prompt of random tokens; texts that mean nothing, at their full length."""
    model, outcome = full_towers(bench)
    for rows in reversed(bench.sizes.rows):
        speeds_by_way(bench, model, rows, outcome)


def full_towers(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """Both, of random weights, and what is to be said of these."""
    share, started = must_share(bench), time.perf_counter()
    model = bench.model(bench.sizes.config(bench.sizes.pattern), share)
    bench.synchronize()
    weights = "the denoiser has the context tower's weights" if share else "of its own in each tower"
    return model, {"weights": weights, "seconds_to_draw_weights": time.perf_counter() - started}


def speeds_by_way(bench: Bench, model: Any, rows: int, outcome: dict[str, Any]) -> None:
    """On a GPU by recorded passes, and one row some ways by eager ones, too."""
    on_gpu, found = bench.device.type == "cuda", outcome.setdefault(f"{rows} rows", {})
    for eager in (False, True) if on_gpu and rows == 1 else (False,):
        for name, options in tower_ways().items():
            if eager and name not in EAGER:
                continue
            of = ", eager" * eager
            options = options | {"compile": on_gpu and not eager}
            found[name + of] = speed(bench, model, rows, options, repeats=1 if eager else 2)
            found[name + of]["of_ar"] = found[name + of]["tokens_per_second"] / found["ar" + of]["tokens_per_second"]
            bench.record(outcome)


def time_passes(bench: Bench, model: Any, rows: int) -> dict[str, Any]:
    sizes, rates, found = bench.sizes, known_rates(), dict[str, Any]()
    for name, tokens in (("ar step", 1), ("block pass", 16), ("block read", 16)):
        with torch.inference_mode(), model.prepared():
            cache = read_in_pieces(bench, model, sizes.prompt).copy_rows([0] * rows)
            ids = bench.ids(rows, tokens)
            eager = partial(one_pass, model, cache, ids, name)
            found[name] = {"experts_chosen": experts_chosen(model, eager), "eager": bench.clock(eager, repeats=2)}
            found[name] |= time_recorded(bench, model, cache, ids, name)
        if rates is not None:
            work = pass_work(sizes, rows, tokens, sizes.prompt, found[name]["experts_chosen"])
            found[name] |= {"floor_ms": floor_ms(work, rates), "of_floor": floor_ms(work, rates) / found[name]["ms"]}
    return found


def experts_chosen(model: Any, run: Callable[[], Any]) -> float:
    """How many experts of a layer the tokens of a pass choose in all, on average: random towers do so unevenly."""
    counts: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, TwoTowerRouter)]
    hooks = [each.register_forward_hook(lambda _, __, output: counts.append(output[2].unique())) for each in routers]
    run()
    for hook in hooks:
        hook.remove()
    return statistics.mean(map(len, counts)) if counts else 0.0


def predict_compiled(sizes: Sizes, rates: tuple[float, float] | None) -> dict[str, Any]:
    """As of the towers, without a launch per kernel: each pass takes its floor."""
    predicted: dict[str, Any] = {}
    if rates is None:
        return predicted
    for rows in sizes.rows:
        step, block = (floor_ms(pass_work(sizes, rows, count, sizes.prompt), rates) for count in (1, 16))
        predicted[f"{rows} rows"] = {"ms": {"ar step": step, "block pass": block}} | {
            "ar": {"tokens_per_second": rows * 1e3 / step},
            "mask_diffusion, 2.5 tokens per pass": {"of_ar": 16 * step / (block + block * 16 / 2.5)},
        }
    return predicted


def measure_compiled(bench: Bench) -> None:
    """Tokens/s by compiled passes, on a GPU under CUDA graphs, next to eager ones."""
    sizes, outcome = bench.sizes, dict[str, Any]()
    pattern, how, ways = sizes.pattern, {"compile_config": CompileConfig(fullgraph=True)}, tower_ways()
    if bench.device.type == "cpu":
        # This only shows that the script runs, for which one layer will do, and torch need not generate code.
        pattern, how = pattern[:1], {"compile_config": CompileConfig(backend="eager")}
    model = bench.model(sizes.config(pattern), must_share(bench))
    for rows in sizes.rows:
        found = outcome[f"{rows} rows"] = dict[str, Any]()
        for name in ("ar", "mask_diffusion, 2.5 tokens per pass", "self_speculative, 8 tokens per draft"):
            started = time.perf_counter()
            found[name] = speed(bench, model, rows, ways[name] | {"compile": True, **how})
            found[name]["seconds_with_warm_up"] = time.perf_counter() - started
            eager = speed(bench, model, rows, ways[name])
            found[name]["of_eager"] = found[name]["tokens_per_second"] / eager["tokens_per_second"]
            found[name]["of_ar"] = found[name]["tokens_per_second"] / found["ar"]["tokens_per_second"]
            bench.record(outcome)


def must_share(bench: Bench) -> bool:
    if bench.device.type != "cuda":
        return False
    memory = torch.cuda.mem_get_info()[0]
    if memory < ONE_TOWER:
        raise ValueError(f"the card has {memory / 1e9:.0f} GB; one tower in bfloat16 needs {ONE_TOWER / 1e9:.0f}")
    return memory < BOTH_TOWERS


def tower_ways() -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}}
    for each in TOKENS_PER_PASS:
        rule = partial(so_many_per_pass, each)
        ways[f"mask_diffusion, {each} tokens per pass"] = {"mode": "mask_diffusion", "unmasking_rule": rule}
    for length in (2, 4, 8):
        ways[f"self_speculative, {length} tokens per draft"] = {"mode": "self_speculative"} | drafts(
            "self_speculative", length
        )
    return ways | {"mock_ar": {"mode": "mock_ar"}}


def so_many_per_pass(
    count: float, prediction: Any, masked: torch.Tensor, step: torch.Tensor, steps: Any
) -> torch.Tensor:
    """An unmasking rule that commits from the left `count` tokens a pass, on average."""
    wanted = (count * (step + 1)).round() - (count * step).round()
    return masked & (masked.cumsum(-1) <= wanted[:, None])


def speed(bench: Bench, model: Any, rows: int, options: dict[str, Any], repeats: int = 2) -> dict[str, Any]:
    sizes, seconds = bench.sizes, []
    prompt = bench.ids(rows, sizes.prompt)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": sizes.new_tokens, **options}
    # The first warms up, and tells how many passes there are.
    output = model.generate(prompt, return_dict_in_generate=True, **options)
    model.generate(prompt, **options)
    for _ in range(repeats):
        bench.synchronize()
        started = time.perf_counter()
        model.generate(prompt, **options)
        bench.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_second": rows * sizes.new_tokens / statistics.median(seconds),
        "seconds": seconds,
        "denoiser_forwards": int(output.denoiser_forwards.sum()),
        "context_forwards": int(output.context_forwards.sum()),
    }


# Running it all.


@dataclass(frozen=True)
class Section:
    """A part of the work: its limit in seconds, what is predicted of it, and what measures it."""

    seconds: float
    predict: Callable[[Sizes, tuple[float, float] | None], dict[str, Any]]
    measure: Callable[[Bench], None]


# What others rely on first, what takes most memory last.
SECTIONS = {
    "machine": Section(20, predict_machine, measure_machine),
    "goldens": Section(90, partial(predict_goldens, torch.float32), partial(measure_goldens, torch.float32)),
    "goldens in bfloat16": Section(
        60, partial(predict_goldens, torch.bfloat16), partial(measure_goldens, torch.bfloat16)
    ),
    "synchronisation": Section(20, predict_synchronisation, measure_synchronisation),
    "memory": Section(20, predict_memory, measure_memory),
    "kernels": Section(70, predict_kernels, partial(measure_kernels, operations)),
    "kernels of experts": Section(30, predict_kernels, partial(measure_kernels, operations_of_experts)),
    "layers": Section(60, predict_layers, measure_layers),
    "passes": Section(60, predict_passes, measure_passes),
    "modes": Section(150, predict_modes, measure_modes),
}


# Not among them, as it takes longer than all together.
COMPILED = {"compiled": Section(3600, predict_compiled, measure_compiled)}


def run_sections(
    sections: dict[str, Section],
    sizes: Sizes,
    data: Path,
    file: Path,
    toy: bool,
    minutes: float,
    where: dict[str, Any],
) -> dict[str, Any]:
    """
    One after another, each in a process of its own.

    Args:
        sections: by name, in their order.
        sizes: of everything.
        data: the folder that holds goldens/.
        file: rewritten after every section.
        toy: whether on a CPU.
        minutes: for all; what would begin later is recorded as not begun.
        where: what the report says of the machine.

    Returns:
        The report.
    """
    rates, deadline = (None if toy else known_rates()), time.monotonic() + 60 * minutes
    report: dict[str, Any] = {"sizes": "toy" if toy else "released", **where}
    report["sections"] = {
        name: {"status": "not begun", "prediction": section.predict(sizes, rates), "outcome": {}}
        for name, section in sections.items()
    }
    write_json(file, report)
    for name, section in sections.items():
        limit = min(section.seconds, deadline - time.monotonic())
        if limit > 1:
            report["sections"][name] |= run_section(section, sizes, data, toy, limit)
            write_json(file, report)
        print(name, report["sections"][name]["status"], flush=True)
    return report


def run_section(section: Section, sizes: Sizes, data: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Status, seconds, the outcome as far as it got, and what went wrong."""
    # A forked process cannot use a GPU that its parent has looked at; a spawned one must import everything again,
    # which its limit does not count.
    context: Any = multiprocessing.get_context("fork" if toy else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        outcome, error = Path(folder) / "outcome.json", Path(folder) / "error.txt"
        begun = context.Event()
        arguments = (section.measure, sizes, data, toy, outcome, error, begun)
        process = context.Process(target=measure_in_process, args=arguments)
        process.start()
        importing_ends = time.monotonic() + IMPORTING
        while not begun.wait(0.1) and process.is_alive() and time.monotonic() < importing_ends:
            pass
        started = time.monotonic()
        process.join(limit)
        found: dict[str, Any] = {"status": "done"}
        if process.is_alive():
            process.kill()
            process.join()
            found["status"] = f"out of time after {limit:.0f} s"
        elif process.exitcode != 0:
            found = {"status": "failed", "error": error.read_text() if error.exists() else f"exit {process.exitcode}"}
        found["seconds"] = time.monotonic() - started
        return found | {"outcome": json.loads(outcome.read_text()) if outcome.exists() else {}}


def measure_in_process(
    measure: Callable[[Bench], None], sizes: Sizes, data: Path, toy: bool, outcome: Path, error: Path, begun: Any
) -> None:
    begun.set()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if toy:
            torch.set_num_threads(1)
        measure(Bench(sizes, data, torch.device("cpu" if toy else "cuda"), outcome))
    except BaseException:
        error.write_text(traceback.format_exc())
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="What this model does on a GPU.")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("gpu.json"), help="results go here")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[1] / "tests", help="has goldens/"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; so without a GPU, too")
    parser.add_argument("--compiled", action="store_true", help="only compiled passes, which take an hour")
    parser.add_argument("--only", nargs="+", help="these sections alone")
    parser.add_argument("--minutes", type=float, help="for everything; default 9.5, of compiled passes 60")
    options = parser.parse_args()
    toy = options.dry_run or not torch.cuda.is_available()
    if not (options.data / "goldens" / "generations.json").is_file():
        raise SystemExit(f"{options.data} holds no goldens/; give a checkout's folder tests as --data")
    torch.set_num_threads(1 if toy else torch.get_num_threads())
    sizes = sizes_of(options.data, toy)
    device = torch.device("cpu" if toy else "cuda")
    model = argparse.Namespace(dtype=torch.float32 if toy else torch.bfloat16, device=device)
    sections, minutes = (COMPILED, 60.0) if options.compiled else (SECTIONS, 9.5)
    minutes = minutes if options.minutes is None else options.minutes
    if unknown := set(options.only or ()) - set(sections):
        raise SystemExit(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    sections = {name: each for name, each in sections.items() if not options.only or name in options.only}
    run_sections(sections, sizes, options.data, options.json, toy, minutes, environment(model))


if __name__ == "__main__":
    main()
