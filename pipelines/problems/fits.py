"""Numbers drawn from a few measurements: a mean over seeds, a fitted exponent, where a curve bends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, digits: int = 3) -> str:
        """``0.912 (0.904–0.920)``; the value alone where nothing is known of its spread."""
        if self.low == self.high:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean of a few independent runs with Student's 95 % interval; of a single run, the value alone.

    Args:
        values: (n,), one a run.

    Raises:
        ValueError: if there is no value.
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, mean, mean)
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def power_law(x: Sequence[float], y: Sequence[float]) -> Interval:
    """The exponent a of y ≈ c·x^a by least squares of log y on log x, with Student's 95 % interval of the slope.

    The interval is that of a straight line through scattered points. Where the points bend (a cost with a linear and a
    quadratic term), the exponent is the mean slope over this range of x.

    Args:
        x, y: (n,) positive numbers, n ≥ 3.

    Raises:
        ValueError: fewer than three points, or one that is not positive.
    """
    from scipy.stats import linregress, t

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or len(x) != len(y):
        raise ValueError(f"a slope with its interval needs at least 3 pairs, got {len(x)} and {len(y)} numbers")
    if not ((x > 0).all() and (y > 0).all()):
        raise ValueError("a power law is fitted to positive numbers")
    line = linregress(np.log(x), np.log(y))
    half = float(t.ppf(0.975, len(x) - 2) * line.stderr)
    return Interval(float(line.slope), float(line.slope) - half, float(line.slope) + half)


def bend(x: Sequence[float], y: Sequence[float]) -> int:
    """Index of the point of a rising curve that lies farthest above the chord between its ends.

    Both axes are scaled to 0–1 first, so units do not matter (Satopää et al. 2011, "Finding a 'kneedle' in a
    haystack", for a concave increasing curve).

    Args:
        x, y: (n,) numbers, in any order; the ends are the points of least and greatest x.

    Raises:
        ValueError: fewer than three points, or all of one x.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError("a curve that bends has at least three points, not all above one another")
    first, last = int(x.argmin()), int(x.argmax())
    rise = y[last] - y[first]
    scaled = (y - y[first]) / (abs(rise) or 1.0)
    chord = np.sign(rise) * (x - x[first]) / np.ptp(x)
    return int((scaled - chord).argmax())
