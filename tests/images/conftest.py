"""What the tests of the image stages share: small sets of images, and checks of exact resume and of two processes."""

import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chain.conftest import fork_server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEPENDS_ON_THE_CLOCK = ("stage.json", "timing.json", "README.md")


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """A ForkServer with the imports of the image stages done."""
    with fork_server(HERE / "forkserver.py", tmp_path_factory.mktemp("logs")) as server:
        yield server


def write_idx(path: Path, values: np.ndarray, magic: int | None = None) -> Path:
    """Write unsigned bytes as an IDX file, compressed if the name ends in ``.gz``."""
    magic = 0x800 + values.ndim if magic is None else magic
    data = struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def idx_folder(tmp_path) -> Path:
    """A folder in MNIST's form: 40 training and 20 test images of 12×12 pixels, of four classes."""
    folder, draw = tmp_path / "idx", np.random.default_rng(0)
    folder.mkdir()
    for stem, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 12, 12)))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 4)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Digest of every file of a stage's folder that does not depend on the clock."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name)
    kept = [p for p in files if p.name not in DEPENDS_ON_THE_CLOCK]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def check_resumes(stages, folder: Path, recipe: str, words: list[str], saves: int = 2) -> Path:
    """Kill a recipe by -9 in the middle of its ``saves``-th checkpoint, run it again, compare with one not killed.

    Args:
        stages: the fixture.
        folder: where to work.
        recipe: ``images/vae``.
        words: ``key=value`` that make it small, with ``save_steps`` such that it saves more often than ``saves``.
        saves: in the writing of which checkpoint it dies.

    Returns:
        The folder of the stage that was not killed.
    """
    whole, killed = folder / "whole", folder / "killed"
    code, printed = stages.run("--recipe", recipe, *words, f"output_dir={whole}")
    assert code == 0, printed[-3000:]
    argv = ["--recipe", recipe, *words, f"output_dir={killed}"]
    code, printed = stages.run(*argv, kill=(r"/checkpoint-\d+/\.?state\.json", saves))
    assert code == -signal.SIGKILL, printed[-3000:]
    partial = folder / ".killed.partial"
    assert len(list(partial.rglob("checkpoint-*/complete"))) == saves - 1  # else it starts afresh, which proves nothing
    assert len(list(partial.rglob("checkpoint-*"))) == saves  # one is torn
    code, printed = stages.run(*argv)
    assert code == 0, printed[-3000:]
    assert content(killed) == content(whole)
    metrics = [json.loads((path / "stage.json").read_text())["metrics"] for path in (whole, killed)]
    assert metrics[0] == metrics[1]
    return whole


def check_two_processes(
    stages, folder: Path, recipe: str, words: list[str], batch_size: int, tolerance: float = 1e-5
) -> tuple[Path, Path]:
    """Train with ``batch_size`` in one process and with half of it in each of two; compare weights, logs and metrics.

    Args:
        stages: the fixture.
        folder: where to work.
        recipe: ``images/vae``.
        words: ``key=value`` that make it small, without dropout, in float32.
        batch_size: of all processes together.
        tolerance: by which a weight may differ; at a rate r, Adam moves it by about r a step.

    Returns:
        The two stages' folders.
    """
    one, two, ranks = folder / "one", folder / "two", folder / "ranks"
    ranks.mkdir(parents=True)
    words = [*words, "precision=fp32"]
    code, printed = stages.run("--recipe", recipe, *words, f"batch_size={batch_size}", f"output_dir={one}")
    assert code == 0, printed[-3000:]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml")]
    command += [str(ROOT / "tests" / "chain" / "joined.py"), str(ranks), str(ROOT / "recipes" / f"{recipe}.py")]
    command += [*words, f"batch_size={batch_size // 2}", f"output_dir={two}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    weights = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert weights
    assert weights == sorted(path.relative_to(two) for path in two.rglob("*.safetensors"))
    for file in weights:
        first, second = load_file(one / file), load_file(two / file)
        assert first.keys() == second.keys()
        worst = max(float(abs(first[name] - second[name]).max()) for name in first)
        assert worst <= tolerance, f"{file}: weights differ by {worst}"
    histories = [json.loads((path / "log_history.json").read_text()) for path in (one, two)]
    assert len(histories[0]) == len(histories[1]) > 2
    for first, second in zip(*histories, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-3)
    metrics = [json.loads((path / "stage.json").read_text())["metrics"] for path in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-3)
    return one, two
