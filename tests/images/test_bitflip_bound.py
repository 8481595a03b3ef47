"""The bound and the sampler of bit-flip diffusion on images of at most four pixels, where all is a sum."""

import itertools
import math

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.images.bitflip import BitFlipConfig
from pipelines.images.bitflip_bound import variational_bound
from pipelines.images.bitflip_scheduler import BitFlipScheduler
from pipelines.images.data import Images
from pipelines.images.evaluation import measure, monte_carlo_errors
from pipelines.images.loop import new_accelerator
from pipelines.images.seeds import TEST_NOISE_AGAIN
from tests.images.bitflip_toy import all_images, exact_bound, exact_logits, reverse_chain

PREDICTIONS = ["original", "previous"]


def scheduler_of(deltas, prediction="original", evidence=False):
    return BitFlipScheduler(
        len(deltas), trained_deltas=[float(d) for d in deltas], prediction_type=prediction, add_evidence=evidence
    )


def correlated(pixels=4, seed=0):
    """A distribution over images whose pixels hang together."""
    weights = torch.randn(2**pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(2 * weights, 0)


def same_noise(stages, total=0.05):
    """δ of each of so many stages that together keep a pixel with probability ``total``."""
    return torch.full((stages,), (1 - total ** (1 / stages)) / 2, dtype=torch.float64)


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_bound_is_never_below_the_negative_log_likelihood(pixels, prediction, evidence):
    generator = torch.Generator().manual_seed(pixels)
    for stages in (1, 2, 5):
        scheduler = scheduler_of(same_noise(stages, 0.3), prediction, evidence)
        outputs = [2 * torch.randn(2**pixels, pixels, generator=generator, dtype=torch.float64) for _ in range(stages)]
        bound, likelihood = exact_bound(scheduler, outputs), reverse_chain(scheduler, outputs)
        assert likelihood.sum() == pytest.approx(1)
        assert (bound >= -likelihood.log() - 1e-12).all()
        assert (bound - -likelihood.log()).max() > 1e-3  # a network that knows nothing leaves a gap


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("stages", [1, 3, 20])
def test_bound_of_one_pixel_with_the_exact_reverse_process_is_the_likelihood(prediction, stages):
    data = torch.tensor([0.3, 0.7], dtype=torch.float64)
    deltas = torch.cat([same_noise(stages, 0.5)[1:], torch.tensor([0.499999], dtype=torch.float64)])
    outputs = exact_logits(data, deltas, 0 if prediction == "original" else None)
    scheduler = scheduler_of(deltas, prediction)
    bound, likelihood = exact_bound(scheduler, outputs), reverse_chain(scheduler, outputs)
    # what is left: after the last stage 2e-6 of the pixel is still there, where sampling starts from a fair coin
    torch.testing.assert_close(bound, -likelihood.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(likelihood, data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gap_of_four_pixels_shrinks_as_stages_are_more_at_the_same_total_noise(prediction):
    data, gaps = correlated(), []
    for stages in (1, 2, 4, 8, 16, 32):
        deltas = same_noise(stages, 0.001)
        outputs = exact_logits(data, deltas, 0 if prediction == "original" else None)
        scheduler = scheduler_of(deltas, prediction)
        bound, likelihood = exact_bound(scheduler, outputs), reverse_chain(scheduler, outputs)
        assert (bound >= -likelihood.log() - 1e-12).all()
        gaps.append(float(data @ (bound + data.log())))  # to the entropy: the best that any model can do
    assert all(later < earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[0] > 0.3
    assert gaps[-1] < gaps[0] / 3


def test_both_predictions_are_one_model_when_exact():
    data, deltas = correlated(3, seed=1), same_noise(6)
    bounds = [
        exact_bound(scheduler_of(deltas, prediction), exact_logits(data, deltas, stage))
        for prediction, stage in (("original", 0), ("previous", None))
    ]
    torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_evidence_alone_is_right_for_images_of_fair_coins(prediction):
    scheduler = BitFlipScheduler(10, prediction_type=prediction)
    bound = exact_bound(scheduler, [torch.zeros(8, 3, dtype=torch.float64)] * 10)
    torch.testing.assert_close(bound, torch.full_like(bound, 3 * math.log(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimated_bound_is_unbiased(prediction, stages):
    scheduler = BitFlipScheduler(8, prediction_type=prediction)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(8, 8, 3, generator=generator, dtype=torch.float64)
    exact = exact_bound(scheduler, list(table))
    images = all_images(3).repeat(2000, 1)
    places = torch.tensor([4, 2, 1])

    def predict(noisy, t):
        return table[t - 1, ((noisy > 0) * places).sum(-1)]

    def uniform(*shape):
        return torch.rand(len(images), *shape, generator=generator)

    found = variational_bound(predict, images, scheduler, uniform, stages).total.reshape(2000, 8)
    assert (found.mean(0) - exact).abs().max() < 4.5 * found.std() / math.sqrt(2000)
    if stages == 1:
        assert found.std(0).min() > 0.1  # drawing one stage of seven is noisy


class Toy:
    """A method whose network is a table: what it says of each of the eight images at each stage."""

    name, estimated = "toy", ("bound",)

    def __init__(self, stages):
        generator = torch.Generator().manual_seed(2)
        self.scheduler, self.stages = BitFlipScheduler(8), stages
        self.table = torch.randn(8, 8, 1, 1, 3, generator=generator, dtype=torch.float64)

    def predict(self, noisy, t):
        return self.table[t - 1, ((noisy > 0) * torch.tensor([4, 2, 1])).sum((1, 2, 3))]

    def evaluate(self, batch, draws):
        found = variational_bound(self.predict, batch.images * 2 - 1, self.scheduler, draws.uniform, self.stages)
        return {"bound": found.total}


def toy_config(tmp_path, **values):
    plain = {"precision": "fp32", "report_to": "none", "output_dir": str(tmp_path), "eval_batch_size": 100}
    return validate(BitFlipConfig, plain | {"binarize": "threshold"} | values)


@pytest.mark.parametrize("stages", [pytest.param(None, marks=pytest.mark.slow), 1, 3])
def test_monte_carlo_error_is_the_spread_of_the_estimate_over_repeated_draws(tmp_path, stages):
    """Over the draws of stages and noise, the images staying the same."""
    chosen = torch.randint(0, 8, (300,), generator=torch.Generator().manual_seed(5))
    pixels = ((all_images(3)[chosen] > 0) * 255).to(torch.uint8)[:, None, None]
    images, method = Images(pixels, torch.zeros(300, dtype=torch.int64)), Toy(stages)
    means, errors, over_images, accelerator = [], [], [], new_accelerator(toy_config(tmp_path))
    for seed in range(80):
        config = toy_config(tmp_path, seed=seed)
        found = measure(method, images, config, accelerator)
        means.append(found["bound"].mean())
        over_images.append(found["bound"].var(ddof=1) / 300)
        errors.append(monte_carlo_errors(method, images, config, accelerator, found)["bound"])
    spread = np.std(means, ddof=1)
    assert np.mean(errors) == pytest.approx(spread, rel=4 / math.sqrt(2 * 80))
    assert np.std(errors) < 0.2 * np.mean(errors)
    exact = exact_bound(method.scheduler, [stage[:, 0, 0] for stage in method.table])[chosen]
    # the error over images is larger: it is of which images they are and of the draws together
    assert np.mean(over_images) == pytest.approx(np.mean(np.square(errors)) + float(exact.var()) / 300, rel=0.1)


def test_a_tenth_of_a_large_set_is_drawn_twice(tmp_path):
    seen = []

    class Counting(Toy):
        def evaluate(self, batch, draws):
            seen.append(len(batch))
            return super().evaluate(batch, draws)

    images = Images(torch.zeros(10_050, 1, 1, 3, dtype=torch.uint8), torch.zeros(10_050, dtype=torch.int64))
    config, method = toy_config(tmp_path), Counting(1)
    accelerator = new_accelerator(config)
    found = measure(method, images, config, accelerator)
    assert (len(seen), sum(seen)) == (101, 10_050)
    seen.clear()
    few = monte_carlo_errors(method, images, config, accelerator, found)["bound"]
    assert (len(seen), sum(seen)) == (11, 1050)
    again = measure(method, images, config, accelerator, noise=TEST_NOISE_AGAIN)
    assert np.isfinite(again["bound"]).all()
    every = math.sqrt(((found["bound"] - again["bound"]) ** 2).mean() / 2 / 10_050)
    assert few == pytest.approx(every, rel=0.15)
    method.estimated = ()
    assert monte_carlo_errors(method, images, config, accelerator, found) == {}


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_are_distributed_as_the_reverse_chain_says(prediction, steps):
    data, deltas = correlated(3, seed=3), same_noise(6)
    outputs = exact_logits(data, deltas, 0 if prediction == "original" else None)
    scheduler = scheduler_of(deltas, prediction)
    # with larger steps too the network of Y_{t-1} says, of each pixel of Y_0, what that of Y_0 says
    of_image = scheduler_of(deltas), exact_logits(data, deltas, 0)
    scheduler.set_timesteps(steps)
    expected = reverse_chain(*of_image, scheduler.timesteps.tolist())
    count, images, places = 100_000, all_images(3), torch.tensor([4, 2, 1])
    generator = torch.Generator().manual_seed(4)
    sample = images[torch.randint(8, (count,), generator=generator)]
    for t in scheduler.timesteps:
        output = outputs[int(t) - 1][((sample > 0) * places).sum(-1)]
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    found = torch.bincount(((sample > 0) * places).sum(-1), minlength=8) / count
    assert (found - expected).abs().max() < 4.5 * 0.5 / math.sqrt(count)


def test_stages_to_sample_with():
    scheduler = BitFlipScheduler(50)
    for steps in (1, 2, 7, 49, 50):
        scheduler.set_timesteps(steps)
        chosen = scheduler.timesteps.tolist()
        assert len(chosen) == steps == len(set(chosen))
        assert chosen == sorted(chosen, reverse=True)
        assert chosen[0] == 50
        assert chosen[-1] >= 1
        assert [scheduler.previous_timestep(t) for t in chosen] == [*chosen[1:], 0]
    for steps in (0, 51):
        with pytest.raises(ValueError, match=r"1\.\.50"):
            scheduler.set_timesteps(steps)


def test_scheduler_is_saved_and_loaded_as_diffusers_does(tmp_path):
    scheduler = BitFlipScheduler(7, "linear", 0.1, 0.3, prediction_type="previous", add_evidence=False)
    scheduler.save_pretrained(tmp_path)
    again = BitFlipScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    torch.testing.assert_close(again.keeps, scheduler.keeps)


@pytest.mark.parametrize(
    "arguments", [{"trained_deltas": [0.1]}, {"trained_deltas": [0.1, 0.5]}, {"prediction_type": "x"}]
)
def test_scheduler_refuses(arguments):
    with pytest.raises(ValueError, match=r"flip probabilit|prediction"):
        BitFlipScheduler(2, **arguments)
