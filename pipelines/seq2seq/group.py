"""The GRPO and RLOO stages: align a model on rewards by comparing samples of one document with each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.seq2seq.lora import load_policy, lora_settings, merged
from pipelines.seq2seq.rollout_fields import RolloutFields

if TYPE_CHECKING:
    from transformers import Trainer


@config
class GroupFields(RolloutFields):
    """What GRPO and RLOO share."""

    group_epochs: int = Field(1, ge=1, description="passes over a rollout")
    samples_per_source: int = Field(8, ge=2, description="summaries of a document that are compared with each other")
    sources_per_rollout: int = Field(32, ge=1, description="documents of a rollout, over all devices")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "constant_with_warmup", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    logging_steps: int = Field(1, ge=1, description="steps between two log entries")
    kl_coefficient: float = Field(0.05, ge=0, description="price of a nat away from the reference, in units of reward")
    clip_range: float = Field(0.2, gt=0, description="the ratio counts only within 1 ± this")

    def problems(self) -> list[Problem]:
        """Steps between two log entries that would cut rollouts."""
        found = super().problems()
        steps = self.group_epochs * (self.rows_per_rollout // self.mini_batch_size or 1)
        if self.logging_steps % steps and steps % self.logging_steps:
            mend = f"give a multiple or a divisor of the {steps} steps of a rollout"
            found.append(Problem("logging_steps", self.logging_steps, "would log other parts of each rollout", mend))
        return found


@config
class GRPOStageConfig(GroupFields):
    """Group-relative policy optimization of an encoder-decoder against reward functions, on TRL's trainer."""

    output_dir: str = Field("runs/grpo", description="folder the stage writes into", json_schema_extra=INERT)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        "dr_grpo", description="how token losses are averaged: in each summary first, or over all tokens"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the standard deviation of a document's rewards, of all, or not"
    )
    importance_sampling: Literal["token", "sequence"] = Field(
        "token", description="ratio of each token, or their geometric mean over the summary (GSPO)"
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="charge the divergence token by token in the loss (as published), or in the reward"
    )


@config
class RLOOStageConfig(GroupFields):
    """REINFORCE with a leave-one-out baseline of an encoder-decoder against reward functions, on TRL's trainer."""

    output_dir: str = Field("runs/rloo", description="folder the stage writes into", json_schema_extra=INERT)
    normalize_advantages: bool = Field(False, description="bring a rollout's advantages to mean 0 and variance 1")
    reward_clip: float | None = Field(None, gt=0, description="clip scores to ± this")


def grpo(config: GRPOStageConfig) -> dict[str, float]:
    """Align a model with GRPO.

    Writes the policy (adapters merged into it, and by themselves under ``adapter``), its tokenizer and
    ``log_history.json`` into ``config.output_dir``.

    Returns:
        Means over the last quarter of the log, of sampled summaries of training documents:
        ``grpo/train_proxy_reward``, ``grpo/train_kl`` (nats a sequence), ``grpo/train_gold`` (where there is a judge),
        ``grpo/train_length`` (tokens); ``grpo/rollouts``; and ``grpo/truncated_sources``, the share that was cut.

    Raises:
        UserError: from the model, the tokenizer, the data or a reward function; fewer documents than a rollout takes.
    """
    return _align(
        config,
        "grpo",
        {
            "loss_type": config.loss_type,
            "scale_rewards": config.scale_rewards,
            "importance_sampling_level": config.importance_sampling,
        },
        {"kl_in": config.kl_in},
    )


def rloo(config: RLOOStageConfig) -> dict[str, float]:
    """Align a model with RLOO; artifacts, metrics (``rloo/…``) and errors as of ``grpo``."""
    clip = None if config.reward_clip is None else [-config.reward_clip, config.reward_clip]
    return _align(config, "rloo", {"normalize_advantages": config.normalize_advantages, "reward_clip_range": clip}, {})


def _align(settings: GroupFields, name: str, fields: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    from accelerate import PartialState
    from transformers import set_seed
    from trl import GRPOConfig, RLOOConfig

    from pipelines.seq2seq.annotators import load_annotator
    from pipelines.seq2seq.generation import check_lengths
    from pipelines.seq2seq.group_trainer import EncoderDecoderGRPOTrainer, EncoderDecoderRLOOTrainer
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.rewards import load_rewards
    from pipelines.seq2seq.rollout_fields import check_processes, last_quarter, training_sources
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    kinds = {
        "grpo": (GRPOConfig, EncoderDecoderGRPOTrainer),
        "rloo": (RLOOConfig, EncoderDecoderRLOOTrainer),
    }
    state = PartialState()
    set_seed(settings.seed)
    tokenizer = load_tokenizer(settings.model, field="model")
    rewards = load_rewards(settings.reward_specs, settings.reward_weights, tokenizer, batch_size=settings.batch_size)
    gold = load_annotator(settings.gold, field="gold") if settings.gold else None
    policy = load_policy(settings.model)
    check_lengths(policy, settings)
    check_processes(settings, state.num_processes)
    sources, truncated = training_sources(settings, tokenizer)
    arguments_class, trainer_class = kinds[name]
    trainer = trainer_class(
        policy,
        training_arguments(settings, arguments_class, **(_arguments(settings, state.num_processes) | fields)),
        sources,
        tokenizer,
        rewards,
        gold=gold,
        missing_eos_penalty=settings.missing_eos_penalty,
        peft_config=lora_settings(settings),
        callbacks=[checkpoint_marker()],
        optimizer_choice=optimizer_choice(settings),
        **options,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(settings))
    history = save_history(trainer, settings)
    _save(trainer, settings)
    made = {f"{name}/rollouts": float(settings.rollouts), f"{name}/truncated_sources": truncated}
    return last_quarter(history, name) | made


def _arguments(settings: GroupFields, processes: int) -> dict[str, Any]:
    """TRL's fields made from ours: it counts in rows of a device and in micro-batches."""
    rows = settings.mini_batch_size // (processes * settings.gradient_accumulation)
    return {
        "per_device_train_batch_size": rows,
        "steps_per_generation": settings.rows_per_rollout // (rows * processes),
        "num_generations": settings.samples_per_source,
        "num_iterations": settings.group_epochs,
        "max_steps": settings.rollouts * settings.group_epochs * settings.rows_per_rollout // settings.mini_batch_size,
        "max_completion_length": settings.max_target_length,
        "temperature": settings.temperature,
        "beta": settings.kl_coefficient,
        "epsilon": settings.clip_range,
    }


def _save(trainer: Trainer, settings: GroupFields) -> None:
    from accelerate import PartialState

    from pipelines.seq2seq.sharded import save_whole

    folder, main = Path(settings.output_dir), PartialState().is_main_process
    policy = merged(trainer.accelerator.unwrap_model(trainer.model), settings, folder, save=main)
    save_whole(policy, folder, main=main)
    if main:
        trainer.processing_class.save_pretrained(folder)
    PartialState().wait_for_everyone()
