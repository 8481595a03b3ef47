"""Reading answers, kinds of failure, confidence, calibration: against hand-made cases and plain formulas."""

import math

import numpy as np
import pytest

from pipelines.prompting.backends import ChoiceScore, Generation
from pipelines.prompting.scoring import (
    KINDS,
    Verdict,
    choice_probabilities,
    judge_generation,
    judge_scores,
    judge_text,
    measure_verdicts,
    paired_difference,
    parse_choice,
    share,
)
from pipelines.prompting.tasks import Choice, Example

QUESTION = Example(
    "q",
    "What do birds eat?",
    "B",
    (Choice("A", "bird seed"), Choice("B", "a stone"), Choice("C", "bird"), Choice("D", "no")),
)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("[D] because", "D"),
        ("B: it is so", "B"),
        ("B\n\nQuestion", "B"),
        ("C bird", "C"),
        ("A stone", "B"),  # the text of B, not the label A
        ("A good question", None),  # an article
        ("A", "A"),
        ("A, of course", "A"),
        (" a stone.", "B"),
        ("Bird seed!", "A"),
        ("bird", "C"),
        ("bird seeds", "C"),
        ("birds", None),
        ("no", "D"),
        ("nothing", None),
        ("E", None),
        ("Because", None),
        ("the answer is B", None),
    ],
)
def test_a_choice_is_read_from_what_models_write(text, label):
    assert parse_choice(text, QUESTION) == label


def test_numbers_as_labels():
    one = Example("n", "?", "1", (Choice("1", "x"), Choice("2", "y"), Choice("11", "z")))
    assert [parse_choice(text, one) for text in (" 1", "11", "2 is right", "12")] == ["1", "11", "2", None]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" children", "right"),
        ("Children.", "right"),
        (" children\nman -> men", "right"),
        (' "children"', "right"),
        (" childs", "plausible"),
        (" child", "plausible"),
        (" chicks", "plausible"),
        (" dogs", "invalid"),
        (" chi1dren", "invalid"),
        (" 12", "invalid"),
        ("", "uninformative"),
        (" \n", "uninformative"),
        (" ->", "uninformative"),
        ("...", "uninformative"),
    ],
)
def test_kinds_of_answers_to_a_word(text, kind):
    assert judge_text(text, Example("w", "child", "children"), "words")[1] == kind


def test_kinds_of_answers_to_a_question_and_a_document():
    kinds = [judge_text(text, QUESTION, "multiple_choice")[1] for text in (" B", " C", "\n", "perhaps")]
    assert kinds == ["right", "plausible", "uninformative", "invalid"]
    document = Example("d", "text", "summary", references=("summary",))
    assert judge_text(" It is so.", document, "summarization") == ("It is so.", "plausible")
    assert judge_text(" . ", document, "summarization") == (None, "uninformative")
    two_words = Example("w", "attorney general", "attorneys general")
    assert judge_text(" attorneys general\nx", two_words, "words")[1] == "right"


def test_confidence_is_the_probability_of_the_whole_answer():
    sure = judge_generation(Generation(" B", (-0.5, -0.25)), QUESTION, "multiple_choice")
    assert sure == Verdict("B", "right", pytest.approx(math.exp(-0.75)))
    assert judge_generation(Generation(" B", None), QUESTION, "multiple_choice").confidence is None
    failed = judge_generation(Generation("", None, False, "HTTP 500"), QUESTION, "multiple_choice")
    assert failed == Verdict(None, "failed")
    assert not failed.valid


def test_choices_are_compared_by_sum_token_or_character():
    scores = [ChoiceScore(-4.0, 4), ChoiceScore(-3.0, 2), ChoiceScore(-3.5, 1), ChoiceScore(-9.0, 1)]
    texts = [" bird seed", " a stone", " bird", " no"]
    expected = np.exp([-4.0, -3.0, -3.5, -9.0])
    assert choice_probabilities(scores, texts) == pytest.approx(expected / expected.sum())
    verdict = judge_scores(scores, QUESTION, texts)
    assert (verdict.answer, verdict.kind) == ("B", "right")
    assert verdict.confidence == pytest.approx(expected[1] / expected.sum())
    assert judge_scores(scores, QUESTION, texts, "token").answer == "A"  # −1, −1.5, −3.5, −9
    by_character = [-4 / 9, -3 / 7, -3.5 / 4, -9 / 2]
    assert choice_probabilities(scores, texts, "character") == pytest.approx(
        np.exp(by_character) / np.exp(by_character).sum()
    )
    lost = judge_scores([*scores[:3], ChoiceScore(math.nan, 0, "HTTP 500")], QUESTION, texts)
    assert lost == Verdict(None, "failed")


def test_shares_have_wilsons_interval():
    found = share("x", [1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    # the roots of (p − 0.2)² = z² p (1 − p) / n
    z2, n = 1.959964**2, 10
    roots = np.roots([1 + z2 / n, -(0.4 + z2 / n), 0.04])
    assert found == {
        "x": 0.2,
        "x_ci_low": pytest.approx(min(roots)),
        "x_ci_high": pytest.approx(max(roots)),
    }
    assert share("x", [0] * 5)["x_ci_low"] == 0
    assert share("x", [0] * 5)["x_ci_high"] > 0.3


def test_measures_of_verdicts_count_every_kind_and_leave_failed_ones_out():
    verdicts = [
        *[Verdict("B", "right", 0.9)] * 6,
        *[Verdict("C", "plausible", 0.6)] * 2,
        Verdict(None, "uninformative", 0.3),
        Verdict(None, "invalid", 0.1),
        *[Verdict(None, "failed")] * 5,
    ]
    metrics, curve = measure_verdicts("hard/m/s", verdicts, bins=10)
    assert metrics["hard/m/s/failed"] == 5
    assert metrics["hard/m/s/answered"] == 10
    rates = {kind: metrics[f"hard/m/s/{kind}_rate"] for kind in ("plausible", "uninformative", "invalid", "valid")}
    assert metrics["hard/m/s/accuracy"] == 0.6
    assert rates == {"plausible": 0.2, "uninformative": 0.1, "invalid": 0.1, "valid": 0.8}
    assert metrics["hard/m/s/confidence_right"] == pytest.approx(0.9)
    assert metrics["hard/m/s/confidence_wrong"] == pytest.approx(0.4)
    # bins: 0.9 (6 right), 0.6 (2 wrong), 0.3 and 0.1 (one wrong each)
    assert metrics["hard/m/s/calibration_error"] == pytest.approx((6 * 0.1 + 2 * 0.6 + 0.3 + 0.1) / 10)
    assert [b["count"] for b in curve] == [1, 1, 2, 6]
    only_failed, nothing = measure_verdicts("hard/m/s", [Verdict(None, "failed")] * 3)
    assert only_failed == {"hard/m/s/failed": 3.0, "hard/m/s/answered": 0.0}
    assert nothing == []
    assert set(KINDS) == {"right", "failed", *rates} - {"valid"}


def test_a_calibrated_answerer_has_a_small_error_and_a_sure_one_a_large():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(size=20_000)
    honest = [Verdict("B", "right" if draw.random() < c else "plausible", c) for c in confidence]
    assert measure_verdicts("x", honest)[0]["x/calibration_error"] < 0.02
    boastful = [Verdict("B", "right" if n % 2 else "plausible", 1.0) for n in range(100)]
    assert measure_verdicts("x", boastful)[0]["x/calibration_error"] == pytest.approx(0.5)


def test_differences_are_paired():
    first = {f"q{n}": float(n % 2) for n in range(200)}
    second = {f"q{n}": float(n % 2 and n > 19) for n in range(190)} | {"other": 1.0}
    found = paired_difference("d", first, second)
    assert found["d"] == pytest.approx(10 / 190)
    # unpaired, the interval would be three times as wide and hold zero
    assert 0 < found["d_ci_low"] < found["d"] < found["d_ci_high"] < 0.1
    assert paired_difference("d", first, {}) == {}
