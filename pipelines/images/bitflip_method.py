"""Bit-flip diffusion as a method of the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.images.bitflip_bound import stage_divergence, variational_bound
from pipelines.images.bitflip_pipeline import BitFlipPipeline, network_output
from pipelines.images.bitflip_scheduler import BitFlipScheduler
from pipelines.images.training import adam
from pipelines.images.unet import new_unet, spread_timesteps, strip

if TYPE_CHECKING:
    from pipelines.images.bitflip import BitFlipConfig
    from pipelines.images.data import ImageSet
    from pipelines.images.method import Batch, Draws

_TOGETHER = 500  # images that are sampled at once


class BitFlipMethod:
    """One network, one optimizer (see ``pipelines.images.method.Method``).

    Args:
        config: the stage's configuration.
        images: what it is trained on; its shape decides the network's.
    """

    name = "bitflip"
    phases = ("unet",)
    averaged = ("unet",)
    estimated = ("bound",)

    def __init__(self, config: BitFlipConfig, images: ImageSet):
        channels, side, _ = images.shape
        self.config = config
        self.parts: dict[str, nn.Module] = {"unet": new_unet(config, side, channels, config.patch_size)}
        self.scheduler = BitFlipScheduler(
            num_train_timesteps=config.timesteps,
            delta_schedule=config.delta_schedule,
            delta_start=config.delta_start,
            delta_end=config.delta_end,
            prediction_type=config.prediction,
            add_evidence=config.add_evidence,
        )

    def _predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return network_output(self.parts["unet"], noisy, timesteps, self.config.patch_size)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See ``Method.optimizers``."""
        return {"unet": adam(self.parts["unet"].parameters(), self.config)}

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Method.loss``: nats a pixel. Logged, in nats an image: the bound and the cross-entropy of Y_0."""
        original = batch.images * 2 - 1
        timesteps = 1 + spread_timesteps(draws, self.config.timesteps)
        noisy = self.scheduler.add_noise(original, draws.uniform(*original.shape[1:]), timesteps)
        output = self._predict(noisy, timesteps).float()
        bound = self.config.timesteps * stage_divergence(self.scheduler, output, noisy, original, timesteps).mean()
        logs = {"bound": bound.detach()}
        loss = bound if self.config.loss != "cross_entropy" else 0.0
        if self.config.prediction == "original":
            logits = self.scheduler.logits(output, noisy, timesteps)
            entropy = -nn.functional.logsigmoid(logits * original).flatten(1).sum(1).mean()
            logs["cross_entropy"] = entropy.detach()
            if self.config.loss != "bound":
                loss = loss + entropy * (self.config.cross_entropy_weight if self.config.loss == "both" else 1.0)
        return loss / original[0].numel(), logs

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """See ``Method.sample``."""
        pipeline, steps = self.pipeline(), self.config.inference_steps
        sizes = [min(_TOGETHER, count - start) for start in range(0, count, _TOGETHER)]
        return torch.cat([pipeline(size, generator, steps, output_type="pt").images for size in sizes])

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The bound of each image and its terms: the network in the stage's precision, the divergences in float64."""
        found = variational_bound(
            self._predict, batch.images * 2 - 1, self.scheduler, draws.uniform, self.config.bound_stages
        )
        pixels = batch.images[0].numel()
        return {"bound": found.total, "bits_per_pixel": found.total / (pixels * math.log(2)), **found._asdict()}

    def pictures(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Some samples on their way, each above what the network expects of the image meanwhile."""
        steps = self.config.inference_steps or self.config.timesteps

        def stages(count: int) -> Iterator[tuple[Tensor, Tensor]]:
            found = self.pipeline().denoise(count, generator, steps)
            return ((stage.prev_sample, stage.pred_original_sample) for stage in found)

        yield "denoising", strip(stages, steps)

    def pipeline(self) -> BitFlipPipeline:
        """See ``Method.pipeline``."""
        pipeline = BitFlipPipeline(self.parts["unet"], self.scheduler, self.config.patch_size)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
