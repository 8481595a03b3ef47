"""The small trainings of the latent-variable exercise: autoencoders with noise for several β, and plain ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.images.evaluation import measure
from pipelines.images.loop import Loop, new_accelerator
from pipelines.images.training import steps_of
from pipelines.images.vae_math import sharpness
from pipelines.images.vae_method import SharpnessMethod
from pipelines.stage import CHECKPOINTS

if TYPE_CHECKING:
    from pipelines.images.data import ImageSet
    from pipelines.images.method import Batch, Draws
    from pipelines.images.vae import VAEConfig
    from pipelines.images.vae_networks import ImageVAE


class PlainMethod(SharpnessMethod):
    """An autoencoder without noise and without a prior: z = m(x), and the reconstruction term is the whole loss."""

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Method.loss``."""
        none = batch.images.new_zeros(len(batch), self.config.latent_dim)
        return self._network(batch.images, none)[0].mean(), {}

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """As ``SharpnessMethod``, of E[x|m(x)]; a code without noise has no divergence from the prior."""
        means = self._network.expected(self._network.encode(batch.images)[0])
        return {
            "sharpness": sharpness(means),
            "own_sharpness": sharpness(batch.images),
            "error": ((means - batch.images) ** 2).mean((1, 2, 3)),
        }


@dataclasses.dataclass(frozen=True)
class Trained:
    """An autoencoder and what it was found to be.

    Attributes:
        network: in evaluation mode.
        error: mean squared error of the reconstructions of held-out images, a pixel.
        train_error: the same of training images.
        sharpness: of held-out reconstructions, that of the images being 1.
        rate: mean of KL(q(z|x) ‖ N(0, I)) over held-out images, nats; None without noise.
    """

    network: ImageVAE
    error: float
    train_error: float
    sharpness: float
    rate: float | None


def train(config: VAEConfig, images: ImageSet, folder: Path, name: str, *, plain: bool = False) -> Trained:
    """Train one autoencoder, or go on training it, and measure it.

    Args:
        config: of the autoencoder; β, latent dimensions and steps among it.
        images: to be trained and measured on.
        folder: of the stage; checkpoints lie below it until it is finished.
        name: of this training, different from the others'.
        plain: without noise and prior.
    """
    mine = dataclasses.replace(config, report_to="none", output_dir=str(folder / CHECKPOINTS / name))
    accelerator = new_accelerator(mine)
    torch.manual_seed(mine.seed)
    method = (PlainMethod if plain else SharpnessMethod)(mine, images)
    Loop(method, images.train, images.test, mine, accelerator, steps_of(mine, len(images.train))).run()
    test, seen = (
        {key: float(values.mean()) for key, values in measure(method, part, mine, accelerator).items()}
        for part in (images.test.to(accelerator.device), images.train.to(accelerator.device))
    )
    return Trained(
        method.parts["vae"].cpu(),
        test["error"],
        seen["error"],
        test["sharpness"] / test["own_sharpness"],
        test.get("kl"),
    )
