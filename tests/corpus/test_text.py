"""The text stage: folders, files and hub sets read one document at a time; what pretraining reads back from disk."""

import itertools
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import validate
from pipelines.corpus import documents as module
from pipelines.corpus.documents import documents
from pipelines.corpus.text import TextConfig, open_saved, open_text, text
from pipelines.corpus.tokenizer import TokenizerConfig, tokenizer
from pipelines.errors import UserError
from pipelines.runner import load_recipe
from pipelines.stage import execute


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Five texts in three kinds of file, and what is to be passed over."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.txt").write_text("Second text.\n\nOf two paragraphs.\n")
    (root / "a.md").write_text("# First\n")
    (root / "sub" / "c.rst").write_text("\n\nThird, with ä and 漢字.\n")
    write_lines(root / "d.jsonl", [{"text": "Fourth"}, {"text": ["Fifth, in two", "sentences."], "more": 1}])
    (root / "empty.txt").write_text(" \n\n")
    (root / "data.csv").write_text("no,text\n")
    (root / ".git" / "e.txt").write_text("hidden")
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_folder_in_order_with_places(folder):
    found = list(documents(TextConfig(text=str(folder))))
    assert found == [
        (None, f"{folder}/a.md line 1", "# First"),
        (None, f"{folder}/b.txt line 1", "Second text.\n\nOf two paragraphs."),
        (None, f"{folder}/d.jsonl line 1", "Fourth"),
        (None, f"{folder}/d.jsonl line 2", "Fifth, in two sentences."),
        (None, f"{folder}/sub/c.rst line 1", "Third, with ä and 漢字."),
    ]
    assert list(documents(TextConfig(text=str(folder), max_documents=2))) == found[:2]
    assert list(documents(TextConfig(text=str(folder / "b.txt")))) == found[1:2]
    second = write_lines(folder / "d.jsonl", [{"body": "Fourth"}])
    assert [text for _, _, text in documents(TextConfig(text=second, raw_column="body"))] == ["Fourth"]


@settings(deadline=None, max_examples=60)
@given(st.text("ab\nä漢 ", max_size=300), st.integers(8, 40))
def test_long_files_are_cut_without_loss(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("cut") / "long.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", size)
        found = list(documents(TextConfig(text=str(path))))
    assert "".join("".join(t for _, _, t in found).split()) == "".join(content.split())
    assert all(t == t.strip() and 0 < len(t.encode()) <= size for _, _, t in found)
    lines = content.split("\n")
    for _, source, t in found:
        line = int(source.rpartition(" ")[2])
        assert t.split("\n")[0] in "\n".join(lines[line - 1 :])


def test_a_cut_falls_on_a_paragraph(tmp_path, monkeypatch):
    path = tmp_path / "long.md"
    path.write_text("One.\nStill one.\n\nTwo.\n\nThree is long.\n")
    monkeypatch.setattr(module, "CHUNK_BYTES", 26)
    assert [(s.rpartition(" ")[2], t) for _, s, t in documents(TextConfig(text=str(path)))] == [
        ("1", "One.\nStill one.\n\nTwo."),
        ("6", "Three is long."),
    ]


def test_memory_does_not_grow_with_the_set(tmp_path):
    """Twenty megabytes are read in the memory of a few documents."""
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with (tmp_path / "big.jsonl").open("w") as file:
        file.writelines(itertools.repeat(line, 1000))
    (tmp_path / "big.txt").write_text(("word " * 20 + "\n\n") * 100_000)
    tracemalloc.start()
    assert sum(len(t) for _, _, t in documents(TextConfig(text=str(tmp_path)))) > 19_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_stage_saves_splits_that_hold_each_document_on_one_side(tmp_path):
    rows = [{"text": f"Document {i % 150} of them."} for i in range(300)]
    config = TextConfig(
        text=write_lines(tmp_path / "t.jsonl", rows), text_validation_fraction=0.2, output_dir=str(tmp_path / "one")
    )
    metrics = text(config)
    data = open_saved(config.output_dir)
    sides = {split: data.text[split]["text"] for split in ("train", "validation")}
    assert not set(sides["train"]) & set(sides["validation"])
    assert sorted([*sides["train"], *sides["validation"]]) == sorted(row["text"] for row in rows)
    assert 30 <= len(sides["validation"]) <= 100
    assert metrics["text/train_documents"] == len(sides["train"])
    assert metrics["text/train_words"] == 4 * len(sides["train"])
    assert metrics["text/validation_bytes"] == sum(len(t.encode()) for t in sides["validation"])
    assert metrics["text/train_pairs"] == 0
    assert data.pairs is None
    assert data.text["train"][7]["source"] == f"{config.text} line {rows.index({'text': sides['train'][7]}) + 1}"
    # More text moves no document to the other side.
    longer = write_lines(tmp_path / "u.jsonl", [*rows, *({"text": f"New {i}"} for i in range(50))])
    more = open_text(TextConfig(text=longer, text_validation_fraction=0.2), tmp_path / "more")
    assert set(sides["validation"]) <= set(more.text["validation"]["text"])
    second = TextConfig(text=config.text, text_validation_fraction=0.2, output_dir=str(tmp_path / "two"))
    assert text(second) == metrics
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) >= {"stats.json", "text/dataset_dict.json"}
    assert not [name for name in contents(tmp_path / "one") if "/." in f"/{name}" or "pairs" in name]


def test_of_few_documents_one_is_held_out(tmp_path, folder):
    data = open_text(TextConfig(text=str(folder)), tmp_path / "out")
    assert (len(data.text["train"]), len(data.text["validation"])) == (4, 1)
    twice = write_lines(tmp_path / "t.jsonl", [{"text": t} for t in ("a", "b", "a", "b", "b")])
    data = open_text(TextConfig(text=twice), tmp_path / "out2")
    assert set(data.text["train"]["text"]) != set(data.text["validation"]["text"])
    assert data.stats["splits"]["validation"]["documents"] == len(data.text["validation"])
    assert data.stats["splits"]["validation"]["words"] == len(data.text["validation"])
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a"}, {"text": "a"}])
    with pytest.raises(UserError, match="its 2 documents leave none for the train split"):
        open_text(TextConfig(text=one), tmp_path / "out3")


def pairs_file(path, size=40):
    return write_lines(
        path, [{"document": f"def f{i}(): return {i}", "summary": f"Gives {i} back."} for i in range(size)]
    )


def test_pairs_come_with_the_text_and_without_their_test_split(tmp_path, folder):
    config = TextConfig(text=str(folder), pairs=pairs_file(tmp_path / "p.jsonl"), output_dir=str(tmp_path / "out"))
    metrics = text(config)
    assert (metrics["text/train_pairs"], metrics["text/validation_pairs"]) == (32, 4)
    # A saved folder is opened as it is; other pairs can stand in for its own.
    saved = TextConfig(text=config.output_dir)
    data = open_text(saved, tmp_path / "unused")
    assert set(data.pairs) == {"train", "validation"}
    assert data.pairs["train"].column_names == ["id", "document", "summary", "references"]
    other = open_text(
        TextConfig(text=config.output_dir, pairs=pairs_file(tmp_path / "q.jsonl", 10)), tmp_path / "unused"
    )
    assert len(other.pairs["train"]) == 8
    assert other.text["train"].to_list() == data.text["train"].to_list()
    assert not (tmp_path / "unused").exists()


def test_hub_sets_are_streamed(tmp_path, monkeypatch):
    """A folder laid out as a hub repository is streamed by the same call; a split that is there is kept."""
    hub = tmp_path / "owner" / "name"
    (hub / "data").mkdir(parents=True)
    write_lines(hub / "data" / "train.jsonl", [{"content": f"Train {i}"} for i in range(30)])
    monkeypatch.chdir(tmp_path)
    config = TextConfig(text="owner/name", raw_column="content")
    assert [t for _, _, t in module._of_hub(config)] == [f"Train {i}" for i in range(30)]
    assert {split for split, _, _ in module._of_hub(config)} == {None}
    write_lines(hub / "data" / "validation.jsonl", [{"content": f"Held {i}"} for i in range(5)])
    found = list(module._of_hub(config))
    assert [split for split, _, _ in found] == ["validation"] * 5 + ["train"] * 30
    assert found[0][1:] == ("owner/name validation row 1", "Held 0")
    limited = TextConfig(text="owner/name", raw_column="content", max_documents=20, text_validation_fraction=0.1)
    assert [split for split, _, _ in module._of_hub(limited)][:3] == ["validation", "validation", "train"]


def test_of_several_that_ask_at_once_one_writes(tmp_path, folder):
    """Each takes the lock through a file of its own, as processes do; two that write would meet in the same files."""
    start = threading.Barrier(4)
    (tmp_path / "out" / ".text.partial").mkdir(parents=True)  # as a killed run leaves it
    (tmp_path / "out" / ".text.partial" / "train.arrow").write_text("half")

    def work(_):
        start.wait()
        return open_text(TextConfig(text=str(folder)), tmp_path / "out").text["train"].to_list()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert found == [found[0]] * 4
    assert not list((tmp_path / "out").glob(".*"))
    inodes = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.arrow")}
    assert open_text(TextConfig(text=str(folder)), tmp_path / "out").text["train"].to_list() == found[0]
    assert inodes == {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.arrow")}


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_texts_are_one_line_and_leave_nothing(tmp_path, folder):
    def message(**fields):
        config = TextConfig(output_dir=str(tmp_path / "deep" / "out"), **fields)
        with pytest.raises(UserError) as caught:
            execute(text, config)
        assert not (tmp_path / "deep").exists()
        return str(caught.value)

    lines = write_lines(tmp_path / "l.jsonl", [{"text": "a"}, {"txet": "b"}])
    assert "raw_column=text: no such column in" in message(text=lines)
    assert "l.jsonl line 2 (it has: 'txet'); pass raw_column=txet" in message(text=lines)
    (tmp_path / "n.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    assert "n.jsonl line 2: the column 'text' holds a number, not text" in message(text=str(tmp_path / "n.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "broken.jsonl line 2: not valid JSON" in message(text=str(tmp_path / "broken.jsonl"))
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe4\n")
    assert "latin.txt line 2: not UTF-8 (byte 5 of the line is 0xe4)" in message(text=str(tmp_path / "latin.txt"))
    (tmp_path / "none").mkdir()
    assert "holds no .txt, .md, .rst, .jsonl files; give a folder of texts" in message(text=str(tmp_path / "none"))
    (tmp_path / "a.pdf").write_text("x")
    assert "unknown kind of file; give one of .txt" in message(text=str(tmp_path / "a.pdf"))
    assert "the hub gave no such dataset" in message(text="nobody/nothing")
    bad_pairs = write_lines(tmp_path / "p.jsonl", [{"document": "a", "summary": None}] * 9)
    assert "p.jsonl line 1: the column 'summary' holds null" in message(text=str(folder), pairs=bad_pairs)


def test_wrong_fields_are_found_before_anything_is_read(tmp_path):
    def problems(**fields):
        with pytest.raises(UserError) as caught:
            validate(TextConfig, fields)
        return str(caught.value)

    assert "text=/no/such/folder: no such file or folder" in problems(text="/no/such/folder")
    assert "is read for text=pydocs only" in problems(site_packages=str(tmp_path), text=str(tmp_path))
    assert "text_validation_fraction" in problems(text=str(tmp_path), text_validation_fraction=1.0)
    assert TextConfig(text=str(tmp_path)).environment() == {}
    # A chain may name a folder that is to be filled before it runs; its first stage says so where it was not.
    for value, told in (("/nowhere", "no such folder"), (str(tmp_path), "holds no installed packages")):
        config = validate(TextConfig, {"site_packages": value, "output_dir": str(tmp_path / "out")})
        with pytest.raises(UserError, match=f"site_packages={value}: {told}; fill it"):
            execute(text, config)
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_is_told(tmp_path, folder):
    open_text(TextConfig(text=str(folder)), tmp_path / "out")
    (tmp_path / "out" / "stats.json").write_text("{")
    with pytest.raises(UserError, match="a damaged text folder"):
        open_text(TextConfig(text=str(tmp_path / "out")), tmp_path / "unused")


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_the_tokenizer_learns_from_the_text_and_its_pairs(tmp_path):
    from transformers import AutoTokenizer

    rows = [{"text": f"Quaternion {i} rotates the vector {i}."} for i in range(200)]
    pairs = write_lines(
        tmp_path / "p.jsonl",
        [{"document": f"zebra zebra {i}", "summary": f"Xylophone {i} plays."} for i in range(200)],
    )
    saved = str(tmp_path / "text")
    text(TextConfig(text=write_lines(tmp_path / "t.jsonl", rows), pairs=pairs, output_dir=saved))
    dataset = pairs_file(tmp_path / "d.jsonl", 100)

    def pieces(name, **fields):
        tokenizer(TokenizerConfig(dataset=dataset, vocab_size=400, output_dir=str(tmp_path / name), **fields))
        made = AutoTokenizer.from_pretrained(tmp_path / name)
        assert "<extra_id_99>" in made.get_vocab()
        return set(made.get_vocab())

    words = {"▁quaternion", "▁vector", "▁zebra", "▁xylophone"}
    assert not words & pieces("without")
    assert words <= pieces("with", text=saved)


def test_the_tokenizer_takes_a_saved_folder_only(tmp_path, folder):
    dataset = pairs_file(tmp_path / "d.jsonl")

    def problems(value):
        with pytest.raises(UserError) as caught:
            validate(TokenizerConfig, {"dataset": dataset, "text": value})
        return str(caught.value)

    told = "is no folder that the text stage saved; give the folder that recipes/summarization/text.py saved"
    assert told in problems(str(folder))
    assert told in problems("pydocs")
    assert problems("/no/such/folder") == "text=/no/such/folder: no such file or folder; mend the path"
    assert validate(TokenizerConfig, {"dataset": dataset, "text": "${text}"}).text == "${text}"


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_on_a_folder(tmp_path, folder, capsys):
    """Through its own command line: what it prints, what it leaves, and nothing done twice."""
    command = [f"text={folder}", f"pairs={pairs_file(tmp_path / 'p.jsonl')}", f"output_dir={tmp_path / 'out'}"]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            load_recipe("summarization/text")(command)
        assert ended.value.code == 0
        assert "text/train_documents = 4" in capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert made["state"] == "finished"
    assert len(open_saved(tmp_path / "out").text["train"]) == 4
    with pytest.raises(SystemExit) as ended:
        load_recipe("summarization/text")([f"text={tmp_path}/nowhere.txt", f"output_dir={tmp_path / 'no'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: text={tmp_path}/nowhere.txt: no such file or folder; mend the path\n"
    assert not (tmp_path / "no").exists()
