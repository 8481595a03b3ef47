"""The GAN's losses against the textbook formulas in float64, their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.images.gan_losses import discriminator_loss, generator_gradients, generator_loss, r1_penalty

LOGITS = [-50.0, -20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 20.0, 50.0]


def log_d(logit: float) -> float:
    """log D = log(1 / (1 + e^−ℓ)), in the form that keeps its digits at this ℓ."""
    return -math.log1p(math.exp(-logit)) if logit >= 0 else logit - math.log1p(math.exp(logit))


@pytest.mark.parametrize("real", LOGITS)
@pytest.mark.parametrize("fake", LOGITS)
def test_losses_are_those_of_the_textbook(real, fake):
    r, f = (torch.tensor([value], dtype=torch.float64) for value in (real, fake))
    # log(1 − D(x)) = log D with the logit's sign turned
    assert float(discriminator_loss(r, f)) == pytest.approx(-log_d(real) - log_d(-fake), rel=1e-14, abs=1e-300)
    assert float(generator_loss(f, "minimax")) == pytest.approx(log_d(-fake), rel=1e-14)
    assert float(generator_loss(f, "nonsaturating")) == pytest.approx(-log_d(fake), rel=1e-14)


def test_the_plain_formula_where_it_is_sound():
    logits = np.linspace(-8, 8, 33)
    d = 1 / (1 + np.exp(-logits))
    t = torch.from_numpy(logits)
    assert float(discriminator_loss(t, t.flip(0))) == pytest.approx(-np.log(d).mean() - np.log(1 - d).mean(), rel=1e-12)
    assert float(generator_loss(t, "minimax")) == pytest.approx(np.log(1 - d).mean(), rel=1e-12)
    assert float(generator_loss(t, "nonsaturating")) == pytest.approx(-np.log(d).mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(logit, dtype):
    for loss in (
        lambda x: discriminator_loss(x, x),
        lambda x: generator_loss(x, "minimax"),
        lambda x: generator_loss(x, "nonsaturating"),
    ):
        x = torch.full((3,), logit, dtype=dtype, requires_grad=True)
        value = loss(x)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()


@given(st.floats(-50, 50))
def test_gradients_by_the_logit(logit):
    x = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    d = math.exp(log_d(logit))
    (saturating,) = torch.autograd.grad(generator_loss(x, "minimax"), x)
    (other,) = torch.autograd.grad(generator_loss(x, "nonsaturating"), x)
    assert float(saturating) == pytest.approx(-d, rel=1e-12)
    assert float(other) == pytest.approx(-math.exp(log_d(-logit)), rel=1e-12)


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    # Goodfellow et al. 2014, theorem 1: at D = p/(p+q) the loss is 2 log 2 − 2 JSD(p, q)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    m = (p + q) / 2
    jsd = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
    logits = torch.from_numpy(np.log(p / q))
    real, fake = ([i for i in range(3) for _ in range(round(10 * share[i]))] for share in (p, q))
    assert float(discriminator_loss(logits[real], logits[fake])) == pytest.approx(2 * math.log(2) - 2 * jsd, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_gradients_are_those_of_the_whole_generator(shift):
    torch.manual_seed(0)
    generator = torch.nn.Linear(3, 4).double()
    score = torch.nn.Linear(4, 1).double()
    logits = score(torch.tanh(generator(torch.randn(5, 3, dtype=torch.float64)))).squeeze(1) + shift
    found = generator_gradients(logits, generator.parameters())
    assert set(found) == {"minimax", "nonsaturating"}
    for kind, gradient in found.items():
        generator.zero_grad()
        generator_loss(logits, kind).backward(retain_graph=True)
        torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in generator.parameters()]))
    if shift:  # D(G(z)) → 0: one loss has lost its gradient, the other has not
        assert found["minimax"].norm() < 1e-10 < 1e-3 < found["nonsaturating"].norm()


def test_r1_is_half_the_squared_gradient_and_trains_the_discriminator():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    network = network.double()
    images = torch.randn(4, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(network(images).squeeze(1), images)
    step, total = 1e-6, 0.0
    for row in range(4):
        for pixel in range(6):
            moved = images.detach().clone().view(4, 6)
            moved[row, pixel] += step
            up = network(moved.view(4, 1, 2, 3))[row].item()
            moved[row, pixel] -= 2 * step
            total += ((up - network(moved.view(4, 1, 2, 3))[row].item()) / (2 * step)) ** 2
    assert penalty.item() == pytest.approx(total / 2 / 4, rel=1e-6)
    penalty.backward()
    assert network[1].weight.grad.abs().sum() > 0
