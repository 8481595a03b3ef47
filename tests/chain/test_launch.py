"""Every recipe through its real entry point, ``accelerate launch``: alone, and in two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.chain.conftest import CHAIN, digests

STAGES = ["corpus", "tokenizer", "sft", "preferences", "reward", "ppo", "dpo", "evaluate"]
# Five steps of each, without dropout (the generators of two processes are not those of one), the rate constant.
_STEPS = ["max_steps=5", "save_steps=5", "logging_steps=1", "lr_scheduler=constant", "warmup_ratio=0.0"]
TRAINED = {
    "sft": [*_STEPS, "copy_steps=2", "max_steps=3", "dropout=0.0"],
    "reward": [*_STEPS, "dropout=false"],
    "dpo": _STEPS,
    # three rollouts of two steps: six, the coefficient moving from one rollout to the next
    "ppo": ["rollouts=3", "ppo_epochs=1", "kl_horizon=100", "save_steps=2", "logging_steps=1"],
}


def launch(
    root: Path, launcher: str, stage: str, *words: str, ranks: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a recipe script by ``accelerate launch`` with a shipped launcher file; each process signs in ``ranks``."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(root / "accelerate_configs" / f"{launcher}.yaml")]
    command += [] if ranks is None else [str(Path(__file__).with_name("joined.py")), str(ranks)]
    command += [str(root / "recipes" / "summarization" / f"{stage}.py"), *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)


def without(stage: str, run: Path, copy: Path) -> Path:
    """A copy of a run in which a stage is yet to be done."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / stage)
    return copy


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["script", "accelerate"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_by_itself_gives_what_the_chain_gave(root, genalign, data, uninterrupted, tmp_path, stage, launched):
    """The recipe's script, run as it is and by ``accelerate launch``."""
    run_dir = without(stage, uninterrupted, tmp_path / "run")
    words = ["--config", str(CHAIN), f"output_dir={run_dir}", *([f"dataset={data}"] if stage == "corpus" else [])]
    if launched:
        done = launch(root, "cpu", stage, *words)
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        code, printed, errors = genalign.answer("--recipe", f"summarization/{stage}", *words, cwd=root)
    assert code == 0, errors[-3000:]
    assert f"finished: {run_dir / stage}" in printed
    assert digests(run_dir) == digests(uninterrupted)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow) if s != "ppo" else s for s in TRAINED])
def test_two_processes_do_what_one_does(root, genalign, uninterrupted, tmp_path, stage):
    """The same global batch in halves: the same weights to rounding, the same logs."""
    folders = {name: without(stage, uninterrupted, tmp_path / name) / stage for name in ("one", "two")}
    words = ["--config", str(CHAIN), *TRAINED[stage]]
    code, printed, errors = genalign.answer(
        "--recipe", f"summarization/{stage}", *words, f"output_dir={tmp_path / 'one'}", cwd=root
    )
    assert code == 0, printed + errors
    words += [] if stage == "ppo" else ["batch_size=4"]  # PPO's sizes are those of all processes together
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    done = launch(root, "cpu_ddp", stage, *words, f"output_dir={tmp_path / 'two'}", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    assert done.stdout.count(f"finished: {folders['two']}") == 1
    before = load_file(uninterrupted / "sft" / "model.safetensors")
    one, two = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert one.keys() == two.keys()
    worst = max(float(abs(one[name] - two[name]).max()) for name in one)
    assert worst <= 1e-5, f"weights differ by {worst}"
    shared = before.keys() & one.keys()
    if stage in ("dpo", "ppo"):
        assert max(float(abs(one[name] - before[name]).max()) for name in shared) > 1e-3  # it has learned something
    histories = [json.loads((folder / "log_history.json").read_text()) for folder in folders.values()]
    assert len(histories[0]) == len(histories[1]) > 2
    for first, second in zip(*histories, strict=True):
        for entry in (first, second):
            entry.pop("rewards/accuracies", None)  # at the reference both rewards are 0 but for rounding
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
    assert (folders["one"] / "samples.jsonl").exists() == (stage == "ppo")
    if stage == "ppo":
        samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in folders.values()]
        for first, second in zip(*(map(json.loads, lines) for lines in samples), strict=True):
            assert first.pop("reward") == pytest.approx(second.pop("reward"), abs=1e-4)
            assert first == second


def test_two_processes_show_a_mistake_once_and_end(root, uninterrupted, tmp_path):
    words = ["--config", str(CHAIN), f"output_dir={tmp_path / 'none'}"]
    done = launch(root, "cpu_ddp", "sft", *words)
    assert done.returncode != 0
    assert done.stderr.count("error: corpus=") == 1
    assert not (tmp_path / "none").exists()
