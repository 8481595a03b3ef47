"""The embedded set on packages made here: held-out packages, duplicates, leaks, cache."""

import random
import sys

import pytest

from pipelines.corpus import pydocs as module
from pipelines.corpus.local import as_datasets
from pipelines.corpus.pydocs import Package, build, environment_key, extract, installed_packages, leaks, words_of
from pipelines.errors import UserError
from tests.corpus.made_packages import function, install, sentences


@pytest.fixture
def site(tmp_path):
    """Three packages: train, val, held; importing any of their modules would fail."""
    folder = tmp_path / "site"
    lines = sentences()
    code = [
        function(f"job_{i}", line, f"    return [n + {i} for n in reversed(numbers) if n % {i + 2} == {i}]")
        for i, line in enumerate(lines)
    ]
    boom = "raise SystemExit('imported')\n"
    install(
        folder,
        "train_pkg",
        "1.0",
        {
            "train_pkg/__init__.py": boom + "".join(code[:30]),
            "train_pkg/tests/test_it.py": "".join(code[30:40]),
            "train_pkg/_vendor/other.py": "".join(code[30:40]),
            "train_pkg/deep/mod.py": "".join(code[40:60]),
        },
    )
    install(folder, "val-pkg", "2.0", {"val_pkg.py": boom + "".join(code[60:75])})
    copied = function("copied", lines[0], "    return sum(numbers) / max(numbers) - min(numbers) ** 2")
    install(folder, "held", "3.0", {"held/core.py": boom + "".join(code[75:90]) + copied + code[80]})
    install(folder, "pip", "23.0", {"pip/core.py": code[95]})
    return folder


def test_installed_packages_are_sorted_and_read_without_tests_and_copies(site):
    packages = installed_packages([str(site)])
    assert [p.name for p in packages] == ["held", "train-pkg", "val-pkg"]
    assert [m for _, m in packages[1].files] == ["train_pkg", "train_pkg.deep.mod"]
    assert [p.version for p in packages] == ["3.0", "1.0", "2.0"]


def test_number_of_workers_does_not_matter_and_nothing_is_imported(site):
    packages = installed_packages([str(site)])
    rows = extract(packages, workers=1)
    assert rows == extract(packages, workers=3)
    assert [len(part) for part in rows] == [17, 50, 15]
    assert rows[1][0][0] == "train_pkg.job_0"
    assert not {"train_pkg", "val_pkg", "held"} & set(sys.modules)


def test_whole_packages_are_held_out_and_leaks_dropped(site):
    packages = installed_packages([str(site)])
    splits, stats = build(packages, ["val-pkg"], ["held"], workers=1)
    assert {split: len(part) for split, part in splits.items()} == {"train": 50, "validation": 15, "test": 15}
    assert {e["name"].split(".")[0] for e in splits["train"]} == {"train_pkg"}
    assert {e["name"].split(".")[0] for e in splits["test"]} == {"held"}
    # The definition given twice counts once; the one with a training summary is dropped and was counted.
    assert not any(e["name"] == "held.core.copied" for e in splits["test"])
    assert stats["leak_rate_before"] == pytest.approx(1 / 31)
    assert stats["leak_rate"] == 0
    assert stats["extracted"] == 82
    assert stats["packages"]["held"] == {"version": "3.0", "split": "test", "examples": 15}
    example = splits["test"][0]
    assert example["references"] == [example["summary"]]
    assert len({e["id"] for part in splits.values() for e in part}) == 80
    assert build(packages, ["val-pkg"], ["held"], workers=2) == (splits, stats)
    assert as_datasets(splits)["test"].column_names == ["id", "document", "summary", "references", "name"]


def test_leaks_against_brute_force():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(12)]

    def example():
        words = [rng.choice(vocabulary) for _ in range(rng.randint(3, 14))]
        code = [rng.choice(vocabulary) for _ in range(rng.randint(3, 30))]
        return {"summary": " ".join(words), "document": "name.of.it\n" + " ".join(code)}

    train = [example() for _ in range(1500)]
    held_out = [example() for _ in range(150)] + [{"summary": train[0]["summary"], "document": "x\na b"}]

    def grams(text):
        words = text.lower().split()
        return [" ".join(words[i : i + 6]) for i in range(len(words) - 5)]

    texts = [f" {e['summary']} " for e in train] + [f" {e['document'].partition(chr(10))[2]} " for e in train]
    documents = texts[len(train) :]
    expected = []
    for e in held_out:
        summary = any(f" {g} " in t for g in grams(e["summary"]) for t in texts)
        same = any(e["summary"] == t["summary"] for t in train)
        found = {g: any(f" {g} " in t for t in documents) for g in set(grams(e["document"].partition("\n")[2]))}
        expected.append(summary or same or sum(found.values()) > 0.5 * len(found))
    assert 0 < sum(expected) < len(expected)
    assert leaks(held_out, train) == expected


def test_words_of_identifiers():
    assert words_of("get_item(X2) -> 'ok'") == ["get", "item", "x2", "ok"]


def test_a_missing_held_out_package_is_one_line(site):
    packages = installed_packages([str(site)])
    with pytest.raises(UserError, match="pip install networkx"):
        build(packages, ["val-pkg"], ["networkx"], workers=1)


def test_cache_is_keyed_by_versions_and_survives_damage(site, tmp_path, monkeypatch):
    monkeypatch.setenv("GENALIGN_CACHE", str(tmp_path / "cache"))
    packages = installed_packages([str(site)])
    monkeypatch.setattr(module, "installed_packages", lambda: packages)
    made = []

    def counted(found):
        made.append(1)
        return build(found, ["val-pkg"], ["held"], workers=1)

    monkeypatch.setattr(module, "build", counted)
    first = module.pydocs()
    assert module.pydocs() == first
    assert len(made) == 1
    (file,) = (tmp_path / "cache" / "pydocs").glob("*.json")
    assert file.stem == environment_key(packages)
    file.write_text('{"splits": ')
    assert module.pydocs() == first
    assert len(made) == 2
    newer = [Package(p.name, p.version + ".1", p.files) for p in packages]
    assert environment_key(newer) != environment_key(packages)
    # A cache that cannot be written costs time, nothing else.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENALIGN_CACHE", str(tmp_path / "file"))
    assert module.pydocs() == first


def test_a_dead_worker_is_told(site, monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.stdin.read()\nraise SystemExit('no memory')\n")
    monkeypatch.setattr(module.docstrings, "__file__", str(broken))
    with pytest.raises(RuntimeError, match="no memory"):
        extract(installed_packages([str(site)]), workers=1)
