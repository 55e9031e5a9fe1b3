"""Processes forked from one that has imported torch are what `python` would have started."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
loaded = [name for name in ("transformers", "huggingface_hub", "triton", "twotower", "helper") if name in sys.modules]
import helper
print(sys.argv[1:], os.getcwd(), dict(sorted(os.environ.items())), loaded, sys.stdin.read(), __name__)
print(sys.path, file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("isolated", [True, False])
def test_they_say_what_others_say(isolated, fresh_python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("import helper\n", "" if isolated else "import helper\n"))
    (tmp_path / "helper.py").write_text("")
    environment = {"A": "1", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(tmp_path / "elsewhere")}
    how = {"env": environment, "cwd": tmp_path, "input": "what is typed"}
    command = [*(["-I"] if isolated else []), str(tmp_path / "script.py"), "a word", "3"]
    expected = subprocess.run([sys.executable, *command], capture_output=True, text=True, **how)
    done = fresh_python(*command, **how)
    for name in ("returncode", "stdout", "stderr"):
        assert getattr(done, name) == getattr(expected, name), name
    assert done.returncode == 3 and str(tmp_path) in done.stdout and "what is typed" in done.stdout


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
    ],
)
def test_how_they_end(code, status, said, fresh_python):
    done = fresh_python("-c", code)
    assert done.returncode == status and said in done.stderr


def test_they_can_be_killed(fresh_python):
    process = fresh_python.start("-c", "import time; time.sleep(60)")
    assert process.poll() is None
    process.kill()
    assert process.poll() == -9
    with pytest.raises(TimeoutError, match=r"still running after 0\.1 s"):
        fresh_python("-c", "import time; time.sleep(60)", timeout=0.1)
