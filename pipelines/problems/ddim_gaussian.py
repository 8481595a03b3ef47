"""Exercise: DDPM and DDIM where everything is known, from a Gaussian with Gaussian steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure

if TYPE_CHECKING:
    import numpy as np

    from pipelines.problems.ddim_gaussian_network import CleanSample

_FINE = 2**14  # steps of the schedules from which limits are extrapolated
_MANY = 1024  # steps of those that are drawn against σ, of which the smallest is 0.1
_SMALL = 0.05  # σ, at which what holds for small σ is looked at
_NAMES = {"mean": "mean only", "posterior": "with noise", "ddim": "DDIM"}


@config
class DDIMGaussianConfig(ExerciseConfig):
    """Noise and samplers of X₀ ~ N(0, σ²), with a small network that learns the reverse step."""

    output_dir: str = Field("runs/ddim_gaussian", description="folder the stage writes into", json_schema_extra=INERT)
    sigma: float = Field(0.5, ge=0.05, le=5, description="σ, standard deviation of X₀")
    steps: int = Field(64, ge=4, le=1024, multiple_of=4, description="T = 1/Δt, noise steps of the chain")
    chains: int = Field(200_000, ge=1000, description="simulated chains")
    guess: float = Field(1.0, ge=0.05, le=5, description="a wrong σ, with which the circular target is made")
    train_samples: int = Field(100_000, ge=100, description="samples of X₀ that the network is trained on")
    train_steps: int = Field(2000, ge=1, description="its optimizer steps")
    batch_size: int = Field(512, ge=1, description="samples of a step")
    width: int = Field(32, ge=1, description="features of its two hidden layers")
    learning_rate: float = Field(5e-3, gt=0, description="its peak rate, which falls to 0 as a cosine")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.guess == self.sigma:
            found.append(Problem("guess", self.guess, "is σ itself", "give another one: it is to be wrong"))
        return found


def ddim_gaussian(config: DDIMGaussianConfig) -> dict[str, float]:
    """Simulate the noise and the samplers, train the network, and hold all against the closed forms.

    Returns:
        ``ddim_gaussian/mean_only_variance``, ``/noisy_variance``, ``/ddim_variance`` of the samplers' simulated output
        from N(0, 1); ``/network_error``, root mean squared distance of the network from σ²/(σ²+t)·x, in units of σ; and
        the checks' counts.
    """
    import numpy as np

    generator = np.random.default_rng(config.seed)
    answer = Answer(config, "ddim_gaussian", "DDPM and DDIM from a Gaussian")
    variance = config.sigma**2
    answer.value(sigma=config.sigma, variance=variance, steps=config.steps, step=1 / config.steps)
    answer.value(chains=config.chains, end_variance=variance + 1)
    _forward(answer, config, generator)
    found = _samplers(answer, config, generator)
    _rates(answer, config, generator)
    found |= _training(answer, config, generator)
    return answer.write() | {f"ddim_gaussian/{name}": value for name, value in found.items()}


def _forward(answer: Answer, config: DDIMGaussianConfig, generator: np.random.Generator) -> None:
    """The noised marginals, and the posterior of one step back."""
    from scipy.stats import kstest

    from pipelines.problems.ddim_gaussian_math import posterior
    from pipelines.problems.estimates import ERRORS, gaussian_log, line, moments, variance_error

    variance, steps, count = config.sigma**2, config.steps, config.chains
    half, step = steps // 2, 1 / config.steps
    x = config.sigma * generator.standard_normal(count)
    for number in range(1, steps + 1):
        before, x = x, x + math.sqrt(step) * generator.standard_normal(count)
        if number == half:
            middle, pair = x, (before, x)
    simulated = f"simulation of {count:,} chains, tolerance {ERRORS:.0f} standard errors"
    for name, values, t in (("X₁", x, 1.0), ("X_½", middle, 0.5)):
        tolerance = ERRORS * variance_error(variance + t, count)
        answer.check(f"Var {name} = σ² + {t:g}", values.var(ddof=1), variance + t, tolerance, simulated)
    gap = kstest(x / math.sqrt(variance + 1), "norm").statistic
    route = "Kolmogorov's distance of the simulated X₁; one in 1,000 Gaussian samples is farther off than the tolerance"
    answer.check("X₁ is Gaussian: its distribution function is Φ(x/√(σ²+1))", gap, 0, 1.95 / math.sqrt(count), route)
    factor, spread = posterior(variance, 0.5, step)
    back = line(pair[1], pair[0])
    route = (
        f"least squares through the {count:,} pairs (x_t, x_(t−Δt)) at t = ½, tolerance {ERRORS:.0f} standard errors"
    )
    statement = "E[X_(t−Δt) | x_t] = (σ²+t−Δt)/(σ²+t)·x_t"
    answer.check(f"{statement}: its factor", back.slope, factor, ERRORS * back.slope_error, route)
    tolerance = ERRORS * variance_error(spread, count)
    answer.check("Var[X_(t−Δt) | x_t] = (σ²+t−Δt)Δt/(σ²+t)", back.variance, spread, tolerance, route)

    def bayes(t: float, step: float, at: float) -> tuple[float, float]:
        reach, middle = 14 * math.sqrt(step), at
        prior, noise = variance + t - step, step
        made = moments(
            lambda y: gaussian_log(y, 0.0, prior) + gaussian_log(at, y, noise), middle - reach, middle + reach
        )
        return made.mean, made.variance

    at = 1.5 * math.sqrt(variance + 0.5)
    mean, around = bayes(0.5, step, at)
    route = "Bayes: the density N(x_(t−Δt); 0, σ²+t−Δt)·N(x_t; x_(t−Δt), Δt) integrated on a grid"
    answer.check(f"{statement} at x_t = {at:.3g}", mean, factor * at, 1e-8, route)
    answer.check("Var[X_(t−Δt) | x_t], by Bayes", around, spread, 1e-10, route)
    small = 1e-4
    ratio = bayes(0.5, small, at)[1] / small
    statement = "Var[X_(t−Δt) | x_t] ≈ Δt: the ratio at Δt = 0.0001"
    answer.check(statement, ratio, 1, small / 0.5, f"{route}; tolerance Δt/t")
    answer.value(x1_variance=x.var(ddof=1), posterior_factor=factor, posterior_variance=spread)
    answer.value(fitted_factor=back.slope, fitted_variance=back.variance, small_ratio=ratio)


def _samplers(answer: Answer, config: DDIMGaussianConfig, generator: np.random.Generator) -> dict[str, float]:
    """Each sampler's output, from N(0, 1) and from the true end N(0, σ²+1)."""
    import numpy as np

    from pipelines.problems import ddim_gaussian_math as exact
    from pipelines.problems.estimates import ERRORS, variance_error

    variance, count = config.sigma**2, config.chains
    route = f"simulation of {count:,} chains, tolerance {ERRORS:.0f} standard errors"
    starts = {"N(0, 1)": 1.0, "N(0, σ²+1)": variance + 1}
    claims = {
        ("mean", "N(0, 1)"): ("(σ²/(σ²+1))²", exact.mean_only_variance(variance, 1)),
        ("mean", "N(0, σ²+1)"): ("σ⁴/(σ²+1)", exact.mean_only_variance(variance, variance + 1)),
        ("posterior", "N(0, 1)"): ("σ² − σ⁶/(σ²+1)²", exact.noisy_variance(variance, 1)),
        ("posterior", "N(0, σ²+1)"): ("σ²", variance),
        ("ddim", "N(0, 1)"): ("σ²/(σ²+1) as Δt → 0", exact.flow_variance(variance, 1)),
        ("ddim", "N(0, σ²+1)"): ("σ² as Δt → 0", variance),
    }
    rows, outputs = [], {}
    for (sampler, start), (formula, limit) in claims.items():
        made = exact.schedule(variance, config.steps, sampler)
        x = exact.simulate(math.sqrt(starts[start]) * generator.standard_normal(count), made, generator)
        outputs[sampler, start] = x
        found, after = float(x.var(ddof=1)), exact.variance_after(starts[start], made)
        error = variance_error(after, count)
        expected = after if sampler == "ddim" else limit
        what = "Π(1 − Δt/2(σ²+t))² of the start's" if sampler == "ddim" else formula
        statement = f"Output variance from {start}, {_NAMES[sampler]}: {what}"
        answer.check(statement, found, expected, ERRORS * error, route)
        rows.append([_NAMES[sampler], start, formula, f"{limit:.5f}", f"{after:.5f}", f"{found:.5f} ± {error:.5f}"])
    columns = ["Sampler", "from", "variance of the output", "formula", f"T = {config.steps}, exactly", "simulated"]
    answer.table("samplers", columns, rows, f"σ² is {variance:g}. ±: one standard error.")
    short = exact.variance_after(1.0, exact.schedule(_SMALL**2, config.steps, "mean")) / _SMALL**4
    statement = f"Mean only, small σ: the output variance is near σ⁴, their ratio at σ = {_SMALL} near 1"
    answer.check(statement, short, 1, 2.1 * _SMALL**2, "product of the steps' factors; tolerance 2.1·σ²")
    answer.value(small_sigma=_SMALL, small_mean_ratio=short)
    near = {name: outputs[name, "N(0, 1)"] for name in _NAMES}
    answer.figure(_densities(config, near))
    answer.figure(_against_sigma(config))
    found = {f"{name}_variance": float(near[key].var(ddof=1)) for name, key in _KEYS.items()}
    limits = {f"{name}_limit": claims[key, "N(0, 1)"][1] for name, key in _KEYS.items()}
    answer.value(**found, **limits, mean_only_fourth=variance**2, lacking=variance**3 / (variance + 1) ** 2)
    answer.value(noisy_from_end=float(np.var(outputs["posterior", "N(0, σ²+1)"], ddof=1)))
    answer.value(ddim_from_end=float(np.var(outputs["ddim", "N(0, σ²+1)"], ddof=1)))
    return found


_KEYS = {"mean_only": "mean", "noisy": "posterior", "ddim": "ddim"}


def _densities(config: DDIMGaussianConfig, outputs: dict[str, np.ndarray]) -> Figure:
    import numpy as np

    from pipelines.problems.estimates import gaussian_log
    from pipelines.reporting.plots import Panel, Series, lines

    reach = 3.2 * config.sigma
    edges = np.linspace(-reach, reach, 61)
    centres = (edges[1:] + edges[:-1]) / 2
    series = [Series("data", centres, np.exp(gaussian_log(centres, 0.0, config.sigma**2)), colour=0)]
    for colour, (key, values) in enumerate(outputs.items(), start=1):
        counts, _ = np.histogram(values, edges)
        series.append(Series(_NAMES[key], centres, counts / (len(values) * (edges[1] - edges[0])), colour=colour))
    alt = "densities of the data and of three samplers' outputs; mean only is the narrowest"
    svg = lines("densities", [Panel(series, "density", zero=True)], "x₀ drawn from N(0, 1)", alt)
    caption = "Without noise in its steps the sampler draws a distribution that is far too narrow."
    return Figure("densities", svg, caption=caption, title="What comes out")


def _against_sigma(config: DDIMGaussianConfig) -> Figure:
    import numpy as np

    from pipelines.problems import ddim_gaussian_math as exact
    from pipelines.reporting.plots import Panel, Series, lines

    sigmas = np.geomspace(0.1, 2, 24)
    series = [Series("data, σ²", sigmas, sigmas**2, colour=0)]
    for colour, key in enumerate(_NAMES, start=1):
        y = [exact.variance_after(1.0, exact.schedule(s**2, _MANY, key)) for s in sigmas]
        series.append(Series(_NAMES[key], sigmas, y, colour=colour))
    alt = "output variance against sigma for three samplers, on logarithmic scales"
    panels = [Panel(series, "variance of the output", log=True)]
    svg = lines("sigma", panels, "σ of the data (start: N(0, 1))", alt, logx=True)
    caption = "For small σ noise and DDIM give σ²; the mean alone gives σ⁴. The larger σ, the more N(0, 1) is off."
    return Figure("sigma", svg, caption=caption, title="Against σ")


def _rates(answer: Answer, config: DDIMGaussianConfig, generator: np.random.Generator) -> None:
    """How fast the output's variance comes to σ² as Δt → 0, from the true end."""
    import numpy as np
    from scipy.integrate import solve_ivp

    from pipelines.problems import ddim_gaussian_math as exact
    from pipelines.problems.estimates import ERRORS, variance_error
    from pipelines.reporting.plots import Panel, Series, lines

    variance = config.sigma**2

    def off(steps: int, sampler: exact.Sampler) -> float:
        return exact.variance_after(variance + 1, exact.schedule(variance, steps, sampler)) / variance - 1

    fine = {sampler: [off(_FINE // 2, sampler), off(_FINE, sampler)] for sampler in ("ddim", "step")}
    order = math.log2(fine["ddim"][0] / fine["ddim"][1])
    route = f"product of the steps' factors at T = {_FINE // 2:,} and {_FINE:,}"
    answer.check("DDIM's error falls as Δt: its order", order, 1, 0.01, route)
    rates = {"ddim": exact.ddim_rate(variance), "step": exact.step_noise_rate(variance)}
    words = {
        "ddim": "DDIM: (variance/σ² − 1)/Δt → 1/(4σ²(σ²+1))",
        "step": "Noise of variance Δt: (variance/σ² − 1)/Δt → (1 − (σ²/(σ²+1))²)/2σ²",
    }
    for sampler, rate in rates.items():
        found = exact.extrapolated(fine[sampler][0] * _FINE / 2, fine[sampler][1] * _FINE)
        answer.check(words[sampler], found, rate, 1e-3 * rate, f"{route}, extrapolated to Δt = 0; tolerance 0.1 %")
    flow = solve_ivp(lambda t, x: x / (2 * (variance + t)), (1, 0), [1.0], rtol=1e-10, atol=1e-12).y[0, -1]
    route = "Runge-Kutta from t = 1 to 0, squared"
    statement = "As Δt → 0, DDIM is the flow dx/dt = x/(2(σ²+t)): it takes the variance times σ²/(σ²+1)"
    answer.check(statement, flow**2, exact.flow_variance(variance, 1), 1e-7, route)
    half = 1e-4
    share = math.sqrt(0.5) / (math.sqrt(0.5) + math.sqrt(0.5 - half))
    answer.value(ddim_order=order, ddim_rate=rates["ddim"], step_rate=rates["step"], ddim_share=share)
    counts = [4, 8, 16, 32, 64, 128, 256]
    starts = math.sqrt(variance + 1) * generator.standard_normal(config.chains)
    starts *= math.sqrt(variance + 1) / starts.std()  # so that the factors alone are seen
    simulated = [exact.simulate(starts, exact.schedule(variance, n, "ddim"), generator).var() for n in counts]
    worst = max(
        abs(v / variance - 1 - off(n, "ddim")) / variance_error(1.0, config.chains)
        for v, n in zip(simulated, counts, strict=True)
    )
    statement = "DDIM's simulated error at every Δt is the product's, in standard errors"
    answer.check(statement, worst, 0, ERRORS, f"simulation of {config.chains:,} chains at each of {len(counts)} Δt")
    steps = np.array([2.0**-k for k in range(2, 11)])
    series = [
        Series("DDIM", steps, [off(round(1 / s), "ddim") for s in steps], marks=True, colour=3),
        Series("noise of variance Δt", steps, [off(round(1 / s), "step") for s in steps], colour=1),
        Series("first order", steps[[0, -1]], rates["ddim"] * steps[[0, -1]], colour=4),
    ]
    alt = "relative error of the output variance against the step, falling in proportion to it"
    panels = [Panel(series, "variance/σ² − 1", log=True)]
    svg = lines("rate", panels, "Δt", alt, logx=True)
    caption = "Half the step, half the error. With the posterior's own variance as noise there is none, at any Δt."
    answer.figure(Figure("rate", svg, caption=caption, title="How fast it converges"))


def _training(answer: Answer, config: DDIMGaussianConfig, generator: np.random.Generator) -> dict[str, float]:
    """The network that regresses the clean sample, and what the circular target would teach."""
    import numpy as np
    import torch

    from pipelines.problems import ddim_gaussian_math as exact
    from pipelines.problems.ddim_gaussian_network import Training, expected, sample, train
    from pipelines.problems.estimates import ERRORS, line, variance_error
    from pipelines.problems.machine import one_thread

    variance, steps, count = config.sigma**2, config.steps, config.chains
    clean = config.sigma * generator.standard_normal(config.train_samples)
    how = Training(config.train_steps, config.batch_size, config.width, config.learning_rate, config.seed)
    samples, guessed = torch.as_tensor(clean, dtype=torch.float32), config.guess**2
    with one_thread():  # their steps are too small to be shared out
        network, losses = train(samples, steps, how)
        circular, _ = train(samples, steps, how, lambda x, t: guessed / (guessed + t) * x)
    fresh = config.sigma * generator.standard_normal(count)
    squares, slopes = [], []
    for t in (0.25, 0.5, 1.0):
        x = fresh + math.sqrt(t) * generator.standard_normal(count)
        said, factor = expected(network, x, t), exact.clean_factor(variance, t)
        slopes.append(line(x, said).slope)
        squares.append(np.mean((said - factor * x) ** 2))
        statement = f"The network learns σ²/(σ²+t)·x_t: its slope at t = {t:g}"
        answer.check(statement, slopes[-1], factor, 0.03, f"least squares through its answers at {count:,} fresh x_t")
    error = math.sqrt(np.mean(squares)) / config.sigma
    route = f"root mean squared distance over {count:,} fresh x_t at each of three t, in units of σ"
    answer.check("The network is σ²/(σ²+t)·x_t everywhere", error, 0, 0.05, route)
    t = 0.5
    noisy = fresh + math.sqrt(t) * generator.standard_normal(count)
    wrong = exact.clean_factor(guessed, t)
    taught, honest = line(noisy, expected(circular, noisy, t)).slope, line(noisy, fresh)
    statement = f"A target made with σ = {config.guess:g} teaches that guess, whatever the data: its slope"
    route = f"least squares through the answers of a network that was trained on it, at {count:,} fresh x_t, t = ½"
    answer.check(statement, taught, wrong, 0.03, route)
    statement = "The clean sample as target teaches the data's σ: its slope σ²/(σ²+½)"
    route = f"least squares through {count:,} pairs at t = ½, tolerance {ERRORS:.0f} standard errors"
    answer.check(statement, honest.slope, exact.clean_factor(variance, t), ERRORS * honest.slope_error, route)
    start = math.sqrt(variance + 1) * generator.standard_normal(count)
    drawn = {"step": sample(network, start, steps, generator), "ddim": sample(network, start, steps, None)}
    for key, name in (("step", "noise of variance Δt"), ("ddim", "DDIM")):
        wanted = exact.variance_after(variance + 1, exact.schedule(variance, steps, key))
        statement = f"Samples drawn with the network, {name}: their variance is that of the exact step"
        tolerance = 0.08 * wanted + ERRORS * variance_error(wanted, count)
        route = "simulation with the trained network; tolerance 8 % for what it has not learnt"
        answer.check(statement, drawn[key].var(ddof=1), wanted, tolerance, route)
    answer.value(network_error=error, network_noisy=drawn["step"].var(ddof=1), network_ddim=drawn["ddim"].var(ddof=1))
    answer.value(
        network_slope=slopes[1], network_factor=exact.clean_factor(variance, t), train_steps=config.train_steps
    )
    answer.value(guess=config.guess, guess_slope=wrong, guess_taught=taught, least_loss=_least_loss(variance, steps))
    answer.value(last_loss=float(np.mean(losses[-len(losses) // 5 :])))
    answer.figure(_learnt(config, network))
    return {"network_error": error}


def _least_loss(variance: float, steps: int) -> float:
    """E Var[X₀ | X_t] over the levels, σ²t/(σ²+t): below it no network comes."""
    levels = [(k + 1) / steps for k in range(steps)]
    return sum(variance * t / (variance + t) for t in levels) / steps


def _learnt(config: DDIMGaussianConfig, network: CleanSample) -> Figure:
    import numpy as np

    from pipelines.problems.ddim_gaussian_math import clean_factor
    from pipelines.problems.ddim_gaussian_network import expected
    from pipelines.reporting.plots import Panel, Series, lines

    variance, series = config.sigma**2, []
    for colour, t in enumerate((1 / config.steps, 0.25, 1.0)):
        x = np.linspace(-2.5, 2.5, 11) * math.sqrt(variance + t)
        series.append(Series(f"t = {t:.3g}", x[[0, -1]], clean_factor(variance, t) * x[[0, -1]], colour=colour))
        series.append(Series("", x, expected(network, x, t), marks=True, colour=colour))
    alt = "the network's answers lie on the lines of the closed form at three times"
    svg = lines("learnt", [Panel(series, "expected clean sample")], "x_t", alt)
    caption = "Dots: the network, which saw samples only. Lines: σ²/(σ²+t)·x_t. Both end at 2.5 standard deviations."
    return Figure("learnt", svg, caption=caption, title="What the network learnt")
