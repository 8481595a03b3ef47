"""Trainers and stages on preferences, as the tests of the reward model and of both kinds of DPO start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
from trl import DPOConfig

from pipelines.seq2seq.training import LengthConfig

LENGTHS = LengthConfig(max_source_length=64, max_target_length=16)


def t5(folder) -> Any:
    """The tiny T5, read anew."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


def arguments(folder, **fields) -> DPOConfig:
    """Three steps of eight examples that leave nothing behind."""
    given = {"learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 8, "beta": 0.2}
    fixed = {"bf16": False, "activation_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    return DPOConfig(str(folder), **(given | fixed | fields))


def stage_settings(cls: type, output, **fields) -> Any:
    """A stage's configuration: twelve steps of sixteen examples, a checkpoint every four."""
    given = {
        "output_dir": str(output),
        "precision": "fp32",
        "batch_size": 16,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
        "warmup_ratio": 0.0,
        "report_to": "none",
        "max_target_length": 16,
    }
    return cls(**(given | {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}))


def same_outcome(one: Path, other: Path) -> bool:
    """Whether two stages ended with the same weights and the same log, to the bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    weights = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return weights and (one / "log_history.json").read_text() == (other / "log_history.json").read_text()
