"""DDPM and DDIM from a Gaussian: closed forms by simulation, quadrature and autograd; the network; the stage."""

import math

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import ddim_gaussian_math as exact
from pipelines.problems.ddim_gaussian import DDIMGaussianConfig, ddim_gaussian
from pipelines.problems.ddim_gaussian_network import Training, expected, train
from pipelines.problems.estimates import gaussian_log, line, moments, variance_error
from pipelines.runner import load_recipe
from pipelines.stage import execute
from tests.problems.pages import assert_page_is_filled

COUNT = 100_000


@pytest.mark.parametrize(("variance", "t", "step"), [(0.25, 0.5, 0.125), (4.0, 1.0, 0.01), (0.01, 0.25, 0.25)])
def test_the_posterior_is_bayes(variance, t, step):
    for x in (-1.0, 0.3):
        found = moments(
            lambda y, x=x: gaussian_log(y, 0.0, variance + t - step) + gaussian_log(x, y, step),
            -15,
            15,
            200_001,
        )
        factor, spread = exact.posterior(variance, t, step)
        assert found.mean == pytest.approx(factor * x, abs=1e-9)
        assert found.variance == pytest.approx(spread, rel=1e-8)


def test_marginals_and_posterior_by_simulation():
    """Four steps of one chain; 4 standard errors."""
    draw = np.random.default_rng(0)
    chain = [0.5 * draw.standard_normal(COUNT)]
    for _ in range(4):
        chain.append(chain[-1] + 0.5 * draw.standard_normal(COUNT))
    for number, x in enumerate(chain):
        variance = 0.25 + number / 4
        assert x.var() == pytest.approx(variance, abs=4 * variance_error(variance, COUNT))
    back = line(chain[3], chain[2])
    factor, spread = exact.posterior(0.25, 0.75, 0.25)
    assert back.slope == pytest.approx(factor, abs=4 * back.slope_error)
    assert back.variance == pytest.approx(spread, abs=4 * variance_error(spread, COUNT))


@pytest.mark.parametrize("variance", [0.04, 0.25, 2.0])
@pytest.mark.parametrize("steps", [4, 50])
def test_output_variances_do_not_depend_on_the_step(variance, steps):
    """But for DDIM's: the products telescope, at any start."""
    for start in (1.0, variance + 1, 0.3):
        alone = exact.variance_after(start, exact.schedule(variance, steps, "mean"))
        assert alone == pytest.approx(exact.mean_only_variance(variance, start), rel=1e-12)
        noisy = exact.variance_after(start, exact.schedule(variance, steps, "posterior"))
        assert noisy == pytest.approx(exact.noisy_variance(variance, start), rel=1e-12)
    assert exact.noisy_variance(variance, 1) == pytest.approx(variance - variance**3 / (variance + 1) ** 2)
    assert exact.noisy_variance(variance, variance + 1) == pytest.approx(variance)


@pytest.mark.parametrize("sampler", ["mean", "posterior", "step", "ddim"])
def test_simulated_output_variances(sampler):
    made = exact.schedule(0.25, 16, sampler)
    draw = np.random.default_rng(1)
    after = exact.variance_after(1.0, made)
    found = exact.simulate(draw.standard_normal(COUNT), made, draw).var()
    assert found == pytest.approx(after, abs=4 * variance_error(after, COUNT))


def test_small_sigma():
    """Mean only σ⁴, noise and DDIM σ²(1 + o(1)): the ratios come to 1 as σ falls."""
    ratios = []
    for sigma in (0.1, 0.01):
        v = sigma**2
        ratios.append(
            (exact.mean_only_variance(v, 1) / v**2, exact.noisy_variance(v, 1) / v, exact.flow_variance(v, 1) / v)
        )
        assert np.abs(np.array(ratios[-1]) - 1).max() < 2.1 * v
    assert (np.abs(np.array(ratios[1]) - 1) < np.abs(np.array(ratios[0]) - 1)).all()


@pytest.mark.parametrize("variance", [0.1, 0.5, 3.0])
def test_rates_of_convergence_are_first_order(variance):
    for sampler, rate in (("ddim", exact.ddim_rate(variance)), ("step", exact.step_noise_rate(variance))):
        off = [
            (exact.variance_after(variance + 1, exact.schedule(variance, n, sampler)) / variance - 1) * n
            for n in (2048, 4096)
        ]
        assert exact.extrapolated(*off) == pytest.approx(rate, rel=1e-4)
        assert abs(off[1] - rate) < 0.6 * abs(off[0] - rate)


def test_ddim_is_half_of_the_way_to_the_mean():
    factor, _ = exact.posterior(0.3, 0.5, 1e-3)
    assert exact.ddim_factor(0.3, 0.5, 1e-3) == pytest.approx((1 + factor) / 2, abs=1e-15)
    # and that mean lies Δt/t of the way from x_t to the clean sample
    assert factor == pytest.approx(1 + 1e-3 / 0.5 * (exact.clean_factor(0.3, 0.5) - 1), abs=1e-15)


def test_the_network_recovers_what_it_was_not_told():
    samples = 0.5 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    network, losses = train(samples, 16, Training(300, 256, 24, 1e-2, 0))
    again, _ = train(samples, 16, Training(3, 256, 24, 1e-2, 0))
    thrice, _ = train(samples, 16, Training(3, 256, 24, 1e-2, 0))
    assert torch.equal(again.layers[0].weight, thrice.layers[0].weight)
    least = np.mean([0.25 * t / (0.25 + t) for t in np.arange(1, 17) / 16])  # E Var[X₀ | X_t]
    assert np.mean(losses[-200:]) == pytest.approx(least, rel=0.05)
    draw = np.random.default_rng(2)
    for t in (0.25, 1.0):
        x = math.sqrt(0.25 + t) * draw.standard_normal(20_000)
        assert line(x, expected(network, x, t)).slope == pytest.approx(0.25 / (0.25 + t), abs=0.05)
    guessing, _ = train(samples, 16, Training(300, 256, 24, 1e-2, 0), lambda x, t: x / (1 + t))  # as if σ were 1
    for t in (0.25, 1.0):
        x = math.sqrt(0.25 + t) * draw.standard_normal(20_000)
        assert line(x, expected(guessing, x, t)).slope == pytest.approx(1 / (1 + t), abs=0.05)


def test_the_stage_and_its_page(tmp_path):
    fields = {"chains": 20_000, "train_steps": 400, "batch_size": 256, "width": 24, "steps": 16, "learning_rate": 1e-2}
    config = validate(DDIMGaussianConfig, fields | {"output_dir": str(tmp_path / "out")})
    metrics = execute(load_recipe("problems/ddim_gaussian").function, config)
    assert metrics["ddim_gaussian/checks_failed"] == 0
    assert metrics["ddim_gaussian/mean_only_variance"] == pytest.approx(0.04, rel=0.05)
    assert metrics["ddim_gaussian/noisy_variance"] == pytest.approx(0.24, rel=0.05)
    assert_page_is_filled(tmp_path / "out")


def test_another_sigma_changes_the_answer(tmp_path):
    fields = {"chains": 1000, "train_steps": 2, "steps": 8, "train_samples": 200, "sigma": 2.0}
    metrics = ddim_gaussian(validate(DDIMGaussianConfig, fields | {"output_dir": str(tmp_path)}))
    assert metrics["ddim_gaussian/mean_only_variance"] == pytest.approx(0.64, rel=0.2)
    assert metrics["ddim_gaussian/checks_failed"] > 0  # two steps of training are none


def test_a_guess_that_is_right_is_refused():
    with pytest.raises(UserError, match="is σ itself"):
        validate(DDIMGaussianConfig, {"guess": 0.5})
