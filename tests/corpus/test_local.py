"""Own data in every format, its splits, and one line for everything that can be wrong with it."""

import csv
import json
import string
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.corpus import CorpusFields, load_corpus
from pipelines.corpus.local import sample, split_by_group
from pipelines.errors import UserError

ROWS = [
    {"document": f"Document {i} tells of {i} things.", "summary": f"Of {i} things.", "id": f"d{i}"} for i in range(20)
]


def write(path, rows=ROWS):
    """``rows`` in the format that the suffix asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def ids(splits):
    return {split: part["id"] for split, part in splits.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_one_file_of_any_format_is_split_by_seed(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}")
    splits = load_corpus(CorpusFields(dataset=path, validation_fraction=0.2, test_fraction=0.1))
    assert {split: len(part) for split, part in splits.items()} == {"train": 14, "validation": 4, "test": 2}
    assert sorted(i for part in ids(splits).values() for i in part) == sorted(row["id"] for row in ROWS)
    by_id = {row["id"]: row for row in ROWS}
    for part in splits.values():
        assert part.column_names == ["id", "document", "summary", "references"]
        for row in part:
            assert row["document"] == by_id[row["id"]]["document"]
            assert row["references"] == [row["summary"]] == [by_id[row["id"]]["summary"]]
    again = load_corpus(CorpusFields(dataset=path, validation_fraction=0.2, test_fraction=0.1))
    other = load_corpus(CorpusFields(dataset=path, validation_fraction=0.2, test_fraction=0.1, split_seed=1))
    assert ids(again) == ids(splits) != ids(other)


def test_sentences_are_joined_and_references_kept(tmp_path):
    rows = [
        {"source": [f"{i} First one. ", " Second one."], "target": [f"Reference {i}.", " Other. "], "id": i}
        for i in range(5)
    ]
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"data{suffix}", rows)
        splits = load_corpus(CorpusFields(dataset=path, text_column="source", summary_column="target"))
        row = splits["train"][0]
        assert row["document"] == f"{row['id']} First one. Second one."
        assert row["references"] == [row["summary"], "Other."]
        assert row["id"] in set("01234")


def test_identical_documents_stay_in_one_split(tmp_path):
    rows = [{"document": f"Text {i % 7}", "summary": f"Line {i}"} for i in range(70)]
    splits = load_corpus(CorpusFields(dataset=write(tmp_path / "d.jsonl", rows)))
    texts = [set(part["document"]) for part in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 7
    assert splits["train"]["id"][0].startswith("train-")


@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("training", "dev", "test"), ("train", "val", "test")]
)
def test_folder_of_split_files_in_mixed_formats(tmp_path, names):
    for name, suffix, part in zip(
        names, (".jsonl", ".csv", ".parquet"), (ROWS[:10], ROWS[10:15], ROWS[15:]), strict=True
    ):
        write(tmp_path / f"{name}{suffix}", part)
    (tmp_path / "README.md").write_text("not data")
    splits = load_corpus(CorpusFields(dataset=str(tmp_path)))
    assert ids(splits) == {
        "train": [r["id"] for r in ROWS[:10]],
        "validation": [r["id"] for r in ROWS[10:15]],
        "test": [r["id"] for r in ROWS[15:]],
    }


def test_shards_and_separate_files(tmp_path):
    write(tmp_path / "a" / "train-00000-of-00002.parquet", ROWS[:5])
    write(tmp_path / "a" / "train-00001-of-00002.parquet", ROWS[5:10])
    held = write(tmp_path / "held.jsonl", ROWS[10:13])
    test = write(tmp_path / "t" / "test.csv", ROWS[13:])
    fields = CorpusFields(dataset=str(tmp_path / "a"), validation_dataset=held, test_dataset=str(Path(test).parent))
    splits = load_corpus(fields)
    assert [len(part) for part in splits.values()] == [10, 3, 7]
    # Without a test set, one is taken from the training files alone.
    splits = load_corpus(CorpusFields(dataset=str(tmp_path / "a"), validation_dataset=held, test_fraction=0.3))
    assert [len(part) for part in splits.values()] == [7, 3, 3]


def test_saved_datasets_and_limits(tmp_path):
    whole = load_corpus(CorpusFields(dataset=write(tmp_path / "d.jsonl")))
    whole.save_to_disk(str(tmp_path / "saved"))
    again = load_corpus(CorpusFields(dataset=str(tmp_path / "saved")))
    assert {s: p.to_list() for s, p in again.items()} == {s: p.to_list() for s, p in whole.items()}
    assert again["train"].cache_files, "a sound saved corpus stays on disk"
    few = load_corpus(CorpusFields(dataset=str(tmp_path / "saved"), max_train=5, max_validation=1))
    assert [len(part) for part in few.values()] == [5, 1, 2]
    assert set(few["train"]["id"]) < set(whole["train"]["id"])
    same = load_corpus(CorpusFields(dataset=str(tmp_path / "d.jsonl"), max_train=5, max_validation=1))
    assert ids(few) == ids(same)
    # A single Dataset, and a saved DatasetDict with other columns, go the long way.
    datasets.Dataset.from_list([{"text": r["document"], "tldr": r["summary"]} for r in ROWS]).save_to_disk(
        str(tmp_path / "single")
    )
    single = load_corpus(CorpusFields(dataset=str(tmp_path / "single"), text_column="text", summary_column="tldr"))
    assert sum(map(len, single.values())) == 20


def test_a_saved_corpus_with_a_bad_row_is_not_taken_as_it_is(tmp_path):
    rows = [{"id": "1", "document": "A text.", "summary": " ", "references": ["x"]}]
    parts = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"train row 1.*'summary' is empty"):
        load_corpus(CorpusFields(dataset=str(tmp_path / "saved")))


def raw(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"dataset": str(path)}


def line(**columns):
    return json.dumps({"document": "A text.", "summary": "A line.", **columns}) + "\n"


def saved_broken(folder):
    load_corpus(CorpusFields(dataset=write(folder / "d.jsonl"))).save_to_disk(str(folder / "s"))
    for file in (folder / "s").rglob("*.arrow"):
        file.write_bytes(b"garbage")
    return {"dataset": str(folder / "s")}


def split_folder(folder, *names):
    for name in names:
        write(folder / name)
    return {"dataset": str(folder)}


WRONG = {
    "missing file": (lambda d: {"dataset": str(d / "no.jsonl")}, "dataset=.*no.jsonl: no such file"),
    "folder of nothing": (lambda d: {"dataset": str(d)}, "neither a saved dataset nor train"),
    "folder named as a file": (
        lambda d: {"dataset": write(d / "t.jsonl"), "test_dataset": str(d / "sub")},
        "test_dataset=.*neither a saved dataset",
    ),
    "unknown kind": (lambda d: raw(d / "d.xml", "<a/>"), r"unknown kind of file; give one of .jsonl"),
    "empty file": (lambda d: raw(d / "d.jsonl", ""), "holds no examples"),
    "blank lines only": (lambda d: raw(d / "d.jsonl", "\n\n"), "holds no examples"),
    "csv without rows": (lambda d: raw(d / "d.csv", "document,summary\n"), "holds no examples"),
    "empty json list": (lambda d: raw(d / "d.json", "[]"), "holds no examples"),
    "bad utf-8 line": (
        lambda d: raw(d / "d.jsonl", line().encode() + b'{"a": "\xff"}\n'),
        r"d.jsonl line 2: not UTF-8 \(byte 8",
    ),
    "bad utf-8 csv": (
        lambda d: raw(d / "d.csv", b"document,summary\na,b\nc,\xe4\n"),
        r"d.csv line 3: not UTF-8 \(byte 3",
    ),
    "utf-16": (lambda d: raw(d / "d.jsonl", line().encode("utf-16")), "line 1: not UTF-8"),
    "malformed line": (
        lambda d: raw(d / "d.jsonl", line() + "\n" + '{"document": "x",,}\n'),
        "d.jsonl line 3: not valid JSON",
    ),
    "deep nesting": (lambda d: raw(d / "d.jsonl", "[" * 200_000), "d.jsonl line 1: not valid JSON"),
    "malformed json": (lambda d: raw(d / "d.json", '[\n{"a": 1},\n{"b" 2}]'), "d.json line 3: not valid JSON"),
    "not an object": (lambda d: raw(d / "d.jsonl", line() + "[1, 2]\n"), "d.jsonl line 2: a list, not an object"),
    "json of one number": (lambda d: raw(d / "d.json", "17"), "holds a number, not a list of objects"),
    "wrong column": (
        lambda d: raw(d / "d.jsonl", line().replace("summary", "sumary") * 9),
        r"summary_column=summary: no such column in .*it has: 'document', 'sumary'.*did you mean 'sumary'",
    ),
    "column missing later": (
        lambda d: raw(d / "d.jsonl", line() + '{"document": "x"}\n'),
        "line 2: the column 'summary' is missing",
    ),
    "null": (lambda d: raw(d / "d.jsonl", line() + line(summary=None)), "line 2: the column 'summary' holds null"),
    "null in parquet": (
        lambda d: {"dataset": write(d / "d.parquet", [*ROWS[:2], {**ROWS[2], "document": None}])},
        "d.parquet row 3: the column 'document' holds null",
    ),
    "number": (
        lambda d: raw(d / "d.jsonl", line(document=12)),
        "line 1: the column 'document' holds a number, not text",
    ),
    "truth value": (lambda d: raw(d / "d.jsonl", line(document=True)), "holds a truth value"),
    "numbers in a csv": (
        lambda d: raw(d / "d.csv", "document,summary\na b,1\nc d,2.5\n"),
        "summary_column=summary: holds numbers, not text",
    ),
    "number in a list": (lambda d: raw(d / "d.jsonl", line(summary=["a", 3])), r"'summary\[1\]' holds a number"),
    "chat messages": (lambda d: raw(d / "d.jsonl", line(document=[{"role": "x"}])), r"'document\[0\]' holds an object"),
    "empty text": (
        lambda d: raw(d / "d.jsonl", line() + line(document=" \n ")),
        "line 2: the column 'document' is empty",
    ),
    "empty sentences": (
        lambda d: raw(d / "d.jsonl", line(document=["", " "])),
        "line 1: the column 'document' is empty",
    ),
    "empty list": (lambda d: raw(d / "d.jsonl", line(summary=[])), "line 1: the column 'summary' is an empty list"),
    "empty reference": (lambda d: raw(d / "d.jsonl", line(summary=["a", ""])), r"'summary\[1\]' is empty"),
    "half a surrogate pair": (lambda d: raw(d / "d.jsonl", line(document="a \ud800")), "line 1: .*surrogate"),
    "ragged csv": (lambda d: raw(d / "d.csv", 'document,summary\n"a\nb",c\nd,e,f\n'), "d.csv line 4: 3 cells under 2"),
    "open quote": (lambda d: raw(d / "d.csv", 'document,summary\na,b\nc,"d\n'), "d.csv line 3: not valid CSV"),
    "column twice": (lambda d: raw(d / "d.csv", "a,a\n1,2\n"), "line 1: the column 'a' stands twice"),
    "corrupt parquet": (lambda d: raw(d / "d.parquet", b"PAR1 nothing PAR1"), "not a readable Parquet file"),
    "damaged dataset": (saved_broken, "damaged dataset folder"),
    "two validation files": (
        lambda d: split_folder(d / "f", "train.jsonl", "dev.jsonl", "validation.csv"),
        "both dev.jsonl and validation.csv are its validation set",
    ),
    "no training set": (lambda d: split_folder(d / "f", "dev.jsonl", "test.jsonl"), "no training split"),
    "too few to split": (lambda d: {"dataset": write(d / "d.jsonl", ROWS[:2])}, "too few different examples"),
    "a split given twice": (
        lambda d: split_folder(d / "f", "train.jsonl", "test.jsonl") | {"test_dataset": write(d / "t.jsonl")},
        "test_dataset=.*has a test split of its own",
    ),
    "same file by another name": (
        lambda d: {"dataset": write(d / "t.jsonl"), "test_dataset": str(d / "sub" / ".." / "t.jsonl")},
        "test_dataset=.*is dataset too",
    ),
    "no such hub dataset": (
        lambda d: {"dataset": "nobody/nothing"},
        "dataset=nobody/nothing: no such file or folder, and the hub",
    ),
    "missing id column": (
        lambda d: {"dataset": write(d / "d.jsonl"), "id_column": "key"},
        "id_column=key: no such column",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_one_line(tmp_path, case):
    make, pattern = WRONG[case]
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=pattern) as caught:
        load_corpus(CorpusFields(**make(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "leaves nothing to train on"),
        ({"summary_column": "document"}, "is text_column too"),
        ({"dataset": "a.csv", "test_dataset": "a.csv"}, "is dataset too"),
        ({"test_dataset": "a.csv"}, "brings its own splits"),
    ],
)
def test_combinations_that_cannot_be(values, pattern):
    assert [p for p in CorpusFields(**values).problems() if pattern in str(p)]
    assert CorpusFields().problems() == []


def test_long_documents_are_no_mistake(tmp_path):
    rows = [{"document": f"{i} " + "word " * 100_000, "summary": "Long."} for i in range(4)]
    splits = load_corpus(CorpusFields(dataset=write(tmp_path / "d.csv", rows)))
    assert len(splits["train"][0]["document"]) > 400_000


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.lists(TEXT, min_size=1, max_size=3), TEXT), min_size=3, max_size=8), st.booleans())
def test_any_text_comes_back_or_is_refused(rows, ascii_only):
    """Whatever the texts hold: loading gives them back stripped and joined, or names the first empty one."""
    empty = [i for i, (d, s) in enumerate(rows, 1) if not s.strip() or not any(part.strip() for part in d)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        content = [json.dumps({"d": d, "s": s, "id": i}, ensure_ascii=ascii_only) for i, (d, s) in enumerate(rows)]
        path.write_text("\n".join(content), encoding="utf-8", newline="\n")
        fields = CorpusFields(dataset=str(path), text_column="d", summary_column="s")
        documents = {" ".join(part.strip() for part in d if part.strip()).strip() for d, _ in rows}
        if empty or len(documents) < 3:
            expected = f"line {empty[0]}: .*empty" if empty else "too few different"
            with pytest.raises(UserError, match=expected):
                load_corpus(fields)
            return
        splits = load_corpus(fields)
        found = {int(row["id"]): row for part in splits.values() for row in part}
    assert len(found) == len(rows)
    for i, (document, summary) in enumerate(rows):
        assert found[i]["summary"] == summary.strip()
        assert found[i]["document"] == " ".join(part.strip() for part in document if part.strip()).strip()


@given(
    st.lists(st.sampled_from(string.ascii_lowercase), min_size=1, max_size=60),
    st.floats(0.01, 0.98),
    st.floats(0.01, 0.98),
    st.integers(0, 9),
)
def test_split_by_group_parts_the_groups(groups, first, second, seed):
    fractions = {"validation": first, "test": second}
    if len(set(groups)) < 3:
        with pytest.raises(ValueError, match="groups"):
            split_by_group(groups, fractions, seed)
        return
    parts = split_by_group(groups, fractions, seed)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(groups)))
    assert all(part == sorted(part) and part for part in parts.values())
    counts = Counter(group for part in parts.values() for group in {groups[i] for i in part})
    assert set(counts.values()) == {1}


def test_sample_is_a_fair_subset():
    assert sample(5, None, 0, "train") == sample(5, 9, 0, "train") == [0, 1, 2, 3, 4]
    hits = Counter(i for seed in range(600) for i in sample(10, 4, seed, "train"))
    # Each of 10 is drawn with probability 0.4: 240 of 600, standard deviation 12.
    assert all(abs(hits[i] - 240) < 60 for i in range(10))
    assert sample(100, 10, 0, "train") != sample(100, 10, 0, "test")
