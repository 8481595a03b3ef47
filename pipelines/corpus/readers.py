"""Files of rows: JSON lines, JSON, CSV, Parquet, saved datasets; what is wrong with one is told by file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_SPLIT_OF = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass
class Rows:
    """The rows of one split as they stand in their source.

    Args:
        what: configuration field that named the source, for messages.
        source: file, folder or hub id, as the user wrote it.
        rows: ``(place, row)`` pairs, place being ``"train.jsonl line 17"``.
        columns: names of the columns (of JSON lines: the keys of the first).
        typed: False where every value is text by nature (CSV).
    """

    what: str
    source: str
    rows: list[tuple[str, dict[str, Any]]]
    columns: list[str]
    typed: bool = True

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.what, self.source, self.rows + other.rows, self.columns, self.typed and other.typed)


def read_file(path: Path, what: str) -> Rows:
    """The rows of one data file, by its suffix.

    Raises:
        UserError: missing, a folder, unreadable, of an unknown kind, empty, or malformed (with the line).
    """
    if path.is_dir():
        raise UserError(what, path, "is a folder", "give the data file in it")
    if not path.exists():
        raise UserError(what, path, "no such file", "mend the path")
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(what, path, "unknown kind of file", f"give one of {', '.join(SUFFIXES)}")
    try:
        rows = reader(path, what)
    except OSError as error:
        raise UserError(what, path, f"cannot be read ({error.strerror or error})", "give a readable file") from None
    if not rows.rows:
        raise UserError(what, path, "holds no examples", "give a file with at least one")
    return rows


def decode(data: bytes, path: Path, what: str, line: int = 1) -> str:
    """``data``, which begins at ``line`` of the file, as text."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = f"{path} line {line + before.count(10)}"
        byte = error.start - (before.rfind(b"\n") + 1)
        problem = f"not UTF-8 (byte {byte + 1} of the line is 0x{data[error.start]:02x})"
        raise UserError(what, place, problem, "save the file as UTF-8") from None


def _parse(text: str, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg}, character {error.pos + 1})"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    raise UserError(what, place, problem, "mend or drop that line")


def _object(value: Any, place: str, what: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = type_of(value)
    raise UserError(what, place, f"{kind}, not an object with columns", 'write {"column": "text", …} on each line')


def json_lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(place, row)`` of each line that is not blank, read one at a time.

    Raises:
        UserError: not UTF-8, not JSON or not an object, with the line.
        OSError: cannot be read.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = decode(raw, path, what, number)
            if text.strip():
                place = f"{path} line {number}"
                yield place, _object(_parse(text, place, what), place, what)


def _json_lines(path: Path, what: str) -> Rows:
    rows = list(json_lines(path, what))
    return Rows(what, str(path), rows, list(rows[0][1]) if rows else [])


def _json(path: Path, what: str) -> Rows:
    text = decode(path.read_bytes(), path, what)
    if text.lstrip()[:1] == "{":
        # JSON lines often go by this name.
        return _json_lines(path, what)
    if not text.strip():
        return Rows(what, str(path), [], [])
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        mend = "mend that line"
        raise UserError(what, f"{path} line {error.lineno}", f"not valid JSON ({error.msg})", mend) from None
    except (ValueError, RecursionError) as error:
        raise UserError(what, path, f"not valid JSON ({error})", "mend the file") from None
    if not isinstance(loaded, list):
        raise UserError(what, path, f"holds {type_of(loaded)}, not a list of objects", "write a list, or JSON lines")
    places = [f"{path} entry {number}" for number in range(1, len(loaded) + 1)]
    rows = [(place, _object(value, place, what)) for place, value in zip(places, loaded, strict=True)]
    return Rows(what, str(path), rows, list(rows[0][1]) if rows else [])


def _csv(path: Path, what: str) -> Rows:
    text = decode(path.read_bytes(), path, what)
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows, line = [], 1
    while True:
        place = f"{path} line {line}"
        try:
            cells = next(reader)
        except StopIteration:
            return Rows(what, str(path), rows, header or [], typed=False)
        except csv.Error as error:
            raise UserError(what, place, f"not valid CSV ({error})", "mend that line") from None
        line = reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(what, place, f"the column {twice[0]!r} stands twice", "give each column its own name")
            continue
        if len(cells) != len(header):
            problem = f"{len(cells)} cells under {len(header)} column names"
            raise UserError(what, place, problem, "quote texts that hold the delimiter or line breaks")
        rows.append((place, dict(zip(header, cells, strict=True))))


def _parquet(path: Path, what: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        values = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(what, path, f"not a readable Parquet file ({reason})", "write the file again") from None
    rows = [(f"{path} row {number}", row) for number, row in enumerate(values, 1)]
    return Rows(what, str(path), rows, table.column_names)


def from_dataset(dataset: Dataset, what: str, source: str, split: str) -> Rows:
    """The rows of a loaded ``datasets.Dataset``."""
    name = f"{source} {split}" if split else source
    rows = [(f"{name} row {number}", row) for number, row in enumerate(dataset, 1)]
    if not rows:
        raise UserError(what, name, "holds no examples", "give a data set with at least one")
    return Rows(what, source, rows, dataset.column_names)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path, what: str) -> dict[str, Dataset]:
    """The splits of a folder made by ``save_to_disk`` (a single ``Dataset`` counts as the split ``train``).

    Raises:
        UserError: damaged, or splits that are none of train, validation, test.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(what, folder, f"a damaged dataset folder ({reason})", "save it again") from None
    return _named(dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}, what, str(folder))


def load_hub(name: str, what: str, config: str | None) -> dict[str, Dataset]:
    """The splits of a hub dataset; no remote code is run.

    Raises:
        UserError: no such dataset, no network, or splits that are none of train, validation, test.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"no such file or folder, and the hub gave no such dataset ({reason})"
        mend = "mend the path, or check the hub id, dataset_config and the network"
        raise UserError(what, name, problem, mend) from None
    return _named(dict(loaded), what, name)


def _named(splits: dict[str, Any], what: str, source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in splits.items():
        split = _SPLIT_OF.get(name)
        if split is None:
            continue
        if split in found:
            raise UserError(what, source, f"has more than one {split} split ({', '.join(splits)})", "keep one of them")
        found[split] = value
    if not found:
        mend = "name its splits train, validation, test"
        raise UserError(what, source, f"has no split of a known name (it has: {', '.join(splits)})", mend)
    return found


def split_files(folder: Path, what: str) -> dict[str, list[Path]]:
    """The data files of a folder by split: ``train.jsonl``, ``dev.csv``, ``test-00000-of-00002.parquet`` …

    Raises:
        UserError: none, or two files of different names for one split.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _SPLIT_OF.get(_SHARD.sub("", path.stem).lower())
        if split is None or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        others = found.setdefault(split, [])
        if others and _SHARD.sub("", path.stem) + path.suffix != _SHARD.sub("", others[0].stem) + others[0].suffix:
            raise UserError(
                what, folder, f"both {others[0].name} and {path.name} are its {split} set", "keep one of them"
            )
        others.append(path)
    if not found:
        names = "train, validation and test files" + f" ({', '.join(SUFFIXES)})"
        raise UserError(what, folder, f"holds neither a saved dataset nor {names}", "give a data file")
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def type_of(value: Any) -> str:
    """A value's kind in plain words."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def rows_of_files(paths: list[Path], what: str) -> Rows:
    """The rows of a split's files, one after the other."""
    parts: Iterator[Rows] = (read_file(path, what) for path in paths)
    rows = next(parts)
    for part in parts:
        rows = rows + part
    return rows
