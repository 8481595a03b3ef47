"""Killed with -9 at random steps and started again, each training stage ends with the same bits, resuming each time."""

import json
import random
import signal

import pytest

from tests.chain.conftest import digests

# Steps of the whole run, steps between two checkpoints, and what to override. Of the four steps of a rollout every
# third is saved, so that checkpoints lie in the middle of a rollout's epochs.
_ROLLOUTS = (24, 3, [])
STAGES = {
    "sft": (180, 40, []),
    "reward": (12, 4, []),
    "dpo": (12, 4, []),
    "listwise": (12, 3, []),
    "ppo": _ROLLOUTS,
    "grpo": _ROLLOUTS,
    "rloo": _ROLLOUTS,
}
STEPS_OF_A_ROLLOUT = 4
QUICK = {("sft", 0), ("listwise", 0), ("ppo", 0), ("grpo", 0)}


@pytest.mark.parametrize(
    ("stage", "seed"),
    [
        pytest.param(stage, seed, marks=[] if (stage, seed) in QUICK else pytest.mark.slow)
        for stage in STAGES
        for seed in range(3)
    ],
)
def test_killed_at_random_steps(genalign, whole, tmp_path, stage, seed):
    steps, between, words = STAGES[stage]
    draw = random.Random(f"{stage} {seed}")
    run_dir = whole.without(stage, tmp_path / "run")
    argv = ["run", str(whole.chain), *whole.words, "--output_dir", str(run_dir), "--until", stage]
    argv += [f"{stage}.{word}" for word in words]
    done = 0  # steps that the newest checkpoint holds
    for longest in (steps // 2, steps):
        kill = draw.choice([k for k in range(between + 1, longest - done + 1) if _inside(stage, done, k, between)])
        code, printed = genalign.run(*argv, kill_at_step=kill, cwd=whole.home)
        assert code == -signal.SIGKILL, f"{stage} was not killed:\n{printed[-2000:]}"
        assert not (run_dir / stage).exists()
        complete = list((run_dir / f".{stage}.partial").rglob("checkpoint-*/complete"))
        newest = max(int(path.parent.name.rpartition("-")[2]) for path in complete)
        # only where it went on from the newest checkpoint does it get so far in so many steps
        assert newest == _newest(done, kill, between)
        done = newest
    code, printed = genalign.run(*argv, cwd=whole.home)
    assert code == 0, printed[-2000:]
    once, again = ({k: v for k, v in digests(d).items() if k.startswith(f"{stage}/")} for d in (whole.folder, run_dir))
    assert once == again
    assert len(again) >= 2
    if stage == "ppo":
        history = json.loads((run_dir / "ppo" / "log_history.json").read_text())
        assert len({entry["objective/kl_coefficient"] for entry in history}) == 6  # the coefficient moved every time
        assert "ppo/samples.jsonl" in again


def _newest(done: int, kill: int, between: int) -> int:
    """The step of the newest checkpoint when a run that went on from step ``done`` dies in its ``kill``-th."""
    return done + (kill - 1) // between * between


def _inside(stage: str, done: int, kill: int, between: int) -> bool:
    """Whether both the kill and the checkpoint that it leaves lie in the middle of a rollout's epochs, if there are."""
    where = (done + kill - 1, _newest(done, kill, between))
    return STAGES[stage] is not _ROLLOUTS or all(step % STEPS_OF_A_ROLLOUT for step in where)
