"""What all training stages share: their fields, the Trainer's arguments made from them, checkpoints, logs, lengths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.distributed import Strategy
from pipelines.errors import Problem, UserError
from pipelines.stage import CHECKPOINTS
from pipelines.tracking import LOGS, PROJECT, run_name
from pipelines.training import LoopConfig, check_finite, checkpoint_folder, clean_history, mark_whole, write_history
from pipelines.training import global_batch as global_batch
from pipelines.training import last_checkpoint as last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback


@config
class LengthConfig:
    """How many tokens of a document and of a summary a model reads and writes."""

    max_source_length: int = Field(256, ge=4, description="tokens of a document the encoder reads; the rest is cut")
    max_target_length: int = Field(48, ge=2, description="tokens of a summary, its end mark included")
    prefix: str = Field("", description="put before every document, e.g. 'summarize: ' for T5")


@config
class TrainingConfig(LoopConfig):
    """Optimization, precision, logging and checkpoints of a transformers or TRL trainer."""

    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adamw; or adafactor, its steps scaled by each parameter's RMS (T5 from scratch, rates near 1e-2)",
    )
    eval_batch_size: int = Field(
        32, ge=1, description="examples a device takes in one evaluation pass", json_schema_extra=INERT
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time", json_schema_extra=INERT
    )

    def launch_problems(self, strategy: Strategy) -> list[Problem]:
        """What the loop has to say, and that Adafactor does not train in parts."""
        found = super().launch_problems(strategy)
        if not found and self.optimizer == "adafactor" and strategy != "ddp":
            problem = "it keeps the means of whole rows and columns, and weights are in parts"
            found.append(Problem("optimizer", self.optimizer, problem, "give optimizer=adamw, or launch with ddp.yaml"))
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
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / LOGS)
    if PartialState().num_processes == 1 and torch.cuda.device_count() > 1:
        # Trainer would wrap the model in DataParallel, whose replicas know nothing of a swapped class.
        mend = "start with accelerate launch --config_file accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0"
        raise UserError("CUDA_VISIBLE_DEVICES", "several GPUs", "one process cannot train on several GPUs", mend)
    arguments: dict[str, Any] = {
        "output_dir": str(output / CHECKPOINTS),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,
        "optim": "adamw_torch_fused",
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
        "project": PROJECT,
        "run_name": run_name(output),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "push_to_hub": False,
    }
    if PartialState().num_processes > 1:
        # as joined_processes left it
        arguments["accelerator_config"] = {"use_configured_state": True}
    made = cls(**(arguments | overrides))
    # Where neither is set, transformers takes what the launcher was told; the recipe's own field decides.
    made.mixed_precision = "bf16" if made.bf16 else "fp16" if made.fp16 else "no"
    return made


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
                check_finite((logs or {}).get(name, 0.0), name, state.global_step, args.learning_rate)

        def on_save(self, args, state, control, **kwargs):
            PartialState().wait_for_everyone()
            if state.is_world_process_zero:
                mark_whole(checkpoint_folder(args.output_dir, state.global_step))

    return MarkWhole()


def save_history(trainer: Trainer, config: StageConfig) -> list[dict[str, float]]:
    """Write ``log_history.json``: the trainer's log without what depends on the clock. Returns what was written."""
    history = clean_history(trainer.state.log_history)
    if trainer.is_world_process_zero():
        write_history(history, config.output_dir)
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
