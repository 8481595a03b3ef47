"""Independent routes that several exercises take: moments on a grid, a line through samples, standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ERRORS = 4.0
"""Standard errors that a simulated number may be off: one in 16,000 is, by chance."""


class Moments(NamedTuple):
    """Of a density that was given without its constant: log of its integral, mean and variance."""

    log_mass: float
    mean: float
    variance: float


def moments(log_density: Callable[[np.ndarray], np.ndarray], low: float, high: float, points: int = 20_001) -> Moments:
    """Moments by the trapezoidal rule on an even grid, which for smooth densities that vanish at both ends is exact to
    rounding (Trefethen and Weideman 2014).

    Args:
        log_density: log of the density, with or without its constant, at (points,) places.
        low, high: outside of which the density is nothing.
        points: of the grid.
    """
    x = np.linspace(low, high, points)
    logs = log_density(x)
    highest = float(logs.max())
    weights = np.exp(logs - highest)
    total = np.trapezoid(weights, x)
    mean = np.trapezoid(weights * x, x) / total
    variance = np.trapezoid(weights * (x - mean) ** 2, x) / total
    return Moments(highest + math.log(total), float(mean), float(variance))


def expectation(
    log_density: Callable[[np.ndarray], np.ndarray],
    values: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    points: int = 20_001,
) -> float:
    """E[values] under a density that was given without its constant, by the same rule."""
    x = np.linspace(low, high, points)
    logs = log_density(x)
    weights = np.exp(logs - logs.max())
    return float(np.trapezoid(weights * values(x), x) / np.trapezoid(weights, x))


def gaussian_log(x: np.ndarray | float, mean: np.ndarray | float, variance: float) -> np.ndarray | float:
    """log N(x; mean, variance)."""
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))


class Line(NamedTuple):
    """y = intercept + slope·x by least squares: with standard errors, and the variance around it."""

    slope: float
    slope_error: float
    intercept: float
    intercept_error: float
    variance: float


def line(x: np.ndarray, y: np.ndarray) -> Line:
    """The line through the points (x, y), both (n,)."""
    centre, count = x.mean(), len(x)
    spread = ((x - centre) ** 2).sum()
    slope = ((x - centre) * y).sum() / spread
    intercept = y.mean() - slope * centre
    variance = ((y - intercept - slope * x) ** 2).sum() / (count - 2)
    errors = math.sqrt(variance / spread), math.sqrt(variance * (1 / count + centre**2 / spread))
    return Line(float(slope), errors[0], float(intercept), errors[1], float(variance))


def variance_error(variance: float, count: int) -> float:
    """Standard error of the sample variance of ``count`` Gaussian numbers: √(2/n) of it."""
    return variance * math.sqrt(2 / count)


def mean_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent numbers, (n,)."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))
