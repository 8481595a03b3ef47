"""A whole chain on a toy language, small enough to run many times."""

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHAIN = HERE / "tiny.yaml"
METHODS = HERE / "methods.yaml"
METHOD_STAGES = ("listwise", "grpo", "rloo", "best_of_n")
_WORDS = "amber birch cedar delta ember fjord grove heath inlet juniper kelp larch maple north oak pine".split()  # noqa: SIM905 - easier to read


def write_corpus(folder: Path, examples: int = 96) -> Path:
    """Documents of 10 to 16 words; the summary is the document's first four (two references in the held-out files)."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", examples), ("validation", 16), ("test", 24)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                words = [draw.choice(_WORDS) for _ in range(draw.randint(10, 16))]
                summary = " ".join(words[:4]) + "."
                target = summary if split == "train" else [summary, " ".join(words[:5])]
                sentences = [" ".join(words[:8]) + ".", " ".join(words[8:]) + "."]
                file.write(json.dumps({"source": sentences, "target": target}) + "\n")
    return folder


def digests(run_dir: Path) -> dict[str, str]:
    """The content of everything a run is judged by: metrics, weights, logs, samples and predictions."""
    kinds = ("metrics.json", "*/*.safetensors", "*/log_history.json", "*/*.jsonl", "*/calibration.json")
    files = sorted(file for kind in kinds for file in run_dir.glob(kind))
    return {str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@dataclass
class ForkServer:
    """Starts ``genalign`` in children of a process that has the imports done."""

    process: subprocess.Popen
    logs: Path

    def start(self, argv: list[str], **request) -> int:
        """Start a command line; returns the child's process id."""
        request |= {"argv": argv, "log": str(self.logs / "child.log")}
        (self.logs / "child.log").unlink(missing_ok=True)
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()["pid"]

    def wait(self) -> int:
        """The exit code of the child, negative where a signal killed it."""
        return self._answer()["code"]

    def run(
        self,
        *argv: str,
        kill: tuple[str, int] | None = None,
        kill_at_step: int | None = None,
        cwd: Path | None = None,
    ) -> tuple[int, str]:
        """Run a command line to its end in the folder ``cwd``; returns its exit code and all it printed."""
        self.start(list(argv), kill=kill, kill_at_step=kill_at_step, cwd=cwd and str(cwd))
        code = self.wait()
        return code, (self.logs / "child.log").read_text(encoding="utf-8", errors="replace")

    def answer(self, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Run a command line to its end in the folder ``cwd``; returns exit code, standard output, standard error.

        With ``--recipe family/stage`` in front, it is the command line of that recipe's script; with ``--launch``, what
        stands after ``accelerate launch``.
        """
        files = [self.logs / "child.out", self.logs / "child.err"]
        for file in files:
            file.unlink(missing_ok=True)
        request = {"argv": list(argv), "log": str(files[0]), "errors": str(files[1]), "cwd": cwd and str(cwd)}
        request["env"] = env
        print(json.dumps(request), file=self.process.stdin, flush=True)
        self._answer()
        code = self.wait()
        return code, *(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)


@contextlib.contextmanager
def fork_server(script: Path, logs: Path) -> Iterator[ForkServer]:
    """A ForkServer in whose process ``script`` has done its imports."""
    with (logs / "server.log").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        yield ForkServer(process, logs)
        process.stdin.close()
        process.wait(timeout=120)


@pytest.fixture(scope="session")
def genalign(tmp_path_factory):
    """A ForkServer for the session."""
    with fork_server(HERE / "forkserver.py", tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The folder of the toy language's train, validation and test files."""
    return write_corpus(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="session")
def uninterrupted(genalign, data, tmp_path_factory) -> Path:
    """The folder of a whole run that nothing disturbed. Tests must not change it: they copy it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, printed = genalign.run("run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir))
    assert code == 0, printed
    return run_dir


@pytest.fixture(scope="session")
def methods(genalign, uninterrupted, tmp_path_factory) -> Path:
    """The folder of a whole run of the other methods; ``runs/tiny``, which they begin with, lies beside it."""
    home = tmp_path_factory.mktemp("methods")
    shutil.copytree(uninterrupted, home / "runs" / "tiny")
    code, printed = genalign.run("run", str(METHODS), "--output_dir", "runs/methods", cwd=home)
    assert code == 0, printed
    return home / "runs" / "methods"


@dataclass
class Whole:
    """A whole run that nothing disturbed: its chain, what was said beside it, its folder, and where it was started."""

    chain: Path
    words: list[str]
    folder: Path
    home: Path

    def without(self, stage: str, copy: Path) -> Path:
        """A copy of the run in which a stage is yet to be done."""
        shutil.copytree(self.folder, copy)
        shutil.rmtree(copy / stage)
        return copy


@pytest.fixture
def whole(stage, request) -> Whole:
    """The run of the chain that has the stage that a test is about."""
    if stage in METHOD_STAGES:
        folder = request.getfixturevalue("methods")
        return Whole(METHODS, [], folder, folder.parents[1])
    folder = request.getfixturevalue("uninterrupted")
    return Whole(CHAIN, [f"dataset={request.getfixturevalue('data')}"], folder, folder.parent)


def pytest_collection_modifyitems(items):
    """Keep the chain's tests in one worker: they share a run that takes long to make."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("chain"))
