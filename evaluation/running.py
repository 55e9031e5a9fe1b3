"""
Programs that a model wrote, run in a process of their own with limits on time, memory, files and processes.

The limits keep an accident from harming the machine; they are no sandbox against a program that means harm. Run what a
model wrote only where you would run a stranger's code.
"""

import subprocess
import sys
import tempfile

# What the process does before the program: what is over these ends it.
_LIMITS = """
import resource
for kind, most in (("CPU", {seconds}), ("AS", {memory}), ("FSIZE", 2**20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
del resource, kind, most
"""


def passes_tests(program: str, seconds: int = 10, memory: int = 2**30) -> bool:
    """
    Whether a program with its tests ends without an error.

    Args:
        program: Python, run in an empty folder, without our environment, packages or standard input.
        seconds: of processor time, and twice as many on the clock.
        memory: bytes of address space.
    """
    whole = _LIMITS.format(seconds=seconds, memory=memory) + program
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", whole],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * seconds,
                start_new_session=True,
            )
        except (subprocess.TimeoutExpired, ValueError):  # a null character is no program
            return False
    return done.returncode == 0
