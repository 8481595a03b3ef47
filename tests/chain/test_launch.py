"""Every recipe through its real entry point, ``accelerate launch``: alone, and in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import T5Config, T5ForConditionalGeneration

from tests.chain.conftest import METHOD_STAGES, Whole, digests

STAGES = ["corpus", "tokenizer", "sft", "preferences", "reward", "ppo", "dpo", "evaluate", *METHOD_STAGES]
# Five steps of each, without dropout (the generators of two processes are not those of one), the rate constant.
_STEPS = ["max_steps=5", "save_steps=5", "logging_steps=1", "lr_scheduler=constant", "warmup_ratio=0.0"]
# Three rollouts of two steps.
_ROLLOUTS = ["rollouts=3", "save_steps=2", "logging_steps=1"]
TRAINED = {
    "sft": [*_STEPS, "copy_steps=2", "max_steps=3", "dropout=0.0"],
    "reward": [*_STEPS, "dropout=false", "eval_batch_size=3", "learning_rate=1e-3"],
    "dpo": [*_STEPS, "eval_batch_size=3"],
    "listwise": [*_STEPS, "eval_batch_size=3"],
    # the coefficient moves from one rollout to the next
    "ppo": [*_ROLLOUTS, "ppo_epochs=1", "kl_horizon=100"],
    "grpo": [*_ROLLOUTS, "group_epochs=1"],
    "rloo": [*_ROLLOUTS, "group_epochs=1"],
}
BY_ROLLOUTS = ("ppo", "grpo", "rloo")
# At the reference rewards differ by rounding alone; means over the tokens of a batch depend on what is in it.
_UNEQUAL = (
    "rewards/accuracies",
    "eval_entropy",
    "eval_mean_token_accuracy",
    "eval_logits/chosen",
    "eval_logits/rejected",
)


def script(root: Path, stage: str) -> str:
    """The recipe's script."""
    return str(root / "recipes" / "summarization" / f"{stage}.py")


@pytest.fixture
def launch(root, genalign):
    """Runs a script by ``accelerate launch`` with a shipped launcher file: exit code, what it printed, its errors.

    In new interpreters where ``real``, else in forks of one that has the imports done (see ``forkserver.launch``).
    """

    def run(launcher: str, *words: str, cwd: Path, real: bool) -> tuple[int, str, str]:
        words = ("--config_file", str(root / "accelerate_configs" / f"{launcher}.yaml"), *words)
        variables = {"ACCELERATE_USE_CPU": "true"}
        if not real:
            return genalign.answer("--launch", *words, cwd=cwd, env=variables)
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        environment = os.environ | variables
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=cwd)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "accelerate"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_by_itself_gives_what_the_chain_gave(root, launch, whole, tmp_path, stage, real):
    run_dir = whole.without(stage, tmp_path / "run")
    words = ["--config", str(whole.chain), f"output_dir={run_dir}", *(whole.words if stage == "corpus" else [])]
    code, printed, errors = launch("cpu", script(root, stage), *words, cwd=whole.home, real=real)
    assert code == 0, errors[-3000:]
    assert f"finished: {run_dir / stage}" in printed
    assert digests(run_dir) == digests(whole.folder)


def beginning(stage: str, whole: Whole, trained: Path) -> dict[str, np.ndarray]:
    """The weights that a stage's training began with, under the names of those it saved in its folder."""
    if stage == "sft":  # from scratch: seed 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fresh = T5ForConditionalGeneration(T5Config.from_pretrained(trained))
        return {name: value.numpy() for name, value in fresh.state_dict().items()}
    first = whole.home / "runs" / "tiny" / "sft" if stage in METHOD_STAGES else whole.folder / "sft"
    weights = load_file(first / "model.safetensors")
    return {f"backbone.{name}": value for name, value in weights.items()} if stage == "reward" else weights


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "accelerate"])
@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_do_what_one_does(root, genalign, launch, whole, tmp_path, stage, real):
    """The same global batch in halves: the same weights to rounding, the same logs."""
    folders = {name: whole.without(stage, tmp_path / name) / stage for name in ("one", "two")}
    words = ["--config", str(whole.chain), *TRAINED[stage]]
    code, printed, errors = genalign.answer(
        "--recipe", f"summarization/{stage}", *words, f"output_dir={tmp_path / 'one'}", cwd=whole.home
    )
    assert code == 0, printed + errors
    words += [] if stage in BY_ROLLOUTS else ["batch_size=4"]  # sizes of rollouts are those of all processes together
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    joined = [str(Path(__file__).with_name("joined.py")), str(ranks), script(root, stage)]
    code, printed, errors = launch(
        "cpu_ddp", *joined, *words, f"output_dir={tmp_path / 'two'}", cwd=whole.home, real=real
    )
    assert code == 0, errors[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    assert printed.count(f"finished: {folders['two']}") == 1
    before = beginning(stage, whole, folders["one"])
    one, two = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert one.keys() == two.keys()
    worst = max(float(abs(one[name] - two[name]).max()) for name in one)
    assert worst <= 1e-5, f"weights differ by {worst}"
    assert one.keys() - before.keys() == ({"score_head.weight"} if stage == "reward" else set())
    moved = max(float(abs(one[name] - before[name]).max()) for name in before if name in one)
    assert 1e-3 < moved < 1  # it has learned something, from there: two random beginnings are further apart
    histories = [json.loads((folder / "log_history.json").read_text()) for folder in folders.values()]
    assert len(histories[0]) == len(histories[1]) > 2
    for first, second in zip(*histories, strict=True):
        for entry in (first, second):
            for name in _UNEQUAL:
                entry.pop(name, None)
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
    assert any("eval_loss" in entry for entry in histories[0]) == (stage not in BY_ROLLOUTS)
    assert (folders["one"] / "samples.jsonl").exists() == (stage == "ppo")
    if stage == "ppo":
        samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in folders.values()]
        for first, second in zip(*(map(json.loads, lines) for lines in samples), strict=True):
            for name in ("reward", "kl"):
                assert first.pop(name) == pytest.approx(second.pop(name), abs=1e-4)
            assert first == second


def test_two_processes_show_a_mistake_once_and_end(root, launch, tmp_path):
    words = ["--config", str(root / "recipes" / "summarization" / "demo.yaml"), f"output_dir={tmp_path / 'none'}"]
    code, _, errors = launch("cpu_ddp", script(root, "sft"), *words, cwd=tmp_path, real=True)
    assert code != 0
    assert errors.count("error: corpus=") == 1
    assert not (tmp_path / "none").exists()
