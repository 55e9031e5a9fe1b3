"""`twotower generate --input --output`: every line is answered once, whatever interrupts it, and as it is alone."""

import json
import time

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from twotower import TwoTowerForBlockDiffusion
from twotower.cli import commands, jsonl
from twotower.cli.commands import app
from twotower.decoding.engine import Engine
from twotower.decoding.serving import TwoTowerEngine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(vocab_size=280, block_size=8).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


LINES = [
    {"prompt": "Tom has 3 apples.", "id": "tom"},
    {"input_ids": [5, 6, 7, 8], "mode": "ar", "max_new_tokens": 20},
    {"prompt": "Mia", "id": 7, "mode": "self_speculative", "max_new_tokens": 3},
    {"prompt": "Mia", "do_sample": True, "seed": 3, "temperature": 2.0},
    {"prompt": "Leo", "mode": "mock_ar", "max_new_tokens": 1},
    {"prompt": "Ana", "id": "é"},
]
KEYS = [("id", "tom"), ("index", 1), ("id", 7), ("index", 3), ("index", 4), ("id", "é")]


@pytest.fixture
def files(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return source, target


def run(checkpoint, source, target, *more, code=0):
    arguments = [
        "generate",
        "--model",
        checkpoint,
        "--input",
        source,
        "--output",
        target,
        "--max-new-tokens",
        12,
        *more,
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def written(target):
    """By key; every line of the file is whole, and no key is there twice."""
    content = target.read_text()
    assert content.endswith("\n")
    answers = {}
    for line in map(json.loads, content.splitlines()):
        key = next(iter(line.items()))
        assert key not in answers
        answers[key] = line
    return answers


def test_every_line_gets_what_it_gets_alone(checkpoint, files):
    source, target = files
    result = run(checkpoint, source, target, "--slots", 3)
    answers = written(target)
    assert set(answers) == set(KEYS)
    model = TwoTowerForBlockDiffusion.from_pretrained(checkpoint)
    tokenizer = commands._load(str(checkpoint))[1]
    for key, line in zip(KEYS, LINES, strict=True):
        knobs = {name: value for name, value in line.items() if name not in jsonl.OWN}
        ids = torch.tensor([line["input_ids"]]) if "input_ids" in line else None
        ids = commands._encode(line["prompt"], tokenizer, raw=False).input_ids if ids is None else ids
        alone = model.generate(ids, **{"max_new_tokens": 12} | knobs, return_dict_in_generate=True)
        new = alone.sequences[0, ids.shape[1] :].tolist()
        answer = answers[key]
        assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer["tokens"] == len(new)
        assert answer["denoiser_forwards"] == int(alone.denoiser_forwards)
        assert answer["context_forwards"] == int(alone.context_forwards)
        assert answer.get("token_ids") == (new if "input_ids" in line else None)
    assert result.stdout == ""
    total = sum(answer["tokens"] for answer in answers.values())
    assert result.stderr.startswith(f"6 lines, {total} tokens, ")


def test_a_text_without_a_token_is_no_prompt(checkpoint, files):
    """Time was up before the first position of the block was filled."""
    source, target = files
    line = {"input_ids": [5, 6, 7, 8], "mode": "mask_diffusion", "max_time": 1e-9, "confidence_threshold": 1.0}
    source.write_text(json.dumps(line))
    run(checkpoint, source, target)
    (answer,) = written(target).values()
    assert (answer["tokens"], answer["text"], answer["token_ids"]) == (0, "", [])


def test_paddings_id_is_a_token_of_a_line(checkpoint, files):
    """In a text, and in ids at an end, as it is of a prompt alone: a line is not padded."""
    source, target = files
    tokenizer = commands._load(str(checkpoint))[1]
    asked = [tokenizer(f"Tom {tokenizer.pad_token} has 3").input_ids, [tokenizer.pad_token_id, 5, 6, 7]]
    assert all(tokenizer.pad_token_id in ids for ids in asked)
    lines = [{"prompt": f"Tom {tokenizer.pad_token} has 3"}, {"input_ids": asked[1]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(checkpoint, source, target, "--raw")
    model, answers = TwoTowerForBlockDiffusion.from_pretrained(checkpoint), written(target)
    for number, ids in enumerate(map(torch.tensor, asked)):
        alone = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=12)
        text = tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True).strip()
        assert answers["index", number]["text"] == text


def test_lines_are_written_as_they_finish(checkpoint, files):
    source, target = files
    run(checkpoint, source, target, "--slots", 6)
    order = list(written(target))
    assert order.index(("index", 4)) < order.index(("index", 1)), "one token is there before twenty"


def test_raw_prompts_have_no_template(checkpoint, files, tmp_path):
    source, target = files
    run(checkpoint, source, target)
    run(checkpoint, source, tmp_path / "raw.jsonl", "--raw")
    assert written(target)[("id", "tom")] != written(tmp_path / "raw.jsonl")[("id", "tom")]
    assert written(target)[("index", 1)] == written(tmp_path / "raw.jsonl")[("index", 1)]


@pytest.mark.parametrize("passes", [1, 4, 9, 15])
def test_an_interrupted_run_goes_on_where_it_was(checkpoint, files, tmp_path, monkeypatch, passes):
    source, target = files
    run(checkpoint, source, tmp_path / "whole.jsonl", "--slots", 2)
    left, step = [passes], Engine.step

    def interrupted(engine):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        run(checkpoint, source, target, "--slots", 2, code=130)
    before = target.read_bytes() if target.exists() else b""
    assert run(checkpoint, source, target, "--slots", 2).stderr.startswith(f"{6 - before.count(10)} lines, ")
    assert target.read_bytes().startswith(before)
    assert written(target) == written(tmp_path / "whole.jsonl")
    after = target.read_bytes()
    assert run(checkpoint, source, target).stderr.startswith("0 lines, 6 were there already, ")
    assert target.read_bytes() == after


@pytest.mark.parametrize("cut", [1, 3, 9, 25, -1])
def test_a_half_written_line_is_done_again(checkpoint, files, cut):
    source, target = files
    run(checkpoint, source, target)
    whole, content = written(target), target.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    target.write_bytes(content[: -len(last)] + last[:cut])
    run(checkpoint, source, target)
    assert written(target) == whole


def test_a_killed_process_loses_and_repeats_nothing(checkpoint, fresh_python, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": f"Tom {number}", "mode": "ar", "max_new_tokens": 40} for number in range(60)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = "import sys, torch; torch.set_num_threads(1); from twotower.cli.commands import app; app(sys.argv[1:])"
    arguments = ["generate", "--model", checkpoint, "--input", source, "--output", target, "--slots", "2"]
    process = fresh_python.start("-c", code, *arguments)
    deadline = time.monotonic() + 120
    while not (target.exists() and target.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    there = target.read_bytes().count(b"\n")
    assert 3 <= there < 60
    run(checkpoint, source, target)
    assert set(written(target)) == {("index", number) for number in range(60)}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a list; give an object"),
        ("{}", 'give either "prompt"'),
        ('{"prompt": "a", "input_ids": [5]}', 'give either "prompt"'),
        ('{"prompt": ""}', "prompt is ''; give a text"),
        ('{"prompt": "\\ud800"}', "surrogates not allowed"),
        ('{"input_ids": [5, "6"]}', "input_ids is [5, '6']; give a list of token ids"),
        ('{"input_ids": [5, 280]}', "input_ids holds 280, outside the vocabulary"),
        ('{"prompt": "a", "id": 1.5}', "id is 1.5; give a text or a whole number"),
        ('{"prompt": "a", "id": "tom"}', "id 'tom' is that of line 1, too"),
        ('{"prompt": "a", "temprature": 1}', "temprature is no knob of a line"),
        ('{"prompt": "a", "num_return_sequences": 2}', "num_return_sequences is no knob of a line"),
        ('{"prompt": "a", "mode": "x"}', "mode is 'x'; use one of"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0"),
        ('{"prompt": "a", "num_beams": 2}', "num_beams=2 is not supported"),
        ('{"prompt": "a", "eos_token_id": "x"}', "eos_token_id is 'x'; give a token id"),
        ('{"prompt": "a", "do_sample": "no"}', "do_sample is 'no'; give True or False"),
        ('{"prompt": "a", "seed": 3}', "--seed given without sampling"),
        ('{"prompt": "a", "min_p": 0.1}', "--min-p given without sampling"),
        ('{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
        ('{"prompt": "a", "watermarking_config": 5}', "AttributeError: 'int' object has no attribute"),
        ('{"prompt": "a", "stop_strings": [0]}', "AttributeError: 'int' object has no attribute"),
        ('{"prompt": "a", "exponential_decay_length_penalty": []}', "IndexError: list index out of range"),
        ('{"prompt": "a", "exponential_decay_length_penalty": {}}', "KeyError: 0"),
        ('{"prompt": "a", "forced_eos_token_id": {}}', "RuntimeError: Could not infer dtype of dict"),
    ],
)
def test_a_bad_line_is_named_before_any_work(checkpoint, files, monkeypatch, line, message):
    source, target = files
    source.write_text(source.read_text() + "\n" + line + "\n")
    monkeypatch.setattr(Engine, "step", lambda engine: pytest.fail("a pass was run"))
    error = run(checkpoint, source, target, code=2).stderr
    assert error.startswith(f"error: {source}, line 8: ") and message in error
    assert error.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"some": "thing"}\n', "line 1: this command did not write it; give another --output"),
        (b"text\n", "line 1: this command did not write it"),
        (
            b'{"id": "tom", "text": ""}\n{"id": "eva", "text": ""}\n',
            "line 2: it answers id 'eva', which the input does",
        ),
        (b'{"id": "tom", "text": ""}\nnotes', "ends in what this command did not write"),
    ],
)
def test_an_output_of_something_else_is_left_alone(checkpoint, files, content, message):
    source, target = files
    target.parent.mkdir()
    target.write_bytes(content)
    assert message in run(checkpoint, source, target, code=2).stderr
    assert target.read_bytes() == content
    before = source.read_bytes()
    assert "--output is the input" in run(checkpoint, source, source, code=2).stderr
    assert source.read_bytes() == before


def test_an_output_that_another_process_writes_is_left_alone(checkpoint, files, monkeypatch):
    """Begun twice, the command would answer every line twice, and cut off what the other has written meanwhile."""
    fcntl = pytest.importorskip("fcntl")
    source, target = files
    run(checkpoint, source, target)
    content = target.read_bytes()[:-5]
    target.write_bytes(content)
    with target.open("ab") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert f"{target} is being written by another process" in run(checkpoint, source, target, code=2).stderr
    assert target.read_bytes() == content
    load = commands._load

    def meanwhile(*args):
        target.write_bytes(content + b"more")
        return load(*args)

    monkeypatch.setattr(commands, "_load", meanwhile)
    assert "has been written to since it was read" in run(checkpoint, source, target, code=2).stderr
    assert target.read_bytes() == content + b"more"


def test_what_fails_while_running_is_its_lines_answer(checkpoint, files, monkeypatch):
    source, target = files
    write = Engine.write

    def failing(engine, rows, *args):
        if rows[0].request.config.mode == "self_speculative":
            raise ValueError("no numbers")
        write(engine, rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "write", failing)
        result = run(checkpoint, source, target, code=1)
    answers = written(target)
    assert set(answers) == set(KEYS)
    assert [key for key, answer in answers.items() if "error" in answer] == [("id", 7)]
    assert answers[("id", 7)] == {"id": 7, "error": "no numbers"}
    assert f'1 lines failed; see "error" in {target}' in result.stderr
    assert '1 lines failed; see "error"' in run(checkpoint, source, target, code=1).stderr, "nor is it forgotten"


def test_a_knob_that_no_model_can_serve_fails_its_own_line(checkpoint, files):
    source, target = files
    source.write_text(source.read_text() + '{"prompt": "a", "forced_eos_token_id": 999, "mode": "ar"}\n')
    run(checkpoint, source, target, code=1)
    answers = written(target)
    assert [key for key, answer in answers.items() if "error" in answer] == [("index", 6)]
    assert answers["index", 6]["error"].startswith("IndexError: index 999 is out of bounds")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give either PROMPT or --input"),
        (("ab", "--input", "x", "--output", "y"), "give either PROMPT or --input"),
        (("--input", "x"), "--input and --output go together"),
        (("ab", "--output", "x"), "--input and --output go together"),
        (("--input", "x", "--output", "y", "--trace"), "and without --trace"),
        (("ab", "--draft-length", "long"), "--draft-length is 'long'; give auto or"),
        (("ab", "--rule-parameter", "sharpness=2"), "--rule-parameter is 'sharpness=2'; give NAME=VALUE, NAME one of"),
        (("ab", "--rule-parameter", "factor"), "--rule-parameter is 'factor'; give NAME=VALUE"),
        (("ab", "--rule-parameter", "factor=high"), "factor is 'high'"),
        (("ab", "--rule-parameter", "factor=1", "--rule-parameter", "factor=2"), "factor is given twice"),
        (("ab", "--draft-length", "0"), "draft_length is 0"),
        (("ab", "--acceptance-ratio", "1.5"), "acceptance_ratio is 1.5"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_line_goes_before_options_of_other_names_too(checkpoint, files):
    """A greedy line among sampled ones was refused, a max_length had no effect beside the option's max_new_tokens."""
    source, target = files
    greedy = {"input_ids": [5, 6, 7], "mode": "ar"}
    lines = [greedy | {"do_sample": False, "id": "greedy"}, greedy | {"max_length": 5, "id": "short"}, greedy]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(checkpoint, source, target, "--do-sample", "--temperature", 9, "--seed", 1)
    answers = written(target)
    alone = TwoTowerForBlockDiffusion.from_pretrained(checkpoint).generate(
        torch.tensor([[5, 6, 7]]), mode="ar", max_new_tokens=12
    )
    assert answers["id", "greedy"]["token_ids"] == alone[0, 3:].tolist() != answers["index", 2]["token_ids"]
    assert answers["id", "short"]["tokens"] == 2


def test_options_are_of_all_lines_and_a_line_goes_before_them(checkpoint, files, monkeypatch):
    source, target = files
    seen = []
    add = TwoTowerEngine.add_request
    monkeypatch.setattr(TwoTowerEngine, "add_request", lambda self, **k: seen.append(k) or add(self, **k))
    more = ("--rule-parameter", "tokens_per_step=3", "--rule-parameter", "noise_schedule=cosine")
    asked = ("--draft-length", 4, "--acceptance-ratio", 0.5, "--mode", "self_speculative", *more)
    run(checkpoint, source, target, *asked)
    assert [(knobs["tokens_per_step"], knobs["noise_schedule"]) for knobs in seen] == [(3, "cosine")] * 6
    assert [knobs["draft_length"] for knobs in seen] == [4] * 6
    assert [knobs["acceptance_ratio"] for knobs in seen] == [0.5] * 6
    assert [knobs["mode"] for knobs in seen][:3] == ["self_speculative", "ar", "self_speculative"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(checkpoint, files):
    source, target = files
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    run(checkpoint, source, target)
    assert set(written(target)) == set(KEYS)
