"""DDPM: samplers against diffusers' own pipelines, guidance, the stage, what is saved, what is refused."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.ddpm import DDPMConfig
from pipelines.images.ddpm_math import guided
from pipelines.images.ddpm_method import DDPMMethod, new_scheduler
from pipelines.images.ddpm_pipeline import ClassConditionalDDPMPipeline
from pipelines.images.ddpm_sampling import denoise, network_output, with_sampler
from pipelines.images.method import Batch, Draws
from pipelines.images.saved import family_of, load_pipeline
from pipelines.images.unet import spread_timesteps
from tests.images.conftest import check_resumes, check_two_processes

SMALL = ["channels=[8, 16]", "timesteps=50", "inference_steps=5", "max_train=128", "max_test=40", "report_to=none"]
STEPS = ["max_steps=6", "save_steps=2", "logging_steps=1"]
# Two channels and more in each group of a normalization: of single ones it takes out again what biases add, and of
# gradients that are 0 but for rounding Adam makes steps as large as the rate.
USUAL = ["channels=[16, 32]", "learning_rate=0.002"]
GENTLE = ["learning_rate=1e-4"]


class Shape:
    """What a method reads of an ImageSet."""

    shape = (1, 8, 8)
    classes = tuple("0123456789")


def method(images=Shape, **values) -> DDPMMethod:
    torch.manual_seed(0)
    sizes = {"channels": [8, 16], "timesteps": 50, "inference_steps": 5}
    made = DDPMMethod(validate(DDPMConfig, sizes | values), images)
    for parameter in made.parts["unet"].conv_out.parameters():  # which begins at 0
        torch.nn.init.normal_(parameter, std=0.1)
    made.parts["unet"].eval()
    return made


def last(stages):
    for stage in stages:
        found = stage
    return found


def batch(rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 10)


def test_samples_are_those_of_diffusers_pipelines():
    made = method()
    unet, generator = made.parts["unet"], torch.Generator()
    plain = DDPMPipeline(unet, made.scheduler)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(4, generator.manual_seed(3), num_inference_steps=50, output_type="pt").images
    ours = last(denoise(unet, with_sampler(made.scheduler, "ddpm"), 4, 50, generator.manual_seed(3))).sample
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), theirs)
    implicit = DDIMPipeline(unet, made.scheduler)
    implicit.set_progress_bar_config(disable=True)
    for eta in (0.0, 0.5):
        theirs = implicit(4, generator.manual_seed(3), eta, 10, output_type="pt").images
        ours = last(denoise(unet, with_sampler(made.scheduler, "ddim"), 4, 10, generator.manual_seed(3), eta=eta))
        assert torch.equal((ours.sample / 2 + 0.5).clamp(0, 1), theirs)


class Gaussian(torch.nn.Module):
    """The exact network for images whose pixels are N(0.3, 0.2²): E[target | x_t]."""

    class config:
        in_channels, sample_size, num_class_embeds = 1, 4, None

    def __init__(self, scheduler, target):
        super().__init__()
        self.scheduler, self.target, self.dtype, self.device = scheduler, target, torch.float32, torch.device("cpu")

    def forward(self, sample, timestep):
        alpha_bar = self.scheduler.alphas_cumprod[timestep]
        original = expected_original(sample, alpha_bar)
        noise = (sample - alpha_bar.sqrt() * original) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * original
        self.sample = {"epsilon": noise, "x0": original, "v": velocity}[self.target]
        return self


def expected_original(noisy, alpha_bar):
    return 0.3 + alpha_bar.sqrt() * 0.04 / (alpha_bar * 0.04 + 1 - alpha_bar) * (noisy - alpha_bar.sqrt() * 0.3)


def exact_spread(scheduler, eta: float) -> float:
    """Standard deviation of what DDIM (with eta = 1: DDPM) draws, whose steps are affine in x_t here."""
    alpha_bars = [*scheduler.alphas_cumprod[scheduler.timesteps].double(), torch.tensor(1.0, dtype=torch.float64)]
    variance = 1.0
    for now, before in itertools.pairwise(alpha_bars):
        drawn = eta**2 * (1 - before) / (1 - now) * (1 - now / before)  # Song et al. 2021, equation 16

        def step(x, now=now, before=before, drawn=drawn):
            original = expected_original(x, now)
            noise = (x - now.sqrt() * original) / (1 - now).sqrt()
            return before.sqrt() * original + (1 - before - drawn).clamp(min=0).sqrt() * noise

        slope = step(torch.tensor(1.0)) - step(torch.tensor(0.0))
        variance = slope**2 * variance + drawn
    return float(variance) ** 0.5


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "target"),
    [
        ("ddpm", 500, 1, "epsilon"),
        ("ddim", 50, 0, "epsilon"),
        ("ddim", 50, 0, "x0"),
        ("ddim", 50, 0, "v"),
        ("ddim", 50, 1, "epsilon"),
        ("dpm_solver", 20, 0, "epsilon"),
        ("dpm_solver", 20, 0, "v"),
    ],
)
def test_every_sampler_draws_from_the_distribution(beta_schedule, sampler, steps, eta, target):
    """With the exact network, samples have the images' mean, and the spread that so many steps lead to."""
    scheduler = new_scheduler(validate(DDPMConfig, {"target": target, "beta_schedule": beta_schedule}))
    chosen, further = with_sampler(scheduler, sampler), {"eta": eta} if sampler == "ddim" else {}
    generator = torch.Generator().manual_seed(0)
    found = last(denoise(Gaussian(scheduler, target), chosen, 400, steps, generator, **further)).sample
    error = 0.2 / math.sqrt(found.numel())
    assert float(found.mean()) == pytest.approx(0.3, abs=4 * error + 0.004)
    spread = 0.2 if sampler == "dpm_solver" else exact_spread(chosen, eta)
    assert float(found.std()) == pytest.approx(spread, abs=4 * error + 0.006 * (sampler == "dpm_solver"))
    assert spread == pytest.approx(0.2, rel=0.25)  # fifty steps cost some of it, the fewer the more


def test_fewer_stages_leave_as_little_of_the_image():
    ends = [
        float(new_scheduler(validate(DDPMConfig, {"timesteps": stages, "inference_steps": 1})).alphas_cumprod[-1])
        for stages in (1000, 200, 50)
    ]
    assert max(ends) < 2e-4
    for stages in (1, 2, 10):
        for schedule in ("linear", "cosine"):
            values = {"timesteps": stages, "inference_steps": 1, "beta_schedule": schedule}
            betas = new_scheduler(validate(DDPMConfig, values)).betas
            assert ((betas > 0) & (betas < 1)).all()


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
def test_the_loss_is_the_squared_error_of_the_target(target):
    made = method(target=target)
    rows, draws = batch(), Draws(torch.Generator().manual_seed(2), 6)
    loss, logged = made.loss("unet", rows, draws, 0)
    draws = Draws(torch.Generator().manual_seed(2), 6)
    times, noise, original = spread_timesteps(draws, 50), draws.normal(1, 8, 8), rows.images * 2 - 1
    noisy = made.scheduler.add_noise(original, noise, times)
    said = made.parts["unet"](noisy, times).sample
    wanted = {"epsilon": noise, "x0": original, "v": made.scheduler.get_velocity(original, noise, times)}[target]
    torch.testing.assert_close(loss, (said - wanted).square().mean())
    assert logged == {}


def test_stages_are_spread_evenly_and_the_same_for_whoever_holds_the_row():
    counts = torch.zeros(10)
    for seed in range(300):
        whole = spread_timesteps(Draws(torch.Generator().manual_seed(seed), 20), 10)
        assert torch.bincount(whole, minlength=10).tolist() == [2] * 10
        parts = [spread_timesteps(Draws(torch.Generator().manual_seed(seed), 20, *p), 10) for p in ((0, 5), (5, 20))]
        assert torch.equal(torch.cat(parts), whole)
        counts[whole[3]] += 1
    assert (counts - 30).abs().max() < 4.5 * math.sqrt(30)  # each row's stage is uniform


def test_labels_are_left_out_at_the_given_rate_and_guidance_looks_twice():
    made = method(class_conditional=True, label_dropout=0.3, guidance_scale=2.0)
    unet, seen = made.parts["unet"], []
    assert unet.config.num_class_embeds == 11
    hook = unet.class_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    rows = batch(600)
    made.loss("unet", rows, Draws(torch.Generator().manual_seed(0), 600), 0)
    hook.remove()
    dropped = seen[0] == 10
    assert abs(float(dropped.float().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 600)
    assert torch.equal(seen[0][~dropped], rows.labels[~dropped])
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor(7), torch.tensor([0, 3, 9, 9])
    with torch.no_grad():
        found = network_output(unet, x, t, labels, 2.0)
        each = [unet(x, t, class_labels=wanted).sample for wanted in (labels, torch.full_like(labels, 10))]
    torch.testing.assert_close(found, guided(*each, 2.0))
    assert not torch.allclose(*each)


def test_a_conditional_pipeline_is_saved_and_loaded(tmp_path):
    made = method(class_conditional=True, guidance_scale=2.0)
    pipeline = made.pipeline()
    pipeline.save_pretrained(tmp_path)
    assert family_of(tmp_path) == "ddpm"
    again = load_pipeline(tmp_path)
    assert isinstance(again, ClassConditionalDDPMPipeline)
    words = {"class_labels": [1, 7, 7], "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
    images = [p(generator=torch.Generator().manual_seed(0), **words).images for p in (pipeline, again)]
    assert torch.equal(*images)
    assert images[0].shape == (3, 1, 8, 8)
    assert 0 <= images[0].min() <= images[0].max() <= 1
    assert again(2, num_inference_steps=2)[0][0].size == (8, 8)
    with pytest.raises(ValueError, match=r"0\.\.9"):
        again(class_labels=[10])


def test_samples_in_blocks_and_by_labels():
    made = method(class_conditional=True)
    labels = torch.arange(10).repeat_interleave(2)
    images = made.sample(20, torch.Generator().manual_seed(0), labels)
    assert images.shape == (20, 1, 8, 8)
    assert made.sample(7, torch.Generator().manual_seed(0)).shape == (7, 1, 8, 8)
    (name, picture), *rest = made.pictures(batch(), torch.Generator().manual_seed(0))
    assert (name, rest) == ("denoising", [])
    assert picture.shape == (10, 5, 1, 8, 8)  # of five steps each is shown


def test_killed_and_resumed_it_ends_the_same_and_is_a_plain_pipeline(stages, tmp_path):
    words = [*SMALL, *STEPS, "eval_steps=2", "sample_steps=3", "dropout=0.1", "class_conditional=false"]
    folder = check_resumes(stages, tmp_path, "images/ddpm", words)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert {"samples.png", "denoising.png"} <= {path.name for path in folder.iterdir()}
    loaded = DDPMPipeline.from_pretrained(folder)
    draw = [
        loaded(2, torch.Generator().manual_seed(1), num_inference_steps=50, output_type="pt").images for _ in range(2)
    ]
    assert torch.equal(*draw)


@pytest.mark.slow
def test_a_process_with_diffusers_alone_draws_the_same(stages, tmp_path):
    code, printed = stages.run("--recipe", "images/ddpm", *SMALL, *STEPS, f"output_dir={tmp_path / 'run'}")
    assert code == 0, printed
    script = (
        "import sys, torch; from diffusers import DDPMPipeline\n"
        f"pipeline = DDPMPipeline.from_pretrained({str(tmp_path / 'run')!r})\n"
        "images = pipeline(3, torch.Generator().manual_seed(4), num_inference_steps=50, output_type='pt').images\n"
        f"assert not any(name.split('.')[0] == 'pipelines' for name in sys.modules)\n"
        f"torch.save(images, {str(tmp_path / 'images.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = load_pipeline(tmp_path / "run")
    here = pipeline(3, torch.Generator().manual_seed(4), num_inference_steps=50, output_type="pt").images
    assert torch.equal(here, torch.load(tmp_path / "images.pt", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "tolerance"), [(GENTLE, 1e-5), (USUAL, 3e-5)], ids=["gentle", "usual"])
@pytest.mark.parametrize("conditional", ["false", "true"])
def test_two_processes_do_what_one_does(stages, tmp_path, conditional, rate, tolerance):
    words = [*SMALL, *STEPS, f"class_conditional={conditional}", "eval_batch_size=15", "eval_steps=3", *rate]
    check_two_processes(stages, tmp_path, "images/ddpm", words, batch_size=16, tolerance=tolerance)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"timesteps": 0, "inference_steps": 1}, "timesteps=0: input should be greater than or equal to 1"),
        ({"sampler": "euler"}, "sampler=euler: input should be 'ddpm', 'ddim' or 'dpm_solver'"),
        ({"target": "x"}, "target=x: input should be 'epsilon', 'x0' or 'v'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: input should be 'linear' or 'cosine'"),
        ({"inference_steps": 2000}, "inference_steps=2000: there are not so many stages; give at most timesteps=1000"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta=0.5: the sampler ddpm has no eta; give sampler=ddim"),
        ({"eta": 2}, "eta=2: input should be less than or equal to 1"),
        ({"guidance_scale": 2}, "guidance_scale=2.0: guidance goes by labels; give class_conditional=true"),
        (
            {"guidance_scale": 2, "class_conditional": True, "label_dropout": 0},
            "guidance_scale=2.0: guidance needs the unconditional model, which is not trained; give label_dropout=0.1",
        ),
        ({"channels": []}, "channels=[]: "),
        ({"channels": [30, 64]}, "channels=[30, 64]: normalization goes by groups of channels; give multiples of 4"),
    ],
)
def test_wrong_values_are_one_line(values, said):
    with pytest.raises(UserError) as error:
        validate(DDPMConfig, values)
    assert str(error.value).startswith(said)
    assert len(str(error.value).splitlines()) == 1


def test_what_the_images_do_not_allow_is_one_line():
    class Odd(Shape):
        shape = (1, 12, 12)

    class Unlabelled(Shape):
        classes = ("all",)

    with pytest.raises(UserError, match=r"channels=\[8, 8, 8, 8\]: images of 12×12 pixels cannot be halved .*=16$"):
        method(Odd, channels=[8, 8, 8, 8])
    with pytest.raises(UserError, match="class_conditional=True: the images have no labels; leave class_conditional"):
        method(Unlabelled, class_conditional=True)


def test_a_mistake_ends_the_recipe_with_one_line(stages, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model_index.json").write_text(json.dumps({"_class_name": "BitFlipPipeline"}))
    cases = [
        (
            "channels=[8, 8, 8, 8, 8]",
            "error: channels=[8, 8, 8, 8, 8]: images of 8×8 pixels cannot be halved so often: ",
        ),
        (f"model={foreign}", f"error: model={foreign}: holds a bitflip, not a ddpm; "),
    ]
    for word, said in cases:
        code, printed, errors = stages.answer("--recipe", "images/ddpm", word, f"output_dir={tmp_path / 'runs' / 'x'}")
        assert code == 2, printed + errors
        lines = errors.strip().splitlines()
        assert len(lines) == 1, errors
        assert lines[0].startswith(said)
        assert not (tmp_path / "runs").exists()
