"""Latent variable models: one forward pass, the bottleneck, why reconstructions blur, and how a new image is drawn."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipelines.images.data import ImageSet
    from pipelines.images.vae import VAEConfig
    from pipelines.images.vae_networks import ImageVAE
    from pipelines.problems.latent_training import Trained

_RECIPE = "images/vae"
_MOST = 3000  # training images that may stand behind a z: as many rows and columns
_ROWS, _COLUMNS = 5, 10


@config
class LatentVariablesConfig(ExerciseConfig):
    """A trained autoencoder, and the small trainings that show its bottleneck."""

    output_dir: str = Field(
        "runs/latent_variables", description="folder the stage writes into", json_schema_extra=INERT
    )
    vae: Source = Field(description="folder of a finished stage of images/vae; its fields are those of the trainings")
    betas: list[Annotated[float, Field(gt=0)]] = Field(
        [0.03, 0.1, 0.3, 1.0, 3.0], min_length=2, description="weights of the divergence, one small training each"
    )
    dimensions: list[Annotated[int, Field(ge=1)]] = Field(
        [2, 8, 64], min_length=1, description="latent dimensions of plain autoencoders, one training each"
    )
    steps: int = Field(400, ge=1, description="optimizer steps of each of those trainings")
    draws: int = Field(20_000, ge=1000, description="samples of z that check the divergence and the bound")

    def problems(self) -> list[Problem]:
        found = super().problems() + stage_problems({"vae": (self.vae, _RECIPE)})
        for name in ("betas", "dimensions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                found.append(Problem(name, getattr(self, name), "one of them stands twice", "give each once"))
        return found


def latent_variables(config: LatentVariablesConfig) -> dict[str, float]:
    """Compute, train in the small, check and draw; see ``docs/problems/latent_variables.md``.

    Returns:
        Of the given autoencoder over training images, in nats: ``latent_variables/rate`` (mean divergence),
        ``latent_variables/information``, ``latent_variables/mismatch``; ``latent_variables/behind``, images behind a z;
        ``latent_variables/checks``, ``latent_variables/checks_failed``.

    Raises:
        UserError: ``vae`` is no finished stage of images/vae, or its images or its pipeline cannot be loaded.
    """
    from pipelines.config import validate
    from pipelines.images.data import load_images
    from pipelines.images.saved import load_pipeline
    from pipelines.images.vae import VAEConfig

    answer = Answer(config, "latent_variables", "Latent variable models")
    record = finished_stage(config.vae, "vae", _RECIPE)
    fields = validate(VAEConfig, record["config"] | {"output_dir": config.output_dir, "model": None})
    quiet = {"save_steps": 200 * fields.logging_steps, "eval_steps": None, "sample_steps": None}
    fields = dataclasses.replace(fields, max_steps=config.steps, **quiet)
    network = load_pipeline(config.vae, "vae").vae.eval()
    images = load_images(fields)
    seen, held_out = (_batch(part.subset(_MOST, 0), fields) for part in (images.train, images.test))
    _forward(config, network, held_out[:1], answer)
    _bottleneck(config, network, seen, answer)
    plain = _sweep(config, fields, images, seen, answer)
    _blur(network, seen, held_out, answer)
    _new_images(config, network, plain, seen, answer)
    kept = ("rate", "information", "mismatch", "behind")
    return answer.write() | {f"latent_variables/{name}": float(answer.values[name]) for name in kept}


def _batch(part: Any, fields: VAEConfig) -> Tensor:
    """Images of one split as the model sees them, (N, C, H, W)."""
    from pipelines.images.method import Draws
    from pipelines.images.seeds import TEST_PIXELS, seeded

    return part.batch(slice(None), Draws(seeded(fields.seed, TEST_PIXELS), len(part)), fields).images


def _normal(config: LatentVariablesConfig, number: int, *shape: int) -> Tensor:
    import torch

    from pipelines.images.seeds import seeded

    return torch.randn(*shape, generator=seeded(config.seed, number), dtype=torch.float64)


def _forward(config: LatentVariablesConfig, network: ImageVAE, image: Tensor, answer: Answer) -> None:
    """One image on its way: shapes and numbers, and both terms by another route."""
    import torch
    from torch.distributions import Bernoulli, Normal

    from pipelines.images.vae_math import gaussian_kl, importance_weighted_bound, log_weights, sample_gaussian
    from pipelines.problems.latent_diagram import Numbers, diagram
    from pipelines.problems.pictures import grid_png

    dimensions = network.config.latent_dim
    with torch.no_grad():
        m, v = network.encode(image)
        noise = _normal(config, 0, config.draws, 1, dimensions).float()
        z = sample_gaussian(m, v, noise)
        kl, reconstruction = gaussian_kl(m, v).sum(1), network.reconstruction(image, z)
        output = network.decode(z[0])
        expected = network.expected(z[0])
        q, prior = Normal(m.double(), v.double().sqrt()), Normal(0.0, 1.0)
        ratio = (q.log_prob(z.double()) - prior.log_prob(z.double())).sum(-1)[:, 0]
        route = f"{config.draws:,} samples of q(z|x), 4 standard errors"
        answer.check("KL(q(z|x) ‖ p(z)) in closed form", ratio.mean(), kl, 4 * ratio.std() / config.draws**0.5, route)
        if network.config.likelihood == "bernoulli":
            pixels = Bernoulli(logits=output.double(), validate_args=False)  # grey levels too
            other = -pixels.log_prob(image.double()).sum()
        else:
            other = -Normal(output.double(), network.pixel_variance().double().sqrt()).log_prob(image.double()).sum()
        answer.check("−log p(x|z), summed over pixels", other, reconstruction[0], 1e-3, "torch.distributions, float64")
        weighted = importance_weighted_bound(log_weights(reconstruction, z, m, v))
    elbo = kl + reconstruction.mean()
    answer.check(
        "−log p(x) ≤ negative ELBO; what it is above",
        max(0.0, float(weighted - elbo)),
        0.0,
        4 * float(reconstruction.std()) / config.draws**0.5,
        f"−log p(x) by importance sampling with {config.draws:,} samples",
    )
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder)]
    shape = "×".join(str(n) for n in image.shape[1:])
    numbers = Numbers(shape, dimensions, *sizes, float(kl), float(reconstruction[0]))
    caption = "Down to z and back, with the numbers of one held-out image; dashed: the two terms of the loss."
    answer.figure(Figure("diagram", diagram(numbers), caption=caption, title="A latent variable model"))
    active = (gaussian_kl(m, v)[0] > 0.01).sum()
    rows = [
        ["image x", shape, f"{int((image > 0.5).sum())} of {image.numel()} pixels above 1/2"],
        ["mean m(x)", dimensions, f"from {m.min():.2f} to {m.max():.2f}"],
        [
            "standard deviation √v(x)",
            dimensions,
            f"from {v.min().sqrt():.2f} to {v.max().sqrt():.2f}; the prior's is 1",
        ],
        ["noise ε", dimensions, f"length {noise[0].norm():.2f}, near √{dimensions} = {math.sqrt(dimensions):.2f}"],
        ["z = m + √v·ε", dimensions, f"length {z[0].norm():.2f}"],
        ["decoder's output", shape, f"from {output.min():.2f} to {output.max():.2f}"],
        ["E[x|z]", shape, f"from {expected.min():.3f} to {expected.max():.3f}"],
        ["KL(q(z|x) ‖ p(z))", 1, f"{float(kl):.2f} nats; {int(active)} dimensions carry more than 0.01"],
        ["−log p(x|z)", 1, f"{float(reconstruction[0]):.2f} nats, over all ε {reconstruction.mean():.2f}"],
    ]
    answer.table("forward", ["what", "shape", "numbers"], rows, "One held-out image on its way through the network.")
    answer.value(image_kl=kl, image_reconstruction=reconstruction.mean(), image_elbo=elbo, image_weighted=weighted)
    answer.value(latent=dimensions)
    shown = torch.cat([image, expected, network.expected(z[1:7, 0])]).unsqueeze(0)
    caption = "The image, and seven reconstructions of it, each with a noise of its own."
    answer.figure(Figure("one_image", png=grid_png(shown), caption=caption, title="One image, several ε"))


def _bottleneck(config: LatentVariablesConfig, network: ImageVAE, seen: Tensor, answer: Answer) -> None:
    """The divergence taken apart into what z says of the image and what the prior does not know."""
    import torch
    from torch.distributions import Normal

    from pipelines.images.vae_math import gaussian_kl, sample_gaussian
    from pipelines.problems.latent_variables_math import carried, index_log_posterior

    with torch.no_grad():
        m, v = network.encode(seen)
    m, v = m.double(), v.double()
    noise = _normal(config, 1, *m.shape)
    found, kl = carried(m, v, noise), gaussian_kl(m, v).sum(1)
    z = sample_gaussian(m, v, noise)
    ratio = (Normal(m, v.sqrt()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1) - kl
    answer.check(
        "mean KL(q(z|x_n) ‖ p(z)) = I(n; z) + KL(q(z) ‖ p(z))",
        found.information + found.mismatch,
        kl.mean(),
        4 * ratio.std() / math.sqrt(len(m)),
        f"all {len(m):,} training images behind each z, one z an image, 4 standard errors; expected: closed form",
    )
    # The aggregate drops out of that sum; so the information alone is held against the posterior's entropy.
    posterior = index_log_posterior(z, m, v)
    off = posterior.diagonal() - (posterior.exp() * posterior).sum(1)
    answer.check(
        "I(n; z) = log N − E H(n|z)",
        found.information,
        math.log(len(m)) - math.log(found.behind),
        4 * off.std() / math.sqrt(len(m)),
        f"mean of log q(z|x_n)/q(z), one z an image, 4 standard errors; expected: entropy over all {len(m):,} images",
    )
    answer.value(rate=kl.mean(), information=found.information, mismatch=found.mismatch, behind=found.behind)
    answer.value(log_count=math.log(len(m)), count=len(m))


def _sweep(config: LatentVariablesConfig, fields: VAEConfig, images: ImageSet, seen: Tensor, answer: Answer) -> Trained:
    """Rate against distortion over β, and plain autoencoders of several dimensions; returns the widest plain one."""
    import torch
    from scipy.stats import spearmanr

    from pipelines.problems.latent_training import train
    from pipelines.problems.latent_variables_math import carried

    folder, noisy, rows = Path(config.output_dir), [], []
    for beta in sorted(config.betas):
        one = train(dataclasses.replace(fields, beta=beta), images, folder, f"beta-{beta:g}")
        with torch.no_grad():
            m, v = one.network.encode(seen)
        mine = carried(m, v, _normal(config, 2, *m.shape))
        noisy.append((beta, one, mine))
        rows.append(
            [
                f"β = {beta:g}",
                f"{one.rate:.1f}",
                f"{round(mine.information, 2) + 0.0:.2f}",
                f"{mine.behind:.1f}",
                *_common(one),
            ]
        )
    plain = []
    for size in sorted(config.dimensions):
        one = train(dataclasses.replace(fields, latent_dim=size), images, folder, f"plain-{size}", plain=True)
        plain.append((size, one))
        rows.append([f"plain, {size} dimensions", "–", "–", "–", *_common(one)])
    columns = [
        "autoencoder",
        "rate, nats",
        "I(n; z), nats",
        "images behind a z",
        "error",
        "training error",
        "sharpness",
    ]
    caption = (
        f"{config.steps} steps each. Error: mean squared, a pixel, of held-out images. Sharpness: the images' is 1."
    )
    answer.table("sweep", columns, rows, caption)
    route = f"Spearman's correlation over {len(noisy)} trainings"
    rates = [one.rate for _, one, _ in noisy]
    for name, values, sign in (
        ("the rate falls as β rises", [beta for beta, _, _ in noisy], -1),
        ("the error falls as the rate rises", [one.error for _, one, _ in noisy], -1),
        ("fewer images stand behind a z as the rate rises", [mine.behind for _, _, mine in noisy], -1),
        ("sharpness rises with the rate", [one.sharpness for _, one, _ in noisy], 1),
    ):
        answer.check(name, spearmanr(rates, values)[0], sign, 0.2, route)
    (low, first, some), (high, last, many) = noisy[0], noisy[-1]
    answer.value(beta_low=low, beta_high=high, rate_low=first.rate, rate_high=last.rate, plain_wide=plain[-1][0])
    answer.value(error_low=first.error, error_high=last.error, plain_error=plain[-1][1].error)
    answer.value(sharp_low=first.sharpness, sharp_high=last.sharpness, behind_low=some.behind, behind_high=many.behind)
    _sweep_figures(noisy, plain, answer)
    return plain[-1][1]


def _common(one: Trained) -> list[str]:
    return [f"{one.error:.4f}", f"{one.train_error:.4f}", f"{one.sharpness:.2f}"]


def _sweep_figures(noisy: list[tuple], plain: list[tuple], answer: Answer) -> None:
    from pipelines.reporting.plots import Panel, Series, lines

    rates = [one.rate for _, one, _ in noisy]
    ends = [min(rates), max(rates)]
    curves = [Series("β-VAE", rates, [one.error for _, one, _ in noisy], colour=0)]
    for number, (size, one) in enumerate(plain):
        if size in {plain[0][0], plain[len(plain) // 2][0], plain[-1][0]}:
            curves.append(Series(f"plain, {size}d", ends, [one.error] * 2, colour=1 + number % 5))
    alt = "The error falls as the rate rises; plain autoencoders have an error that their dimensions decide."
    svg = lines("latent_variables-rate", [Panel(curves, "mean squared error", zero=True)], "rate, nats an image", alt)
    caption = (
        "Error against nats (a point a β): what z does not carry is lost. Plain autoencoders: limited by dimensions."
    )
    answer.figure(Figure("rate", svg, caption=caption, title="Rate against distortion"))
    panels = [
        Panel([Series("", rates, [one.sharpness for _, one, _ in noisy], colour=0)], "sharpness", zero=True),
        Panel([Series("", rates, [mine.behind for _, _, mine in noisy], colour=1)], "images behind a z", log=True),
    ]
    alt = "As the rate falls, more images stand behind a z and reconstructions lose their sharpness."
    svg = lines("latent_variables-behind", panels, "rate, nats an image", alt)
    caption = "The fewer nats, the more images stand behind one z, and the blurrier their mean (a point a β)."
    answer.figure(Figure("behind", svg, caption=caption, title="Why reconstructions blur"))


def _blur(network: ImageVAE, seen: Tensor, held_out: Tensor, answer: Answer) -> None:
    """Held-out images, the network's reconstructions, and the means of the training images that stand behind z."""
    import torch

    from pipelines.images.vae_math import sharpness
    from pipelines.problems.latent_variables_math import best_decoder, index_log_posterior
    from pipelines.problems.pictures import grid_png

    with torch.no_grad():
        m, v = network.encode(seen)
        z = network.encode(held_out)[0]
        rebuilt, again = network.expected(z), network.expected(m)
        mean = best_decoder(z, m, v, seen)
        nearest = seen[index_log_posterior(z, m, v).argmax(1)]
    own = sharpness(held_out).mean()
    answer.value(
        held_out_sharpness=sharpness(rebuilt).mean() / own,
        seen_sharpness=sharpness(again).mean() / sharpness(seen).mean(),
        held_out_error=((rebuilt - held_out) ** 2).mean(),
        seen_error=((again - seen) ** 2).mean(),
        mean_error=((mean - held_out) ** 2).mean(),
    )
    count = min(_COLUMNS, len(held_out))
    picture = torch.stack([part[:count].float() for part in (held_out, rebuilt, mean, nearest)])
    caption = (
        "Held-out images; their reconstructions; the mean of the training images behind z; the likeliest of those."
    )
    answer.figure(Figure("blur", png=grid_png(picture), caption=caption, title="What stands behind a z"))


def _new_images(config: LatentVariablesConfig, network: ImageVAE, plain: Trained, seen: Tensor, answer: Answer) -> None:
    """From the prior, through the trained decoder and through one that never met a prior."""
    import torch

    def drawn(decoder: ImageVAE) -> Tensor:
        z = _normal(config, 3, _ROWS * _COLUMNS, decoder.config.latent_dim).float()
        return decoder.expected(z)

    with torch.no_grad():
        own, other = drawn(network), drawn(plain.network)
        m, v = network.encode(seen)
        codes = plain.network.encode(seen)[0]
    answer.value(
        aggregate_scale=(m.var(0) + v.mean(0)).sqrt().mean(),
        code_scale=codes.std(0).mean(),
        own_distance=_nearest(own, seen),
        plain_distance=_nearest(other, seen),
    )
    caption = "z from the prior, then E[x|z]: training has made the decoder ready for such a z."
    answer.figure(_drawn("samples", own, "New images", caption))
    caption = "Its codes follow no known distribution, so the same z means little to it."
    answer.figure(_drawn("plain_samples", other, "The same of a plain autoencoder", caption))


def _drawn(name: str, images: Tensor, title: str, caption: str) -> Figure:
    from pipelines.problems.pictures import grid_png

    return Figure(name, png=grid_png(images.unflatten(0, (_ROWS, _COLUMNS))), caption=caption, title=title)


def _nearest(images: Tensor, seen: Tensor) -> torch.Tensor:
    """Mean Euclidean distance of images to the nearest training image."""
    import torch

    return torch.cdist(images.flatten(1), seen.flatten(1)).min(1).values.mean()
