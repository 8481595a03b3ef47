"""The embedded raw text: every docstring and all prose documentation of installed packages, to pretrain on.

It is read from the running environment and, if one is named, from a second folder of installed packages, which also
gives further pairs. The packages that ``pydocs`` holds out are trained on from neither, nor are files of other packages
that go by their names (copies): validation text is that of the running environment's validation packages, the test
packages' is never read. Training text that repeats validation text or a held-out summary, and training pairs that
repeat a held-out definition, are dropped, so that no held-out example is known beforehand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from pipelines.corpus import prose
from pipelines.corpus.docstrings import first_sentence
from pipelines.corpus.pydocs import (
    LEAKED_SHARE,
    TEST_PACKAGES,
    VALIDATION_PACKAGES,
    Package,
    Splits,
    code_of,
    distributions,
    environment_key,
    example_of,
    extract,
    installed_packages,
    leaks,
    n_grams,
    pydocs,
    without_duplicates,
    words_of,
)
from pipelines.errors import UserError

HELD_OUT = frozenset((*VALIDATION_PACKAGES, *TEST_PACKAGES))

Texts = list[tuple[str, str]]
"""``(source, text)``: ``"scipy: scipy.fft.dct"``, ``"scipy: README"``."""


@dataclass(frozen=True)
class EmbeddedText:
    """Text and pairs by split, ``train`` and ``validation``, and what they were made of (see ``embedded_text``)."""

    texts: dict[str, Texts]
    pairs: dict[str, list[dict[str, Any]]]
    stats: dict[str, Any]


class HeldOut:
    """Held-out examples, asked whether training text repeats any of them.

    Args:
        examples: with ``summary`` and ``document``, as ``pydocs`` gives them.
    """

    def __init__(self, examples: Sequence[dict[str, Any]]):
        summaries = [words_of(example["summary"]) for example in examples]
        self._whole = {tuple(words) for words in summaries}
        self._summaries = {gram for words in summaries for gram in n_grams(words)}
        self._code = {gram for example in examples for gram in n_grams(words_of(code_of(example)))}

    def in_text(self, text: str) -> bool:
        """Whether a word 6-gram of a held-out summary stands in ``text``, or ``text`` begins with such a summary."""
        if not self._summaries.isdisjoint(n_grams(words_of(text))):
            return True
        return tuple(words_of(first_sentence(text))) in self._whole

    def in_pair(self, example: dict[str, Any]) -> bool:
        """Whether a pair repeats one held out.

        It does if its summary is that of one, if a word 6-gram of a held-out summary stands in its summary or code, or
        if more than ``LEAKED_SHARE`` of its code's 6-grams stand in held-out code.
        """
        code = n_grams(words_of(code_of(example)))
        return (
            tuple(words_of(example["summary"])) in self._whole
            or self.in_text(example["summary"])
            or not self._summaries.isdisjoint(code)
            or len(code & self._code) > LEAKED_SHARE * len(code)
        )


def text_key(site_packages: str | None = None) -> str:
    """Digest of all that decides the embedded text: the packages' versions and the code that reads them.

    Raises:
        UserError: ``site_packages`` is no folder of installed packages.
    """
    further = [] if site_packages is None else distributions(_folder(site_packages))
    digest = hashlib.sha256(environment_key().encode())
    for code in (__file__, prose.__file__):
        digest.update(Path(code).read_bytes())
    # A package without modules may have documentation, so every distribution counts.
    read = [[(name, found.version) for name, found in part] for part in (distributions(), further)]
    digest.update(json.dumps(read).encode())
    return digest.hexdigest()[:24]


def _folder(site_packages: str) -> list[str]:
    folder = Path(site_packages).expanduser()
    if not any(folder.glob("*.dist-info")):
        problem = "holds no installed packages" if folder.is_dir() else "no such folder"
        mend = "fill it (`make pretraining-text`, or `pip install --target FOLDER …`), or name a site-packages folder"
        raise UserError("site_packages", site_packages, problem, mend)
    return [str(folder)]


def embedded_text(site_packages: str | None = None, workers: int | None = None) -> EmbeddedText:
    """The raw text of the running environment and of ``site_packages``; see ``text_of_packages``.

    Raises:
        UserError: the held-out packages are not installed, or ``site_packages`` holds no package to read.
    """
    splits, stats = pydocs()
    further = None if site_packages is None else _folder(site_packages)
    found = text_of_packages(splits, further=further, workers=workers)
    for name, figures in stats["packages"].items():
        if name in found.stats["packages"]:
            found.stats["packages"][name]["pairs"] = figures["examples"]
    return found


def text_of_packages(
    splits: Splits,
    running: Sequence[str] | None = None,
    further: Sequence[str] | None = None,
    workers: int | None = None,
) -> EmbeddedText:
    """All docstrings and prose documentation of installed packages, without what is held out.

    Args:
        splits: pairs of the running environment, as ``pydocs.build`` returns them.
        running: its folders; ``sys.path`` if left out.
        further: folders of further packages, which give text and pairs; one that is also in ``running`` is read there.
        workers: processes that read source files.

    Returns:
        Documents, each once, in an order without meaning; the given training and validation pairs and those of the
        further packages; and figures: ``packages`` (name -> version, licence, split, texts, words, and pairs of further
        packages), ``duplicates`` and ``leaks`` (texts and pairs dropped as such), ``leak_rate`` (share of the held-out
        examples that training pairs repeat, by ``pydocs.leaks``).

    Raises:
        UserError: ``further`` holds no package to read.
    """
    read = {name: found for name, found in distributions(running) if name not in TEST_PACKAGES}
    own = [_without_copies(package) for package in installed_packages(running) if package.name in read]
    added: list[Package] = []
    if further is not None:
        known = HELD_OUT.union(read)
        others = {name: found for name, found in distributions(further) if name not in known}
        if not others:
            problem = "holds no package but those that are installed already or held out"
            raise UserError("site_packages", further[0], problem, "install others into it, or leave it out")
        read |= others
        added = [_without_copies(package) for package in installed_packages(further) if package.name in others]
    packages = {
        name: {
            "version": distribution.version,
            "licence": prose.licence_of(distribution),
            "split": "validation" if name in VALIDATION_PACKAGES else "train",
            **dict.fromkeys(("texts", "words", "pairs"), 0),
        }
        for name, distribution in sorted(read.items())
    }
    dropped = Counter(duplicates=0, leaks=0)
    held_out = [*splits["validation"], *splits["test"]]
    guard = HeldOut(held_out)
    texts = _kept_texts(_read([*own, *added], read, workers), packages, guard, dropped)
    pairs = {"train": splits["train"], "validation": splits["validation"]}
    if added:
        pairs["train"] = pairs["train"] + _kept_pairs(extract(added, workers), added, packages, splits, guard, dropped)
    # Orders without meaning, so that a prefix of a split is a fair sample of it.
    for split in texts:
        texts[split].sort(key=lambda item: hashlib.sha256(item[1].encode()).digest())
        pairs[split] = sorted(pairs[split], key=lambda example: hashlib.sha256(example["id"].encode()).digest())
    repeated = leaks(held_out, pairs["train"])
    used = {name: figures for name, figures in packages.items() if figures["texts"] or figures["pairs"]}
    return EmbeddedText(texts, pairs, {"packages": used, **dropped, "leak_rate": sum(repeated) / len(repeated)})


def _kept_texts(
    rows: Iterable[tuple[str, str, str]], packages: dict[str, dict[str, Any]], guard: HeldOut, dropped: Counter[str]
) -> dict[str, Texts]:
    """The texts of ``(package, source, text)`` by split, each once; counts them in ``packages`` and ``dropped``."""
    texts: dict[str, Texts] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    # Validation text comes first, so that training text which repeats it is what is dropped.
    for name, source, text in sorted(rows, key=lambda row: packages[row[0]]["split"] == "train"):
        digest = hashlib.sha256(" ".join(words_of(text)).encode()).digest()
        split = packages[name]["split"]
        if digest in seen:
            dropped["duplicates"] += 1
        elif split == "train" and guard.in_text(text):
            dropped["leaks"] += 1
        else:
            texts[split].append((f"{name}: {source}", text))
            packages[name]["texts"] += 1
            packages[name]["words"] += len(text.split())
        seen.add(digest)
    return texts


def _kept_pairs(
    rows: list[list[list[str]]],
    added: Sequence[Package],
    packages: dict[str, dict[str, Any]],
    splits: Splits,
    guard: HeldOut,
    dropped: Counter[str],
) -> list[dict[str, Any]]:
    """The pairs of further packages that are new and not held out; counts them in ``packages`` and ``dropped``."""
    train = splits["train"]
    ids = Counter(example["name"] for part in splits.values() for example in part)
    examples, package_of = [], {}
    for package, found in zip(added, rows, strict=True):
        for row in found:
            examples.append(example_of(*row, ids))
            package_of[examples[-1]["id"]] = package.name
    new = without_duplicates([*train, *examples])[len(train) :]
    kept = _unlike([example for example in new if not guard.in_pair(example)], splits)
    for example in kept:
        packages[package_of[example["id"]]]["pairs"] += 1
    dropped.update(duplicates=len(examples) - len(new), leaks=len(new) - len(kept))
    return kept


def _unlike(examples: list[dict[str, Any]], splits: Splits) -> list[dict[str, Any]]:
    """``examples`` without those that only together repeat a held-out definition (its code in scattered pieces)."""
    held_out = [*splits["validation"], *splits["test"]]
    repeated = leaks(held_out, [*splits["train"], *examples])
    code = {
        gram
        for example, leak in zip(held_out, repeated, strict=True)
        if leak
        for gram in n_grams(words_of(code_of(example)))
    }
    return [example for example in examples if code.isdisjoint(n_grams(words_of(code_of(example))))]


def _without_copies(package: Package) -> Package:
    """``package`` without modules that go by the name of a held-out one: copies of it, or documentation about it."""
    if package.name in HELD_OUT:
        return package
    files = tuple(file for file in package.files if HELD_OUT.isdisjoint(file[1].split(".")))
    return Package(package.name, package.version, files)


def _read(
    packages: Sequence[Package], documented: dict[str, Distribution], workers: int | None
) -> Iterator[tuple[str, str, str]]:
    """``(package, source, text)`` of every docstring, then of all prose documentation."""
    for package, rows in zip(packages, extract(packages, workers, texts=True), strict=True):
        for name, text in rows:
            yield package.name, name, text
    for name, distribution in sorted(documented.items()):
        for place, text in prose.prose_of(distribution):
            if name in HELD_OUT or HELD_OUT.isdisjoint(re.split(r"[/.-]", place.lower())):
                yield name, place, text
