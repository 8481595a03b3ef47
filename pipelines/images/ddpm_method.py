"""Denoising diffusion as a method of the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.images.ddpm_math import marginal, target_of
from pipelines.images.ddpm_pipeline import ClassConditionalDDPMPipeline
from pipelines.images.ddpm_sampling import PREDICTION_TYPES, Stage, denoise, network_output, with_sampler
from pipelines.images.training import adam
from pipelines.images.unet import new_unet, spread_timesteps, strip

if TYPE_CHECKING:
    from pipelines.images.data import ImageSet
    from pipelines.images.ddpm import DDPMConfig
    from pipelines.images.method import Batch, Draws

_TOGETHER = 500  # images that are sampled at once
_MEASURED_STAGES = 8  # of each held-out image


def new_scheduler(config: DDPMConfig) -> DDPMScheduler:
    """The noise of a configuration; fewer stages are so much larger that as little is left of the image in the end."""
    larger = 1000 / config.timesteps
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=min(1e-4 * larger, 0.5),
        beta_end=min(0.02 * larger, 0.999),
        beta_schedule="linear" if config.beta_schedule == "linear" else "squaredcos_cap_v2",
        prediction_type=PREDICTION_TYPES[config.target],
        # With few steps the first of them is still from noise alone.
        timestep_spacing="trailing",
    )


class DDPMMethod:
    """One network, one optimizer (see ``pipelines.images.method.Method``).

    Args:
        config: the stage's configuration.
        images: what it is trained on; its shape decides the network's.

    Raises:
        UserError: the network cannot halve the images' side; there are no labels, and they are to be used.
    """

    name = "ddpm"
    phases = ("unet",)
    averaged = ("unet",)
    estimated = ()

    def __init__(self, config: DDPMConfig, images: ImageSet):
        channels, side, _ = images.shape
        self.config, self.classes = config, len(images.classes)
        if config.class_conditional and self.classes < 2:
            problem, mend = "the images have no labels", "leave class_conditional out, or give images with labels"
            raise UserError("class_conditional", True, problem, mend)
        labels = self.classes + 1 if config.class_conditional else None
        self.parts: dict[str, nn.Module] = {"unet": new_unet(config, side, channels, classes=labels)}
        self.scheduler = new_scheduler(config)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See ``Method.optimizers``."""
        return {"unet": adam(self.parts["unet"].parameters(), self.config)}

    def _errors(self, batch: Batch, noise: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """(B,): mean squared error a pixel of what the network says of x_t."""
        original = batch.images * 2 - 1
        alpha_bar = self.scheduler.alphas_cumprod.to(original.device)[timesteps].reshape(-1, 1, 1, 1)
        mean, variance = marginal(original, alpha_bar)
        output = network_output(self.parts["unet"], mean + variance.sqrt() * noise, timesteps, labels)
        wanted = target_of(self.config.target, original, noise, alpha_bar)
        return (output - wanted).square().flatten(1).mean(1)

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Method.loss``: L_simple of Ho et al. 2020, equation 14."""
        timesteps = spread_timesteps(draws, self.config.timesteps)
        noise, labels = draws.normal(*batch.images.shape[1:]), None
        if self.config.class_conditional:
            labels = torch.where(draws.uniform() < self.config.label_dropout, self.classes, batch.labels)
        return self._errors(batch, noise, timesteps, labels).mean(), {}

    def _denoise(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Iterator[Stage]:
        config, unet = self.config, self.parts["unet"]
        if config.class_conditional and labels is None:
            labels = torch.arange(count, device=unet.device) % self.classes
        return denoise(
            unet,
            with_sampler(self.scheduler, config.sampler),
            count,
            config.inference_steps,
            generator,
            labels if config.class_conditional else None,
            config.guidance_scale,
            config.eta,
        )

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """See ``Method.sample``."""
        found = []
        for start in range(0, count, _TOGETHER):
            size = min(_TOGETHER, count - start)
            wanted = None if labels is None else labels[start : start + size]
            for stage in self._denoise(size, generator, wanted):
                images = stage.sample
            found.append((images / 2 + 0.5).clamp(0, 1))
        return torch.cat(found)

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """``denoising_error`` of each image: over stages drawn one from each of several equal parts of them all."""
        labels = batch.labels if self.config.class_conditional else None
        parts = min(_MEASURED_STAGES, self.config.timesteps)
        total = torch.zeros(len(batch), device=batch.images.device)
        for part in range(parts):
            place = ((part + draws.uniform()) * self.config.timesteps / parts).long()
            noise = draws.normal(*batch.images.shape[1:])
            total += self._errors(batch, noise, place.clamp(max=self.config.timesteps - 1), labels)
        return {"denoising_error": total / parts}

    def pictures(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Some samples on their way, each above the image that the network sees in it."""
        yield "denoising", strip(lambda count: self._denoise(count, generator), self.config.inference_steps)

    def pipeline(self) -> DiffusionPipeline:
        """See ``Method.pipeline``."""
        cls = ClassConditionalDDPMPipeline if self.config.class_conditional else DDPMPipeline
        pipeline = cls(self.parts["unet"], self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
