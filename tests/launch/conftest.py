"""A toy corpus and tokenizer that launched recipes train on."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chain.conftest import CHAIN, fork_server, write_corpus

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pytest_collection_modifyitems(items):
    """Keep these tests in one worker: they share a fork server and a run."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("launch"))


@dataclass
class World:
    """Where a chain was begun, and the fork server that began it."""

    folder: Path
    data: Path
    server: object

    def words(self, stage: str, run_dir: Path, *more: str) -> list[str]:
        """A recipe's script and the words that run it on what stands in a copy of the run."""
        script = str(ROOT / "recipes" / "summarization" / f"{stage}.py")
        return [script, "--config", str(CHAIN), f"output_dir={run_dir}", *more]


@pytest.fixture(scope="session")
def launching(tmp_path_factory):
    """A ForkServer of its own."""
    with fork_server(HERE.parent / "chain" / "forkserver.py", tmp_path_factory.mktemp("launch_logs")) as server:
        yield server


@pytest.fixture(scope="session")
def begun(launching, tmp_path_factory) -> World:
    """A run whose corpus and tokenizer are there."""
    data = write_corpus(tmp_path_factory.mktemp("launch_data") / "toy")
    folder = tmp_path_factory.mktemp("begun") / "run"
    words = ("run", str(CHAIN), f"dataset={data}", "--output_dir", str(folder), "--until", "tokenizer")
    code, printed = launching.run(*words)
    assert code == 0, printed
    return World(folder, data, launching)


@pytest.fixture(scope="session")
def preferred(launching, begun, tmp_path_factory) -> World:
    """A run whose preferences are there too, sampled from its SFT model, and the reward model that learned them."""
    import shutil

    folder = tmp_path_factory.mktemp("preferred") / "run"
    shutil.copytree(begun.folder, folder)
    words = ("run", str(CHAIN), f"dataset={begun.data}", "--output_dir", str(folder), "--until", "reward")
    code, printed = launching.run(*words)
    assert code == 0, printed
    return World(folder, begun.data, launching)


def accelerate(*words: str) -> list[str]:
    """``accelerate launch`` and words for it."""
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def started(command: list[str], folder: Path, name: str = "run", **variables: str) -> subprocess.Popen:
    """Start a command in a session of its own; what it says goes to ``folder/NAME.{out,err}``."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT, start_new_session=True)


@pytest.fixture
def fp32_afterwards():
    """Accelerate's state outlives a trainer that used another precision."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def preferred_or_begun(request):
    """The world that a recipe needs: with preferences and a reward model for those that begin with them."""

    def world(name: str) -> World:
        needs = name.rpartition("/")[2] in ("reward", "dpo", "ppo", "listwise", "grpo", "rloo", "soft")
        return request.getfixturevalue("preferred" if needs else "begun")

    return world
