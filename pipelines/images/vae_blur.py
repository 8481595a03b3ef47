"""Why a variational autoencoder's reconstructions blur: a sweep over β and the pixels' likelihood.

The decoder is asked for the mean of all images that may stand behind a latent z, E[x|z]. The fewer nats of the image z
carries, the more images those are, and their mean is a blur, whatever the likelihood. So sharpness should follow the
divergence KL(q(z|x) ‖ p(z)), which β and the likelihood's variance merely set: the sweep draws the one against the
other, and one curve through all likelihoods is what the explanation predicts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.vae import VAEConfig
from pipelines.stage import CHECKPOINTS, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.images.data import ImageSet

Likelihood = Literal["bernoulli", "gaussian"]


@config
class VAEBlurConfig(VAEConfig):
    """Train one autoencoder for each β and likelihood and compare the sharpness of what they reconstruct."""

    family: ClassVar[str] = "vae"

    output_dir: str = Field("runs/vae_blur", description="folder the stage writes into", json_schema_extra=INERT)
    binarize: Literal["none", "bernoulli", "threshold"] = Field(
        "threshold", description="threshold: black and white, so that every edge is as sharp as it can be"
    )
    max_steps: int = Field(1000, ge=-1, description="optimizer steps of each autoencoder; -1 leaves it to epochs")
    betas: list[float] = Field(
        [0.1, 0.3, 1.0, 3.0, 10.0], min_length=1, description="weights of the divergence, one autoencoder each"
    )
    likelihoods: list[Likelihood] = Field(
        ["bernoulli", "gaussian"], min_length=1, description="likelihoods of a pixel, each with every weight"
    )
    variance: float | None = Field(
        0.05, gt=0, description="of the Gaussian likelihood, white − black being 1; null learns one for all pixels"
    )

    def problems(self) -> list[Problem]:
        found = [p for p in super().problems() if p.what not in ("likelihood", "variance")]
        if "bernoulli" in self.likelihoods and self.binarize == "none":
            mend = "give binarize=threshold, or likelihoods=[gaussian]"
            found.append(Problem("likelihoods", self.likelihoods, "grey levels are not binary", mend))
        if min(self.betas) < 0:
            found.append(Problem("betas", self.betas, "a weight is below 0", "give weights from 0"))
        for name in ("betas", "likelihoods"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                found.append(Problem(name, getattr(self, name), "one of them stands twice", "give each once"))
        return found


def vae_blur(config: VAEBlurConfig) -> dict[str, float]:
    """Train the autoencoders, measure them on the whole test set, draw sharpness against β and against nats carried.

    Writes ``sweep.json`` (a row for each autoencoder), ``sharpness.svg`` and ``reconstructions.png`` (test images, and
    below them a row for each autoencoder, in the order of the sweep).

    Returns:
        ``vae_blur/LIKELIHOOD_BETA_sharpness`` (that of E[x|z], z ~ q(z|x), over that of the images),
        ``vae_blur/LIKELIHOOD_BETA_kl`` (nats an image) and ``vae_blur/LIKELIHOOD_BETA_error`` (mean squared, a pixel)
        for each autoencoder; ``vae_blur/rank_correlation``, Spearman's, of sharpness and nats carried over all of them.

    Raises:
        UserError: see ``run_method``.
    """
    import torch
    from scipy.stats import spearmanr

    from pipelines.images.data import load_images
    from pipelines.images.loop import new_accelerator
    from pipelines.images.pictures import save_grid
    from pipelines.images.training import shown_images

    accelerator = new_accelerator(config)
    with accelerator.main_process_first():
        images = load_images(config)
    shown = shown_images(images.test, config)
    rows, pictures = [], [shown.images]
    for likelihood in config.likelihoods:
        for beta in config.betas:
            row, picture = _one(config, images, likelihood, beta, shown.images)
            rows.append({"likelihood": likelihood, "beta": beta} | row)
            pictures.append(picture)
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        write_json(folder / "sweep.json", rows)
        save_grid(torch.stack(pictures), folder / "reconstructions.png")
        (folder / "sharpness.svg").write_text(figure(rows), encoding="utf-8")
    accelerator.wait_for_everyone()
    found = {
        f"vae_blur/{row['likelihood']}_{_plain(row['beta'])}_{name}": row[name]
        for row in rows
        for name in ("sharpness", "kl", "error")
    }
    if len(rows) > 2:
        found["vae_blur/rank_correlation"] = float(spearmanr(*([r[k] for r in rows] for k in ("kl", "sharpness")))[0])
    return found


def _plain(beta: float) -> str:
    """A number as part of a metric's name: 0.5 as ``0_5``."""
    return f"{beta:g}".replace(".", "_").replace("-", "m").replace("+", "")


def _one(
    config: VAEBlurConfig, images: ImageSet, likelihood: Likelihood, beta: float, shown: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Train one autoencoder, or go on training it; its measures, and its reconstructions of ``shown``."""
    import torch

    from pipelines.images.evaluation import measure
    from pipelines.images.loop import Loop, new_accelerator
    from pipelines.images.training import steps_of
    from pipelines.images.vae_method import SharpnessMethod

    mine = dataclasses.replace(
        config,
        likelihood=likelihood,
        beta=beta,
        variance=config.variance if likelihood == "gaussian" else None,
        report_to="none",
        output_dir=str(Path(config.output_dir) / CHECKPOINTS / f"{likelihood}-{beta:g}"),
    )
    accelerator = new_accelerator(mine)
    torch.manual_seed(config.seed)
    method = SharpnessMethod(mine, images)
    Loop(method, images.train, images.test, mine, accelerator, steps_of(mine, len(images.train))).run()
    found = measure(method, images.test.to(accelerator.device), mine, accelerator)
    means = {name: float(values.mean()) for name, values in found.items()}
    row = {"sharpness": means["sharpness"] / means["own_sharpness"], "kl": means["kl"], "error": means["error"]}
    network = method.parts["vae"]
    with torch.no_grad():
        return row, network.expected(network.encode(shown.to(accelerator.device))[0]).cpu()


def figure(rows: list[dict]) -> str:
    """Sharpness against β (above) and against the nats that z carries (below), a colour for each likelihood, as SVG."""
    from pipelines.reporting.plots import svg
    from pipelines.reporting.sections.vae_blur import ALT, drawing

    return svg(drawing(rows), "vae-blur", ALT, standalone=True)
