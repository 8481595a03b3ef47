"""The mathematics of bit-flip diffusion, as pure functions.

An image is x ∈ {−1, +1}^m. At stage t every pixel flips with probability δ_t, which is the same as: with probability
2δ_t it is replaced by a fresh fair coin. So a pixel is untouched after t stages with probability ρ_t = Π_{s≤t}(1−2δ_s),
its *keep probability*, and else a fair coin, whatever happened in between:

    P(Y_t = y | Y_0 = x) = (1 + ρ_t x y) / 2.

ρ is also the correlation of the two pixels, and multiplies along the chain: from stage s to stage t it is ρ_t / ρ_s.

Source: Sohl-Dickstein et al. 2015, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", section 2 and
appendix B.2 (binomial diffusion); the bound and the prediction of Y_0 with mixed posteriors as in Austin et al. 2021,
"Structured Denoising Diffusion Models in Discrete State-Spaces", equations 1, 4 and 5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

DeltaSchedule = Literal["cosine", "linear", "constant"]
Prediction = Literal["original", "previous"]

LAST_COSINE_DELTA = 0.4995
"""δ_T of the cosine schedule, in place of the ½ that cos(π/2) asks for: that would leave nothing of the image behind,
and nothing to learn at the last stage."""

FINAL_KEEP = 0.01
"""Keep probability after the last stage of the constant and the linear schedule, where no δ is given."""


def flip_probabilities(
    schedule: DeltaSchedule, stages: int, start: float | None = None, end: float | None = None
) -> Tensor:
    """The flip probabilities δ_1 … δ_T of a schedule.

    Args:
        schedule: ``constant``: δ_t = ``start``. ``linear``: from ``start`` to ``end``. ``cosine``: such that the keep
            probability is ρ_t = cos(π t / 2T).
        stages: T, at least 1.
        start: δ_1 of ``constant`` and ``linear``; None for what leaves ρ_T = 0.01 (``linear``: δ_t ∝ t).
        end: δ_T of ``linear``; given and left out together with ``start``.

    Returns:
        ``[T]``, float64, each in (0, ½).

    Raises:
        ValueError: T below 1, a δ outside (0, ½), or one that the schedule does not take. A δ that is taken is taken as
            it is given.
    """
    if stages < 1:
        raise ValueError(f"a chain needs at least one stage, not {stages}")
    for delta in (start, end):
        if delta is not None and not 0 < delta < 0.5:
            raise ValueError(f"a flip probability lies in (0, 1/2), not at {delta}")
    steps = torch.arange(1, stages + 1, dtype=torch.float64)
    if schedule == "cosine":
        if start is not None or end is not None:
            raise ValueError("the cosine schedule takes no flip probabilities")
        keep = torch.cos(math.pi / 2 * torch.arange(stages + 1, dtype=torch.float64) / stages)
        deltas = (1 - keep[1:] / keep[:-1]) / 2
        deltas[-1] = LAST_COSINE_DELTA
    elif schedule == "constant":
        if end is not None:
            raise ValueError("the constant schedule takes one flip probability")
        deltas = torch.full_like(steps, (1 - FINAL_KEEP ** (1 / stages)) / 2 if start is None else start)
    elif schedule == "linear":
        if (start is None) != (end is None):
            raise ValueError("the linear schedule takes both flip probabilities or none")
        deltas = _ramp(steps) if start is None else torch.linspace(start, end, stages, dtype=torch.float64)
    else:
        raise ValueError(f"no schedule is called {schedule!r}")
    return deltas


def _ramp(steps: Tensor) -> Tensor:
    """δ_t = c t with c such that ρ_T = ``FINAL_KEEP``, by bisection: ρ_T falls as c rises."""
    low, high = 0.0, 0.5 / len(steps)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.prod(1 - 2 * middle * steps) > FINAL_KEEP else (low, middle)
    return high * steps


def keep_probabilities(deltas: Tensor) -> Tensor:
    """ρ_0 = 1, ρ_1, …, ρ_T from δ_1 … δ_T, float64: ``[T]`` -> ``[T + 1]``.

    Raises:
        ValueError: ρ_T is too small for a number: what is computed from ratios of ρ would not be one either.
    """
    keeps = torch.cat([deltas.new_ones(1), torch.cumprod(1 - 2 * deltas, 0)])
    if keeps[-1] < torch.finfo(keeps.dtype).tiny:
        stage = int((keeps < torch.finfo(keeps.dtype).tiny).nonzero()[0])
        raise ValueError(f"with these flip probabilities nothing is left of the image from stage {stage} on")
    return keeps


def corrupt(images: Tensor, keep: Tensor, uniform: Tensor) -> Tensor:
    """Y_t from Y_0, without the stages between: the two coins of a pixel (keep it? which side?) in one draw.

    Args:
        images: ±1, any shape.
        keep: ρ_t, broadcast against ``images``.
        uniform: a draw from [0, 1) a pixel.

    Returns:
        ±1, of the shape and type of ``images``.
    """
    return torch.where(uniform < (1 - keep) / 2, -images, images)


def posterior_probability(noisy: Tensor, original: Tensor, keep_before: Tensor, keep_now: Tensor) -> Tensor:
    """P(Y_s = +1 | Y_t, Y_0) for a stage s before t, by Bayes.

    Args:
        noisy: Y_t, ±1.
        original: Y_0, ±1.
        keep_before: ρ_s, broadcast against the images.
        keep_now: ρ_t, likewise.

    Returns:
        Of the images' shape; at s = 0 it is 1 where Y_0 = +1 and 0 where Y_0 = −1.
    """
    return (1 + keep_now / keep_before * noisy) * (1 + keep_before * original) / (2 * (1 + keep_now * noisy * original))


class StagePosterior(NamedTuple):
    """Probabilities that a pixel at stage s is as it is at stage t, given whether Y_t is as Y_0.

    All that the posterior P(Y_s | Y_t, Y_0) says depends on the pixel through Y_t·Y_0 alone, so four numbers a stage
    do. They are products, never differences of near-equal numbers, and their logarithms are exact at any noise.

    Attributes:
        stay_agreed: P(Y_s = Y_t | Y_t = Y_0).
        flip_agreed: P(Y_s ≠ Y_t | Y_t = Y_0).
        stay_differed: P(Y_s = Y_t | Y_t ≠ Y_0).
        flip_differed: P(Y_s ≠ Y_t | Y_t ≠ Y_0).
    """

    stay_agreed: Tensor
    flip_agreed: Tensor
    stay_differed: Tensor
    flip_differed: Tensor

    @classmethod
    def between(cls, keep_before: Tensor, keep_now: Tensor) -> StagePosterior:
        """From ρ_s and ρ_t, of any shape."""
        step = keep_now / keep_before
        return cls(
            (1 + step) * (1 + keep_before) / (2 * (1 + keep_now)),
            (1 - step) * (1 - keep_before) / (2 * (1 + keep_now)),
            (1 + step) * (1 - keep_before) / (2 * (1 - keep_now)),
            (1 - step) * (1 + keep_before) / (2 * (1 - keep_now)),
        )


def mixed_log_probabilities(logits: Tensor, noisy: Tensor, stage: StagePosterior) -> tuple[Tensor, Tensor]:
    """log Q(Y_s = Y_t | Y_t) and log Q(Y_s ≠ Y_t | Y_t), the two posteriors mixed by a prediction of Y_0.

    Args:
        logits: of P(Y_0 = +1 | Y_t).
        noisy: Y_t, ±1, of the logits' shape.
        stage: the posteriors from t to s, broadcast against the images.
    """
    agreed = torch.nn.functional.logsigmoid(logits * noisy)
    differed = torch.nn.functional.logsigmoid(-logits * noisy)
    stay = torch.logaddexp(agreed + stage.stay_agreed.log(), differed + stage.stay_differed.log())
    flip = torch.logaddexp(agreed + stage.flip_agreed.log(), differed + stage.flip_differed.log())
    return stay, flip


def stage_kl(logits: Tensor, noisy: Tensor, original: Tensor, stage: StagePosterior, prediction: Prediction) -> Tensor:
    """KL(P(Y_s | Y_t, Y_0) ‖ Q(Y_s | Y_t)) a pixel, in nats.

    At s = 0 the posterior is the point mass at Y_0 and this is −log Q(Y_0 | Y_t), plain cross-entropy.

    Args:
        logits: what the network says of a pixel's being +1: of Y_s under ``previous``, of Y_0 under ``original``.
        noisy: Y_t, ±1, of the logits' shape.
        original: Y_0, likewise.
        stage: the posteriors from t to s, broadcast against the images.
        prediction: which of the two the logits are.

    Returns:
        Of the logits' shape.
    """
    same = noisy == original
    stay = torch.where(same, stage.stay_agreed, stage.stay_differed)
    flip = torch.where(same, stage.flip_agreed, stage.flip_differed)
    if prediction == "original":
        log_stay, log_flip = mixed_log_probabilities(logits, noisy, stage)
    else:
        log_stay = torch.nn.functional.logsigmoid(logits * noisy)
        log_flip = torch.nn.functional.logsigmoid(-logits * noisy)
    negative_entropy = torch.xlogy(stay, stay) + torch.xlogy(flip, flip)
    # A weight of exactly 0 meets a logarithm of −∞ where the posterior is a point mass.
    return negative_entropy - _weighted(stay, log_stay) - _weighted(flip, log_flip)


def _weighted(weight: Tensor, log_probability: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * log_probability.masked_fill(weight == 0, 0.0))


def prior_kl(pixels: int, keep: Tensor) -> Tensor:
    """KL(P(Y_T | Y_0) ‖ fair coins) of an image of so many pixels, in nats: the same for every image."""
    half = torch.stack([1 + keep, 1 - keep]).double() / 2
    return pixels * (torch.xlogy(half, half).sum(0) + math.log(2))


def original_logits(logits: Tensor, noisy: Tensor, stage: StagePosterior) -> Tensor:
    """Logits of Y_0 from those of Y_s: the mixture of the two posteriors solved for its weight.

    A network that predicts the next earlier stage says by that what Y_0 is, and so can take larger steps too.
    Where it lies outside what any Y_0 could give, the nearest is taken.

    Args:
        logits: of P(Y_s = +1 | Y_t).
        noisy: Y_t, ±1.
        stage: the posteriors from t to s.

    Returns:
        Logits of P(Y_0 = +1 | Y_t); ±∞ at the ends.
    """
    stay = torch.sigmoid(logits * noisy)
    agreed = (stay - stage.stay_differed) / (stage.stay_agreed - stage.stay_differed)
    return torch.logit(agreed.clamp(0, 1)) * noisy
