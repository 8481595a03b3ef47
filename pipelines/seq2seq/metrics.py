"""What a summary is measured by: ROUGE, length, compression, novelty, repetition; intervals; trivial baselines.

ROUGE is Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", as implemented by Google's
``rouge_score`` with its stemmer. The numbers here equal that package's exactly; stems, n-gram counts and texts seen
before are kept, and the longest common subsequence is found with whole-word bit operations, because rewards and
preferences need tens of thousands of scores where the package takes milliseconds for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, scoring, tokenize

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# ---------------------------------------------------------------------------------------------------------------- ROUGE


class _CachedStemmer:
    """Porter's stemmer with a memory: words of a corpus recur, and stemming is most of ROUGE's cost."""

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()
        self.stem = lru_cache(maxsize=1 << 18)(self._stemmer.stem)


_STEMMER = _CachedStemmer()


class _Prepared(NamedTuple):
    tokens: tuple[str, ...]
    unigrams: Counter
    bigrams: Counter
    sentences: tuple[tuple[str, ...], ...]  # one per non-empty line, as rouge_score splits for ROUGE-Lsum


@lru_cache(maxsize=1 << 15)
def _prepare(text: str) -> _Prepared:
    tokens = tuple(tokenize.tokenize(text, _STEMMER))
    lines = [line for line in text.split("\n") if line]
    sentences = (tokens,) if len(lines) == 1 else tuple(tuple(tokenize.tokenize(x, _STEMMER)) for x in lines)
    return _Prepared(tokens, Counter(tokens), Counter(pairwise(tokens)), sentences)


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token sequences.

    The bit-vector recurrence of Hyyrö (2004), "Bit-parallel LCS-length computation revisited": a row of the dynamic
    programme is one Python integer, so the cost is ``len(b)`` big-integer operations.
    """
    if not a or not b:
        return 0
    positions: dict[str, int] = {}
    for index, token in enumerate(a):
        positions[token] = positions.get(token, 0) | (1 << index)
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _overlap_f(reference: Counter, candidate: Counter) -> float:
    smaller, larger = (reference, candidate) if len(reference) < len(candidate) else (candidate, reference)
    common = sum(min(count, larger[key]) for key, count in smaller.items() if key in larger)
    precision = common / max(candidate.total(), 1)
    recall = common / max(reference.total(), 1)
    return scoring.fmeasure(precision, recall)


def _lcs_f(reference: tuple[str, ...], candidate: tuple[str, ...]) -> float:
    if not reference or not candidate:
        return 0.0
    common = lcs_length(reference, candidate)
    return scoring.fmeasure(common / len(candidate), common / len(reference))


def _summary_lcs_f(reference: _Prepared, candidate: _Prepared) -> float:
    if len(reference.sentences) == 1 and len(candidate.sentences) == 1:
        # The union of one LCS is that LCS, and clipping by counts never bites on a common subsequence.
        return _lcs_f(reference.sentences[0], candidate.sentences[0])
    # Which of several longest subsequences is taken decides the union, so the package's own choice is kept here.
    return rouge_scorer._summary_level_lcs(list(reference.sentences), list(candidate.sentences)).fmeasure


_SCORERS = {
    "rouge1": lambda r, c: _overlap_f(r.unigrams, c.unigrams),
    "rouge2": lambda r, c: _overlap_f(r.bigrams, c.bigrams),
    "rougeL": lambda r, c: _lcs_f(r.tokens, c.tokens),
    "rougeLsum": _summary_lcs_f,
}


def rouge(
    summaries: Sequence[str],
    references: Sequence[str | Sequence[str]],
    types: Sequence[str] = ROUGE_TYPES,
) -> dict[str, np.ndarray]:
    """ROUGE F1 of every summary against the best of its references (best for each type by itself, as ``score_multi``).

    Args:
        summaries: N texts. For ROUGE-Lsum a newline ends a sentence (see ``one_sentence_a_line``).
        references: N references, or N non-empty lists of references.
        types: any of ``ROUGE_TYPES``.

    Returns:
        type -> (N,) float64 on 0-100.

    Raises:
        ValueError: if the lengths differ, a type is unknown or an example has no reference.
    """
    unknown = [name for name in types if name not in _SCORERS]
    if unknown:
        raise ValueError(f"unknown ROUGE type {unknown[0]!r}; the types are {', '.join(_SCORERS)}")
    if len(summaries) != len(references):
        raise ValueError(f"{len(summaries)} summaries but {len(references)} sets of references")
    scores = {name: np.zeros(len(summaries)) for name in types}
    for row, (summary, several) in enumerate(zip(summaries, references, strict=True)):
        several = [several] if isinstance(several, str) else several
        if not len(several):
            raise ValueError(f"example {row} has no reference")
        candidate = _prepare(summary)
        prepared = [_prepare(reference) for reference in several]
        for name in types:
            scorer = _SCORERS[name]
            scores[name][row] = 100.0 * max(scorer(reference, candidate) for reference in prepared)
    return scores


# ------------------------------------------------------------------------------------------------------------ sentences

_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|etc|al|fig|figs|eq|eqs|sec|no|dr|mr|mrs|ms|prof|st|jr|sr|inc|ltd|co|resp|approx|incl|u\.s|u\.k)"
    r"|\b(?-i:[A-Z]))\.$",
    re.IGNORECASE,
)
_BOUNDARY = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9À-ÖØ-Þ])|(?<=[。！？])")


def sentences(text: str) -> list[str]:
    """The sentences of a text: a newline ends one, and so does ``. ! ?`` before a capital or digit.

    Abbreviations and initials do not end one. A rule, not a model, so that it works offline in any language that marks
    sentences so; empty ones are left out.
    """
    found: list[str] = []
    for line in text.split("\n"):
        start = 0
        for boundary in _BOUNDARY.finditer(line):
            piece = line[start : boundary.start()]
            if _ABBREVIATION.search(piece):
                continue
            found.append(line[start : boundary.end()].strip())
            start = boundary.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def one_sentence_a_line(text: str) -> str:
    """The text with one sentence on each line, as ROUGE-Lsum wants it; the other types do not see the difference."""
    return "\n".join(sentences(text))


# ----------------------------------------------------------------------------------------------------- other properties


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _word_tokens(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def novel_ngrams(summary: str, document: str, n: int) -> float:
    """Share of the summary's n-grams that do not occur in the document (See et al. 2017), on 0-1.

    Words are runs of letters and digits, in lower case, so ``read_file`` in code holds the words *read file*.
    A summary of fewer than ``n`` words has no n-gram and counts as 0.
    """
    mine = _ngrams(_word_tokens(summary), n)
    if not mine:
        return 0.0
    source = set(_ngrams(_word_tokens(document), n))
    return sum(ngram not in source for ngram in mine) / len(mine)


def repetition(summary: str, n: int = 2) -> float:
    """Share of the summary's n-grams that repeat an earlier one of the same summary, on 0-1; 0 when it has none."""
    mine = _ngrams(_word_tokens(summary), n)
    return 1.0 - len(set(mine)) / len(mine) if mine else 0.0


def summary_properties(summaries: Sequence[str], documents: Sequence[str]) -> dict[str, np.ndarray]:
    """Length, compression, novelty and repetition of every summary.

    Returns:
        ``length`` (words between spaces), ``compression`` (words of the document for each word of the summary; an
        empty summary counts as one word), ``novel_unigrams``, ``novel_bigrams`` and ``repetition`` (of bigrams), each
        (N,) float64.
    """
    pairs = list(zip(summaries, documents, strict=True))
    length = np.array([len(summary.split()) for summary in summaries], dtype=float)
    words = np.array([len(document.split()) for document in documents], dtype=float)
    return {
        "length": length,
        "compression": words / np.maximum(length, 1.0),
        "novel_unigrams": np.array([novel_ngrams(s, d, 1) for s, d in pairs]),
        "novel_bigrams": np.array([novel_ngrams(s, d, 2) for s, d in pairs]),
        "repetition": np.array([repetition(s) for s in summaries]),
    }


# ------------------------------------------------------------------------------------------------------------ intervals


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of ``values`` with a percentile bootstrap interval (Efron & Tibshirani 1993, §13.3).

    For a difference between two systems on the same documents, pass the differences: that is the paired bootstrap.

    Args:
        values: (N,) one value a document.
        confidence: coverage of the interval.
        resamples: how often N documents are drawn with replacement.
        seed: of the draws; the same seed and N give the same draws, so systems are compared on equal resamples.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty vector, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity")
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(values))  # bounds memory at some 64 MB whatever N is
    means = np.concatenate(
        [
            values[generator.integers(0, len(values), (min(chunk, resamples - start), len(values)))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def with_interval(key: str, values: Sequence[float] | np.ndarray, *, resamples: int = 2000, seed: int = 0) -> dict:
    """``{key: mean, key_ci_low: …, key_ci_high: …}`` as metrics.json keeps a mean (95 % interval)."""
    mean, low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
    return {key: mean, f"{key}_ci_low": low, f"{key}_ci_high": high}


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of ``count`` trials, at 95 % by default."""
    centre = share + z**2 / (2 * count)
    spread = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    # It holds the share itself; at 0 and 1 rounding would put it outside.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def calibration_bins(
    confidence: np.ndarray, right: np.ndarray, *, low: float = 0.0, bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """How far confidence agrees with how often it is right, in bins of equal width over [low, 1].

    The interval of a bin is Wilson's at 95 %.

    Args:
        confidence: (N,) probabilities given to the verdicts.
        right: (N,) 1 where the verdict is right, 0 where not, or between.
        low: the least confidence there can be.
        bins: how many.

    Returns:
        The non-empty bins as ``{"predicted", "observed", "low", "high", "count"}``, and the expected calibration error
        Σ (n_b / N)·|observed_b − predicted_b| (Naeini et al. 2015).
    """
    place = np.clip(((confidence - low) / (1 - low) * bins).astype(int), 0, bins - 1)
    found, error = [], 0.0
    for index in range(bins):
        inside = place == index
        count = int(inside.sum())
        if not count:
            continue
        predicted, observed = float(confidence[inside].mean()), float(right[inside].mean())
        bottom, top = wilson_interval(observed, count)
        found.append({"predicted": predicted, "observed": observed, "low": bottom, "high": top, "count": count})
        error += count / len(confidence) * abs(observed - predicted)
    return found, error


def wins(scores: Sequence[float] | np.ndarray, rivals: Sequence[float] | np.ndarray) -> np.ndarray:
    """1 where the score is above the rival's, 0 where below, 0.5 at a tie: (N,). Their mean is the win rate."""
    scores, rivals = np.asarray(scores, dtype=float), np.asarray(rivals, dtype=float)
    if scores.shape != rivals.shape:
        raise ValueError(f"{scores.shape} scores against {rivals.shape}")
    return np.where(scores > rivals, 1.0, np.where(scores < rivals, 0.0, 0.5))


# ------------------------------------------------------------------------------------------------------------ baselines


def lead1(document: str, name: str | None = None) -> str:
    """The first sentence of a document; of source code its qualified name and the header of its first statement.

    Args:
        document: prose, or source code that begins with its qualified name.
        name: that name where the document is source code.
    """
    if name is None:
        found = sentences(document)
        return found[0] if found else ""
    lines = [line.strip() for line in document.removeprefix(name).strip().split("\n")]
    lines = [line for line in lines if not line.startswith("@")] or [""]
    # A signature may run over several lines; it ends with the colon that opens the body.
    end = next((index for index, line in enumerate(lines) if line.endswith(":")), 0)
    return f"{name} {' '.join(lines[: end + 1])}".strip()


def in_words(identifier: str) -> str:
    """An identifier as words: ``pkg.HTTPServer.read_file2`` -> ``pkg http server read file2``."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+|[^\W\d_A-Za-z]+", identifier)
    return " ".join(part.lower() for part in parts)


def baseline_summaries(
    documents: Sequence[str],
    train_summaries: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, list[str]]:
    """What needs no model: every trivial baseline's summaries.

    Args:
        documents: N documents.
        train_summaries: summaries of the training split; ``random_summary`` draws from them.
        names: N qualified names (``pkg.mod.Class.method``) where the documents are source code.

    Returns:
        ``lead1``, ``random_summary`` (where there is a training split) and, with names, ``name`` (its last part in
        words) and ``qualified_name`` (all of it in words): each a list of N texts.
    """
    found: dict[str, list[str]] = {}
    found["lead1"] = [lead1(*pair) for pair in zip(documents, names or [None] * len(documents), strict=True)]
    if names is not None:
        found["name"] = [in_words(name.rsplit(".", 1)[-1]) for name in names]
        found["qualified_name"] = [in_words(name) for name in names]
    if len(train_summaries):
        drawn = np.random.default_rng(seed).integers(0, len(train_summaries), len(documents))
        found["random_summary"] = [train_summaries[int(index)] for index in drawn]
    return found


def mean_intervals(
    prefix: str, columns: Mapping[str, np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """``with_interval`` over several columns: keys ``<prefix>/<column>`` and their interval ends."""
    metrics: dict[str, float] = {}
    for name, values in columns.items():
        metrics |= with_interval(f"{prefix}/{name}", values, resamples=resamples, seed=seed)
    return metrics
