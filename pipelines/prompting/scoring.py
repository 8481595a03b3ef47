"""What an answer is worth: parsing, kinds of failure, shares with Wilson's interval, confidence, paired differences."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.prompting.backends import ChoiceScore, Generation
from pipelines.prompting.tasks import Example
from pipelines.seq2seq.metrics import calibration_bins, wilson_interval, with_interval

Kind = Literal["right", "plausible", "uninformative", "invalid", "failed"]
KINDS: tuple[Kind, ...] = ("right", "plausible", "uninformative", "invalid", "failed")
"""Right; valid but wrong; nothing, a line's end or punctuation alone; anything else; no answer came."""

Normalization = Literal["sum", "token", "character"]

_AROUND = string.whitespace + string.punctuation + "“”‘’…"


@dataclass(frozen=True)
class Verdict:
    """One answer judged.

    Attributes:
        answer: what was understood: a choice's label, a word, a summary; None where nothing was.
        kind: see ``KINDS``.
        confidence: probability the model gave its answer; None where it is not known.
    """

    answer: str | None
    kind: Kind
    confidence: float | None = None

    @property
    def right(self) -> bool:
        return self.kind == "right"

    @property
    def valid(self) -> bool:
        """Whether it is an answer at all, if a wrong one."""
        return self.kind in ("right", "plausible")


# --- reading answers --------------------------------------------------------------------------------------------------


def bare(text: str) -> str:
    """A text without white space and punctuation around it, in one case, its inner white space single."""
    return " ".join(text.strip(_AROUND).casefold().split())


def parse_choice(text: str, example: Example) -> str | None:
    """The label of the choice that a generated text names, or None.

    It is a choice's label (``B``, ``(B)``, ``B.``, ``B: because``), a choice's text, or begins with one. A label that
    could as well be a word, as in ``A bird``, counts only before punctuation or the choice's own text.
    """
    found = text.strip()
    for choice in sorted(example.choices, key=lambda c: -len(c.text)):
        if re.match(rf"{re.escape(bare(choice.text))}(?!\w)", bare(found)):
            return choice.label
    for choice in sorted(example.choices, key=lambda c: -len(c.label)):
        match = re.match(rf"[\s(\[\"'“]*{re.escape(choice.label)}(?!\w)(.*)", found, re.DOTALL)
        if match is None:
            continue
        rest = match.group(1)
        could_be_word = rest[:1] == " " and rest[1:2].isalpha() and not bare(rest).startswith(bare(choice.text))
        return None if could_be_word and choice.label.isalpha() else choice.label
    return None


def judge_text(text: str, example: Example, task: str) -> tuple[str | None, Kind]:
    """What a generated text says, and what kind of answer it is.

    Args:
        text: as generated, up to the stop text.
        example: what was asked.
        task: ``multiple_choice``, ``words`` or ``summarization`` (where every text with a word in it is plausible).
    """
    if not bare(text):
        return None, "uninformative"
    if task == "multiple_choice":
        label = parse_choice(text, example)
        if label is None:
            return None, "invalid"
        return label, "right" if label == example.answer else "plausible"
    if task == "summarization":
        return text.strip(), "plausible"
    line = text.strip().splitlines()[0]
    words = bare(line).split()
    asked = len(example.answer.split())
    word = bare(" ".join(words[:asked]))
    if word == bare(example.answer):
        return word, "right"
    return word, "plausible" if is_form(word, example.input) else "invalid"


def is_form(word: str, of: str) -> bool:
    """Whether a word may be a form of another one: made of letters, and half of that one's letters begin it."""
    of = bare(of)
    return all(part.isalpha() for part in re.split(r"[\s'’-]", word)) and word.startswith(of[: math.ceil(len(of) / 2)])


def judge_generation(generation: Generation, example: Example, task: str) -> Verdict:
    """A generated answer judged; its confidence is the probability of all its tokens together."""
    if generation.failure is not None:
        return Verdict(None, "failed")
    answer, kind = judge_text(generation.text, example, task)
    known = generation.log_probs is not None
    return Verdict(answer, kind, math.exp(math.fsum(generation.log_probs)) if known else None)


def choice_probabilities(
    scores: Sequence[ChoiceScore], choices: Sequence[str], normalization: Normalization = "sum"
) -> np.ndarray:
    """Softmax over the choices' log-probabilities: (K,), summing to 1.

    Args:
        scores: of each choice.
        choices: the texts that were scored.
        normalization: ``sum`` compares log p(choice | prompt); ``token`` divides it by the choice's tokens and
            ``character`` by its characters, so that long choices are not at a disadvantage (Brown et al. 2020, 2.4).
    """
    by = {"sum": lambda s, c: 1, "token": lambda s, c: s.tokens, "character": lambda s, c: len(c.strip())}
    values = np.array([s.log_prob / by[normalization](s, c) for s, c in zip(scores, choices, strict=True)])
    values = np.exp(values - values.max())
    return values / values.sum()


def judge_scores(
    scores: Sequence[ChoiceScore], example: Example, choices: Sequence[str], normalization: Normalization = "sum"
) -> Verdict:
    """The likeliest choice judged (the first of equals); its confidence is its share among the choices."""
    if any(score.failure is not None for score in scores):
        return Verdict(None, "failed")
    probabilities = choice_probabilities(scores, choices, normalization)
    best = int(probabilities.argmax())
    label = example.choices[best].label
    return Verdict(label, "right" if label == example.answer else "plausible", float(probabilities[best]))


# --- measuring --------------------------------------------------------------------------------------------------------


def share(key: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """A share with Wilson's 95 % interval, as metrics.json keeps it: ``key``, ``key_ci_low``, ``key_ci_high``.

    Args:
        key: of the metric.
        values: (N,) 0 or 1, N ≥ 1.
    """
    mean = float(np.mean(values))
    low, high = wilson_interval(mean, len(values))
    return {key: mean, f"{key}_ci_low": low, f"{key}_ci_high": high}


def measure_verdicts(
    prefix: str, verdicts: Sequence[Verdict], *, bins: int = 10, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What all answers of one model to one strategy are worth together. Failed ones are counted, and left out else.

    Args:
        prefix: of the keys, ``hard/MODEL/STRATEGY``.
        verdicts: of each question.
        bins: of the calibration curve.
        resamples, seed: of the bootstrap intervals of mean confidences.

    Returns:
        ``accuracy``, ``valid_rate`` and the share of each wrong kind (Wilson's interval), ``failed`` and ``answered``
        (counts); where confidence is known, ``confidence_right``, ``confidence_wrong`` (bootstrap interval) and
        ``calibration_error``. And the bins of the calibration curve.
    """
    answered = [v for v in verdicts if v.kind != "failed"]
    metrics = {f"{prefix}/failed": float(len(verdicts) - len(answered)), f"{prefix}/answered": float(len(answered))}
    if not answered:
        return metrics, []
    metrics |= share(f"{prefix}/accuracy", [v.right for v in answered])
    metrics |= share(f"{prefix}/valid_rate", [v.valid for v in answered])
    for kind in ("plausible", "uninformative", "invalid"):
        metrics |= share(f"{prefix}/{kind}_rate", [v.kind == kind for v in answered])
    known = [v for v in answered if v.confidence is not None]
    if not known:
        return metrics, []
    confidence = np.array([v.confidence for v in known])
    right = np.array([v.right for v in known], dtype=float)
    for name, chosen in (("confidence_right", right == 1), ("confidence_wrong", right == 0)):
        if chosen.any():
            metrics |= with_interval(f"{prefix}/{name}", confidence[chosen], resamples=resamples, seed=seed)
    curve, error = calibration_bins(confidence, right, bins=bins)
    return metrics | {f"{prefix}/calibration_error": error}, curve


def paired_difference(
    key: str, first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Mean of first − second over the questions that both have, with a paired bootstrap interval; empty without any.

    Args:
        key: of the metric.
        first, second: question -> value.
        resamples, seed: of the bootstrap.
    """
    both = [question for question in first if question in second]
    if not both:
        return {}
    return with_interval(key, [first[q] - second[q] for q in both], resamples=resamples, seed=seed)
