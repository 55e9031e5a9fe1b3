"""Compiling our Triton kernels for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILE = Path(__file__).with_name("kernels") / "compile_ahead.py"


def assert_nothing_spills(module, folder, cases):
    """
    A kernel that runs out of registers keeps values on its stack, which is then not empty.

    Args:
        module: with the kernels.
        folder: an empty one.
        cases: architecture (90, 80), kernel's name, types of its pointers, constants and options of each.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    arguments = [module.__name__, str(folder), json.dumps(cases)]
    result = subprocess.run(
        [sys.executable, COMPILE, *arguments], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    used = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(used) == len(cases)
    spilling = [(case, use) for case, use in zip(cases, used, strict=True) if use["STACK"] != "0"]
    assert not spilling
