"""Every recipe that trains has a test that two processes do what one does; those that had none are tested here."""

import json
import re

import pytest

from pipelines.runner import list_recipes
from pipelines.training import LoopConfig
from tests.images.conftest import check_two_processes

_IMAGES = ["max_train=96", "max_test=24", "lr_scheduler=constant", "report_to=none", "logging_steps=1", "save_steps=4"]
CLASSIFIER = [*_IMAGES, "max_steps=4", "width=8", "dropout=0.0"]
BLUR = [*_IMAGES, "max_steps=4", "architecture=mlp", "hidden=16", "latent_dim=4", "betas=[1.0]", "precision=fp32"]
HERE = {"images/classifier", "images/vae_blur"}
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
    assert trains() == HERE | set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        text = (root / "tests" / file).read_text(encoding="utf-8")
        assert re.search(r"def test_two_processes\w*\(", text)
        assert name.rpartition("/")[2] in text


@pytest.mark.slow
def test_two_processes_train_the_classifier_of_one(launching, tmp_path):
    check_two_processes(launching, tmp_path, "images/classifier", CLASSIFIER, batch_size=16)


@pytest.mark.slow
def test_two_processes_measure_the_blur_that_one_does(launching, root, tmp_path):
    """This recipe keeps no weights, only what it measures of the models it trains."""
    one, two, ranks = tmp_path / "one", tmp_path / "two", tmp_path / "ranks"
    ranks.mkdir()
    code, printed = launching.run("--recipe", "images/vae_blur", *BLUR, "batch_size=16", f"output_dir={one}")
    assert code == 0, printed[-3000:]
    words = ["--config_file", str(root / "accelerate_configs" / "cpu_ddp.yaml")]
    words += [str(root / "tests" / "chain" / "joined.py"), str(ranks), str(root / "recipes" / "images" / "vae_blur.py")]
    words += [*BLUR, "batch_size=8", f"output_dir={two}"]
    code, _, errors = launching.answer("--launch", *words, cwd=root, env={"ACCELERATE_USE_CPU": "true"})
    assert code == 0, errors[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    metrics = [json.loads((folder / "stage.json").read_text())["metrics"] for folder in (one, two)]
    assert len(metrics[0]) >= 6
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6, abs=1e-6)
