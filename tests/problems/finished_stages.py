"""Finished stages for the exercises that read some: ``tiny_stages.yaml``, made once a session."""

from __future__ import annotations

from pathlib import Path

from pipelines.runner import Chain, run
from tests.chain.conftest import write_corpus

HERE = Path(__file__).parent


def make_stages(folder: Path) -> Path:
    """Run the small chain below ``folder``; returns the folder that holds its stages."""
    data, made = write_corpus(folder / "data"), folder / "run"
    run(Chain.load(HERE / "tiny_stages.yaml"), made, [f"corpus.dataset={data}"])
    return made
