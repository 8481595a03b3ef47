"""The variational autoencoder as a method of the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.images.training import adam
from pipelines.images.vae_math import (
    free_bits_kl,
    gaussian_kl,
    importance_weighted_bound,
    log_weights,
    negative_elbo_bound,
    sample_gaussian,
    sharpness,
)
from pipelines.images.vae_networks import ImageVAE
from pipelines.images.vae_pipeline import VAEPipeline

if TYPE_CHECKING:
    from pipelines.images.data import ImageSet
    from pipelines.images.method import Batch, Draws
    from pipelines.images.vae import VAEConfig

_TOGETHER = 5  # samples of z an image that are decoded at once
_ACTIVE = 0.01  # nats
_SHOWN_DIMENSIONS, _SHOWN_VALUES, _REACH = 10, 11, 2.5


class VAEMethod:
    """Encoder and decoder under one optimizer (see ``pipelines.images.method.Method``).

    Args:
        config: the stage's configuration.
        images: what it is trained on; its shape decides the networks'.
    """

    name = "vae"
    phases = ("vae",)
    averaged = ("vae",)
    estimated = ()

    def __init__(self, config: VAEConfig, images: ImageSet):
        channels, side, _ = images.shape
        self.config = config
        network = ImageVAE(
            image_size=side,
            channels=channels,
            latent_dim=config.latent_dim,
            architecture=config.architecture,
            hidden=config.hidden,
            width=config.width,
            likelihood=config.likelihood,
            variance=config.variance,
        )
        self.parts: dict[str, nn.Module] = {"vae": network}

    @property
    def _network(self) -> ImageVAE:
        return self.parts["vae"]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See ``Method.optimizers``."""
        return {"vae": adam(self._network.parameters(), self.config)}

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Method.loss``. Logged: the bound and its two terms, whatever weights the loss gives them."""
        reconstruction, m, v = self._network(batch.images, draws.normal(self.config.latent_dim))
        bound = negative_elbo_bound(reconstruction, m, v)
        beta = self.config.beta
        if self.config.kl_warmup_steps:
            beta *= min(1.0, (step + 1) / self.config.kl_warmup_steps)
        charged = free_bits_kl(m, v, self.config.free_bits) if self.config.free_bits else bound.kl
        loss = (bound.reconstruction + beta * charged).mean()
        return loss, {name: value.detach().mean() for name, value in bound._asdict().items()}

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """See ``Method.sample``: means E[x|z] of latents from the prior."""
        return self.pipeline()(batch_size=count, generator=generator, output_type="pt").images

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The bound, its terms and the importance-weighted bound of each image, in float32 whatever trained it."""
        network, count = self._network, self.config.importance_samples
        with torch.autocast(batch.images.device.type, enabled=False):
            reconstruction, m, v = network(batch.images, draws.normal(self.config.latent_dim))
            found = negative_elbo_bound(reconstruction, m, v)._asdict()
            weights = []
            for start in range(0, count, _TOGETHER):
                noise = draws.normal(min(_TOGETHER, count - start), self.config.latent_dim).transpose(0, 1)
                z = sample_gaussian(m, v, noise)
                weights.append(log_weights(network.reconstruction(batch.images, z), z, m, v))
            found["active_units"] = (gaussian_kl(m, v) > _ACTIVE).sum(1)
            found["bits_per_pixel"] = found["negative_elbo"] / (math.log(2) * batch.images[0].numel())
            if count:
                found["importance_weighted"] = importance_weighted_bound(torch.cat(weights))
        return found

    def pictures(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Reconstructions, traversals of the latent dimensions that carry most, interpolations."""
        network = self._network
        m, v = network.encode(batch.images)
        yield "reconstructions", torch.stack([batch.images, network.expected(m)])
        carried = gaussian_kl(m, v).mean(0)
        dimensions = carried.argsort(descending=True)[:_SHOWN_DIMENSIONS]
        values = torch.linspace(-_REACH, _REACH, _SHOWN_VALUES, device=m.device)
        walks = m[0].repeat(len(dimensions), len(values), 1)
        for row, dimension in enumerate(dimensions):
            walks[row, :, dimension] = values
        yield "traversals", network.expected(walks)
        pairs = len(m) // 2
        if pairs:
            t = torch.linspace(0, 1, _SHOWN_VALUES, device=m.device)[None, :, None]
            yield "interpolations", network.expected((1 - t) * m[:pairs, None] + t * m[pairs : 2 * pairs, None])

    def pipeline(self) -> VAEPipeline:
        """See ``Method.pipeline``."""
        return VAEPipeline(self._network)


class SharpnessMethod(VAEMethod):
    """A ``VAEMethod`` that measures how sharp its reconstructions are instead of its bounds."""

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """``sharpness`` of E[x|z] with z ~ q(z|x), ``own_sharpness`` of the image, mean squared ``error``, ``kl``."""
        m, v = self._network.encode(batch.images)
        means = self._network.expected(sample_gaussian(m, v, draws.normal(self.config.latent_dim)))
        return {
            "sharpness": sharpness(means),
            "own_sharpness": sharpness(batch.images),
            "error": ((means - batch.images) ** 2).mean((1, 2, 3)),
            "kl": gaussian_kl(m, v).sum(1),
        }
