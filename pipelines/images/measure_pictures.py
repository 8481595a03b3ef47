"""Drawing from pipelines of any family, at once or step by step, and the steps as an animated PNG."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from torch import Tensor

from pipelines.images.bitflip_pipeline import BitFlipPipeline
from pipelines.images.ddpm_pipeline import ClassConditionalDDPMPipeline
from pipelines.images.ddpm_sampling import denoise, with_sampler
from pipelines.images.pictures import grid

IN_STEPS = (BitFlipPipeline, DDPMPipeline, ClassConditionalDDPMPipeline)
"""Pipelines that draw step by step."""

SHOWN = (4, 10)  # rows and columns of samples
_FRAMES = 24
_TIME, _REST = 90, 2500  # milliseconds that a frame stands, and the last one
_LEVELS = 16  # of grey: noise in 256 levels can hardly be compressed


def way_of(
    pipeline: DiffusionPipeline, settings: Mapping[str, Any], count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """What a diffusion draws, step by step.

    Args:
        pipeline: a bit-flip diffusion's or a DDPM's.
        settings: of the stage that made it: how it samples. Without any, in all the steps it was trained with.
        count: how many samples; of a conditional model the classes in turn.
        generator: of the noise.

    Yields:
        (count, C, H, W) in about [0, 1], the last ones the samples.
    """
    steps = settings.get("inference_steps")
    if isinstance(pipeline, BitFlipPipeline):
        for found in pipeline.denoise(count, generator, steps):
            yield (found.prev_sample.float() + 1) / 2
        return
    unet, scheduler = pipeline.unet, with_sampler(pipeline.scheduler, settings.get("sampler", "ddpm"))
    classes, labels = unet.config.num_class_embeds, None
    if classes is not None:
        labels = torch.arange(count, device=unet.device) % (classes - 1)  # the last stands for none
    guidance = {"guidance_scale": settings.get("guidance_scale", 1.0), "eta": settings.get("eta", 0.0)}
    steps = steps or scheduler.config.num_train_timesteps
    for stage in denoise(unet, scheduler, count, steps, generator, labels, **guidance):
        yield stage.sample.float() / 2 + 0.5


def draw(pipeline: DiffusionPipeline, settings: Mapping[str, Any], count: int, generator: torch.Generator) -> Tensor:
    """Samples of a pipeline of any family.

    Args:
        pipeline, settings, count, generator: see ``way_of``.

    Returns:
        (count, C, H, W) in about [0, 1]; a VAE's are the means of its pixels.
    """
    if isinstance(pipeline, IN_STEPS):
        return deque(way_of(pipeline, settings, count, generator), maxlen=1).pop()
    return pipeline(batch_size=count, generator=generator, output_type="pt").images


def save_animation(
    pipeline: DiffusionPipeline, settings: Mapping[str, Any], generator: torch.Generator, path: Path
) -> None:
    """Write the way of some samples as an animated PNG that begins anew after a rest.

    Args:
        pipeline, settings, generator: see ``way_of``.
        path: of the file.
    """
    stages = list(way_of(pipeline, settings, SHOWN[0] * SHOWN[1], generator))
    kept = torch.linspace(0, len(stages) - 1, min(_FRAMES, len(stages))).round().long().unique().tolist()
    frames = []
    for place in kept:
        levels = stages[place].clamp(0, 1).mul(_LEVELS - 1).round() / (_LEVELS - 1)
        frames.append(grid(levels.unflatten(0, SHOWN)))
    times = [_TIME] * (len(frames) - 1) + [_REST]
    temporary = path.with_name(f".{path.name}.tmp")
    frames[0].save(temporary, format="PNG", save_all=True, append_images=frames[1:], duration=times, loop=0)
    temporary.replace(path)
