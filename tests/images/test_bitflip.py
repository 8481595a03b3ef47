"""Bit-flip diffusion as a stage: its losses, its pipeline, resume, processes, what is refused."""

import json
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.bitflip import BitFlipConfig
from pipelines.images.bitflip_bound import stage_divergence
from pipelines.images.bitflip_method import BitFlipMethod
from pipelines.images.bitflip_pipeline import BitFlipPipeline, network_output
from pipelines.images.method import Batch, Draws
from pipelines.images.saved import load_pipeline
from pipelines.images.unet import spread_timesteps
from tests.images.conftest import check_resumes, check_two_processes

SMALL = ["channels=[8, 16]", "timesteps=6", "max_train=128", "max_test=40", "report_to=none"]
STEPS = ["max_steps=6", "save_steps=2", "logging_steps=1"]
# Two channels and more in each group of a normalization: of single ones it takes out again what biases add, and of
# gradients that are 0 but for rounding Adam makes steps as large as the rate.
USUAL = ["channels=[16, 32]", "learning_rate=0.002"]
GENTLE = ["learning_rate=1e-4"]


class Shape:
    """What a method reads of an ImageSet."""

    shape = (1, 8, 8)


def method(images=Shape, **values) -> BitFlipMethod:
    torch.manual_seed(0)
    made = BitFlipMethod(validate(BitFlipConfig, {"channels": [8, 16], "timesteps": 6} | values), images)
    for parameter in made.parts["unet"].conv_out.parameters():  # which begins at 0
        torch.nn.init.normal_(parameter, std=0.1)
    made.parts["unet"].eval()
    return made


def batch(rows: int = 6) -> Batch:
    images = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch((images < 0.3).float(), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("add_evidence", [True, False])
@pytest.mark.parametrize("loss", ["bound", "cross_entropy", "both"])
def test_losses(loss, add_evidence):
    made = method(loss=loss, add_evidence=add_evidence, cross_entropy_weight=0.5)
    value, logged = made.loss("unet", batch(), Draws(torch.Generator().manual_seed(2), 6), 0)
    draws, original = Draws(torch.Generator().manual_seed(2), 6), batch().images * 2 - 1
    times = 1 + spread_timesteps(draws, 6)
    assert sorted(times.tolist()) == [1, 2, 3, 4, 5, 6]
    noisy = made.scheduler.add_noise(original, draws.uniform(1, 8, 8), times)
    output = network_output(made.parts["unet"], noisy, times, 2)
    bound = stage_divergence(made.scheduler, output, noisy, original, times).sum() / 64
    logits = made.scheduler.logits(output, noisy, times)
    entropy = binary_cross_entropy_with_logits(logits, batch().images)
    wanted = {"bound": bound, "cross_entropy": entropy, "both": bound + 0.5 * entropy}[loss]
    torch.testing.assert_close(value, wanted)
    assert float(logged["bound"]) == pytest.approx(float(bound) * 64, rel=1e-5)
    assert float(logged["cross_entropy"]) == pytest.approx(float(entropy) * 64, rel=1e-5)


def test_the_loss_of_the_stage_before_is_the_bound():
    made = method(loss="bound", prediction="previous")
    value, logged = made.loss("unet", batch(), Draws(torch.Generator().manual_seed(2), 6), 0)
    assert set(logged) == {"bound"}
    assert float(value) * 64 == pytest.approx(float(logged["bound"]), rel=1e-6)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_patch_is_one_place_of_the_network(patch_size):
    unet = method(patch_size=patch_size, channels=[8, 16] if patch_size < 4 else [8]).parts["unet"]
    assert unet.config.in_channels == patch_size**2
    assert unet.config.sample_size == 8 // patch_size
    x = torch.where(torch.rand(2, 1, 8, 8) < 0.5, 1.0, -1.0)
    assert network_output(unet, x, torch.tensor([1, 2]), patch_size).shape == x.shape


def test_measured_bound_is_the_sum_of_its_terms_and_exact_for_fair_coins():
    made = method(bound_stages=None)
    for parameter in made.parts["unet"].conv_out.parameters():
        torch.nn.init.zeros_(parameter)  # only the evidence is left: the very model of fair coins
    images = (torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    rows = Batch(images, torch.zeros(200, dtype=torch.int64))
    found = made.evaluate(rows, Draws(torch.Generator().manual_seed(4), 200))
    assert set(found) == {"bound", "bits_per_pixel", "prior_kl", "transitions", "reconstruction"}
    total = found["prior_kl"] + found["transitions"] + found["reconstruction"]
    torch.testing.assert_close(found["bound"], total)
    torch.testing.assert_close(found["bits_per_pixel"], total / (64 * math.log(2)))
    error = float(total.std()) / math.sqrt(200)
    assert float(total.mean()) == pytest.approx(64 * math.log(2), abs=4 * error)
    assert 0 < error < 0.5


def test_pipeline_is_saved_and_loaded_and_draws_the_same(tmp_path):
    made = method()
    made.pipeline().save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert isinstance(loaded, BitFlipPipeline)
    assert loaded.image_shape == (1, 8, 8)
    for steps in (None, 2):
        images = [
            p(5, torch.Generator().manual_seed(0), steps, output_type="pt").images for p in (made.pipeline(), loaded)
        ]
        assert torch.equal(*images)
        assert images[0].shape == (5, 1, 8, 8)
        assert set(images[0].unique().tolist()) == {0.0, 1.0}
    array = loaded(2, torch.Generator().manual_seed(0), output_type="np").images
    assert array.shape == (2, 8, 8, 1)
    assert loaded(1).images[0].size == (8, 8)
    stages = list(loaded.denoise(3, torch.Generator().manual_seed(0)))
    assert len(stages) == 6
    assert all(stage.pred_original_sample.abs().max() <= 1 for stage in stages)
    with pytest.raises(ValueError, match=r"1\.\.6"):
        loaded(1, num_inference_steps=7)


def test_samples_in_blocks_and_pictures():
    made = method(inference_steps=2)
    assert made.sample(501, torch.Generator().manual_seed(0)).shape == (501, 1, 8, 8)
    ((name, picture),) = made.pictures(batch(), torch.Generator().manual_seed(0))
    assert name == "denoising"
    assert picture.shape == (10, 2, 1, 8, 8)
    assert 0 <= picture.min() <= picture.max() <= 1


def test_killed_and_resumed_it_ends_the_same(stages, tmp_path):
    words = [*SMALL, *STEPS, "eval_steps=2", "sample_steps=3", "dropout=0.1", "bound_stages=2"]
    folder = check_resumes(stages, tmp_path, "images/bitflip", words)
    assert {"samples.png", "denoising.png", "unet", "scheduler"} <= {path.name for path in folder.iterdir()}
    history = json.loads((folder / "log_history.json").read_text())
    assert {"loss", "bound", "cross_entropy"} <= set(history[0])
    assert [entry["step"] for entry in history if "eval_bound" in entry] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "tolerance"), [(GENTLE, 1e-5), (USUAL, 3e-5)], ids=["gentle", "usual"])
def test_two_processes_do_what_one_does(stages, tmp_path, rate, tolerance):
    words = [*SMALL, *STEPS, "eval_batch_size=15", "eval_steps=3", "bound_stages=2", *rate]
    check_two_processes(stages, tmp_path, "images/bitflip", words, batch_size=16, tolerance=tolerance)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"timesteps": 0}, "timesteps=0: input should be greater than or equal to 1"),
        ({"delta_schedule": "constant", "delta_start": 0.5}, "delta_start=0.5: input should be less than 0.5"),
        ({"delta_schedule": "constant", "delta_start": 0}, "delta_start=0: input should be greater than 0"),
        ({"delta_schedule": "linear", "delta_start": 0.1, "delta_end": -1}, "delta_end=-1: input should be greater"),
        ({"delta_schedule": "linear", "delta_start": 0.1}, "delta_end=None: the linear schedule has two ends; give"),
        ({"delta_start": 0.1}, "delta_start=0.1: the cosine schedule does not take it; leave it out"),
        ({"delta_schedule": "constant", "delta_end": 0.1}, "delta_end=0.1: the constant schedule does not take it"),
        (
            {"timesteps": 100, "delta_schedule": "constant", "delta_start": 0.4999},
            "timesteps=100: with these flip probabilities nothing is left of the image from stage 84 on",
        ),
        ({"delta_schedule": "sine"}, "delta_schedule=sine: input should be 'cosine', 'linear' or 'constant'"),
        ({"inference_steps": 51}, "inference_steps=51: there are not so many stages; give at most timesteps=50"),
        (
            {"prediction": "previous"},
            "loss=both: cross-entropy is the image's, which is not predicted; give loss=bound",
        ),
        ({"binarize": "none"}, "binarize=none: input should be 'bernoulli' or 'threshold'"),
        ({"colour": True}, "binarize=bernoulli: colours cannot be made black and white"),
    ],
)
def test_wrong_values_are_one_line(values, said):
    with pytest.raises(UserError) as error:
        validate(BitFlipConfig, values)
    assert str(error.value).startswith(said)
    assert len(str(error.value).splitlines()) == 1


def test_a_size_that_cannot_be_halved_is_one_line():
    class Odd(Shape):
        shape = (1, 14, 14)

    with pytest.raises(UserError, match=r"images of 14×14 pixels .*: patch_size=2 and 2 resolutions .* image_size=16$"):
        method(Odd)


def test_a_mistake_ends_the_recipe_with_one_line(stages, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    cases = [
        ("channels=[8, 8, 8, 8]", "error: channels=[8, 8, 8, 8]: images of 8×8 pixels cannot be halved so often: "),
        (f"model={foreign}", f"error: model={foreign}: holds a ddpm, not a bitflip; "),
        ("delta_start=0.7", "error: delta_start=0.7: input should be less than 0.5; "),
    ]
    for word, said in cases:
        words = [word, f"output_dir={tmp_path / 'runs' / 'x'}"]
        code, printed, errors = stages.answer("--recipe", "images/bitflip", *words)
        assert code == 2, printed + errors
        lines = errors.strip().splitlines()
        assert len(lines) == 1, errors
        assert lines[0].startswith(said)
        assert not (tmp_path / "runs").exists()
