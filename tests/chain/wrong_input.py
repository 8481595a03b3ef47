"""What the table of wrong input is made of: where a case lives, what it does wrong, what must be said about it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chain.conftest import CHAIN


@dataclass
class Wrong:
    """A command line with mistakes in it.

    Args:
        argv: words after ``genalign``; with ``--recipe family/stage`` in front, the command line of that script.
        says: one line for each mistake, in order, ``what=value: problem; mend``; ``…`` stands for any text.
    """

    argv: list[str]
    says: list[str]


@dataclass
class At:
    """Where a case lives.

    Args:
        folder: its own; the command line is started in it.
        data: the toy corpus.
        run: a whole run, not to be changed.
        stack: what must be undone afterwards.
    """

    folder: Path
    data: Path
    run: Path
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def out(self) -> Path:
        """The output folder; it is not there unless the case makes it."""
        return self.folder / "out"

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the case's folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def lines(self, name: str, *rows: object) -> Path:
        """A file of JSON lines; text is put in as it is."""
        return self.write(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def chain(self, *words: str) -> list[str]:
        """The command line of the tiny chain on the toy corpus."""
        return ["run", str(CHAIN), f"dataset={self.data}", "--output_dir", str(self.out), *words]

    def recipe(self, name: str, *words: str) -> list[str]:
        """The command line of a recipe's script with the settings that the tiny chain gives it."""
        return ["--recipe", f"summarization/{name}", f"output_dir={self.out}", *words]

    def corpus(self, source: Path | str, *words: str) -> list[str]:
        """The command line that reads data with the toy corpus's columns."""
        return self.recipe("corpus", f"dataset={source}", "text_column=source", "summary_column=target", *words)

    def judge(self, body: str) -> str:
        """A user's own scoring function; returns its name."""
        self.write("judge.py", f"def score(documents, summaries, references):\n    {body}\n")
        return "judge:score"

    def model(self, *, without: str = "", stage: str = "sft") -> Path:
        """A copy of the fine-tuned model, some of its files left out."""
        folder = self.folder / "model"
        leave = shutil.ignore_patterns(*without.split(), "stage.json", "logs")
        shutil.copytree(self.run / stage, folder, ignore=leave)
        return folder

    def mount(self, options: str) -> None:
        """Put a small file system of its own at ``out``."""
        self.out.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.out], capture_output=True).returncode:
            pytest.skip("a small file system can only be mounted by root, where mounting is allowed")
        self.stack.callback(subprocess.run, ["umount", self.out], check=False)

    def held(self) -> None:
        """Let another process write into ``out``."""
        code = "import sys; from pathlib import Path; from pipelines.stage import locked\n"
        code += "with locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
        words = [sys.executable, "-c", code, str(self.out)]
        holder = self.stack.enter_context(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert holder.stdout.readline() == "\n"


KINDS: dict[str, Callable[[At], Wrong]] = {}


def kind(case: Callable[[At], Wrong]) -> Callable[[At], Wrong]:
    """Put a case into the table, under its function's name."""
    assert case.__name__ not in KINDS
    KINDS[case.__name__] = case
    return case


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder and what is in it (Python's own cache of a user's module aside)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path.relative_to(folder))] = content
    return found


def errors_in(printed: str) -> list[str]:
    """The lines of standard error that name a mistake (progress bars and warnings of libraries stand there too)."""
    return [line.removeprefix("error: ") for line in re.split(r"[\n\r]", printed) if line.startswith("error: ")]


def fits(line: str, said: str) -> bool:
    """Whether a line is what was to be said."""
    return re.fullmatch(".*".join(re.escape(part) for part in said.split("…")), line) is not None
