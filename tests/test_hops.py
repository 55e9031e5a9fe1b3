"""`tools/hops.py` counts what a call of generate enters; it is no part of the package."""

import re
import tomllib
from pathlib import Path

from twotower.decoding.config import MODES

ROOT = Path(__file__).resolve().parents[1]


def test_hops_are_counted_for_every_mode(fresh_python):
    done = fresh_python(ROOT / "tools" / "hops.py", "--list")
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for mode in MODES:
        found = re.search(rf"^{mode}: (\d+) functions, (\d+) files, (\d+) changes of file$", shown, re.MULTILINE)
        assert found is not None, shown
        functions, files, changes = map(int, found.groups())
        journey = shown[found.end() :].split("\naim: ")[0].split(" changes of file\n")[0].splitlines()
        visits = [line.strip().split(": ", 1) for line in journey if line.startswith("  ")]
        assert len({file for file, _ in visits}) == files > 1
        assert len(visits) - 1 == changes >= files - 1
        assert sum(len(names.split(", ")) for _, names in visits) == functions > changes
        assert visits[0][0] in ("compat_twotower.py", "decoding/adapter.py")


def test_tools_are_not_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "tools" not in settings["package-dir"].values() and "twotower.tools" not in settings["packages"]
