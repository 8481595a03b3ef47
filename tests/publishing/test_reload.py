"""What was pushed is loaded from the Hub in a new process, by its card and by ``from_pretrained``: the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from pipelines.publishing.push import push
from tests.publishing.conftest import TOKEN, environment
from tests.publishing.hub import Hub
from tests.publishing.made import make_all, output_of

TAGS = {
    "tokenizer": (None, "transformers"),
    "sft": ("summarization", "transformers"),
    "reward": ("text-classification", "reward-model"),
    "dpo": ("summarization", "transformers"),
    "dpo-lora": ("summarization", "peft"),
    "word-model": ("text-generation", "transformers"),
    "prompt": ("text-generation", "peft"),
    "ddpm": ("unconditional-image-generation", "diffusers"),
    "gan": ("unconditional-image-generation", "gan"),
    "classifier": ("image-classification", "genalign"),
}
"""Kind -> the Hub's task and a tag."""


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> dict[str, tuple[Path, bool]]:
    """Stages of every kind, pushed."""
    stages = make_all(tmp_path / "run")
    for name, (folder, adapter) in stages.items():
        push(folder, f"ada/{name}", token=TOKEN, endpoint=hub.url, adapter=adapter)
    return stages


def test_every_kind_comes_back_as_it_was(hub: Hub, pushed: dict, tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).with_name("reload.py")), str(tmp_path / "out.json"), *pushed]
    done = subprocess.run(
        script, env=environment(hub, tmp_path / "hf"), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    for kind, (folder, adapter) in pushed.items():
        place = folder / "adapter" if adapter else folder
        if kind == "prompt":
            place = folder / "8-examples-seed0"
        second = pushed["sft"][0] if adapter else None
        assert found[kind] == json.loads(json.dumps(output_of(kind, place, second))), kind
    lora, merged, base = (found[kind][0][0][0] for kind in ("dpo-lora", "dpo", "sft"))
    assert lora == pytest.approx(merged, abs=1e-3)  # the same model but for rounding, and another than its base
    assert lora != pytest.approx(base, abs=0.1)
    _the_cards_say_so(hub)
    _nothing_that_belongs_at_home(hub)


def _the_cards_say_so(hub: Hub) -> None:
    for kind, (task, tag) in TAGS.items():
        data = ModelCard(hub.files(f"ada/{kind}")["README.md"].decode()).data.to_dict()
        assert data["library_name"] == "genalign"
        assert data.get("pipeline_tag") == task, kind
        assert {"genalign", tag} <= set(data["tags"]), kind
    # the button of a library is shown only where it loads what is there by itself
    own = [
        ModelCard(hub.files(f"ada/{kind}")["README.md"].decode()).data.tags for kind in ("reward", "gan", "classifier")
    ]
    assert not {"transformers", "diffusers", "peft"} & {tag for tags in own for tag in tags}
    reward = ModelCard(hub.files("ada/reward")["README.md"].decode()).data
    assert reward.base_model == "ada/sft"
    assert [(r.metric_type, r.metric_value, r.metric_args["low"]) for r in reward.eval_results] == [
        ("accuracy", 0.75, 0.7)
    ]
    prompt = hub.files("ada/prompt")["README.md"].decode()
    assert "Of 2 trainings this is the first" in prompt
    pairs = DatasetCard(hub.files("ada/pairs", "dataset")["README.md"].decode()).data.to_dict()
    assert "genalign" in pairs["tags"]


def _nothing_that_belongs_at_home(hub: Hub) -> None:
    everything = {
        (repo, path): content
        for _, repo in hub.repos
        for kind, name in hub.repos
        if name == repo
        for path, content in hub.files(repo, kind).items()
    }
    names = {path for _, path in everything}
    assert not {
        n for n in names if n.endswith((".jsonl", "results.json", "stage.json", "training.json")) or "adapter/" in n
    }
    assert not [key for key, content in everything.items() if b"/run/" in content]
    assert not [key for key, content in everything.items() if TOKEN.encode() in content]
