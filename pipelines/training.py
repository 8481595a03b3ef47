"""What every training loop here shares, whatever it trains: fields, the size of a step, checkpoints, logs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.distributed import Strategy, launched_strategy, strategy_problems
from pipelines.errors import Problem, UserError
from pipelines.precision import precision_problems
from pipelines.publishing.fields import PublishFields
from pipelines.stage import CHECKPOINTS, write_json
from pipelines.tracking import tracker_problems

_COMPLETE = "complete"
_TIME_DEPENDENT = ("runtime", "per_second", "total_flos", "train_loss", "train_tokens_per_second")


@config
class LoopConfig(PublishFields, StageConfig):
    """Optimization, precision, logging and checkpoints."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp",)
    """How several processes may share the stage's work."""

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")
    epochs: float = Field(3.0, gt=0, description="passes over the training set")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1 leaves it to epochs")
    batch_size: int = Field(16, ge=1, description="examples a device takes in one forward pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes for one optimizer step")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic; auto takes bf16 where it is measured to be faster on this device"
    )
    logging_steps: int = Field(20, ge=1, description="steps between two log entries")
    save_steps: int = Field(200, ge=1, description="steps between two checkpoints (a multiple of logging_steps)")
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = Field(
        "tensorboard", description="where curves go beside log_history.json", json_schema_extra=INERT
    )

    def problems(self) -> list[Problem]:
        """Saves between two log entries, and a precision or a tracker that this machine does not have."""
        found = super().problems()
        if self.save_steps % self.logging_steps:
            mend = f"give a multiple of logging_steps={self.logging_steps}, such as {self.logging_steps * 10}"
            found.append(Problem("save_steps", self.save_steps, "a resumed run would log other averages", mend))
        found += precision_problems(self.precision) + tracker_problems(self.report_to)
        return found

    def launch_problems(self, strategy: Strategy) -> list[Problem]:
        """Why the stage cannot train as its processes were launched."""
        return strategy_problems(type(self), strategy)


def global_batch(config: LoopConfig, examples: int, *, field: str = "dataset", noun: str = "examples") -> int:
    """Examples of one optimizer step, over all processes.

    Args:
        config: the stage's configuration.
        examples: how many there are to train on.
        field: the configuration field that named them, for the message.
        noun: what they are called there.

    Raises:
        UserError: fewer examples than one step takes; a smaller step would be another learning rate, unasked.
    """
    from accelerate import PartialState

    wanted = config.batch_size * config.gradient_accumulation * PartialState().num_processes
    if examples < wanted:
        problem = f"one step takes {wanted} {noun} (devices × batch_size × gradient_accumulation)"
        mend = f"give more {noun}, or a smaller batch_size"
        raise UserError(field, f"{examples} training {noun}", problem, mend)
    return wanted


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies below the folder of checkpoints."""
    return Path(root) / f"checkpoint-{step}"


def mark_whole(checkpoint: Path) -> None:
    """Mark a checkpoint as whole, once every process has written its part of it."""
    (checkpoint / _COMPLETE).touch()


def check_finite(value: float, name: str, step: int, learning_rate: float) -> None:
    """End training at a loss that is not finite: nothing sound comes after it.

    Raises:
        UserError: if ``value`` is infinite or not a number.
    """
    if not math.isfinite(value):
        problem = f"the {name.replace('_', ' ')} became {value} by step {step}"
        raise UserError("learning_rate", learning_rate, problem, "lower it")


def last_checkpoint(config: StageConfig, folder: str = CHECKPOINTS) -> str | None:
    """The newest whole checkpoint of an interrupted run, or None. Torn ones (killed while saving) are removed.

    Args:
        config: the stage's configuration.
        folder: name of the folder under ``output_dir``, for stages that train in more than one phase.
    """
    from accelerate import PartialState

    if launched_strategy() != "ddp":
        return None  # tied weights in parts cannot be read back (torch 2.13): such a run begins afresh
    found: dict[int, Path] = {}
    state = PartialState()
    root = Path(config.output_dir) / folder
    for path in root.glob("checkpoint-*"):
        if (path / _COMPLETE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        elif state.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
    state.wait_for_everyone()
    return str(found[max(found)]) if found else None


def clean_history(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a log without what depends on the clock; those that then say nothing are left out."""
    history = [
        # sorted: entries that went through a checkpoint come back in another order of keys
        {
            key: value
            for key, value in sorted(entry.items())
            # In float16 a gradient overflows now and then, and JSON has no infinity.
            if not any(part in key for part in _TIME_DEPENDENT)
            and not (isinstance(value, float) and not math.isfinite(value))
        }
        for entry in log
    ]
    return [entry for entry in history if set(entry) - {"step", "epoch"}]


def write_history(history: list[dict[str, Any]], folder: str | Path) -> None:
    """Write a stage's ``log_history.json``."""
    write_json(Path(folder) / "log_history.json", history)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The ``log_history.json`` of a stage's folder; empty where there is none."""
    file = Path(folder) / "log_history.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
