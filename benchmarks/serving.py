"""
What the engine keeps of its promises, written to serving.json beside this file:

    python benchmarks/serving.py equality [requests]   random mixed requests on a tiny model, against each alone
    python benchmarks/serving.py soak [minutes]        the same without end, under tracemalloc and RSS
    python benchmarks/serving.py slots                 wasted row-passes and useful slots, on the embedded checkpoint
    python benchmarks/serving.py throughput            8 slots against fixed batches of 8, on the embedded checkpoint

Minutes each on one core, the soak as long as it is told. Every part replaces its own of the file alone.
"""

import gc
import json
import os
import resource
import sys
import time
import tracemalloc
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import twotower
from twotower import TwoTowerEngine
from twotower.bench.reports import write_json
from twotower.demo.evaluation import MAX_NEW_TOKENS, conditions
from twotower.demo.tasks import held_out_tasks
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mixed_requests import differences, mixed_model, mixed_request

FILE = Path(__file__).with_name("serving.json")
SEED = 1
MODES: dict[str, dict[str, Any]] = {
    "mask_diffusion": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
    "self_speculative": {"mode": "self_speculative"},
}


def main(part: str, number: float | None) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    started = os.getloadavg()[0]
    given = () if number is None else (number,)
    found, model = PARTS[part](*given)
    figures = {"load_before": started, "load_after": os.getloadavg()[0], **found, **conditions(model)}
    report = json.loads(FILE.read_text()) if FILE.exists() else {}
    write_json(FILE, report | {part: figures})
    print(json.dumps(figures, indent=2))


# Equality.


def equality(requests: float = 1000) -> tuple[dict[str, Any], Any]:
    """Requests that come while others run, in 16 slots, a tenth of them cancelled; the others are run alone, too."""
    model, rng = mixed_model(), Random(SEED)
    engine = TwoTowerEngine(model, slots=16)
    asked, cancelled = [], 0
    start = time.perf_counter()
    for _ in range(int(requests)):
        request = mixed_request(rng)
        handle = engine.add_request(request.ids, **request.arguments())
        for _ in range(rng.choice([0, 0, 1, 2])):
            engine.step()
        if rng.random() < 0.1 and handle.cancel():
            cancelled += 1
        else:
            asked.append((request, handle))
    while engine.step():
        pass
    together, equal, by_mode = time.perf_counter() - start, 0, dict[str, list[int]]()
    start = time.perf_counter()
    for request, handle in asked:
        same = not differences(handle.result(0), model.generate(request.ids, **request.arguments()))
        equal += same
        counts = by_mode.setdefault(request.plain["mode"], [0, 0])
        counts[0] += same
        counts[1] += 1
    return {
        "requests": int(requests),
        "cancelled": cancelled,
        "compared": len(asked),
        "equal": equal,
        "equal_by_mode": {mode: f"{same} of {count}" for mode, (same, count) in sorted(by_mode.items())},
        "seconds_together": together,
        "seconds_alone": time.perf_counter() - start,
    }, model


# Soak.


def soak(minutes: float = 20) -> tuple[dict[str, Any], Any]:
    """Rounds of the same 64 requests, some cancelled; what Python and the process hold after each, not in between."""
    model = mixed_model()
    engine = TwoTowerEngine(model, slots=16)
    samples, rounds, stop = [], 0, time.monotonic() + 60 * minutes
    warm_up = 2
    while time.monotonic() < stop or rounds <= warm_up:
        rng = Random(SEED)
        for _ in range(64):
            request = mixed_request(rng)
            handle = engine.add_request(request.ids, **request.arguments())
            engine.step()
            if rng.random() < 0.1:
                handle.cancel()
        while engine.step():
            pass
        rounds += 1
        if rounds == warm_up:
            tracemalloc.start()
        del handle
        gc.collect()
        if rounds > warm_up:
            samples.append({"traced": tracemalloc.get_traced_memory()[0], "rss": _rss()})
            if len(samples) % 20 == 1:
                print(len(samples), samples[-1], flush=True)
    # The first rounds under tracemalloc fill what is kept once.
    half = len(samples) // 2
    growth = {
        name: median(one[name] for one in samples[half:]) - median(one[name] for one in samples[: half or 1])
        for name in ("traced", "rss")
    }
    return {
        "minutes": minutes,
        "rounds": rounds,
        "requests": 64 * rounds,
        "bytes_first": samples[0],
        "bytes_last": samples[-1],
        "bytes_growth_between_halves": growth,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }, model


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Slots.


def slots() -> tuple[dict[str, Any], Any]:
    """
    An iteration runs at most one pass of each tower. A row that is there in it and in neither pass has waited: its
    row-pass is wasted. A slot is useful in an iteration where it holds a row that is in a pass; while requests wait, a
    slot that is empty or holds one that waits is not.
    """
    model = demo_model()
    found = {}
    for mode, options in MODES.items():
        found[mode] = {
            "wasted_row_passes, 64 slots, 192 problems": drive(model, 64, 192, options)["wasted"],
            "useful_slots, 16 slots, queue of 200": drive(model, 16, 216, options)["useful"],
        }
        print(mode, found[mode], flush=True)
    return {"definition": " ".join((slots.__doc__ or "").split()), "modes": found}, model


def drive(model: TwoTowerForBlockDiffusion, count: int, problems: int, options: dict[str, Any]) -> dict[str, Any]:
    """All problems through so many slots."""
    engine = TwoTowerEngine(model, slots=count)
    for ids in prompts_of(problems):
        engine.add_request(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
    useful, places, more = 0, 0, True
    while more:
        before = engine._engine.row_passes
        more = engine.step()
        if engine._queue:
            useful += engine._engine.row_passes - before
            places += count
    # Of all iterations, then of those while requests waited.
    return {"wasted": 1 - engine.useful_share, "useful": useful / places if places else None}


# Throughput.


def throughput(repeats: float = 9) -> tuple[dict[str, Any], Any]:
    """Tokens up to the end of each text per second, 96 problems; the ways take turns."""
    model, found = demo_model(), dict[str, Any]()
    prompts = prompts_of(96)
    ways = {"slots": by_slots, "batches": by_batches}
    for mode, options in {**MODES, "ar": {"mode": "ar"}}.items():
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(int(repeats) + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens = way(model, prompts, options)
                if repeat:  # the first is a warm-up
                    rates[name].append(tokens / (time.perf_counter() - start))
        found[mode] = {name: median(each) for name, each in rates.items()} | {"tokens": tokens, "all": rates}
        found[mode]["ratio"] = found[mode]["slots"] / found[mode]["batches"]
        print(mode, found[mode], flush=True)
    return {"repeats": int(repeats), "problems": 96, "rows_at_a_time": 8, "tokens_per_second": found}, model


def by_slots(model: TwoTowerForBlockDiffusion, prompts: list[list[int]], options: dict[str, Any]) -> int:
    knobs = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}
    results = model.generate_many(prompts, slots=8, progress=False, **knobs)
    return sum(result.shape[1] - len(prompts[number]) for number, result in results)


def by_batches(model: TwoTowerForBlockDiffusion, prompts: list[list[int]], options: dict[str, Any]) -> int:
    tokens = 0
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    for start in range(0, len(prompts), 8):
        batch = prompts[start : start + 8]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        knobs = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}
        for row in model.generate(ids, attention_mask=mask, **knobs)[:, width:].tolist():
            tokens += next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return tokens


def demo_model() -> TwoTowerForBlockDiffusion:
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint()).eval()


def prompts_of(problems: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    return [tokenizer(task.prompt).input_ids for task in held_out_tasks("words", problems, SEED)]


PARTS: dict[str, Any] = {"equality": equality, "soak": soak, "slots": slots, "throughput": throughput}

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None)
