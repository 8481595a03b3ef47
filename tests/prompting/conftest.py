"""A tiny model in a folder, and a real ``transformers serve`` process that serves it."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.chain.conftest import fork_server
from tests.prompting.tiny_causal import save, tiny_causal, tiny_tokenizer

HERE = Path(__file__).parent
SYLLABLES = "ba be bi bo da de di do fa fe ga go ka ko la le ma me na no pa pe ra re sa se ta te va vo".split()  # noqa: SIM905
KEY_NAME, KEY = "PROMPTING_TEST_KEY", "sk-9f8e7d6c-never-to-be-written"


@pytest.fixture(scope="session")
def prompting_cli(tmp_path_factory):
    """A ForkServer with the imports of the prompting stages done, and an endpoint's key in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_NAME, KEY)
        with fork_server(HERE / "forked_prompting.py", tmp_path_factory.mktemp("logs")) as server:
            yield server


def write_word_files(folder: Path) -> list[str]:
    """``key=value`` of a file of made-up nouns and one of text with made-up verbs and those nouns."""
    draw = random.Random(0)
    made = sorted({"".join(draw.choices(SYLLABLES, k=2)) + draw.choice("xtnmrdy") for _ in range(160)})
    nouns, verbs = made[::2], [word for word in made[1::2] if word[-1] in "tn"]
    (folder / "nouns.csv").write_text("word\n" + "\n".join(nouns) + "\n")
    with (folder / "text.jsonl").open("w") as file:
        for number in range(120):
            verb, some = verbs[number % len(verbs)], " ".join(draw.choices(nouns, k=4))
            document = f"{some} {verb} {verb}ed {verb}ing and {some.split()[0]}s"
            file.write(json.dumps({"document": document, "summary": f"{some} {number}"}) + "\n")
    return [f"dataset={folder / 'nouns.csv'}", f"text={folder / 'text.jsonl'}"]


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory) -> Path:
    """Thirty questions in CommonsenseQA's format, of three to five choices."""
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    with file.open("w") as lines:
        for n in range(30):
            labels = "ABCDE"[: 3 + n % 3]
            choices = [{"label": label, "text": f"{'thing' * (1 + i % 2)} {n + i}"} for i, label in enumerate(labels)]
            question = {"stem": f"Which thing is number {n}?", "choices": choices}
            lines.write(json.dumps({"id": f"q{n}", "answerKey": labels[n % len(labels)], "question": question}) + "\n")
    return file


@pytest.fixture(scope="session")
def nouns_file(tmp_path_factory) -> Path:
    """Some nouns, a few of them irregular."""
    file = tmp_path_factory.mktemp("nouns") / "nouns.csv"
    nouns = "cat dog box city child wolf lens hat cup key tree house man woman foot bus table chair fox lamp".split()  # noqa: SIM905
    file.write_text("word\n" + "\n".join(nouns) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved random Llama with a chat template."""
    tokenizer = tiny_tokenizer(chat=True)
    return save(
        tmp_path_factory.mktemp("models") / "tiny", tiny_causal("llama", len(tokenizer), positions=400), tokenizer
    )


@pytest.fixture(scope="session")
def served(tiny_folder, tmp_path_factory):
    """``url`` of the server, ``root`` without /v1, and ``model``, the name it goes by there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    words = ["serve", str(tiny_folder), "--device", "cpu", "--port", str(port), "--host", "127.0.0.1"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *words],
            stdout=file,
            stderr=file,
        )
    root = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{root}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        yield SimpleNamespace(url=f"{root}/v1", root=root, model=str(tiny_folder), log=log)
    finally:
        process.terminate()
        process.wait(timeout=30)


def pytest_collection_modifyitems(items):
    """Keep the tests that share the server, or the process with its imports done, in one worker each."""
    for item in items:
        for name in ("served", "prompting_cli"):
            if HERE in item.path.parents and name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(name))
