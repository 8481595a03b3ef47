"""Bit-flip diffusion of so few pixels that everything is a sum over all images."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pipelines.images.bitflip_bound import stage_divergence
from pipelines.images.bitflip_math import prior_kl
from pipelines.images.bitflip_scheduler import BitFlipScheduler


def all_images(pixels: int) -> Tensor:
    """(2^m, m), ±1, float64."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=pixels)), dtype=torch.float64)


def single_stage(pixels: int, delta: float) -> Tensor:
    """(2^m, 2^m): probability of each image after one stage, from each image: δ for a flip, 1 − δ for none."""
    images = all_images(pixels)
    flips = (images[:, None] != images[None]).sum(-1).double()
    return delta**flips * (1 - delta) ** (pixels - flips)


def marginals(pixels: int, deltas: Tensor) -> list[Tensor]:
    """P(Y_t | Y_0) for t = 0 … T, stage by stage."""
    found = [torch.eye(2**pixels, dtype=torch.float64)]
    for delta in deltas:
        found.append(found[-1] @ single_stage(pixels, float(delta)))
    return found


def exact_logits(data: Tensor, deltas: Tensor, of_stage: int | None = None) -> list[Tensor]:
    """Log-odds of each pixel given all of Y_t, by Bayes from the data's distribution.

    Args:
        data: (2^m,), probabilities of the images.
        deltas: of the stages.
        of_stage: 0 for pixels of the image; None for those of the stage before.

    Returns:
        For t = 1 … T, (2^m, m): a row for each Y_t.
    """
    pixels = len(data).bit_length() - 1
    images, forward, found = all_images(pixels), marginals(pixels, deltas), []
    for t in range(1, len(deltas) + 1):
        before = t - 1 if of_stage is None else of_stage
        step = torch.eye(len(data), dtype=torch.float64)
        for delta in deltas[before:t]:
            step = step @ single_stage(pixels, float(delta))
        joint = (data @ forward[before])[:, None] * step  # of Y_before and Y_t
        given = joint / joint.sum(0)
        found.append(torch.logit(given.T @ (images > 0).double()))
    return found


def exact_bound(scheduler: BitFlipScheduler, outputs: list[Tensor]) -> Tensor:
    """(2^m,): the bound of each image, its expectations as sums over all Y_t.

    Args:
        scheduler: of the noise.
        outputs: for t = 1 … T, (2^m, m): the network's output for each Y_t.
    """
    pixels = outputs[0].shape[1]
    images, forward = all_images(pixels), marginals(pixels, scheduler.deltas)
    bound = prior_kl(pixels, scheduler.keeps[-1]).expand(len(images)).clone()
    count = len(images)
    noisy, original = images.repeat(count, 1), images.repeat_interleave(count, 0)
    for t, output in enumerate(outputs, 1):
        each = stage_divergence(scheduler, output.repeat(count, 1), noisy, original, t)
        bound += (forward[t] * each.reshape(count, count)).sum(1)
    return bound


def stage_probability(scheduler: BitFlipScheduler, output: Tensor, t: int, before: int) -> Tensor:
    """(2^m, m): P(pixel = +1 at stage ``before`` | Y_t) that the model says, by the definition of the mixture."""
    images = all_images(output.shape[1])
    said = torch.sigmoid(scheduler.logits(output, images, t))
    if scheduler.config.prediction_type == "previous":
        assert before == t - 1
        return said
    ones = torch.ones_like(images)
    posterior = [scheduler.posterior(images, sign * ones, t, before) for sign in (1, -1)]
    return said * posterior[0] + (1 - said) * posterior[1]


def reverse_chain(scheduler: BitFlipScheduler, outputs: list[Tensor], stages: list[int] | None = None) -> Tensor:
    """(2^m,): the probability with which sampling from fair coins ends at each image.

    Args:
        scheduler: of the noise.
        outputs: for t = 1 … T, the network's output for each Y_t.
        stages: those that are stepped from; None for T … 1.
    """
    images = all_images(outputs[0].shape[1])
    chosen = list(range(len(outputs), 0, -1)) if stages is None else stages
    probability = torch.full((len(images),), 1 / len(images), dtype=torch.float64)
    for t, before in zip(chosen, [*chosen[1:], 0], strict=True):
        plus = stage_probability(scheduler, outputs[t - 1], t, before)
        step = torch.where(images[None] > 0, plus[:, None], 1 - plus[:, None]).prod(-1)
        probability = probability @ step
    return probability
