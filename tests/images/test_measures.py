"""The measures against brute force, scipy and cases whose value is known."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pipelines.images.measures import (
    class_statistics,
    frechet_distance,
    mean_and_covariance,
    memorization,
    nearest_distances,
    precision_and_recall,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_and_covariance_are_numpys():
    x = random(50, 4)
    mean, covariance = mean_and_covariance(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="at least two"):
        mean_and_covariance(x[:1])


@pytest.mark.parametrize("n", [6, 300])  # fewer vectors than dimensions, and many more
def test_frechet_distance_is_the_textbooks(n):
    a, b = random(n, 8), random(n, 8, seed=1) @ random(8, 8, seed=2) + 0.5
    (mean_a, cov_a), (mean_b, cov_b) = mean_and_covariance(a), mean_and_covariance(b)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    wanted = float((mean_a - mean_b).square().sum() + np.trace(cov_a.numpy() + cov_b.numpy() - 2 * root))
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    # in one dimension it is (μ₁ − μ₂)² + (σ₁ − σ₂)²
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / math.sqrt(2)  # mean 0, variance 1
    assert frechet_distance(3 * x + 2, x) == pytest.approx(4 + 4, rel=1e-12)


def test_nearest_distances_are_brute_forces():
    queries, references = random(7, 2, 3), random(11, 2, 3, seed=1)
    for rank in (1, 3):
        wanted = [
            sorted(math.dist(q.flatten().tolist(), r.flatten().tolist()) for r in references)[rank - 1] for q in queries
        ]
        np.testing.assert_allclose(nearest_distances(queries, references, rank=rank), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="fewer than rank"):
        nearest_distances(queries, references[:2], rank=3)


def brute_force_precision(real: torch.Tensor, fake: torch.Tensor, k: int) -> float:
    hits = 0
    for sample in fake.tolist():
        for i, centre in enumerate(real.tolist()):
            others = sorted(math.dist(centre, other) for j, other in enumerate(real.tolist()) if j != i)
            if math.dist(sample, centre) <= others[k - 1]:
                hits += 1
                break
    return hits / len(fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_brute_forces(k):
    real, fake = random(20, 2), 0.7 * random(15, 2, seed=1) + 0.6
    precision, recall = precision_and_recall(real, fake, neighbours=k)
    assert precision == pytest.approx(brute_force_precision(real, fake, k))
    assert recall == pytest.approx(brute_force_precision(fake, real, k))
    assert 0 < recall < 1


def test_precision_and_recall_tell_dropped_modes_from_bad_samples():
    modes = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    real = (modes[:, None] + random(2, 100, 2)).flatten(0, 1)
    one_mode = random(200, 2, seed=3)
    precision, recall = precision_and_recall(real, one_mode)
    assert precision > 0.9
    assert 0.4 < recall < 0.55  # nothing of the other mode
    spread = torch.rand(200, 2, generator=torch.Generator().manual_seed(4)) * 60 - 20
    precision, recall = precision_and_recall(real, spread)
    assert precision < 0.3
    assert recall > 0.9


def test_class_statistics():
    even = torch.eye(4).repeat(5, 1)
    found = class_statistics(even)
    assert (found.confidence, found.coverage, found.counts) == (1.0, 1.0, (5, 5, 5, 5))
    assert found.entropy == pytest.approx(math.log(4), rel=1e-12)
    # 100 samples, 4 classes: an even share is 25, a class counts as covered from 3 samples on
    counts = (95, 3, 2, 0)
    rows = torch.eye(4)[list(itertools.chain.from_iterable([i] * n for i, n in enumerate(counts)))]
    found = class_statistics(0.6 * rows + 0.1)
    assert found.counts == counts
    assert found.coverage == 0.5
    assert found.confidence == pytest.approx(0.7, rel=1e-6)
    assert found.entropy == pytest.approx(-sum(n / 100 * math.log(n / 100) for n in counts if n), rel=1e-12)
    assert class_statistics(torch.eye(3)[[1]]).entropy == 0.0


def test_memorization_tells_copies_from_new_images():
    training, held_out = random(300, 1, 4, 4), random(200, 1, 4, 4, seed=1)
    fresh = memorization(random(200, 1, 4, 4, seed=2), held_out, training)
    assert 0.95 < fresh.ratio < 1.05
    assert fresh.copies < 0.05
    copied = memorization(training[:200] + 0.01 * random(200, 1, 4, 4, seed=3), held_out, training)
    assert copied.ratio < 0.1
    assert copied.copies == 1.0
    assert copied.held_out == fresh.held_out
    half = memorization(torch.cat([training[:100], random(100, 1, 4, 4, seed=2)]), held_out, training)
    assert 0.5 <= half.copies < 0.55
