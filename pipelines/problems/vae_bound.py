"""Exercise: the variational autoencoder's sampling and bound, in a model whose likelihood can be integrated."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_RECIPE = "images/vae"
_REACH = 14.0  # z beyond which nothing is
_QUOTED = ("negative_elbo", "kl", "reconstruction", "importance_weighted", "bits_per_pixel", "active_units")
_COUNTED = ("steps", "train_examples", "test_examples")


@config
class VAEBoundConfig(ExerciseConfig):
    """``sample_gaussian`` and ``negative_elbo_bound`` against quadrature; what the trained autoencoder reaches."""

    output_dir: str = Field("runs/vae_bound", description="folder the stage writes into", json_schema_extra=INERT)
    vae: Source = Field(description=f"folder of a finished {_RECIPE} stage, with importance_samples above 0")
    mean: float = Field(0.4, ge=-3, le=3, description="m of q(z|x) in the small model")
    variance: float = Field(0.5, ge=0.01, le=9, description="v of q(z|x) in the small model")
    pixels: int = Field(6, ge=2, le=10, description="pixels of its images, all of which are enumerated")
    samples: int = Field(200_000, ge=1000, description="samples behind every simulated number")

    def problems(self) -> list[Problem]:
        return super().problems() + stage_problems({"vae": (self.vae, _RECIPE)})


@dataclass(frozen=True)
class _Small:
    """A decoder from one latent number to a few pixels, an image, and q(z|x) for it."""

    weights: Tensor
    image: Tensor
    mean: float
    variance: float

    def nll(self, z: Tensor, image: Tensor | None = None) -> Tensor:
        """−log p(x|z) of each z, (n,)."""
        from pipelines.images.vae_math import bernoulli_nll

        inner, outer, bias = self.weights
        logits = outer * (z[:, None] * inner).tanh() + bias
        return bernoulli_nll((self.image if image is None else image)[None, None, None], logits[:, None, None])

    def log_joint(self, z: np.ndarray, image: Tensor | None = None) -> np.ndarray:
        """log p(x, z) of each z, (n,)."""
        import torch

        from pipelines.problems.estimates import gaussian_log

        return gaussian_log(z, 0.0, 1.0) - self.nll(torch.from_numpy(z), image).numpy()

    def log_q(self, z: np.ndarray) -> np.ndarray:
        """log q(z|x) of each z, (n,)."""
        from pipelines.problems.estimates import gaussian_log

        return gaussian_log(z, self.mean, self.variance)


def vae_bound(config: VAEBoundConfig) -> dict[str, float]:
    """Hold the pieces of the bound against quadrature and enumeration, and quote what was trained.

    Returns:
        ``vae_bound/gap``, negative ELBO + log p(x) of the small model's image in nats; and the checks' counts.

    Raises:
        UserError: ``vae`` is no finished stage of its recipe, or has no importance-weighted bound; its images or its
            pipeline cannot be loaded.
    """
    import torch

    record = finished_stage(config.vae, "vae", _RECIPE)
    if "vae/importance_weighted" not in record["metrics"]:
        mend = "run it with importance_samples=50"
        raise UserError("vae", config.vae, "did not measure its importance-weighted bound", mend)
    answer = Answer(config, "vae_bound", "The variational autoencoder")
    generator = torch.Generator().manual_seed(config.seed)
    weights = torch.randn(3, config.pixels, generator=generator, dtype=torch.float64) * torch.tensor(
        [[2.0], [2.5], [0.5]]
    )
    image = (torch.rand(config.pixels, generator=generator) < 0.5).double()
    small = _Small(weights, image, config.mean, config.variance)
    answer.value(mean=config.mean, variance=config.variance, pixels=config.pixels, samples=config.samples)
    _sampling(answer, config, small, generator)
    gap = _bound(answer, config, small, generator)
    _trained(answer, config, record)
    return answer.write() | {"vae_bound/gap": gap}


def _drawn(config: VAEBoundConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """m and v as leaves, and samples z = sample_gaussian(m, v), (n,)."""
    import torch

    from pipelines.images.vae_math import sample_gaussian

    m, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (config.mean, config.variance))
    noise = torch.randn(config.samples, generator=generator, dtype=torch.float64)
    return m, v, sample_gaussian(m, v, noise)


def _sampling(answer: Answer, config: VAEBoundConfig, small: _Small, generator: torch.Generator) -> None:
    """sample_gaussian draws N(m, v), and gradients pass through it."""
    import torch

    from pipelines.problems.estimates import ERRORS, expectation, gaussian_log, mean_error, variance_error

    m, v, z = _drawn(config, generator)
    drawn = z.detach().numpy()
    route = f"{config.samples:,} samples, tolerance {ERRORS:.0f} standard errors"
    answer.check("sample_gaussian(m, v) has the mean m", drawn.mean(), config.mean, ERRORS * mean_error(drawn), route)
    tolerance = ERRORS * variance_error(config.variance, config.samples)
    answer.check("sample_gaussian(m, v) has the variance v", drawn.var(ddof=1), config.variance, tolerance, route)

    def expected(mean: float, variance: float) -> float:
        return expectation(
            lambda x: gaussian_log(x, mean, variance), lambda x: small.nll(torch.from_numpy(x)).numpy(), -_REACH, _REACH
        )

    found = torch.autograd.grad(small.nll(z).mean(), (m, v), retain_graph=True)
    (slopes,) = torch.autograd.grad(small.nll(z).sum(), z)
    noise = (z.detach() - config.mean) / math.sqrt(config.variance)
    parts = {"m": slopes, "v": slopes * noise / (2 * math.sqrt(config.variance))}  # dz/dm = 1, dz/dv = ε/(2√v)
    step = 1e-4
    for number, name in enumerate("mv"):
        ends = [[config.mean, config.variance], [config.mean, config.variance]]
        ends[0][number] += step
        ends[1][number] -= step
        slope = (expected(*ends[0]) - expected(*ends[1])) / (2 * step)
        route = "quadrature at both sides, against autograd through the samples; tolerance 4 standard errors"
        statement = f"∂/∂{name} E[−log p(x|z)] is the mean gradient of −log p(x|m + √v·ε)"
        answer.check(statement, slope, found[number], ERRORS * mean_error(parts[name].numpy()), route)
        answer.value(**{f"slope_{name}": slope, f"gradient_{name}": found[number].item()})


def _bound(answer: Answer, config: VAEBoundConfig, small: _Small, generator: torch.Generator) -> float:
    """The negative ELBO, its distance from −log p(x), and the importance-weighted bound between them."""
    import itertools

    import torch

    from pipelines.images.vae_math import (
        gaussian_kl,
        importance_weighted_bound,
        log_weights,
        negative_elbo_bound,
        sample_gaussian,
    )
    from pipelines.problems.estimates import ERRORS, expectation, gaussian_log, mean_error, moments

    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=config.pixels)), dtype=torch.float64)
    at = torch.tensor([0.7], dtype=torch.float64)
    total = sum(math.exp(-float(small.nll(at, image)[0])) for image in images)
    route = f"enumeration of the {len(images):,} images, at one z"
    answer.check("Σ_x p(x|z) = 1", total, 1, 1e-10, route)
    total = sum(math.exp(moments(lambda z, x=x: small.log_joint(z, x), -_REACH, _REACH, 4001).log_mass) for x in images)
    answer.check("Σ_x p(x) = 1", total, 1, 1e-8, "enumeration of the images, quadrature over z")
    m, v, z = (value.detach() for value in _drawn(config, generator))
    kl = float(gaussian_kl(m, v))
    by_quadrature = expectation(small.log_q, lambda x: small.log_q(x) - gaussian_log(x, 0.0, 1.0), -_REACH, _REACH)
    answer.check("KL(N(m, v) ‖ N(0, 1)) = ½(v + m² − 1 − log v)", by_quadrature, kl, 1e-9, "quadrature")
    nll = small.nll(z)
    bound = negative_elbo_bound(nll, m.expand(len(z), 1), v.expand(len(z), 1))
    reconstruction = expectation(small.log_q, lambda x: small.nll(torch.from_numpy(x)).numpy(), -_REACH, _REACH)
    error = mean_error(bound.negative_elbo.numpy())
    route = f"mean over {len(z):,} samples against quadrature, tolerance {ERRORS:.0f} standard errors"
    statement = "negative_elbo_bound is unbiased: E[−log p(x|z)] + KL(q ‖ p(z))"
    elbo = float(bound.negative_elbo.mean())
    answer.check(statement, elbo, reconstruction + by_quadrature, ERRORS * error, route)
    evidence = -moments(small.log_joint, -_REACH, _REACH).log_mass
    gap = expectation(small.log_q, lambda x: small.log_q(x) - small.log_joint(x) - evidence, -_REACH, _REACH)
    statement = "The bound lies above −log p(x) by KL(q(z|x) ‖ p(z|x))"
    route = "quadrature of the divergence from the true posterior, against bound and evidence"
    answer.check(statement, gap, reconstruction + kl - evidence, 1e-8, route)
    weights = log_weights(nll[:, None], z[:, None, None], m.expand(1, 1), v.expand(1, 1))
    wide = torch.full_like(v, 2.0)  # wider than the prior, so that no weight is far above the others
    drawn = sample_gaussian(m, wide, (z - m) / v.sqrt())
    even = log_weights(small.nll(drawn)[:, None], drawn[:, None, None], m.expand(1, 1), wide.expand(1, 1))
    ratios = (even[:, 0] + evidence).exp().numpy()
    route = f"{len(z):,} samples of N(m, 2), tolerance {ERRORS:.0f} standard errors"
    statement = "The importance weights p(x,z)/q(z) have the mean p(x): their ratio"
    answer.check(statement, ratios.mean(), 1, ERRORS * mean_error(ratios), route)
    counts = [1, 2, 5, 10, 20, 50, 100]
    means = [float(importance_weighted_bound(weights[: len(z) // k * k, 0].view(-1, k).T).mean()) for k in counts]
    rises = max(later - earlier for earlier, later in itertools.pairwise(means))
    statement = "The importance-weighted bound falls with k: the largest rise"
    answer.check(statement, max(rises, 0.0), 0, ERRORS * error, f"means over {len(z):,} samples, in groups of k")
    answer.value(kl=kl, reconstruction=reconstruction, elbo=elbo, evidence=evidence, gap=gap)
    answer.value(weighted_most=counts[-1], weighted_bound=means[-1])
    answer.figure(_densities(small, evidence))
    answer.figure(_bounds(counts, means, evidence))
    return float(gap)


def _densities(small: _Small, evidence: float) -> Figure:
    import numpy as np

    from pipelines.problems.estimates import gaussian_log
    from pipelines.reporting.plots import Panel, Series, lines

    z = np.linspace(-4, 4, 161)
    named = (
        ("prior", gaussian_log(z, 0.0, 1.0)),
        ("posterior p(z|x)", small.log_joint(z) + evidence),
        ("q(z|x)", small.log_q(z)),
    )
    series = [Series(name, z, np.exp(logs), colour=colour) for colour, (name, logs) in enumerate(named)]
    alt = "densities of the latent number: prior, true posterior, and the Gaussian that stands for it"
    svg = lines("posterior", [Panel(series, "density", zero=True)], "z", alt)
    caption = "The bound pays for what q has where the true posterior has little: their divergence is the gap."
    return Figure("posterior", svg, caption=caption, title="The small model's posterior")


def _bounds(counts: list[int], means: list[float], evidence: float) -> Figure:
    from pipelines.reporting.plots import Panel, Series, lines

    series = [Series("bound", counts, means), Series("−log p(x)", counts, [evidence] * len(counts))]
    alt = "the importance-weighted bound falls towards the exact negative log-likelihood as k grows"
    svg = lines("bounds", [Panel(series, "nats")], "k, samples of z", alt, logx=True)
    caption = "k = 1 is the negative ELBO. More samples take away what q has wrong."
    return Figure("bounds", svg, caption=caption, title="The importance-weighted bound")


def _measured_anew(config: VAEBoundConfig, record: dict[str, Any]) -> tuple[float, float]:
    """Mean over the test images of −log p(x|z) + KL(q ‖ p), nats, written out anew and with fresh z.

    Returns:
        The mean; and the standard error of its distance from another such mean, from two draws of z an image.
    """
    import torch
    from torch.distributions import Normal, kl_divergence
    from torch.nn.functional import logsigmoid

    from pipelines.config import validate
    from pipelines.images.data import load_images
    from pipelines.images.method import Draws
    from pipelines.images.saved import load_pipeline
    from pipelines.images.vae import VAEConfig

    fields = validate(VAEConfig, record["config"] | {"output_dir": config.output_dir, "model": None})
    network, test = load_pipeline(config.vae, "vae").vae.eval(), load_images(fields).test
    draws, found = Draws(torch.Generator().manual_seed(config.seed), len(test)), []
    with torch.no_grad():
        for _ in range(2):
            images = test.batch(slice(None), draws, fields).images
            m, v = network.encode(images)
            q = Normal(m, v.sqrt())
            output = network.decode(q.mean + q.stddev * draws.normal(network.config.latent_dim))
            if network.config.likelihood == "bernoulli":  # of grey levels too
                log_prob = images * logsigmoid(output) + (1 - images) * logsigmoid(-output)
            else:
                log_prob = Normal(output, network.pixel_variance().sqrt()).log_prob(images)
            divergence = kl_divergence(q, Normal(torch.zeros_like(m), torch.ones_like(m)))
            found.append((divergence.sum(1) - log_prob.sum((1, 2, 3))).double())
    first, second = found
    return float(first.mean()), float((first - second).std()) / math.sqrt(len(test))


def _trained(answer: Answer, config: VAEBoundConfig, record: dict[str, Any]) -> None:
    """The autoencoder of the images: its numbers, curve and pictures."""
    from pipelines.problems.estimates import ERRORS
    from pipelines.reporting.plots import Panel, Series, lines

    metrics, folder = record["metrics"], Path(config.vae).expanduser()
    answer.value(**{f"trained_{name}": metrics[f"vae/{name}"] for name in _QUOTED})
    answer.value(**{f"trained_{name}": int(metrics[f"vae/{name}"]) for name in _COUNTED})
    answer.value(trained_latent=record["config"]["latent_dim"], trained_k=record["config"]["importance_samples"])
    anew, error = _measured_anew(config, record)
    route = f"both written out anew on its test images, with other z; tolerance {ERRORS:.0f} standard errors"
    statement = "Of the trained model: negative ELBO = KL + reconstruction"
    answer.check(statement, metrics["vae/negative_elbo"], anew, ERRORS * error, route)
    above = metrics["vae/importance_weighted"] - metrics["vae/negative_elbo"]
    statement = "Of the trained model: the importance-weighted bound is not above the negative ELBO: by how much it is"
    answer.check(statement, max(above, 0.0), 0, 0, "the means that the stage measured on its test images")
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    series = []
    for colour, (key, label) in enumerate((("negative_elbo", "training"), ("eval_negative_elbo", "held out"))):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            series.append(Series(label, *zip(*points, strict=True), smooth=not colour, colour=colour))
    svg = lines("training", [Panel(series, "negative ELBO, nats")], "optimizer step", "the bound falls in training")
    caption = "Faint: each entry; strong: running mean. Where the two part, more training only learns by heart."
    answer.figure(Figure("training", svg, caption=caption, title="The bound in training"))
    for name, title, caption in (
        ("samples", "200 samples", "10 × 20 draws of z from the prior, decoded: not chosen."),
        ("reconstructions", "Reconstructions", "Above: held-out images; below: what is left after the bottleneck."),
    ):
        answer.figure(Figure(name, png=(folder / f"{name}.png").read_bytes(), caption=caption, title=title))
