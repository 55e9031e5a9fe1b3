"""The card of the embedded checkpoint, from what its training, its evaluation and the ablations left in files."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..checkpoints.inspection import model_size
from ..configuration_twotower import TwoTowerConfig
from ..evaluation.figures import mean, percent, plus_minus
from ..objective_twotower import DiffusionObjective
from .evaluation import footnote, table
from .tasks import CARRIES_SHARE, Skill

HEAD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
language: en
tags:
  - twotower
  - block-diffusion
  - mask-diffusion
  - demonstration
---
"""
WHAT = """# TwoTower demonstration model

A very small TwoTower block-diffusion language model (two towers of {parameters:.1f} M parameters, {megabytes:.1f} MB
in bfloat16), trained from scratch to show that the method works: a frozen autoregressive **context tower** and a
**denoiser tower** that fills {block} tokens at a time. It answers grade-school word problems and writes short Python
functions of the kinds it was trained on, and **knows nothing else**: it is no assistant and no calculator, and it is
not derived from any weights of NVIDIA's.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "FOLDER_OR_REPOSITORY"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
question = "Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?"
chat = [{{"role": "user", "content": question}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

(With the `twotower` package installed, `import twotower` replaces `trust_remote_code=True`.) A function is asked for
by its first line and a docstring with an example, as `demo/functions.py` writes them. The weights are stored in
bfloat16 and, as the config asks, loaded in float32, in which a CPU runs them faster.
"""
DATA = """## Data

Seeded generators (`demo/tasks.py`) write both skills without end, side by side.

- **Word problems** (`demo/word_problems.py`): fifteen fixed templates of one to three steps, and chains of two to
  five steps that are put together of kinds of steps, each told in several ways, some with a number that is not
  needed. Names, things, places and numbers are drawn anew; every given number and every result lies in 2 to 999.
  Answers work the steps out and end in `#### result`. Held out are one in 16 sets of given numbers, in whatever
  order, and of chains one in 8 compositions of steps: no training problem has either, and every chain that is asked
  in evaluation has both. (A number that is not needed counts as none of them.)
- **Functions** (`demo/functions.py`): from a first line and a docstring with an example, over numbers of a list or
  up to n, characters or words of a string, put together of what is kept, what each becomes and how they are
  gathered. Held out is one in 6 combinations of these, whatever their parameters; but some parts are the same for
  some parameters, as even numbers and multiples of 2, so that of the 2,000 functions asked 113 have, up to names, the
  code of one in the denoiser's first run, which was asked for in other words. An answer is right if it passes five
  tests in a process of its own (`demo/checking.py`); in some the docstring's example is one of the five.

The tokenizer is a byte-level BPE of {vocabulary:,} tokens, every digit a token of its own, trained on 20,000
training tasks.
"""
TRAINING = """## Training

`twotower train` with the recipes `demo_context.yaml`, `demo.yaml`, `demo_context_continued.yaml`,
`demo_continued.yaml` and `demo_balanced.yaml` of `recipes/`, in this order: Muon on hidden matrices, each expert one,
AdamW on the rest, experts balanced by bias, warmup-stable-decay. Where a share of carrying problems is told below, so
many of the tasks are word problems half of whose steps or more carry into the hundreds or borrow from them: at first
most of what the denoiser got wrong were digits of such sums, and after a run that was mostly of them, sums that carry
nothing. Log: `benchmarks/demo_training.json`.

1. **Context tower**: next-token cross-entropy on answers.
{context}
2. **Denoiser**, a copy of the context tower at first, on the frozen context tower: masked diffusion on answers (in its
   last run {objective};
   blocks of {blocks} tokens, begun where the prompt ends in {aligned:.0%} of the texts, else anywhere). Its last run
   came after the context tower's last.
{denoiser}
3. **Confidence**: the denoiser's head is divided by {temperature:g} (temperature scaling, chosen on a validation
   seed), because so small a tower is surer than it is right. Predictions stay the same; the default threshold of 0.8
   asks for more certainty than it would without.
"""
LIMITS = """## Limits

Sentences that no template or kind of step writes, numbers above 999, negative numbers and fractions in word
problems, functions of other parts and docstrings in other words are outside of what it saw. Where it errs it states
a wrong number with the same confidence in wording. The denoiser's loss was still falling when its training ended: mask
diffusion now and then writes what is likely, not what was asked for (of `get_scores`, which sums, it made
`get_total`). `mock_ar` asks the denoiser for the next token without time
conditioning, which this denoiser was never trained for. Generated functions are to be run like any code of unknown
origin: not without a sandbox.
"""


def card(
    config: TwoTowerConfig,
    size: int,
    training: dict[str, Any],
    figures: dict[str, Any],
    ablations: Sequence[dict[str, Any]] = (),
) -> str:
    """
    Args:
        config: the checkpoint's.
        size: bytes of its weights.
        training: what `demo.release` keeps of the runs.
        figures: a report of [`evaluate`].
        ablations: of each comparison `about`, what was compared, and `rows`, each with `part`, `setting` and
            `figures`: a value, or value and standard error, by the name of its column; one that ends in "%" is a
            share. Where there is one, `outcome` says below them what they show.
    """
    tower = sum(model_size(config).context.values()) / 1e6
    parts = [
        HEAD + "\n" + WHAT.format(parameters=tower, megabytes=size / 1e6, block=config.block_size),
        "## Results\n\n" + results(figures),
        DATA.format(vocabulary=config.vocab_size),
        _training_text(training),
    ]
    if ablations:
        parts.append("## Ablations\n\n" + "\n".join(map(_comparison, ablations)))
    return "\n".join([*parts, LIMITS])


def results(figures: dict[str, Any]) -> str:
    """A table per skill of what `twotower eval` has measured, and of what it is."""
    titles = {"words": "word problems", "code": "functions to write"}
    seeds = ", ".join(map(str, figures["seeds"]))
    parts = [f"On {figures['problems']:,} held-out tasks of each skill (seeds {seeds}), greedy.\n"]
    for skill in figures["skills"]:
        parts.append(f"**{titles[skill].capitalize()}**\n\n{_markdown(*_of_quality(figures, skill))}")
    return "\n".join([*parts, *(f"{_wrapped(line)}\n" for line in footnote(figures, speeds=False).splitlines())])


def _of_quality(figures: dict[str, Any], skill: Skill) -> tuple[list[str], list[list[str]]]:
    """Without the speeds, of which `twotower bench` says more."""
    header, rows = table(figures, skill)
    kept = [place for place, name in enumerate(header) if place < header.index("tokens/s")]
    return [header[place] for place in kept], [[f"`{row[0]}`", *row[1 : len(kept)]] for row in rows]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _training_text(training: dict[str, Any]) -> str:
    recipe = training["denoiser"][-1]["recipe"]
    sizes = recipe["data"]["block_sizes"] or [16]
    return TRAINING.format(
        context=_runs_text(training["context"]),
        denoiser=_runs_text(training["denoiser"]),
        objective=", ".join(f"{name} {value}" for name, value in _chosen(recipe["objective"]).items()),
        blocks=", ".join(map(str, sorted(set(sizes)))),
        aligned=recipe["data"]["aligned"],
        temperature=training["temperature"],
    )


def _chosen(objective: dict[str, Any]) -> dict[str, Any]:
    """Of an objective what is not as by default, and its weighting."""
    usual = asdict(DiffusionObjective())
    return {name: value for name, value in objective.items() if name == "weighting" or value != usual[name]}


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _runs_text(runs: list[dict[str, Any]]) -> str:
    return "\n".join(f"   - {_run_text(run)}." for run in runs)


def _run_text(run: dict[str, Any]) -> str:
    """Steps, tokens, time and loss of one run, which may have been stopped before its last step."""
    recipe, log = run["recipe"], [line for line in run["log"] if "loss" in line]
    tasks = recipe["batch_size"] * recipe["accumulation"] * run["processes"]
    tokens = mean([line["items"] for line in log]).value or 0.0
    last = mean([line["loss"] for line in log[-10:]])
    steps = run["step"]
    planned = "" if steps == recipe["steps"] else f" (of {recipe['steps']:,} planned)"
    carrying = CARRIES_SHARE[recipe["data"]["generated"]]
    which = f", {carrying:.0%} of them carrying" if carrying else ""
    return (
        f"{steps:,} steps of {tasks} tasks{which}{planned}, about {steps * tokens / 1e6:.1f} M answer tokens, "
        f"{log[-1]['seconds'] / 60:.0f} minutes ({run['machine']}); loss {log[0]['loss']:.3g} at first, "
        f"{last.value:.4f} at the end"
    )


def _comparison(ablations: dict[str, Any]) -> str:
    below = f"\n{_wrapped(ablations['outcome'])}\n" if "outcome" in ablations else ""
    return f"{_wrapped(ablations['about'])}\n\n{_ablation_table(ablations['rows'])}{below}"


def _ablation_table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    # Of one part below each other, in whatever order they were measured.
    parts = [row["part"] for row in rows]
    rows = sorted(rows, key=lambda row: parts.index(row["part"]))
    lines = [[row["part"], row["setting"], *(_figure(row["figures"], name) for name in columns)] for row in rows]
    return _markdown(["part", "setting", *(name.removesuffix(" %") for name in columns)], lines)


def _figure(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return "-"
    found = figures[name]
    value, stderr = found if isinstance(found, list) else (found, None)
    return percent(value, stderr) if name.endswith("%") else plus_minus(value, stderr)
