"""
Programs that a model wrote, run in a process of their own with limits on time, memory, files and processes.

The limits keep an accident from harming the machine; they are no sandbox against a program that means harm. Run what a
model wrote only where you would run a stranger's code.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

# What the process does before the program: what is over these ends it. Where the system allows less, that holds; one
# that it does not know, as macOS none on memory, is left out, or every program would fail.
_LIMITS = """
def limit():
    import resource
    for name, most in {limits}.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):
            pass
limit()
del limit
"""
# How a program ends that came to its end; one that leaves earlier has not run all of its tests.
_ENDED = 77


def run_limited(
    program: str, limits: Mapping[str, int], seconds: float, given: bytes | None = None
) -> tuple[int | None, bytes]:
    """
    Run Python in an empty folder, without our environment or packages, as a group of processes that is killed as a
    whole in the end. What it hashes has the same order every time.

    Args:
        program: text of it.
        limits: by the names of `resource`, such as "CPU".
        seconds: of the clock.
        given: its standard input; with None it has none, and what it says is dropped.

    Returns:
        Its exit code, None if it was out of time, and what it said.

    Raises:
        ValueError: on a system without such limits.
    """
    if find_spec("resource") is None:
        raise ValueError(
            "what a model wrote runs under limits on time and memory, which this system has not; evaluate on Linux or "
            "macOS, or leave such tasks out (--skill words)"
        )
    ways = subprocess.DEVNULL if given is None else subprocess.PIPE
    # What it has begun may still be writing there when it is killed; that is not to end an evaluation.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # As a file, not an argument, for which systems have a longest length.
        script, nowhere = Path(folder, "script.py"), Path(folder, "empty")
        script.write_text(_LIMITS.format(limits=dict(limits)) + program, encoding="utf-8")
        nowhere.mkdir()
        with subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", str(script)],
            stdin=ways,
            stdout=ways,
            stderr=subprocess.DEVNULL,
            cwd=nowhere,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(given, timeout=seconds)
                return process.returncode, said or b""
            except subprocess.TimeoutExpired:
                return None, b""
            finally:
                # All of it has ended by itself; macOS says so of the dead by another error.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def passes_tests(program: str, seconds: int = 10, memory: int = 2**30) -> bool:
    """
    Whether a program with its tests comes to its end without an error.

    Args:
        program: Python, run by [`run_limited`].
        seconds: of processor time, and twice as many on the clock.
        memory: bytes of address space.
    """
    whole = f"exec(compile({program!r}, 'program', 'exec'), {{'__name__': '__main__'}})\n"
    limits = {"CPU": seconds, "AS": memory, "FSIZE": 2**20, "CORE": 0}
    return run_limited(whole + f"__import__('os')._exit({_ENDED})", limits, 2 * seconds)[0] == _ENDED
