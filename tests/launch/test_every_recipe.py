"""Every recipe that trains has a test that two processes do what one does; those that had none are tested here."""

import re

import pytest

from pipelines.runner import list_recipes
from pipelines.training import LoopConfig
from tests.images.conftest import check_two_processes

_IMAGES = ["max_train=96", "max_test=24", "lr_scheduler=constant", "report_to=none", "logging_steps=1", "save_steps=4"]
HERE = {
    "images/classifier": ([*_IMAGES, "max_steps=4", "width=8"], 16),
    "images/vae_blur": (
        [*_IMAGES, "max_steps=4", "architecture=mlp", "hidden=16", "latent_dim=4", "betas=[1.0]"],
        16,
    ),
}
# Recipe -> the file whose test_two_processes… trains it in one process and in two.
ELSEWHERE = {
    **{f"summarization/{name}": "chain/test_launch.py" for name in ("sft", "reward", "ppo", "dpo", "listwise")},
    **{f"summarization/{name}": "chain/test_launch.py" for name in ("grpo", "rloo")},
    "summarization/pretrain": "chain/test_pretraining.py",
    "images/vae": "images/test_image_loop.py",
    "images/ddpm": "images/test_ddpm.py",
    "images/bitflip": "images/test_bitflip.py",
    "images/gan": "images/test_gan.py",
    "prompting/soft": "prompting/test_soft.py",
    "prompting/word_model": "prompting/test_word_model.py",
}


def trains() -> set[str]:
    """The recipes that have an optimizer of their own."""
    return {name for name, recipe in list_recipes() if issubclass(recipe.config_class, LoopConfig)}


def test_every_recipe_that_trains_is_tested_in_two_processes(root):
    assert trains() == set(HERE) | set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        text = (root / "tests" / file).read_text(encoding="utf-8")
        assert re.search(r"def test_two_processes\w*\(", text)
        assert name.rpartition("/")[2] in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", HERE)
def test_two_processes_do_what_one_does(launching, tmp_path, recipe):
    words, batch_size = HERE[recipe]
    check_two_processes(launching, tmp_path, recipe, words, batch_size)
