"""The GAN as a stage: it learns, resumes exactly, is the same in two processes, and says what is wrong in one line."""

import json

import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.data import Images
from pipelines.images.gan import GANConfig
from pipelines.images.gan_method import GANMethod
from pipelines.images.gan_pipeline import GANPipeline
from pipelines.images.loop import Loop, new_accelerator
from pipelines.images.method import Batch, Draws
from tests.images.conftest import check_resumes, check_two_processes

SMALL = ["hidden=16", "width=8", "latent_dim=4", "report_to=none", "max_train=128", "max_test=40"]


class Shape:
    """What a method reads of an ImageSet."""

    shape = (1, 8, 8)


def method(**values) -> GANMethod:
    torch.manual_seed(0)
    sizes = {"hidden": 16, "width": 8, "latent_dim": 4}
    return GANMethod(validate(GANConfig, sizes | values), Shape)


def batch(rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(rows, 1, 8, 8, generator=generator), torch.zeros(rows, dtype=torch.int64))


def grey_images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(levels, torch.zeros(count, dtype=torch.int64))


def draws(rows: int = 6, seed: int = 2) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), rows)


def test_the_losses_are_those_of_the_two_networks():
    made = method(r1=2.0)
    generator, discriminator = made.parts["generator"], made.parts["discriminator"]
    loss, logged = made.loss("discriminator", batch(), draws(), 0)
    with torch.no_grad():
        fake = generator(draws().normal(4))
        real_d = discriminator(2 * batch().images - 1).sigmoid()
        fake_d = discriminator(fake).sigmoid()
        wanted = -real_d.log().mean() - (1 - fake_d).log().mean()
    assert loss.item() - 2 * logged["r1"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logged["probability_real"].item() == pytest.approx(real_d.mean().item(), rel=1e-6)
    assert logged["probability_fake"].item() == pytest.approx(fake_d.mean().item(), rel=1e-6)
    for kind, formula in (("nonsaturating", -fake_d.log()), ("minimax", (1 - fake_d).log())):
        made.config.loss = kind
        loss, logged = made.loss("generator", batch(), draws(), 0)
        assert loss.item() == pytest.approx(formula.mean().item(), rel=1e-4)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in generator.parameters()]).norm()
        assert logged[f"gradient_norm_{kind}"].norm().item() == pytest.approx(norm.item(), rel=1e-4)
        generator.zero_grad()


@pytest.mark.parametrize("kind", ["nonsaturating", "minimax"])
def test_the_logged_norm_is_that_of_the_steps_gradient_however_many_parts_it_has(tmp_path, kind):
    values = {"batch_size": 4, "gradient_accumulation": 3, "logging_steps": 1, "save_steps": 100, "loss": kind}
    values |= {"report_to": "none", "precision": "fp32", "output_dir": str(tmp_path / "run")}
    made = method(**values)
    loop = Loop(made, *[grey_images()] * 2, made.config, new_accelerator(made.config), 3)
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    loop.optimizers["generator"].register_step_pre_hook(note)
    history = loop.run()
    assert [entry[f"gradient_norm_{kind}"] for entry in history] == pytest.approx(norms, rel=1e-5)
    assert len(norms) == 3


def test_two_time_scales():
    rates = {
        name: optimizer.param_groups[0]["lr"]
        for name, optimizer in method(learning_rate=1e-4, discriminator_learning_rate=4e-4).optimizers().items()
    }
    assert rates == {"generator": 1e-4, "discriminator": 4e-4}


def test_a_sure_discriminator_starves_the_minimax_loss_only():
    made = method()
    with torch.no_grad():
        made.parts["discriminator"].layers[-1].bias.fill_(-20)  # D(G(z)) → 0
    _, logged = made.loss("generator", batch(), draws(), 0)
    norms = {kind: logged[f"gradient_norm_{kind}"].norm() for kind in ("minimax", "nonsaturating")}
    assert 0 < norms["minimax"] < 1e-6 * norms["nonsaturating"]


def test_a_killed_run_goes_on_exactly(stages, tmp_path):
    words = [*SMALL, "batch_size=32", "max_steps=9", "save_steps=3", "logging_steps=1", "sample_steps=3"]
    words += ["r1=0.5", "spectral_norm=true", "ema_decay=0.9", "discriminator_learning_rate=0.002"]
    folder = check_resumes(stages, tmp_path, "images/gan", words)
    history = json.loads((folder / "log_history.json").read_text())
    assert len(history) == 9
    assert {"discriminator_loss", "generator_loss", "gradient_norm_minimax", "gradient_norm_nonsaturating"} <= set(
        history[0]
    )
    loaded = GANPipeline.from_pretrained(folder)
    images = loaded(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (3, 1, 8, 8)
    assert loaded.discriminator.config.spectral_norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "discriminator", [[], ["spectral_norm=true", "discriminator_learning_rate=0.002"]], ids=["plain", "spectral norm"]
)
def test_two_processes_do_what_one_does(stages, tmp_path, discriminator):
    words = [*SMALL, "max_steps=6", "save_steps=3", "logging_steps=1", "sample_steps=3", "r1=0.5", "ema_decay=0.9"]
    words += discriminator
    one, _ = check_two_processes(stages, tmp_path, "images/gan", words, batch_size=32)
    history = json.loads((one / "log_history.json").read_text())
    assert history[0]["gradient_norm_nonsaturating"] != history[-1]["gradient_norm_nonsaturating"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages=4"], "error: stages=4: the images' side of 8 pixels cannot be halved 4 times"),
        (["batch_size=1"], "error: batch_size=1: batch norm needs more than one image"),
        (["loss=hinge"], "error: loss=hinge"),
        (["width=12"], "error: width=12: input should be a multiple of 8"),
        (["r1=-1"], "error: r1=-1"),
    ],
)
def test_a_mistake_is_one_line(stages, tmp_path, words, said):
    code, _, errors = stages.answer("--recipe", "images/gan", *words, f"output_dir={tmp_path / 'run'}")
    assert code == 2
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith(said)
    assert not list(tmp_path.iterdir())


def test_another_familys_checkpoint_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(UserError, match="holds a ddpm, not a gan"):
        validate(GANConfig, {"model": str(tmp_path)})
