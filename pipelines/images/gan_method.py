"""The GAN as a method of the training loop: two players, two optimizers, one step each in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.images.gan_losses import discriminator_loss, generator_gradients, generator_loss, r1_penalty
from pipelines.images.gan_networks import GANDiscriminator, GANGenerator
from pipelines.images.gan_pipeline import GANPipeline
from pipelines.images.training import adam

if TYPE_CHECKING:
    from pipelines.images.data import ImageSet
    from pipelines.images.gan import GANConfig
    from pipelines.images.method import Batch, Draws

_WALKS = 10  # of the picture of the latent space


class GANMethod:
    """A generator and a discriminator; the discriminator moves first (see ``pipelines.images.method.Method``).

    Args:
        config: the stage's configuration.
        images: what it is trained on; its shape decides the networks'.

    Raises:
        UserError: if the images' side cannot be halved as often as the networks do.
    """

    name = "gan"
    phases = ("discriminator", "generator")
    averaged = ("generator",)
    estimated = ()

    def __init__(self, config: GANConfig, images: ImageSet):
        channels, side, _ = images.shape
        if side % 2**config.stages or side < 2**config.stages:
            problem = f"the images' side of {side} pixels cannot be halved {config.stages} times"
            raise UserError("stages", config.stages, problem, "give fewer stages, or another image_size")
        self.config = config
        sizes = {"sample_size": side, "channels": channels, "hidden": config.hidden}
        sizes |= {"width": config.width, "stages": config.stages}
        self.parts: dict[str, nn.Module] = {
            "discriminator": GANDiscriminator(**sizes, spectral_norm=config.spectral_norm),
            "generator": GANGenerator(**sizes, latent_dim=config.latent_dim),
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each player, with rates of their own (two time scales, Heusel et al. 2017)."""
        rates = {"generator": None, "discriminator": self.config.discriminator_learning_rate}
        betas = (self.config.beta1, self.config.beta2)
        return {
            name: adam(part.parameters(), self.config, learning_rate=rates[name], betas=betas)
            for name, part in self.parts.items()
        }

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Method.loss``. Logged: the discriminator's mean probabilities, the penalty, norms of gradients."""
        generator, discriminator = self.parts["generator"], self.parts["discriminator"]
        noise = draws.normal(self.config.latent_dim)
        if phase == "discriminator":
            with torch.no_grad():
                fake = generator(noise)
            return self._discriminator_loss(discriminator, 2 * batch.images - 1, fake)
        logits = discriminator(generator(noise)).float()
        loss = generator_loss(logits, self.config.loss)
        logged = {}
        if self.config.gradient_norms:
            found = generator_gradients(logits, generator.parameters())
            logged = {f"gradient_norm_{kind}": gradient for kind, gradient in found.items()}
        return loss, logged

    def _discriminator_loss(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, dict]:
        penalized = self.config.r1 > 0
        real = real.requires_grad_(penalized)
        real_logits, fake_logits = discriminator(torch.cat([real, fake.to(real.dtype)])).float().split(len(real))
        loss = discriminator_loss(real_logits, fake_logits)
        logged = {
            "probability_real": real_logits.detach().sigmoid().mean(),
            "probability_fake": fake_logits.detach().sigmoid().mean(),
        }
        if penalized:
            penalty = r1_penalty(real_logits, real)
            logged["r1"] = penalty.detach()
            loss = loss + self.config.r1 * penalty
        return loss, logged

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """See ``Method.sample``."""
        return self.pipeline()(batch_size=count, generator=generator, output_type="pt").images.float()

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Nothing: a GAN gives no likelihood, nor a bound on one."""
        return {}

    def pictures(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Ways through the latent space from one draw to another, on the sphere that the noise lies on."""
        network = self.parts["generator"].settled()
        ends = torch.randn(2, _WALKS, self.config.latent_dim, generator=generator, device=generator.device)
        t = torch.linspace(0, 1, _WALKS, device=ends.device)[:, None, None]
        angle = torch.acos(nn.functional.cosine_similarity(*ends, dim=-1))[None, :, None]
        walk = (torch.sin((1 - t) * angle) * ends[0] + torch.sin(t * angle) * ends[1]) / torch.sin(angle)
        with torch.no_grad():
            images = network(walk.transpose(0, 1).flatten(0, 1).to(network.device)) / 2 + 0.5
        yield "interpolations", images.clamp(0, 1).unflatten(0, (_WALKS, _WALKS))

    def pipeline(self) -> GANPipeline:
        """See ``Method.pipeline``."""
        return GANPipeline(self.parts["generator"].settled(), self.parts["discriminator"])
