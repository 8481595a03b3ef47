"""SFT, then DPO, on two machines: the weights of one machine; and a cut between the two ends both with a line."""

import shutil
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.launch.conftest import ROOT, accelerate, started
from tests.launch.machines import ADDRESSES, two_machines, why_not

pytestmark = pytest.mark.slow

_FILES = ("--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml"), "--num_processes", "2")
_OF = {
    "sft": ["copy_steps=2", "max_steps=20", "save_steps=4", "logging_steps=2", "batch_size=4", "dropout=0.0"],
    "dpo": ["max_steps=8", "save_steps=4", "logging_steps=2", "batch_size=4"],
}


@pytest.fixture(scope="module")
def machines():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_machines() as both:
        yield both


def both_halves(machines, words: list[str], folder: Path) -> list:
    """Start a recipe's halves on the two machines."""
    folder.mkdir(exist_ok=True)
    halves = []
    for number in range(2):
        launch = accelerate(*_FILES, "--machine_rank", str(number), "--main_process_ip", ADDRESSES[0], *words)
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        halves.append(machines.start(number, launch, folder, **variables))
    return halves


def ended(halves: list, folder: Path, seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes and errors of both, which must end in time."""
    codes, until = [], time.monotonic() + seconds
    for half in halves:
        codes.append(half.wait(timeout=max(0.1, until - time.monotonic())))
    return codes, [(folder / f"machine-{number}.err").read_text() for number in range(2)]


def weights_differ_by(one: Path, other: Path) -> float:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float(abs(first[name] - second[name]).max()) for name in first)


@pytest.fixture(scope="module")
def one_machine(preferred, tmp_path_factory) -> Path:
    """SFT, then DPO, by two processes of one machine."""
    home = tmp_path_factory.mktemp("one_machine")
    run_dir = home / "run"
    shutil.copytree(preferred.folder, run_dir)
    shutil.rmtree(run_dir / "sft")
    for stage, more in _OF.items():
        file = str(ROOT / "accelerate_configs" / "cpu_ddp.yaml")
        done = started(accelerate("--config_file", file, *preferred.words(stage, run_dir, *more)), home)
        assert done.wait(timeout=300) == 0, (home / "run.err").read_text()[-3000:]
    return run_dir


def test_sft_then_dpo_end_as_on_one_machine(machines, preferred, one_machine, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(preferred.folder, run_dir)
    before = load_file(run_dir / "sft" / "model.safetensors")
    shutil.rmtree(run_dir / "sft")
    for stage, more in _OF.items():
        halves = both_halves(machines, preferred.words(stage, run_dir, *more), tmp_path / stage)
        codes, errors = ended(halves, tmp_path / stage, 300)
        assert codes == [0, 0], errors
        printed = [(tmp_path / stage / f"machine-{number}.out").read_text() for number in range(2)]
        assert [text.count(f"finished: {run_dir / stage}") for text in printed] == [1, 0]
        assert weights_differ_by(run_dir / stage, one_machine / stage) <= 1e-5
    after = load_file(run_dir / "dpo" / "model.safetensors")
    assert max(float(abs(after[name] - before[name]).max()) for name in after) > 1e-3  # there was something to learn


def test_a_cut_ends_both_with_one_line_and_the_run_goes_on(machines, preferred, one_machine, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(preferred.folder, run_dir)
    shutil.rmtree(run_dir / "sft")
    words = preferred.words("sft", run_dir, *_OF["sft"])
    disturbed = [str(ROOT / "tests" / "launch" / "disturbed.py"), str(tmp_path / "ranks"), "0.5", *words]
    halves = both_halves(machines, disturbed, tmp_path / "cut")
    checkpoints = run_dir / ".sft.partial" / "checkpoints"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/complete")):
        assert time.monotonic() < until, "no checkpoint was written"
        assert all(half.poll() is None for half in halves), (tmp_path / "cut" / "machine-0.err").read_text()[-3000:]
        time.sleep(0.1)
    machines.cut()
    cut = time.monotonic()
    try:
        codes, errors = ended(halves, tmp_path / "cut", 120)
    finally:
        machines.mend()
    assert time.monotonic() - cut < 60
    assert all(codes)
    assert not (run_dir / "sft").exists()
    for number, text in enumerate(errors):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, text[-3000:]
        assert f"process={1 - number} of 2: process {number} lost the connection to it" in lines[0]
        assert "the same command goes on from the last checkpoint" in lines[0]
    halves = both_halves(machines, words, tmp_path / "again")
    codes, errors = ended(halves, tmp_path / "again", 300)
    assert codes == [0, 0], errors
    assert weights_differ_by(run_dir / "sft", one_machine / "sft") <= 1e-5
