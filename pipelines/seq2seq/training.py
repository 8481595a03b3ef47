"""What all training stages share: their fields, the Trainer's arguments made from them, checkpoints, logs, lengths."""

from __future__ import annotations

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.errors import Problem, UserError, problems_of
from pipelines.stage import CHECKPOINTS, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

_COMPLETE = "complete"
_TIME_DEPENDENT = ("runtime", "per_second", "total_flos", "train_loss", "train_tokens_per_second")


@config
class LengthConfig:
    """How many tokens of a document and of a summary a model reads and writes."""

    max_source_length: int = Field(256, ge=4, description="tokens of a document the encoder reads; the rest is cut")
    max_target_length: int = Field(48, ge=2, description="tokens of a summary, its end mark included")
    prefix: str = Field("", description="put before every document, e.g. 'summarize: ' for T5")


@config
class TrainingConfig(StageConfig):
    """Optimization, precision, logging and checkpoints."""

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adamw; or adafactor, its steps scaled by each parameter's RMS (T5 from scratch, rates near 1e-2)",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")
    epochs: float = Field(3.0, gt=0, description="passes over the training set")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1 leaves it to epochs")
    batch_size: int = Field(16, ge=1, description="examples a device takes in one forward pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes for one optimizer step")
    eval_batch_size: int = Field(
        32, ge=1, description="examples a device takes in one evaluation pass", json_schema_extra=INERT
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time", json_schema_extra=INERT
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic; auto takes bf16 where it is measured to be faster on this device"
    )
    logging_steps: int = Field(20, ge=1, description="steps between two log entries")
    save_steps: int = Field(200, ge=1, description="steps between two checkpoints (a multiple of logging_steps)")
    report_to: Literal["tensorboard", "none"] = Field(
        "tensorboard", description="where curves go beside log_history.json", json_schema_extra=INERT
    )
    push_to_hub: bool = Field(False, description="push the result to the Hub when finished", json_schema_extra=INERT)
    repo_id: str | None = Field(None, description="owner/name on the Hub", json_schema_extra=INERT)

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.save_steps % self.logging_steps:
            mend = f"give a multiple of logging_steps={self.logging_steps}, such as {self.logging_steps * 10}"
            found.append(Problem("save_steps", self.save_steps, "a resumed run would log other averages", mend))
        if self.push_to_hub and not self.repo_id:
            found.append(Problem("repo_id", "", "push_to_hub=true needs to know where to", "give repo_id=owner/name"))
        elif self.push_to_hub:
            from pipelines.publish import check_repo_id

            found += problems_of(partial(check_repo_id, self.repo_id))
        return found


def training_arguments(config: TrainingConfig, cls: type, **overrides: Any) -> Any:
    """The arguments of a transformers or TRL trainer made from our fields.

    Args:
        config: the stage's configuration.
        cls: ``TrainingArguments`` or a subclass (``Seq2SeqTrainingArguments``, ``DPOConfig`` …).
        overrides: further arguments of ``cls``, or other values for the ones set here.

    Raises:
        UserError: from the choice of precision, or if one process sees several GPUs.
    """
    import torch
    from accelerate import PartialState

    from pipelines.precision import choose_precision

    precision = choose_precision(config.precision)
    output = Path(config.output_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    if PartialState().num_processes == 1 and torch.cuda.device_count() > 1:
        # Trainer would wrap the model in DataParallel, whose replicas know nothing of a swapped class.
        mend = "start with accelerate launch --config_file accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0"
        raise UserError("CUDA_VISIBLE_DEVICES", "several GPUs", "one process cannot train on several GPUs", mend)
    arguments: dict[str, Any] = {
        "output_dir": str(output / CHECKPOINTS),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,
        "optim": "adamw_torch",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        # by its new name, which wins over the old one that TRL's configurations set to True
        "activation_checkpointing": config.gradient_checkpointing,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": [] if config.report_to == "none" else [config.report_to],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "push_to_hub": False,
    }
    return cls(**(arguments | overrides))


def global_batch(config: TrainingConfig, examples: int, *, field: str = "dataset", noun: str = "examples") -> int:
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


def optimizer_choice(config: TrainingConfig) -> tuple[type, dict[str, Any]] | None:
    """``optimizer_cls_and_kwargs`` for a Trainer, or None for AdamW, which its arguments already say.

    transformers' own ``optim="adafactor"`` turns the scaling by the parameters' RMS off (Shazeer and Stern 2018,
    Algorithm 4), which is the very thing that lets T5's initialization learn, so Adafactor is built here.
    """
    if config.optimizer == "adamw":
        return None
    from transformers.optimization import Adafactor

    options = {"lr": config.learning_rate, "scale_parameter": True, "relative_step": False, "warmup_init": False}
    return Adafactor, options | {"weight_decay": config.weight_decay}


def checkpoint_marker() -> TrainerCallback:
    """A callback that marks a checkpoint as whole once every process has written its part of it.

    It also ends training with a UserError at the first loss that is not finite: nothing sound comes after it.
    """
    from accelerate import PartialState
    from transformers import TrainerCallback

    class MarkWhole(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            for name in ("loss", "eval_loss"):
                value = (logs or {}).get(name, 0.0)
                if not math.isfinite(value):
                    problem = f"the {name.replace('_', ' ')} became {value} by step {state.global_step}"
                    raise UserError("learning_rate", args.learning_rate, problem, "lower it")

        def on_save(self, args, state, control, **kwargs):
            PartialState().wait_for_everyone()
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    return MarkWhole()


def last_checkpoint(config: StageConfig, folder: str = CHECKPOINTS) -> str | None:
    """The newest whole checkpoint of an interrupted run, or None. Torn ones (killed while saving) are removed.

    Args:
        config: the stage's configuration.
        folder: name of the folder under ``output_dir``, for stages that train in more than one phase.
    """
    from accelerate import PartialState

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


def save_history(trainer: Trainer, config: StageConfig) -> list[dict[str, float]]:
    """Write ``log_history.json``: the trainer's log without what depends on the clock. Returns what was written."""
    history = [
        # sorted: entries that went through a checkpoint come back in another order of keys
        {
            key: value
            for key, value in sorted(entry.items())
            # In float16 a gradient overflows now and then, and JSON has no infinity.
            if not any(part in key for part in _TIME_DEPENDENT)
            and not (isinstance(value, float) and not math.isfinite(value))
        }
        for entry in trainer.state.log_history
    ]
    history = [entry for entry in history if set(entry) - {"step", "epoch"}]
    if trainer.is_world_process_zero():
        write_json(Path(config.output_dir) / "log_history.json", history)
    return history


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> dict[str, Any]:
    """Ids ending in the end mark, also where a text was cut; how many were cut."""
    end = tokenizer.eos_token_id
    rows, cut = [], 0
    for ids in tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]:
        ids = list(ids)
        if not ids or ids[-1] != end:
            ids.append(end)
        if len(ids) > length:
            ids, cut = [*ids[: length - 1], end], cut + 1
        rows.append(ids)
    return {"input_ids": rows, "truncated": cut}


def tokenize_sources(tokenizer: PreTrainedTokenizerBase, documents: list[str], lengths: LengthConfig) -> dict[str, Any]:
    """Token ids of documents, the prefix put before each.

    Returns:
        ``input_ids`` (a list for each document, at most ``max_source_length`` long, the end mark last) and
        ``truncated`` (how many documents were cut).
    """
    return _tokenize(tokenizer, [lengths.prefix + text for text in documents], lengths.max_source_length)


def tokenize_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str], lengths: LengthConfig) -> dict[str, Any]:
    """Token ids of summaries, at most ``max_target_length`` long, the end mark last; and how many were cut."""
    return _tokenize(tokenizer, texts, lengths.max_target_length)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The ``log_history.json`` of a stage's folder; empty where there is none."""
    file = Path(folder) / "log_history.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
