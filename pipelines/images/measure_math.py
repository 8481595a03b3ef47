"""How near generated images are to real ones: measures on features, class probabilities and pixels. All are pure.

Features come from a classifier trained on the very data set (``pipelines.images.classifier``). A Fréchet distance in
them has the form of the FID but is not one: the FID is defined by the Inception network, and the two do not compare.
"""

from __future__ import annotations

import math

import torch

_CHUNK = 512  # rows of a distance matrix that are held at a time
_SPARE = 8  # candidates beyond those wanted, against rounding


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


def nearest(queries: torch.Tensor, references: torch.Tensor, *, rank: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's ``rank``-th nearest reference.

    The candidates are found by matrix products (‖a‖² + ‖b‖² − 2ab, quick), their distances then taken exactly.

    Args:
        queries: (n, …) images or features, float.
        references: (m, …) of the same trailing shape, m ≥ rank.
        rank: 1 for the nearest.

    Returns:
        (n,) Euclidean distances, and (n,) which references these are.

    Raises:
        ValueError: fewer references than ``rank``.
    """
    if len(references) < rank:
        raise ValueError(f"there are {len(references)} references, fewer than rank={rank}")
    flat = references.flatten(1)
    norms, candidates = flat.square().sum(1), min(len(flat), rank + _SPARE)
    found, places = [], []
    for chunk in queries.flatten(1).split(_CHUNK):
        rough = torch.addmm(norms, chunk, flat.T, alpha=-2)
        near = rough.topk(candidates, largest=False).indices
        exact = (chunk[:, None] - flat[near]).norm(dim=2)
        value, place = exact.kthvalue(rank, dim=1)
        found.append(value)
        places.append(near.gather(1, place[:, None])[:, 0])
    return torch.cat(found), torch.cat(places)


def precision_and_recall(
    real: torch.Tensor, fake: torch.Tensor, *, neighbours: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2), before the mean is taken.

    A set's manifold is estimated by balls around its vectors, each reaching to the vector's k-th nearest neighbour in
    the set. Precision: share of the generated vectors inside the real manifold (do samples look real?). Recall: share
    of the real vectors inside the generated manifold (is everything covered?). Both depend on the sets' sizes.

    Args:
        real: (n, d) features of real images, n > k.
        fake: (m, d) features of generated images, m > k.
        neighbours: k.

    Returns:
        (m,) and (n,): 1 where a generated vector is inside the real manifold, and where a real one is inside the
        generated manifold, else 0. Their means are precision and recall.

    Raises:
        ValueError: a set that has no k neighbours.
    """

    def inside(queries: torch.Tensor, manifold: torch.Tensor) -> torch.Tensor:
        # the vector itself is its own nearest, at distance 0
        radii, _ = nearest(manifold, manifold, rank=neighbours + 1)
        return torch.cat([(distances(chunk, manifold) <= radii).any(1) for chunk in queries.split(_CHUNK)]).double()

    return inside(fake, real), inside(real, fake)


def class_coverage(probabilities: torch.Tensor) -> float:
    """Share of the classes that hold at least a tenth of an even share of the samples, and at least one sample, 0–1.

    Args:
        probabilities: (n, classes) a classifier's; a sample belongs to its most probable class.
    """
    n, classes = probabilities.shape
    counts = torch.bincount(probabilities.argmax(1), minlength=classes)
    return float((counts >= max(1, math.ceil(n / classes / 10))).double().mean())


def class_entropy(probabilities: torch.Tensor) -> float:
    """Entropy of the frequencies of the most probable classes, in nats; log(classes) where all are equally frequent."""
    shares = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double() / len(probabilities)
    return max(0.0, float(-torch.special.xlogy(shares, shares).sum()))


def copies(sample_distances: torch.Tensor, held_out_distances: torch.Tensor) -> torch.Tensor:
    """Which samples lie nearer to the training images than 99 % of unseen real images do: a sign of memorization.

    Args:
        sample_distances: (n,) distances of samples to their nearest training image.
        held_out_distances: (m,) the same of held-out images in the same representation.

    Returns:
        (n,): 1 or 0. The mean is 0.01 in expectation for samples of the data's own distribution.
    """
    return (sample_distances < held_out_distances.double().quantile(0.01)).double()
