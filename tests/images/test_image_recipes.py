"""The image families' recipes: their YAML files say what was measured, and each is launched as its comment says."""

import json
import re

import pytest

from pipelines.config import read_yaml, validate
from pipelines.runner import Chain, load_recipe, shared_folder

FILES = {"ddpm": "ddpm", "bitflip": "bitflip", "vae_mlp": "vae_course", "vae_conv": "vae", "gan": "gan"}
"""YAML file of a recipe -> the stage of the chain ``mnist`` that was measured with the same fields."""
OWN = {"sample_steps", "output_dir", "dataset"}
TINY = ["max_train=120", "max_test=20", "max_steps=4", "batch_size=16", "logging_steps=1", "save_steps=2"]
TINY += ["sample_steps=2", "report_to=none"]
TINIER = {
    "ddpm": ["channels=[8, 8, 8]", "inference_steps=2"],
    "bitflip": ["channels=[8, 8]", "inference_steps=2", "eval_steps=2"],
    "vae_mlp": ["hidden=16", "importance_samples=2", "eval_steps=2"],
    "vae_conv": ["hidden=16", "width=8", "importance_samples=2", "eval_steps=2"],
    "gan": ["hidden=16", "width=8"],
}


def recipe_of(name: str) -> str:
    return name.partition("_")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_recipes_own_file_says_what_the_chain_was_measured_with(name):
    file = shared_folder("recipes") / "images" / f"{name}.yaml"
    own = validate(load_recipe(f"images/{recipe_of(name)}").config_class, read_yaml(file))
    chain = Chain.load("mnist")
    stage = FILES[name]
    measured = validate(chain.recipes[stage].config_class, {**chain.stages[stage], "dataset": "digits"})
    differing = {key for key in vars(own) if getattr(own, key) != getattr(measured, key)}
    assert differing <= OWN
    assert own.sample_steps
    assert own.max_steps >= 2 * own.sample_steps


def test_the_chain_on_digits_draws_samples_while_it_trains():
    chain = Chain.load("images")
    configured = {
        stage: validate(chain.recipes[stage].config_class, chain.stages[stage])
        for stage in chain.stages
        if stage != "measure"
    }
    for stage in ("ddpm", "bitflip", "vae", "gan"):
        assert configured[stage].sample_steps, stage
        assert configured[stage].max_steps >= 2 * configured[stage].sample_steps, stage


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_launched_as_its_file_says(stages, root, tmp_path, name):
    """With its own networks' fields made tiny, on images that the command line names."""
    text = (root / "recipes" / "images" / f"{name}.yaml").read_text()
    command = re.search(r"^# +accelerate launch (.*?)\n\n", text, flags=re.S | re.M).group(1)
    words = command.replace("\\\n#", " ").split()
    assert words[-1] == "dataset=FOLDER_WITH_MNIST"
    out = tmp_path / "run"
    words = [*words[:-1], "dataset=digits", *TINY, *TINIER[name], f"output_dir={out}"]
    code, printed, errors = stages.answer("--launch", *words, cwd=root, env={"ACCELERATE_USE_CPU": "true"})
    assert code == 0, printed + errors
    assert json.loads((out / "stage.json").read_text())["recipe"] == f"images/{recipe_of(name)}"
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    assert (out / "model_index.json").is_file()
