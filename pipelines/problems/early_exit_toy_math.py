"""The sign of a sum of shrinking Gaussians, foretold from its first terms: closed form, log space, simulation.

X_i ~ N(0, 2^{−(i−1)}) independent, Y_k = X_1 + … + X_k, Y the whole sum. Everything here is numpy in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def term_variances(n: int) -> np.ndarray:
    """(n,): 2^{−(i−1)} for i = 1…n."""
    return 2.0 ** -np.arange(n)


def remaining_variance(k: int, n: int | None = None) -> float:
    """Variance of what is still to come after k terms: Σ_{i>k} 2^{−(i−1)}.

    The endless sum leaves 2^{1−k}; a sum of n terms 2^{1−k} − 2^{1−n}.

    Args:
        k: terms seen, at least 0.
        n: terms in all; None for the endless sum.
    """
    return 2.0 ** (1 - k) - (0.0 if n is None else 2.0 ** (1 - n))


def log_sign_change(m: float, k: int, n: int | None = None) -> float:
    """log P(Y ≤ 0 | Y_k = m) = log Φ(−m/√Var(Y − Y_k)), in nats.

    ``log_ndtr`` works in log space throughout: Φ(−z) itself underflows a double from z ≈ 38.5 on.
    """
    from scipy.special import log_ndtr

    return float(log_ndtr(-m / remaining_variance(k, n) ** 0.5))


def conditional_moments(m: float, k: int, n: int) -> tuple[float, float]:
    """Mean and variance of Y_n given Y_k = m, by conditioning the joint Gaussian of (Y_n, Y_k) on its covariance.

    Both sums are rows of ones and zeros over the n independent terms, so their covariance is A diag(σ²) Aᵀ; then
    E = S₁₂S₂₂⁻¹m and Var = S₁₁ − S₁₂S₂₂⁻¹S₂₁ (Bishop 2006, eqs. 2.81–2.82). It does not use that Y − Y_k and Y_k are
    independent.
    """
    a = np.ones((2, n))
    a[1, k:] = 0.0
    s = (a * term_variances(n)) @ a.T
    return float(s[0, 1] / s[1, 1] * m), float(s[0, 0] - s[0, 1] ** 2 / s[1, 1])


def log_tail_by_quadrature(z: float) -> float:
    """log Φ(−z) for z ≥ 0: −z²/2 + log ∫₀^∞ e^{−zu − u²/2} du/√(2π), the integral by adaptive quadrature.

    The substitution x = z + u in ∫_z^∞ φ(x) dx takes out the factor that underflows; what is left is of the size of
    1/z. In units of 1/(1+z) the integrand has the same width whatever z is.
    """
    from scipy.integrate import quad

    width = 1.0 / (1.0 + z)
    found, _ = quad(lambda v: np.exp(-z * width * v - (width * v) ** 2 / 2), 0, 40, epsabs=0, epsrel=1e-13, limit=200)
    return -z * z / 2 + float(np.log(found * width / np.sqrt(2 * np.pi)))


class Simulated(NamedTuple):
    """log of an estimated probability, and the estimate's relative standard error (that of the log, to first order)."""

    log_probability: float
    relative_error: float


def simulate_tilted(m: float, k: int, n: int, draws: int, generator: np.random.Generator) -> Simulated:
    """P(Y_n ≤ 0 | Y_k = m) by importance sampling, term by term.

    The terms X_{k+1}…X_n are drawn with their means moved to −mσ_i²/s², s² = Σ_{i>k} σ_i²: of all shifts that bring the
    rest of the sum to −m on average the likeliest one. Each draw counts with its likelihood ratio
    Π N(x_i; 0, σ_i²)/N(x_i; μ_i, σ_i²). For m = 0 it is plain simulation.

    Args:
        m: value of the partial sum.
        k, n: terms seen, and in all.
        draws: how many sums are drawn.
        generator: of the draws.
    """
    variances = term_variances(n)[k:]
    means = -m * variances / variances.sum()
    rest, log_weight = np.zeros(draws), np.zeros(draws)
    for mean, variance in zip(means, variances, strict=True):
        x = generator.normal(mean, variance**0.5, draws)
        rest += x
        log_weight += ((x - mean) ** 2 - x**2) / (2 * variance)
    log_weight[rest > -m] = -np.inf
    top = log_weight.max()
    scaled = np.exp(log_weight - top)
    mean = scaled.mean()
    return Simulated(float(top + np.log(mean)), float(scaled.std(ddof=1) / draws**0.5 / mean))


class Exits(NamedTuple):
    """What a rule that stops early does to simulated sums.

    Attributes:
        terms: (N,) after how many terms each stopped.
        foretold: (N,) P(the sign still changes), as computed when it stopped.
        wrong: (N,) whether the sign did change.
    """

    terms: np.ndarray
    foretold: np.ndarray
    wrong: np.ndarray


def simulate_exits(limit: float, n: int, draws: int, generator: np.random.Generator) -> Exits:
    """Add terms until the chance that the sign still changes is at most ``limit``, then say the sign of the sum.

    Args:
        limit: in (0, ½].
        n: terms of the whole sum.
        draws: sums.
        generator: of the terms.
    """
    from scipy.special import ndtr

    steps = generator.normal(0.0, 1.0, (draws, n)) * term_variances(n) ** 0.5
    sums = steps.cumsum(axis=1)
    spread = np.array([remaining_variance(k, n) for k in range(1, n)]) ** 0.5
    chance = np.concatenate([ndtr(-np.abs(sums[:, :-1]) / spread), np.zeros((draws, 1))], axis=1)
    at = (chance <= limit).argmax(axis=1)
    rows = np.arange(draws)
    return Exits(at + 1, chance[rows, at], (sums[rows, at] > 0) != (sums[:, -1] > 0))
