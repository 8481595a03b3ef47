"""The measures against brute force, scipy and cases whose value is known."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pipelines.images.measure_math import (
    class_coverage,
    class_entropy,
    copies,
    frechet_distance,
    mean_and_covariance,
    nearest,
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


def test_the_nearest_are_brute_forces():
    queries, references = random(700, 2, 3), random(40, 2, 3, seed=1)
    for rank in (1, 3):
        found, places = nearest(queries, references, rank=rank)
        everything = (queries[:, None] - references[None]).flatten(2).norm(dim=2)
        torch.testing.assert_close(found, everything.sort(1).values[:, rank - 1])
        assert torch.equal(places, everything.argsort(1)[:, rank - 1])
    with pytest.raises(ValueError, match="fewer than rank"):
        nearest(queries, references[:2], rank=3)


def test_the_distance_to_itself_is_exactly_nothing():
    images = random(50, 1, 28, 28) + 100  # where ‖a‖² + ‖b‖² − 2ab has no digits left
    found, places = nearest(images, images)
    assert torch.equal(found, torch.zeros(50))
    assert torch.equal(places, torch.arange(50))


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
    precision, recall = (values.mean().item() for values in precision_and_recall(real, fake, neighbours=k))
    assert precision == pytest.approx(brute_force_precision(real, fake, k))
    assert recall == pytest.approx(brute_force_precision(fake, real, k))
    assert 0 < recall < 1


def test_precision_and_recall_tell_dropped_modes_from_bad_samples():
    modes = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    real = (modes[:, None] + random(2, 100, 2)).flatten(0, 1)
    one_mode = random(200, 2, seed=3)
    precision, recall = (values.mean().item() for values in precision_and_recall(real, one_mode))
    assert precision > 0.9
    assert 0.4 < recall < 0.55  # nothing of the other mode
    spread = torch.rand(200, 2, generator=torch.Generator().manual_seed(4)) * 60 - 20
    precision, recall = (values.mean().item() for values in precision_and_recall(real, spread))
    assert precision < 0.3
    assert recall > 0.9


def test_coverage_and_entropy_of_classes():
    even = torch.eye(4).repeat(5, 1)
    assert class_coverage(even) == 1.0
    assert class_entropy(even) == pytest.approx(math.log(4), rel=1e-12)
    # 100 samples, 4 classes: an even share is 25, a class counts as covered from 3 samples on
    counts = (95, 3, 2, 0)
    rows = torch.eye(4)[list(itertools.chain.from_iterable([i] * n for i, n in enumerate(counts)))]
    assert class_coverage(0.6 * rows + 0.1) == 0.5
    assert class_entropy(0.6 * rows + 0.1) == pytest.approx(-sum(n / 100 * math.log(n / 100) for n in counts if n))
    assert class_entropy(torch.eye(3)[[1]]) == 0.0
    assert class_coverage(torch.eye(3)[[1]]) == pytest.approx(1 / 3)


def test_copies_are_told_from_new_images():
    training, held_out = random(300, 1, 4, 4), random(200, 1, 4, 4, seed=1)
    reference, _ = nearest(held_out, training)
    fresh, _ = nearest(random(200, 1, 4, 4, seed=2), training)
    assert copies(fresh, reference).mean() < 0.05
    copied, _ = nearest(training[:200] + 0.01 * random(200, 1, 4, 4, seed=3), training)
    assert copies(copied, reference).tolist() == [1.0] * 200
    assert copies(torch.cat([copied[:100], fresh[:100]]), reference)[:101].sum() == 100
    assert copies(reference, reference).mean().item() == pytest.approx(0.01, abs=0.005)
