"""Early exit, toy: the closed form against other routes, in ranges where doubles underflow."""

import math

import mpmath
import numpy as np
import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import early_exit_toy_math as toy
from pipelines.problems.early_exit_toy import EarlyExitToyConfig, early_exit_toy
from tests.problems.pages import assert_page_is_filled


def log_tail(z: float) -> float:
    """log Φ(−z) with 50 digits."""
    with mpmath.workdps(50):
        return float(mpmath.log(mpmath.erfc(mpmath.mpf(z) / mpmath.sqrt(2)) / 2))


@pytest.mark.parametrize(("k", "m"), [(1, 5.0), (40, 1e-4), (1, 0.1), (12, 0.3), (60, 1.0)])
def test_log_space_against_fifty_digits(k, m):
    wanted = log_tail(m / math.sqrt(2.0 ** (1 - k)))
    assert toy.log_sign_change(m, k) == pytest.approx(wanted, rel=1e-12)
    assert toy.log_tail_by_quadrature(m / math.sqrt(2.0 ** (1 - k))) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_the_two_cases_of_the_exercise():
    assert math.exp(toy.log_sign_change(5.0, 1)) == pytest.approx(2.866515718791939e-07, rel=1e-12)
    rare = toy.log_sign_change(1e-4, 40)
    assert math.exp(rare) == 0.0  # a double cannot hold it
    z = 1e-4 / math.sqrt(2.0**-39)
    series = -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4 - 15 / z**6)
    assert rare == pytest.approx(series, rel=1e-12)


@pytest.mark.parametrize("n", [4, 9, 40])
def test_the_rest_of_a_sum_by_conditioning_and_by_adding_up(n):
    mean, variance = toy.conditional_moments(0.7, 3, n)
    assert mean == pytest.approx(0.7, abs=1e-12)
    assert variance == pytest.approx(sum(2.0 ** -(i - 1) for i in range(4, n + 1)), rel=1e-12)
    assert toy.remaining_variance(3, n) == pytest.approx(variance, rel=1e-12)
    assert toy.remaining_variance(3) == pytest.approx(variance, abs=2.0 ** (1 - n) * (1 + 1e-9))


@pytest.mark.parametrize(("k", "m"), [(1, 5.0), (40, 1e-4), (3, 0.4)])
def test_importance_sampling_agrees_within_its_error(k, m):
    found = toy.simulate_tilted(m, k, k + 50, 40_000, np.random.default_rng(1))
    assert found.relative_error < 0.1
    assert found.log_probability == pytest.approx(toy.log_sign_change(m, k, k + 50), abs=4 * found.relative_error)


def test_importance_sampling_without_a_tilt_counts():
    found = toy.simulate_tilted(0.0, 2, 30, 20_000, np.random.default_rng(0))
    assert math.exp(found.log_probability) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(20_000))


@pytest.mark.parametrize("limit", [0.2, 0.01])
def test_the_rule_is_wrong_as_often_as_foretold(limit):
    exits = toy.simulate_exits(limit, 40, 60_000, np.random.default_rng(2))
    assert (exits.foretold <= limit).all()
    error = math.sqrt(exits.foretold.mean() / 60_000)
    assert exits.wrong.mean() == pytest.approx(exits.foretold.mean(), abs=4 * error)
    assert exits.terms.min() >= 1
    assert exits.terms.max() <= 40


def test_the_stage_writes_its_answer(tmp_path):
    fields = {"output_dir": str(tmp_path), "draws": 4000, "depths": [1, 40], "margins": [5.0, 1e-4]}
    metrics = early_exit_toy(validate(EarlyExitToyConfig, fields))
    assert metrics["early_exit_toy/checks_failed"] == 0
    assert metrics["early_exit_toy/first_log10_probability"] == pytest.approx(-6.5426, abs=1e-3)
    assert metrics["early_exit_toy/last_log10_probability"] == pytest.approx(log_tail(74.15) / math.log(10), abs=0.5)
    assert_page_is_filled(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"depths": [1]}, "margins has 2"),
        ({"depths": [0, 4]}, "not a number of terms"),
        ({"margins": [1.0, -1.0]}, "not above 0"),
    ],
)
def test_wrong_cases_are_one_line(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(EarlyExitToyConfig, fields)
    assert str(error.value).count("\n") == 0
