"""
Compiled passes against eager ones, on the embedded checkpoint, written to compiled.json beside this file:

    python benchmarks/compiled.py [rounds]

Every mode at batches of 1 and 16 held-out problems of different lengths, 48 new tokens of each whatever they are, so
that all rows go on to the end, with commits of 4 tokens per pass and drafts of 16, so that all are at the same step:
each kind of pass then needs one program per batch. Eager and compiled calls take turns; medians of the thread's own
time, with quartiles. Compiling takes most of an hour on a busy core, once per version of torch and of this code.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import twotower
from twotower.bench.reports import environment, write_json
from twotower.bench.timing import timed
from twotower.demo.tasks import held_out_tasks
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

FILE = Path(__file__).with_name("compiled.json")
BATCHES, NEW_TOKENS, ROUNDS = (1, 16), 48, 15
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "self_speculative": {"mode": "self_speculative", "draft_length": 16},
    "mask_diffusion": {"mode": "mask_diffusion", "unmasking_rule": "fixed", "tokens_per_step": 4},
    "mock_ar": {"mode": "mock_ar"},
}


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = twotower.demo_checkpoint()
    model = TwoTowerForBlockDiffusion.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report: dict[str, Any] = {"new_tokens": NEW_TOKENS, "rounds": rounds, "load_before": os.getloadavg()[0]}
    report |= environment(model)
    for rows in BATCHES:
        prompts = [task.prompt for task in held_out_tasks("words", rows, seed=1)]
        inputs = dict(tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt"))
        for name, options in WAYS.items():
            report[f"{name}, batch {rows}"] = found = compared(model, inputs, options, rounds)
            print(name, rows, found, flush=True)
            write_json(FILE, report | {"load_after": os.getloadavg()[0]})


def compared(
    model: TwoTowerForBlockDiffusion, inputs: dict[str, Any], options: dict[str, Any], rounds: int
) -> dict[str, Any]:
    def call(compile: bool) -> torch.Tensor:
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, compile=compile, **options)

    wall, cpu = time.perf_counter(), time.process_time()
    texts = [call(True)]
    warm_up = {"seconds": time.perf_counter() - wall, "cpu_seconds_of_this_process": time.process_time() - cpu}
    texts += [call(False), call(True)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for compile in seconds:
            text, took = timed(partial(call, compile))
            texts.append(text)
            seconds[compile].append(took.cpu)
    tokens = len(inputs["input_ids"]) * NEW_TOKENS
    ratios = [eager / compiled for eager, compiled in zip(*seconds.values(), strict=True)]
    return {
        "eager_tokens_per_second": tokens / median(seconds[False]),
        "compiled_tokens_per_second": tokens / median(seconds[True]),
        "times_as_fast": {"median": median(ratios), "quartiles": quantiles(ratios, n=4)[::2]},
        "equal_texts": all(torch.equal(text, texts[0]) for text in texts),
        "warm_up": warm_up,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
