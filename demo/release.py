"""
From finished training runs to the checkpoint that the package embeds, and its card.

    python -m twotower.demo.release temperatures DENOISER_RUN/model
    python -m twotower.demo.release make FOLDER --temperature T --context RUN "MACHINE" --denoiser RUN "MACHINE"
    twotower eval --run-code --unseen --model FOLDER --json benchmarks/demo_eval.json
    python -m twotower.demo.release card FOLDER

A tower that was trained in several runs is given as several `--context` or `--denoiser`, in order; the denoiser's last
run is finished. With `--more` they go on from the checkpoint whose runs benchmarks/demo_training.json has already. The
first command shows on the validation seed what mask diffusion keeps, and in how many passes, at several temperatures;
the second writes weights and tokenizer, and what the runs' logs say to benchmarks/demo_training.json; the last writes
FOLDER/README.md from that, from the figures of `eval` and from benchmarks/demo_ablations.json and
benchmarks/ablations.json, where there are such; and the table of results into the README.

Weights are stored in bfloat16; the config asks for float32, in which a CPU runs them faster. The denoiser's confidence
is tempered (temperature scaling, Guo et al. 2017) by its head: what it predicts stays, but it must be surer of it to
pass the threshold.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..bench.reports import write_json
from ..configuration_twotower import TwoTowerConfig
from ..evaluation.answers import answer, end_ids, tokenized, variant_of
from ..evaluation.figures import cells
from ..generation_twotower import TwoTowerGenerationConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from ..training.saving import STATE, checkpoints
from .evaluation import MAX_NEW_TOKENS, VALIDATION_SEED, figures_of
from .held_out import asked_tasks
from .model_card import card, results
from .tasks import SKILLS

ROOT = Path(__file__).resolve().parents[1]
TRAINING, FIGURES = "benchmarks/demo_training.json", "benchmarks/demo_eval.json"
# Of the checkpoint itself, and of small towers that differ in how they were trained.
ABLATIONS = ("benchmarks/demo_ablations.json", "benchmarks/ablations.json")
# In the README, around what is generated.
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"


def release(trained: Path, folder: Path, temperature: float) -> None:
    """Write a trained model and its tokenizer as they are embedded."""
    model = TwoTowerForBlockDiffusion.from_pretrained(trained, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    with torch.no_grad():
        model.lm_head.weight /= temperature
    model.generation_config = TwoTowerGenerationConfig(
        mode="mask_diffusion",
        block_size=model.config.block_size,
        steps_per_block=16,
        confidence_threshold=0.8,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    config = TwoTowerConfig.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)


def compare_temperatures(trained: Path, temperatures: Sequence[float], problems: int) -> dict[str, list[list[str]]]:
    """
    Of mask diffusion at threshold 0.8 on the validation seed, by skill a row per temperature: itself, the share that
    is right, how much that is of AR's, and how many times fewer passes over both towers it takes.
    """
    model = TwoTowerForBlockDiffusion.from_pretrained(trained, dtype=torch.float32).eval()
    tokenizer, untempered = AutoTokenizer.from_pretrained(trained), model.lm_head.weight.detach().clone()
    options = {"mode": "mask_diffusion", "confidence_threshold": 0.8}
    found: dict[str, list[list[str]]] = {}
    for skill in SKILLS:
        tasks = asked_tasks(skill, problems, (VALIDATION_SEED,))
        batches = tokenized([task.prompt for task in tasks], 64, tokenizer, model)
        runs = answer([variant_of(model, "ar", {"mode": "ar"})], batches[0], batches, end_ids(model), MAX_NEW_TOKENS)
        for temperature in temperatures:
            with torch.no_grad():
                model.lm_head.weight.copy_(untempered / temperature)
            name = f"{temperature:g}"
            way = variant_of(model, name, options)
            runs |= answer([way], batches[0], batches, end_ids(model), MAX_NEW_TOKENS)
        figures = figures_of(runs, tasks, tokenizer, (VALIDATION_SEED,))
        found[skill] = [[name, *cells(row, "accuracy", "retention", "fewer_passes")] for name, row in figures.items()]
    return found


def training_facts(run: Path, machine: str) -> dict[str, Any]:
    """Of a run's folder: the recipe it followed, its log, and where it ran."""
    state = json.loads((checkpoints(run)[-1] / STATE).read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    told = {"step": state["step"], "processes": state["processes"], "recipe": _without_places(state["recipe"])}
    return {"machine": machine, **told, "log": log}


def _without_places(value: Any) -> Any:
    """A recipe's values; of paths of the machine it ran on their last part, as the rest tells nobody anything."""
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def make(folder: Path, temperature: float, runs: dict[str, list[list[str]]], more: bool, root: Path) -> None:
    """Of both towers' runs in order, each with the machine it was on; `more` keeps those that the file of them has."""
    facts: dict[str, Any] = json.loads((root / TRAINING).read_text()) if more else {"context": [], "denoiser": []}
    for tower, each in runs.items():
        facts[tower] += [training_facts(Path(run), machine) for run, machine in each]
    release(Path(runs["denoiser"][-1][0]) / "model", folder, temperature)
    write_json(root / TRAINING, facts | {"temperature": temperature})


def write_card(folder: Path, root: Path) -> None:
    """The card of the checkpoint in a folder, and the README's table, from the files of figures."""
    training, figures = (json.loads((root / name).read_text()) for name in (TRAINING, FIGURES))
    ablations = [json.loads((root / name).read_text()) for name in ABLATIONS if (root / name).is_file()]
    config = TwoTowerConfig.from_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / "README.md").write_text(card(config, size, training, figures, ablations), encoding="utf-8")
    readme = root / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(before + BEGIN + results(figures) + END + rest.split(END)[1], encoding="utf-8")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded checkpoint of training runs, and its card.")
    parts = parser.add_subparsers(dest="part", required=True)
    comparing, making, describing = map(parts.add_parser, ("temperatures", "make", "card"))
    comparing.add_argument("model", type=Path)
    comparing.add_argument("--values", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75, 2.0])
    comparing.add_argument("--problems", type=int, default=400)
    for part in (making, describing):
        part.add_argument("folder", type=Path)
    making.add_argument("--temperature", type=float, required=True)
    ran: dict[str, Any] = {"nargs": 2, "metavar": ("RUN", "MACHINE"), "action": "append"}
    making.add_argument("--context", **ran, default=[], help="a run of the context tower, and where it was, in words")
    making.add_argument("--denoiser", **ran, required=True, help="likewise; each is given once for each run, in order")
    making.add_argument("--more", action="store_true", help=f"after the runs in {TRAINING}")
    given = parser.parse_args(arguments)
    if given.part == "temperatures":
        torch.set_num_threads(1)
        for skill, rows in compare_temperatures(given.model, given.values, given.problems).items():
            print(skill, *("  ".join(row) for row in rows), sep="\n")
    elif given.part == "make":
        runs = {"context": given.context, "denoiser": given.denoiser}
        make(given.folder, given.temperature, runs, given.more, root)
    else:
        write_card(given.folder, root)


if __name__ == "__main__":
    main()
