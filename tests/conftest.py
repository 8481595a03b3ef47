"""Offline, quiet, and one thread a process: tests run side by side on two cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the user's cache out of the tests, and the tests out of it."""
    folder = tmp_path_factory.mktemp("genalign_cache")
    before = os.environ.get("GENALIGN_CACHE")
    os.environ["GENALIGN_CACHE"] = str(folder)
    yield
    if before is None:
        del os.environ["GENALIGN_CACHE"]
    else:
        os.environ["GENALIGN_CACHE"] = before


@pytest.fixture
def root() -> Path:
    """The checkout's top folder."""
    return ROOT
