"""The folder that the package ships: a pretrained model with its tokenizer, and a card that says how it was made.

Every number of the card is read from what the stages before wrote: settings and times from ``stage.json``, losses from
``log_history.json``, the packages and their licences from the text's ``stats.json``.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config
from pipelines.corpus.pydocs import TEST_PACKAGES
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.models import model_problems

RECORD = "pretraining.json"
"""What the shipped folder says about its making, for programs (tests among them)."""

_WEIGHTS = ("config.json", "generation_config.json", "model.safetensors")
_PLACES = {"output_dir", "model", "tokenizer", "text", "pairs", "site_packages", "repo_id"}
"""Fields that say where something lay, which nobody else needs to know."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@config
class ShipConfig(StageConfig):
    """Which pretraining, and how large the folder may be."""

    output_dir: str = Field("runs/ship", description="folder the stage writes into", json_schema_extra=INERT)
    phases: list[Source] = Field(description="folders of the pretraining's stages, in order; the last one's weights")
    text: Source = Field(description="folder of the stage text, which names the packages and their licences")
    name: str = Field("t5-docstrings", min_length=1, description="what the model is called")
    command: str = Field(
        "make pretraining-text && genalign run pretraining", description="the command that makes it again, for the card"
    )
    largest_mb: float = Field(20.0, gt=0, description="megabytes (10^6 bytes) that the folder may have, all files")

    def problems(self) -> list[Problem]:
        """Whether there are phases, and weights in the last one."""
        found = super().problems()
        if not self.phases:
            found.append(Problem("phases", [], "names nothing", "give the folder of a pretraining"))
            return found
        return found + model_problems({f"phases.{len(self.phases) - 1}": self.phases[-1]})


def ship(config: ShipConfig) -> dict[str, float]:
    """Copy weights and tokenizer, and write the card (``README.md``) and ``pretraining.json`` beside them.

    Returns:
        ``ship/bytes`` of all files; ``ship/steps``, ``ship/tokens`` and ``ship/seconds`` of all phases together.

    Raises:
        UserError: a phase or text that is unfinished, weights that are not in half precision, or too large a folder.
    """
    phases = [_read(f"phases.{i}", path) for i, path in enumerate(config.phases)]
    text = json.loads((Path(config.text).expanduser() / "stats.json").read_text(encoding="utf-8"))
    target, source = Path(config.output_dir), Path(config.phases[-1]).expanduser()
    for name in (*_WEIGHTS, *_TOKENIZER):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    record = _record(config, phases, text)
    (target / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / "README.md").write_text("\n".join(_card(record)) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in target.iterdir() if path.is_file())
    if size > config.largest_mb * 1e6:
        mend = "save in half precision (save_dtype=bf16), or pretrain a smaller network"
        raise UserError("largest_mb", config.largest_mb, f"the folder has {size / 1e6:.1f} MB", mend)
    return {"ship/bytes": float(size), **{f"ship/{key}": float(record[key]) for key in ("steps", "tokens", "seconds")}}


def _read(field: str, path: str) -> dict[str, Any]:
    from pipelines.stage import read_stage

    folder = Path(path).expanduser()
    stage = read_stage(folder)
    if stage is None or "pretrain/steps" not in (stage.get("metrics") or {}):
        raise UserError(field, path, "is no finished pretraining", "give the folder of a stage pretrain")
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return stage | {"history": [entry for entry in history if "eval_loss" in entry or "eval_rouge1" in entry]}


def _record(settings: ShipConfig, phases: list[dict[str, Any]], text: dict[str, Any]) -> dict[str, Any]:
    metrics = [phase["metrics"] for phase in phases]
    return {
        "name": settings.name,
        "command": settings.command,
        "parameters": int(metrics[-1]["pretrain/parameters"]),
        "steps": int(sum(m["pretrain/steps"] for m in metrics)),
        "tokens": int(sum(m["pretrain/tokens"] for m in metrics)),
        "seconds": round(sum(phase["duration_seconds"] for phase in phases), 1),
        "hardware": _hardware(),
        "versions": phases[-1]["versions"],
        "phases": [
            {
                "metrics": phase["metrics"],
                "config": {key: value for key, value in phase["config"].items() if key not in _PLACES},
                "curve": phase["history"],
            }
            for phase in phases
        ],
        "text": text,
    }


def _hardware() -> str:
    import os

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{found}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


def _card(record: dict[str, Any]) -> Iterator[str]:
    yield from ("---", "language: en", "license: apache-2.0", "library_name: transformers")
    yield from ("pipeline_tag: summarization", "tags: [genalign, t5, summarization, docstrings]", "---", "")
    yield from (f"# {record['name']}", "")
    yield (
        f"A T5 of {record['parameters'] / 1e6:.1f} million parameters, pretrained on the documentation of Python "
        "packages to be fine-tuned into a summarizer of functions. It reads lower-case text of at most 64 tokens well; "
        "it knows no other language than English and no facts."
    )
    yield from ("", "```python", "from transformers import AutoTokenizer, T5ForConditionalGeneration", "")
    yield f'model = T5ForConditionalGeneration.from_pretrained("pipelines/assets/{record["name"]}")'
    yield f'tokenizer = AutoTokenizer.from_pretrained("pipelines/assets/{record["name"]}")'
    yield from ("```", "", "## How it was made", "", f"    {record['command']}", "")
    yield (
        f"{record['steps']:,} steps, {record['tokens']:,} tokens (source and target), {record['seconds'] / 60:.0f} "
        f"minutes on {record['hardware']}. The mixture of span corruption, copying, gap sentences and summary lines, "
        f"and all other settings, are in `{RECORD}`."
    )
    yield from ("", "| phase | steps | rate | span | copy | gap | summary | ROUGE-1 |", "|---" * 8 + "|")
    for number, phase in enumerate(record["phases"], start=1):
        m, c = phase["metrics"], phase["config"]
        losses = " | ".join(_number(m, f"pretrain/{name}_loss") for name in ("span", "copy", "gap", "supervised"))
        rate = f"{c['learning_rate']:g} {c['lr_scheduler']}"
        rouge = _number(m, "pretrain/rouge1", 1)
        yield f"| {number} | {m['pretrain/steps']:,.0f} | {rate} | {losses} | {rouge} |"
    yield from (
        "",
        "Losses in nats a token and ROUGE-1 on packages held out for validation, at the end of each phase.",
        "",
    )
    yield from ("| steps | held-out loss | ROUGE-1 |", "|---|---|---|")
    done = 0
    for phase in record["phases"]:
        for entry in {entry["step"]: entry for entry in phase["curve"]}.values():  # the last one is measured twice
            yield f"| {done + entry['step']:,} | {_number(entry, 'eval_loss')} | {_number(entry, 'eval_rouge1', 1)} |"
        done += int(phase["metrics"]["pretrain/steps"])
    yield from ("", "## Data", "")
    yield from _data(record["text"])
    yield from ("", "## Limits", "")
    yield (
        "Small, and trained on the code and prose of programmers alone: what it writes reads like a docstring and may "
        "be wrong. It learned from texts as they are, their errors and manners included."
    )


def _data(text: dict[str, Any]) -> Iterator[str]:
    train, packages = text["splits"]["train"], text.get("packages") or {}
    amount = f"{train['documents']:,} texts, {train['words']:,} words"
    if not packages:
        yield f"{amount}. Only weights are here, none of that text."
        return
    read = {name: package for name, package in packages.items() if package["split"] == "train"}
    held_out = ", ".join(name for name, package in packages.items() if package["split"] != "train")
    yield (
        f"Docstrings and prose documentation of {len(read)} packages, as installed: {amount}, and {train['pairs']:,} "
        "pairs of a function and its first line. Only weights are here, none of that text. Never read: "
        f"{', '.join(TEST_PACKAGES)}, which are the test's. Held out for validation: {held_out}. {text['leaks']:,} "
        "texts that repeat either were dropped."
    )
    yield from ("", "| package | version | licence | texts | pairs |", "|---|---|---|---|---|")
    for name, package in sorted(read.items()):
        licence = " ".join(str(package["licence"] or "not stated").split()).replace("|", "/")[:80]
        yield f"| {name} | {package['version']} | {licence} | {package['texts']:,} | {package['pairs']:,} |"


def _number(found: dict[str, Any], key: str, digits: int = 3) -> str:
    return f"{found[key]:.{digits}f}" if key in found else "–"
