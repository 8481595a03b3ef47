"""The GAN's exercise: its stage and page, other densities, refusals (the losses themselves: test_gan_losses)."""

import math

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.gan import GANConfig, gan
from pipelines.problems.gan_game import GANGameConfig, gan_game
from pipelines.runner import load_recipe
from pipelines.stage import execute
from tests.problems.pages import assert_page_is_filled

SMALL = {"test_fraction": 0.25, "max_train": 64, "max_test": 20, "max_steps": 12, "save_steps": 12, "batch_size": 16}
SMALL |= {"precision": "fp32", "report_to": "none", "width": 16, "hidden": 16, "logging_steps": 1}


def trained(folder, **fields):
    execute(gan, validate(GANConfig, SMALL | fields | {"output_dir": str(folder)}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("game") / "gan")


@pytest.mark.parametrize("fields", [{}, {"shift": 0.0, "spread": 1.0, "seed": 3}])
def test_the_stage_and_its_page(folder, fields, tmp_path):
    given = {"gan": folder, "samples": 20_000, "noises": 32, "output_dir": str(tmp_path / "out")}
    metrics = execute(load_recipe("problems/gan_game").function, validate(GANGameConfig, given | fields))
    assert metrics["gan_game/checks_failed"] == 0
    assert_page_is_filled(tmp_path / "out")
    if fields:  # the two densities are one
        assert metrics["gan_game/jensen_shannon"] == pytest.approx(0, abs=1e-9)
        assert metrics["gan_game/value"] == pytest.approx(-math.log(4), abs=1e-9)
    else:
        assert 0.3 < metrics["gan_game/jensen_shannon"] < math.log(2)


def test_a_gan_without_norms_is_refused(tmp_path):
    quiet = trained(tmp_path / "gan", gradient_norms=False, max_steps=2, save_steps=2)
    with pytest.raises(UserError, match="logged no norms"):
        gan_game(validate(GANGameConfig, {"gan": quiet, "output_dir": str(tmp_path / "out")}))
