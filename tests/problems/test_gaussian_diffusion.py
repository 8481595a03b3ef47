"""Gaussian diffusion's exercise: its stage and page, other parameters, refusals (the closed forms: test_ddpm_math)."""

import json

import numpy as np
import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems.gaussian_diffusion import GaussianDiffusionConfig
from pipelines.runner import load_recipe
from pipelines.stage import execute
from tests.problems.pages import assert_page_is_filled


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"timesteps": 6, "stage": 2, "beta_start": 0.3, "beta_end": 0.6, "original": 0.0},
        {"timesteps": 40, "stage": 40, "beta_start": 0.01, "beta_end": 0.01, "noisy": 4.0, "seed": 3},
    ],
)
def test_the_stage_and_its_page(fields, tmp_path):
    config = validate(GaussianDiffusionConfig, {"chains": 30_000, "output_dir": str(tmp_path / "out")} | fields)
    metrics = execute(load_recipe("problems/gaussian_diffusion").function, config)
    assert metrics["gaussian_diffusion/checks_failed"] == 0
    assert_page_is_filled(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "exercise.json").read_text())["values"]
    betas = [config.beta_start, config.beta_end]
    beta = betas[0] + (betas[1] - betas[0]) * (config.stage - 1) / (config.timesteps - 1)
    assert values["beta"] == pytest.approx(beta)
    # least squares knows no factor of x_0 where x_0 is 0; the page quotes it all the same
    alphas = np.cumprod(1 - np.linspace(*betas, config.timesteps))[config.stage - 2 : config.stage]
    assert values["of_original"] == pytest.approx(np.sqrt(alphas[0]) * beta / (1 - alphas[1]), rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "said"), [({"stage": 101}, "lies beyond"), ({"beta_end": 1e-4}, "is below beta_start")]
)
def test_impossible_schedules_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        validate(GaussianDiffusionConfig, fields)
