"""Figures of a checkpoint on held-out tasks of both skills: what is right, what is kept of "ar", for how many passes.

A word problem is right if its final result is; a function is right if it passes its tests. `whole` is the share of
answers that are the reference, letter for letter.

    python -m twotower.demo.skills_evaluation FOLDER [TASKS] [MODE ...]    on the validation seed
"""

import json
import random
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

from ..evaluation.figures import accuracy_figures, percent, plus_minus
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .checking import passes
from .evaluation import answer, end_ids, pass_figures, tokenized, variant_of
from .problems import extract_result
from .tasks import SKILLS, Skill, Task, held_out_tasks

# On which checkpoints and thresholds are chosen; what is reported has other seeds.
VALIDATION_SEED = 900
# The longest answer has 130 tokens.
MAX_NEW_TOKENS = 160
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "mask_diffusion 0.8": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
    "mask_diffusion 0.95": {"mode": "mask_diffusion", "confidence_threshold": 0.95},
    "self_speculative": {"mode": "self_speculative", "draft_steps": 1},
    "self_speculative 0.5": {"mode": "self_speculative", "draft_steps": 1, "acceptance_ratio": 0.5},
}

_passes = cache(passes)


def is_right(task: Task, text: str) -> bool:
    if task.skill == "words":
        return extract_result(text) == task.result
    return _passes(text.strip(), task.checks)


def evaluate_skill(
    model: TwoTowerForBlockDiffusion,
    tokenizer: Any,
    skill: Skill,
    count: int,
    seeds: Sequence[int] = (VALIDATION_SEED,),
    modes: Sequence[str] = tuple(MODES),
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """One row per mode; the first mode is what the others' retention is against."""
    tasks = [task for seed in seeds for task in held_out_tasks(skill, count // len(seeds), seed)]
    variants = [variant_of(model, name, MODES[name]) for name in modes]
    batches = tokenized([task.prompt for task in tasks], batch_size, tokenizer, model)
    runs = answer(variants, batches[0], batches, end_ids(model), MAX_NEW_TOKENS)
    right, whole = {}, {}
    for name in modes:
        texts = tokenizer.batch_decode(runs[name].answers, skip_special_tokens=True)
        right[name] = [is_right(task, text) for task, text in zip(tasks, texts, strict=True)]
        whole[name] = [text.strip() == task.answer for task, text in zip(tasks, texts, strict=True)]
    return [
        {
            "skill": skill,
            "name": name,
            "tasks": len(tasks),
            "seeds": list(seeds),
            **accuracy_figures(right[name], right[modes[0]]),
            "whole_text": accuracy_figures(whole[name], whole[modes[0]]),
            **pass_figures(runs[name]),
            "cpu_seconds": runs[name].cpu_seconds,
        }
        for name in modes
    ]


def infilled(
    model: TwoTowerForBlockDiffusion, tokenizer: Any, count: int, seed: int = VALIDATION_SEED
) -> dict[str, Any]:
    """
    Functions with a span of 3 to 8 tokens left out of a block, of which the rest is given: how many pass their tests
    when the denoiser fills it, which sees both sides, and when "ar" does, which sees the left one.
    """
    rng, size = random.Random(seed), model.config.block_size
    tasks = held_out_tasks("code", count, seed)
    passed: dict[str, list[bool]] = {"mask_diffusion": [], "ar": []}
    for task in tasks:
        prompt = tokenizer(task.prompt).input_ids
        ids = tokenizer(" " + task.answer, add_special_tokens=False).input_ids
        start = rng.randint(0, max(0, len(ids) - size))
        block = ids[start : start + size]
        most = min(8, len(block) - 2)
        length = rng.randint(min(3, most), most)
        first = rng.randint(1, len(block) - length - 1)
        masked = [*block[:first], *[model.config.mask_token_id] * length, *block[first + length :]]
        before, behind = prompt + ids[:start], ids[start + first + length :]
        for mode, read, wanted in (
            ("mask_diffusion", before, {"starting_block": torch.tensor([masked]), "max_new_tokens": len(block)}),
            ("ar", before + block[:first], {"max_new_tokens": length}),
        ):
            inputs = torch.tensor([read], device=model.device)
            output = model.generate(inputs, mode=mode, do_sample=False, **wanted)[0].tolist()
            new = output[len(read) :] if mode == "ar" else output[len(read) + first : len(read) + first + length]
            text = tokenizer.decode([*ids[: start + first], *new, *behind], skip_special_tokens=True)
            passed[mode].append(is_right(task, text))
    return {mode: accuracy_figures(each, passed["ar"]) for mode, each in passed.items()}


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['skill']:5} {row['name']:22} right {percent(row['accuracy'], row['accuracy_stderr'])}, whole "
        f"{percent(row['whole_text']['accuracy'], row['whole_text']['accuracy_stderr'])}, kept "
        f"{percent(row['retention'], row['retention_stderr'])}, tokens/pass "
        f"{plus_minus(row['tokens_per_pass'], row['tokens_per_pass_stderr'])}, passes/task "
        f"{plus_minus(row['passes_per_problem'], row['passes_per_problem_stderr'])}"
    )


def main(folder: str, count: str = "200", *modes: str) -> None:
    torch.set_num_threads(1)
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for skill in SKILLS:
        rows += evaluate_skill(model, tokenizer, skill, int(count), modes=modes or tuple(MODES))
        print(*map(line_of, rows[-len(modes or MODES) :]), sep="\n", flush=True)
    filled = infilled(model, tokenizer, int(count))
    for name, row in filled.items():
        print(f"infilling, {name}: {percent(row['accuracy'], row['accuracy_stderr'])} pass")
    print(json.dumps({"folder": folder, "rows": rows, "infilling": filled}))


if __name__ == "__main__":
    main(*sys.argv[1:])
