"""How near generated images are to real ones: measures on features, class probabilities and pixels. All are pure.

Features come from a classifier trained on the very data set (``pipelines.images.classifier``). A Fréchet distance in
them has the form of the FID but is not one: the FID is defined by the Inception network, and the two do not compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_CHUNK = 2048  # rows of a distance matrix that are held at a time


def mean_and_covariance(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased covariance of feature vectors, in float64.

    Args:
        features: (n, d), n ≥ 2.

    Returns:
        (d,) and (d, d).

    Raises:
        ValueError: fewer than two vectors, which have no covariance.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs at least two feature vectors, not an array of shape {features.shape}")
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of features.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½), Dowson and Landau 1982; Heusel et al. 2017, equation 6. Where
    there are fewer vectors than dimensions the covariances are singular, which this form bears: only the eigenvalues of
    symmetric positive semi-definite matrices are taken. It is biased upwards by O(1/n), so compare equal sizes only.

    Args:
        a: (n, d) features.
        b: (m, d) features.

    Returns:
        A number ≥ 0, in squared units of the features.

    Raises:
        ValueError: from ``mean_and_covariance``.
    """
    (mean_a, cov_a), (mean_b, cov_b) = mean_and_covariance(a), mean_and_covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances between rows, (n, m). Exact differences, not ‖a‖² + ‖b‖² − 2ab, which loses small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, *, rank: int = 1) -> torch.Tensor:
    """Distance of each query to its nearest reference, or to its ``rank``-th nearest.

    Args:
        queries: (n, …) images or features, float.
        references: (m, …) of the same trailing shape, m ≥ rank.
        rank: 1 for the nearest.

    Returns:
        (n,) Euclidean distances.

    Raises:
        ValueError: fewer references than ``rank``.
    """
    if len(references) < rank:
        raise ValueError(f"there are {len(references)} references, fewer than rank={rank}")
    flat, found = references.flatten(1), []
    for chunk in queries.flatten(1).split(_CHUNK):
        found.append(distances(chunk, flat).kthvalue(rank, dim=1).values)
    return torch.cat(found)


def precision_and_recall(real: torch.Tensor, fake: torch.Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    A set's manifold is estimated by balls around its vectors, each reaching to the vector's k-th nearest neighbour in
    the set. Precision: share of the generated vectors inside the real manifold (do samples look real?). Recall: share
    of the real vectors inside the generated manifold (is everything covered?).

    Args:
        real: (n, d) features of real images, n > k.
        fake: (m, d) features of generated images, m > k.
        neighbours: k.

    Returns:
        precision and recall, in 0–1.

    Raises:
        ValueError: a set that has no k neighbours.
    """

    def inside(queries: torch.Tensor, manifold: torch.Tensor) -> float:
        # the vector itself is its own nearest, at distance 0
        radii = nearest_distances(manifold, manifold, rank=neighbours + 1)
        hits = [(distances(chunk, manifold) <= radii).any(1) for chunk in queries.split(_CHUNK)]
        return float(torch.cat(hits).double().mean())

    return inside(fake, real), inside(real, fake)


@dataclass(frozen=True)
class Classes:
    """What a classifier says of samples.

    Args:
        confidence: mean probability of the most probable class, 0–1.
        coverage: share of the classes that hold at least a tenth of an even share (n / classes) of the samples, 0–1.
        entropy: of the predicted classes' frequencies, in nats; log(classes) when all are equally frequent.
        counts: samples in each class.
    """

    confidence: float
    coverage: float
    entropy: float
    counts: tuple[int, ...]


def class_statistics(probabilities: torch.Tensor) -> Classes:
    """How sure a classifier is of samples, and how they spread over the classes.

    Args:
        probabilities: (n, classes), rows adding to 1, n ≥ 1.
    """
    n, classes = probabilities.shape
    top, predicted = probabilities.double().max(1)
    counts = torch.bincount(predicted, minlength=classes)
    shares = counts.double() / n
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
    covered = counts >= max(1, math.ceil(n / classes / 10))
    return Classes(
        float(top.mean()), float(covered.double().mean()), max(0.0, float(entropy)), tuple(int(c) for c in counts)
    )


@dataclass(frozen=True)
class Memorization:
    """Distances of samples to their nearest training image, beside those of held-out images, in pixel units (L2).

    Args:
        distance: median over the samples.
        held_out: median over the held-out images.
        ratio: the first over the second; well below 1, samples are copies of training images.
        copies: share of the samples that are nearer to a training image than 99 % of the held-out images are; 0.01 is
            what images from the data's own distribution would give.
    """

    distance: float
    held_out: float
    ratio: float
    copies: float


def memorization(samples: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor) -> Memorization:
    """Whether samples lie nearer to the training images than unseen real images do.

    Args:
        samples: (n, c, h, w) generated images.
        held_out: (m, c, h, w) real images that were not trained on, in the same representation as the samples.
        training: (k, c, h, w) the training images.
    """
    own, others = nearest_distances(samples, training).double(), nearest_distances(held_out, training).double()
    median, reference = float(own.median()), float(others.median())
    close = (own < others.quantile(0.01)).double().mean()
    return Memorization(median, reference, median / reference if reference > 0 else 0.0, float(close))
