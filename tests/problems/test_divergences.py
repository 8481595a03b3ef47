"""Divergences: densities, gradients and fits against quadrature, closed forms and a grid; the stage."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import divergences_math as kl
from pipelines.problems.divergences import DivergencesConfig, divergences
from pipelines.problems.estimates import gaussian_log
from pipelines.runner import load_recipe
from tests.problems.pages import assert_page_is_filled

TWO = kl.Mixture((0.6, 0.4), (-2.0, 2.5), (1.0, 0.5))
ONE = kl.Mixture((1.0,), (0.7,), (1.3,))


def gaussian_kl(m: float, s: float, prior_m: float, prior_s: float) -> float:
    return math.log(prior_s / s) + (s**2 + (m - prior_m) ** 2) / (2 * prior_s**2) - 0.5


def central(function, x: float, step: float = 1e-5) -> float:
    return (function(x + step) - function(x - step)) / (2 * step)


def test_the_mixture_is_a_density_with_its_moments_and_score():
    density = lambda x: math.exp(TWO.log_density(np.array(x)))  # noqa: E731
    ends, cuts = TWO.range(), {"points": [-2.0, 2.5], "epsabs": 1e-12}
    assert quad(density, *ends, **cuts)[0] == pytest.approx(1.0, abs=1e-10)
    mean = quad(lambda x: x * density(x), *ends, **cuts)[0]
    scale = math.sqrt(quad(lambda x: (x - mean) ** 2 * density(x), *ends, **cuts)[0])
    assert TWO.moments() == pytest.approx((mean, scale), abs=1e-9)
    for x in (-3.0, 0.1, 0.7, 2.4):
        assert float(TWO.score(np.array(x))) == pytest.approx(central(lambda t: float(TWO.log_density(t)), x), abs=1e-7)


@pytest.mark.parametrize("objective", [kl.forward_kl, kl.reverse_kl])
def test_both_divergences_against_quadrature_and_central_differences(objective):
    def integrand(x: float, mean: float, scale: float) -> float:
        p, q = float(TWO.log_density(np.array(x))), float(gaussian_log(x, mean, scale**2))
        return math.exp(p) * (p - q) if objective is kl.forward_kl else math.exp(q) * (q - p)

    for mean, scale in ((0.3, 1.7), (-1.5, 0.6)):
        value, gradient = objective(TWO, mean, math.log(scale))
        pieces = np.linspace(-16, 16, 33)
        exact = sum(quad(integrand, a, b, (mean, scale), epsabs=1e-12)[0] for a, b in itertools.pairwise(pieces))
        assert value == pytest.approx(exact, abs=1e-8)
        slopes = [
            central(lambda m, s=scale: objective(TWO, m, math.log(s))[0], mean),
            central(lambda log, m=mean: objective(TWO, m, log)[0], math.log(scale)),
        ]
        assert gradient == pytest.approx(slopes, abs=1e-6)


def test_of_two_gaussians_both_are_the_closed_form():
    assert kl.forward_kl(ONE, 0.2, math.log(0.9))[0] == pytest.approx(gaussian_kl(0.7, 1.3, 0.2, 0.9), abs=1e-9)
    assert kl.reverse_kl(ONE, 0.2, math.log(0.9))[0] == pytest.approx(gaussian_kl(0.2, 0.9, 0.7, 1.3), abs=1e-9)
    table = kl.reverse_table(ONE, np.array([0.2, 0.5]), np.array([0.9, 2.0]))
    assert table[0, 0] == pytest.approx(gaussian_kl(0.2, 0.9, 0.7, 1.3), abs=1e-7)
    assert table[1, 1] == pytest.approx(gaussian_kl(0.5, 2.0, 0.7, 1.3), abs=1e-7)


def test_both_fits_of_a_gaussian_are_that_gaussian():
    for objective in (kl.forward_kl, kl.reverse_kl):
        found = kl.fit(objective, ONE, -2.0, 3.0)
        assert (found.mean, found.scale, found.divergence) == pytest.approx((0.7, 1.3, 0.0), abs=1e-6)
    means, scales = np.linspace(-3, 4, 31), np.geomspace(0.3, 5, 31)
    (searched,) = kl.grid_minima(ONE, means, scales, kl.reverse_table(ONE, means, scales))
    assert (searched.mean, searched.scale) == pytest.approx((0.7, 1.3), abs=1e-4)


def test_finite_one_way_and_without_limit_the_other():
    p, q = kl.normal_log_density, kl.cauchy_log_density
    assert kl.truncated_kl(p, q, 40.0) == pytest.approx(kl.truncated_kl(p, q, 1e4), abs=1e-9)
    grown = [kl.truncated_kl(q, p, reach) for reach in (1e3, 2e3, 4e3)]
    assert (grown[1] - grown[0]) / 1e3 == pytest.approx(1 / math.pi, rel=1e-2)
    assert (grown[2] - grown[1]) / 2e3 == pytest.approx(1 / math.pi, rel=1e-2)


def test_ends_that_agree_are_counted_together():
    ends = [kl.Fit(0.0, 1.0, 0.5), kl.Fit(2.0, 1.0, 0.3), kl.Fit(1e-4, 1.0, 0.5)]
    assert kl.distinct(ends) == [(ends[1], 1), (ends[0], 2)]


@pytest.mark.parametrize(
    ("changes", "optima", "side"),
    # With the lighter mode on the left there is a third optimum, a broad one that is worse than either.
    [({"weight": 0.3}, 3, 1), ({"distance": 1.0, "second_scale": 1.0}, 1, -1), ({"distance": 2.0}, 1, 0)],
)
def test_optima_of_the_reverse_divergence_are_those_of_the_grid(changes, optima, side):
    target = validate(DivergencesConfig, changes).target()
    mean, scale = target.moments()
    starts = [*zip(target.means, target.scales, strict=True), (mean, scale), (mean, scale / 2)]
    found = [fit for fit, _ in kl.distinct([kl.fit(kl.reverse_kl, target, *start) for start in starts])]
    means, scales = np.linspace(*target.range(2.0), 41), np.geomspace(min(target.scales) / 3, 1.5 * scale, 41)
    searched = kl.grid_minima(target, means, scales, kl.reverse_table(target, means, scales))
    assert len(found) == len(searched) == optima
    for one, other in zip(found, searched, strict=True):
        assert (one.mean, one.scale) == pytest.approx((other.mean, other.scale), abs=1e-3)
    if side:
        assert math.copysign(1, found[0].mean) == side  # the heavier mode, or what lies between


def test_the_stage_checks_all_it_says(tmp_path):
    given = {"output_dir": str(tmp_path), "starts": 6, "grid": 61, "draws": 20_000, "largest_reach": 20.0}
    metrics = divergences(validate(DivergencesConfig, given))
    assert_page_is_filled(tmp_path)
    assert metrics["divergences/checks"] >= 17
    assert metrics["divergences/reverse_optima"] == 2


def test_wrong_scales_end_in_one_line(capsys, tmp_path):
    with pytest.raises(UserError, match="within a factor of 50"):
        validate(DivergencesConfig, {"first_scale": 20.0, "second_scale": 0.1})
    with pytest.raises(SystemExit) as ended:
        load_recipe("problems/divergences")(["weight=1.5", f"output_dir={tmp_path / 'out'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
