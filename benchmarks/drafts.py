"""
What drafts gain and never lose, and what relaxed verification keeps, on the embedded checkpoint: goes to drafts.json
beside this file, or where the one argument says. Takes fifteen minutes on one core.

Speeds are tokens per second of one thread's own time, as ratios to `ar` of the same run, batch by batch in turn,
medians of REPEATS. "on" are held-out problems, "off" questions this checkpoint knows nothing of, 48 tokens each
whatever comes, "wrong" the former, 96 tokens each, with a denoiser whose every draft is another token.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

import twotower
from twotower.bench.reports import write_json
from twotower.bench.texts import prompts
from twotower.demo.evaluation import MAX_NEW_TOKENS, conditions, modes
from twotower.demo.marking import Marks
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.answers import cut_after_end, end_ids, tokenized
from twotower.evaluation.figures import accuracy_figures
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

REPEATS, TOKENS = 5, {"off": 48, "wrong": 96}
BATCHES = {1: 24, 16: 32, 64: 64}  # how many texts each batch size is timed on
PROBLEMS, SEED = 400, 1


def variants(model: Any) -> dict[str, dict[str, Any]]:
    """What is timed."""
    points = modes(model)
    return {
        "ar": {"mode": "ar"},
        "self_speculative": {"mode": "self_speculative"},
        "self_speculative, whole blocks": points["self_speculative"],
        "self_speculative, acceptance_ratio 0.5": {"mode": "self_speculative", "acceptance_ratio": 0.5},
        "self_speculative, 2 blocks in 2 passes": points["self_speculative, 2 blocks in 2 passes"],
        "mask_diffusion": {"mode": "mask_diffusion"},
        "mask_diffusion, left to right": points["mask_diffusion, left to right, threshold 0.75"],
    }


def verifications(model: Any) -> dict[str, dict[str, Any]]:
    """What is asked for its accuracy."""
    points = modes(model)
    return {
        "ar": {"mode": "ar"},
        "ratio 1.0, 1 draft pass": points["self_speculative"],
        "ratio 0.5, 1 draft pass": {"mode": "self_speculative", "acceptance_ratio": 0.5},
        "ratio 0.1, 1 draft pass": {"mode": "self_speculative", "acceptance_ratio": 0.1},
        "ratio 0.5, up to 16": {"mode": "self_speculative", "acceptance_ratio": 0.5, "draft_steps": 16},
        "ratio 0.1, up to 16": {"mode": "self_speculative", "acceptance_ratio": 0.1, "draft_steps": 16},
        "ratio 0.02, 1 draft pass": {"mode": "self_speculative", "acceptance_ratio": 0.02},
        "ratio 1.0, 32 tokens in 2 draft passes": points["self_speculative, 2 blocks in 2 passes"],
        "ratio 0.5, 32 tokens in 2 draft passes": points["self_speculative, 2 blocks in 2 passes, acceptance 0.5"],
        "mask_diffusion, 0.8": {"mode": "mask_diffusion"},
        "mask_diffusion, left to right, 0.75": points["mask_diffusion, left to right, threshold 0.75"],
    }


def main(target: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    folder = twotower.demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    report: dict[str, Any] = {"relaxed": relaxed(model, tokenizer), "speed": {}}
    report |= conditions(model)
    for kind in ("on", "off", "wrong"):
        for size, count in BATCHES.items():
            report["speed"][f"{kind}, batch {size}"] = speeds(model, tokenizer, kind, size, count)
            write_json(target, report)


def speeds(model: Any, tokenizer: Any, kind: str, size: int, count: int) -> dict[str, Any]:
    """Tokens per second of each variant, as ratios to `ar`, with their spread."""
    limits: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS}
    ends = end_ids(model)
    if kind != "on":
        limits, ends = {"max_new_tokens": TOKENS[kind], "eos_token_id": None, "pad_token_id": 0}, set()
    asked = prompts("off" if kind == "off" else "on", count, seed=7)
    batches = tokenized(asked, size, tokenizer, model)
    timed = dict(list(variants(model).items())[: 3 if kind == "wrong" else None])
    seconds: dict[str, list[float]] = {name: [0.0] * (REPEATS + 1) for name in timed}
    tokens: dict[str, int] = {}
    for repeat in range(REPEATS + 1):
        tokens = dict.fromkeys(timed, 0)
        for batch in batches:
            for name, knobs in timed.items():
                if kind == "wrong" and name != "ar":
                    model.denoise = always_wrong(type(model).denoise.__get__(model))
                started = time.thread_time()
                output = model.generate(**batch, **limits, **knobs)
                seconds[name][repeat] += time.thread_time() - started
                new = output[:, batch["input_ids"].shape[1] :].tolist()
                tokens[name] += sum(len(cut_after_end(row, ends)) for row in new)
                vars(model).pop("denoise", None)
    found = {}
    for name, own in seconds.items():
        # The first warms up, and measures costs.
        ratios = [
            (base / tokens["ar"]) / (each / tokens[name])
            for base, each in zip(seconds["ar"][1:], own[1:], strict=True)
        ]
        found[name] = {"of ar": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
        print(
            f"{kind}, batch {size}: {name} {found[name]['of ar']:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]",
            flush=True,
        )
    return found


def always_wrong(denoise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A denoiser that is as sure, of other tokens."""

    def denoise_wrongly(*args: Any) -> torch.Tensor:
        return denoise(*args).roll(7, -1)

    return denoise_wrongly


def relaxed(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Accuracy and passes of relaxed verification beside `ar`."""
    tasks, ends, found = held_out_tasks("words", PROBLEMS, SEED), end_ids(model), {}
    right_of_ar = None
    for name, knobs in verifications(model).items():
        answers, passes = [], 0
        for batch in tokenized([task.prompt for task in tasks], 16, tokenizer, model):
            output = model.generate(**batch, **knobs, max_new_tokens=MAX_NEW_TOKENS, return_dict_in_generate=True)
            new = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
            answers += [cut_after_end(row, ends) for row in new]
            passes += int((output.denoiser_forwards + output.context_forwards).sum())
        right = Marks.of(answers, tasks, tokenizer).right
        right_of_ar = right if right_of_ar is None else right_of_ar
        tokens = sum(map(len, answers))
        found[name] = {**accuracy_figures(right, right_of_ar), "tokens_per_pass": tokens / passes}
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("drafts.json"))
