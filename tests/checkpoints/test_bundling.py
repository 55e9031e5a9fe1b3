"""Source files joined into few: what goes where, what stays in place, and what is refused."""

import subprocess
import sys

import pytest

from twotower.checkpoints.bundling import write_code

PACKAGE = {
    "config.py": '''"""Facts."""

import sys
from typing import Any

from .compat import old


def facts() -> Any:
    return old, sys


__all__ = ["facts"]
''',
    "compat.py": '''"""Releases.

All of them.
"""

import sys

assert sys.version_info

from math import pi

if sys.platform == "none":
    from nowhere import nothing

old = pi  # kept


__all__ = ["old", "pi"]
''',
    "model.py": '''"""The model."""

from .compat import old
from .config import facts
from .decoding.engine import run
from .decoding.state import State

found = run(State, old, facts)
''',
    "decoding/engine.py": """from ..config import facts
from ..ops.scan import scan
from .state import State


def run(*given):
    return scan(given), State, facts
""",
    "decoding/state.py": """class State:
    pass
""",
    "ops/scan.py": '''"""One operation."""

from typing import Any, NamedTuple

from ..compat import pi


def scan(x: Any) -> Any:
    return pi, x, NamedTuple
''',
}


def bundle(root, package, bundles=("config", "model")):
    """Text of each bundle."""
    for name, text in package.items():
        (root / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "code" / name).write_text(text)
    (root / "bundled").mkdir()
    write_code(root / "bundled", root / "code", bundles)
    return {path.name: path.read_text() for path in (root / "bundled").iterdir()}


def test_files_go_into_the_first_bundle_that_needs_them(tmp_path):
    texts = bundle(tmp_path, PACKAGE)
    assert texts.keys() == {"config.py", "model.py"}
    parts = {name: [line for line in text.splitlines() if line.startswith("# From")] for name, text in texts.items()}
    assert parts["config.py"] == ["# From compat.py:", "# From config.py:"]
    assert parts["model.py"] == [
        *("# From ops/scan.py:", "# From decoding/state.py:", "# From decoding/engine.py:", "# From model.py:")
    ]
    assert texts["model.py"].splitlines()[1:7] == [
        *('"""The model."""', "", "from typing import Any, NamedTuple", "", "from .config import facts, old, pi", "")
    ]


def test_imports_below_the_top_stay_where_they_are(tmp_path):
    text = bundle(tmp_path, PACKAGE)["config.py"]
    assert text.startswith("# Written by `twotower export`")
    assert text.splitlines()[1:13] == [
        *('"""Facts."""', "", "import sys", "from typing import Any", ""),
        *("# From compat.py:", "#", "# Releases.", "#", "# All of them.", "", ""),
    ]
    body = PACKAGE["compat.py"]
    assert body[body.index("assert") : body.index("\n\n\n__all__")] in text
    assert text.endswith('__all__ = [\n    "facts",\n    "old",\n    "pi",\n]\n')


def test_bundles_run(tmp_path):
    bundle(tmp_path, PACKAGE)
    code = "import bundled.model as m; print(m.found[0], m.State.__module__, m.facts()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(3.14") and "bundled.model 3.14" in done.stdout


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"model.py": "from . import other"}, "cannot follow"),
        ({"model.py": "from .ops import thing"}, "is not a file"),
        ({"model.py": 'def f():\n    """\n    from .nowhere import nothing\n    """'}, "reads the imports"),
        ({"model.py": "from .compat import old as ancient"}, "the name after `as` would be lost"),
        (
            {"model.py": "if True:\n    from .compat import old"},
            "import below the imports at",
        ),
        ({"model.py": "def f():\n    from .compat import old"}, "model.py, line 2: a relative import below"),
        ({"model.py": "import sys  # why\n"}, "a comment at an import is lost"),
        ({"model.py": "__all__ = []\nx = 1"}, "__all__ is not at the end"),
        ({"model.py": "from .ops.scan import scan\n\ndef id(): pass"}, "id would hide Python's own"),
        ({"config.py": "from .model import x", "model.py": "x = 1"}, "config needs .'model.py'."),
        (
            {"decoding/state.py": "from .engine import run"},
            "cycle: model.py -> engine.py -> state.py -> engine",
        ),
        ({"decoding/state.py": "scan = State = 1"}, "scan means two things.*decoding/state.py, ops/scan.py"),
        ({"decoding/state.py": "import Any\nclass State: pass"}, "Any means two things"),
        (
            {"decoding/state.py": "pi = State = 1"},
            "pi means two things in one bundle; rename one: decoding/state.py",
        ),
    ],
)
def test_refused(files, problem, tmp_path):
    with pytest.raises(AssertionError, match=problem):
        bundle(tmp_path, PACKAGE | files)
