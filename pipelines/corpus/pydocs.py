"""The embedded set ``pydocs``: what the installed packages' functions and classes do, in their authors' own words.

Whole packages are held out for validation and test; held-out examples that repeat training text are dropped, and how
many there were is stored. The set is a function of the installed packages' versions alone and is cached by them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cache import cache_folder
from pipelines.corpus import docstrings
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

VALIDATION_PACKAGES = ("aiohttp", "nltk", "rich")
TEST_PACKAGES = ("jinja2", "networkx", "werkzeug")
"""Held out wholly. All come with required dependencies, are documented well, and no other package read vendors them."""

EXCLUDED_PACKAGES = frozenset({"genalign", "pip", "setuptools", "wheel", "uv"})
"""Never read: the project itself, and installers, whose presence and version depend on how the environment was made."""

# fmt: off
_SKIPPED_PARTS = frozenset((
    "test", "tests", "testing", "testing_utils", "conftest", "__pycache__", "site-packages", "benchmarks", "_vendor",
    "vendor", "vendored", "_vendored", "extern", "externals", "_external", "third_party", "thirdparty", "_click",
    "array_api_compat", "array_api_extra",
))
# fmt: on

N_GRAM = 6
LEAKED_SHARE = 0.5
"""A held-out document leaks when more than this share of its word 6-grams stand in training documents."""

_WORDS = re.compile(r"[a-z0-9]+")

Splits = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Package:
    """An installed distribution: its normalized name, version, and ``(path, module)`` of the Python files to read."""

    name: str
    version: str
    files: tuple[tuple[str, str], ...]


def distributions(path: Sequence[str] | None = None) -> list[tuple[str, importlib.metadata.Distribution]]:
    """``(normalized name, distribution)`` of every installed package but the excluded ones, sorted by name.

    Args:
        path: folders to look in instead of ``sys.path`` (as for ``importlib.metadata.distributions``).
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    places = {} if path is None else {"path": list(path)}
    for distribution in importlib.metadata.distributions(**places):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        # The first one on the path is the one that would be imported.
        if name and name not in EXCLUDED_PACKAGES:
            found.setdefault(name, distribution)
    return sorted(found.items())


def installed_packages(path: Sequence[str] | None = None) -> list[Package]:
    """The distributions to read, sorted by name, each with its own source files (no tests, no vendored copies).

    Args:
        path: as for ``distributions``.
    """
    found = []
    for name, distribution in distributions(path):
        files = []
        for file in sorted(distribution.files or [], key=lambda f: f.as_posix()):
            if file.suffix != ".py" or not _is_own_source(file.parts):
                continue
            module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            files.append((str(file.locate()), module))
        if files:
            found.append(Package(name, distribution.version, tuple(files)))
    return found


def is_own(parts: tuple[str, ...]) -> bool:
    """Whether the file of these path parts lies outside tests, vendored copies and hidden folders."""
    return not any(part in _SKIPPED_PARTS or part.startswith((".", "test_")) for part in parts[:-1])


def _is_own_source(parts: tuple[str, ...]) -> bool:
    stem = parts[-1].removesuffix(".py")
    # What is not a module of its package (scripts in ../../bin, data files) has no qualified name.
    return (
        is_own(parts)
        and stem not in _SKIPPED_PARTS
        and not stem.startswith("test_")
        and all(p.isidentifier() for p in (*parts[:-1], stem))
    )


def environment_key(packages: Sequence[Package] | None = None) -> str:
    """Digest of all that decides the set: the packages' versions, Python's grammar and the code that reads them."""
    packages = installed_packages() if packages is None else packages
    digest = hashlib.sha256()
    for code in (Path(__file__), Path(docstrings.__file__)):
        digest.update(code.read_bytes())
    digest.update(json.dumps([sys.version_info[:2], [(p.name, p.version) for p in packages]]).encode())
    return digest.hexdigest()[:24]


def extract(packages: Sequence[Package], workers: int | None = None, texts: bool = False) -> list[list[list[str]]]:
    """For each package its ``[name, document, summary]`` rows in the order of its files, for any number of workers.

    With ``texts``: its ``[name, docstring]`` rows, of whole docstrings.

    Each worker is an interpreter of its own that runs ``docstrings.py`` as a plain script, so that neither the caller's
    threads nor its main module matter.

    Raises:
        RuntimeError: a worker died.
    """
    from tqdm.auto import tqdm

    jobs = [(index, *file) for index, package in enumerate(packages) for file in package.files]
    workers = max(1, min(8, os.cpu_count() or 1, len(jobs))) if workers is None else workers
    results: list[list[list[str]]] = [[] for _ in jobs]

    with tqdm(total=len(jobs), desc="reading docstrings", unit="file", disable=len(jobs) < 100) as bar:

        def work(first: int) -> None:
            command = [sys.executable, "-I", docstrings.__file__, *["texts"] * texts]
            with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
                )
                with process:
                    json.dump([job[1:] for job in jobs[first::workers]], process.stdin)
                    process.stdin.close()
                    done = 0
                    for line in process.stdout:
                        results[first + done * workers] = json.loads(line)
                        done += 1
                        bar.update()
                if process.returncode != 0 or done != len(jobs[first::workers]):
                    errors.seek(0)
                    raise RuntimeError(f"reading docstrings failed ({process.returncode}): {errors.read()[-2000:]}")

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    by_package: list[list[list[str]]] = [[] for _ in packages]
    for (index, _, _), rows in zip(jobs, results, strict=True):
        by_package[index].extend(rows)
    return by_package


# --- splits, duplicates, leaks --------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits: identifiers fall into their words at underscores."""
    return _WORDS.findall(text.lower())


def n_grams(words: list[str]) -> set[tuple[str, ...]]:
    # zip stops at the shortest: fewer than N_GRAM words have none.
    return set(zip(*(words[i:] for i in range(N_GRAM)), strict=False))


def leaks(held_out: Sequence[dict[str, Any]], train: Iterable[dict[str, Any]]) -> list[bool]:
    """Which held-out examples repeat training text.

    An example leaks if a word 6-gram of its summary stands in a training summary or document, if its whole summary is a
    training summary, or if more than ``LEAKED_SHARE`` of its document's 6-grams stand in training documents.
    """
    summaries = [words_of(example["summary"]) for example in held_out]
    documents = [n_grams(words_of(code_of(example))) for example in held_out]
    wanted_summaries = {gram for words in summaries for gram in n_grams(words)}
    wanted = wanted_summaries.union(*documents)
    in_summaries: set[tuple[str, ...]] = set()
    in_documents: set[tuple[str, ...]] = set()
    whole: set[tuple[str, ...]] = set()
    for example in train:
        words = words_of(example["summary"])
        whole.add(tuple(words))
        # Streaming the training text against what is asked for keeps memory at the held-out sets' size.
        in_summaries.update(wanted_summaries.intersection(n_grams(words)))
        in_documents.update(wanted.intersection(n_grams(words_of(code_of(example)))))
    seen = in_summaries | in_documents
    return [
        tuple(words) in whole
        or not seen.isdisjoint(n_grams(words))
        or len(grams & in_documents) > LEAKED_SHARE * len(grams)
        for words, grams in zip(summaries, documents, strict=True)
    ]


def code_of(example: dict[str, Any]) -> str:
    """The document without its first line, the qualified name, which is never the same in two packages."""
    return example["document"].partition("\n")[2]


def without_duplicates(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of all examples that share a summary or the code, compared by words."""
    kept, summaries, codes = [], set(), set()
    for example in examples:
        summary = " ".join(words_of(example["summary"]))
        code = hashlib.sha256(" ".join(words_of(code_of(example))).encode()).digest()
        if summary in summaries or code in codes:
            continue
        summaries.add(summary)
        codes.add(code)
        kept.append(example)
    return kept


def example_of(name: str, document: str, summary: str, ids: Counter[str]) -> dict[str, Any]:
    """An extracted row as an example; ``ids`` counts how often each name has come, so that ids are unique."""
    ids[name] += 1
    identifier = name if ids[name] == 1 else f"{name}#{ids[name]}"
    return {"id": identifier, "document": document, "summary": summary, "references": [summary], "name": name}


def build(
    packages: Sequence[Package],
    validation: Sequence[str] = VALIDATION_PACKAGES,
    test: Sequence[str] = TEST_PACKAGES,
    workers: int | None = None,
) -> tuple[Splits, dict[str, Any]]:
    """Reads ``packages`` and makes the three splits.

    Returns:
        Split name -> examples ``{id, document, summary, references, name}``; and figures: ``packages`` (name ->
        version, split and examples kept), ``extracted`` (before deduplication), ``leak_rate_before`` and ``leak_rate``
        (share of held-out examples that repeat training text, before and after those were dropped).

    Raises:
        UserError: a split has no example, since none of its packages is installed.
    """
    rows = extract(packages, workers)
    split_of = dict.fromkeys(validation, "validation") | dict.fromkeys(test, "test")
    splits: Splits = {"train": [], "validation": [], "test": []}
    package_of: dict[str, str] = {}
    ids: Counter[str] = Counter()
    for package, found in zip(packages, rows, strict=True):
        for row in found:
            example = example_of(*row, ids)
            package_of[example["id"]] = package.name
            splits[split_of.get(package.name, "train")].append(example)
    extracted = sum(map(len, splits.values()))
    for split, names in (("train", ()), ("validation", validation), ("test", test)):
        if not splits[split]:
            listed = " ".join(names) or "any other package"
            raise UserError("dataset", "pydocs", f"no docstrings for {split}", f"pip install {listed}")
        splits[split] = without_duplicates(splits[split])

    held_out = [*splits["validation"], *splits["test"]]
    leaked = leaks(held_out, splits["train"])
    dropped = {example["id"] for example, leak in zip(held_out, leaked, strict=True) if leak}
    for split in ("validation", "test"):
        splits[split] = [example for example in splits[split] if example["id"] not in dropped]
    held_out = [*splits["validation"], *splits["test"]]
    after = leaks(held_out, splits["train"])
    # An order without meaning, so that a prefix of a split is a fair sample of it.
    for examples in splits.values():
        examples.sort(key=lambda example: hashlib.sha256(example["id"].encode()).digest())
    kept = Counter(package_of[example["id"]] for examples in splits.values() for example in examples)
    stats = {
        "packages": {
            p.name: {"version": p.version, "split": split_of.get(p.name, "train"), "examples": kept[p.name]}
            for p in packages
            if kept[p.name]
        },
        "extracted": extracted,
        "leak_rate_before": sum(leaked) / len(leaked),
        "leak_rate": sum(after) / max(1, len(after)),
    }
    return splits, stats


# --- cache ----------------------------------------------------------------------------------------------------------


def pydocs() -> tuple[Splits, dict[str, Any]]:
    """The embedded set of this environment, as ``build`` returns it; made once for given package versions, then cached.

    Raises:
        UserError: the held-out packages are not installed.
    """
    from filelock import FileLock

    packages = installed_packages()
    try:
        path = cache_folder("pydocs") / f"{environment_key(packages)}.json"
        # Several processes of one launch ask at once: one of them reads the packages, the others wait for it.
        with FileLock(str(path) + ".lock"):
            cached = _read_cache(path)
            if cached is None:
                cached = build(packages)
                _write_cache(path, cached)
            return cached
    except OSError as error:
        logger.warning("pydocs is not cached: %s", error)
        return build(packages)


def _read_cache(path: Path) -> tuple[Splits, dict[str, Any]] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return loaded["splits"], loaded["stats"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(path: Path, content: tuple[Splits, dict[str, Any]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"splits": content[0], "stats": content[1]}), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
