"""What a latent variable carries of its image, over a set of N images: information, mixtures and best decoders.

With q(z|x_n) = N(m_n, diag v_n) and the N images equally probable, everything about z is a sum over n: the aggregate
q(z) = (1/N) Σ_n q(z|x_n), the posterior q(n|z), and from them

    E_n KL(q(z|x_n) ‖ p(z)) = I(n; z) + KL(q(z) ‖ p(z))         (Hoffman and Johnson 2016, "ELBO surgery", equation 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.images.vae_math import sample_gaussian


class Carried(NamedTuple):
    """Monte Carlo estimates over z ~ q(z); nats.

    Attributes:
        information: I(n; z), which of the images it was; at most log N.
        mismatch: KL(q(z) ‖ N(0, I)), what the prior does not know of the aggregate.
        behind: e^{E H(n|z)}: how many images stand behind a z, as a geometric mean.
    """

    information: float
    mismatch: float
    behind: float


def index_log_posterior(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log q(n|z), by Bayes with equally probable images.

    Args:
        z: (B, D).
        m: means of q(z|x_n), (N, D).
        v: variances, (N, D).

    Returns:
        (B, N) float64; e to them sums to 1 in each row.
    """
    return torch.log_softmax(_log_densities(z, m, v), dim=1)


def _log_densities(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(z_b; m_n, v_n), (B, N) float64."""
    z, m, v = z.double(), m.double(), v.double()
    # Σ_d (z − m)²/v, multiplied out: two matrix products in place of a tensor (B, N, D).
    squares = (z**2) @ (1 / v).T - 2 * z @ (m / v).T + (m**2 / v).sum(1)
    return -0.5 * (squares + v.log().sum(1) + z.shape[1] * math.log(2 * math.pi))


def carried(m: Tensor, v: Tensor, noise: Tensor) -> Carried:
    """What z carries of which image it came from.

    Args:
        m: means of q(z|x_n), (N, D).
        v: variances, (N, D).
        noise: standard normal, (N, D): one z for each image, so that each is drawn equally often.
    """
    z = sample_gaussian(m, v, noise)
    densities = _log_densities(z, m, v)
    count = len(m)
    aggregate = torch.logsumexp(densities, dim=1) - math.log(count)
    posterior = torch.log_softmax(densities, dim=1)
    entropy = -(posterior.exp() * posterior).sum(1).mean()
    prior = -0.5 * (z.double() ** 2 + math.log(2 * math.pi)).sum(1)
    information = (densities.diagonal() - aggregate).mean()
    return Carried(float(information), float((aggregate - prior).mean()), float(entropy.exp()))


def best_decoder(z: Tensor, m: Tensor, v: Tensor, images: Tensor) -> Tensor:
    """Σ_n q(n|z) x_n: what a decoder without limits would answer, the mean of the images that may stand behind z.

    It minimizes the expected cross-entropy of Bernoulli pixels, and the squared error, over all functions of z.

    Args:
        z: (B, D).
        m: means of q(z|x_n), (N, D).
        v: variances, (N, D).
        images: x_n, (N, C, H, W).

    Returns:
        (B, C, H, W) float64.
    """
    weight = index_log_posterior(z, m, v).exp()
    return (weight @ images.double().flatten(1)).view(len(z), *images.shape[1:])
