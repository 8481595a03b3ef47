"""Killed with -9 at random steps and started again, each training stage ends with the same bits, resuming each time."""

import json
import random
import shutil
import signal

import pytest

from tests.chain.conftest import CHAIN, digests

# Steps of the whole run, steps between two checkpoints, and what to override. Of PPO's four steps a rollout every third
# is saved, so that checkpoints lie in the middle of a rollout's epochs too.
STAGES = {
    "sft": (180, 40, []),
    "reward": (12, 4, []),
    "ppo": (24, 3, ["ppo.save_steps=3", "ppo.logging_steps=1"]),
    "dpo": (12, 4, []),
}


QUICK = {("sft", 0), ("ppo", 0)}


@pytest.mark.parametrize(
    ("stage", "seed"),
    [
        pytest.param(stage, seed, marks=[] if (stage, seed) in QUICK else pytest.mark.slow)
        for stage in STAGES
        for seed in range(3)
    ],
)
def test_killed_at_random_steps(genalign, data, uninterrupted, tmp_path, stage, seed):
    steps, between, words = STAGES[stage]
    draw = random.Random(f"{stage} {seed}")
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / stage)
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir), "--until", stage, *words]
    done = 0  # steps that the newest checkpoint holds
    for longest in (steps // 2, steps):
        kill = draw.randint(between + 1, longest - done)
        code, printed = genalign.run(*argv, kill_at_step=kill)
        assert code == -signal.SIGKILL, f"{stage} was not killed:\n{printed[-2000:]}"
        assert not (run_dir / stage).exists()
        whole = list((run_dir / f".{stage}.partial").rglob("checkpoint-*/complete"))
        newest = max(int(path.parent.name.rpartition("-")[2]) for path in whole)
        # only where it went on from the newest checkpoint does it get so far in so many steps
        assert newest == done + (kill - 1) // between * between
        done = newest
    code, printed = genalign.run(*argv)
    assert code == 0, printed[-2000:]
    whole, again = ({k: v for k, v in digests(d).items() if k.startswith(stage)} for d in (uninterrupted, run_dir))
    assert whole == again
    assert len(again) >= 2
    if stage == "ppo":
        history = json.loads((run_dir / "ppo" / "log_history.json").read_text())
        assert len({entry["objective/kl_coefficient"] for entry in history}) == 6  # the coefficient moved every time
        samples = [(folder / "ppo" / "samples.jsonl").read_text() for folder in (uninterrupted, run_dir)]
        assert samples[0] == samples[1]
