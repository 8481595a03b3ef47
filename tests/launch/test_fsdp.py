"""Fully sharded training on the CPU: SFT ends with the weights of one process; what cannot be cut is said early."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from tests.chain.conftest import CHAIN, digests
from tests.launch.conftest import ROOT
from tests.launch.test_killed_rank import Forked, checkpoint_in, wait_for

_STEPS = ["copy_steps=2", "max_steps=10", "save_steps=4", "logging_steps=2", "dropout=0.0", "optimizer=adamw"]
_STEPS += ["learning_rate=0.002", "lr_scheduler=constant", "warmup_ratio=0.0", "report_to=none"]
_CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def fsdp(tmp_path) -> list[str]:
    """The shipped file's words for two processes of a machine without GPUs."""
    values = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())
    file = tmp_path / "fsdp.yaml"
    file.write_text(yaml.safe_dump(values | {"num_processes": 2, "use_cpu": True, "main_process_port": 0}))
    return ["--config_file", str(file)]


def disturbed(folder: Path, seconds: float = 0.0) -> list[str]:
    return [str(ROOT / "tests" / "launch" / "disturbed.py"), str(folder), str(seconds)]


@pytest.mark.slow
def test_sft_in_parts_ends_with_the_weights_of_the_whole(begun, fsdp, tmp_path):
    from transformers import T5ForConditionalGeneration

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        shutil.copytree(begun.folder, folder)
    words = ["--config", str(CHAIN), *_STEPS, f"output_dir={whole}", "batch_size=8"]
    code, printed = begun.server.run("--recipe", "summarization/sft", *words)
    assert code == 0, printed[-3000:]
    launch = [*fsdp, *disturbed(tmp_path / "ranks"), *begun.words("sft", parts, *_STEPS, "batch_size=4")]
    code, printed, errors = begun.server.answer("--launch", *launch, cwd=ROOT, env=_CPU)
    assert code == 0, errors[-3000:]
    assert [(tmp_path / "ranks" / f"parameters-{rank}").read_text() for rank in range(2)] == ["DTensor"] * 2
    one, two = (load_file(folder / "sft" / "model.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys()
    assert max(float(abs(one[name] - two[name]).max()) for name in one) <= 1e-5
    model, found = T5ForConditionalGeneration.from_pretrained(parts / "sft", output_loading_info=True)
    assert not any(found.values()), found
    assert model.lm_head.weight.shape == model.shared.weight.shape


@pytest.mark.slow
def test_sft_in_parts_begins_afresh_when_it_was_killed(begun, fsdp, tmp_path):
    killed, whole, errors = tmp_path / "killed", tmp_path / "undisturbed", tmp_path / "run.err"
    for folder in (killed, whole):
        shutil.copytree(begun.folder, folder)
    words = begun.words("sft", killed, *_STEPS, "batch_size=4")
    with Forked(begun.server, ["--launch", *fsdp, *disturbed(tmp_path / "ranks", 0.2), *words], tmp_path) as process:
        wait_for(checkpoint_in(killed), process, 300, errors)
        os.kill(int((tmp_path / "ranks" / "rank-1").read_text()), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    for folder in (killed, whole):
        words = begun.words("sft", folder, *_STEPS, "batch_size=4")
        code, _, said = begun.server.answer("--launch", *fsdp, *words, cwd=ROOT, env=_CPU)
        assert code == 0, said[-3000:]
    assert digests(killed) == digests(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("summarization/dpo", [], "error: distributed_type=fsdp: this recipe needs the whole model in each process"),
        ("images/vae", [], "error: distributed_type=fsdp: this recipe needs the whole model in each process"),
        ("summarization/sft", ["optimizer=adafactor"], "error: optimizer=adafactor: it keeps the means of whole rows"),
    ],
)
def test_what_cannot_be_cut_is_said_before_work(preferred, fsdp, tmp_path, recipe, words, says):
    run_dir, stage = tmp_path / "run", recipe.rpartition("/")[2]
    shutil.copytree(preferred.folder, run_dir)
    shutil.rmtree(run_dir / stage, ignore_errors=True)
    words += (
        ["--config", str(CHAIN), f"output_dir={run_dir}"] if "summ" in recipe else [f"output_dir={run_dir / stage}"]
    )
    launch = [*fsdp, str(ROOT / "recipes" / f"{recipe}.py"), *words]
    code, _, errors = preferred.server.answer("--launch", *launch, cwd=ROOT, env=_CPU)
    assert code != 0
    assert errors.count(says) == 1, errors[-3000:]
    assert not (run_dir / stage).exists()


def test_a_chain_is_refused_stage_by_stage_before_anything_runs(begun, tmp_path):
    file = str(ROOT / "accelerate_configs" / "fsdp.yaml")
    words = ["run", str(CHAIN), f"dataset={begun.data}", "--output_dir", str(tmp_path / "run")]
    code, printed, errors = begun.server.answer(*words, "--launcher", "accelerate", "--config_file", file)
    assert (code, printed) == (2, "")
    refused = [line.partition("=")[0] for line in errors.splitlines()]
    assert refused == [f"error: {stage} under" for stage in ("reward", "ppo", "dpo")]
    assert not (tmp_path / "run").exists()
