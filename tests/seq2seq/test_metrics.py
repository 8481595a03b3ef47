"""ROUGE against its package, intervals against scipy, the other measures against counts made by hand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.seq2seq.metrics as metrics
from pipelines.seq2seq.metrics import ROUGE_TYPES, bootstrap_interval, rouge, wins

METRIC_FOLDER = Path(metrics.__file__).parent / "rouge_metric"
WORDS = [
    "the",
    "cats",
    "running",
    "jumped",
    "3d",
    "http_server",
    "fooBar",
    "generalization",
    "a",
    "is",
    "of",
    ".",
    "\n",
]


def _text(draw: random.Random, longest: int = 25) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, longest)))


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[list[str]]]:
    draw = random.Random(0)
    return [_text(draw) for _ in range(150)], [[_text(draw) for _ in range(draw.randint(1, 3))] for _ in range(150)]


def test_rouge_equals_rouge_score(pairs):
    from rouge_score.rouge_scorer import RougeScorer

    summaries, references = pairs
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    expected = [scorer.score_multi(several, summary) for summary, several in zip(summaries, references, strict=True)]
    found = rouge(summaries, references)
    for name in ROUGE_TYPES:
        np.testing.assert_array_equal(found[name], [100.0 * one[name].fmeasure for one in expected])
    assert found["rouge1"].std() > 0


def test_rouge_equals_the_evaluate_module(pairs):
    import evaluate

    summaries, references = pairs
    module = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)
    each = module.compute(predictions=summaries, references=references, use_aggregator=False)
    mean = module.compute(predictions=summaries, references=references)
    for name, values in rouge(summaries, references).items():
        np.testing.assert_array_equal(each[name], values)
        assert mean[name] == pytest.approx(values.mean())
    split = module.compute(predictions=["It ran. A cat."], references=[["A cat. It ran."]], split_sentences=True)
    assert split["rougeLsum"] == pytest.approx(100.0)
    assert split["rougeL"] < 100.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=30), st.lists(st.sampled_from("abcde"), max_size=30))
def test_lcs_length_equals_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert metrics.lcs_length(a, b) == table[-1][-1]


def test_rouge_takes_the_best_reference_and_refuses_none():
    scores = rouge(["a small cat"], [["an entirely other thing", "a small cat"]])
    assert all(values[0] == pytest.approx(100.0) for values in scores.values())
    assert rouge(["a small cat"], ["a small cat"])["rouge2"][0] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="no reference"):
        rouge(["a"], [[]])
    with pytest.raises(ValueError, match="unknown ROUGE type"):
        rouge(["a"], [["a"]], ["rouge3"])


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).gamma(2.0, 3.0, 300)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2).confidence_interval
    mean, low, high = bootstrap_interval(values, resamples=20000, seed=3)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(theirs.low, abs=0.03)
    assert high == pytest.approx(theirs.high, abs=0.03)


def test_bootstrap_is_seeded_and_does_not_depend_on_chunking(monkeypatch):
    values = np.arange(50.0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="values"):
            bootstrap_interval(bad)


def test_paired_difference_is_narrower_than_independent_ones():
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 10, 400)
    a, b = hard + draw.normal(1, 1, 400), hard + draw.normal(0, 1, 400)
    difference = bootstrap_interval(a - b)
    assert difference.low > 0.5
    assert bootstrap_interval(a).low < bootstrap_interval(b).high


def test_ties_count_half():
    assert wins([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]).tolist() == [0.5, 0.0, 1.0]
    found = metrics.with_interval("x/win", wins([1, 1, 1, 1], [1, 1, 1, 1]))
    assert found == {"x/win": 0.5, "x/win_ci_low": 0.5, "x/win_ci_high": 0.5}


def test_sentences():
    text = 'See e.g. Smith et al. 2020 and J. Doe. It is 3.5 m. "Really?" Yes!\nA new line'
    assert metrics.sentences(text) == [
        "See e.g. Smith et al. 2020 and J. Doe.",
        "It is 3.5 m.",
        '"Really?"',
        "Yes!",
        "A new line",
    ]
    assert metrics.sentences(" \n ") == []
    assert metrics.lead1("") == ""


@pytest.mark.parametrize(
    ("identifier", "words"),
    [
        ("pkg.HTTPServer.read_file2", "pkg http server read file2"),
        ("XMLHttpRequest", "xml http request"),
        ("__init__", "init"),
        ("isNaN", "is na n"),
        ("", ""),
    ],
)
def test_in_words(identifier, words):
    assert metrics.in_words(identifier) == words


def test_properties_by_hand():
    found = metrics.summary_properties(
        ["read a file a file", "", "read file"], ["def read_file(path): pass", "two words", "def read_file(path): pass"]
    )
    assert found["length"].tolist() == [5, 0, 2]
    assert found["compression"].tolist() == pytest.approx([3 / 5, 2.0, 3 / 2])
    # bigrams: read a, a file, file a, a file; the document holds def read, read file, file path, path pass
    assert found["novel_bigrams"].tolist() == [1.0, 0.0, 0.0]
    assert found["novel_unigrams"].tolist() == pytest.approx([2 / 5, 0.0, 0.0])
    assert found["repetition"].tolist() == pytest.approx([1 / 4, 0.0, 0.0])


def test_lead1_of_code_is_name_and_signature():
    code = "kit.A.f\n@cache\ndef f(\n    self,\n    path,\n):\n    if path:\n        return 1"
    assert metrics.lead1(code, "kit.A.f") == "kit.A.f def f( self, path, ):"
    assert metrics.lead1("kit.f\ndef f(x): return x", "kit.f") == "kit.f def f(x): return x"
    assert metrics.lead1("kit.f", "kit.f") == "kit.f"
    assert metrics.lead1("It runs. It stops.") == "It runs."


def test_baselines():
    found = metrics.baseline_summaries(
        ["kit.io.read_file\ndef read_file(path):"] * 3, ["one", "two", "three"], ["kit.io.read_file"] * 3, seed=4
    )
    assert found["lead1"] == ["kit.io.read_file def read_file(path):"] * 3
    assert found["name"] == ["read file"] * 3
    assert found["qualified_name"] == ["kit io read file"] * 3
    assert set(found["random_summary"]) <= {"one", "two", "three"}
    again = metrics.baseline_summaries(["x"] * 3, ["one", "two", "three"], seed=4)
    assert again["random_summary"] == found["random_summary"]
    assert set(again) == {"lead1", "random_summary"}
    assert set(metrics.baseline_summaries(["x"], [])) == {"lead1"}
