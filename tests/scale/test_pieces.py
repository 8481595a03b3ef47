"""Sets are read from any place, in pieces that together are the whole, whatever they are kept in."""

import gzip
import json
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipelines.corpus import pieces as of_pieces
from pipelines.corpus.documents import CHUNK_BYTES, of_text_file
from pipelines.corpus.pieces import TEXT_SUFFIXES, HubPieces, open_pieces
from pipelines.errors import UserError
from tests.scale.conftest import documents, write_lines

ROWS = [row | {"note": f'of {number}\nand "more", ü'} for number, row in enumerate(documents(60))]


def _csv(path, delimiter=","):
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _written(kind, folder):
    path = folder / f"set.{kind}"
    if kind == "jsonl":
        write_lines(path, ROWS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind in ("csv", "tsv"):
        _csv(path, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir()
        for part in range(3):
            write_lines(path / f"part-{part}.jsonl", ROWS[20 * part : 20 * part + 20])
    elif kind == "pattern":
        for part in range(3):
            write_lines(folder / f"set-{part}.jsonl", ROWS[20 * part : 20 * part + 20])
        return folder / "set-*.jsonl"
    return path


KINDS = ("jsonl", "jsonl.gz", "csv", "tsv", "parquet", "saved", "folder", "pattern")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_and_reading_goes_on_from_any_row(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(of_pieces, "PIECE_BYTES", 300)
    monkeypatch.setattr(of_pieces, "_PIECE_ROWS", 11)
    monkeypatch.setattr(of_pieces, "_PARQUET_ROWS", 4)
    found = open_pieces(str(_written(kind, tmp_path)), "dataset")["train"]
    assert len(found) > 1 or kind in ("jsonl.gz", "csv", "tsv")
    read = [(piece, after, row) for piece in range(len(found)) for after, _, row in found.rows(piece, 0)]
    assert [row for _, _, row in read] == ROWS
    for number, (piece, after, _) in enumerate(read):
        rest = [row for _, _, row in found.rows(piece, after)]
        assert rest == [row for where, _, row in read[number + 1 :] if where == piece]


def test_a_hub_set_goes_on_in_its_shard():
    streamed = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=4)
    found = HubPieces(streamed, "dataset", "owner/name", "train")
    assert len(found) == 4
    read = [row for piece in range(4) for _, _, row in found.rows(piece, 0)]
    assert read == ROWS
    assert [row for _, _, row in found.rows(2, 5)] == ROWS[35:45]
    assert str(next(found.rows(2, 5))[1]) == "owner/name train shard 3 row 6"


def test_texts_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("two\n\nmore", encoding="utf-8")
    found = open_pieces(str(tmp_path), "text", None, TEXT_SUFFIXES)["train"]
    assert [row["text"] for piece in range(len(found)) for _, _, row in found.rows(piece, 0)] == ["one", "two\n\nmore"]


def test_splits_of_a_folder_by_name(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "notes"):
        write_lines(tmp_path / f"{name}.jsonl", ROWS[:3])
    found = open_pieces(str(tmp_path), "dataset")
    assert set(found) == {"train", "validation"}
    assert len(found["train"]) == 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', "a.jsonl line 3: a list, not an object with columns"),
        ("a.json", '[{"a": 1}]', "a.json line 1: a JSON list cannot be read row by row"),
        ("a.csv", 'a,b\n1,2\n"x\ny",2\n1\n', "a.csv line 5: 1 cells under 2 column names"),
        ("a.csv", "a,a\n1,2\n", "a.csv line 1: the column 'a' stands twice"),
        ("a.csv", "a\n1\n2\n\udcff\n", "a.csv line 4: not UTF-8 (byte 1 of the line is 0xff)"),
        ("a.jsonl", '{}\n{}\n{"a": "\udcff"}\n', "a.jsonl line 3: not UTF-8 (byte 8 of the line is 0xff)"),
        ("a.parquet", "no", "not a readable Parquet file"),
        ("a.xlsx", "no", "unknown kind of file"),
        ("a.jsonl", "", "holds no examples"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", errors="surrogateescape")

    def read():
        found = open_pieces(str(path), "dataset")["train"]
        for piece in range(len(found)):
            for _, _, row in found.rows(piece, 0):
                if isinstance(row, UserError):
                    raise row

    with pytest.raises(UserError, match="dataset=") as told:
        read()
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_broken_gzip_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        list(open_pieces(str(path), "dataset")["train"].rows(0, 0))


def test_a_damaged_gzip_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = bytearray(gzip.compress(b'{"a": 1}\n' * 1000))
    data[10] = 0xFF  # behind the head: no kind of block
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        list(open_pieces(str(path), "dataset")["train"].rows(0, 0))


def test_reading_goes_on_in_a_long_text_without_what_is_before_in_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line of the text\n" * 400_000, encoding="utf-8")
    whole = list(of_text_file(path))
    tracemalloc.start()
    try:
        assert list(of_text_file(path, whole[-2][0])) == whole[-1:]
        assert tracemalloc.get_traced_memory()[1] < 5 * CHUNK_BYTES
    finally:
        tracemalloc.stop()


def test_what_is_not_there(tmp_path):
    for missing in (tmp_path / "no.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            open_pieces(str(missing), "dataset")
