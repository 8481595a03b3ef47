"""In-context word tasks: what can be done with a word, over the words of a corpus, as lines that a model goes on with.

An episode is several solved examples of one task, the task never being named:

    box -> boxes
    city -> cities
    ship -> ships

so that a model of episodes must find out from the examples before it what is asked. The first line alone says nothing.
A word counts as a verb where its regular past and its present participle both stand in the text, so the targets of
these two are the corpus's own; plurals come with the nouns, articles from ``inflect``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.prompting.tasks_words import indefinite

LINE = "{word} -> {answer}\n"
"""One solved example; the strategies for word tasks that come with the project write the same."""

_WORD = re.compile(r"(?<![A-Za-z_0-9])[a-z]+(?![A-Za-z_0-9])")


@dataclass(frozen=True)
class Vocabulary:
    """The words of some text.

    Attributes:
        words: its lower-case words, sorted.
        past: verb -> its past tense, of the verbs that are regular.
        participle: the same verbs -> their present participle.
    """

    words: tuple[str, ...]
    past: dict[str, str]
    participle: dict[str, str]


def read_vocabulary(texts: Iterable[str], *, longest: int = 12, at_least: int = 2) -> Vocabulary:
    """The words and regular verbs of some text.

    Args:
        texts: what is read.
        longest: letters of a word at most; it has three at least.
        at_least: how often a word must stand there.
    """
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(_WORD.findall(text))
    words = sorted(word for word, count in seen.items() if count >= at_least and 3 <= len(word) <= longest)
    past, participle = {}, {}
    for word in words:
        if seen[word + "e"] > seen[word]:
            continue  # "comput", whose past would be that of "compute"
        forms = inflected(word, "ed", seen), inflected(word, "ing", seen)
        if all(forms):
            past[word], participle[word] = forms
    return Vocabulary(tuple(words), past, participle)


def inflected(verb: str, suffix: Literal["ed", "ing"], seen: Mapping[str, int]) -> str | None:
    """The form of a verb by the rules of spelling that a text uses most; None where it uses none.

    Args:
        verb: in its base form.
        suffix: of the past or of the participle.
        seen: how often each word stands in the text.
    """
    if verb.endswith("e"):
        forms = [verb + "d"] if suffix == "ed" else [verb[:-1] + "ing"]
    elif suffix == "ed" and re.search(r"[^aeiou]y$", verb):
        forms = [verb[:-1] + "ied"]
    else:
        forms = [verb + suffix, verb + verb[-1] + suffix]
    return max((form for form in forms if seen.get(form)), key=lambda form: seen[form], default=None)


def word_tasks(
    vocabulary: Vocabulary, plurals: Mapping[str, str], held_out: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The tasks of the training episodes: name -> word -> answer.

    Args:
        vocabulary: words and verbs.
        plurals: training noun -> its plural.
        held_out: nouns -> plurals of which neither may be seen: no word and no answer here is one of them.

    Returns:
        ``plural``, ``past``, ``participle``, ``article``, ``add_s``, ``copy``, ``reverse``, ``upper``, ``capitalize``,
        ``first_letter`` and ``last_letter``. Plurals and words with an s behind them are mostly alike: a few examples
        do not always tell which is meant.

    Raises:
        UserError: ``inflect`` is not installed.
    """
    hidden = {*held_out, *held_out.values()}
    words = sorted({*vocabulary.words, *plurals} - hidden)
    verbs = [v for v in vocabulary.past if not {v, vocabulary.past[v], vocabulary.participle[v]} & hidden]
    tasks = {
        "plural": dict(plurals),
        "past": {verb: vocabulary.past[verb] for verb in verbs},
        "participle": {verb: vocabulary.participle[verb] for verb in verbs},
        "article": {word: indefinite(word) for word in words},
        "add_s": {word: word + "s" for word in words},
        "copy": {word: word for word in words},
        "reverse": {word: word[::-1] for word in words},
        "upper": {word: word.upper() for word in words},
        "capitalize": {word: word.capitalize() for word in words},
        "first_letter": {word: word[0] for word in words},
        "last_letter": {word: word[-1] for word in words},
    }
    # The plural of *base* is that of *basis*, and *pot* with an s behind it is *pots*: so answers are looked at too.
    return {
        name: {word: answer for word, answer in pairs.items() if not {word, answer.lower()} & hidden}
        for name, pairs in tasks.items()
    }
