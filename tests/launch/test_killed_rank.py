"""A process that dies takes the others with it, within a minute, and what they did is gone on with."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.chain.conftest import CHAIN, digests
from tests.launch.conftest import ROOT, accelerate, started

_TWO = ("--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml"))
_STEPS = ["copy_steps=2", "max_steps=14", "save_steps=4", "logging_steps=2", "batch_size=4"]


def wait_for(what, process, seconds: float, errors: Path):
    """What ``what()`` finds, once it finds something; the process must not end before."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, errors.read_text()[-3000:]
        assert time.monotonic() < until, errors.read_text()[-3000:]
        time.sleep(0.05)
    return found


def children(process) -> list[int]:
    """Every process below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, layer = [], [process.pid]
    while layer:
        layer = [child for child, parent in parents.items() if parent in layer]
        found += layer
    return found


def of_rank(rank: int, process) -> int | None:
    """The process of a rank below one, by the environment it was started with."""
    for child in children(process):
        try:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
        except OSError:
            continue
    return None


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def killed(process, victim: int, errors: Path) -> str:
    """Kill one by -9; all must end within a minute. Returns what was said."""
    family = children(process)
    assert victim in family
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    assert process.wait(timeout=60) != 0
    while any(alive(pid) for pid in family):
        assert time.monotonic() - start < 60, "a process outlived the one that was killed by a minute"
        time.sleep(0.05)
    return errors.read_text()


def checkpoint_in(run_dir: Path):
    return lambda: list((run_dir / ".sft.partial").glob("checkpoints/checkpoint-*/complete"))


class Forked:
    """A command line of the fork server's, with as much of ``subprocess.Popen`` as is used here."""

    def __init__(self, server, argv: list[str], folder: Path):
        self.server, self.ended = server, False
        variables = {"ACCELERATE_USE_CPU": "true"}
        self.pid = server.start(argv, errors=str(folder / "run.err"), env=variables, cwd=str(ROOT))

    def poll(self) -> int | None:
        return None if alive(self.pid) else 1

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while alive(self.pid):
            assert time.monotonic() < until, "the launcher did not end"
            time.sleep(0.02)
        self.ended, code = True, self.server.wait()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """A test that failed leaves nothing running, and no answer of the server's unread."""
        if not self.ended:
            for pid in [*children(self), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(timeout=60)


@pytest.mark.parametrize(
    ("rank", "real"),
    [(1, False), pytest.param(0, True, marks=pytest.mark.slow), pytest.param(1, True, marks=pytest.mark.slow)],
    ids=["second-forked", "first-accelerate", "second-accelerate"],
)
def test_under_accelerate_launch(begun, tmp_path, rank, real):
    run_dir, whole, errors = tmp_path / "run", tmp_path / "whole", tmp_path / "run.err"
    shutil.copytree(begun.folder, run_dir)
    shutil.copytree(begun.folder, whole)
    words = begun.words("sft", run_dir, *_STEPS)
    disturbed = [str(ROOT / "tests" / "launch" / "disturbed.py"), str(tmp_path / "ranks"), "0.2", *words]
    if real:
        opened = started(accelerate(*_TWO, *disturbed), tmp_path)
    else:
        opened = Forked(begun.server, ["--launch", *_TWO, *disturbed], tmp_path)
    with opened as process:
        wait_for(checkpoint_in(run_dir), process, 300, errors)
        said = killed(process, int((tmp_path / "ranks" / f"rank-{rank}").read_text()), errors)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said[-3000:]
    assert f"process={rank} of 2: process {1 - rank} lost the connection to it" in lines[0]
    assert not (run_dir / "sft").exists()
    assert list((run_dir / ".sft.partial").glob("checkpoints/checkpoint-*/complete"))
    for folder in (run_dir, whole):
        launch = [*_TWO, *begun.words("sft", folder, *_STEPS)]
        code, _, said = begun.server.answer("--launch", *launch, cwd=ROOT, env={"ACCELERATE_USE_CPU": "true"})
        assert code == 0, said[-3000:]
    assert digests(run_dir) == digests(whole)


@pytest.mark.slow
def test_under_genalign_run(begun, tmp_path):
    run_dir, errors = tmp_path / "run", tmp_path / "run.err"
    genalign = ["-m", "pipelines.cli", "run", str(CHAIN), "--output_dir", str(run_dir), "--until", "sft"]
    genalign += [f"dataset={begun.data}", "--launcher", "accelerate", *_TWO]
    genalign += [f"sft.{word}" for word in _STEPS if not word.startswith("max_steps")] + ["sft.max_steps=400"]
    command = [accelerate()[0], *genalign]
    shutil.copytree(begun.folder, run_dir)
    process = started(command, tmp_path)
    wait_for(checkpoint_in(run_dir), process, 180, errors)
    said = killed(process, wait_for(lambda: of_rank(1, process), process, 10, errors), errors)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, said[-3000:]
    assert lines[0].startswith("error: process=1 of 2: process 0 lost the connection to it")
    assert lines[1].startswith("error: sft=")
    assert "ended with exit code 1" in lines[1]
    again = started(command, tmp_path, "again")
    assert again.wait(timeout=300) == 0, (tmp_path / "again.err").read_text()[-3000:]
    whole = tmp_path / "whole"
    shutil.copytree(begun.folder, whole)
    command[command.index(str(run_dir))] = str(whole)
    undisturbed = started(command, tmp_path, "whole")
    assert undisturbed.wait(timeout=300) == 0
    assert digests(run_dir) == digests(whole)
