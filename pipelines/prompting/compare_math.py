"""Intervals over seeds and examples at once, for means and for differences of two systems.

A value x[s, n] belongs to training (or choice of shots) s and example n. Both are samples: another seed and other words
would give other numbers. The pigeonhole bootstrap (Owen 2007, "The pigeonhole bootstrap") resamples rows and columns
independently of each other; its variance is not below the true one but for a factor (S − 1)/S of the seeds' own part,
which matters where the seeds are few and differ much: look at each seed's mean as well.
"""

from __future__ import annotations

import numpy as np


def _counts(generator: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """How often each of ``size`` things is drawn, as shares: (resamples, size), each row summing to 1."""
    return generator.multinomial(size, np.full(size, 1.0 / size), resamples) / size


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} must be seeds × examples, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values


def crossed_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds and examples, and the ends of its percentile interval.

    Args:
        values: (S, N).
        confidence: coverage.
        resamples: draws of S seeds and N examples.
        seed: of the draws.

    Raises:
        ValueError: not a non-empty matrix of finite numbers.
    """
    values = _checked(values, "values")
    generator = np.random.default_rng(seed)
    examples = _counts(generator, values.shape[1], resamples)
    seeds = _counts(generator, values.shape[0], resamples)
    means = np.einsum("bs,sn,bn->b", seeds, values, examples, optimize=True)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(values.mean()), float(low), float(high)


def crossed_difference(
    first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of first − second on the same examples, and the ends of its interval.

    The examples are drawn together for both (they are paired), the seeds of each by themselves (they are not).

    Args:
        first: (S, N).
        second: (R, N).
        confidence, resamples, seed: as of ``crossed_interval``.

    Raises:
        ValueError: not two non-empty matrices over the same examples.
    """
    first, second = _checked(first, "first"), _checked(second, "second")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} examples against {second.shape[1]}")
    generator = np.random.default_rng(seed)
    examples = _counts(generator, first.shape[1], resamples)
    ours, theirs = (_counts(generator, len(values), resamples) for values in (first, second))
    differences = np.einsum("bs,sn,bn->b", ours, first, examples, optimize=True)
    differences = differences - np.einsum("bs,sn,bn->b", theirs, second, examples, optimize=True)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(differences, [tail, 100.0 - tail])
    return float(first.mean() - second.mean()), float(low), float(high)


def crossed_metric(key: str, values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """A mean with its interval as metrics.json keeps it: ``key``, ``key_ci_low``, ``key_ci_high``."""
    mean, low, high = crossed_interval(values, resamples=resamples, seed=seed)
    return {key: mean, f"{key}_ci_low": low, f"{key}_ci_high": high}
