"""From runs to the embedded checkpoint and its card: what is stored, and that every figure is one of the files'."""

import json
import shutil
from itertools import islice

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import AutoTokenizer

import twotower
from twotower.bench.reports import write_json
from twotower.demo import release
from twotower.demo.evaluation import MAX_NEW_TOKENS, conditions, figures_of
from twotower.demo.tasks import SKILLS, held_out_tasks, training_tasks
from twotower.demo.tokenizer import train_tokenizer
from twotower.evaluation.answers import Run

RECIPE = {
    "folder": "/home/somebody/runs/denoiser",
    "model": {"checkpoint": "/home/somebody/runs/context/model", "tokenizer": "owner/name"},
    "steps": 200,
    "batch_size": 4,
    "accumulation": 2,
    "data": {"generated": "tasks", "block_sizes": [16, 8, 16], "aligned": 0.5},
    "objective": {"weighting": "inverse_timestep", "corruptions": 2, "distillation": 0.0},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(training_tasks(0), 30), 300)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    """A repository with three runs in it, of which one was stopped, and what they became."""
    root = tmp_path_factory.mktemp("root")
    (root / "benchmarks").mkdir()
    (root / "README.md").write_text(f"Before.\n{release.BEGIN}old\n{release.END}\nBehind.\n")
    for name in ("context", "stopped", "denoiser"):
        state = {"step": 105 if name == "stopped" else 200, "recipe": RECIPE, "processes": 1}
        (root / name / "checkpoint-00000200").mkdir(parents=True)
        (root / name / "checkpoint-00000200" / "state.json").write_text(json.dumps(state))
        lines = [{"step": 1, "loss": 6.25, "items": 1000, "seconds": 1.0}, {"step": 100, "eval_loss": 9.0}]
        lines += [{"step": 10 * n, "loss": 0.5, "items": 1000, "seconds": 6.0 * n} for n in range(1, 21)]
        taken = lines[:12] if name == "stopped" else lines
        (root / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in taken))
    tiny_model("all kinds", vocab_size=300, block_size=16).save_pretrained(root / "denoiser" / "model")
    tokenizer.save_pretrained(root / "denoiser" / "model")
    runs = ["--context", str(root / "context"), "a core"]
    for name, machine in (("stopped", "a GPU"), ("denoiser", "two cores")):
        runs += ["--denoiser", str(root / name), machine]
    release.main(["make", str(root / "made"), "--temperature", "1.75", *runs], root)
    return root


def test_what_is_embedded_loads_in_float32_from_bfloat16_and_answers_until_the_end(root):
    model = twotower.TwoTowerForBlockDiffusion.from_pretrained(root / "made")
    assert model.dtype == torch.float32
    assert (model.generation_config.mode, model.generation_config.max_new_tokens) == ("mask_diffusion", MAX_NEW_TOKENS)
    assert sum(file.stat().st_size for file in (root / "made").glob("*.safetensors")) < 2.5 * model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(root / "made")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_where_runs_lay_on_their_machine_is_not_told(root):
    told = json.loads((root / release.TRAINING).read_text())["denoiser"][0]["recipe"]
    assert (told["folder"], told["model"]) == ("denoiser", {"checkpoint": "model", "tokenizer": "owner/name"})
    assert told["data"] == RECIPE["data"]
    assert '"/' not in (release.ROOT / release.TRAINING).read_text()


def test_a_checkpoint_may_go_on_from_another_ones_runs(root, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(root / release.TRAINING, tmp_path / release.TRAINING)
    more = ["--more", "--denoiser", str(root / "denoiser"), "a second GPU"]
    release.main(["make", str(tmp_path / "made"), "--temperature", "2", *more], tmp_path)
    before, after = (json.loads((each / release.TRAINING).read_text()) for each in (root, tmp_path))
    assert after["denoiser"][:-1] == before["denoiser"] and after["denoiser"][-1]["machine"] == "a second GPU"
    assert after["context"] == before["context"] and after["temperature"] == 2


def test_the_released_denoiser_predicts_the_same_less_surely(root):
    trained = twotower.TwoTowerForBlockDiffusion.from_pretrained(root / "denoiser" / "model", dtype=torch.bfloat16)
    released = twotower.TwoTowerForBlockDiffusion.from_pretrained(root / "made")
    block, last = torch.full((1, 16), 3), trained.float()
    with torch.no_grad():
        cache = last(random_ids(1, 8)).cache
        expected = last.denoise(block, cache) / 1.75
        # The head is divided in bfloat16, which rounds it by up to 2 ** -9.
        bound = 2**-8 * float(expected.abs().max())
        torch.testing.assert_close(released.denoise(block, cache), expected, rtol=0, atol=bound)


def evaluated(model, tokenizer):
    """A report of two modes, of known answers."""
    rows, clocks = [], {"batch_tokens": [4, 4], "batch_seconds": [1.0, 1.0]}
    for skill in SKILLS:
        tasks = held_out_tasks(skill, 4, 0)
        right = [tokenizer(" " + task.answer, add_special_tokens=False).input_ids for task in tasks]
        runs = {
            "ar": Run(right, [], [40] * 4, **clocks),
            "mask_diffusion": Run([*right[:3], [5]], [6] * 4, [4] * 4, **clocks),
        }
        figures = figures_of(runs, tasks, tokenizer, (0,))
        rows += [{"skill": skill, "name": name, "mode": name, **figures[name]} for name in runs]
    asked = {"problems": 4, "seeds": [0], "skills": list(SKILLS), "batch_size": 64}
    return asked | {"rows": rows} | conditions(model)


def test_the_card_says_what_the_files_say(root, tokenizer):
    model = twotower.TwoTowerForBlockDiffusion.from_pretrained(root / "made")
    write_json(root / release.FIGURES, evaluated(model, tokenizer))
    release.main(["card", str(root / "made")], root)
    card = (root / "made" / "README.md").read_text()
    assert "| `mask_diffusion` | 75.0 ± 21.7 % | 75.0 ± 25.0 % |" in card
    assert "4.00 ± 0.00x" in card and "tokens/s |" not in card
    assert "200 steps of 8 tasks, about 0.2 M answer tokens, 2 minutes (a core); loss 6.25 at first, 0.5000 at" in card
    assert "- 105 steps of 8 tasks (of 200 planned), about 0.1 M answer tokens, 1 minutes (a GPU); loss 6.25" in card
    assert "- 200 steps of 8 tasks, about 0.2 M answer tokens, 2 minutes (two cores); loss" in card
    assert "divided by 1.75" in card
    assert (
        "last run weighting inverse_timestep, corruptions 2;\n   blocks of 8, 16 tokens" in card
        and "50% of the texts" in card
    )
    assert "## Ablations" not in card and "{" not in card.replace('{"role": "user", "content": question}', "")
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        *("## Results", "## Data", "## Training", "## Limits")
    ]
    readme = (root / "README.md").read_text()
    assert readme.startswith(f"Before.\n{release.BEGIN}On 4 held-out tasks") and readme.endswith(
        f"{release.END}\nBehind.\n"
    )
    assert "old" not in readme and "| `mask_diffusion` | 75.0 ± 21.7 % |" in readme
    release.main(["card", str(root / "made")], root)
    assert (root / "README.md").read_text() == readme, "once more is the same"


def test_ablations_become_tables(root, tokenizer):
    model = twotower.TwoTowerForBlockDiffusion.from_pretrained(root / "made")
    write_json(root / release.FIGURES, evaluated(model, tokenizer))
    rows = [
        {"part": "masks", "setting": "random", "figures": {"kept %": [0.955, 0.008], "passes": 4.5}},
        {"part": "schedule", "setting": "two decays", "figures": {"kept %": 0.9}},
        {"part": "masks", "setting": "whole", "figures": {"kept %": 0.8}},
    ]
    first, second = (root / name for name in release.ABLATIONS)
    write_json(first, {"about": "Small runs.", "rows": rows})
    write_json(second, {"about": "Smaller ones.", "rows": rows[:1], "outcome": "Little was learned."})
    release.main(["card", str(root / "made")], root)
    card = (root / "made" / "README.md").read_text()
    assert "## Ablations\n\nSmall runs.\n\n| part | setting | kept | passes |\n" in card
    assert "| masks | random | 95.5 ± 0.8 % | 4.50 |\n| masks | whole | 80.0 % | - |\n| schedule |" in card
    assert "| schedule | two decays | 90.0 % | - |\n\nSmaller ones.\n" in card
    assert "| masks | random | 95.5 ± 0.8 % | 4.50 |\n\nLittle was learned.\n\n## Limits" in card


def test_temperatures_are_compared_on_both_skills_and_surer_means_fewer_passes(root, monkeypatch, capsys):
    monkeypatch.setattr(release, "MAX_NEW_TOKENS", 16)
    values = ["--values", "0.01", "1000", "--problems", "2"]
    release.main(["temperatures", str(root / "denoiser" / "model"), *values], root)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["words", "ar", "0.01", "1000", "code", "ar", "0.01", "1000"]
    fewer = [float(line.split()[-3]) for line in lines if len(line.split()) > 1]
    assert fewer[1] > fewer[2] and fewer[4] > fewer[5] and fewer[0] == 1.0
