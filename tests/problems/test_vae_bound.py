"""The variational autoencoder's exercise: its stage and page, other models, refusals (the bound itself: test_vae)."""

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems.vae_bound import VAEBoundConfig
from pipelines.runner import load_recipe
from pipelines.stage import execute
from tests.problems.pages import assert_page_is_filled


@pytest.mark.parametrize("fields", [{}, {"mean": -1.5, "variance": 0.05, "pixels": 3, "seed": 4}])
def test_the_stage_and_its_page(finished, fields, tmp_path):
    given = {"vae": str(finished / "vae"), "samples": 20_000, "output_dir": str(tmp_path / "out")}
    metrics = execute(load_recipe("problems/vae_bound").function, validate(VAEBoundConfig, given | fields))
    assert metrics["vae_bound/checks_failed"] == 0
    assert metrics["vae_bound/gap"] > 0
    assert_page_is_filled(tmp_path / "out")


def test_another_stage_is_refused(finished):
    with pytest.raises(UserError, match=r"holds the result of images\.bitflip"):
        validate(VAEBoundConfig, {"vae": str(finished / "bitflip")})
