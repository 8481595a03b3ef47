"""Samples on their way out of the noise, as an animated PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.images.pictures import grid

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHOWN = (4, 10)  # rows and columns of samples
_FRAMES = 24
_TIME, _REST = 90, 2500  # milliseconds that a frame stands, and the last one
_LEVELS = 16  # of grey: noise in 256 levels can hardly be compressed


def way_of(
    pipeline: DiffusionPipeline, settings: Mapping[str, Any], count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """What a diffusion draws, step by step; nothing of models that draw at once.

    Args:
        pipeline: of any family.
        settings: of the stage that made it; its ``inference_steps`` are used.
        count: how many samples.
        generator: of the noise.

    Yields:
        (count, C, H, W) in about [0, 1], the last ones the samples.
    """
    if hasattr(pipeline, "denoise"):
        for found in pipeline.denoise(count, generator, settings.get("inference_steps")):
            yield (found.prev_sample.float() + 1) / 2


def save_animation(
    pipeline: DiffusionPipeline, settings: Mapping[str, Any], generator: torch.Generator, path: Path
) -> None:
    """Write the way of some samples as an animated PNG that begins anew after a rest; no file where there is no way.

    Args:
        pipeline, settings, generator: see ``way_of``.
        path: of the file.
    """
    stages = list(way_of(pipeline, settings, SHOWN[0] * SHOWN[1], generator))
    if not stages:
        return
    kept = torch.linspace(0, len(stages) - 1, min(_FRAMES, len(stages))).round().long().unique().tolist()
    frames = []
    for place in kept:
        levels = stages[place].clamp(0, 1).mul(_LEVELS - 1).round() / (_LEVELS - 1)
        frames.append(grid(levels.unflatten(0, SHOWN)))
    times = [_TIME] * (len(frames) - 1) + [_REST]
    temporary = path.with_name(f".{path.name}.tmp")
    frames[0].save(temporary, format="PNG", save_all=True, append_images=frames[1:], duration=times, loop=0)
    temporary.replace(path)
