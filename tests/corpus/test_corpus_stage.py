"""The corpus stage through the machinery that runs every stage, and the embedded set in this very environment."""

import json
import math

import pytest

from pipelines.corpus import CorpusFields, load_corpus
from pipelines.corpus import pydocs as module
from pipelines.corpus.corpus import CorpusConfig, corpus
from pipelines.corpus.pydocs import TEST_PACKAGES, VALIDATION_PACKAGES, extract, installed_packages
from pipelines.errors import UserError
from pipelines.stage import execute


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"source": [f"Text {i}.", "More of it."], "target": ["A line.", "Another line."]} for i in range(30)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stage_saves_what_it_loaded_and_is_the_same_twice(tmp_path):
    columns = {"text_column": "source", "summary_column": "target"}
    config = CorpusConfig(dataset=write(tmp_path / "d.jsonl", ROWS), output_dir=str(tmp_path / "one"), **columns)
    metrics = corpus(config)
    assert metrics["corpus/train_examples"] == 24
    assert metrics["corpus/validation_examples"] == metrics["corpus/test_examples"] == 3
    assert metrics["corpus/references"] == 2
    assert metrics["corpus/document_words"] == 5
    assert metrics["corpus/duplicate_rate"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    saved = load_corpus(CorpusFields(dataset=str(tmp_path / "one")))
    direct = load_corpus(config)
    assert {s: p.to_list() for s, p in saved.items()} == {s: p.to_list() for s, p in direct.items()}
    second = CorpusConfig(dataset=config.dataset, output_dir=str(tmp_path / "two"), **columns)
    assert corpus(second) == metrics
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    stats = json.loads((tmp_path / "one" / "stats.json").read_text())
    assert stats["splits"]["test"]["examples"] == 3


def test_wrong_data_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "d.jsonl", [*ROWS, {"source": None, "target": "x"}])
    config = CorpusConfig(
        dataset=path, output_dir=str(tmp_path / "deep" / "out"), text_column="source", summary_column="target"
    )
    with pytest.raises(UserError, match="line 31: the column 'source' holds null"):
        execute(corpus, config)
    assert not (tmp_path / "deep").exists()


def test_documents_shared_with_training_are_counted(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"document": f"Text  {i}", "summary": "a"} for i in range(10)])
    held = write(tmp_path / "v.jsonl", [{"document": f"Text {i}", "summary": "b"} for i in range(8, 12)])
    test = write(tmp_path / "e.jsonl", [{"document": f"Other {i}", "summary": "b"} for i in range(4)])
    config = CorpusConfig(dataset=train, validation_dataset=held, test_dataset=test, output_dir=str(tmp_path / "out"))
    assert corpus(config)["corpus/duplicate_rate"] == 2 / 8


@pytest.fixture
def small_environment(monkeypatch):
    """The embedded set of three real packages installed here instead of all of them."""
    packages = [p for p in installed_packages() if p.name in ("click", "jinja2", "packaging")]
    assert len(packages) == 3
    real = module.build
    monkeypatch.setattr(module, "installed_packages", lambda: packages)
    monkeypatch.setattr(module, "build", lambda found: real(found, ["packaging"], ["jinja2"], workers=1))


def test_embedded_set_of_real_packages(small_environment, tmp_path):
    metrics = corpus(CorpusConfig(output_dir=str(tmp_path / "out"), max_train=50))
    assert metrics["corpus/train_examples"] == 50
    assert metrics["corpus/test_examples"] > 250
    assert metrics["corpus/packages"] == 3
    assert 0 <= metrics["corpus/leak_rate"] <= metrics["corpus/leak_rate_before"] < 0.05
    splits = load_corpus(CorpusFields(dataset=str(tmp_path / "out")))
    assert {name.split(".")[0] for name in splits["test"]["name"]} == {"jinja2"}
    row = splits["test"][0]
    assert row["document"].startswith(row["name"])
    assert row["summary"].isascii()
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["packages"]["jinja2"]["split"] == "test"
    assert set(CorpusFields().environment()) == {"pydocs"}
    assert CorpusFields(dataset="a.csv").environment() == {}


def test_the_held_out_packages_are_installed_and_give_enough():
    """At least 400 held-out documents a split, found without reading any other package."""
    packages = {p.name: p for p in installed_packages()}
    for names in (VALIDATION_PACKAGES, TEST_PACKAGES):
        assert not set(names) - set(packages)
    jinja = extract([packages["jinja2"], packages["werkzeug"]], workers=1)
    assert sum(map(len, jinja)) > 400
