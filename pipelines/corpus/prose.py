"""Prose documentation that packages ship: READMEs and ``.md``, ``.rst`` and ``.txt`` files written to be read."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from pipelines.corpus.pydocs import is_own

SUFFIXES = (".md", ".rst", ".txt")
MIN_WORDS = 30
MAX_BYTES = 1_000_000
"""Larger files are data or concatenations, whatever their suffix says."""

MIN_LETTERS, MIN_FUNCTION_WORDS = 0.7, 0.12
"""Least shares of letters and blanks among the characters, and of the commonest English words among the words: what has
fewer of either is a table, a listing, a word list or another language."""

# Licences, change logs, lists of people and of requirements are written after patterns, not to explain anything.
_NOT_PROSE = re.compile(
    r"licen[cs]e|copying|copyright|notice|authors|contribut|maintainers|credits|thanks|change|history|news|whats_?new"
    r"|release|requirements|constraints|top_level|entry_points|sources|record|cmake|third.?party|code_of_conduct"
    r"|security|vocab|words|stop|robots|templates?$|templates?\.",
    re.IGNORECASE,
)
_MARKUP_LINE = re.compile(
    r"""!\[[^\]]*\]\(                                            # Markdown image, badge
    |^\s*\.\.\s+(?:image|figure|raw|include|toctree|_|\|)        # reStructuredText directive that holds no prose
    |^\s*:(?:target|alt|width|height|align|scale|class|maxdepth|hidden|caption|glob):
    |^\s*</?\w[^>]*>\s*$                                         # a line that is one HTML tag
    |^\s*\[[^\]]+\]:\s*\S+\s*$                                   # Markdown link target
    """,
    re.VERBOSE,
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_BLANK_LINES = re.compile(r"\n{3,}")
# fmt: off
_FUNCTION_WORDS = frozenset((
    "a", "and", "are", "as", "be", "by", "can", "for", "from", "if", "in", "is", "it", "of", "on", "or", "that", "the",
    "this", "to", "with", "you",
))
# fmt: on


def clean(text: str) -> str:
    """``text`` without badges, images, HTML comments and link targets, its lines otherwise as they stand."""
    lines = (line.rstrip() for line in _COMMENT.sub("", text).expandtabs(4).splitlines())
    return _BLANK_LINES.sub("\n\n", "\n".join(line for line in lines if not _MARKUP_LINE.search(line))).strip()


def is_prose(text: str) -> bool:
    """Whether ``text`` is mostly English sentences."""
    words = text.lower().split()
    if len(words) < MIN_WORDS:
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    function_words = sum(word in _FUNCTION_WORDS for word in words)
    return letters >= MIN_LETTERS * len(text) and function_words >= MIN_FUNCTION_WORDS * len(words)


def prose_of(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, str]]:
    """``(place, text)`` of the package's long description and of its documentation files, cleaned.

    Tests, copies of other packages and what is not prose are left out; a file that is not UTF-8 too.
    """
    described = clean(distribution.metadata.get_payload() or distribution.metadata.get("Description") or "")
    if is_prose(described):
        yield "README", described
    for file in sorted(distribution.files or [], key=lambda f: f.as_posix()):
        if file.suffix.lower() not in SUFFIXES or not is_own(file.parts) or any(map(_NOT_PROSE.search, file.parts)):
            continue
        try:
            path = file.locate()
            text = clean(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else ""
        except (OSError, UnicodeDecodeError):
            continue
        if is_prose(text):
            yield file.as_posix(), text


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """The licence that the metadata state: PEP 639, else classifiers, else the ``License`` field's first line."""
    metadata = distribution.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    classifiers = [c for c in classifiers if c != "OSI Approved"]
    first_line = next(iter((metadata.get("License") or "").strip().splitlines()), "").strip()
    return metadata.get("License-Expression") or " and ".join(classifiers) or first_line[:80] or "not stated"
