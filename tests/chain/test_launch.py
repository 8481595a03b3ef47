"""Every recipe through its real entry point, ``accelerate launch``: alone, and in two processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.chain.conftest import CHAIN, digests

STAGES = ["corpus", "tokenizer", "sft", "preferences", "reward", "ppo", "dpo", "evaluate"]
TRAINED = ["sft", "reward", "ppo", "dpo"]


def launch(root: Path, launcher: str, stage: str, *words: str) -> subprocess.CompletedProcess:
    """Run a recipe script by ``accelerate launch`` with one of the shipped launcher files."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(root / "accelerate_configs" / f"{launcher}.yaml")]
    command += [str(root / "recipes" / "summarization" / f"{stage}.py"), *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_launched_alone_gives_what_the_chain_gave(root, data, uninterrupted, tmp_path, stage):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / stage)
    given = [f"dataset={data}"] if stage == "corpus" else []
    done = launch(root, "cpu", stage, "--config", str(CHAIN), f"output_dir={run_dir}", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"finished: {run_dir / stage}" in done.stdout
    assert digests(run_dir) == digests(uninterrupted)


@pytest.mark.parametrize("stage", ["sft", *(pytest.param(s, marks=pytest.mark.slow) for s in TRAINED[1:])])
def test_two_processes_train_together(root, uninterrupted, tmp_path, stage):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / stage)
    words = ["--config", str(CHAIN), f"output_dir={run_dir}"]
    # the same examples a step: half of them in each process
    words += {"sft": ["batch_size=4"], "reward": ["batch_size=4"], "dpo": ["batch_size=4"], "ppo": []}[stage]
    done = launch(root, "cpu_ddp", stage, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"finished: {run_dir / stage}") == 1
    alone, together = (load_file(folder / stage / "model.safetensors") for folder in (uninterrupted, run_dir))
    worst = max(float(abs(alone[name] - together[name]).max()) for name in alone)
    assert worst < 1e-3, f"weights differ by {worst}"


def test_two_processes_show_a_mistake_once_and_end(root, uninterrupted, tmp_path):
    words = ["--config", str(CHAIN), f"output_dir={tmp_path / 'none'}"]
    done = launch(root, "cpu_ddp", "sft", *words)
    assert done.returncode != 0
    assert done.stderr.count("error: corpus=") == 1
    assert not (tmp_path / "none").exists()
