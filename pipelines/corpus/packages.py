"""The embedded raw text: every docstring and all prose documentation of installed packages, to pretrain on.

It is read from the running environment and, if one is named, from a second folder of installed packages, which also
gives further pairs. The packages that ``pydocs`` holds out are read in neither: validation text is that of the running
environment's validation packages, the test packages' is never read. Training text that repeats a held-out summary, and
training pairs that repeat a held-out definition, are dropped, so that no held-out example is known beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
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
    """Digest of all that decides the embedded text: the packages' versions and the code that reads them."""
    digest = hashlib.sha256(environment_key().encode())
    for code in (__file__, prose.__file__):
        digest.update(Path(code).read_bytes())
    # A package without modules may have documentation, so every distribution counts.
    for path in (None, site_packages):
        found = [] if path is None and site_packages is None else distributions(None if path is None else _folder(path))
        digest.update(json.dumps([(name, d.version) for name, d in found]).encode())
    return digest.hexdigest()[:24]


def _folder(site_packages: str) -> list[str]:
    return [str(Path(site_packages).expanduser())]


def embedded_text(site_packages: str | None = None, workers: int | None = None) -> EmbeddedText:
    """The raw text of the running environment and of ``site_packages``, without what is held out.

    Args:
        site_packages: folder of further installed packages; one that is also installed in the running environment is
            read there.
        workers: processes that read source files.

    Returns:
        Documents, each once, in an order without meaning; pairs as in ``pydocs.build`` (those of ``pydocs`` and of the
        further packages); and figures: ``packages`` (name -> version, licence, split, texts, words and pairs),
        ``duplicates`` and ``leaks`` (texts and pairs dropped as such), ``leak_rate`` (share of held-out examples that
        still repeat training pairs, by ``pydocs.leaks``).

    Raises:
        UserError: the held-out packages are not installed, or ``site_packages`` holds no package to read.
    """
    splits, own_figures = pydocs()
    held_out = [*splits["validation"], *splits["test"]]
    running = dict(distributions())
    further = {} if site_packages is None else dict(distributions(_folder(site_packages)))
    further = {name: found for name, found in further.items() if name not in running and name not in HELD_OUT}
    if site_packages is not None and not further:
        problem = "holds no package but those that are installed already or held out"
        raise UserError("site_packages", site_packages, problem, "install others into it, or leave it out")

    read = {name: found for name, found in running.items() if name not in TEST_PACKAGES} | further
    own, added = installed_packages(), installed_packages(_folder(site_packages)) if further else []
    added = [_without_copies(package) for package in added if package.name in further]
    own = [_without_copies(package) for package in own if package.name not in TEST_PACKAGES]

    guard = HeldOut(held_out)
    dropped: Counter[str] = Counter()
    texts: dict[str, Texts] = {"train": [], "validation": []}
    packages = {
        name: {
            "version": distribution.version,
            "licence": prose.licence_of(distribution),
            "split": "validation" if name in VALIDATION_PACKAGES else "train",
        }
        | dict.fromkeys(("texts", "words", "pairs"), 0)
        for name, distribution in sorted(read.items())
    }
    seen: set[bytes] = set()
    # Validation text comes first, so that training text which repeats it is what is dropped.
    for name, source, text in sorted(_read(own + added, read, workers), key=lambda r: r[0] not in VALIDATION_PACKAGES):
        split = packages[name]["split"]
        words = words_of(text)
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        if digest in seen:
            dropped["duplicates"] += 1
        elif split == "train" and guard.in_text(text):
            dropped["leaks"] += 1
        else:
            texts[split].append((f"{name}: {source}", text))
            packages[name]["texts"] += 1
            packages[name]["words"] += len(text.split())
        seen.add(digest)

    found = _pairs(added, workers)
    unique = without_duplicates([*splits["train"], *(example for _, example in found)])[len(splits["train"]) :]
    kept = _unlike([example for example in unique if not guard.in_pair(example)], held_out, splits["train"])
    dropped["duplicates"] += len(found) - len(unique)
    dropped["leaks"] += len(unique) - len(kept)
    pairs = {"train": [*splits["train"], *kept], "validation": splits["validation"]}
    package_of = {example["id"]: name for name, example in found}
    for example in kept:
        packages[package_of[example["id"]]]["pairs"] += 1
    for name, figures in own_figures["packages"].items():
        if name in packages:
            packages[name]["pairs"] = figures["examples"]
    # Orders without meaning, so that a prefix of a split is a fair sample of it.
    for split in texts:
        texts[split].sort(key=lambda item: hashlib.sha256(item[1].encode()).digest())
        pairs[split].sort(key=lambda example: hashlib.sha256(example["id"].encode()).digest())
    repeated = leaks(held_out, pairs["train"])
    return EmbeddedText(
        texts,
        pairs,
        {
            "packages": {name: figures for name, figures in packages.items() if figures["texts"] or figures["pairs"]},
            **{name: dropped[name] for name in ("duplicates", "leaks")},
            "leak_rate": sum(repeated) / len(repeated),
        },
    )


def _unlike(
    examples: list[dict[str, Any]], held_out: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """``examples`` without those that only together repeat a held-out definition that ``train`` alone does not."""
    repeated = leaks(held_out, [*train, *examples])
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
            yield name, place, text


def _pairs(packages: Sequence[Package], workers: int | None) -> list[tuple[str, dict[str, Any]]]:
    """``(package, example)`` of every documented definition."""
    if not packages:
        return []
    ids: Counter[str] = Counter()
    found = []
    for package, rows in zip(packages, extract(packages, workers), strict=True):
        for name, document, summary in rows:
            found.append((package.name, example_of(name, document, summary, ids)))
    return found
