"""A generative adversarial network (Goodfellow et al. 2014): fields and stage. The networks are the course's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.training import ImageTrainingConfig, run_method


@config
class GANConfig(ImageTrainingConfig):
    """Train a generator and a discriminator against each other."""

    family: ClassVar[str] = "gan"

    output_dir: str = Field("runs/gan", description="folder the stage writes into", json_schema_extra=INERT)
    loss: Literal["nonsaturating", "minimax"] = Field(
        "nonsaturating",
        description="the generator's: −log D(G(z)), or log(1 − D(G(z))), which saturates where D is sure",
    )
    latent_dim: int = Field(64, ge=1, description="size of the noise that an image is made of")
    hidden: int = Field(512, ge=1, description="width of the fully connected layers")
    width: int = Field(64, ge=8, multiple_of=8, description="channels of the networks at their smallest side")
    stages: int = Field(2, ge=1, le=6, description="how often the side is doubled and halved")
    learning_rate: float = Field(1e-3, gt=0, description="the generator's peak learning rate")
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="the discriminator's; null takes the generator's (else: two time scales)"
    )
    beta1: float = Field(0.5, ge=0, lt=1, description="decay of Adam's mean of the gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's mean of their squares")
    spectral_norm: bool = Field(False, description="bound the discriminator's layers (Miyato et al. 2018)")
    r1: float = Field(
        0.0,
        ge=0,
        description="weight of ½‖∇D(x)‖² at training images in the discriminator's loss (Mescheder et al. 2018)",
    )
    gradient_norms: bool = Field(
        True,
        description="log the norm of the generator's gradient under both losses, at the price of two backward passes",
    )
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.batch_size < 2:
            mend = "give batch_size=2 or more"
            found.append(Problem("batch_size", self.batch_size, "batch norm needs more than one image at a time", mend))
        return found


def gan(config: GANConfig) -> dict[str, float]:
    """Train a GAN; ``output_dir`` is then the folder of a ``GANPipeline``.

    Returns:
        See ``run_method``; a GAN has no bound.

    Raises:
        UserError: unusable images or settings; a loss that is not finite.
    """
    from pipelines.images.gan_method import GANMethod

    return run_method(config, GANMethod)
