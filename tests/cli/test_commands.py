"""The `twotower` command, on a tiny random model: what it prints where, what reaches the model, how it fails."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors import SafetensorError
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

import twotower
from twotower import TwoTowerForBlockDiffusion
from twotower.bench import running, sections
from twotower.cli import commands, terminal
from twotower.cli.commands import app
from twotower.decoding.rules import UNMASKING_RULES
from twotower.demo import evaluation, marking, rules_evaluation
from twotower.demo.rules_evaluation import draw_rules
from twotower.evaluation import curves
from twotower.training import run as training_run

QUESTION = "Tom has 3 apples. How many apples does Tom have?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("each kind once", vocab_size=280, block_size=8).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*arguments, code=0, **kwargs):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)
    assert result.exit_code == code, result.output
    return result


def answer(checkpoint, prompt, seed=None, **options):
    """What the library generates for the same request: text, number of tokens, output."""
    model, tokenizer = TwoTowerForBlockDiffusion.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    if seed is not None:
        options["seed"] = seed
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    new = output.sequences[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), output


def test_compiled_passes_write_the_same_text(checkpoint, tmp_path, monkeypatch):
    compiled, lines = [], tmp_path / "in.jsonl"
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    lines.write_text(json.dumps({"prompt": QUESTION}) + "\n")
    from_lines = ("--input", lines, "--output", tmp_path / "out.jsonl")
    arguments = ("generate", "--model", checkpoint, "--mode", "ar", "--max-new-tokens", 4)
    plain = run(*arguments, QUESTION).stdout
    assert not compiled
    assert run(*arguments, "--compile", QUESTION).stdout == plain and compiled
    compiled.clear()
    run(*arguments, "--compile", *from_lines)
    assert compiled
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"].strip() == plain.strip()


def test_generate_prints_the_text_and_its_cost(checkpoint):
    result = run("generate", QUESTION, "--model", checkpoint, "--max-new-tokens", 12)
    text, tokens, output = answer(checkpoint, f"Question: {QUESTION}\nAnswer:", max_new_tokens=12)
    assert result.stdout == text + "\n"
    passes, reads = int(output.denoiser_forwards), int(output.context_forwards)
    assert result.stderr.startswith(f"{tokens} tokens, {passes} denoiser passes, {reads} context passes, ")
    assert f"{tokens / passes:.2f} tokens per denoiser pass, " in result.stderr
    assert result.stderr.endswith(" tokens/s\n")


def test_generate_takes_the_strategys_knobs(checkpoint):
    options = {"mode": "self_speculative", "draft_steps": 2, "unmasking_rule": "fixed", "max_new_tokens": 12}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run("generate", QUESTION, "--model", checkpoint, *flags)
    text, tokens, output = answer(checkpoint, f"Question: {QUESTION}\nAnswer:", **options)
    assert result.stdout == text + "\n"
    both = int(output.denoiser_forwards) + int(output.context_forwards)
    assert f"{tokens / both:.2f} per pass of either tower" in result.stderr
    assert "use one of" in run("generate", QUESTION, "--model", checkpoint, "--unmasking-rule", "x", code=2).stderr


@pytest.mark.parametrize("mode, denoiser_passes", [("ar", 0), ("mock_ar", 6)])
def test_generate_in_other_modes(checkpoint, mode, denoiser_passes):
    result = run("generate", QUESTION, "--model", checkpoint, "--mode", mode, "--max-new-tokens", 6)
    text, *_ = answer(checkpoint, f"Question: {QUESTION}\nAnswer:", mode=mode, max_new_tokens=6)
    assert result.stdout == text + "\n"
    assert result.stderr.startswith(f"6 tokens, {denoiser_passes} denoiser passes, 6 context passes")
    assert ("per denoiser pass" in result.stderr) == (mode == "mock_ar")


def test_generate_with_the_context_tower_alone(checkpoint, tmp_path, monkeypatch):
    loaded, load = [], TwoTowerForBlockDiffusion.from_pretrained
    monkeypatch.setattr(
        TwoTowerForBlockDiffusion, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    flags = ("--model", checkpoint, "--mode", "ar", "--max-new-tokens", 6)
    expected = run("generate", QUESTION, *flags).stdout
    assert run("generate", QUESTION, *flags, "--towers", "context").stdout == expected
    (tmp_path / "in").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    run("generate", "--input", tmp_path / "in", "--output", tmp_path / "out", *flags, "--towers", "context")
    assert json.loads((tmp_path / "out").read_text())["text"] == expected.strip()
    assert [model.has_denoiser for model in loaded] == [True, False, False]
    (tmp_path / "in").write_text(json.dumps({"prompt": QUESTION, "mode": "mock_ar"}) + "\n")
    files = ("--input", tmp_path / "in", "--output", tmp_path / "other")
    assert "no denoiser" in run("generate", *files, *flags, "--towers", "context", code=2).stderr
    assert len(loaded) == 3, "refused before loading"


def test_generate_with_an_offloaded_model(checkpoint, tmp_path, monkeypatch):
    """As where a GPU holds less than the model: prompts went to the meta device."""
    arguments = ("generate", "--model", checkpoint, "--max-new-tokens", 6)
    source, target, load = tmp_path / "in.jsonl", tmp_path / "out.jsonl", commands._load
    source.write_text(json.dumps({"prompt": QUESTION}) + "\n")
    plain = run(*arguments, QUESTION).stdout

    def offloaded(*asked):
        model, tokenizer = load(*asked)
        return cpu_offload(model, torch.device("cpu")), tokenizer

    monkeypatch.setattr(commands, "_load", offloaded)
    assert run(*arguments, QUESTION).stdout == plain
    run(*arguments, "--input", source, "--output", target)
    assert json.loads(target.read_text())["text"] == plain.strip()


def test_generate_hands_the_knobs_on(checkpoint):
    knobs = {"block_size": 4, "steps_per_block": 2, "confidence_threshold": 0.05, "max_new_tokens": 8}
    arguments = [part for name, value in knobs.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run("generate", "ab", "--raw", "--model", checkpoint, *arguments)
    text, tokens, output = answer(checkpoint, "ab", **knobs)
    assert result.stdout == text + "\n"
    assert result.stderr.startswith(f"{tokens} tokens, {int(output.denoiser_forwards)} denoiser passes")


def test_generate_samples_reproducibly(checkpoint):
    arguments = ("--model", checkpoint, "--do-sample", "--temperature", 2, "--top-k", 50, "--top-p", 0.9, "--seed", 7)
    first, second = (run("generate", "ab", "--raw", *arguments, "--max-new-tokens", 16).stdout for _ in range(2))
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.9}
    assert first == second
    assert first == answer(checkpoint, "ab", seed=7, **sampling, max_new_tokens=16)[0] + "\n"


def test_generate_on_a_terminal_streams(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    commands.generate("ab", model=str(checkpoint), raw=True, max_new_tokens=8)
    assert "░" in screen.getvalue()
    assert answer(checkpoint, "ab", max_new_tokens=8)[0] in screen.getvalue()


def test_output_elsewhere_has_no_escape_codes(checkpoint, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for arguments in (("generate", "ab", "--model", checkpoint, "--max-new-tokens", 8), ("info", checkpoint)):
        result = run(*arguments)
        assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--mode", "parallel"), 2, "mode is 'parallel'; use one of"),
        (("--block-size", 0), 2, "block_size is 0"),
        (("--steps-per-block", 0), 2, "steps_per_block is 0"),
        (("--confidence-threshold", 1.5), 2, "confidence_threshold is 1.5"),
        (("--temperature", 0.5), 2, "--temperature given without sampling"),
        (("--top-k", 5, "--seed", 1), 2, "--top-k, --seed given without sampling"),
        (("--do-sample", "--temperature", 0), 2, "temperature"),
        (("--towers", "left"), 2, "--towers is 'left'; use both or context"),
        (("--towers", "context"), 2, "it goes with --mode ar"),
        (("--towers", "context", "--mode", "ar", "--trace"), 2, "without --trace"),
    ],
)
def test_bad_values_are_one_line(checkpoint, arguments, code, message):
    result = run("generate", "ab", "--model", checkpoint, *arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", [("generate", "ab", "--model"), ("info",), ("eval", "--model")])
def test_missing_checkpoints_are_one_line(tmp_path, command):
    result = run(*command, tmp_path / "absent", code=1)
    assert result.stderr.startswith(f"error: {tmp_path / 'absent'} does not exist; give a checkpoint's folder")
    assert result.stderr.count("\n") == 1
    assert "holds no config.json" in run(*command, tmp_path, code=1).stderr


def test_demonstration_checkpoint_is_the_default(checkpoint, monkeypatch):
    monkeypatch.setattr(twotower, "demo_checkpoint", lambda: checkpoint)
    assert run("generate", "ab", "--max-new-tokens", 4).stdout
    assert "hidden size       32\n" in strip_lines(run("info").stdout)


def test_demo_checkpoint_is_complete_or_named(monkeypatch, tmp_path):
    monkeypatch.setattr(twotower, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="demonstration checkpoint is not at"):
        twotower.demo_checkpoint()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert twotower.demo_checkpoint() == tmp_path / "checkpoint"


def test_info_needs_a_config_only(tmp_path, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder, file = run("info", tmp_path).stdout, run("info", tmp_path / "config.json").stdout
    assert folder == file
    assert "Memory in float32" in folder
    assert "Memory in bfloat16" in run("info", tmp_path, "--dtype", "bfloat16").stdout
    assert "dtype is 'float33'" in run("info", tmp_path, "--dtype", "float33", code=2).stderr


def test_info_shows_costs_of_passes_and_keeps_them(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    first = run("info", checkpoint, "--costs").stdout
    assert "Milliseconds per pass" in first
    kinds = [line.split()[0] for line in first.split("Milliseconds per pass")[1].splitlines()[2:] if line.strip()]
    assert kinds.count("verify") == kinds.count("denoise") > kinds.count("step") == 1
    assert (tmp_path / "twotower" / "pass_costs.json").is_file()
    assert run("info", checkpoint, "--costs").stdout == first
    assert run("info", checkpoint, "--costs", "--measure").stdout != first
    assert "give --costs, too" in run("info", checkpoint, "--measure", code=2).stderr
    alone = run("info", checkpoint / "config.json", "--costs", code=2).stderr
    assert "config alone" in alone and "give a folder with weights" in alone


def test_info_shows_who_computes_what():
    shown = run("info", "--kernels").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["ssd_scan", "torch", "everywhere", "everywhere"] in rows
    assert "is not installed" in next(line for line in shown.splitlines() if line.split()[:1] == ["flash-attn"])
    packages = shown.split("Packages")[1]
    assert all(name in packages for name in ("triton", "mamba-ssm", "causal-conv1d", "flash-attn"))
    assert "hidden size" not in shown


def test_info_on_nvidias_config(goldens):
    shown = run("info", goldens.parent / "nvidia_30b").stdout
    total = next(line for line in shown.splitlines() if line.startswith("total"))
    assert "63.19 B" in total
    assert "6144" in shown


def test_eval_writes_and_prints_its_figures(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    target = tmp_path / "new" / "figures.json"
    arguments = ("--run-code", "--problems", 2, "--seed", 3, "--batch-size", 2, "--json", target)
    result = run("eval", "--model", checkpoint, *arguments)
    report = json.loads(target.read_text())
    assert (report["model"], report["problems"], report["seeds"]) == (str(checkpoint), 2, [3])
    assert result.stdout.startswith(f"2 held-out word problems (seed 3), greedy, {checkpoint}\n")
    assert f"\n2 held-out functions to write (seed 3), greedy, {checkpoint}\n" in result.stdout
    for row in report["rows"]:
        assert row["name"] in result.stdout
        assert f"{row['tokens_per_second']:.0f}" in result.stdout
    assert result.stderr == ""
    assert run("eval", "--model", checkpoint, *arguments[:-1], tmp_path, code=1).stderr.startswith("error: ")


def test_eval_runs_nothing_that_the_model_writes_unasked(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(marking, "_passed", lambda *_: pytest.fail("a function was run"))
    target = tmp_path / "figures.json"
    result = run("eval", "--model", checkpoint, "--problems", 2, "--seed", 3, "--modes", "ar", "--json", target)
    assert {row["skill"] for row in json.loads(target.read_text())["rows"]} == {"words"}
    assert result.stderr == "functions to write were left out: the model's are run; allow it with --run-code\n"


def test_eval_compares_the_rules_and_draws_them(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    figures, drawing = tmp_path / "rules.json", tmp_path / "new" / "rules.png"
    arguments = ("eval", "--model", checkpoint, "--problems", 2, "--seed", 3, "--batch-size", 2)
    result = run(*arguments, "--rules", "--json", figures, "--png", drawing)
    report = json.loads(figures.read_text())
    assert (report["batch_size"], report["max_new_tokens"], report["dtype"]) == (2, 8, "float32")
    assert {row["line"].split(",")[0].split()[0] for row in report["rows"]} == set(UNMASKING_RULES)
    for row in report["rows"]:
        assert row["line"] in result.stdout
        assert row["tokens"] / row["denoiser_passes"] == row["tokens_per_denoiser_pass"]
    assert drawing.read_bytes().startswith(b"\x89PNG\r\n")
    fixed = {row["tokens_per_step"]: row["denoiser_passes"] for row in report["rows"] if row["line"] == "fixed"}
    assert fixed[1] > fixed[2] > fixed[8]
    assert "greedy where a line does not say sampled" in result.stdout.splitlines()[0]
    for row in report["verified_rows"]:
        assert row["line"] in result.stdout and f"acceptance_ratio={row['acceptance_ratio']}" in result.stdout
    assert "--png draws the unmasking rules" in run(*arguments, "--png", drawing, code=2).stderr
    assert "--unseen and --modes go without --rules" in run(*arguments, "--rules", "--unseen", code=2).stderr
    both = run(*arguments, "--rules", "--skills", "words,code", code=2).stderr
    assert "about one skill; give --skill words or code" in both


def test_eval_draws_curves_over_the_knobs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    for name in set(curves.LINES) - {"acceptance"}:
        monkeypatch.delitem(curves.LINES, name)
    figures, drawing = tmp_path / "curves.json", tmp_path / "new" / "curves.png"
    asked = ("--problems", 4, "--seeds", "5,6", "--skill", "code", "--run-code", "--batch-size", 2)
    arguments = ("eval", "--model", checkpoint, *asked, "--curve")
    result = run(*arguments, "--json", figures, "--png", drawing)
    report = json.loads(figures.read_text())
    assert (report["seeds"], report["batch_size"], report["model"]) == ([5, 6], 2, str(checkpoint))
    assert [row["value"] for row in report["rows"]] == [None, *curves.LINES["acceptance"].values]
    assert result.stdout.startswith(f"4 held-out functions to write (seeds 5, 6), greedy, batch 2, {checkpoint}\n")
    assert drawing.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("size", ["0", "-1", "x", ""])
def test_eval_refuses_an_impossible_batch_size(checkpoint, size):
    result = run("eval", "--model", checkpoint, "--problems", 2, f"--batch-size={size}", code=2)
    assert "--batch-size" in result.stderr


@pytest.mark.parametrize("skills", ["", "word", "words,", "code,words,words"])
def test_eval_refuses_an_unknown_skill(checkpoint, skills):
    result = run("eval", "--model", checkpoint, f"--skills={skills}", code=2)
    assert f"--skills is '{skills}'; give words, code, or both" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--card", "--dry-run", "--problems", 9), "--problems, --seeds and --skills are about held-out"),
        (("eval", "--card", "--dry-run", "--seed", 9), "--problems, --seeds and --skills are about held-out tasks"),
        (("eval", "--card", "--dry-run", "--skill", "code"), "of --card give --limit"),
        (("eval", "--skill", "code"), "functions that the model writes are run, under limits; give --skills code and"),
        (("eval", "--skill", "words", "--run-code"), "give --skills code and --run-code both"),
        (("eval", "--rules", "--run-code"), "give --skills code and --run-code both"),
        (("eval", "--unseen", "--skill", "code"), "--unseen is about word problems; give --skills words or"),
        (("export", "new", "--private"), "private is True, which is about a repository; give push_to_hub, too"),
        (("eval", "--rules", "--json", "a", "--png", "./a"), "--json and --png are both a, where one would replace"),
        (("bench", "--json", "a", "--png", "a"), "--json and --png are both a, where one would replace the other"),
        (("info", "--kernels", "--dtype", "float16"), "--kernels is about this machine; leave out MODEL, --dtype and"),
        (("generate", "a", "--slots", 2), "--slots is about the lines of --input; give that, too, or leave it out"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(arguments, message):
    assert message in run(*arguments, code=2).stderr


def test_lists_may_have_spaces(checkpoint, monkeypatch):
    def asked(*_, skills, only, **__):
        raise ValueError(f"{skills}, {only}")

    monkeypatch.setattr(evaluation, "evaluate", asked)
    result = run(
        "eval", "--model", checkpoint, "--skills", "code, words", "--run-code", "--modes", "ar, mock_ar", code=2
    )
    assert result.stderr == "error: ['words', 'code'], ('ar', 'mock_ar')\n"


def test_eval_misses_matplotlib_before_the_work(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(rules_evaluation, "compare_rules", lambda *_, **__: pytest.fail("the work was begun"))
    drawing = tmp_path / "rules.png"
    result = run("eval", "--model", checkpoint, "--rules", "--png", drawing, code=2)
    assert 'pip install "twotower[eval]"' in result.stderr
    assert not drawing.exists()


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "twotower\[eval\]"'):
        draw_rules({"rows": []}, tmp_path / "x.png")


def test_train_follows_a_recipe(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(training_run, "train", lambda recipe: calls.append(recipe) or tmp_path / "model")
    file = tmp_path / "recipe.yaml"
    file.write_text("folder: run\nsteps: 3\nmodel: {checkpoint: demo}\ndata: {files: [a.jsonl]}\n")
    assert run("train", file).stdout.strip() == str(tmp_path / "model")
    run("train", file, "--folder", tmp_path / "other", "--push-to-hub", "me/mine")
    first, second = calls
    assert (first.folder, first.hub, first.steps) == ("run", None, 3)
    assert (second.folder, second.hub.repository) == (str(tmp_path / "other"), "me/mine")


def test_train_takes_an_empty_folder_for_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "train", lambda recipe: pytest.fail(f"trained in {recipe.folder}"))
    file = tmp_path / "recipe.yaml"
    file.write_text("folder: run\nsteps: 3\nmodel: {checkpoint: demo}\ndata: {files: [a.jsonl]}\n")
    message = "error: --folder is empty; give a folder, or . for the current one\n"
    assert run("train", file, "--folder", "", code=2).stderr == message


@pytest.mark.parametrize(("recipe", "message"), [("absent.yaml", "No such file or directory"), ("", "Is a directory")])
def test_train_without_a_recipe_says_so_in_a_line(tmp_path, recipe, message):
    result = run("train", tmp_path / recipe, code=1)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_export_writes_a_hub_folder(checkpoint, tmp_path):
    target = tmp_path / "hub"
    result = run("export", target, "--model", checkpoint)
    assert result.stdout.strip() == str(target)
    assert (target / "modeling_twotower.py").is_file()
    assert "error: " in run("export", target, "--model", tmp_path / "absent", code=2).stderr


def test_what_a_full_disk_does_to_weights_is_a_line(checkpoint, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(TwoTowerForBlockDiffusion, "save_pretrained", full)
    result = run("export", tmp_path / "hub", "--model", checkpoint, code=1)
    assert result.stderr == "error: I/O error: No space left on device (os error 28)\n"
    assert not [*tmp_path.iterdir()]


def test_help_names_the_commands():
    shown = run("--help").stdout
    assert all(command in shown for command in ("generate", "export", "info", "train", "eval"))


def test_generate_reads_standard_input(checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 6)
    expected = run("generate", QUESTION, *arguments).stdout
    assert run("generate", "-", *arguments, input=f"{QUESTION}\n").stdout == expected


@pytest.mark.parametrize(("prompt", "given"), [("", None), (" \n\t", None), ("-", ""), ("-", " \n")])
def test_generate_refuses_an_empty_prompt_before_any_work(prompt, given, monkeypatch):
    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("the model was loaded"))
    name = "standard input" if prompt == "-" else "the prompt"
    for raw in ((), ("--raw",)):
        result = run("generate", prompt, *raw, code=2, input=given)
        assert result.stderr == f"error: {name} is empty; give a question, or with --raw the beginning of a text\n"


def test_generate_says_where_there_is_no_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed; redirect it from a file, or give the question"):
        commands._prompt("-")


def test_generate_refuses_what_is_no_text():
    result = run("generate", "\udcff?", code=2)
    assert result.stderr == "error: the question is no UTF-8 text; encode it so\n"


def test_version(monkeypatch):
    monkeypatch.setattr(commands.metadata, "version", lambda name: {"twotower": "1.2.3"}[name])
    assert run("--version").stdout == "twotower 1.2.3\n"

    def absent(name):
        raise commands.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(commands.metadata, "version", absent)
    assert run("--version").stdout == "twotower (not installed)\n"


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative", "mock_ar"])
def test_trace_shows_every_pass_and_ar_beside_it(checkpoint, mode):
    knobs = {"mode": mode, "max_new_tokens": 12, "draft_length": 4}
    arguments = ("--model", checkpoint, "--mode", mode, "--max-new-tokens", 12, "--draft-length", 4)
    result = run("generate", QUESTION, *arguments, "--trace")
    assert result.stderr == "" and "\x1b" not in result.stdout
    text, tokens, output = answer(checkpoint, f"Question: {QUESTION}\nAnswer:", **knobs)
    passes, reads = int(output.denoiser_forwards), int(output.context_forwards)
    lines = result.stdout.splitlines()
    passed = lines[: lines.index("")]  # the text itself may begin a line with a number
    numbered = [line.split()[:3] for line in passed if line[:5].strip().isdigit() and line.split()[1].isdigit()]
    assert len(numbered) == passes
    if mode == "mask_diffusion":
        assert sum(int(new) for _, _, new in numbered) >= tokens
        assert [block for block, *_ in numbered] == sorted(block for block, *_ in numbered)
    assert text in result.stdout
    *_, first, second = lines
    assert first.startswith(f"{mode}: {tokens} tokens in {passes} denoiser + {reads} context passes, ")
    ar_text, ar_tokens, _ = answer(checkpoint, f"Question: {QUESTION}\nAnswer:", mode="ar", max_new_tokens=12)
    assert second.startswith(f"{'ar:':<{len(mode) + 1}} {ar_tokens} tokens in {ar_tokens} passes, ")
    assert first.endswith("tokens/s") and second.endswith("tokens/s")
    assert (f"ar writes: {ar_text}" in result.stdout) == (ar_text != text)


def test_trace_draws_the_same_text_every_time(checkpoint):
    """Traced and timed are the same text, with a seed of the command's own."""
    arguments = ("--model", checkpoint, "--max-new-tokens", 8, "--do-sample", "--temperature", 3)
    # Not `splitlines`, to which other bytes of a text end a line, too.
    lines = run("generate", "ab", "--raw", *arguments, "--trace").stdout.split("\n")
    drafts = [line for line in lines if line[:5].strip().isdigit()]
    text = lines[lines.index("") + 1]
    # Bytes that are no letter alone are one beside their neighbours, from which the trace shows them apart.
    traced, written = (re.sub(r"[^!-~]", "", each) for each in (drafts[-1][19:], text))
    assert traced.startswith(written[:4])


def test_trace_of_ar_is_refused(checkpoint):
    result = run("generate", "ab", "--model", checkpoint, "--mode", "ar", "--trace", code=2)
    assert result.stderr.startswith("error: --trace shows denoiser passes")


@pytest.mark.parametrize("before", [None, "older figures"])
def test_an_interrupted_eval_leaves_no_half_written_file(checkpoint, before, monkeypatch, tmp_path):
    figures, drawing = tmp_path / "figures.json", tmp_path / "rules.png"
    for file in (figures, drawing):
        if before is not None:
            file.write_text(before)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def half_written(report, file):
        file.write_text("half")
        raise OSError("the disk is full")

    arguments = ("eval", "--model", checkpoint, "--rules", "--json", figures, "--png", drawing)
    kept = [] if before is None else [figures, drawing]
    monkeypatch.setattr(rules_evaluation, "compare_rules", interrupted)
    assert CliRunner().invoke(app, [str(part) for part in arguments]).exit_code != 0
    assert sorted(tmp_path.iterdir()) == kept
    monkeypatch.setattr(rules_evaluation, "compare_rules", lambda *_, **__: {"problems": 1, "seed": 0})
    monkeypatch.setattr(rules_evaluation, "rules_table", lambda _: (["a"], []))
    monkeypatch.setattr(rules_evaluation, "rules_title", lambda _: "title")
    monkeypatch.setattr(rules_evaluation, "draw_rules", half_written)
    assert "the disk is full" in run(*arguments, code=1).stderr
    assert json.loads(figures.read_text())["problems"] == 1
    assert sorted(tmp_path.iterdir()) == sorted({figures, *kept})
    assert before is None or drawing.read_text() == before


@pytest.fixture
def short_bench(monkeypatch):
    """Texts and pieces so short that all of it takes seconds."""
    for name in ("MAX_NEW_TOKENS", "OFF_TOKENS"):
        monkeypatch.setattr(sections, name, 8)
    monkeypatch.setattr(running, "QUICK", running.Plan(batch_sizes=(1,), contexts=(16,), rounds=1, texts=1))


def test_bench_writes_figures_and_a_chart_and_shows_tables(checkpoint, short_bench, tmp_path):
    figures, drawing = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    files = ("--json", figures, "--png", drawing)
    result = run("bench", "--quick", "--model", checkpoint, "--batch-sizes", 2, "--seed", 3, *files)
    report = json.loads(figures.read_text())
    assert report["finished"] and (report["model"], report["seed"], report["batch_sizes"]) == (str(checkpoint), 3, [2])
    assert drawing.read_bytes()[:4] == b"\x89PNG"
    assert "held-out problems: tokens/s" in result.stdout and "reading a prompt" in result.stdout
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]


def test_an_interrupted_bench_leaves_the_steps_it_has_done(checkpoint, short_bench, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "prefill", interrupted)
    figures = tmp_path / "bench.json"
    arguments = ["bench", "--quick", "--model", str(checkpoint), "--json", str(figures)]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    report = json.loads(figures.read_text())
    assert "context" in report and "prefill" not in report and not report["finished"]
    assert [*tmp_path.iterdir()] == [figures]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch-sizes", "1,x"), "--batch-sizes is '1,x'; give whole numbers"),
        (("--contexts", "0"), "--contexts is '0'; give whole numbers"),
        (("--contexts", "8,8"), "contexts is [8, 8]; give each number once"),
        (("--rounds", "0"), "rounds is 0; give at least 1"),
    ],
)
def test_bench_refuses_wrong_options_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("loaded a model"))
    assert message in run("bench", *arguments, code=2).stderr


@pytest.mark.parametrize("arguments", [("eval",), ("eval", "--rules"), ("bench",)])
def test_a_closed_standard_output_is_told_of_before_any_work(arguments, monkeypatch):
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("loaded a model"))
    monkeypatch.setattr(terminal, "output_console", no_console)
    assert "standard output is closed" in run(*arguments, code=2).stderr


def no_console():
    raise ValueError("standard output is closed")


def test_bench_needs_a_place_for_its_files(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("loaded a model"))
    assert "is a folder; give a file" in run("bench", "--json", tmp_path, code=1).stderr
    monkeypatch.setattr(commands, "find_spec", lambda _: None)
    assert "--png needs matplotlib" in run("bench", "--png", tmp_path / "bench.png", code=2).stderr


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def strip_lines(text):
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())
