"""Fixtures and rules for every test."""

import gc
import logging
import os
from pathlib import Path

import pytest
import torch
from fresh_python import FreshPython
from hypothesis import settings

# Without a GPU, Triton's interpreter runs kernels; here, since other folders' conftest.py import Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

GOLDENS = Path(__file__).resolve().parent / "goldens"


def pytest_configure(config):
    # Before any test module imports transformers, which reads it at import.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A busy machine must not fail a property for being slow, nor CI for drawing other examples than the last run.
    settings.register_profile("twotower", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("twotower")


def pytest_collection_finish():
    # Every collection of garbage would look at all that was imported.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are up to ten times slower on many threads."""
    torch.set_num_threads(1)


@pytest.fixture
def warned(caplog, monkeypatch):
    """What transformers' logger is told, of which it keeps to itself what it has shown, outside CI all."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    logging.Logger.warning_once.cache_clear()
    return caplog


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """Runs new Python processes."""
    python = FreshPython(tmp_path_factory.mktemp("fresh_python"))
    yield python
    python.close()


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of numbers produced by NVIDIA's implementation (its README says which); its tests never skip."""
    assert GOLDENS.is_dir(), f"NVIDIA's numbers are missing at {GOLDENS}; check the repository out whole"
    return GOLDENS
