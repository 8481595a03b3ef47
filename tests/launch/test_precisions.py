"""Which arithmetic each recipe does, as docs/launching.md says, and that it is that one."""

import json
import shutil
import typing

import pytest
from safetensors import safe_open

from pipelines.config import fields_of
from pipelines.precision import choose_precision, precision_problems
from pipelines.runner import list_recipes
from pipelines.training import LoopConfig
from tests.chain.conftest import CHAIN
from tests.prompting.conftest import write_word_files

HEAD = "| recipe | precision | several processes |\n|---|---|---|\n"
_IMAGES = ["max_train=64", "max_test=16", "batch_size=16", "max_steps=4", "report_to=none"]
_STEPS = ["max_steps=4", "save_steps=4", "logging_steps=2", "report_to=none"]
_VAE = ["architecture=mlp", "hidden=16", "latent_dim=4", "importance_samples=0"]
_ROLLOUTS = ["rollouts=2", "save_steps=2", "logging_steps=1", "report_to=none"]
_TEXTS = ["max_source_length=40", "max_target_length=12"]
_GROUPS = ["sources_per_rollout=8", "samples_per_source=2", "mini_batch_size=8", "group_epochs=1", "batch_size=8"]
_GROUPS += ["model={}/sft", "reward={}/reward", "dataset={}/corpus"]
_SOFT = ["model={}/sft", "task=summarization", "dataset={}/corpus", "virtual_tokens=2", "repeats=1"]
TINY = {
    "images/vae": [*_IMAGES, *_VAE],
    "images/vae_blur": [*_IMAGES, *_VAE, "betas=[1.0]", "likelihoods=[bernoulli]"],
    "images/ddpm": [*_IMAGES, "channels=[8, 16]", "timesteps=8", "inference_steps=2"],
    "images/bitflip": [*_IMAGES, "channels=[8, 16]", "timesteps=4"],
    "images/gan": [*_IMAGES, "hidden=16", "width=8", "latent_dim=4"],
    "images/classifier": [*_IMAGES, "width=8"],
    "summarization/sft": [*_STEPS, "copy_steps=0"],
    "summarization/reward": _STEPS,
    "summarization/dpo": _STEPS,
    "summarization/ppo": _ROLLOUTS,
    "summarization/listwise": [*_STEPS, *_TEXTS, "batch_size=8", "model={}/sft", "rankings={}/preferences/rankings"],
    "summarization/grpo": [*_ROLLOUTS, *_TEXTS, *_GROUPS],
    "summarization/rloo": [*_ROLLOUTS, *_TEXTS, *_GROUPS],
    "prompting/word_model": [*_STEPS, "hidden_size=16", "num_heads=2", "num_layers=1", "row_length=96", "at_least=1"],
    "prompting/soft": [*_STEPS, *_SOFT],
}
_ONE_OF_A_CHAIN = tuple(f"summarization/{stage}" for stage in ("sft", "reward", "dpo", "ppo"))
QUICK = ("images/vae", "summarization/sft")


def support_table() -> str:
    """The table in docs/launching.md."""
    rows = []
    for name, recipe in list_recipes():
        fields = fields_of(recipe.config_class)
        if "precision" not in fields:
            continue
        choices = ", ".join(typing.get_args(fields["precision"].annotation))
        strategies = ", ".join(getattr(recipe.config_class, "parallelism", ()))
        rows.append(f"| {name} | {choices} | {strategies or 'trains nothing'} |\n")
    return HEAD + "".join(rows)


def test_the_table_in_the_documentation_is_that_of_the_recipes(root):
    text = (root / "docs" / "launching.md").read_text(encoding="utf-8")
    assert support_table() in text, support_table()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK[1] else pytest.mark.slow) for name in TINY]
)
def test_bf16_trains_float32_weights(preferred_or_begun, tmp_path, name):
    world = preferred_or_begun(name)
    run_dir = tmp_path / "run"
    shutil.copytree(world.folder, run_dir)
    stage = name.rpartition("/")[2]
    shutil.rmtree(run_dir / stage, ignore_errors=True)
    words = [*(word.format(run_dir) for word in TINY[name]), "precision=bf16"]
    if name == "prompting/word_model":
        words += write_word_files(tmp_path)
    if name in _ONE_OF_A_CHAIN:
        words += ["--config", str(CHAIN), f"output_dir={run_dir}"]
    else:
        words.append(f"output_dir={run_dir / stage}")
    code, printed = world.server.run("--recipe", name, *words)
    assert code == 0, printed[-3000:]
    found = json.loads((run_dir / stage / "stage.json").read_text())
    assert found["config"]["precision"] == "bf16"
    assert found["metrics"]
    types = set()
    for file in (run_dir / stage).rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            types |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 - no mapping
    # images/vae_blur keeps no weights; batch norm counts in whole numbers.
    assert types - {"I64"} == (set() if name == "images/vae_blur" else {"F32"})


def test_float16_on_a_cpu_is_one_line_before_work(begun, tmp_path):
    if choose_precision("auto") == "bf16" and not precision_problems("fp16"):
        pytest.skip("there is a GPU")
    words = [*TINY["images/vae"], "precision=fp16", f"output_dir={tmp_path / 'vae'}"]
    code, printed, errors = begun.server.answer("--recipe", "images/vae", *words, env={"ACCELERATE_USE_CPU": "true"})
    line = "error: precision=fp16: float16 needs a GPU; give precision=auto, bf16 or fp32\n"
    assert (code, printed, errors) == (2, "", line)
    assert not (tmp_path / "vae").exists()


@pytest.mark.slow
def test_the_recipes_field_decides_not_the_launcher(begun, tmp_path):
    """accelerate's own mixed_precision, from its file or its command line, reaches a process as a variable."""
    run_dirs = [tmp_path / "plain", tmp_path / "asked"]
    for run_dir, variables in zip(run_dirs, ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}), strict=True):
        shutil.copytree(begun.folder, run_dir)
        words = ["--config", str(CHAIN), *TINY["summarization/sft"], "precision=fp32", f"output_dir={run_dir}"]
        code, _, errors = begun.server.answer("--recipe", "summarization/sft", *words, env=variables)
        assert code == 0, errors[-3000:]
    first, second = (run_dir / "sft" / "model.safetensors" for run_dir in run_dirs)
    assert first.read_bytes() == second.read_bytes()


def test_automatic_choice_is_what_was_measured(monkeypatch, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is asked what it can, not measured")
    from pipelines.cache import cache_folder
    from pipelines.precision import processor

    monkeypatch.setenv("GENALIGN_CACHE", str(tmp_path))
    key = f"{processor()} / torch {torch.__version__}"
    for gain, chosen in ((0.7, "fp32"), (1.1, "fp32"), (1.3, "bf16"), (4.0, "bf16")):
        (cache_folder() / "precision.json").write_text(json.dumps({key: gain}))
        assert choose_precision("auto") == chosen
        assert (choose_precision("fp32"), choose_precision("bf16")) == ("fp32", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_float16_scales_its_loss(begun, tmp_path, name):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("float16 needs a GPU")
    run_dir = tmp_path / "run"
    shutil.copytree(begun.folder, run_dir)
    stage = name.rpartition("/")[2]
    words = [*TINY[name], "precision=fp16", "max_steps=40", "save_steps=20", "logging_steps=1"]
    chain = ["--config", str(CHAIN), f"output_dir={run_dir}"]
    words += chain if name.startswith("summarization") else [f"output_dir={run_dir / stage}"]
    code, printed = begun.server.run("--recipe", name, *words)
    assert code == 0, printed[-3000:]
    losses = [e["loss"] for e in json.loads((run_dir / stage / "log_history.json").read_text()) if "loss" in e]
    assert losses[-1] < losses[0]


def test_every_training_recipe_is_tried():
    trains = {name for name, recipe in list_recipes() if issubclass(recipe.config_class, LoopConfig)}
    assert trains == {*TINY, "summarization/pretrain"}  # that one: seq2seq/test_pretrain_speed.py
