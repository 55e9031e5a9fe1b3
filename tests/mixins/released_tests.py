"""transformers' own tests, as its source distribution carries them: the tests every model of its library must pass."""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

PACKAGE = "transformers_tests"
# What the modules of the source distribution import although it does not carry it, and the mixin they want of it.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def tests_folder() -> Path:
    """The tests of the installed release, from the package index when first asked for."""
    version = transformers.__version__
    folder = Path(sys.prefix, "share", f"transformers-{version}-tests")
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
            subprocess.run([*download, f"--dest={scratch}", f"transformers=={version}"], check=True)
            with tarfile.open(Path(scratch, f"transformers-{version}.tar.gz")) as archive:
                archive.extractall(scratch, filter="data")
            Path(scratch, f"transformers-{version}", "tests").rename(folder)
    return folder


def released_tests(name: str) -> ModuleType:
    """The module of that name among transformers' tests."""
    for package, path in (
        (PACKAGE, [str(tests_folder())]),
        *((f"{PACKAGE}.{each.split('.')[0]}", []) for each in ABSENT),
    ):
        sys.modules.setdefault(package, ModuleType(package)).__path__ = path
    for module, mixin in ABSENT.items():
        stand_in = ModuleType(f"{PACKAGE}.{module}")
        setattr(stand_in, mixin, type(mixin, (), {}))
        sys.modules.setdefault(stand_in.__name__, stand_in)
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    print(tests_folder())
