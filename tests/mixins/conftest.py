"""Pytest is strict about markers; those of transformers' tests are whatever their sources name."""

import re
from importlib.util import find_spec
from pathlib import Path

from mixins.released_tests import tests_folder


def pytest_configure(config):
    for source in (tests_folder() / "test_modeling_common.py", Path(find_spec("transformers.testing_utils").origin)):
        for name in sorted(set(re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8")))):
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")
