"""Early exit, toy: when a sum of shrinking Gaussians may be left off because its sign is as good as known."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure

_LN10 = math.log(10)
_LIMITS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_BATCH = 100_000  # sums at a time: 60 terms of them are 50 MB


@config
class EarlyExitToyConfig(ExerciseConfig):
    """P(Y ≤ 0 | Y_k = M) for the sum Y of X_i ~ N(0, 2^{−(i−1)}), in closed form, in log space and by simulation."""

    output_dir: str = Field("runs/early_exit_toy", description="folder the stage writes into", json_schema_extra=INERT)
    depths: list[int] = Field([1, 40], description="k of each case: terms that were seen")
    margins: list[float] = Field([5.0, 1e-4], description="M of each case: value of the partial sum, above 0")
    rest: int = Field(50, ge=10, le=200, description="terms after the k-th that a simulated sum has")
    draws: int = Field(200_000, ge=1000, le=10_000_000, description="simulated sums of each case")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if not self.depths or len(self.depths) != len(self.margins):
            problem = f"has {len(self.depths)} values, margins has {len(self.margins)}"
            found.append(Problem("depths", self.depths, problem, "give one k and one M for each case"))
        bad = [k for k in self.depths if not 1 <= k <= 500]
        if bad:
            found.append(Problem("depths", bad[0], "is not a number of terms from 1 to 500", "give such a k"))
        bad = [m for m in self.margins if not 0 < m <= 1e6]
        if bad:
            found.append(Problem("margins", bad[0], "is not above 0 (and at most 1e6)", "give such an M"))
        return found


def early_exit_toy(config: EarlyExitToyConfig) -> dict[str, float]:
    """Compute each case, check it by conditioning, quadrature and importance sampling, and simulate the rule of exit.

    Returns:
        ``early_exit_toy/first_log10_probability`` and ``…/last_log10_probability``: log₁₀ P(Y ≤ 0 | Y_k = M) of the
        first and the last case; ``early_exit_toy/checks`` and ``…/checks_failed``.
    """
    answer = Answer(config, "early_exit_toy", "Early exit, toy: the sign of a sum")
    generator = np.random.default_rng(config.seed)
    cases = list(zip(config.depths, config.margins, strict=True))
    found = [_case(answer, k, m, config, generator) for k, m in cases]
    answer.table(
        "cases",
        ["k", "M", "√(2^(1−k))", "M in those", "log₁₀ P", "P as a double", "simulated log₁₀ P", "± (one s.e.)"],
        found,
        "P(Y ≤ 0 | Y_k = M): in log space, and by importance sampling. 0 as a double means that it underflows.",
    )
    for name, (k, m) in (("first", cases[0]), ("last", cases[-1])):
        z = m / _spread(k)
        answer.value(**{f"{name}_k": k, f"{name}_m": m, f"{name}_z": z, f"{name}_log10": _log10(k, m)})
    _conditioning(answer, config)
    _rule(answer, config, generator)
    _funnel(answer, config)
    return answer.write() | {
        "early_exit_toy/first_log10_probability": _log10(*cases[0]),
        "early_exit_toy/last_log10_probability": _log10(*cases[-1]),
    }


def _spread(k: int) -> float:
    from pipelines.problems.early_exit_toy_math import remaining_variance

    return remaining_variance(k) ** 0.5


def _log10(k: int, m: float) -> float:
    from pipelines.problems.early_exit_toy_math import log_sign_change

    return log_sign_change(m, k) / _LN10


def _case(answer: Answer, k: int, m: float, config: EarlyExitToyConfig, generator: np.random.Generator) -> list[object]:
    """A row of the table, and the case's two checks."""
    from pipelines.problems.early_exit_toy_math import log_sign_change, log_tail_by_quadrature, simulate_tilted

    exact, z = log_sign_change(m, k), m / _spread(k)
    integral = log_tail_by_quadrature(z)
    tolerance = 1e-10 * max(1.0, abs(exact))
    route = "adaptive quadrature of the density, its largest factor taken out"
    answer.check(f"log P(Y ≤ 0 | Y_{k} = {m:g}) = log Φ(−{z:.4g})", integral, exact, tolerance, route)
    n = k + config.rest
    simulated = simulate_tilted(m, k, n, config.draws, generator)
    answer.check(
        f"log P(Y_{n} ≤ 0 | Y_{k} = {m:g}) = log Φ(−M/√(2^(1−k) − 2^(1−n)))",
        simulated.log_probability,
        log_sign_change(m, k, n),
        4 * simulated.relative_error,
        f"importance sampling of {config.draws:,} sums term by term, 4 standard errors",
    )
    row = [k, f"{m:g}", f"{_spread(k):.5g}", f"{z:.5g}", f"{exact / _LN10:.4f}", f"{math.exp(exact):.4g}"]
    return [*row, f"{simulated.log_probability / _LN10:.4f}", f"{simulated.relative_error / _LN10:.4f}"]


def _conditioning(answer: Answer, config: EarlyExitToyConfig) -> None:
    """Which sum has the variance 2^{1−k}: the endless one."""
    from pipelines.problems.early_exit_toy_math import conditional_moments, remaining_variance

    k, m = config.depths[0], config.margins[0]
    route = "conditioning the joint Gaussian on its covariance matrix"
    for n in (k + 1, k + 5, k + 45):
        mean, variance = conditional_moments(m, k, n)
        answer.check(f"E[Y_{n} | Y_{k} = M] = M, at M = {m:g}", mean, m, 1e-12 * m, route)
        statement = f"Var[Y_{n} | Y_{k}] = 2^{1 - k} − 2^{1 - n}"
        answer.check(statement, variance, remaining_variance(k, n), 1e-12, route)
    answer.check(
        f"Var[Y | Y_{k}] of the endless sum = 2^{1 - k}",
        variance,
        remaining_variance(k),
        2.0 ** (1 - n) + 1e-12,
        f"the same with {n} terms; the tolerance is what the terms after them add",
    )
    short = k + 2
    answer.value(
        rest=config.rest,
        draws=config.draws,
        short_n=short,
        short_share=remaining_variance(k, short) / remaining_variance(k),
    )


def _rule(answer: Answer, config: EarlyExitToyConfig, generator: np.random.Generator) -> None:
    """Sums that are left off as soon as the chance of a change of sign is small: errors and terms needed."""
    from pipelines.problems.early_exit_toy_math import simulate_exits
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    draws = min(config.draws, _BATCH)
    rows = []
    for limit in _LIMITS:
        exits = simulate_exits(limit, 60, draws, generator)
        wrong, foretold, terms = exits.wrong.mean(), exits.foretold.mean(), exits.terms.mean()
        # the chance of each sum was foretold from what it was when it stopped, so the variance of the count is known
        error = (exits.foretold * (1 - exits.foretold)).mean() ** 0.5 / draws**0.5
        answer.check(
            f"share of wrong signs when leaving off at a chance of {limit:g} = mean chance foretold",
            wrong,
            foretold,
            4 * error,
            f"simulation of {draws:,} sums of 60 terms, 4 standard errors",
        )
        rows.append((limit, wrong, foretold, terms))
    answer.table(
        "rule",
        ["leave off at a chance of", "wrong signs", "foretold", "mean terms"],
        [[f"{a:g}", f"{b:.5f}", f"{c:.5f}", f"{d:.2f}"] for a, b, c, d in rows],
        "Sums of 60 terms, left off at the first k at which P(the sign changes) is small enough.",
    )
    shown = rows[_LIMITS.index(0.01)]
    answer.value(rule_wrong=shown[1], rule_terms=shown[3], rule_draws=draws)
    x = [limit for limit, *_ in rows]
    panels = [
        Panel([Series("simulated", x, [r[1] for r in rows]), Series("allowed", x, _LIMITS)], "wrong signs", log=True),
        Panel([Series("", x, [r[3] for r in rows])], "mean terms added", zero=True),
    ]
    alt = (
        f"Error falls from {rows[0][1]:.3f} to {rows[-1][1]:.2g}, terms rise from {rows[0][3]:.1f} to {rows[-1][3]:.1f}"
    )
    answer.figure(
        Figure(
            "rule",
            svg=plots.lines("early_exit_toy-rule", panels, "chance at which a sum is left off", alt, logx=True),
            caption="A smaller allowed error costs only a few more of the 60 terms, and the error stays below it.",
            title="What leaving off early costs",
        )
    )


def _funnel(answer: Answer, config: EarlyExitToyConfig) -> None:
    """Some partial sums, and the funnel outside which their sign is known to 1 %."""
    from scipy.special import ndtri

    from pipelines.problems.early_exit_toy_math import term_variances
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    k = np.arange(1, 13)
    generator = np.random.default_rng(config.seed)
    sums = (generator.normal(0, 1, (5, len(k))) * term_variances(len(k)) ** 0.5).cumsum(axis=1)
    edge = -ndtri(0.01) * np.array([_spread(int(i)) for i in k])
    series = [Series("sums" if row == 0 else "", k, values, colour=0) for row, values in enumerate(sums)]
    series += [Series("1 % funnel", k, edge, colour=1), Series("", k, -edge, colour=1)]
    answer.figure(
        Figure(
            "funnel",
            svg=plots.lines(
                "early_exit_toy-funnel",
                [Panel(series, "partial sum")],
                "terms added, k",
                "Five partial sums and a funnel that halves every two terms",
            ),
            caption="Outside the funnel the sign changes with a chance under 1 %; the funnel halves every two terms.",
            title="Where a sum may be left off",
        )
    )
