"""The closed forms of Gaussian diffusion against simulation of single stages, Bayes, and diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from pipelines.images.ddpm_math import guided, marginal, original_of, posterior, target_of
from pipelines.images.ddpm_sampling import PREDICTION_TYPES

BETAS = torch.tensor([0.05, 0.1, 0.3, 0.2], dtype=torch.float64)
ALPHA_BARS = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - BETAS, 0)])


def simulated(count: int) -> list[torch.Tensor]:
    """x_0 … x_T of many chains from x_0 = 0.7, one stage after another."""
    generator = torch.Generator().manual_seed(0)
    chain = [torch.full((count,), 0.7, dtype=torch.float64)]
    for beta in BETAS:
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        chain.append((1 - beta).sqrt() * chain[-1] + beta.sqrt() * noise)
    return chain


def test_marginal_against_simulated_single_stages():
    count = 200_000
    for x, alpha_bar in zip(simulated(count)[1:], ALPHA_BARS[1:], strict=True):
        mean, variance = marginal(torch.tensor(0.7), alpha_bar)
        assert abs(x.mean() - mean) < 4 * (variance / count).sqrt()
        assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize(("s", "t"), [(1, 2), (2, 3), (1, 4), (2, 4)])
def test_posterior_against_simulated_single_stages(s, t):
    chain = simulated(200_000)
    # x_s given x_t is Gaussian, so its mean is the regression on x_t and its variance what is left
    before, now = chain[s], chain[t]
    slope = ((before - before.mean()) * (now - now.mean())).mean() / now.var()
    rest = before - before.mean() - slope * (now - now.mean())
    for x in (-1.0, 0.0, 2.0):
        mean, variance = posterior(torch.tensor(0.7), torch.tensor(x), ALPHA_BARS[s], ALPHA_BARS[t])
        assert float(mean) == pytest.approx(float(before.mean() + slope * (x - now.mean())), abs=0.02)
        assert float(variance) == pytest.approx(float(rest.var()), rel=0.02)


def test_posterior_is_bayes():
    grid = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    normal = torch.distributions.Normal
    for s, t, noisy in ((1, 2, 0.3), (1, 3, -1.2), (3, 4, 2.0)):
        step = ALPHA_BARS[t] / ALPHA_BARS[s]
        prior_mean, prior_variance = marginal(torch.tensor(0.7), ALPHA_BARS[s])
        log_joint = normal(prior_mean, prior_variance.sqrt()).log_prob(grid)
        log_joint += normal(step.sqrt() * grid, (1 - step).sqrt()).log_prob(torch.tensor(noisy, dtype=torch.float64))
        weights = torch.softmax(log_joint, 0)
        mean, variance = posterior(torch.tensor(0.7), torch.tensor(noisy), ALPHA_BARS[s], ALPHA_BARS[t])
        assert float(weights @ grid) == pytest.approx(float(mean), abs=1e-6)
        assert float(weights @ (grid - mean) ** 2) == pytest.approx(float(variance), rel=1e-5)
    mean, variance = posterior(torch.tensor(0.7), torch.tensor(0.1), ALPHA_BARS[0], ALPHA_BARS[1])
    assert float(mean) == pytest.approx(0.7)
    assert variance == 0


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_targets_and_posterior_are_those_of_diffusers(target, schedule):
    scheduler = DDPMScheduler(100, beta_schedule=schedule, prediction_type=PREDICTION_TYPES[target], clip_sample=False)
    generator = torch.Generator().manual_seed(1)
    original, noise, output = (torch.randn(3, 1, 2, 2, generator=generator) for _ in range(3))
    for t in (1, 40, 99):
        alpha_bar = scheduler.alphas_cumprod[t]
        mean, variance = marginal(original, alpha_bar)
        noisy = mean + variance.sqrt() * noise
        times = torch.full((3,), t)
        torch.testing.assert_close(noisy, scheduler.add_noise(original, noise, times))
        if target == "v":
            velocity = scheduler.get_velocity(original, noise, times)
            torch.testing.assert_close(target_of("v", original, noise, alpha_bar), velocity)
        back = original_of(target, target_of(target, original, noise, alpha_bar), noisy, alpha_bar)
        torch.testing.assert_close(back, original, rtol=1e-3, atol=1e-2 if alpha_bar < 1e-3 else 1e-4)
        # diffusers' step is the posterior's mean at the predicted image, and noise of the posterior's variance
        predicted = original_of(target, output, noisy, alpha_bar)
        mean, variance = posterior(predicted, noisy, scheduler.alphas_cumprod[t - 1], alpha_bar)
        step = scheduler.step(output, t, noisy, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(step.pred_original_sample, predicted)
        drawn = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(step.prev_sample, mean + variance.sqrt() * drawn, rtol=1e-4, atol=1e-4)


def test_guidance():
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert guided(conditional, unconditional, 1.0) == 2
    assert guided(conditional, unconditional, 0.0) == 1
    assert guided(conditional, unconditional, 3.0) == 4
