"""Sampling Gaussian diffusions with diffusers' schedulers: ancestral (DDPM), DDIM, DPM-Solver; with guidance or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pipelines.images.ddpm_math import Target, guided, original_of

Sampler = Literal["ddpm", "ddim", "dpm_solver"]

PREDICTION_TYPES: dict[Target, str] = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
"""What diffusers calls the targets."""

_LEAST_LOG_SNR = -5.1
"""Half the logarithm of the signal-to-noise ratio at which DPM-Solver starts at the earliest: where there is hardly any
signal, as at the end of the cosine schedule, its steps in that very quantity are not stable (diffusers' own advice)."""


class Stage(NamedTuple):
    """What a step of sampling gives.

    Attributes:
        sample: x_t after the step, (B, C, H, W), in about [−1, 1] in the end.
        expected: the image that the network saw in x_t before the step, cut to [−1, 1].
    """

    sample: Tensor
    expected: Tensor


def with_sampler(scheduler: SchedulerMixin, sampler: Sampler) -> SchedulerMixin:
    """A scheduler of the same noise that samples in another way.

    Args:
        scheduler: of a saved pipeline.
        sampler: ``ddpm``: draws every stage (Ho et al. 2020). ``ddim``: Song et al. 2021. ``dpm_solver``: DPM-Solver++
            of second order (Lu et al. 2022), for some ten to twenty steps, spaced evenly in the logarithm of the
            signal-to-noise ratio: spaced evenly in t, the last of so few would smooth half of the detail away.
    """
    if sampler == "ddpm":
        return DDPMScheduler.from_config(scheduler.config)
    if sampler == "ddim":
        return DDIMScheduler.from_config(scheduler.config)
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, lambda_min_clipped=_LEAST_LOG_SNR, use_lu_lambdas=True
    )


@torch.no_grad()
def denoise(
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    count: int,
    steps: int,
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    device: torch.device | str | None = None,
) -> Iterator[Stage]:
    """The stages of sampling, one after another; the last one's ``sample`` are the images.

    With ``DDPMScheduler`` it draws what ``DDPMPipeline`` draws, with ``DDIMScheduler`` what ``DDIMPipeline`` does.

    Args:
        unet: the network; one with labels has one label more than there are classes, which stands for none.
        scheduler: any of ``with_sampler``.
        count: how many images.
        steps: how many.
        generator: of the noise.
        labels: (count,), int64, for a network with labels.
        guidance_scale: 1: the conditional model; above 1: away from the unconditional one.
        eta: ``DDIMScheduler``: 0 draws nothing on the way, 1 as much as ``ddpm``.
        device: None for the network's.
    """
    device = unet.device if device is None else device
    side, channels = unet.config.sample_size, unet.config.in_channels
    sample = randn_tensor((count, channels, side, side), generator=generator, device=device, dtype=unet.dtype)
    further = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    target = {name: target for target, name in PREDICTION_TYPES.items()}[scheduler.config.prediction_type]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = network_output(unet, sample, t, labels, guidance_scale)
        alpha_bar = scheduler.alphas_cumprod[t].to(device)
        expected = original_of(target, output, sample, alpha_bar).clamp(-1, 1)
        sample = scheduler.step(output, t, sample, generator=generator, **further).prev_sample
        yield Stage(sample, expected)


def network_output(
    unet: UNet2DModel, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float = 1.0
) -> Tensor:
    """What the network says of x_t, in the type of ``sample``; with guidance it looks twice at each image."""
    if labels is None:
        return unet(sample, timestep).sample.to(sample.dtype)
    if guidance_scale == 1:
        return unet(sample, timestep, class_labels=labels).sample.to(sample.dtype)
    none = torch.full_like(labels, unet.config.num_class_embeds - 1)
    both = unet(torch.cat([sample, sample]), timestep, class_labels=torch.cat([labels, none])).sample
    return guided(*both.to(sample.dtype).chunk(2), guidance_scale)
