"""
New Python processes in half the time: forked from one that has imported torch, and nothing of Hugging Face's.

What is imported then, and which environment it finds, is each process's own. `python -I fresh_python.py` is the
process they are forked from; it reads requests, and answers them, as lines of JSON.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Most of what transformers' models import of torch, but not `torch._dynamo`: it imports Triton, which looks at its
# environment then.
IMPORTED = ("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint")


class FreshPython:
    """Starts processes, as `subprocess` with `sys.executable`; what they print is kept in files."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Neither inherits the other's environment: threads, of which a forked process has none, are not wanted.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *arguments: Any, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run `python *arguments` to its end, as [`start`] starts it."""
        process = self.start(*arguments, **how)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(arguments, code, process.stdout, process.stderr)

    def start(
        self, *arguments: Any, env: dict[str, Any] | None = None, cwd: Path | None = None, input: str = ""
    ) -> "Process":
        """
        Args:
            arguments: `[-I] FILE ...`, or `[-I] -c CODE ...`.
            env: all of the environment; default this one's.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "stdin").write_text(input)
        environment = {name: str(value) for name, value in (os.environ if env is None else env).items()}
        answer = self.ask(
            arguments=[*map(str, arguments)], env=environment, cwd=str(cwd or Path.cwd()), folder=str(folder)
        )
        return Process(self, folder, answer)

    def ask(self, **request: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        self.server.communicate()


class Process:
    """One that was started."""

    def __init__(self, python: FreshPython, folder: Path, pid: int):
        self.python, self.folder, self.pid = python, folder, pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.code is None:
            self.code = self.python.ask(pid=self.pid)
        return self.code

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s; it said {self.stderr[-2000:]}")
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.01)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


# The process they are forked from.


def serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread may hold a lock that no one opens in a forked process"
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(status(**request) if "pid" in request else start(**request)), flush=True)


def status(pid: int) -> int | None:
    ended, code = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(code) if ended else None


def start(arguments: list[str], env: dict[str, str], cwd: str, folder: str) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                os.dup2(os.open(Path(folder) / name, os.O_RDWR | os.O_CREAT, 0o600), number)
            # The lines that `serve` has buffered are not this process's.
            sys.stdin = os.fdopen(0, closefd=False)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            code = run(arguments)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    return child


def run(arguments: Sequence[str]) -> int:
    """As `python *arguments` does, its exit status included."""
    import atexit
    import runpy
    import traceback

    isolated, arguments = arguments[0] == "-I", [each for each in arguments if each != "-I"]
    # The server is itself isolated: its path has neither of these.
    if not isolated:
        own = "" if arguments[0] == "-c" else str(Path(arguments[0]).resolve().parent)
        sys.path[:0] = [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
    return 0


if __name__ == "__main__":
    serve()
