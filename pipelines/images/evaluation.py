"""What a method says of held-out images, and how far other draws would move it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.images.method import Draws
from pipelines.images.seeds import TEST_NOISE, TEST_NOISE_AGAIN, TEST_PIXELS, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.images.data import Images
    from pipelines.images.method import Method
    from pipelines.images.training import ImageTrainingConfig

_TWICE = 1000  # images that are measured twice, at least and where there are so many


@torch.no_grad()
def measure(
    method: Method,
    images: Images,
    config: ImageTrainingConfig,
    accelerator: Accelerator,
    noise: int = TEST_NOISE,
    every: int = 1,
) -> dict[str, np.ndarray]:
    """What ``method.evaluate`` says of each image, the work shared out over the processes.

    Pixels and noise of an image are functions of the seed, its place and ``eval_batch_size``, not of the processes.

    Args:
        method: its parts in evaluation mode.
        images: on the accelerator's device.
        config: binarization, ``eval_batch_size``, precision.
        accelerator: of the stage.
        noise: key of the noise (see ``seeds``); another one gives other noise to the same pixels.
        every: measure each so-many-th block of ``eval_batch_size`` images only.

    Returns:
        measure -> (N,), float64, NaN where it was not measured. Empty where the method has no such measures.
    """
    size, found = config.eval_batch_size, {}
    world, rank = accelerator.num_processes, accelerator.process_index
    starts = range(0, len(images), size)
    blocks = list(range(len(starts)))[::every]
    # A process without a block of its own still has to know the measures' names: it does the first once more.
    mine = blocks[rank::world]
    for number in mine or blocks[:1]:
        rows = slice(starts[number], min(starts[number] + size, len(images)))
        pixels, draws = (
            Draws(seeded(config.seed, key, number, device=accelerator.device), rows.stop - rows.start)
            for key in (TEST_PIXELS, noise)
        )
        with accelerator.autocast():
            values = method.evaluate(images.batch(rows, pixels, config), draws)
        for name, value in values.items():
            whole = found.setdefault(name, torch.zeros(len(images), dtype=torch.float64, device=accelerator.device))
            if mine:
                whole[rows] = value.double()
    if world > 1:
        found = {name: accelerator.reduce(values, "sum") for name, values in found.items()}
    measured = np.isin(np.arange(len(images)) // size, blocks)
    return {name: np.where(measured, values.cpu().numpy(), np.nan) for name, values in found.items()}


def monte_carlo_errors(
    method: Method,
    images: Images,
    config: ImageTrainingConfig,
    accelerator: Accelerator,
    found: dict[str, np.ndarray],
) -> dict[str, float]:
    """Standard errors of means over these very images that come from the draws alone, not from which images they are.

    Some images are measured again with the same pixels and other draws. Half the squared difference of two independent
    estimates of one image has the variance of either as its expectation, whatever an estimate is put together from: one
    drawn stage or many, strata, terms that are always there. A tenth of a large set does, and all of a small one.

    Args:
        method: its parts in evaluation mode.
        images: on the accelerator's device.
        config: as for ``measure``.
        accelerator: of the stage.
        found: what ``measure`` gave for these images.

    Returns:
        measure -> error of its mean, for each of ``method.estimated``.
    """
    if not method.estimated:
        return {}
    every = min(10, max(1, len(images) // _TWICE))
    again = measure(method, images, config, accelerator, TEST_NOISE_AGAIN, every)
    variances = {name: np.nanmean((found[name] - again[name]) ** 2) / 2 for name in method.estimated}
    return {name: float((variance / len(images)) ** 0.5) for name, variance in variances.items()}
