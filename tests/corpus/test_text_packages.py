"""Embedded raw text: nothing of a held-out package gets into it, from whichever environment it might come."""

import importlib.metadata
import itertools

import pytest

from pipelines.corpus.docstrings import texts_of
from pipelines.corpus.packages import HELD_OUT, HeldOut, embedded_text, text_key, text_of_packages
from pipelines.corpus.prose import clean, is_prose, licence_of, prose_of
from pipelines.corpus.pydocs import (
    TEST_PACKAGES,
    VALIDATION_PACKAGES,
    build,
    installed_packages,
    leaks,
    n_grams,
    words_of,
)
from pipelines.errors import UserError
from tests.corpus.made_packages import function, install, sentences

README = (
    "This package weighs every shipment that comes into the harbour and writes down what it finds in a ledger. If you "
    "want to read the ledger, open it with the tool that is installed beside it, or with any editor of your choice.\n"
)
OTHER = README.replace("shipment", "parcel").replace("harbour", "station").replace("editor", "reader")
VENDORED = "nltk is copied here, and this line explains in seven words or more why."


HELD_LINE = next(line for line in sentences()[20:40] if len(line.split()) == 6)


def body(i):
    return f"    return [n + {i} for n in reversed(numbers) if n % {i + 2} == {i}]"


def code(first, last, also=""):
    return "".join(function(f"job_{i}", sentences()[i], body(i)) for i in range(first, last)) + also


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A running environment with all six held-out packages, and a further one that holds copies of three of them."""
    running, further = (tmp_path_factory.mktemp(name) for name in ("running", "further"))
    held_out = dict(zip((*VALIDATION_PACKAGES, *TEST_PACKAGES), itertools.count(10, 5), strict=False))
    install(running, "train_pkg", "1.0", {"train_pkg/core.py": code(0, 10)}, f"License: MIT\n\n{README}")
    for name, first in held_out.items():
        readme = f"{README} It is called {name}."
        install(running, name, "1.0", {f"{name}/core.py": code(first, first + 5), f"{name}/guide.md": readme})
    # The same packages in other versions, by other spellings of their names, with text of their own.
    for name, spelling in (("nltk", "NLTK"), ("jinja2", "Jinja2"), ("aiohttp", "aiohttp")):
        install(further, spelling, "9.9", {f"{name}/newer.py": code(60, 65)}, f"\n{OTHER} It is called {name}.")
    leaking = function("a_leak", sentences()[32], body(97)) + function("twice", sentences()[40], body(98))
    copied = function("other_name", "Weigh the cargo of each arriving ship.", body(31)).replace("other_name", "job_31")
    files = {
        "Added/core.py": f'"""Module {OTHER}"""\n' + code(40, 60) + leaking + copied,
        "Added/nltk/core.py": code(70, 75, f'def f():\n    """{VENDORED}"""\n'),
        "Added/vendored_files/nltk-3.9/README.md": f"{VENDORED} {README}",
        "Added/_vendor/rich.py": code(75, 80),
        "Added/docs/guide.rst": f"Guide\n=====\n\n{README.replace('ledger', 'notebook')}\n{HELD_LINE}\n",
        "Added/docs/quotes.rst": f"{OTHER}\n\nAs the others say, {HELD_LINE.lower()}\n",
        "Added/docs/intro.rst": f"{OTHER} More follows here.",
        "Added/LICENSE.txt": README,
    }
    install(further, "Added", "2.0", files, "License-Expression: BSD-3-Clause\n")
    install(further, "train_pkg", "0.1", {"train_pkg/core.py": code(80, 85)})
    return [str(running)], [str(further)]


@pytest.fixture(scope="module")
def splits(places):
    return build(installed_packages(places[0]), workers=1)[0]


@pytest.fixture(scope="module")
def found(places, splits):
    return text_of_packages(splits, *places, workers=1)


def test_no_word_of_a_held_out_package_is_trained_on(places, splits, found):
    """Not of the running environment, nor of a newer version, another spelling or a copy in the further one."""
    train = [text for _, text in found.texts["train"]] + [
        e[part] for e in found.pairs["train"] for part in ("document", "summary")
    ]
    forbidden = [sentences()[i] for i in (*range(10, 40), *range(60, 65), *range(70, 80))]
    assert not [line for line in forbidden for text in train if line in text]
    assert not any(f"called {name}" in text for name in HELD_OUT for text in train)
    assert not any(VENDORED in text for text in train)
    assert {source.partition(":")[0] for source, _ in found.texts["train"]} == {"train-pkg", "added"}
    assert {e["name"].partition(".")[0] for e in found.pairs["train"]} == {"train_pkg", "Added"}
    # The package that both hold is read where it runs.
    assert found.stats["packages"]["train-pkg"]["version"] == "1.0"
    held_out = [*splits["validation"], *splits["test"]]
    assert len(held_out) == 30
    assert not any(leaks(held_out, found.pairs["train"]))
    assert found.stats["leak_rate"] == 0


def test_validation_text_is_that_of_the_validation_packages(splits, found):
    assert {source.partition(":")[0] for source, _ in found.texts["validation"]} == set(VALIDATION_PACKAGES)
    assert {e["id"] for e in found.pairs["validation"]} == {e["id"] for e in splits["validation"]}
    assert {e["name"].partition(".")[0] for e in found.pairs["validation"]} == set(VALIDATION_PACKAGES)
    everything = [text for part in found.texts.values() for _, text in part]
    assert not any(f"called {name}" in text for name in TEST_PACKAGES for text in everything)


def test_what_is_read_and_counted(found):
    sources = {source for source, _ in found.texts["train"]}
    assert {
        "train-pkg: README",
        "train-pkg: train_pkg.core.job_3",
        "added: Added.core",
        "added: Added.core.job_40",
    } <= sources
    assert "added: Added/docs/intro.rst" in sources
    # These two quote a held-out summary; the licence is not prose that anyone wrote for this package.
    assert not {"added: Added/docs/guide.rst", "added: Added/docs/quotes.rst", "added: Added/LICENSE.txt"} & sources
    texts = [" ".join(words_of(text)) for part in found.texts.values() for _, text in part]
    assert len(set(texts)) == len(texts)
    added = found.stats["packages"]["added"]
    # 20 functions; one repeats a held-out summary, one a summary of its own package, one held-out code.
    assert (added["version"], added["licence"], added["pairs"]) == ("2.0", "BSD-3-Clause", 20)
    assert found.stats["packages"]["train-pkg"]["licence"] == "MIT"
    assert found.stats["packages"]["nltk"]["split"] == "validation"
    assert not set(TEST_PACKAGES) & set(found.stats["packages"])
    assert found.stats["leaks"] >= 4
    assert sum(f["texts"] for f in found.stats["packages"].values()) == sum(map(len, found.texts.values()))
    assert len({e["id"] for e in found.pairs["train"]}) == len(found.pairs["train"]) == 30


def test_the_order_is_that_of_no_package_and_the_same_for_any_number_of_workers(places, splits, found):
    assert text_of_packages(splits, *places, workers=3) == found
    first = [source.partition(":")[0] for source, _ in found.texts["train"]]
    assert first != sorted(first) != first[::-1]


def test_without_a_further_environment_the_pairs_are_those_given(places, splits):
    alone = text_of_packages(splits, places[0], workers=1)
    assert sorted(e["id"] for e in alone.pairs["train"]) == sorted(e["id"] for e in splits["train"])
    assert alone.stats["packages"].keys() == {"train-pkg", *VALIDATION_PACKAGES}


def test_a_folder_of_nothing_new_is_one_line(places, splits):
    with pytest.raises(UserError, match=r"site_packages=.*installed already or held out; install others"):
        text_of_packages(splits, places[0], places[0])


def test_real_held_out_packages_stay_out(tmp_path):
    """Links to packages installed here: as the running environment, and half of the held-out ones as a further one."""
    running, further = tmp_path / "running", tmp_path / "further"
    train = {"click", "packaging"}
    wanted = {"running": {*train, "aiohttp", "jinja2"}, "further": {"jinja2", "rich", "werkzeug", "filelock"}}
    for folder in (running, further):
        folder.mkdir()
        for distribution in map(importlib.metadata.distribution, sorted(wanted[folder.name])):
            for top in {file.parts[0] for file in distribution.files if ".." not in file.parts}:
                (folder / top).symlink_to(distribution.locate_file(top))
    splits, _ = build(installed_packages([str(running)]), workers=1)
    found = text_of_packages(splits, [str(running)], [str(further)], workers=1)
    assert set(found.stats["packages"]) == {*train, "aiohttp", "filelock"}
    assert {source.partition(":")[0] for source, _ in found.texts["train"]} == {*train, "filelock"}
    assert {e["name"].partition(".")[0] for e in found.pairs["train"]} == {*train, "filelock"}
    grams = {gram for e in splits["test"] + splits["validation"] for gram in n_grams(words_of(e["summary"]))}
    assert len(grams) > 1000
    assert all(grams.isdisjoint(n_grams(words_of(text))) for _, text in found.texts["train"])
    assert found.stats["leak_rate"] == 0
    assert len(found.texts["train"]) > 300
    assert any(source == "click: README" for source, _ in found.texts["train"])


@pytest.mark.slow
def test_the_whole_environment():
    """Every package installed here: minutes."""
    found = embedded_text()
    assert found.stats["leak_rate"] == 0
    names = {source.partition(":")[0] for source, _ in found.texts["train"]}
    assert len(names) > 60
    assert not names & HELD_OUT
    assert {source.partition(":")[0] for source, _ in found.texts["validation"]} == set(VALIDATION_PACKAGES)
    assert sum(figures["words"] for figures in found.stats["packages"].values()) > 3_000_000


def test_held_out_against_brute_force(splits):
    held_out = [*splits["validation"], *splits["test"]]
    guard = HeldOut(held_out)
    for example in held_out:
        inside = guard.in_text(f"Before it. {example['summary']} And after it.")
        assert inside == (len(words_of(example["summary"])) >= 6)
        assert guard.in_text(f"{example['summary']}\n\nFurther words.")
        assert guard.in_pair(example)
        assert guard.in_pair(example | {"summary": "Something else altogether in other words."})
    assert not any(guard.in_text(e["summary"]) or guard.in_pair(e) for e in splits["train"])
    # Fewer than six words are common phrases: they count where a text begins with them.
    short = HeldOut([{"summary": "Swap the two sides.", "document": "a\nb"}])
    assert short.in_text("Swap the two sides.\n\nFurther words.")
    assert not short.in_text("To swap the two sides is easy.")


def test_the_key_follows_the_packages_of_both_environments(tmp_path):
    alone = text_key()
    install(tmp_path, "only_docs", "1.0", {"only_docs/a.md": README})
    added = text_key(str(tmp_path))
    (tmp_path / "only_docs-1.0.dist-info" / "METADATA").write_text("Name: only_docs\nVersion: 1.1\n")
    assert len({alone, added, text_key(str(tmp_path))}) == 3


# --- reading ----------------------------------------------------------------------------------------------------------


def test_all_docstrings_of_a_file():
    source = (
        b'"""The module says five words here."""\n'
        b"def f():\n"
        b'    """Too short."""\n'
        b"    if True:\n"
        b"        def inner():\n"
        b'            """Inner ones\n\n            count too, with their\n                shape."""\n'
        b"class C:\n"
        b"    '''A class has five words.'''\n"
        b"    async def m(self):\n"
        b'        """Methods have them as well, yes."""\n'
        b'    x = 1\n    """This is no docstring of anything."""\n'
    )
    assert texts_of(source, "a.b") == [
        ["a.b", "The module says five words here."],
        ["a.b.f.inner", "Inner ones\n\ncount too, with their\n    shape."],
        ["a.b.C", "A class has five words."],
        ["a.b.C.m", "Methods have them as well, yes."],
    ]
    assert texts_of(b'# automatically generated\n"""One two three four five."""\n', "a") == []
    assert texts_of(b'"""One two three four five."""\n(', "a") == []
    assert texts_of('"""Fünf Wörter stehen hier drin."""'.encode("latin-1"), "a") == []


def test_cleaning_keeps_prose_and_drops_badges():
    text = (
        "# Title\n[![build](https://x/y.svg)](https://x)\n<!-- a\ncomment -->\n\n\n\n.. image:: a.png\n   :width: 3\n"
        "Prose stays.  \n<p align=left>\n\tindented\n[1]: https://x\nEnd."
    )
    assert clean(text) == "# Title\n\nProse stays.\n    indented\nEnd."


def test_prose_and_what_is_none():
    assert is_prose(README)
    assert not is_prose("Only a few words of it.")
    assert not is_prose("| 1.0 | 2.0 | 3.0 | 4.0 | the\n" * 50)
    assert not is_prose("\n".join(f"word{chr(97 + i % 26)}" for i in range(500)))
    assert not is_prose("def f(x): return the[x] + a * (b / c) ** 2 - {'of': 1}\n" * 20)


def test_documentation_files(tmp_path):
    files = {
        "pkg/a.md": README,
        "pkg/tests/b.md": README,
        "pkg/CHANGELOG.rst": README,
        "pkg/licenses/c.txt": README,
        "pkg/d.TXT": README + "2",
        "pkg/e.json": README,
        "pkg/f.md": "1 2 3",
    }
    install(tmp_path, "pkg", "1", files, f"Classifier: License :: OSI Approved :: Zope Public License\n\n{README}")
    (tmp_path / "pkg" / "a.md").write_bytes(README.encode() + b"\xff")
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert list(prose_of(distribution)) == [("README", README.strip()), ("pkg/d.TXT", README + "2")]
    assert licence_of(distribution) == "Zope Public License"
