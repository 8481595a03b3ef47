"""The mathematics of the variational autoencoder as pure functions, every quantity in nats an image.

Kingma and Welling (2014), "Auto-Encoding Variational Bayes"; Burda, Grosse and Salakhutdinov (2016), "Importance
Weighted Autoencoders"; Higgins et al. (2017) for β; Kingma et al. (2016, appendix C.8) for free bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bound(NamedTuple):
    """The negative evidence lower bound and its two terms, each (B,), in nats; negative_elbo = kl + reconstruction."""

    negative_elbo: Tensor
    kl: Tensor
    reconstruction: Tensor


def sample_gaussian(m: Tensor, v: Tensor, noise: Tensor | None = None) -> Tensor:
    """m + √v·ε with ε ~ N(0, I): a reparametrized sample of N(m, diag v), differentiable in both.

    Args:
        m: means, (..., D).
        v: variances, of the shape of ``m`` (broadcast against it and ``noise``).
        noise: ε, standard normal; drawn from torch's global generator where it is None.
    """
    if noise is None:
        noise = torch.randn_like(m)
    return m + v.sqrt() * noise


def gaussian_kl(m: Tensor, v: Tensor, prior_m: Tensor | float = 0.0, prior_v: Tensor | float = 1.0) -> Tensor:
    """KL(N(m, diag v) ‖ N(prior_m, diag prior_v)) of each dimension, (..., D); the sum over D is the divergence.

    ½·[log(prior_v/v) + (v + (m − prior_m)²)/prior_v − 1]
    """
    prior_m, prior_v = (torch.as_tensor(x, dtype=m.dtype, device=m.device) for x in (prior_m, prior_v))
    return 0.5 * (prior_v.log() - v.log() + (v + (m - prior_m) ** 2) / prior_v - 1)


def gaussian_log_density(x: Tensor, m: Tensor | float, v: Tensor | float) -> Tensor:
    """log N(x; m, diag v), summed over the last dimension: (...,)."""
    m, v = (torch.as_tensor(y, dtype=x.dtype, device=x.device) for y in (m, v))
    return -0.5 * ((x - m) ** 2 / v + v.log() + math.log(2 * math.pi)).sum(-1)


def bernoulli_nll(images: Tensor, logits: Tensor) -> Tensor:
    """−Σ_pixels log Bernoulli(x; σ(logit)), by logits, so it is finite at any of them.

    Args:
        images: (..., C, H, W), values in [0, 1].
        logits: of a shape that ``images`` broadcasts to.

    Returns:
        (...,), nats.
    """
    return F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none").sum((-3, -2, -1))


def gaussian_nll(images: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """−Σ_pixels log N(x; mean, variance), one variance for all pixels: (...,), nats (of the density of grey levels)."""
    squares = (images - means) ** 2 / variance + variance.log() + math.log(2 * math.pi)
    return 0.5 * squares.sum((-3, -2, -1))


def negative_elbo_bound(reconstruction: Tensor, m: Tensor, v: Tensor, beta: float = 1.0) -> Bound:
    """E_q[−log p(x|z)] + β·KL(q(z|x) ‖ N(0, I)), an upper bound on −log p(x) for β = 1 (and above it for β > 1).

    Args:
        reconstruction: −log p(x|z) of one z ~ q(z|x) for each image, (B,): an unbiased estimate of its mean.
        m: means of q(z|x), (B, D).
        v: variances of q(z|x), (B, D).
        beta: weight of the divergence in the first member of the result; ``kl`` itself is not weighted.

    Returns:
        (negative ELBO, KL, reconstruction), each (B,).
    """
    kl = gaussian_kl(m, v).sum(-1)
    return Bound(reconstruction + beta * kl, kl, reconstruction)


def free_bits_kl(m: Tensor, v: Tensor, free: float) -> Tensor:
    """Σ_d max(λ, KL_d): each latent dimension may carry λ nats of an image for nothing. (B,)

    The maximum is taken for each image rather than for the mean of a minibatch, so that the loss stays a mean over
    images however a batch is cut.
    """
    return gaussian_kl(m, v).clamp_min(free).sum(-1)


def log_weights(reconstruction: Tensor, z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log w = log p(x|z) + log p(z) − log q(z|x) of samples z ~ q(z|x).

    Args:
        reconstruction: −log p(x|z), (k, B).
        z: samples, (k, B, D).
        m: means of q(z|x), (B, D).
        v: variances of q(z|x), (B, D).

    Returns:
        (k, B).
    """
    return gaussian_log_density(z, 0.0, 1.0) - gaussian_log_density(z, m, v) - reconstruction


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """−log (1/k)·Σ_i w_i: in expectation above −log p(x), and nearer to it the larger k is (Burda et al. 2016, eq. 8).

    Args:
        log_w: log importance weights, (k, B).

    Returns:
        (B,), nats. For k = 1 a (noisier) estimate of the negative ELBO.
    """
    return math.log(len(log_w)) - torch.logsumexp(log_w, dim=0)


def sharpness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, (...,): blur lowers it, a uniform picture has none.

    Args:
        images: (..., C, H, W).
    """
    down, right = images.diff(dim=-2), images.diff(dim=-1)
    return (down**2).mean((-3, -2, -1)) + (right**2).mean((-3, -2, -1))
