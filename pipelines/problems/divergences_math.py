"""Kullback–Leibler divergences in one dimension by quadrature, and two ways to fit a Gaussian by them; pure, float64.

KL(a‖b) = ∫ a log(a/b), in nats (Kullback and Leibler 1951). The forward divergence of a fit q to a target p is KL(p‖q),
the reverse one KL(q‖p) (Bishop 2006, "Pattern Recognition and Machine Learning", section 10.1.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import logsumexp

_LOG_TWO_PI = math.log(2 * math.pi)
_NODES = 4001
_REACH = 9.0  # standard deviations: what lies beyond weighs less than a double can tell
SAME = 1e-3
"""Two fits whose means and log scales differ by less are one."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians, p(x) = Σ_k w_k N(x; μ_k, s_k²).

    Args:
        weights: w, summing to 1.
        means: μ.
        scales: standard deviations s.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]

    def _parts(self, x: np.ndarray) -> np.ndarray:
        """log(w_k N(x; μ_k, s_k²)): x's shape and K behind it."""
        w, m, s = (np.asarray(values) for values in (self.weights, self.means, self.scales))
        z = (np.asarray(x)[..., None] - m) / s
        return np.log(w) - 0.5 * (z**2 + _LOG_TWO_PI) - np.log(s)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x), nats, of x's shape."""
        return logsumexp(self._parts(x), axis=-1)

    def score(self, x: np.ndarray) -> np.ndarray:
        """d log p(x) / dx = Σ_k P(k|x) (μ_k − x)/s_k², of x's shape."""
        parts = self._parts(x)
        share = np.exp(parts - logsumexp(parts, axis=-1, keepdims=True))
        m, s = np.asarray(self.means), np.asarray(self.scales)
        return (share * (m - np.asarray(x)[..., None]) / s**2).sum(-1)

    def moments(self) -> tuple[float, float]:
        """Mean Σ w μ and standard deviation √(Σ w (s² + μ²) − mean²)."""
        w, m, s = (np.asarray(values) for values in (self.weights, self.means, self.scales))
        mean = float(w @ m)
        return mean, math.sqrt(float(w @ (s**2 + m**2)) - mean**2)

    def range(self, reach: float = _REACH) -> tuple[float, float]:
        """Where all but a vanishing part of the mass lies: ``reach`` standard deviations beyond each component."""
        pairs = list(zip(self.means, self.scales, strict=True))
        return min(m - reach * s for m, s in pairs), max(m + reach * s for m, s in pairs)


def truncated_kl(a: Callable[[float], float], b: Callable[[float], float], reach: float) -> float:
    """∫_{−L}^{L} e^a (a − b) dx of two even log densities by adaptive quadrature, nats.

    Args:
        a: log density that the divergence is taken under.
        b: the other log density.
        reach: L.
    """

    def integrand(x: float) -> float:
        return math.exp(a(x)) * (a(x) - b(x)) if a(x) > -700 else 0.0

    # Cut at powers of two: one interval from 0 to a large L would miss what lies near 0.
    cuts = [0.0, *(2.0**k for k in range(-1, 60) if 2.0**k < reach), reach]
    return 2 * sum(quad(integrand, low, high, epsabs=1e-12)[0] for low, high in itertools.pairwise(cuts))


def cauchy_log_density(x: float) -> float:
    """log of 1/(π(1 + x²))."""
    return -math.log(math.pi) - math.log1p(x * x)


def normal_log_density(x: float) -> float:
    """log N(x; 0, 1)."""
    return -0.5 * (x * x + _LOG_TWO_PI)


# ----------------------------------------------------------------------------------------------------------------- fits


@dataclass(frozen=True)
class Fit:
    """A Gaussian and its divergence from the target, in nats."""

    mean: float
    scale: float
    divergence: float


def forward_kl(target: Mixture, mean: float, log_scale: float) -> tuple[float, np.ndarray]:
    """KL(p‖N(mean, scale²)) and its gradient in (mean, log scale), by the trapezoid rule over the target's range.

    The rule's error falls faster than any power of the spacing for smooth functions that vanish at both ends.
    """
    x = np.linspace(*target.range(), _NODES)
    log_p = target.log_density(x)
    weight = np.exp(log_p) * (x[1] - x[0])
    z = (x - mean) * math.exp(-log_scale)
    value = weight @ (log_p + 0.5 * (z**2 + _LOG_TWO_PI) + log_scale)
    return float(value), np.array([-(weight @ z) * math.exp(-log_scale), weight @ (1 - z**2)])


def reverse_kl(target: Mixture, mean: float, log_scale: float) -> tuple[float, np.ndarray]:
    """KL(N(mean, scale²)‖p) and its gradient in (mean, log scale), by the trapezoid rule over z, x = mean + scale·z.

    E_z[log q(x) − log p(x)]: log q(x) is −½(z² + log 2π) − log scale, whose mean does not depend on the mean, and p is
    differentiated through x (reparametrization).
    """
    z = np.linspace(-_REACH, _REACH, _NODES)
    weight = np.exp(-0.5 * (z**2 + _LOG_TWO_PI)) * (z[1] - z[0])
    scale = math.exp(log_scale)
    x = mean + scale * z
    value = -0.5 * (1 + _LOG_TWO_PI) - log_scale - weight @ target.log_density(x)
    score = target.score(x)
    return float(value), np.array([-(weight @ score), -1 - scale * (weight @ (z * score))])


def fit(
    objective: Callable[[Mixture, float, float], tuple[float, np.ndarray]], target: Mixture, mean: float, scale: float
) -> Fit:
    """The Gaussian that BFGS comes to from a start, by the objective's gradient (Nocedal and Wright 2006, chapter 6).

    Args:
        objective: ``forward_kl`` or ``reverse_kl``.
        target: p.
        mean: of the start.
        scale: standard deviation of the start.
    """
    found = minimize(
        lambda at: objective(target, *at), [mean, math.log(scale)], jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    return Fit(float(found.x[0]), math.exp(found.x[1]), float(found.fun))


def distinct(fits: Sequence[Fit]) -> list[tuple[Fit, int]]:
    """The different ones of some fits, least divergence first, each with how often it stands there."""
    groups: list[tuple[Fit, int]] = []
    for one in sorted(fits, key=lambda f: f.divergence):
        for number, (known, count) in enumerate(groups):
            close = abs(known.mean - one.mean) < SAME and abs(math.log(known.scale / one.scale)) < SAME
            if close:
                groups[number] = known, count + 1
                break
        else:
            groups.append((one, 1))
    return groups


# ---------------------------------------------------------------------------------------------------------- grid search


def reverse_table(target: Mixture, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """KL(N(m, s²)‖p) for every pair, by one sum over a fixed grid of x: (M, S), nats.

    Another quadrature than ``reverse_kl``: nothing is reparametrized or differentiated.
    """
    low, high = means.min() - _REACH * scales.max(), means.max() + _REACH * scales.max()
    x = np.linspace(low, high, max(_NODES, int((high - low) / scales.min() * 4)))
    log_p, step = target.log_density(x), x[1] - x[0]
    columns = []
    for scale in scales:
        log_q = -0.5 * (((x - means[:, None]) / scale) ** 2 + _LOG_TWO_PI) - math.log(scale)
        columns.append((np.exp(log_q) * (log_q - log_p)).sum(1) * step)
    return np.stack(columns, axis=1)


def grid_minima(
    target: Mixture, means: np.ndarray, scales: np.ndarray, table: np.ndarray, rounds: int = 8
) -> list[Fit]:
    """Every local minimum of the reverse divergence on a grid, each refined by ever finer grids around it.

    Args:
        target: p.
        means: (M,) equally spaced.
        scales: (S,) equally spaced in the logarithm.
        table: ``reverse_table`` of them.
        rounds: of refinement; each makes the grid five times as fine.

    Returns:
        Least divergence first. A cell at the grid's edge is no minimum.
    """
    inner = table[1:-1, 1:-1]
    neighbours = [
        table[1 + i : table.shape[0] - 1 + i, 1 + j : table.shape[1] - 1 + j]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if (i, j) != (0, 0)
    ]
    places = np.argwhere(np.all([inner < other for other in neighbours], axis=0)) + 1
    found = []
    for i, j in places:
        mean, log_scale = means[i], math.log(scales[j])
        wide, high = means[1] - means[0], math.log(scales[1] / scales[0])
        for _ in range(rounds):
            near = mean + wide * np.linspace(-1, 1, 11)
            logs = log_scale + high * np.linspace(-1, 1, 11)
            finer = reverse_table(target, near, np.exp(logs))
            best = np.unravel_index(finer.argmin(), finer.shape)
            mean, log_scale = near[best[0]], logs[best[1]]
            wide, high = wide / 5, high / 5
        found.append(Fit(float(mean), math.exp(log_scale), float(finer.min())))
    return sorted(found, key=lambda f: f.divergence)
