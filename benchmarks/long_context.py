"""
What attention over a long context costs, on one core: written to long_context.json beside this file, or where the one
argument says. Takes ten minutes on an idle core.

- growth: an autoregressive step and a denoiser's block of 16, of one attention layer, over contexts of 1K to 128K
  tokens, beside the time of reading its keys and values, summed and copied; the slopes of the former over the latter.
- prefill: 16,384 tokens at once and in chunks of 2,048.
- chunks: 131,072 tokens in chunks of 2,048; peak memory over the loaded model, of the process, relative to the cache:
  as `generate` reads them, which tells the cache how many will come ("long"), and as it grows by itself ("growing").

The released model does not fit in such a machine: growth is that of the embedded checkpoint's attention (4 query and
2 key/value heads of 32) and of the released one's (32 and 2 of 128), the rest of the embedded checkpoint's context
tower.
Times are of the thread, not of the wall, since other processes run beside this one.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import twotower
from twotower.bench.reports import environment
from twotower.cache_twotower import KeyValueLayer, TwoTowerCache
from twotower.kernels.block_attention import block_attention
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

CONTEXTS = [1024 * 2**power for power in range(8)]
HEADS = {"embedded": (4, 2, 32), "released": (32, 2, 128)}
PREFILL, LONG, CHUNK = 16384, 131072, 2048


def main(file: Path) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"growth": [growth(name) for name in HEADS]}
    # Each in a process of its own, whose peak is this one's alone.
    for name, tokens, chunk, expected in (
        ("whole", PREFILL, PREFILL, PREFILL),
        ("in_chunks", PREFILL, CHUNK, PREFILL),
        ("long", LONG, CHUNK, LONG),
        ("growing", LONG, CHUNK, 0),
    ):
        arguments = [sys.executable, __file__, *map(str, (tokens, chunk, expected))]
        out = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
        result[name] = json.loads(out.stdout.splitlines()[-1])
        print(name, result[name], flush=True)
    result["chunking"] = result["in_chunks"]["seconds"] / result["whole"]["seconds"]
    result["times_of_16k"] = result["long"]["seconds"] / result["in_chunks"]["seconds"]
    file.write_text(json.dumps(result | environment(model()), indent=2) + "\n")


def growth(name: str) -> dict[str, Any]:
    """Medians in microseconds by context, and slopes between the shortest and the longest one."""
    heads, kv_heads, head_dim = HEADS[name]
    rows: list[dict[str, float]] = []
    for context in CONTEXTS:
        keys, values = (torch.randn(1, kv_heads, context, head_dim) for _ in range(2))
        target = torch.empty_like(keys)
        own = torch.randn(2, 1, kv_heads, 16, head_dim)
        step, block = torch.randn(1, heads, 1, head_dim), torch.randn(1, heads, 16, head_dim)
        with torch.inference_mode():
            timed: dict[str, Callable[[], Any]] = {
                "sum": partial(_sum, keys, values),
                "copy": partial(_copy, target, keys, values),
                "step": partial(block_attention, step, None, None, keys, values, causal=True),
                "block": partial(block_attention, block, own[0], own[1], keys, values),
            }
            rows.append({"context": context} | medians(timed))
        print(name, rows[-1], flush=True)
    slopes = {part: rows[-1][part] - rows[0][part] for part in ("sum", "copy", "step", "block")}
    ratios = {
        f"{part}_over_{read}": slopes[part] / slopes[read] for part in ("step", "block") for read in ("sum", "copy")
    }
    return {"heads": name, "rows": rows, **ratios}


def _sum(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.sum()


def _copy(target: torch.Tensor, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        target.copy_(tensor)


def medians(timed: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Microseconds of the thread, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, function in timed.items():
            began = time.thread_time()
            function()
            if repeat:
                seconds[name].append(time.thread_time() - began)
    return {name: round(sorted(each)[repeats // 2] * 1e6, 1) for name, each in seconds.items()}


def model() -> TwoTowerForBlockDiffusion:
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint()).eval()


def prefill(tokens: int, chunk: int, expected: int) -> dict[str, float]:
    """
    Read so many tokens in chunks of `chunk`, by a cache that expects as many as it is told: seconds, and megabytes of
    the cache and over the loaded model.
    """
    torch.set_num_threads(1)
    tower, ids = model().context_tower, torch.randint(4, 512, (1, tokens))
    with torch.inference_mode():
        tower(ids[:, :64], TwoTowerCache(tower.config))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading had one of its own
        before = megabytes("VmRSS")
        cache, began = TwoTowerCache(tower.config), time.thread_time()
        cache.expect(expected)
        for first in range(0, tokens, chunk):
            tower(ids[:, first : first + chunk], cache)
        seconds = time.thread_time() - began
    held = [layer.buffers for layer in cache.layers if isinstance(layer, KeyValueLayer) and layer.buffers]
    size = sum(part[:, :, : cache.width].numel() * part.element_size() for each in held for part in each) / 1e6
    over = megabytes("VmHWM") - before
    return {
        "tokens": tokens,
        "chunk": chunk,
        "seconds": round(seconds, 2),
        "cache_megabytes": round(size, 1),
        "peak_megabytes_over_model": round(over, 1),
        "peak_over_cache": round(over / size, 3),
    }


def megabytes(name: str) -> float:
    """Of this process by Linux: VmRSS what is resident now, VmHWM the most of it so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(prefill(*map(int, sys.argv[1:]))))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("long_context.json"))
