"""Sets of any size, read row by row from any place: files cut into pieces, saved data sets, the Hub.

A piece is a stretch of a set that can be read without what comes before it: a mebibyte of a .jsonl file, a row group of
a .parquet file, a thousand rows of a saved data set, a shard on the Hub; files that can only be read from their
beginning (.csv, .tsv, .gz, .txt) are one piece each. A place within a piece is one number, so that reading goes on
exactly there.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.config import glob_files
from pipelines.corpus.readers import SPLIT_NAMES, is_saved, load_saved, type_of
from pipelines.errors import UserError

PIECE_BYTES = 2**20
_PIECE_ROWS = 1000
_PARQUET_ROWS = 256
ROW_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".rst")

Row = tuple[int, Any, dict[str, Any] | UserError]
"""Where the row after it stands in its piece; where it stands, for messages; the row, or what is wrong with it."""


class Pieces(Protocol):
    """One split of a set.

    Attributes:
        what: configuration field that named the set, for messages.
        source: file, folder, pattern or hub id, as the user wrote it.
        typed: False where every value is text by nature (CSV).
    """

    what: str
    source: str
    typed: bool

    def __len__(self) -> int:
        """How many pieces there are."""

    def rows(self, piece: int, at: int) -> Iterator[Row]:
        """The rows of a piece from the place ``at`` on; 0 is its beginning.

        Raises:
            UserError: not readable, or malformed, with the line.
        """


class Line:
    """A place in a file of lines; its number is counted only where it is shown.

    Args:
        path: the file, perhaps compressed.
        offset: bytes before the line, in the text itself.
    """

    def __init__(self, path: Path, offset: int):
        self.path, self.offset = path, offset

    def __str__(self) -> str:
        number, left = 1, self.offset
        with _open(self.path) as file:
            while left and (block := file.read(min(left, PIECE_BYTES))):
                number, left = number + block.count(b"\n"), left - len(block)
        return f"{self.path} line {number}"

    __repr__ = __str__


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


# --- files ------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, start: int, stop: int | None, at: int, what: str) -> Iterator[Row]:
    # Places are counted from the beginning of the file; a piece has the lines that begin in it.
    with _open(path) as file:
        if at:
            file.seek(at)
        elif start:
            file.seek(start - 1)
            file.readline()
        at = file.tell()
        while stop is None or at < stop:
            raw = file.readline()
            if not raw:
                return
            line, at = Line(path, at), at + len(raw)
            if raw.strip():
                yield at, line, _parsed(raw, line, what)


def _decoded(raw: bytes, line: Line, what: str) -> str:
    try:
        return raw.decode("utf-8-sig" if line.offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})"
        raise UserError(what, line, problem, "save the file as UTF-8") from None


def _parsed(raw: bytes, line: Line, what: str) -> dict[str, Any] | UserError:
    try:
        text = _decoded(raw, line, what)
    except UserError as error:
        return error
    if line.offset == 0 and text.lstrip()[:1] == "[":
        mend = "write JSON lines: one object a line"
        raise UserError(what, line, "a JSON list cannot be read row by row", mend)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        return UserError(what, line, f"not valid JSON ({reason})", "mend or drop that line")
    if not isinstance(row, dict):
        mend = 'write {"column": "text", …} on each line'
        return UserError(what, line, f"{type_of(row)}, not an object with columns", mend)
    return row


class _Lines:
    """The decoded lines of a file, and how many bytes they took."""

    def __init__(self, file: Any, path: Path, what: str):
        self.file, self.path, self.what, self.at = file, path, what, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self.file.readline()
        if not raw:
            raise StopIteration
        text = _decoded(raw, Line(self.path, self.at), self.what)
        self.at += len(raw)
        return text


def _csv(path: Path, start: int, stop: int | None, at: int, what: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        lines = _Lines(file, path, what)
        delimiter = "\t" if ".tsv" in _suffix(path) else ","
        reader, place = csv.reader(lines, delimiter=delimiter, strict=True), Line(path, 0)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                problem = f"the column {twice[0]!r} stands twice"
                raise UserError(what, place, problem, "give each column its own name")
            if at:
                file.seek(at)
                lines.at = at
            place = Line(path, lines.at)
            for cells in reader:
                if cells and len(cells) != len(header):
                    problem = f"{len(cells)} cells under {len(header)} column names"
                    mend = "quote texts that hold the delimiter or line breaks"
                    yield lines.at, place, UserError(what, place, problem, mend)
                elif cells:
                    yield lines.at, place, dict(zip(header, cells, strict=True))
                place = Line(path, lines.at)
        except csv.Error as error:
            raise UserError(what, place, f"not valid CSV ({error})", "mend that line") from None


def _parquet(path: Path, start: int, stop: int | None, at: int, what: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A buffer, or a whole column of the row group would be in memory.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=PIECE_BYTES, pre_buffer=False)
        seen = 0
        with file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[start], use_threads=False):
                begin, seen = seen, seen + batch.num_rows
                if seen <= at:
                    continue
                left = batch.slice(max(0, at - begin)).to_pylist()
                for number, row in enumerate(left, max(at, begin) + 1):
                    yield number, f"{path} row group {start + 1} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(what, path, f"not a readable Parquet file ({reason})", "write the file again") from None


def _text(path: Path, start: int, stop: int | None, at: int, what: str) -> Iterator[Row]:
    from pipelines.corpus.documents import of_text_file

    for after, place, text in of_text_file(path, at):
        yield after, place, {"text": text}


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json.gz": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    **dict.fromkeys(TEXT_SUFFIXES, _text),
}


class FilePieces:
    """Files of rows, one set together.

    Args:
        paths: of them, in order.
        what: configuration field that named them.
        source: as the user wrote it.

    Raises:
        UserError: of an unknown kind, empty, not readable.
    """

    def __init__(self, paths: Sequence[Path], what: str, source: str):
        self.what, self.source = what, source
        self.typed = not any(_suffix(path) in (".csv", ".tsv") for path in paths)
        self._pieces: list[tuple[Path, int, int | None]] = []
        for path in paths:
            if _suffix(path) not in _READERS:
                mend = f"give one of {', '.join((*ROW_SUFFIXES, *TEXT_SUFFIXES))}"
                raise UserError(what, path, "unknown kind of file", mend)
            try:
                self._pieces += self._cut(path)
            except OSError as error:
                problem = f"cannot be read ({error.strerror or error})"
                raise UserError(what, path, problem, "give a readable file") from None

    def _cut(self, path: Path) -> list[tuple[Path, int, int | None]]:
        suffix, size = _suffix(path), path.stat().st_size
        if suffix in (".jsonl", ".json"):
            return [(path, start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                groups = pyarrow.parquet.read_metadata(path).num_row_groups
            except (pyarrow.ArrowException, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problem = f"not a readable Parquet file ({reason})"
                raise UserError(self.what, path, problem, "write the file again") from None
            return [(path, group, None) for group in range(groups)]
        return [(path, 0, None)] if size else []

    def __len__(self) -> int:
        return len(self._pieces)

    def rows(self, piece: int, at: int) -> Iterator[Row]:
        path, start, stop = self._pieces[piece]
        try:
            yield from _READERS[_suffix(path)](path, start, stop, at, self.what)
        except (OSError, EOFError, zlib.error) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
            raise UserError(self.what, path, problem, "give a readable file") from None


# --- saved data sets and the Hub --------------------------------------------------------------------------------------


class SavedPieces:
    """One split of a folder that ``save_to_disk`` made, left on disk.

    Args:
        rows: the split.
        what: configuration field that named it.
        source: as the user wrote it.
        split: its name, for messages.
    """

    typed = True

    def __init__(self, rows: Any, what: str, source: str, split: str):
        self.what, self.source, self._rows, self._split = what, source, rows, split

    def __len__(self) -> int:
        return -(-len(self._rows) // _PIECE_ROWS)

    def rows(self, piece: int, at: int) -> Iterator[Row]:
        start = piece * _PIECE_ROWS
        for first in range(start + at, min(start + _PIECE_ROWS, len(self._rows)), _PARQUET_ROWS):
            stop = min(first + _PARQUET_ROWS, start + _PIECE_ROWS, len(self._rows))
            columns = self._rows[first:stop]
            for number in range(first, stop):
                row = {name: values[number - first] for name, values in columns.items()}
                yield number + 1 - start, f"{self.source} {self._split} row {number + 1}", row


class HubPieces:
    """One split of a hub data set, streamed; a place in a shard is a number of rows, and going on skips those.

    Args:
        rows: a ``datasets.IterableDataset``.
        what: configuration field that named it.
        source: the hub id.
        split: its name there.
    """

    typed = True

    def __init__(self, rows: Any, what: str, source: str, split: str):
        self.what, self.source, self._rows, self._split = what, source, rows, split

    def __len__(self) -> int:
        return self._rows.num_shards

    def rows(self, piece: int, at: int) -> Iterator[Row]:
        shard = self._rows.shard(num_shards=len(self), index=piece)
        try:
            for number, row in enumerate(shard.skip(at) if at else shard, at + 1):
                yield number, f"{self.source} {self._split} shard {piece + 1} row {number}", row
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            mend = "check the network and give the same command again: it goes on from the last checkpoint"
            raise UserError(self.what, self.source, f"the hub stopped answering ({reason})", mend) from None


# --- sources ----------------------------------------------------------------------------------------------------------

_SPLIT_OF = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
_NUMBERED = re.compile(r"[-_.]?\d+(-of-\d+)?$")


def _split_of(path: Path) -> str | None:
    stem = path.name[: -len(_suffix(path))].lower()
    return _SPLIT_OF.get(stem) or _SPLIT_OF.get(_NUMBERED.sub("", stem))


def _of_folder(folder: Path, what: str, source: str, suffixes: Sequence[str]) -> dict[str, Pieces]:
    if is_saved(folder):
        found = load_saved(folder, what)
        return {split: SavedPieces(rows, what, source, split) for split, rows in found.items()}
    files = [path for path in sorted(folder.rglob("*")) if _suffix(path) in suffixes and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        problem = f"holds neither a saved data set nor files of rows ({', '.join(suffixes)})"
        raise UserError(what, source, problem, "give a data file")
    splits = {path: _split_of(path) for path in files}
    if not any(split == "train" for split in splits.values()):
        # Shards that are named otherwise: all of them are to train on, except what says that it is not.
        splits = {path: split or "train" for path, split in splits.items()}
    return {
        split: FilePieces([path for path in files if splits[path] == split], what, source)
        for split in SPLIT_NAMES
        if split in splits.values()
    }


def _of_hub(name: str, what: str, config: str | None) -> dict[str, Pieces]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"no such file or folder, and the hub gave no such dataset ({reason})"
        raise UserError(what, name, problem, "mend the path, or check the hub id, its config and the network") from None
    found = {
        _SPLIT_OF[split]: HubPieces(rows, what, name, split) for split, rows in loaded.items() if split in _SPLIT_OF
    }
    if not found:
        problem = f"has no split of a known name (it has: {', '.join(loaded)})"
        raise UserError(what, name, problem, "name its splits train, validation, test")
    return found


def open_pieces(
    source: str, what: str, config: str | None = None, suffixes: Sequence[str] = ROW_SUFFIXES
) -> dict[str, Pieces]:
    """The splits of a set, none of its rows read: ``train`` at least, and those others that it names.

    Args:
        source: file, folder, pattern, saved data set or hub id.
        what: configuration field that named it, for messages.
        config: of a hub data set.
        suffixes: of the files that count in a folder.

    Raises:
        UserError: nothing there, of an unknown kind, or no training rows.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _of_folder(path, what, source, suffixes)
    elif path.is_file():
        found = {"train": FilePieces([path], what, source)}
    elif files := glob_files(source):
        found = {"train": FilePieces(files, what, source)}
    elif _suffix(path) in _READERS or "*" in source:
        raise UserError(what, source, "no such file", "mend the path")
    else:
        found = _of_hub(source, what, config)
    if "train" not in found:
        raise UserError(what, source, f"no training split (it has: {', '.join(found)})", "give a training set")
    for split, pieces in found.items():
        if not len(pieces):
            raise UserError(what, source, f"its {split} split holds no examples", "give a set with at least one")
    return found
