"""Raw documents of a file, a folder or the hub, read one at a time: no more than one of them is ever in memory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.corpus.fields import TextFields
from pipelines.corpus.local import text_of
from pipelines.corpus.readers import SPLIT_NAMES, decode, json_lines
from pipelines.errors import UserError

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
CHUNK_BYTES = 1 << 20
"""A longer text file is several documents: it is cut at the last blank line (else line end) within so many bytes."""

Document = tuple[str | None, str, str]
"""``(split, source, text)``; the split is None where the set does not name it."""


def documents(fields: TextFields) -> Iterator[Document]:
    """The documents that ``fields.text`` names, in their order there.

    A hub data set that has a validation split of its own keeps it.

    Raises:
        UserError: nothing to read, a file that is not UTF-8 or not JSON lines, no such column; with file and line.
    """
    path = Path(fields.text).expanduser()
    if path.is_file() or path.is_dir() or path.suffix.lower() in SUFFIXES:
        found: Iterable[Document] = ((None, *item) for item in _of_files(_files(path), fields.raw_column))
    else:
        found = _of_hub(fields)
    return islice(found, fields.max_documents)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise UserError("text", path, f"holds no {', '.join(SUFFIXES)} files", "give a folder of texts")
        return files
    if not path.is_file():
        raise UserError("text", path, "no such file", "mend the path")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError("text", path, "unknown kind of file", f"give one of {', '.join(SUFFIXES)}, or a folder of them")
    return [path]


def _of_files(files: list[Path], column: str) -> Iterator[tuple[str, str]]:
    for path in files:
        try:
            if path.suffix.lower() == ".jsonl":
                for place, row in json_lines(path, "text"):
                    yield place, _cell(row, column, place)
            else:
                for _, place, text in of_text_file(path):
                    yield place, text
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
            raise UserError("text", path, problem, "give a readable file") from None


def of_text_file(path: Path, at: int = 0) -> Iterator[tuple[int, str, str]]:
    """The documents of a text file: where the next one begins in bytes, file and line, the text.

    Args:
        path: of the file.
        at: where to begin, as an earlier reading said.

    Raises:
        UserError: not UTF-8, with the line.
    """
    with path.open("rb") as file:
        left, line = b"", 1
        for start in range(0, at, CHUNK_BYTES):
            line += file.read(min(CHUNK_BYTES, at - start)).count(b"\n")
        while True:
            block = left + file.read(CHUNK_BYTES - len(left))
            if not block:
                return
            end = len(block)
            if end == CHUNK_BYTES:
                end = block.rfind(b"\n\n") + 2
                end = end if end > 1 else block.rfind(b"\n") + 1
                # Where there is no line end either, the cut must at least not fall into a character of UTF-8.
                end = end or next((i for i in range(len(block) - 1, 0, -1) if block[i] & 0xC0 != 0x80), len(block))
            text = decode(block[:end], path, "text", line).strip()
            at += end
            if text:
                yield at, f"{path} line {line}", text
            line += block.count(b"\n", 0, end)
            left = block[end:]


def _cell(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        near = difflib.get_close_matches(column, map(str, row), n=1)
        has = ", ".join(map(repr, row)) or "none"
        problem = f"no such column in {place} (it has: {has})"
        raise UserError("raw_column", column, problem, f"pass raw_column={near[0] if near else 'NAME'}")
    return text_of(row[column], column, place, "text")


def _of_hub(fields: TextFields) -> Iterator[Document]:
    import datasets

    try:
        loaded = datasets.load_dataset(fields.text, fields.text_config, streaming=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"no such file or folder, and the hub gave no such dataset ({reason})"
        mend = "mend the path, or check the hub id, text_config and the network"
        raise UserError("text", fields.text, problem, mend) from None
    named = {split: next((n for n in names if n in loaded), None) for split, names in SPLIT_NAMES.items()}
    if named["train"] is None:
        problem = f"has no training split (it has: {', '.join(map(str, loaded))})"
        raise UserError("text", fields.text, problem, "give a data set that has one")

    def texts(split: str) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(loaded[named[split]], 1):
            place = f"{fields.text} {named[split]} row {number}"
            yield place, _cell(row, fields.raw_column, place)

    if named["validation"] is None:
        yield from ((None, *item) for item in texts("train"))
        return
    # Held-out text first: a limit on the documents read must leave some of it.
    held_out = max(1, round(fields.text_validation_fraction * fields.max_documents)) if fields.max_documents else None
    for split, limit in (("validation", held_out), ("train", None)):
        for source, text in islice(texts(split), limit):
            yield split, source, text
