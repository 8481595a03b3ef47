"""Diffusion from a Gaussian in closed form: X₀ ~ N(0, σ²), and Δt of variance more at each of T = 1/Δt steps.

Everything is Gaussian and linear, so that samplers are products of factors. Source of the setting and of the samplers:
Nakkiran et al. 2024, "Step-by-Step Diffusion: An Elementary Tutorial", sections 2 and 3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Sampler = Literal["mean", "posterior", "step", "ddim"]
"""The reverse step: the posterior's mean alone; with noise of the posterior's variance; of variance Δt; DDIM."""


def clean_factor(variance: float, t: float) -> float:
    """E[X₀ | X_t = x] / x = σ²/(σ² + t), what a network that is to name the clean sample must learn."""
    return variance / (variance + t)


def posterior(variance: float, t: float, step: float) -> tuple[float, float]:
    """X_{t−Δt} | X_t = x is N(factor·x, variance): ((σ²+t−Δt)/(σ²+t), (σ²+t−Δt)Δt/(σ²+t)).

    Args:
        variance: σ² of the data.
        t: in (0, 1].
        step: Δt ≤ t.
    """
    factor = (variance + t - step) / (variance + t)
    return factor, factor * step


def ddim_factor(variance: float, t: float, step: float) -> float:
    """x_{t−Δt}/x_t = 1 − Δt/(2(σ²+t)): half of the way to the posterior's mean (λ = ½ as Δt → 0), without noise."""
    return 1 - step / (2 * (variance + t))


def times(steps: int) -> np.ndarray:
    """(steps,): 1, 1 − Δt, …, Δt, the times at which a sampler steps."""
    return np.arange(steps, 0, -1) / steps


class Schedule(NamedTuple):
    """A sampler's step as x ← factor·x + √noise·z, one of each for a step, both (steps,)."""

    factors: np.ndarray
    noises: np.ndarray


def schedule(variance: float, steps: int, sampler: Sampler) -> Schedule:
    """The factors and noise variances of a sampler, in the order of its steps, from t = 1 down to Δt."""
    step = 1 / steps
    if sampler == "ddim":
        return Schedule(np.array([ddim_factor(variance, t, step) for t in times(steps)]), np.zeros(steps))
    pairs = np.array([posterior(variance, t, step) for t in times(steps)])
    noises = {"mean": np.zeros(steps), "posterior": pairs[:, 1], "step": np.full(steps, step)}
    return Schedule(pairs[:, 0], noises[sampler])


def variance_after(start: float, made: Schedule) -> float:
    """The output's variance, v ← factor²·v + noise from the variance of the start."""
    for factor, noise in zip(*made, strict=True):
        start = factor**2 * start + noise
    return float(start)


def simulate(x: np.ndarray, made: Schedule, generator: np.random.Generator) -> np.ndarray:
    """The output of the chains that start at ``x``, (n,)."""
    for factor, noise in zip(*made, strict=True):
        x = factor * x
        if noise:
            x = x + np.sqrt(noise) * generator.standard_normal(len(x))
    return x


def mean_only_variance(variance: float, start: float) -> float:
    """The factors telescope to σ²/(σ²+1), whatever Δt is: (σ²/(σ²+1))² of the start's variance."""
    return clean_factor(variance, 1) ** 2 * start


def noisy_variance(variance: float, start: float) -> float:
    """With the posterior's noise a start of variance σ²+1 gives σ², and what it lacks is lacking by the same factor.

    σ² − (σ²/(σ²+1))²(σ² + 1 − start); for a start from N(0, 1) that is σ² − σ⁶/(σ²+1)².
    """
    return variance - clean_factor(variance, 1) ** 2 * (variance + 1 - start)


def flow_variance(variance: float, start: float) -> float:
    """As Δt → 0 the DDIM step becomes dx/dt = x/(2(σ²+t)), which takes the start's variance times σ²/(σ²+1)."""
    return clean_factor(variance, 1) * start


def ddim_rate(variance: float) -> float:
    """lim (output variance / limit − 1)/Δt of DDIM: 1/(4σ²(σ²+1)).

    log Π(1 − Δt/2(σ²+t))² = −Σ[Δt/(σ²+t) + Δt²/4(σ²+t)² + …]; the sum over the right ends of a falling function lies
    below its integral by ½Δt(1/σ² − 1/(σ²+1)), of which the second term takes half back.
    """
    return 1 / (4 * variance * (variance + 1))


def step_noise_rate(variance: float) -> float:
    """lim (output variance / σ² − 1)/Δt with noise of variance Δt from N(0, σ²+1): (1 − (σ²/(σ²+1))²)/(2σ²).

    Each step has Δt²/(σ²+t) too much, of which (σ²/(σ²+t))² arrives.
    """
    return (1 - clean_factor(variance, 1) ** 2) / (2 * variance)


def extrapolated(coarse: float, fine: float) -> float:
    """The limit at Δt = 0 of a quantity linear in Δt, from its values at 2Δt and at Δt (Richardson)."""
    return 2 * fine - coarse
