"""The PPO stage: align a model on rewards, held near where it began, and say how far it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.seq2seq.lora import load_policy, lora_settings, merged
from pipelines.seq2seq.rollout_fields import RolloutFields, check_processes, last_quarter, training_sources


@config
class PPOConfig(RolloutFields):
    """Proximal policy optimization of an encoder-decoder against reward functions, with a KL pull to where it began."""

    output_dir: str = Field("runs/ppo", description="folder the stage writes into", json_schema_extra=INERT)
    samples_per_source: int = Field(4, ge=1, description="summaries sampled of each document; it is encoded once")
    ppo_epochs: int = Field(2, ge=1, description="passes over a rollout")
    batch_size: int = Field(
        256, ge=1, description="summaries a device samples and scores at once (training: see above)"
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    value_learning_rate: float | None = Field(
        None, gt=0, description="peak rate of the critic's own weights; null: same"
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "constant_with_warmup", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    logging_steps: int = Field(1, ge=1, description="has no effect: every rollout is logged", json_schema_extra=INERT)
    kl_coefficient: float = Field(0.05, ge=0, description="price of a nat away from the reference, in units of reward")
    adaptive_kl: bool = Field(False, description="move the coefficient so that the divergence tends to kl_target")
    kl_target: float = Field(6.0, gt=0, description="wanted divergence, nats a sequence (adaptive_kl)")
    kl_horizon: int = Field(
        10_000, ge=1, description="summaries in which the coefficient moves by up to 20 % (adaptive_kl)"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of a token's divergence")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="charge the divergence in the reward, or token by token in the loss (k1 times the ratio)"
    )
    max_kl: float | None = Field(
        None, gt=0, description="end training when the divergence passes this; nats a sequence"
    )
    stop_kl: float | None = Field(
        None, gt=0, description="leave a rollout early when the policy has moved so far from it; nats a token"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later rewards")
    lam: float = Field(0.95, ge=0, le=1, description="λ of the advantage estimates: 0 one step, 1 Monte Carlo")
    clip_range: float = Field(0.2, gt=0, description="the ratio counts only within 1 ± this")
    value_clip_range: float = Field(
        0.2, ge=0, description="the value counts only within ± this of the old; 0: unclipped"
    )
    value_coefficient: float = Field(0.1, ge=0, description="weight of the critic's loss")
    entropy_coefficient: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    scale_rewards: bool = Field(False, description="divide scores by the standard deviation of all seen so far")
    reward_clip: float | None = Field(None, gt=0, description="clip (scaled) scores to ± this")
    whiten_advantages: bool = Field(True, description="bring a rollout's advantages to mean 0 and variance 1")
    separate_critic: bool = Field(
        False, description="give the critic a trunk of its own instead of the policy's; all its weights learn"
    )
    train_encoder: bool = Field(True, description="false trains the decoder only: a step then costs much less")
    samples_kept: int = Field(4, ge=0, description="summaries of each rollout kept in samples.jsonl")

    def problems(self) -> list[Problem]:
        """What the coefficient of the divergence and the early stop cannot be."""
        found = super().problems()
        if self.adaptive_kl and self.kl_coefficient == 0:
            found.append(Problem("kl_coefficient", 0.0, "cannot be adapted from 0", "give a value above 0"))
        if self.stop_kl is not None and self.precision == "fp16":
            problem = "a step without gradients breaks float16's loss scaling"
            found.append(Problem("stop_kl", self.stop_kl, problem, "give precision=bf16, or stop_kl=null"))
        return found


def ppo(config: PPOConfig) -> dict[str, float]:
    """Align a model with PPO.

    Writes the policy (adapters merged into it, and by themselves under ``adapter``), its tokenizer, the critic
    (``value_head.safetensors``, and ``critic`` where it has a trunk of its own), ``log_history.json`` (a line a
    rollout) and ``samples.jsonl`` into ``config.output_dir``.

    Returns:
        Means over the last quarter of the rollouts, of sampled summaries of training documents:
        ``ppo/train_proxy_reward``, ``ppo/train_kl`` (nats a sequence), ``ppo/train_gold`` (where there is a judge),
        ``ppo/train_length`` (tokens); and ``ppo/rollouts``, how many were made.

    Raises:
        UserError: from the model, the tokenizer, the data or a reward function; fewer documents than a rollout takes.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from pipelines.seq2seq.annotators import load_annotator
    from pipelines.seq2seq.generation import check_lengths
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.ppo_arguments import PPOArguments
    from pipelines.seq2seq.ppo_trainer import PPOTrainer
    from pipelines.seq2seq.rewards import load_rewards
    from pipelines.seq2seq.sharded import whole_state
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    state = PartialState()
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model, field="model")
    rewards = load_rewards(config.reward_specs, config.reward_weights, tokenizer, batch_size=config.batch_size)
    gold = load_annotator(config.gold, field="gold") if config.gold else None
    policy = load_policy(config.model)
    check_lengths(policy, config)
    if config.lora_r:
        from peft import get_peft_model

        policy = get_peft_model(policy, lora_settings(config))
    check_processes(config, state.num_processes)
    train, truncated = training_sources(config, tokenizer)
    sources = list(train.rename_column("prompt", "document"))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = PPOTrainer(
        policy,
        training_arguments(config, PPOArguments, **_arguments(config, PPOArguments)),
        sources,
        tokenizer,
        rewards,
        gold=gold,
        separate_critic=config.separate_critic,
        train_encoder=config.train_encoder,
        samples_file=folder / "samples.jsonl",
        optimizer_choice=optimizer_choice(config),
        callbacks=[checkpoint_marker()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(config))
    history = save_history(trainer, config)
    weights = whole_state(trainer.model)
    if state.is_main_process:
        trainer.model.policy = merged(trainer.model.policy, config, folder)
        trainer.model.save_policy(folder, weights)
        trainer.model.save_critic(folder, weights)
        tokenizer.save_pretrained(folder)
    state.wait_for_everyone()
    rollouts = sum("objective/kl" in entry for entry in history)
    return last_quarter(history, "ppo") | {"ppo/rollouts": float(rollouts), "ppo/truncated_sources": truncated}


def _arguments(config: PPOConfig, arguments: type) -> dict[str, Any]:
    """The fields that the trainer knows by the same name, and those it knows by another."""
    own = {name for name in arguments.__annotations__ if hasattr(config, name)}
    return {name: getattr(config, name) for name in own} | {
        "rollout_batch_size": config.batch_size,
        "max_new_tokens": config.max_target_length,
        "kl_target": config.kl_target if config.adaptive_kl else None,
        "remove_unused_columns": False,
    }
