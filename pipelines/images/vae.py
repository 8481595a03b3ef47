"""The variational autoencoder as a stage: Kingma and Welling (2014), with Bernoulli or Gaussian pixels.

``architecture=mlp`` with the defaults of ``recipes/images/vae_mlp.yaml`` is the network that courses train;
``architecture=conv`` with those of ``vae_conv.yaml`` is ours.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.training import ImageTrainingConfig, run_method


@config
class VAEConfig(ImageTrainingConfig):
    """Train a variational autoencoder."""

    family: ClassVar[str] = "vae"

    output_dir: str = Field("runs/vae", description="folder the stage writes into", json_schema_extra=INERT)
    binarize: Literal["none", "bernoulli", "threshold"] = Field(
        "bernoulli",
        description="bernoulli: each pixel is 1 with the probability that its grey level is, drawn afresh each time "
        "the image is seen; threshold: 1 from `threshold` on; none: grey levels (for likelihood=gaussian)",
    )
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")
    architecture: Literal["mlp", "conv"] = Field(
        "conv", description="mlp: two hidden layers of ELUs each way; conv: convolutions and residual layers"
    )
    latent_dim: int = Field(64, ge=1, description="dimensions of the latent space")
    hidden: int = Field(256, ge=1, description="features of the hidden dense layers")
    width: int = Field(32, ge=1, description="conv: channels at each square of 4×4 pixels (small images: 2×2)")
    likelihood: Literal["bernoulli", "gaussian"] = Field(
        "bernoulli", description="of a pixel: bernoulli (binary images), or gaussian (grey levels, colours)"
    )
    variance: float | None = Field(
        None, gt=0, description="likelihood=gaussian: its variance, white − black being 1; null learns one for all"
    )
    beta: float = Field(1.0, ge=0, description="weight of the divergence in the loss; 1 is the bound")
    kl_warmup_steps: int = Field(0, ge=0, description="steps in which that weight rises from 0")
    free_bits: float = Field(
        0.0, ge=0, description="nats that each latent dimension may carry of an image without being charged"
    )
    importance_samples: int = Field(
        50, ge=0, description="samples of the importance-weighted bound on the test set; 0 leaves it out"
    )

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.likelihood == "bernoulli" and self.binarize == "none":
            mend = "give binarize=bernoulli, or likelihood=gaussian"
            found.append(Problem("likelihood", self.likelihood, "grey levels are not binary", mend))
        if self.likelihood == "bernoulli" and self.variance is not None:
            mend = "give likelihood=gaussian, or leave variance out"
            found.append(Problem("variance", self.variance, "a Bernoulli pixel has no variance of its own", mend))
        return found


def vae(config: VAEConfig) -> dict[str, float]:
    """Train a variational autoencoder, measure its bounds on the whole test set and save it as a ``VAEPipeline``.

    Beside the pipeline: ``samples.png`` (means of 200 draws from the prior), ``reconstructions.png`` (test images above
    their reconstructions), ``traversals.png`` (the ten latent dimensions that carry most, from −2.5 to 2.5 standard
    deviations), ``interpolations.png`` (between pairs of test images).

    Returns:
        ``vae/negative_elbo``, ``vae/kl``, ``vae/reconstruction`` (nats an image, one sample of z each),
        ``vae/importance_weighted`` (with k = ``importance_samples``), ``vae/bits_per_pixel``, ``vae/active_units``
        (latent dimensions that carry more than 0.01 nats of an image), each with standard error and interval; and what
        ``run_method`` counts.

    Raises:
        UserError: see ``run_method``.
    """
    from pipelines.images.vae_method import VAEMethod

    return run_method(config, VAEMethod)
