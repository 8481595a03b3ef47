"""The folder that is shipped: plain weights and tokenizer, and a card whose numbers are those of the stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.config import validate
from pipelines.corpus.text import TextConfig, text
from pipelines.errors import UserError
from pipelines.seq2seq.pretrain import PretrainConfig, pretrain
from pipelines.seq2seq.ship import RECORD, ShipConfig, ship
from pipelines.stage import execute

SIZE = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LENGTHS = {"max_source_length": 24, "max_target_length": 8, "batch_size": 4, "warmup_ratio": 0.0}
SHORT = {"logging_steps": 2, "save_steps": 2, "eval_steps": 2, "eval_examples": 4, "rouge_examples": 2}
PLAIN = {"precision": "fp32", "report_to": "none", "gap_weight": 0, "save_dtype": "bf16"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_corpus, tiny_tokenizer) -> dict[str, str]:
    """The folders of a text and of a pretraining in two phases."""
    from datasets import load_from_disk

    folder = tmp_path_factory.mktemp("shipped")
    rows = load_from_disk(str(tiny_corpus))["train"]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": " ".join([row["summary"]] * 3)}) + "\n" for row in rows.select(range(60)))
    )
    names = {name: str(folder / name) for name in ("text", "first", "second")}
    execute(text, validate(TextConfig, {"text": str(folder / "texts.jsonl"), "output_dir": names["text"]}))
    common = {"text": names["text"], "pairs": str(tiny_corpus), **LENGTHS, **SHORT, **PLAIN}
    for name, changes in (
        ("first", {"tokenizer": str(tiny_tokenizer), "max_steps": 4, **SIZE}),
        ("second", {"model": names["first"], "max_steps": 2}),
    ):
        execute(pretrain, validate(PretrainConfig, common | changes | {"output_dir": names[name]}))
    return names


def shipped(made, folder, **changes) -> tuple[dict[str, float], Path]:
    given = {"phases": [made["first"], made["second"]], "text": made["text"], "output_dir": str(folder)}
    config = validate(ShipConfig, given | changes)
    return execute(ship, config), Path(config.output_dir)


def test_weights_tokenizer_and_card(made, tmp_path):
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    metrics, folder = shipped(made, tmp_path / "out")
    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size
    record = json.loads((folder / RECORD).read_text())
    stages = [json.loads((Path(made[name]) / "stage.json").read_text()) for name in ("first", "second")]
    assert record["steps"] == metrics["ship/steps"] == 6
    assert record["tokens"] == sum(stage["metrics"]["pretrain/tokens"] for stage in stages)
    assert record["seconds"] == pytest.approx(sum(stage["duration_seconds"] for stage in stages), abs=0.1)
    card = (folder / "README.md").read_text()
    for needed in (
        "license: apache-2.0",
        "6 steps",
        f"{record['tokens']:,} tokens",
        "genalign run pretraining",
        "| 6 |",
    ):
        assert needed in card, needed
    loss = stages[1]["metrics"]["pretrain/span_loss"]
    assert f"| {loss:.3f} |" in card
    # Nothing of this machine's folders is told.
    told = card + (folder / RECORD).read_text()
    assert str(tmp_path) not in told
    assert made["text"] not in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": []}, "phases"),
        ({"largest_mb": 0.001}, "largest_mb=0.001: the folder has"),
        ({"phases": ["{text}"]}, "phases.0="),
    ],
    ids=["no phase", "too large", "another stage's folder"],
)
def test_what_cannot_be_shipped(made, tmp_path, changes, said):
    changes = {k: [p.format(**made) for p in v] if isinstance(v, list) else v for k, v in changes.items()}
    with pytest.raises(UserError) as error:
        shipped(made, tmp_path / "out", **changes)
    assert said in str(error.value)
    assert not (tmp_path / "out" / "README.md").exists()
