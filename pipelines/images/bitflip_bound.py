"""The variational bound of bit-flip diffusion: at least the negative log-likelihood of an image, in nats."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.images.bitflip_math import prior_kl, stage_kl
from pipelines.images.bitflip_scheduler import BitFlipScheduler


class Bound(NamedTuple):
    """Terms of the bound, each (B,), float64, in nats an image; the bound is their sum.

    Attributes:
        prior_kl: KL(P(Y_T | Y_0) ‖ fair coins).
        transitions: Σ_{t=2..T} KL(P(Y_{t−1} | Y_t, Y_0) ‖ Q_t(Y_t)).
        reconstruction: −log Q_1(Y_0), the term of t = 1.
    """

    prior_kl: Tensor
    transitions: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """(B,), nats an image."""
        return self.prior_kl + self.transitions + self.reconstruction


def stage_divergence(
    scheduler: BitFlipScheduler, model_output: Tensor, noisy: Tensor, original: Tensor, timesteps: int | Tensor
) -> Tensor:
    """KL(P(Y_{t−1} | Y_t, Y_0) ‖ Q_t(Y_t)) of each image, summed over its pixels; at t = 1 it is −log Q_1(Y_0).

    Args:
        scheduler: of the noise.
        model_output: of the network for ``noisy``, (B, …).
        noisy: Y_t, ±1.
        original: Y_0, ±1.
        timesteps: t, (B,) or one for all.

    Returns:
        (B,), nats; float64 where ``model_output`` is, else float32.
    """
    logits = scheduler.logits(model_output, noisy, timesteps)
    stage = scheduler.stage_posterior(timesteps, logits)
    divergence = stage_kl(logits, noisy, original, stage, scheduler.config.prediction_type)
    return divergence.flatten(1).sum(1)


@torch.no_grad()
def variational_bound(
    predict: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    scheduler: BitFlipScheduler,
    uniform: Callable[..., Tensor],
    stages: int | None = None,
) -> Bound:
    """An unbiased estimate of the bound on −log p(x) of each image, one draw of Y_t a stage.

    The term of t = 1 is always there. Of those of t = 2 … T, all are summed, or ``stages`` of them, one drawn from each
    of as many equal parts of 2 … T, and weighted up. The estimates of different images are independent given the
    images. One estimate does not show its own variance (a part has but one draw, and parts differ); two do, see
    ``evaluation.monte_carlo_errors``.

    Args:
        predict: (Y_t, t) -> the network's output, for t of shape (B,).
        images: Y_0, ±1, (B, C, H, W).
        scheduler: of the noise.
        uniform: shape -> (B, *shape) on [0, 1), as ``Draws.uniform``.
        stages: how many stages to draw; None for all.
    """

    def divergence(t: Tensor) -> Tensor:
        noisy = scheduler.add_noise(images, uniform(*images.shape[1:]), t)
        return stage_divergence(scheduler, predict(noisy, t).double(), noisy, images, t)

    count = len(images)
    reconstruction = divergence(torch.ones(count, dtype=torch.long, device=images.device))
    total, others = torch.zeros_like(reconstruction), len(scheduler) - 1
    parts = others if stages is None else min(stages, others)
    for part in range(parts):
        place = (part + uniform().double()) * others / parts
        total += divergence(2 + place.long().clamp(max=others - 1)) * others / parts
    prior = prior_kl(images[0].numel(), scheduler.keeps[-1]).to(images.device).expand(count)
    return Bound(prior, total, reconstruction)
