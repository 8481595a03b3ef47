"""Fully sharded training on the CPU ends with the weights of one process; what cannot be cut is said before work."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from pipelines.config import validate
from pipelines.runner import list_recipes
from tests.chain.conftest import CHAIN, digests
from tests.launch.conftest import ROOT
from tests.launch.test_killed_rank import Forked, checkpoint_in, wait_for
from tests.prompting.conftest import write_word_files

_STEPS = ["copy_steps=2", "max_steps=10", "save_steps=4", "logging_steps=2", "dropout=0.0", "optimizer=adamw"]
_STEPS += ["learning_rate=0.002", "lr_scheduler=constant", "warmup_ratio=0.0", "report_to=none"]
_TEXTS = ["max_source_length=40", "max_target_length=12", "precision=fp32", "report_to=none", "learning_rate=0.002"]
_SMALL = [*_TEXTS, "logging_steps=2", "save_steps=4", "max_steps=8"]
_ROLLOUTS = ["reward={}/reward", "dataset={}/corpus", "rollouts=3", "save_steps=2", "sources_per_rollout=8"]
_ROLLOUTS += ["samples_per_source=2", "mini_batch_size=8"]
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


def ends_alike(server, fsdp, recipe: str, words: list[str], folder: Path, batch_size: int = 8) -> tuple[Path, Path]:
    """Train in one process and in two with the weights in parts; compare what is left. Returns both stages' folders."""
    one, parts = folder / "one", folder / "parts"
    code, printed = server.run("--recipe", recipe, *words, f"batch_size={batch_size}", f"output_dir={one}")
    assert code == 0, printed[-3000:]
    launch = [*fsdp, *disturbed(folder / "ranks"), str(ROOT / "recipes" / f"{recipe}.py"), *words]
    launch += [f"batch_size={batch_size // 2}", f"output_dir={parts}"]
    code, _, errors = server.answer("--launch", *launch, cwd=ROOT, env=_CPU)
    assert code == 0, errors[-3000:]
    assert [(folder / "ranks" / f"parameters-{rank}").read_text() for rank in range(2)] == ["DTensor"] * 2
    weights = [load_file(path / "model.safetensors") for path in (one, parts)]
    assert weights[0].keys() == weights[1].keys()
    assert max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]) <= 1e-5
    metrics = [json.loads((path / "stage.json").read_text())["metrics"] for path in (one, parts)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-4)
    architectures = [json.loads((path / "config.json").read_text())["architectures"] for path in (one, parts)]
    assert architectures[0] == architectures[1]
    return one, parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("reward", ["preferences={}/preferences", "dropout=false"]),
        ("dpo", ["preferences={}/preferences"]),
        ("dpo", ["preferences={}/preferences", "precompute_ref_log_probs=false"]),
        ("listwise", ["rankings={}/preferences/rankings"]),
        ("ppo", ["separate_critic=true", "adaptive_kl=true", *_ROLLOUTS]),
        ("grpo", _ROLLOUTS),
        ("rloo", _ROLLOUTS),
    ],
    ids=["reward", "dpo-cached", "dpo-online", "listwise", "ppo", "grpo", "rloo"],
)
def test_alignment_in_parts_ends_with_the_weights_of_the_whole(preferred, fsdp, tmp_path, recipe, words):
    steps = _TEXTS if words[-1] == _ROLLOUTS[-1] else _SMALL
    words = [word.format(preferred.folder) for word in words] + [f"model={preferred.folder / 'sft'}", *steps]
    one, parts = ends_alike(preferred.server, fsdp, f"summarization/{recipe}", words, tmp_path)
    began = load_file(preferred.folder / "sft" / "model.safetensors")
    after = load_file(parts / "model.safetensors")
    # A reward model's names begin with that of its trunk.
    moved = [abs(after[a] - began[b]).max() for a in after for b in began if a == b or a.endswith(f".{b}")]
    assert len(moved) > 10
    assert max(moved) > 1e-3
    if recipe == "ppo":
        for file in ("value_head.safetensors", "critic/model.safetensors"):
            critics = [load_file(folder / file) for folder in (one, parts)]
            assert critics[0].keys() == critics[1].keys()
            assert max(float(abs(critics[0][name] - critics[1][name]).max()) for name in critics[0]) <= 1e-5


@pytest.mark.slow
def test_pretraining_in_parts_ends_with_the_weights_of_the_whole(begun, fsdp, tmp_path):
    """Summaries are written on the way, by each process as many words as it takes."""
    from datasets import load_from_disk

    documents = load_from_disk(str(begun.folder / "corpus"))["train"]["document"]
    lines = [" ".join(documents[k].capitalize() for k in (i, i * i % 96, 5 * i % 96)) for i in range(len(documents))]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = [f"text={tmp_path / 'text.jsonl'}", f"pairs={begun.folder / 'corpus'}"]
    words = [*data, f"tokenizer={begun.folder / 'tokenizer'}", *_SMALL, "d_model=32", "d_kv=8", "d_ff=64"]
    words += ["num_layers=1", "gap_choice=principal", "eval_steps=4", "rouge_examples=7", "dropout=0.0"]
    words += ["max_target_length=16", "text_validation_fraction=0.2"]
    one, _ = ends_alike(begun.server, fsdp, "summarization/pretrain", words, tmp_path)
    history = json.loads((one / "log_history.json").read_text())
    assert sum("eval_rouge1" in entry for entry in history) >= 2


@pytest.mark.slow
def test_a_causal_model_in_parts_ends_with_the_weights_of_the_whole(begun, fsdp, tmp_path):
    words = ["max_steps=6", "hidden_size=16", "intermediate_size=32", "num_layers=2", "num_heads=2", "row_length=96"]
    words += ["at_least=1", "logging_steps=1", "save_steps=2", "precision=fp32", "report_to=none"]
    ends_alike(begun.server, fsdp, "prompting/word_model", [*write_word_files(tmp_path), *words], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("summarization/ppo", ["lora_r=2"], "error: lora_r=2: adapters are trained beside a model that is whole"),
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
    words += ["ppo.lora_r=2", "dpo.lora_r=2"]
    code, printed, errors = begun.server.answer(*words, "--launcher", "accelerate", "--config_file", file)
    assert (code, printed) == (2, "")
    refused = [line.partition(":")[2].strip() for line in errors.splitlines()]
    assert [line.partition(":")[0] for line in refused] == ["sft.optimizer=adafactor", "ppo.lora_r=2", "dpo.lora_r=2"]
    assert not (tmp_path / "run").exists()


def test_a_chain_of_image_models_is_refused_before_anything_runs(begun, tmp_path):
    file = str(ROOT / "accelerate_configs" / "fsdp.yaml")
    words = ["run", "images", "--output_dir", str(tmp_path / "run"), "--launcher", "accelerate", "--config_file", file]
    code, printed, errors = begun.server.answer(*words)
    assert (code, printed) == (2, "")
    line = "error: vae under=fsdp: this recipe needs the whole model in each process"
    assert sum(each.startswith(line) for each in errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "given", "says"),
    [
        ("dpo", {"lora_r": 4}, "lora_r=4: adapters are trained beside a model that is whole in each process"),
        (
            "dpo",
            {"sync_ref_model": True, "precompute_ref_log_probs": False},
            "sync_ref_model=True: a reference in parts cannot be moved and saved",
        ),
        ("ppo", {"lora_r": 4}, "lora_r=4: adapters are trained beside a model that is whole in each process"),
        ("listwise", {"lora_r": 4}, "lora_r=4: adapters are trained beside a model that is whole in each process"),
    ],
)
def test_settings_that_need_the_whole_model_are_one_line(preferred, recipe, given, says):
    needs = {"dpo": {"preferences": "preferences"}, "listwise": {"rankings": "preferences/rankings"}}
    needs = needs.get(recipe, {"dataset": "corpus", "reward": "reward"})
    files = {name: str(preferred.folder / place) for name, place in needs.items()}
    config = validate(
        dict(list_recipes())[f"summarization/{recipe}"].config_class,
        {"model": str(preferred.folder / "sft"), **files, **given},
    )
    assert not config.launch_problems("ddp")
    (problem,) = config.launch_problems("fsdp")
    assert f"{problem.what}={problem.value}: {problem.problem}" == says
