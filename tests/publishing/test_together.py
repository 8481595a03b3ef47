"""Stages that push when they are done, through their real entry points: two processes, and a chain."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chain.conftest import ForkServer, fork_server, write_corpus
from tests.publishing.conftest import TOKEN, environment
from tests.publishing.hub import Fault, Hub, account

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory):
    """A ForkServer whose children find the Hub."""
    with fork_server(Path(__file__).with_name("forked_push.py"), tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the tokenizer's stage is told: a small one, of a toy language."""
    data = write_corpus(tmp_path_factory.mktemp("data") / "toy")
    return [f"dataset={data}", "text_column=source", "summary_column=target", "vocab_size=256"]


class Launched:
    """How the two processes ended.

    Attributes:
        code: exit code of the launcher.
        printed: to standard output.
        errors: to standard error.
        ranks: ``RANK-of-WORLD`` of each process whose recipe came to its end.
        seconds: from start to end.
    """

    def __init__(self, code: int, printed: str, errors: str, folder: Path, seconds: float):
        self.code, self.printed, self.errors, self.seconds = code, printed, errors, seconds
        self.ranks = sorted(path.name for path in folder.iterdir())


def _launch(hub: Hub, forks: ForkServer | None, tmp_path: Path, words: list[str]) -> Launched:
    ranks = tmp_path / f"ranks{len(list(tmp_path.glob('ranks*')))}"
    ranks.mkdir()
    line = [
        "--config_file",
        str(ROOT / "accelerate_configs" / "cpu_ddp.yaml"),
        str(ROOT / "tests" / "chain" / "joined.py"),
    ]
    line += [str(ranks), str(ROOT / "recipes" / "summarization" / "tokenizer.py"), *words]
    variables = environment(hub, tmp_path / "hf") | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    if forks is not None:
        code, printed, errors = forks.answer("--launch", *line, env=variables)
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", *line]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=ROOT)
        code, printed, errors = done.returncode, done.stdout, done.stderr
    assert TOKEN not in printed + errors
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    return Launched(code, printed, errors, ranks, time.monotonic() - start)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "accelerate"])
def test_two_processes_push_once_and_end(
    hub: Hub, forks: ForkServer, words: list[str], tmp_path: Path, real: bool
) -> None:
    words = [*words, f"output_dir={tmp_path / 'words'}", "push_to_hub=true", "repo_id=ada/toy-{stage}", "private=true"]
    server = None if real else forks
    done = _launch(hub, server, tmp_path, words)
    assert done.code == 0, done.errors[-3000:]
    assert done.ranks == ["0-of-2", "1-of-2"]
    assert done.printed.count(f"pushed: {hub.url}/ada/toy-words/commit/") == 1
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= set(hub.files("ada/toy-words"))
    assert hub.repos["model", "ada/toy-words"].private
    assert len(hub.commits("ada/toy-words")) == 1

    # given again, the stage is finished and the push is there
    hub.requests.clear()
    assert _launch(hub, server, tmp_path, words).code == 0
    assert len(hub.commits("ada/toy-words")) == 1

    # the push fails on the main process: the other has ended, the stage is whole, and the line says how to go on
    hub.faults.append(Fault("/commit/", 403, times=-1, message="quota"))
    again = [w.replace("words", "more") if w.startswith("output_dir") else w for w in words]
    done = _launch(hub, server, tmp_path, again)
    assert done.code != 0
    assert done.errors.count("error: repo_id=ada/toy-more: the token may not write there (403: quota)") == 1
    assert f"genalign push {tmp_path / 'more'} --repo_id ada/toy-more --private" in done.errors
    assert "Traceback" not in done.errors.split("error: repo_id")[0]
    assert done.seconds < 250  # imports take long on a busy machine; a process that waits for ever takes longer
    assert (tmp_path / "more" / "stage.json").is_file()
    hub.faults.clear()
    command = [sys.executable, "-m", "pipelines.cli", "push", str(tmp_path / "more")]
    finished = subprocess.run(
        command, env=environment(hub, tmp_path / "hf"), capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr  # repository and rights are those the stage was told
    assert hub.repos["model", "ada/toy-more"].private
    assert (tmp_path / "more" / ".hub.json").is_file()

    # a token that may only read is found before anything is made, once
    hub.accounts[TOKEN] = account("ada", "read")
    done = _launch(
        hub, server, tmp_path, [w.replace("words", "none") if w.startswith("output_dir") else w for w in words]
    )
    assert done.code != 0
    assert len([line for line in done.errors.splitlines() if "may only read" in line]) == 1
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".none*"))


CHAIN = """
name: pushed
defaults: {{vocab_size: 256}}
stages:
  corpus: {{recipe: summarization/corpus, dataset: {data}, text_column: source, summary_column: target}}
  first: {{recipe: summarization/tokenizer, dataset: "${{corpus}}"}}
  second: {{recipe: summarization/tokenizer, dataset: "${{corpus}}", vocab_size: 260}}
"""


def test_a_chain_goes_on_when_a_push_fails(hub: Hub, forks: ForkServer, words: list[str], tmp_path: Path) -> None:
    chain = tmp_path / "pushed.yaml"
    chain.write_text(CHAIN.format(data=words[0].removeprefix("dataset=")))
    variables = environment(hub, tmp_path / "hf")
    line = ["run", str(chain), "--output_dir", str(tmp_path / "run"), "push_to_hub=true"]
    code, _, errors = forks.answer(*line, "repo_id=ada/toy", env=variables)
    assert code == 2
    assert "second.repo_id=ada/toy: first goes there too" in errors
    assert hub.requests == []
    hub.accounts[TOKEN] = account("bob")
    code, _, errors = forks.answer(*line, "repo_id=ada/toy-{stage}", env=variables)
    assert code == 2
    assert errors.count("ada is somebody else: the token is that of bob") == 2
    assert not (tmp_path / "run").exists()  # not a stage was run
    hub.accounts[TOKEN] = account("ada")
    hub.faults.append(Fault("toy-first/commit/", 403, times=-1, message="quota"))
    code, printed, errors = forks.answer(*line, "repo_id=ada/toy-{stage}", env=variables)
    assert code == 2
    assert f"`genalign push {tmp_path / 'run' / 'first'} --repo_id ada/toy-first`" in errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert printed.count("pushed: ") == 1
    assert "tokenizer.json" in hub.files("ada/toy-second")
    assert (tmp_path / "run" / "report.html").is_file()
    assert TOKEN not in printed + errors
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    hub.faults.clear()
    # all is made: only the push is missing
    code, printed, errors = forks.answer(*line, "repo_id=ada/toy-{stage}", env=variables)
    assert code == 0, errors
    assert printed.count("up to date") == 4  # three stages, and the run
    assert printed.count("pushed: ") == 1
    assert "tokenizer.json" in hub.files("ada/toy-first")
