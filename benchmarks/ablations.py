"""
What closes the gap between mask diffusion and `ar`, one change at a time, at a scale that one core trains in minutes:
goes to ablations.json beside this file, or to --json. Takes an hour of one core; called again, it goes on.

A context tower of a sixth of the embedded checkpoint's weights learns word problems of one and two steps with numbers
below 100; denoisers on it, which differ from the first of them in one thing each, learn those with numbers below 20
whose answers name nobody. All answer the same problems, whose questions no tower was trained on, though nearly all of
their equations were: so little training teaches no denoiser those that it has not seen. Runs lie in --work.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

import twotower
from twotower.bench.reports import environment, write_json
from twotower.demo.evaluation import figures_of
from twotower.demo.tasks import Task
from twotower.demo.word_problems import template_problem
from twotower.evaluation.answers import answer, end_ids, tokenized, variant_of
from twotower.evaluation.denoiser_likelihood import denoiser_log_likelihood
from twotower.evaluation.figures import mean
from twotower.modeling_twotower import TwoTowerForBlockDiffusion
from twotower.training.recipe import recipe_of
from twotower.training.run import MODEL, train

ASKED_SEED, MAX_NEW_TOKENS = 104, 64
SCALE = {"context steps": 2000, "context batch": 32, "steps": 600, "batch": 16, "asked": 600, "scored": 60}
DRY_RUN = {"context steps": 1, "context batch": 4, "steps": 1, "batch": 4, "asked": 4, "scored": 2}

TOWER = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "hybrid_override_pattern": "M*EM*E",
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "chunk_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "max_position_embeddings": 2048,
}
# Layers and experts as many, each of them narrower.
HALF = {
    "hidden_size": 32,
    "mamba_num_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}
OPTIMIZER = {"name": "muon", "lr": 3e-3, "betas": [0.9, 0.98], "warmup": 50, "decay": 0.4, "balance_experts": 1e-3}
CONTEXT = {"data": {"block_sizes": [1]}, "optimizer": {**OPTIMIZER, "lr": 4e-3}}
# As recipes/demo.yaml.
DENOISER = {
    "data": {"block_sizes": [16, 16, 16, 8, 32], "aligned": 0.5},
    "objective": {"weighting": "inverse_timestep", "corruptions": 2, "decoded_masks": 0.5, "full_masks": 0.5},
    "optimizer": OPTIMIZER,
}


@dataclass(frozen=True)
class Ablation:
    """What of a recipe is otherwise than in DENOISER, or in TOWER, of both towers; times the steps."""

    part: str
    setting: str
    changes: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    seed: int = 1
    tower: dict[str, Any] = field(default_factory=dict)


# For the card, which breaks its lines.
ABOUT = f"""**Training, at a small scale.** The denoisers below differ from the first of them in one thing each. They
are no copies of this checkpoint: towers of the same kinds of layers, but a sixth of its size, trained for
{SCALE["steps"]} steps of {SCALE["batch"]} word problems of one or two steps with numbers below 20, on a context tower
that was trained for {SCALE["context steps"]:,} steps of {SCALE["context batch"]} with numbers below 100
(`benchmarks/ablations.py`). They answer {SCALE["asked"]} problems whose questions no tower was trained on; nearly all
of their equations were, since so short a training teaches no denoiser those that it has not seen. "Kept" is of the
same context tower's `ar`, by mask diffusion in blocks of 16 at threshold 0.8, untempered; drafts are whole blocks of
one pass; nats are a bound on how unlikely the denoiser finds a reference answer, of {SCALE["scored"]} of the problems.
± is one standard error over problems, and says nothing of how another seed would have come out: see the seeds."""

# Those that say most come first, in case that time runs out.
ABLATIONS = (
    Ablation("base", "seed 1"),
    Ablation("masks", "random only", {"objective": {"decoded_masks": 0.0, "full_masks": 0.0}}),
    Ablation("base", "seed 2", seed=2),
    Ablation("weighting", "mean", {"objective": {"weighting": "mean"}}),
    Ablation("schedule", "constant rate", {"optimizer": {"decay": 0.0}}),
    Ablation("blocks", "16 tokens only", {"data": {"block_sizes": [16]}}),
    Ablation("distillation", "0.5", {"objective": {"distillation": 0.5}}),
    Ablation("confidence", "0.1", {"objective": {"confidence": 0.1}}),
    Ablation("base", "seed 3", seed=3),
    Ablation("capacity", "half the width", tower=HALF),
    Ablation("steps", "twice as many", times=2),
    Ablation("masks", "none whole", {"objective": {"full_masks": 0.0}}),
    Ablation("masks", "none as decoding leaves them", {"objective": {"decoded_masks": 0.0}}),
    Ablation("blocks", "from the prompt's end only", {"data": {"aligned": 1.0}}),
    Ablation("schedule", "decay from the first step", {"optimizer": {"decay": 1.0}}),
)
# Drafts are whole blocks of one pass: how many tokens of them are accepted says how good a first guess is.
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "mask_diffusion": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
    "self_speculative": {"mode": "self_speculative", "draft_steps": 1, "draft_length": 16},
}


def problems(seed: int, highest: int, named: bool) -> Iterator[Task]:
    """Without end: of one or two steps, no number above the highest; `named` allows answers that name somebody."""
    drawn = (template_problem(random.Random(f"{seed} {number}"), held_out=False) for number in count())
    kept = (each for each in drawn if each.composition[0] < "template 3" and _highest_number(each) <= highest)
    return kept if named else (each for each in kept if each.composition[0] not in ("template 2.2", "template 2.3"))


def _highest_number(problem: Task) -> int:
    return max(map(int, re.findall(r"\d+", f"{problem.question} {problem.answer}")))


def written(file: Path, tasks: Iterator[Task]) -> Path:
    """The file with the tasks to train on, written now unless it was before."""
    if not file.exists():
        lines = (json.dumps({"prompt": each.prompt, "completion": f" {each.answer}"}) + "\n" for each in tasks)
        file.write_text("".join(lines))
    return file


def trained(folder: Path, file: Path, steps: int, batch: int, seed: int, *parts: dict[str, Any]) -> Path:
    """The finished model of a run, which is trained now (or the rest of it) unless it was before."""
    if (folder / MODEL).exists():
        return folder / MODEL
    data = {"files": [str(file)], "prompt": "prompt", "completion": "completion", "min_tokens": 1, "pool": 4096}
    run: dict[str, Any] = {"folder": str(folder), "steps": steps, "batch_size": batch, "seed": seed, "data": data}
    run |= {"device": "cpu", "threads": 1, "save": {"every": 300, "keep": 1}}
    for part in parts:
        run = merged(run, part)
    return train(recipe_of(run))


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {name: merged(values[name], each) for name, each in changes.items() if isinstance(values.get(name), dict)}
    return values | changes | inner


def measured(folder: Path, asked: list[Task], scored: int) -> dict[str, Any]:
    """What `ar` gets right, what mask diffusion keeps of it in how many passes, and how good guesses are."""
    model: Any = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = tokenized([each.prompt for each in asked], 64, tokenizer, model)
    ways = [variant_of(model, name, options) for name, options in WAYS.items()]
    runs = answer(ways, batches[0], batches, end_ids(model), MAX_NEW_TOKENS)
    found = figures_of(runs, asked, tokenizer, (ASKED_SEED,))
    shown = {
        "ar right %": ("ar", "accuracy"),
        "kept %": ("mask_diffusion", "retention"),
        "fewer passes": ("mask_diffusion", "fewer_passes"),
        "accepted per draft": ("self_speculative", "mean_accepted_length"),
    }
    figures = {name: [found[way][key], found[way][f"{key}_stderr"]] for name, (way, key) in shown.items()}
    nats = mean([-log_likelihood(model, tokenizer, each) for each in asked[:scored]])
    return figures | {"nats per answer": list(nats)}


def log_likelihood(model: TwoTowerForBlockDiffusion, tokenizer: Any, problem: Task) -> float:
    """The bound that the denoiser gives the reference answer: the same loss, by whatever one it was trained."""
    prompt, text = (tokenizer(text).input_ids for text in (problem.prompt, problem.text))
    return denoiser_log_likelihood(model, prompt, [*text[len(prompt) :], tokenizer.eos_token_id]).value


def main() -> None:
    parser = argparse.ArgumentParser(description="Small denoisers that differ in one thing each.")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="where the runs lie")
    parser.add_argument("--dry-run", action="store_true", help="a step each, on four problems")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    scale = DRY_RUN if given.dry_run else SCALE
    report: dict[str, Any] = {"about": ABOUT, "scale": scale, "rows": []}
    if given.json.exists():
        report = json.loads(given.json.read_text())
    if report["scale"] != scale:
        raise SystemExit(f"{given.json} is of the scale {report['scale']}, not {scale}; move it away")
    given.work.mkdir(parents=True, exist_ok=True)
    wide = written(given.work / "context.jsonl", islice(problems(11, 99, True), 2**16 if not given.dry_run else 8))
    plain = written(given.work / "denoiser.jsonl", islice(problems(12, 19, False), 2**14 if not given.dry_run else 8))
    seen = {json.loads(line)["prompt"] for file in (wide, plain) for line in file.read_text().splitlines()}
    fresh = {each.prompt: each for each in islice(problems(ASKED_SEED, 19, False), 2 * scale["asked"])}
    asked = [each for prompt, each in fresh.items() if prompt not in seen][: scale["asked"]]
    for each in ABLATIONS[len(report["rows"]) :]:
        context = trained_context(given.work, wide, scale, each.tower)
        changes = merged({**DENOISER, "model": {"checkpoint": str(context), "reset_denoiser": True}}, each.changes)
        folder = given.work / f"{each.part}, {each.setting}".replace(" ", "_")
        model = trained(folder, plain, each.times * scale["steps"], scale["batch"], each.seed, changes)
        report["rows"].append({**asdict(each), "figures": measured(model, asked, scale["scored"])})
        report |= environment(TwoTowerForBlockDiffusion.from_pretrained(model))
        print(report["rows"][-1], flush=True)
        # After every row, so that a run that is stopped leaves what it has measured.
        write_json(given.json, report)


def trained_context(work: Path, file: Path, scale: dict[str, int], tower: dict[str, Any]) -> Path:
    """The context tower of TOWER, or of one that is otherwise."""
    new = {"config": {**TOWER, **tower}, "tokenizer": str(twotower.demo_checkpoint()), "trained_towers": "context"}
    folder = work / "_".join(["context", *map(str, tower.values())])
    return trained(folder, file, scale["context steps"], scale["context batch"], 0, CONTEXT, {"model": new})


if __name__ == "__main__":
    main()
