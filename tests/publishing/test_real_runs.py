"""Whole runs that push what they make: a chain with LoRA, the image stages, a soft prompt on a model of the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from tests.chain.conftest import write_corpus
from tests.publishing.conftest import TOKEN, environment
from tests.publishing.hub import Hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
EXECUTE = """
import re, sys
from huggingface_hub import hf_hub_download
for repo in sys.argv[1:]:
    kind, _, repo = repo.partition(":")
    card = open(hf_hub_download(repo, "README.md", repo_type=kind)).read()
    print("---", repo, flush=True)
    exec(compile(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1], repo, "exec"), {})
"""


def _run(hub: Hub, tmp_path: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        env=environment(hub, tmp_path / "hf"),
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr


def _all_usages_run(hub: Hub, tmp_path: Path) -> None:
    everything = [f"{kind}:{repo_id}" for kind, repo_id in hub.repos]
    _run(hub, tmp_path, "-c", EXECUTE, *everything)
    for kind, repo_id in hub.repos:
        files = hub.files(repo_id, kind)
        card = files["README.md"].decode()
        data = (DatasetCard if kind == "dataset" else ModelCard)(card).data.to_dict()
        assert "genalign" in data["tags"]
        assert "Limitations" in card
        told = [path for path, content in files.items() if str(tmp_path).encode() in content]
        assert told == [], repo_id
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_chain_and_a_soft_prompt(hub: Hub, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "toy")
    line = ["-m", "pipelines.cli", "run", str(ROOT / "tests" / "chain" / "tiny.yaml"), f"dataset={data}"]
    line += ["--output_dir", str(tmp_path / "run"), "push_to_hub=true", "repo_id=ada/tiny-{stage}"]
    _run(
        hub,
        tmp_path,
        *line,
        "dpo.lora_r=2",
        "dpo.push_adapter=true",
        "sft.copy_steps=4",
        "sft.max_steps=8",
        "sft.save_steps=4",
    )
    assert {repo_id for _, repo_id in hub.repos} == {
        f"ada/tiny-{stage}" for stage in ("tokenizer", "sft", "preferences", "reward", "ppo", "dpo")
    }
    adapter = hub.files("ada/tiny-dpo")
    assert set(adapter) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "ada/tiny-sft"
    assert ModelCard(hub.files("ada/tiny-ppo")["README.md"].decode()).data.base_model == "ada/tiny-sft"
    measured = ModelCard(hub.files("ada/tiny-ppo")["README.md"].decode()).data.eval_results
    assert {r.metric_type for r in measured} >= {"rouge1", "gold_win_rate"}  # by a later stage: the card came after it
    assert all(r.metric_args["low"] <= r.metric_value <= r.metric_args["high"] for r in measured)
    reward = ModelCard(hub.files("ada/tiny-reward")["README.md"].decode()).data
    assert {r.metric_type for r in reward.eval_results} >= {"accuracy"}
    soft = [
        str(ROOT / "recipes" / "prompting" / "soft.py"),
        "model=ada/tiny-sft",
        "task=summarization",
        f"dataset={data}",
    ]
    soft += [
        "text_column=source",
        "summary_column=target",
        "method=lora",
        "max_steps=4",
        "save_steps=2",
        "logging_steps=2",
    ]
    soft += ["batch_size=8", "precision=fp32", "resamples=100", f"output_dir={tmp_path / 'soft'}", "push_to_hub=true"]
    _run(hub, tmp_path, *soft, "repo_id=ada/tiny-{stage}")
    files = hub.files("ada/tiny-soft")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ada/tiny-sft"
    _all_usages_run(hub, tmp_path)


def test_the_image_stages(hub: Hub, tmp_path: Path) -> None:
    line = ["-m", "pipelines.cli", "run", str(ROOT / "tests" / "images" / "tiny_images.yaml")]
    _run(hub, tmp_path, *line, "--output_dir", str(tmp_path / "run"), "push_to_hub=true", "repo_id=ada/tiny-{stage}")
    assert {repo_id for _, repo_id in hub.repos} == {
        f"ada/tiny-{stage}" for stage in ("classifier", "ddpm", "bitflip", "vae", "gan", "vae_again")
    }
    card = ModelCard(hub.files("ada/tiny-vae")["README.md"].decode())
    assert {r.metric_type for r in card.data.eval_results} >= {"negative_elbo"}
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "![samples](samples.png)" in card.text
    _all_usages_run(hub, tmp_path)
