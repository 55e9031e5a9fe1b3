"""The `twotower` command. What takes long to import is imported by the command that needs it."""

import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from ..demo.tasks import Skill
    from ..modeling_twotower import TwoTowerForBlockDiffusion


class OneLineErrors(TyperGroup):
    """Shows what is wrong with the input in one line: exit code 2 for values, 1 for files and network."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, SafetensorError) as error:  # the last as of a full disk
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


app = typer.Typer(
    cls=OneLineErrors,
    help="Block-diffusion text generation with two NemotronH towers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        try:
            number = metadata.version("twotower")
        except metadata.PackageNotFoundError:
            number = "(not installed)"  # but found on the path
        typer.echo(f"twotower {number}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# What has no effect but on tokens that are drawn.
SAMPLERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
Model = Annotated[str | None, typer.Option(help="Folder or Hub repository; default the demonstration checkpoint.")]


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="A question, or with --raw the beginning of a text; - reads it from standard input."),
    ] = None,
    model: Model = None,
    mode: Annotated[
        str | None, typer.Option(help="mask_diffusion, self_speculative, mock_ar or ar; default the checkpoint's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block; default as trained.")] = None,
    steps_per_block: Annotated[int | None, typer.Option(help="Most denoiser passes per block; default 16.")] = None,
    draft_steps: Annotated[
        int | None, typer.Option(help="Most denoiser passes per draft of self_speculative; default 1.")
    ] = None,
    draft_length: Annotated[
        str | None, typer.Option(help="Tokens per draft of self_speculative, or auto (default): what is fastest here.")
    ] = None,
    acceptance_ratio: Annotated[
        float | None,
        typer.Option(
            help="self_speculative keeps drafts so much as likely as the context tower's choice; default 1, exact."
        ),
    ] = None,
    unmasking_rule: Annotated[
        str | None, typer.Option(help="Which predictions a pass commits: confidence (default), fixed, entropy, ...")
    ] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Commit predictions surer than this at once, in (0, 1]; default 0.8.")
    ] = None,
    rule_parameter: Annotated[
        list[str] | None,
        typer.Option(help="Another parameter of the rule, as in margin_threshold=0.9; may be given several times."),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(help="Draw tokens, not the likeliest; default the checkpoint's, else no."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="With --do-sample: below 1 for likelier tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --do-sample: among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --do-sample: among the likeliest, p in all.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --do-sample: the same seed gives the same text.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print a line per denoiser pass, then what ar makes of the same prompt.")
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input", help='JSON lines to answer instead of PROMPT: {"prompt": "...", "max_new_tokens": 64}.'
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="With --input: where a line goes for each; goes on where it ended.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="With --input: how many are answered at a time; default 16.")
    ] = None,
    towers: Annotated[
        str, typer.Option(help="Load both, or with --mode ar only the context tower, in half the memory: context.")
    ] = "both",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Run compiled passes: a GPU records them at once, a compiler takes minutes."),
    ] = False,
) -> None:
    """
    Answer PROMPT: the text on standard output, a line about its cost on standard error.

    With --input and --output a file of JSON lines is answered into another, as lines finish. A line is an object with
    "prompt" or "input_ids", and if it likes "id" and any of generate's knobs, which go before these options.
    """
    from ..generation_twotower import TwoTowerGenerationConfig
    from .terminal import DraftStreamer, output_console

    options: dict[str, Any] = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "steps_per_block": steps_per_block,
        "draft_steps": draft_steps,
        "draft_length": _draft_length(draft_length),
        "acceptance_ratio": acceptance_ratio,
        "unmasking_rule": unmasking_rule,
        "seed": seed,
        "confidence_threshold": confidence_threshold,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "compile": compiled or None,
    }
    for name, value in map(_rule_parameter, rule_parameter or ()):
        if options.get(name) is not None:
            raise ValueError(f"{name} is given twice; leave one out")
        options[name] = value
    options = {name: value for name, value in options.items() if value is not None}
    if (prompt is None) == (input_file is None):
        raise ValueError("give either PROMPT or --input FILE")
    if input_file is None and slots is not None:
        raise ValueError("--slots is about the lines of --input; give that, too, or leave it out")
    if (input_file is None) != (output_file is None) or (input_file is not None and trace):
        raise ValueError("--input and --output go together, and without --trace")
    if towers not in ("both", "context"):
        raise ValueError(f"--towers is {towers!r}; use both or context")
    if towers == "context" and (mode != "ar" or trace):
        raise ValueError("--towers context has no denoiser: it goes with --mode ar, and without --trace")
    # Loading may take minutes; what is wrong with the options is known before.
    TwoTowerGenerationConfig(**options).validate()
    if input_file is not None and output_file is not None:
        _generate_lines(input_file, output_file, model, options, raw, slots or 16, towers)
        return
    assert prompt is not None
    prompt = _prompt(prompt)
    two_towers, tokenizer = _load(model, towers)
    _check_sampling(options, two_towers.generation_config.do_sample)
    inputs = _encode(prompt, tokenizer, raw)  # which generate brings to the model
    console = output_console()
    if trace:
        _trace(two_towers, tokenizer, inputs, options, console)
        return
    show = DraftStreamer(tokenizer, two_towers.config.mask_token_id, console) if console.is_terminal else None
    with show or nullcontext():
        started = time.perf_counter()
        output: Any = two_towers.generate(**inputs, **options, streamer=show, return_dict_in_generate=True)
        seconds = time.perf_counter() - started
    tokens = _new_tokens(two_towers, inputs, output)
    if show is None:
        typer.echo(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    typer.echo(_cost(len(tokens), int(output.denoiser_forwards), int(output.context_forwards), seconds), err=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="What to write.")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; default the demonstration's.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this repository, NAME or OWNER/NAME.")] = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository; default yours.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a self-contained Hub folder, which loads with trust_remote_code=True where twotower is not installed."""
    from .. import demo_checkpoint
    from ..checkpoints.export import export as export_model

    _quiet_unless_watched(model)
    typer.echo(export_model(model or demo_checkpoint(), folder, push_to_hub, private, overwrite=overwrite))


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Folder, config.json or Hub repository; default the demonstration checkpoint.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="For the bytes, e.g. bfloat16; default the config's.")] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Load the model, too, and show what its passes cost on this machine.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --costs, measure them anew; those kept are dropped.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show instead who computes each operation here, and what else could.")
    ] = False,
) -> None:
    """Show a model's geometry, parameters and memory; its config is enough."""
    from ..checkpoints import inspection
    from ..configuration_twotower import TwoTowerConfig
    from .terminal import output_console, show_table

    if measure and not costs:
        raise ValueError("--measure is about costs of passes; give --costs, too, or leave it out")
    if kernels and (model, dtype, costs) != (None, None, False):
        raise ValueError("--kernels is about this machine; leave out MODEL, --dtype and --costs")
    if kernels:
        _show_kernels(output_console())
        return
    _quiet_unless_watched(model)
    config = TwoTowerConfig.from_pretrained(_origin(model))
    name = dtype or str(config.dtype or "bfloat16").removeprefix("torch.")
    size, memory_dtype = inspection.model_size(config), inspection.dtype_named(name)
    console = output_console()
    show_table(console, "Geometry", ("", ""), inspection.geometry(config), left_columns=2)
    show_table(console, "Parameters, and those active for one token", *inspection.parameter_table(size))
    show_table(console, f"Memory in {name}", *inspection.memory_table(config, size, memory_dtype))
    if costs:
        _show_costs(model, measure, console)


@app.command()
def train(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML file, see docs/training.md."),
    ],
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the finished model here, NAME or OWNER/NAME; before the recipe's.")
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Train here; before the recipe's.")] = None,
) -> None:
    """
    Train as a recipe says; called again, it goes on where it was stopped, killed or not.

    The embedded checkpoint is what the recipes/demo*.yaml make, one after the other.
    """
    from ..training.recipe import HubRecipe, read_recipe

    asked = read_recipe(recipe)
    if folder == "":  # which a path takes for the current one
        raise ValueError("--folder is empty; give a folder, or . for the current one")
    if folder is not None:
        asked = replace(asked, folder=folder)
    if push_to_hub is not None:
        asked = replace(asked, hub=HubRecipe(push_to_hub, None if asked.hub is None else asked.hub.private))
    from ..training.run import train as train_by

    _quiet_unless_watched(None)
    typer.echo(train_by(asked))


@app.command("eval")
def evaluate(
    model: Model = None,
    problems: Annotated[
        int | None, typer.Option(help="Held-out tasks of each skill, shared out among the seeds; default 2000.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", "--seed", help="Of the tasks, comma-separated; default 101,102,103.")
    ] = None,
    skills: Annotated[
        str | None,
        typer.Option(
            "--skills", "--skill", help="words (word problems), code, or both: words,code; code needs --run-code."
        ),
    ] = None,
    modes: Annotated[
        str | None, typer.Option(help="Only these, comma-separated, beside ar, and not transformers.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures here; --card goes on with what it holds.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at a time, of which speeds are; default 64, of --card 16.")
    ] = None,
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen", help="Also count word problems with a step training has not shown, which takes minutes."
        ),
    ] = False,
    rules: Annotated[
        bool, typer.Option("--rules", help="Compare unmasking rules and verification instead of the modes.")
    ] = False,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Accuracy, passes, speed against threshold, block size, steps, acceptance."),
    ] = False,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="With --rules or --curve: draw the curves here.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="The model card's benchmarks by lm-eval, beside its figures; resumable.")
    ] = False,
    benchmarks: Annotated[
        str | None, typer.Option(help="With --card: some of them, comma-separated, e.g. gsm8k,mmlu.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --card: so many questions of a task.")] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="Run what the model writes, under limits, as functions and some of --card need."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --card: a few questions of our own, without network.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """
    Measure accuracy, passes and speed of every mode on held-out word problems, with --run-code also on functions to
    write, next to transformers' own NemotronH; with --rules accuracy against passes of every unmasking rule, and of
    drafts verified exactly or not; with --curve against the knobs of the modes; with --card the benchmarks of the
    model card. Every figure with its error.
    """
    import torch
    from transformers.utils import logging

    from ..bench.reports import write_json, write_whole
    from ..demo import evaluation, rules_evaluation
    from ..demo.held_out import PROBLEMS, SEEDS
    from ..evaluation import curves
    from . import evaluating
    from .terminal import output_console, show_table, track

    names = None if benchmarks is None else _words(benchmarks)
    asked_seeds = SEEDS if seeds is None else _seeds(seeds)
    default_skills = "words" if rules or curve or not run_code else "words,code"
    asked_skills = _skills(default_skills if skills is None else skills)
    if sum((rules, curve, card)) > 1:
        raise ValueError("give one of --rules, --curve and --card")
    if not card and (dry_run or limit is not None or benchmarks is not None):
        raise ValueError("--benchmarks, --limit and --dry-run are about --card; give it, too")
    if png_file is not None and not (rules or curve):
        raise ValueError("--png draws the unmasking rules or the curves of knobs; give --rules or --curve, too")
    if (rules or curve) and len(asked_skills) > 1:
        raise ValueError("--rules and --curve are about one skill; give --skill words or code")
    if card and (problems, seeds, skills) != (None, None, None):
        raise ValueError("--problems, --seeds and --skills are about held-out tasks; of --card give --limit")
    if unseen and "words" not in asked_skills:
        raise ValueError("--unseen is about word problems; give --skills words or words,code, or leave it out")
    if (unseen or modes is not None) and (rules or curve or card):
        raise ValueError("--unseen and --modes go without --rules, --curve and --card; leave them out")
    if not card and ("code" in asked_skills) != run_code:
        raise ValueError(
            "functions that the model writes are run, under limits; give --skills code and --run-code both"
        )
    rows = batch_size or (16 if card else 64)
    if card:
        evaluating.check_card(json_file, names, dry_run)
    _check_files(json_file, png_file)
    console = output_console()  # which there may be none of
    two_towers, tokenizer = _load(model)
    torch.set_num_threads(threads)
    # transformers' NemotronH says once per kernel that this machine has none.
    logging.set_verbosity_error()
    if card:
        evaluating.show_card(two_towers, tokenizer, model, json_file, names, rows, limit, run_code, dry_run)
        return
    if curve:
        measure = partial(curves.measure_curves, skill=asked_skills[0])
    elif rules:
        measure = partial(rules_evaluation.compare_rules, skill=asked_skills[0])
    else:
        only = () if modes is None else tuple(_words(modes))
        measure = partial(evaluation.evaluate, skills=asked_skills, unseen=unseen, only=only)
    count = PROBLEMS if problems is None else problems
    report = measure(two_towers, tokenizer, problems=count, seeds=asked_seeds, batch_size=rows, track=track)
    report = {"model": model or "demonstration checkpoint", **report}
    if json_file is not None:
        write_json(json_file, report)
    if rules:
        show_table(
            console, rules_evaluation.rules_title(report), *rules_evaluation.rules_table(report), left_columns=2
        )
    elif curve:
        show_table(console, curves.title(report), *curves.table(report), left_columns=2)
        console.print(curves.footnote(report), soft_wrap=True)
    else:
        for skill in asked_skills:
            show_table(console, evaluation.title(report, skill), *evaluation.table(report, skill))
        console.print(evaluation.footnote(report), soft_wrap=True)
    if skills is None and not (run_code or rules or curve):
        typer.echo("functions to write were left out: the model's are run; allow it with --run-code", err=True)
    if png_file is not None:
        draw = rules_evaluation.draw_rules if rules else curves.draw
        write_whole(png_file, lambda file: draw(report, file))


@app.command()
def bench(
    model: Model = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Comma-separated; default 1,4,16,64.")] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Comma-separated tokens of context; default 1024,4096,16384,65536,131072.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Time everything so often, in turn; default 5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of problems and random tokens; default 7.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Batches 1 and 16, contexts up to 4096, 2 rounds, where not given.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also every mode with compiled passes, which takes minutes to compile.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, after every step.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Draw the figures here, after every step.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """
    Measure speed on this machine: every mode on text the checkpoint knows and on other text, next to transformers' own
    NemotronH and to the released code's way of decoding; passes behind a growing context; reading of prompts.
    """
    import torch
    from transformers.utils import logging

    from ..bench import charts, running
    from ..bench.reports import write_json, write_whole
    from .terminal import output_console, show_table

    given: dict[str, Any] = {
        "batch_sizes": None if batch_sizes is None else tuple(_whole_numbers(batch_sizes, "--batch-sizes")),
        "contexts": None if contexts is None else tuple(_whole_numbers(contexts, "--contexts")),
        "rounds": rounds,
        "seed": seed,
        "compiled": compiled,
    }
    plan = replace(
        running.QUICK if quick else running.Plan(),
        **{name: value for name, value in given.items() if value is not None},
    )
    _check_files(json_file, png_file)
    console = output_console()  # which there may be none of
    two_towers, tokenizer = _load(model)
    torch.set_num_threads(threads)
    # transformers' NemotronH says once per kernel that this machine has none.
    logging.set_verbosity_error()
    name = model or "demonstration checkpoint"

    def save(report: dict[str, Any]) -> None:
        report = {"model": name, **report}
        if json_file is not None:
            write_json(json_file, report)
        if png_file is not None:
            write_whole(png_file, lambda file: charts.draw_bench(report, file))

    report = running.bench(two_towers, tokenizer, plan, save, say=lambda line: typer.echo(line, err=True))
    for title, header, rows in running.tables(report):
        show_table(console, title, header, rows)
    console.print(running.footnote(report), soft_wrap=True)


def _check_files(json_file: Path | None, png_file: Path | None) -> None:
    """Find out what would keep figures from being written before they are measured."""
    from ..bench.reports import check_writable

    if png_file is not None and find_spec("matplotlib") is None:
        raise ValueError('--png needs matplotlib; pip install "twotower[eval]"')
    if json_file is not None and png_file is not None and json_file.resolve() == png_file.resolve():
        raise ValueError(f"--json and --png are both {png_file}, where one would replace the other; give two files")
    for file in (json_file, png_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            check_writable(file)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; give whole numbers separated by commas, e.g. 2,3,4") from None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _skills(text: str) -> "list[Skill]":
    from ..demo.tasks import SKILLS

    chosen = [skill for skill in SKILLS if skill in _words(text)]
    if len(chosen) != len(_words(text)):
        raise ValueError(f"--skills is {text!r}; give words, code, or both: words,code")
    return chosen


def _rule_parameter(given: str) -> tuple[str, Any]:
    from ..decoding.rules import PARAMETERS

    name, _, value = given.partition("=")
    if name not in PARAMETERS or not value:
        raise ValueError(f"--rule-parameter is {given!r}; give NAME=VALUE, NAME one of {', '.join(PARAMETERS)}")
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def _draft_length(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--draft-length is {text!r}; give auto or a whole number of at least 1") from None


def _generate_lines(
    input_file: Path,
    output_file: Path,
    model: str | None,
    options: dict[str, Any],
    raw: bool,
    slots: int,
    towers: str,
) -> None:
    """Answer a file of JSON lines, all of which are checked before the first is answered."""
    import torch
    from transformers.utils import logging

    from ..bench.reports import check_writable
    from ..generation_twotower import TwoTowerGenerationConfig
    from . import jsonl
    from .terminal import track

    known = set(vars(TwoTowerGenerationConfig())) - set(jsonl.NOT_PLAIN)

    def check(line: jsonl.Line) -> None:
        if unknown := [name for name in line.knobs if name not in known or name.startswith("_")]:
            raise ValueError(f"{unknown[0]} is no knob of a line; leave it out")
        TwoTowerGenerationConfig(**_knobs_of_line(options, line.knobs)).validate()
        if towers == "context" and line.knobs.get("mode", "ar") != "ar":
            raise ValueError(f"mode is {line.knobs['mode']!r}, which --towers context has no denoiser for; use ar")

    if output_file.exists() and input_file.exists() and output_file.samefile(input_file):
        raise ValueError(f"--output is the input, {input_file}; give another file")
    lines = jsonl.read_lines(input_file, check)
    written = jsonl.read_written(output_file, lines)
    left = [line for line in lines if line.key not in written.errors]
    output_file.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output_file)
    two_towers, tokenizer = _load(model, towers)

    def arguments(line: jsonl.Line) -> dict[str, Any]:
        knobs = _knobs_of_line(options, line.knobs)
        _check_sampling(knobs, two_towers.generation_config.do_sample)
        ids: Any = (
            line.input_ids if line.prompt is None else _encode(line.prompt, tokenizer, raw).input_ids[0].tolist()
        )
        needs = {"tokenizer": tokenizer} if knobs.get("stop_strings") else {}
        every = torch.ones(1, len(ids), dtype=torch.long)  # is read, where padding's id would be taken for padding
        return {"input_ids": ids, "attention_mask": every, "return_dict_in_generate": True, **knobs, **needs}

    def answer(line: jsonl.Line, output: Any) -> dict[str, Any]:
        sequence = output.sequences[0].tolist()
        tokens = sequence[len(sequence) - output.commit_steps.shape[1] :]  # there may be none
        return {
            "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            "tokens": len(tokens),
            "denoiser_forwards": int(output.denoiser_forwards),
            "context_forwards": int(output.context_forwards),
        } | ({} if line.input_ids is None else {"token_ids": tokens})

    engine = two_towers.init_continuous_batching(slots=slots)

    def check_by_model(line: jsonl.Line) -> None:
        asked = arguments(line)
        ids = torch.tensor([asked.pop("input_ids")])
        two_towers.generate(ids, engine=engine, **asked)  # makes the request, and no more

    for line in left:
        jsonl.at_line(input_file, line.number)(check_by_model, line)
    logging.set_verbosity_error()  # warnings were shown just now
    started, tokens, failed = time.perf_counter(), 0, sum(written.errors.values())
    done = jsonl.write_answers(output_file, written, jsonl.answers(engine, left, arguments, answer))
    for _, written_answer in track(done, "lines", total=len(left)):
        tokens += written_answer.get("tokens", 0)
        failed += "error" in written_answer
    seconds = time.perf_counter() - started
    skipped = f", {len(written.errors)} were there already" if written.errors else ""
    typer.echo(f"{len(left)} lines{skipped}, {tokens} tokens, {tokens / seconds:.1f} tokens/s", err=True)
    if failed:
        typer.echo(f'error: {failed} lines failed; see "error" in {output_file}', err=True)
        raise typer.Exit(1)


def _knobs_of_line(options: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A line's own go before the options, also before those of other names that they leave without an effect."""
    dropped = ["max_new_tokens"] if "max_length" in own else []
    if own.get("do_sample") is False:
        draws = (options | own).get("unmasking_rule") == "posterior"
        dropped += [*SAMPLERS, *["seed"] * (not draws)]
    return {name: value for name, value in options.items() if name not in dropped} | own


def _show_costs(model: str | None, anew: bool, console: Any) -> None:
    """Milliseconds per pass, by which drafts are chosen: those kept, measured now where there are none."""
    from ..decoding.pass_costs import costs_of, pass_costs_file
    from .terminal import show_table

    if model is not None and Path(model).expanduser().is_file():
        raise ValueError(f"{model} is a config alone, whose passes can not be timed; give a folder with weights")
    two_towers, _ = _load(model)
    known = costs_of(two_towers, two_towers.config.block_size, rows=16, missing="anew" if anew else "measure")
    assert known is not None
    title = f"Milliseconds per pass in {str(two_towers.dtype).removeprefix('torch.')} (kept in {pass_costs_file()})"
    header, rows = known.table()
    show_table(console, title, header, rows)


def _show_kernels(console: Any) -> None:
    """Which backend each operation would use here, why not the others, and the packages that they come from."""
    from ..kernels.backends import kernel_table, package_table
    from .terminal import show_table

    header = ("operation", "backend", "here", 'used by "auto"')
    show_table(console, "Kernels (kernels= of from_pretrained, set_kernels)", header, kernel_table(), left_columns=4)
    header = ("package", "version here", "computes", "timed on a GPU")
    show_table(console, "Packages", header, package_table(), left_columns=4)


def _load(model: str | None, towers: str = "both") -> "tuple[TwoTowerForBlockDiffusion, Any]":
    """Model and tokenizer: the demonstration checkpoint as it is fastest on a CPU, any other as it is stored."""
    import torch
    from transformers import AutoTokenizer

    from ..modeling_twotower import TwoTowerForBlockDiffusion

    _quiet_unless_watched(model)
    origin = _origin(model)
    if model is None:
        # So small that more threads, and conversions from bfloat16, only cost time.
        torch.set_num_threads(1)
        options: dict[str, Any] = {"dtype": torch.float32}
    else:
        options = {"dtype": "auto", "device_map": "auto" if torch.cuda.is_available() else None}
    two_towers = TwoTowerForBlockDiffusion.from_pretrained(origin, towers=towers, **options)
    return two_towers, AutoTokenizer.from_pretrained(origin)


def _origin(model: str | None) -> str:
    """What to load from; a path that is not there is not taken for a repository's name."""
    from .. import demo_checkpoint

    if model is None:
        return str(demo_checkpoint())
    path = Path(model).expanduser()
    if model.startswith(("/", ".", "~")) and not path.exists():
        raise FileNotFoundError(f"{model} does not exist; give a checkpoint's folder or a Hub repository")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{model} holds an adapter; put it on its model with peft, merge it (merge_and_unload()) and save that"
            )
        raise FileNotFoundError(f"{model} holds no config.json; give a checkpoint's folder or a Hub repository")
    return str(path) if path.exists() else model


def _quiet_unless_watched(model: str | Path | None) -> None:
    """Bars for loading and downloading only on a terminal, and not for the small checkpoint."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if model is None or not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def _check_sampling(options: dict[str, Any], sampling_is_default: bool | None) -> None:
    given = [name for name in (*SAMPLERS, "seed") if options.get(name) is not None]
    if options.get("unmasking_rule") == "posterior" and "seed" in given:
        given.remove("seed")  # which this rule draws with
    if given and not options.get("do_sample", sampling_is_default):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} given without sampling, where it has no effect; add --do-sample or leave it out")


def _prompt(argument: str) -> str:
    if argument == "-" and sys.stdin is None:
        raise ValueError("standard input is closed; redirect it from a file, or give the question itself")
    prompt = sys.stdin.read().removesuffix("\n") if argument == "-" else argument
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the question is no UTF-8 text; encode it so") from error
    if not prompt.strip():
        where = "standard input" if argument == "-" else "the prompt"
        raise ValueError(f"{where} is empty; give a question, or with --raw the beginning of a text")
    return prompt


def _trace(two_towers: Any, tokenizer: Any, inputs: "BatchEncoding", options: dict[str, Any], console: Any) -> None:
    """A line per denoiser pass, the text, and what it cost beside mode "ar"."""
    from .terminal import TraceStreamer

    mode = options.get("mode") or two_towers.generation_config.mode or "mask_diffusion"
    if mode == "ar":
        raise ValueError('--trace shows denoiser passes, and mode "ar" takes none; leave one of them out')
    draws = options.get("do_sample", two_towers.generation_config.do_sample)
    if (draws or options.get("unmasking_rule") == "posterior") and "seed" not in options:
        options |= {"seed": randbits(62)}  # every time the same text
    stream = TraceStreamer(tokenizer, two_towers.config.mask_token_id, console, drafts=mode == "self_speculative")
    two_towers.generate(**inputs, **options, streamer=stream)
    # Timed without printing, and not the first time.
    texts, costs = {}, {}
    for name in (mode, "ar"):
        two_towers.generate(**inputs, **options | {"mode": name, "max_new_tokens": 2})
        started = time.perf_counter()
        output = two_towers.generate(**inputs, **options | {"mode": name}, return_dict_in_generate=True)
        seconds = time.perf_counter() - started
        tokens = _new_tokens(two_towers, inputs, output)
        texts[name] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        costs[name] = _short_cost(len(tokens), int(output.denoiser_forwards), int(output.context_forwards), seconds)
    console.print(texts[mode], soft_wrap=True)
    if texts["ar"] != texts[mode]:
        console.print(f"\nar writes: {texts['ar']}", soft_wrap=True)
    console.print()
    for name, cost in costs.items():
        console.print(f"{name + ':':<{len(mode) + 1}} {cost}", soft_wrap=True)


def _new_tokens(two_towers: Any, inputs: "BatchEncoding", output: Any) -> list[int]:
    from ..evaluation.answers import cut_after_end, end_ids

    return cut_after_end(output.sequences[0, inputs.input_ids.shape[1] :].tolist(), end_ids(two_towers))


def _short_cost(tokens: int, denoiser_passes: int, context_passes: int, seconds: float) -> str:
    passes = f"{denoiser_passes} denoiser + {context_passes} context" if denoiser_passes else str(context_passes)
    return f"{tokens} tokens in {passes} passes, {tokens / seconds:.0f} tokens/s"


def _encode(prompt: str, tokenizer: Any, raw: bool) -> "BatchEncoding":
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _cost(tokens: int, denoiser_passes: int, context_passes: int, seconds: float) -> str:
    parts = [f"{tokens} tokens", f"{denoiser_passes} denoiser passes", f"{context_passes} context passes"]
    if denoiser_passes:
        parts.append(f"{tokens / denoiser_passes:.2f} tokens per denoiser pass")
    parts.append(f"{tokens / (denoiser_passes + context_passes):.2f} per pass of either tower")
    return ", ".join([*parts, f"{tokens / seconds:.1f} tokens/s"])


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if min(numbers, default=0) < 1:
        raise ValueError(f"{option} is {text!r}; give whole numbers of at least 1 separated by commas, e.g. 1,16")
    return numbers


if __name__ == "__main__":  # accelerate launch -m twotower.cli.commands train RECIPE.yaml
    app()
