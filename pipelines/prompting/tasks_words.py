"""Nouns and their plurals: words of the installed packages' documentation, targets by the ``inflect`` package."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    import inflect

# fmt: off
IRREGULAR_NOUNS = (
    "alga", "alumna", "alumnus", "analysis", "axis", "bacillus", "bacterium", "basis", "booklouse", "businessman",
    "calf", "candelabrum", "caveman", "chairman", "child", "codex", "craftsman", "crisis", "criterion", "datum",
    "diagnosis", "dormouse", "elf", "emphasis", "erratum", "extremum", "fireman", "fisherman", "foot", "genus",
    "goose", "graffito", "half", "helix", "housewife", "hypothesis", "jackknife", "knife", "leaf", "life",
    "loaf", "locus", "louse", "man", "meniscus", "midwife", "mouse", "neurosis", "nucleus", "oasis", "ovum", "ox",
    "parenthesis", "penknife", "phenomenon", "policeman", "postman", "radix", "salesman", "sarcophagus", "scarf",
    "self", "sheaf", "shelf", "snowman", "spokesman", "sportsman", "stimulus", "stomach", "stratum",
    "synopsis", "synthesis", "testis", "thesis", "tooth", "vertebra", "werewolf", "wife", "wolf", "woman", "workman",
)
# fmt: on
"""Nouns of English whose plural the three rules of spelling miss (after Quirk et al. 1985, sections 5.80 to 5.98).

They are a closed and rare class, of which technical prose alone has too few to be measured. Their targets are
``inflect``'s, like all others'.
"""

_DETERMINERS = frozenset(("a", "an", "the", "each", "every", "this", "another"))
_WORD = re.compile(r"[^\W\d_]+(?:[-_.'’][\w.]+)*")


@cache
def _engine() -> inflect.engine:
    try:
        import inflect
    except ImportError:
        mend = "pip install 'genalign[prompting]'"
        raise UserError("task", "words", "the package inflect, which gives the plurals, is missing", mend) from None
    return inflect.engine()


def plural(noun: str) -> str:
    """The plural of a noun as ``inflect`` writes it (its modern, not its classical form)."""
    return str(_engine().plural_noun(noun))


def indefinite(word: str) -> str:
    """The word behind its indefinite article, as ``inflect`` writes it: *an axis*."""
    return str(_engine().a(word))


def regular_plural(noun: str) -> str:
    """The plural by the rules of spelling alone: -es after a sibilant, -ies for -y after a consonant, else -s."""
    if re.search(r"(s|x|z|ch|sh)$", noun, re.IGNORECASE):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun, re.IGNORECASE):
        return noun[:-1] + "ies"
    return noun + "s"


def group_of(noun: str, target: str) -> str:
    """``regular`` where the rules of spelling give the target, else ``irregular``."""
    return "regular" if target == regular_plural(noun) else "irregular"


def nouns_of(texts: Iterable[str]) -> list[str]:
    """The nouns of English texts, sorted: words that follow a determiner somewhere and whose plural stands somewhere.

    Both together tell nouns from other words well enough without a tagger; what slips through is mostly a verb that is
    a noun as well.
    """
    seen: set[str] = set()
    determined: Counter[str] = Counter()
    for text in texts:
        words = _WORD.findall(text)
        for before, word in zip(["", *words], words, strict=False):
            if word.isascii() and word.isalpha() and word.islower() and len(word) > 2:
                seen.add(word)
                determined[word] += before.lower() in _DETERMINERS
    found = []
    for word in sorted(seen):
        if not determined[word] or _engine().singular_noun(word):
            continue
        target = plural(word)
        if target != word and target in seen and _engine().singular_noun(target) == word:
            found.append(word)
    return found


def documentation_nouns() -> list[str]:
    """The nouns of the installed packages' documentation and ``IRREGULAR_NOUNS``, sorted."""
    from pipelines.corpus.pydocs import pydocs

    splits, _ = pydocs()
    texts = (example["summary"] for examples in splits.values() for example in examples)
    return sorted({*nouns_of(texts), *IRREGULAR_NOUNS})
