"""
The README's Python runs as it stands, block after block; what needs the 60B checkpoint is compiled only.

So is what needs a package that is not installed: `make test-tools` installs all.
"""

import ast
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# What of a block says which package it needs beside ours.
NEEDS = {"twotower.grammar": "llguidance", "torchao": "torchao", "BitsAndBytesConfig": "bitsandbytes"}


def can_run(code: str) -> bool:
    missing = [package for word, package in NEEDS.items() if word in code and find_spec(package) is None]
    return not missing and not names_nvidias_checkpoint(code)


def names_nvidias_checkpoint(code: str) -> bool:
    """Whether a string in the code, not a comment, is a repository of NVIDIA's: 126 GB to download."""
    strings = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
    return any(isinstance(value, str) and value.startswith("nvidia/") for value in strings)


def test_the_blocks_run_in_order(capsys):
    names, ran = {"__name__": "__main__"}, 0
    for number, code in enumerate(BLOCKS):
        compiled = compile(code, f"README.md, Python block {number}", "exec")
        if can_run(code):
            exec(compiled, names)
            ran += 1
    without = sum(any(word in code for word in NEEDS) and not can_run(code) for code in BLOCKS)
    assert (ran + without, len(BLOCKS)) == (11, 12), "one block alone loads the 60B checkpoint"
    shown = capsys.readouterr().out
    assert shown.count("#### 138") >= 3, "also as tokens of a request, and of many"
    assert names["fast"].result().sequences[0, -1] == names["token"], "handed out to the end"
    assert "#### 143" in shown and "#### 138" in shown, "both questions are answered"
    width = names["text"].shape[1]
    assert names["output"].sequences.shape[1] > width, "the second turn wrote something"
    assert (names["output"].sequences[:, :width] == names["text"]).all()
    assert names["loss"].isfinite()
    assert "def take_values(<mask>" in shown and "def take_values(values):" in shown, "a gap, and what fills it"


@pytest.mark.parametrize("question", ['Tom\'s "box" costs $5, or `2`; \\ how many?', "Tom has 3 apples."])
def test_make_demo_asks_the_question_as_it_is(question):
    asked = ["make", "--no-print-directory", "-n", "-o", ".venv/.stamp-base", "demo", f"QUESTION={question}"]
    shown = subprocess.run(asked, cwd=README.parent, capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown) == [".venv/bin/twotower", "generate", "--trace", question]


def test_files_that_are_named_exist():
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.\w+)*(?:\.(?:py|md|yaml|json|png)|/))`", text))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", text))
    missing = {name for name in named if not (README.parent / name).exists()}
    assert len(named) > 50 and not missing, missing


def test_the_blocks_that_begin_with_imports_run_alone():
    """All but the second turn, the grammar, a map of devices and what goes on with the first block's model."""
    continued = [
        code for code in BLOCKS if "import" not in code or "output.sequences, next_turn" in code or "Grammar" in code
    ]
    assert len(continued) == 7
    for code in BLOCKS:
        if code not in continued and can_run(code):
            exec(code, {})
