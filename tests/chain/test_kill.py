"""Killed with -9 in the middle of each stage and started again, a chain ends exactly as if nothing had happened."""

import os
import random
import shutil
import signal
import time

import pytest

from tests.chain.conftest import CHAIN, digests

# Where each stage is killed: at the n-th opening for writing of a path that matches.
KILLS = {
    "corpus": (r"/\.corpus\.partial/.*dataset_info\.json$", 2),
    "tokenizer": (r"/\.tokenizer\.partial/tokenizer_config\.json$", 1),
    "sft": (r"/\.sft\.partial/.*/checkpoint-\d+/trainer_state\.json$", 3),
    "preferences": (r"/\.preferences\.partial/", 4),
    "reward": (r"/\.reward\.partial/.*/checkpoint-\d+/trainer_state\.json$", 2),
    "ppo": (r"/\.ppo\.partial/.*/checkpoint-\d+/trainer_state\.json$", 2),
    "dpo": (r"/\.dpo\.partial/.*/checkpoint-\d+/trainer_state\.json$", 2),
    "evaluate": (r"/\.evaluate\.partial/", 4),
}


def test_kill_in_the_middle_of_every_stage(genalign, data, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir)]
    for stage, kill in KILLS.items():
        code, printed = genalign.run(*argv, kill=kill)
        assert code == -signal.SIGKILL, f"{stage} was not killed:\n{printed}"
        assert not (run_dir / stage).exists(), f"{stage} was finished before it could be killed"
        assert (run_dir / f".{stage}.partial").is_dir()
    code, printed = genalign.run(*argv)
    assert code == 0, printed
    assert digests(run_dir) == digests(uninterrupted)
    assert not list(run_dir.glob(".*.partial"))


def test_training_stages_went_on_from_a_checkpoint(genalign, data, uninterrupted, tmp_path):
    # only then do the comparisons above say something about resuming rather than about starting afresh
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir)]
    for stage in ("sft", "reward", "ppo", "dpo"):
        code, _ = genalign.run(*argv, "--force", stage, kill=KILLS[stage])
        assert code == -signal.SIGKILL
        whole = sorted((run_dir / f".{stage}.partial").rglob("checkpoint-*/complete"))
        torn = [p for p in (run_dir / f".{stage}.partial").rglob("checkpoint-*") if not (p / "complete").exists()]
        assert whole, f"{stage} had no whole checkpoint when it was killed"
        assert torn, f"{stage} was not in the middle of writing a checkpoint"
        shutil.rmtree(run_dir / f".{stage}.partial")


@pytest.mark.slow
def test_killed_at_random_moments(genalign, data, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir)]
    draw = random.Random(7)
    killed = 0
    for _ in range(6):
        pid = genalign.start(argv)
        time.sleep(draw.uniform(0.2, 2.5))
        os.kill(pid, signal.SIGKILL)
        killed += genalign.wait() == -signal.SIGKILL
    assert killed >= 1
    code, printed = genalign.run(*argv)
    assert code == 0, printed
    assert digests(run_dir) == digests(uninterrupted)


def test_a_finished_run_has_nothing_to_do(genalign, data, uninterrupted):
    before = digests(uninterrupted)
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(uninterrupted)]
    code, printed = genalign.run(*argv)
    assert code == 0
    assert "nothing to do" in printed
    assert digests(uninterrupted) == before
