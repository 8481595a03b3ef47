"""A Hub on loopback, and finished stages to be pushed to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.publishing.hub import Hub, account, serving

TOKEN = "hf_" + "SecretSecretSecretSecretSecret42"
WEIGHTS = bytes(range(256)) * 40
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy", "HTTPS_PROXY")


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The variables of a process whose Hub is ``hub``, with caches of its own."""
    found = {name: value for name, value in os.environ.items() if name not in (*_PROXIES, "HUGGING_FACE_HUB_TOKEN")}
    found |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    found |= {"TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    found.pop("HF_TOKEN", None)
    return found | ({"HF_TOKEN": token} if token else {})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that knows ada, whose token may write; this process may reach it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # hf_xet speaks to a storage service that only the real Hub has; the client then takes the LFS way.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *_PROXIES):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        server.accounts[TOKEN] = account("ada", orgs={"lab": "write", "club": "read"})
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between two tries; none of them is really waited."""
    found: list[float] = []
    monkeypatch.setattr("pipelines.publishing.client.time.sleep", found.append)
    return found


def write_stage(folder: Path, recipe: str, config: dict[str, Any] | None = None, **record: Any) -> Path:
    """Make ``folder`` that of a finished stage."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"stage": recipe.split("/")[-1], "recipe": recipe, "state": "finished", "fingerprint": "0", "seed": 3}
    content |= {"config": {"output_dir": str(folder)} | (config or {}), "metrics": {}, "versions": {"trl": "1.16.0"}}
    (folder / "stage.json").write_text(json.dumps(content | record))
    return folder


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished PPO stage in a run, its input stages beside it."""
    run = tmp_path / "home" / "ada" / "runs" / "demo"
    folder = run / "ppo"
    write_stage(run / "corpus", "summarization/corpus", {"dataset": "pydocs"})
    write_stage(run / "sft", "summarization/sft", {"model": "google/flan-t5-small"})
    config = {
        "model": str(run / "sft"),
        "dataset": str(run / "corpus"),
        "reward_model": str(run / "reward"),
        "learning_rate": 1e-4,
        "max_target_length": 48,
        "prefix": "summarize: ",
    }
    write_stage(folder, "summarization/ppo", config, stage="seq2seq.ppo.ppo", metrics={"ppo/rollouts": 40})
    metrics = {"ppo/rouge1": 27.31, "ppo/rouge1_ci_low": 26.2, "ppo/rouge1_ci_high": 28.4, "sft/rouge1": 26.0}
    (run / "metrics.json").write_text(json.dumps(metrics | {"ppo/kl": 3.0}))
    (run / "run.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "log_history.json").write_text("[]")
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    (folder / "critic").mkdir()
    (folder / "critic" / "model.safetensors").write_bytes(b"x")
    (folder / "value_head.safetensors").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1.host").write_bytes(b"x")
    (folder / ".lock").write_text("")
    return folder


def add_adapter(folder: Path, base: str = "") -> Path:
    """Put a LoRA adapter's files into ``folder/adapter``."""
    (folder / "adapter").mkdir()
    table = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": base, "r": 2}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(table))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return folder / "adapter"
