"""Intervals over seeds and examples, against enumeration and against what they must cover."""

import itertools

import numpy as np
import pytest

from pipelines.prompting.compare_math import crossed_difference, crossed_interval, crossed_metric


def enumerated(values: np.ndarray) -> np.ndarray:
    """The mean of every resample of rows and of columns, each equally likely."""
    seeds, examples = values.shape
    rows = list(itertools.product(range(seeds), repeat=seeds))
    columns = list(itertools.product(range(examples), repeat=examples))
    return np.array([values[np.ix_(r, c)].mean() for r in rows for c in columns])


def test_the_interval_is_that_of_all_resamples():
    values = np.array([[0.0, 1.0, 1.0, 0.2], [1.0, 1.0, 0.0, 0.6], [0.3, 0.0, 0.0, 0.9]])
    mean, low, high = crossed_interval(values, resamples=200_000)
    exact = enumerated(values)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(exact, [2.5, 97.5])), abs=0.012)
    draws = np.array([crossed_interval(values, resamples=100, seed=s)[0] for s in range(3)])
    assert (draws == mean).all()


def test_a_difference_pairs_the_examples_and_not_the_seeds():
    first = np.array([[0.0, 1.0, 2.0], [0.5, 1.5, 2.5]])
    second = first - 0.25
    mean, low, high = crossed_difference(first, second, resamples=100_000)
    assert mean == pytest.approx(0.25)
    # the examples' part cancels; what is left is the seeds', drawn for each by themselves: ±0.5 with 1/16 each
    assert (low, high) == pytest.approx((-0.25, 0.75), abs=1e-9)
    once = first[:1], second[:1]
    assert crossed_difference(*once) == pytest.approx((0.25, 0.25, 0.25))


def test_seeds_that_disagree_widen_the_interval():
    generator = np.random.default_rng(0)
    words = generator.random((1, 200)) < 0.5
    agreeing = np.repeat(words, 3, axis=0).astype(float)
    disagreeing = np.array([[0.2], [0.5], [0.8]]) * np.ones((3, 200))
    assert np.ptp(crossed_interval(agreeing)[1:]) == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)
    assert crossed_interval(disagreeing)[1:] == pytest.approx((0.2, 0.8), abs=0.11)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        seeds, examples = generator.normal(0, 0.05, (8, 1)), generator.normal(0, 0.4, (1, 60))
        values = 0.5 + seeds + examples + generator.normal(0, 0.3, (8, 60))
        _, low, high = crossed_interval(values, resamples=300, seed=trial)
        hits += low <= 0.5 <= high
    assert hits >= 185


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 4)), np.array([[1.0, np.nan]])])
def test_what_is_no_matrix_of_numbers_is_refused(values):
    with pytest.raises(ValueError, match="values"):
        crossed_interval(values)


def test_other_examples_cannot_be_paired():
    with pytest.raises(ValueError, match="3 examples against 2"):
        crossed_difference(np.zeros((2, 3)), np.zeros((2, 2)))


def test_metrics_are_named_as_everywhere():
    found = crossed_metric("soft/accuracy", np.array([[1.0, 1.0], [1.0, 1.0]]))
    assert found == {"soft/accuracy": 1.0, "soft/accuracy_ci_low": 1.0, "soft/accuracy_ci_high": 1.0}
