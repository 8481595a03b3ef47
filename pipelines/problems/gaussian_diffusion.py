"""Exercise: the two closed forms of Gaussian diffusion, q(x_t | x_0) and the posterior of one step back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure

if TYPE_CHECKING:
    import numpy as np


@config
class GaussianDiffusionConfig(ExerciseConfig):
    """A number x_0, noised in T steps; each closed form by simulation, by Bayes and by diffusers' scheduler."""

    output_dir: str = Field(
        "runs/gaussian_diffusion", description="folder the stage writes into", json_schema_extra=INERT
    )
    timesteps: int = Field(100, ge=2, le=2000, description="T, noise steps")
    beta_start: float = Field(1e-3, gt=0, lt=1, description="β_1, noise variance of the first step")
    beta_end: float = Field(0.1, gt=0, lt=1, description="β_T; those between lie on a line")
    stage: int = Field(30, ge=2, description="t, the stage at which the posterior is looked at")
    original: float = Field(1.5, ge=-10, le=10, description="x_0")
    noisy: float = Field(-0.5, ge=-10, le=10, description="x_t, for which the posterior is worked out")
    chains: int = Field(200_000, ge=1000, description="simulated chains")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.stage > self.timesteps:
            mend = f"give a stage from 2 to {self.timesteps}"
            found.append(Problem("stage", self.stage, f"lies beyond timesteps={self.timesteps}", mend))
        if self.beta_end < self.beta_start:
            found.append(Problem("beta_end", self.beta_end, "is below beta_start", f"give {self.beta_start} or more"))
        return found


@dataclass(frozen=True)
class _Schedule:
    """β_1 … β_T and α_0 = 1, α_1, …, α_T, by stage; and what was simulated of them."""

    betas: np.ndarray
    alphas: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    before: np.ndarray
    now: np.ndarray
    last: np.ndarray


def gaussian_diffusion(config: GaussianDiffusionConfig) -> dict[str, float]:
    """Simulate the chain step by step and hold the closed forms of ``pipelines.images.ddpm_math`` against it.

    Returns:
        ``gaussian_diffusion/last_kl``, KL(q(x_T | x_0) ‖ N(0, 1)) in nats; and the checks' counts.
    """
    answer = Answer(config, "gaussian_diffusion", "Gaussian diffusion: its two closed forms")
    made = _simulated(config)
    answer.value(timesteps=config.timesteps, stage=config.stage, original=config.original, noisy=config.noisy)
    answer.value(chains=config.chains, beta_start=config.beta_start, beta_end=config.beta_end)
    _marginal(answer, config, made)
    _posterior(answer, config, made)
    last = _last(answer, config, made)
    return answer.write() | {"gaussian_diffusion/last_kl": last}


def _simulated(config: GaussianDiffusionConfig) -> _Schedule:
    """Every stage of the chains, one after the other: x_t = √(1−β_t) x_(t−1) + √β_t ε."""
    import numpy as np

    generator = np.random.default_rng(config.seed)
    betas = np.concatenate([[0.0], np.linspace(config.beta_start, config.beta_end, config.timesteps)])
    x, pairs = np.full(config.chains, config.original), {}
    means, variances = [config.original], [0.0]
    for t in range(1, config.timesteps + 1):
        before, x = x, math.sqrt(1 - betas[t]) * x + math.sqrt(betas[t]) * generator.standard_normal(config.chains)
        if t == config.stage:
            pairs = {"before": before, "now": x}
        means.append(x.mean())
        variances.append(x.var(ddof=1))
    return _Schedule(betas, np.cumprod(1 - betas), np.array(means), np.array(variances), last=x, **pairs)


def _exact(made: _Schedule, x_0: float, x_t: float, stage: int) -> tuple[float, float]:
    """Mean and variance of x_(t−1) given x_t and x_0, by the formula under examination."""
    import torch

    from pipelines.images.ddpm_math import posterior

    numbers = (x_0, x_t, made.alphas[stage - 1], made.alphas[stage])
    mean, variance = posterior(*(torch.tensor(float(number), dtype=torch.float64) for number in numbers))
    return float(mean), float(variance)


def _marginal(answer: Answer, config: GaussianDiffusionConfig, made: _Schedule) -> None:
    """q(x_t | x_0) = N(√α_t x_0, (1−α_t) I)."""
    import numpy as np
    import torch
    from diffusers import DDPMScheduler
    from scipy.stats import kstest

    from pipelines.images.ddpm_math import marginal
    from pipelines.problems.estimates import ERRORS, variance_error
    from pipelines.reporting.plots import Panel, Series, lines

    alphas = torch.from_numpy(made.alphas)
    mean, variance = (found.numpy() for found in marginal(torch.tensor(config.original, dtype=torch.float64), alphas))
    t, count = config.stage, config.chains
    simulated = f"simulation of {count:,} chains, step by step; tolerance {ERRORS:.0f} standard errors"
    tolerance = ERRORS * math.sqrt(variance[t] / count)
    answer.check(f"E[x_t | x_0] = √α_t x_0 at t = {t}", made.means[t], mean[t], tolerance, simulated)
    tolerance = ERRORS * variance_error(variance[t], count)
    answer.check(f"Var[x_t | x_0] = 1 − α_t at t = {t}", made.variances[t], variance[t], tolerance, simulated)
    inner = slice(1, None)
    off = [
        np.abs(made.means - mean)[inner] / np.sqrt(variance[inner] / count),
        np.abs(made.variances - variance)[inner] / variance_error(variance[inner], count),
    ]
    statement = f"Mean and variance at all {config.timesteps} stages: the farthest, in standard errors"
    answer.check(statement, np.max(off), 0, ERRORS + 1, simulated.partition(";")[0])
    gap = kstest((made.now - mean[t]) / math.sqrt(variance[t]), "norm").statistic
    route = (
        "Kolmogorov's distance of the simulated x_t; one in 1,000 Gaussian samples is farther off than the tolerance"
    )
    answer.check(f"x_t given x_0 is Gaussian, at t = {t}", gap, 0, 1.95 / math.sqrt(count), route)
    scheduler = DDPMScheduler(config.timesteps, config.beta_start, config.beta_end, "linear")
    gap = np.abs(scheduler.alphas_cumprod.double().numpy() - made.alphas[1:]).max()
    answer.check("α_t = Π_{s≤t}(1 − β_s): diffusers' alphas_cumprod", gap, 0, 1e-5, "largest distance; they are fp32")
    noised = scheduler.add_noise(
        torch.full((count, 1), config.original),
        torch.randn(count, 1, generator=torch.Generator().manual_seed(config.seed)),
        torch.full((count,), t - 1),
    )
    tolerance = ERRORS * variance_error(variance[t], count)
    route = f"{count:,} calls of diffusers' add_noise, tolerance {ERRORS:.0f} standard errors"
    answer.check("Var[x_t | x_0] of diffusers' DDPMScheduler", noised.double().var(), variance[t], tolerance, route)
    answer.value(alpha=made.alphas[t], marginal_mean=mean[t], marginal_variance=variance[t])
    answer.value(simulated_mean=made.means[t], simulated_variance=made.variances[t])
    stages = np.arange(config.timesteps + 1)
    dots = stages[:: max(1, config.timesteps // 10)]
    panels = [
        Panel([Series("closed form", stages, y), Series("simulated", dots, seen[dots], marks=True)], label)
        for y, seen, label in ((mean, made.means, "mean of x_t"), (variance, made.variances, "variance of x_t"))
    ]
    svg = lines("marginals", panels, "stage t", "mean falls to zero and variance rises to one over the stages")
    caption = "What is left of x_0 falls to nothing, the noise takes its place, and the whole keeps its size."
    answer.figure(Figure("marginals", svg, caption=caption, title="x_t, given x_0"))


def _posterior(answer: Answer, config: GaussianDiffusionConfig, made: _Schedule) -> None:
    """q(x_(t−1) | x_t, x_0): by simulation, by Bayes, by diffusers' step."""
    import torch
    from diffusers import DDPMScheduler

    from pipelines.problems.estimates import ERRORS, gaussian_log, line, moments, variance_error

    t, count, alphas, beta = config.stage, config.chains, made.alphas, made.betas[config.stage]
    mean, variance = _exact(made, config.original, config.noisy, t)
    (of_original, _), (of_noisy, _) = _exact(made, 1.0, 0.0, t), _exact(made, 0.0, 1.0, t)
    back = line(made.now, made.before)
    route = f"least squares through {count:,} simulated pairs (x_t, x_(t−1)), tolerance {ERRORS:.0f} standard errors"
    statement = "The posterior's mean: its factor of x_t is √(1−β_t)(1−α_(t−1))/(1−α_t)"
    answer.check(statement, back.slope, of_noisy, ERRORS * back.slope_error, route)
    statement = "The posterior's mean: its part of x_0 is √α_(t−1) β_t/(1−α_t)·x_0"
    answer.check(statement, back.intercept, of_original * config.original, ERRORS * back.intercept_error, route)
    statement = "The posterior's variance is (1−α_(t−1))/(1−α_t)·β_t"
    tolerance = ERRORS * variance_error(variance, count)
    answer.check(statement, back.variance, variance, tolerance, f"{route}: what is left around the line")

    prior_mean, prior_variance = math.sqrt(alphas[t - 1]) * config.original, 1 - alphas[t - 1]

    def joint(x: np.ndarray) -> np.ndarray:
        return gaussian_log(x, prior_mean, prior_variance) + gaussian_log(config.noisy, math.sqrt(1 - beta) * x, beta)

    # Where the product of the two is not nothing, whichever of them is the narrower.
    reach = 12 * math.sqrt(min(prior_variance, beta / (1 - beta))) + abs(
        prior_mean - config.noisy / math.sqrt(1 - beta)
    )
    bayes = moments(joint, mean - reach, mean + reach)
    route = "Bayes: N(x_(t−1); √α_(t−1) x_0, 1−α_(t−1))·N(x_t; √(1−β_t) x_(t−1), β_t) integrated on a grid"
    answer.check(f"The posterior's mean at x_t = {config.noisy:g}", bayes.mean, mean, 1e-8, route)
    answer.check("The posterior's variance, by Bayes", bayes.variance, variance, 1e-8, route)
    evidence = gaussian_log(config.noisy, math.sqrt(alphas[t]) * config.original, 1 - alphas[t])
    answer.check("log q(x_t | x_0), what Bayes' rule divides by", bayes.log_mass, evidence, 1e-8, f"{route}: its mass")
    scheduler = DDPMScheduler(
        config.timesteps, config.beta_start, config.beta_end, "linear", prediction_type="sample", clip_sample=False
    )
    clean, noisy = (torch.full((count, 1), value) for value in (config.original, config.noisy))
    generator = torch.Generator().manual_seed(config.seed)
    stepped = scheduler.step(clean, t - 1, noisy, generator=generator).prev_sample.double()
    route = f"{count:,} steps of diffusers' DDPMScheduler that is told x_0, tolerance {ERRORS:.0f} standard errors"
    tolerance = ERRORS * math.sqrt(variance / count)
    answer.check("The posterior's mean, of diffusers' step", stepped.mean(), mean, tolerance, route)
    tolerance = ERRORS * variance_error(variance, count)
    answer.check("The posterior's variance, of diffusers' step", stepped.var(), variance, tolerance, route)
    answer.value(beta=beta, posterior_mean=mean, posterior_variance=variance)
    answer.value(of_noisy=of_noisy, of_original=of_original)
    answer.value(fitted_of_noisy=back.slope, bayes_mean=bayes.mean, variance_share=variance / beta)
    answer.figure(_bayes_figure(config, made, mean, variance))
    answer.figure(_weights_figure(made))


def _bayes_figure(config: GaussianDiffusionConfig, made: _Schedule, mean: float, variance: float) -> Figure:
    import numpy as np

    from pipelines.problems.estimates import gaussian_log
    from pipelines.reporting.plots import Panel, Series, lines

    t, beta = config.stage, made.betas[config.stage]
    prior = math.sqrt(made.alphas[t - 1]) * config.original, 1 - made.alphas[t - 1]
    likelihood = config.noisy / math.sqrt(1 - beta), beta / (1 - beta)
    ends = [m + s * 3.5 * math.sqrt(v) for m, v in (prior, likelihood) for s in (-1, 1)]
    x = np.linspace(min(ends), max(ends), 200)
    named = (("before: given x_0", prior), ("what x_t says", likelihood), ("after: given both", (mean, variance)))
    series = [
        Series(name, x, np.exp(gaussian_log(x, *moment)), colour=colour) for colour, (name, moment) in enumerate(named)
    ]
    alt = "densities of the previous stage: before and after x_t is seen, and the likelihood"
    svg = lines("bayes", [Panel(series, "density", zero=True)], "x_(t−1)", alt)
    caption = "One step of noise is small, so x_(t−1) lies where x_t says, drawn a little towards x_0."
    return Figure("bayes", svg, caption=caption, title="Bayes' rule at one stage")


def _weights_figure(made: _Schedule) -> Figure:
    from pipelines.reporting.plots import Panel, Series, lines

    stages = range(1, len(made.betas))
    of_original = [_exact(made, 1.0, 0.0, t)[0] for t in stages]
    of_noisy = [_exact(made, 0.0, 1.0, t)[0] for t in stages]
    ratios = [_exact(made, 0.0, 0.0, t)[1] / made.betas[t] for t in stages]
    panels = [
        Panel([Series("of x_0", stages, of_original), Series("of x_t", stages, of_noisy)], "factor", zero=True),
        Panel([Series("", stages, ratios)], "variance / β_t", zero=True),
    ]
    alt = "the factor of x_0 falls from one, that of x_t rises; the posterior variance comes up to beta"
    svg = lines("weights", panels, "stage t", alt)
    caption = "At the first stage the posterior is x_0 itself; later it is x_t with hardly less noise than was added."
    return Figure("weights", svg, caption=caption, title="The posterior over the stages")


def _last(answer: Answer, config: GaussianDiffusionConfig, made: _Schedule) -> float:
    """How much of x_0 is left at the end; the posterior at the first stage."""
    from pipelines.problems.estimates import ERRORS, mean_error

    mean, variance = _exact(made, config.original, config.noisy, 1)
    statement = "At t = 1 the posterior is x_0 itself: its mean, whatever x_1 is"
    answer.check(statement, mean, config.original, 1e-9, "evaluation at α_0 = 1")
    answer.check("At t = 1 the posterior has no variance", variance, 0, 1e-12, "evaluation at α_0 = 1")
    alpha = made.alphas[-1]
    kl = 0.5 * (alpha * config.original**2 - alpha - math.log1p(-alpha))
    centre, spread = math.sqrt(alpha) * config.original, 1 - alpha
    ratios = 0.5 * (made.last**2 - (made.last - centre) ** 2 / spread - math.log(spread))
    route = f"mean of log q/p over the {config.chains:,} simulated x_T, tolerance {ERRORS:.0f} standard errors"
    statement = "KL(q(x_T | x_0) ‖ N(0, 1)) = ½(α_T x_0² − α_T − log(1−α_T)), what is left of x_0 at the end"
    answer.check(statement, ratios.mean(), kl, ERRORS * mean_error(ratios), route)
    answer.value(last_alpha=alpha, last_kl=kl)
    return float(kl)
