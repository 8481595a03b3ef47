"""The closed forms of bit-flip diffusion against simulation of single stages and sums over all images."""

import math

import pytest
import torch

from pipelines.images.bitflip_math import (
    LAST_COSINE_DELTA,
    StagePosterior,
    corrupt,
    flip_probabilities,
    keep_probabilities,
    mixed_log_probabilities,
    original_logits,
    posterior_probability,
    prior_kl,
    stage_kl,
)
from tests.images.bitflip_toy import all_images, marginals, single_stage

SCHEDULES = [("cosine", {}), ("linear", {}), ("linear", {"start": 0.05, "end": 0.3}), ("constant", {"start": 0.1})]


def keeps_of(name, arguments, stages):
    return keep_probabilities(flip_probabilities(name, stages, **arguments))


@pytest.mark.parametrize("coins", [False, True], ids=["flips", "fresh coins"])
def test_marginal_against_simulated_single_stages(coins):
    deltas = torch.tensor([0.02, 0.1, 0.3, 0.07], dtype=torch.float64)
    keeps, count = keep_probabilities(deltas), 200_000
    generator = torch.Generator().manual_seed(0)
    pixels = torch.ones(count)
    for t, delta in enumerate(deltas.tolist(), 1):
        if coins:
            fresh = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0)
            pixels = torch.where(torch.rand(count, generator=generator) < 2 * delta, fresh, pixels)
        else:
            pixels = torch.where(torch.rand(count, generator=generator) < delta, -pixels, pixels)
        assert abs(float(pixels.mean()) - float(keeps[t])) < 4 / math.sqrt(count)
    at_once = corrupt(torch.ones(count), keeps[-1], torch.rand(count, generator=generator))
    assert abs(float(at_once.mean()) - float(keeps[-1])) < 4 / math.sqrt(count)
    assert set(at_once.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("pixels", [1, 2, 3, 4])
def test_marginal_and_posterior_against_enumeration(pixels):
    deltas = torch.tensor([0.03, 0.2, 0.11, 0.4], dtype=torch.float64)
    keeps, images, forward = keep_probabilities(deltas), all_images(pixels), marginals(pixels, deltas)
    for t in range(1, 5):
        closed = ((1 + keeps[t] * images[:, None] * images[None]) / 2).prod(-1)
        torch.testing.assert_close(closed, forward[t])
        for s in range(t):
            between = torch.eye(2**pixels, dtype=torch.float64)
            for delta in deltas[s:t]:
                between = between @ single_stage(pixels, float(delta))
            joint = forward[s][:, :, None] * between[None]  # of Y_s and Y_t, for each Y_0
            posterior = joint / joint.sum(1, keepdim=True)
            plus = posterior_probability(images[None], images[:, None], keeps[s], keeps[t])  # [Y_0, Y_t, pixel]
            # the pixels are independent given Y_t and Y_0, so the product is the whole
            each = torch.where(images > 0, plus[:, :, None], 1 - plus[:, :, None]).prod(-1)  # [Y_0, Y_t, Y_s]
            torch.testing.assert_close(each.transpose(1, 2), posterior)


@pytest.mark.parametrize("original", [1.0, -1.0])
def test_posterior_against_simulated_single_stages(original):
    deltas = torch.tensor([0.1, 0.15, 0.05, 0.2, 0.3], dtype=torch.float64)
    keeps, count = keep_probabilities(deltas), 200_000
    generator = torch.Generator().manual_seed(1)
    stages = [torch.full((count,), original)]
    for delta in deltas.tolist():
        stages.append(torch.where(torch.rand(count, generator=generator) < delta, -stages[-1], stages[-1]))
    for s, t in [(t - 1, t) for t in range(2, 6)] + [(1, 3), (2, 5)]:  # at s = 0 there is nothing to simulate
        posterior = StagePosterior.between(keeps[s], keeps[t])
        for noisy in (1.0, -1.0):
            chosen = stages[s][stages[t] == noisy]
            share = float((chosen > 0).double().mean())
            closed = float(posterior_probability(torch.tensor(noisy), torch.tensor(original), keeps[s], keeps[t]))
            error = math.sqrt(closed * (1 - closed) / len(chosen))
            assert abs(share - closed) < 4.5 * error, (s, t, noisy)
            assert error < 0.005
            stay = posterior.stay_agreed if noisy == original else posterior.stay_differed
            assert abs((share if noisy > 0 else 1 - share) - float(stay)) < 4.5 * error, (s, t, noisy)


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 7, 50, 1000])
def test_schedules_are_probabilities_and_keeps_fall(name, arguments, stages):
    deltas = flip_probabilities(name, stages, **arguments)
    assert deltas.shape == (stages,)
    assert ((deltas > 0) & (deltas < 0.5)).all()
    keeps = keep_probabilities(deltas)
    assert keeps[0] == 1
    assert (keeps[1:] < keeps[:-1]).all()


def test_schedules_are_what_they_say():
    keeps = keep_probabilities(flip_probabilities("cosine", 50))
    closed = torch.cos(math.pi * torch.arange(50, dtype=torch.float64) / 100)
    torch.testing.assert_close(keeps[:-1], closed)
    assert keeps[-1] == pytest.approx(closed[-1] * (1 - 2 * LAST_COSINE_DELTA))  # the last stage leaves almost nothing
    assert flip_probabilities("constant", 5, 0.1).tolist() == [0.1] * 5
    assert flip_probabilities("linear", 3, 0.1, 0.3).tolist() == pytest.approx([0.1, 0.2, 0.3])
    for name in ("constant", "linear"):
        for stages in (1, 10, 1000):
            assert keep_probabilities(flip_probabilities(name, stages))[-1] == pytest.approx(0.01)
    ramp = flip_probabilities("linear", 10)
    torch.testing.assert_close(ramp, ramp[0] * torch.arange(1, 11))


def test_what_is_given_is_taken_as_it_is():
    for delta in (0.4994, 0.4996, 0.49999, math.nextafter(0.5, 0)):
        assert flip_probabilities("constant", 3, delta).tolist() == [delta] * 3
        assert flip_probabilities("linear", 3, 0.1, delta)[-1] == delta
        keeps = keep_probabilities(flip_probabilities("constant", 1, delta))
        assert keeps[-1] == 1 - 2 * delta > 0


def test_so_much_noise_that_no_number_is_left_is_refused():
    keep_probabilities(flip_probabilities("constant", 300, 0.45))
    for arguments in (("constant", 400, 0.45), ("linear", 1000, 0.001, 0.49999)):
        with pytest.raises(ValueError, match=r"flip probabilities nothing is left of the image from stage \d+ on"):
            keep_probabilities(flip_probabilities(*arguments))


@pytest.mark.parametrize("delta", [0.4996, 0.49999])
@pytest.mark.parametrize("prediction", ["original", "previous"])
def test_divergence_is_a_number_however_close_to_a_coin_a_stage_is(delta, prediction):
    keeps = keep_probabilities(flip_probabilities("constant", 4, delta))
    for t in (1, 2, 4):
        logits, noisy, original, stage = random_case(keeps, t, t - 1)
        found = stage_kl(logits, noisy, original, stage, prediction)
        assert found.isfinite().all()
        assert (found >= -1e-12).all()
        if prediction == "original" and t > 2:  # coins before and after: whatever is predicted, there is nothing to say
            assert found.max() < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        ("constant", 0),
        ("constant", 5, 0.0),
        ("constant", 5, 0.5),
        ("constant", 5, -0.1),
        ("constant", 5, 0.1, 0.2),
        ("linear", 5, 0.1),
        ("linear", 5, 0.1, 0.6),
        ("cosine", 5, 0.1),
        ("sine", 5),
    ],
)
def test_schedules_refuse(arguments):
    with pytest.raises(ValueError, match=r"flip probabilit|stage|schedule"):
        flip_probabilities(*arguments)


def random_case(keeps, t, s, seed=0, count=4000):
    """Noisy and original pixels and logits, float64, and the posteriors between two stages."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0).double()
    noisy = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0).double()
    logits = 6 * torch.randn(count, generator=generator, dtype=torch.float64)
    return logits, noisy, original, StagePosterior.between(keeps[s], keeps[t])


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
@pytest.mark.parametrize("prediction", ["original", "previous"])
def test_divergence_against_torch_distributions(name, arguments, prediction):
    keeps = keeps_of(name, arguments, 20)
    for t, s in ((2, 1), (9, 8), (20, 19), (20, 3)):
        logits, noisy, original, stage = random_case(keeps, t, s)
        said = torch.sigmoid(logits)
        if prediction == "original":
            either = [
                posterior_probability(noisy, torch.full_like(noisy, sign), keeps[s], keeps[t]) for sign in (1, -1)
            ]
            said = said * either[0] + (1 - said) * either[1]
        true = posterior_probability(noisy, original, keeps[s], keeps[t])
        reference = torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(true), torch.distributions.Bernoulli(said)
        )
        found = stage_kl(logits, noisy, original, stage, prediction)
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-9)
        single = StagePosterior(*(p.float() for p in stage))
        found = stage_kl(logits.float(), noisy.float(), original.float(), single, prediction)
        torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["original", "previous"])
def test_divergence_at_the_first_stage_is_cross_entropy(prediction):
    keeps = keeps_of("cosine", {}, 50)
    logits, noisy, original, stage = random_case(keeps, 1, 0)
    logits.requires_grad_()
    found = stage_kl(logits, noisy, original, stage, prediction)
    reference = torch.nn.functional.binary_cross_entropy_with_logits(logits, (original > 0).double(), reduction="none")
    torch.testing.assert_close(found, reference)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (found, reference)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("prediction", ["original", "previous"])
@pytest.mark.parametrize("t", [1, 2, 25, 50])
def test_gradients_by_finite_differences_and_at_extreme_logits(prediction, t):
    keeps = keeps_of("cosine", {}, 50)
    logits, noisy, original, stage = random_case(keeps, t, t - 1, count=40)
    assert torch.autograd.gradcheck(
        lambda z: stage_kl(z, noisy, original, stage, prediction), logits.requires_grad_(), rtol=1e-4
    )
    single = StagePosterior(*(p.float() for p in stage))
    extreme = (50 * torch.sign(logits)).float().detach().requires_grad_()
    value = stage_kl(extreme, noisy.float(), original.float(), single, prediction)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value >= -1e-6).all()
    assert extreme.grad.isfinite().all()


def test_mixture_and_its_inverse():
    keeps = keeps_of("linear", {}, 30)
    logits, noisy, _, stage = random_case(keeps, 12, 11)
    stay, flip = mixed_log_probabilities(logits, noisy, stage)
    torch.testing.assert_close(stay.exp() + flip.exp(), torch.ones_like(stay))
    plus = torch.where(noisy > 0, stay.exp(), flip.exp())
    back = original_logits(torch.logit(plus), noisy, stage)
    torch.testing.assert_close(torch.sigmoid(back), torch.sigmoid(logits), rtol=1e-6, atol=1e-6)
    # a prediction that no image could give is taken for the nearest that one could
    assert original_logits(torch.tensor(-30.0), torch.tensor(1.0), stage) == -math.inf


def test_prior_divergence():
    for keep in (torch.tensor(0.0), torch.tensor(1e-4, dtype=torch.float64), torch.tensor(0.4), torch.tensor(1.0)):
        coin = torch.distributions.Bernoulli(torch.tensor(0.5, dtype=torch.float64))
        reference = torch.distributions.kl_divergence(torch.distributions.Bernoulli((1 + keep.double()) / 2), coin)
        torch.testing.assert_close(prior_kl(7, keep), 7 * reference, rtol=1e-6, atol=1e-15)
