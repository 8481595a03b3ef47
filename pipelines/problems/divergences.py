"""Divergences: a pair of distributions whose KL is finite one way only, and two Gaussian fits to a bimodal target."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from pipelines.problems.divergences_math import Fit, Mixture

_DISCRETE_P, _DISCRETE_Q = (0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3)
_FORWARD, _REVERSE, _TARGET = 0, 1, 3  # colours


@config
class DivergencesConfig(ExerciseConfig):
    """The target's two modes, and how thoroughly its fits are looked for."""

    output_dir: str = Field("runs/divergences", description="folder the stage writes into", json_schema_extra=INERT)
    distance: float = Field(6.0, ge=0, le=50, description="between the two modes' means, which lie around 0")
    weight: float = Field(0.6, gt=0, lt=1, description="of the first mode, the left one; the second has the rest")
    first_scale: float = Field(1.0, ge=0.05, le=20, description="standard deviation of the first mode")
    second_scale: float = Field(0.7, ge=0.05, le=20, description="standard deviation of the second mode")
    starts: int = Field(20, ge=1, le=500, description="random starts of each fit, beside one at each mode")
    grid: int = Field(121, ge=21, le=401, description="means and scales on each side of the grid search")
    draws: int = Field(200_000, ge=1000, description="samples of the simulation that checks the quadrature")
    largest_reach: float = Field(200.0, ge=20, le=1e5, description="largest L of the integral over [−L, L]")

    def problems(self) -> list[Problem]:
        found = super().problems()
        wide, narrow = max(self.first_scale, self.second_scale), min(self.first_scale, self.second_scale)
        if wide > 50 * narrow:
            problem = f"is {wide / narrow:.0f} times the other scale, which one grid cannot resolve"
            name = "first_scale" if self.first_scale == wide else "second_scale"
            found.append(Problem(name, wide, problem, "give scales within a factor of 50"))
        return found

    def target(self) -> Mixture:
        """The bimodal target."""
        from pipelines.problems.divergences_math import Mixture

        return Mixture(
            (self.weight, 1 - self.weight),
            (-self.distance / 2, self.distance / 2),
            (self.first_scale, self.second_scale),
        )


def divergences(config: DivergencesConfig) -> dict[str, float]:
    """Compute, check and draw; see ``docs/problems/divergences.md``.

    Returns:
        ``divergences/forward_mean``, ``divergences/forward_scale``, ``divergences/reverse_mean``,
        ``divergences/reverse_scale`` (of the best reverse fit), ``divergences/reverse_optima``,
        ``divergences/checks``, ``divergences/checks_failed``.

    Raises:
        UserError: scales that differ too much.
    """
    answer = Answer(config, "divergences", "Divergences")
    _one_way(config, answer)
    _fits(config, answer)
    kept = ("forward_mean", "forward_scale", "reverse_mean", "reverse_scale", "reverse_optima")
    return answer.write() | {f"divergences/{name}": float(answer.values[name]) for name in kept}


# --------------------------------------------------------------------------------------- finite one way, infinite other


def _one_way(config: DivergencesConfig, answer: Answer) -> None:
    """KL(P‖Q) < ∞ = KL(Q‖P), on three points and on the line."""
    import numpy as np
    from scipy.special import rel_entr

    from pipelines.problems import divergences_math as kl

    finite = rel_entr(_DISCRETE_P, _DISCRETE_Q).sum()
    answer.value(discrete_forward=finite)
    route = "scipy.special.rel_entr summed over the support"
    answer.check("three points, P without the third: KL(P‖Q) = log 3/2", finite, math.log(1.5), 1e-12, route)
    infinite = rel_entr(_DISCRETE_Q, _DISCRETE_P).sum()
    answer.check("three points, P without the third: KL(Q‖P) = ∞", infinite, math.inf, 0, route)
    exponents = np.arange(1, 17)
    nearly = np.stack([(1 - 10.0**-exponents) / 2] * 2 + [10.0**-exponents], axis=1)
    reverse = rel_entr(_DISCRETE_Q, nearly).sum(1)
    slope = np.polyfit(exponents[4:] * math.log(10), reverse[4:], 1)[0]
    answer.value(discrete_slope=slope)
    answer.check(
        "P with ε on the third point: KL(Q‖P) grows by Q(3) = 1/3 for each nat of log 1/ε",
        slope,
        1 / 3,
        1e-4,
        "sums over the support for ε = 10⁻⁵ … 10⁻¹⁶, slope by least squares",
    )

    p, q = kl.normal_log_density, kl.cauchy_log_density
    forward = kl.truncated_kl(p, q, 40.0)
    draws = np.random.default_rng(config.seed).standard_normal(config.draws)
    ratio = -0.5 * (draws**2 + math.log(2 * math.pi)) + math.log(math.pi) + np.log1p(draws**2)
    error = ratio.std(ddof=1) / math.sqrt(len(ratio))
    answer.value(continuous_forward=forward)
    answer.check(
        "P standard normal, Q standard Cauchy: KL(P‖Q) by quadrature",
        ratio.mean(),
        forward,
        4 * error,
        f"simulation of {config.draws:,} draws of P, 4 standard errors",
    )
    reaches = np.geomspace(2, config.largest_reach, 25)
    inside = [kl.truncated_kl(q, p, reach) for reach in reaches]
    far = [kl.truncated_kl(q, p, reach) for reach in (1e4, 2e4)]
    answer.value(continuous_reach=reaches[-1], continuous_inside=inside[-1], continuous_slope=(far[1] - far[0]) / 1e4)
    answer.check(
        "KL(Q‖P) over [−L, L] grows by 1/π for each unit of L: it is infinite",
        (far[1] - far[0]) / 1e4,
        1 / math.pi,
        1e-3,
        "adaptive quadrature up to L = 10,000 and 20,000",
    )
    outside = [kl.truncated_kl(p, q, reach) for reach in reaches]
    answer.figure(_growth("one_way", reaches, outside, inside, "L, the end of the integral over [−L, L]"))
    discrete = rel_entr(nearly, _DISCRETE_Q).sum(1)
    answer.figure(
        _growth("one_way_discrete", exponents, discrete, reverse, "log10(1/ε), ε the probability of the third")
    )


def _growth(name: str, x: Sequence[float], forward: Sequence[float], reverse: Sequence[float], xlabel: str) -> Figure:
    from pipelines.reporting.plots import Panel, Series, lines

    panel = Panel(
        [Series("KL(P‖Q)", x, forward, colour=_FORWARD), Series("KL(Q‖P)", x, reverse, colour=_REVERSE)], "nats"
    )
    alt = "KL(P‖Q) stays where it is, KL(Q‖P) grows in a straight line without limit."
    caption = {
        "one_way": "KL(P‖Q) settles at once; KL(Q‖P) grows in a straight line for as long as one integrates.",
        "one_way_discrete": "The same without tails: as the probability ε that P leaves it falls, KL(Q‖P) grows on.",
    }[name]
    title = {"one_way": "P normal, Q Cauchy", "one_way_discrete": "Three points"}[name]
    return Figure(name, lines(f"divergences-{name}", [panel], xlabel, alt), caption=caption, title=title)


# ----------------------------------------------------------------------------------------------------------------- fits


def _starts(config: DivergencesConfig, target: Mixture) -> list[tuple[float, float]]:
    """Each mode's own mean and scale, then random ones over the target's breadth."""
    import numpy as np

    draw = np.random.default_rng(config.seed)
    mean, scale = target.moments()
    low, high = mean - 2 * scale, mean + 2 * scale
    logs = np.log([min(target.scales) / 2, 2 * scale])
    random = zip(draw.uniform(low, high, config.starts), np.exp(draw.uniform(*logs, config.starts)), strict=True)
    return [*zip(target.means, target.scales, strict=True), *random]


def _fits(config: DivergencesConfig, answer: Answer) -> None:
    """The forward fit against the target's moments, the reverse fits against a grid search."""
    import numpy as np

    from pipelines.problems import divergences_math as kl

    target = config.target()
    starts = _starts(config, target)
    forward = kl.distinct([kl.fit(kl.forward_kl, target, *start) for start in starts])
    runs = [kl.fit(kl.reverse_kl, target, *start) for start in starts]
    reverse = kl.distinct(runs)
    best = reverse[0][0]
    mean, scale = target.moments()
    answer.value(target_mean=mean, target_scale=scale, start_count=len(starts))
    answer.value(
        forward_mean=forward[0][0].mean, forward_scale=forward[0][0].scale, forward_kl=forward[0][0].divergence
    )
    answer.value(reverse_mean=best.mean, reverse_scale=best.scale, reverse_kl=best.divergence)
    answer.value(reverse_optima=len(reverse), heavier_bound=-math.log(max(target.weights)))
    answer.check("forward fit: all starts end at one optimum", len(forward), 1, 0, "BFGS from every start")
    route = "BFGS on KL(p‖q) by quadrature; expected: moments of the mixture in closed form"
    answer.check("forward fit: its mean is the target's", forward[0][0].mean, mean, 1e-5, route)
    answer.check("forward fit: its standard deviation is the target's", forward[0][0].scale, scale, 1e-5, route)
    _entropies(target, forward[0][0], answer)

    means = np.linspace(*target.range(2.0), config.grid)
    scales = np.geomspace(min(target.scales) / 3, 1.5 * scale, config.grid)
    table = kl.reverse_table(target, means, scales)
    searched = kl.grid_minima(target, means, scales, table)
    answer.check(
        "reverse fit: number of local optima",
        len(reverse),
        len(searched),
        0,
        f"BFGS from {len(starts)} starts; expected: local minima of a grid of {config.grid}² Gaussians by quadrature",
    )
    for number, ((one, _), other) in enumerate(zip(reverse, searched, strict=False), start=1):
        route = "BFGS on KL(q‖p); expected: grid search by another quadrature, refined"
        answer.check(f"reverse optimum {number}: mean", one.mean, other.mean, 1e-3, route)
        answer.check(f"reverse optimum {number}: standard deviation", one.scale, other.scale, 1e-3, route)
        answer.check(f"reverse optimum {number}: KL(q‖p), nats", one.divergence, other.divergence, 1e-6, route)
    for k in (0, 1):
        excess = max(0.0, runs[k].divergence + math.log(target.weights[k]))
        answer.check(
            f"from mode {k + 1}: KL(q‖p) ≤ −log w of that mode; what it is above",
            excess,
            0.0,
            1e-9,
            "BFGS started at the mode itself",
        )
    _fit_table(target, forward[0][0], reverse, answer)
    _fit_figures(target, forward[0][0], [one for one, _ in reverse], means, scales, table, answer)


def _entropies(target: Mixture, forward: Fit, answer: Answer) -> None:
    """At the moment-matching q, KL(p‖q) = h(q) − h(p): cross-entropy depends on p through its moments alone."""
    import numpy as np
    from scipy.integrate import quad

    low, high = target.range()
    cuts = np.linspace(low, high, 41)
    entropy = -sum(
        quad(lambda x: float(np.exp(t := target.log_density(np.array(x))) * t), a, b, epsabs=1e-11)[0]
        for a, b in itertools.pairwise(cuts)
    )
    answer.check(
        "forward fit: KL(p‖q) = h(q) − h(p), the entropy that a Gaussian of these moments has more",
        forward.divergence,
        0.5 * math.log(2 * math.pi * math.e * forward.scale**2) - entropy,
        1e-6,
        "trapezoid rule; expected: h(p) by adaptive quadrature",
    )


def _fit_table(target: Mixture, forward: Fit, reverse: list[tuple[Fit, int]], answer: Answer) -> None:
    from pipelines.problems import divergences_math as kl

    rows = []
    for name, one, count in [("forward", forward, None), *(("reverse", fit, count) for fit, count in reverse)]:
        at = one.mean, math.log(one.scale)
        both = kl.forward_kl(target, *at)[0], kl.reverse_kl(target, *at)[0]
        reached = "all" if count is None else f"{count} of {answer.values['start_count']}"
        rows.append([name, f"{one.mean:.3f}", f"{one.scale:.3f}", *(f"{value:.3f}" for value in both), reached])
    columns = ["fit", "mean", "standard deviation", "KL(p‖q), nats", "KL(q‖p), nats", "starts that ended there"]
    caption = "Each fit under both divergences: what one of them forgives, the other does not."
    answer.table("fits", columns, rows, caption)


def _fit_figures(
    target: Mixture,
    forward: Fit,
    reverse: list[Fit],
    means: np.ndarray,
    scales: np.ndarray,
    table: np.ndarray,
    answer: Answer,
) -> None:
    import numpy as np

    from pipelines.problems import divergences_math as kl
    from pipelines.reporting.plots import Panel, Series, lines

    x = np.linspace(*target.range(4.0), 301)
    curves = [Series("target p", x, np.exp(target.log_density(x)), colour=_TARGET)]
    curves.append(Series("forward", x, _density(forward, x), colour=_FORWARD))
    for number, one in enumerate(reverse):
        curves.append(Series("" if number else "reverse", x, _density(one, x), colour=_REVERSE))
    answer.figure(
        Figure(
            "fits",
            lines(
                "divergences-fits",
                [Panel(curves, "density", zero=True)],
                "x",
                "The forward fit spreads over both modes; each reverse fit sits on one of them.",
            ),
            caption="The forward fit covers both modes and puts mass between them; each reverse fit keeps to one mode.",
            title="Mode-covering and mode-seeking",
        )
    )
    spread = [_least_forward(target, mean) for mean in means]
    lowest = [one.mean for one in reverse]
    ends = [forward.mean], [kl.forward_kl(target, forward.mean, math.log(forward.scale))[0]]
    panels = [
        Panel(
            [
                Series("forward", means, spread, colour=_FORWARD),
                Series("", *ends, marks=True, colour=_TARGET),
            ],
            "least KL(p‖q), nats",
        ),
        Panel(
            [
                Series("reverse", means, table.min(1), colour=_REVERSE),
                Series("", lowest, [one.divergence for one in reverse], marks=True, colour=_TARGET),
            ],
            "least KL(q‖p), nats",
        ),
    ]
    answer.figure(
        Figure(
            "landscape",
            lines(
                "divergences-landscape",
                panels,
                "mean of the Gaussian, its scale the best for that mean",
                "The forward divergence has one valley; the reverse one has a valley at each mode.",
            ),
            caption="One valley for the forward divergence; for the reverse one a valley a mode, so the start decides "
            "(dots: where BFGS ended).",
            title="The two landscapes",
        )
    )


def _density(one: Fit, x: np.ndarray) -> np.ndarray:
    import numpy as np

    from pipelines.problems.estimates import gaussian_log

    return np.exp(gaussian_log(x, one.mean, one.scale**2))


def _least_forward(target: Mixture, mean: float) -> float:
    """Least KL(p‖N(mean, s²)) over s: at s² = E_p(x − mean)², where its derivative in log s vanishes."""
    from pipelines.problems.divergences_math import forward_kl

    middle, scale = target.moments()
    return forward_kl(target, mean, 0.5 * math.log(scale**2 + (middle - mean) ** 2))[0]
