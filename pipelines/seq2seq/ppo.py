"""The PPO stage: align a model on rewards, held near where it began, and say how far it went."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.annotators import annotator_problems, annotator_sources
from pipelines.seq2seq.lora import LoraFields, load_policy, lora_settings, merged
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.rewards import is_function, reward_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig


@config
class PPOConfig(CorpusFields, LengthConfig, LoraFields, TrainingConfig):
    """Proximal policy optimization of an encoder-decoder against reward functions, with a KL pull to where it began."""

    output_dir: str = Field("runs/ppo", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source = Field(description="encoder-decoder to align, usually the supervised fine-tuned one; the reference")
    reward: Source | list[Source] = Field(
        description="what summaries are paid for: folder of a reward model, rouge, length, module:function, or a list"
    )
    reward_weights: list[float] | None = Field(None, description="weights of the reward functions; null: all 1")
    gold: str | None = Field(
        "rouge", description="judge logged beside the reward, never trained on: rouge, module:function, or null"
    )
    rollouts: int = Field(100, ge=1, description="how many times summaries are sampled and trained on")
    sources_per_rollout: int = Field(64, ge=1, description="documents of a rollout, over all devices")
    samples_per_source: int = Field(4, ge=1, description="summaries sampled of each document; it is encoded once")
    ppo_epochs: int = Field(2, ge=1, description="passes over a rollout")
    mini_batch_size: int = Field(64, ge=1, description="summaries of one optimizer step, over all devices")
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
    temperature: float = Field(
        1.0, gt=0, description="the policy is softmax(logits / temperature), in sampling and loss"
    )
    kl_coefficient: float = Field(0.05, ge=0, description="price of a nat away from the reference, in units of reward")
    adaptive_kl: bool = Field(False, description="move the coefficient so that the divergence tends to kl_target")
    kl_target: float = Field(6.0, gt=0, description="wanted divergence, nats a sequence (adaptive_kl)")
    kl_horizon: int = Field(
        10_000, ge=1, description="summaries in which the coefficient moves by up to 20 % (adaptive_kl)"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of a token's divergence")
    kl_in: Literal["reward", "loss"] = Field("reward", description="charge the divergence in the reward or in the loss")
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
    missing_eos_penalty: float = Field(1.0, ge=0, description="taken off the score of a summary that was cut")
    scale_rewards: bool = Field(False, description="divide scores by the standard deviation of all seen so far")
    reward_clip: float | None = Field(None, gt=0, description="clip (scaled) scores to ± this")
    whiten_advantages: bool = Field(True, description="bring a rollout's advantages to mean 0 and variance 1")
    separate_critic: bool = Field(False, description="give the critic a trunk of its own instead of the policy's")
    train_encoder: bool = Field(True, description="false trains the decoder only: a step then costs much less")
    samples_kept: int = Field(4, ge=0, description="summaries of each rollout kept in samples.jsonl")

    @property
    def reward_specs(self) -> list[str]:
        """The reward functions as a list."""
        return [self.reward] if isinstance(self.reward, str) else list(self.reward)

    def problems(self) -> list[Problem]:
        found = super().problems()
        rows = self.sources_per_rollout * self.samples_per_source
        if rows % self.mini_batch_size:
            mend = f"give a divisor of sources_per_rollout × samples_per_source = {rows}"
            found.append(Problem("mini_batch_size", self.mini_batch_size, "does not divide a rollout", mend))
        if self.mini_batch_size % (self.samples_per_source * self.gradient_accumulation):
            factor = self.samples_per_source * self.gradient_accumulation
            mend = f"give a multiple of samples_per_source × gradient_accumulation = {factor}"
            found.append(Problem("mini_batch_size", self.mini_batch_size, "would cut a document's summaries", mend))
        found += model_problems({"model": self.model}) + reward_problems(self.reward_specs)
        found += annotator_problems(self.gold, "gold") if self.gold else []
        if not self.reward_specs:
            found.append(
                Problem("reward", [], "names nothing", "give a reward model's folder, rouge or module:function")
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_specs):
            problem = f"{len(self.reward_weights)} weights for {len(self.reward_specs)} reward functions"
            found.append(Problem("reward_weights", self.reward_weights, problem, "give one weight for each"))
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            problem = "has no gradient in expectation when it is charged in the loss"
            found.append(Problem("kl_estimator", "k1", problem, "give kl_estimator=k3, or kl_in=reward"))
        if self.adaptive_kl and self.kl_coefficient == 0:
            found.append(Problem("kl_coefficient", 0.0, "cannot be adapted from 0", "give a value above 0"))
        for name in ("epochs", "max_steps"):
            if getattr(self, name) != getattr(TrainingConfig, name, getattr(self, name)):
                found.append(Problem(name, getattr(self, name), "PPO counts in rollouts", "give rollouts= instead"))
        if self.stop_kl is not None and self.precision == "fp16":
            problem = "a step without gradients breaks float16's loss scaling"
            found.append(Problem("stop_kl", self.stop_kl, problem, "give precision=bf16, or stop_kl=null"))
        return found

    def environment(self) -> dict[str, str]:
        """The sources of the user's own functions."""
        own = [spec for spec in [*self.reward_specs, self.gold or ""] if is_function(spec)]
        return super().environment() | annotator_sources(own)


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

    from pipelines.corpus import load_corpus
    from pipelines.seq2seq.annotators import load_annotator
    from pipelines.seq2seq.generation import check_lengths
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.ppo_arguments import PPOArguments
    from pipelines.seq2seq.ppo_trainer import PPOTrainer
    from pipelines.seq2seq.rewards import load_rewards
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        tokenize_sources,
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
    train = load_corpus(config)["train"]
    if len(train) < config.sources_per_rollout:
        problem = f"a rollout takes {config.sources_per_rollout} documents"
        mend = f"give more documents, or sources_per_rollout={len(train)} or less"
        raise UserError("dataset", f"{len(train)} training documents", problem, mend)
    _check_processes(config, state.num_processes)
    needed = config.rollouts * config.sources_per_rollout
    if len(train) > needed:
        train = train.select(sorted(random.Random(config.seed).sample(range(len(train)), needed)))
    tokens = tokenize_sources(tokenizer, train["document"], config)
    sources = [
        {"id": id_, "input_ids": ids, "document": document, "references": references}
        for id_, ids, document, references in zip(
            train["id"], tokens["input_ids"], train["document"], train["references"], strict=True
        )
    ]
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
    history = [entry for entry in save_history(trainer, config) if "objective/kl" in entry]
    if state.is_main_process:
        policy = merged(trainer.model.policy, config, folder)
        policy.save_pretrained(folder)
        trainer.model.save_critic(folder)
        tokenizer.save_pretrained(folder)
    state.wait_for_everyone()
    return _metrics(history) | {"ppo/truncated_sources": tokens["truncated"] / len(train)}


def _metrics(history: list[dict[str, float]]) -> dict[str, float]:
    last = history[-max(1, len(history) // 4) :]
    names = {"proxy_reward": "train_proxy_reward", "kl": "train_kl", "gold": "train_gold", "length": "train_length"}
    means = {
        f"ppo/{name}": sum(entry[f"objective/{key}"] for entry in last) / len(last)
        for key, name in names.items()
        if f"objective/{key}" in last[0]
    }
    return means | {"ppo/rollouts": float(len(history))}


def _arguments(config: PPOConfig, arguments: type) -> dict[str, Any]:
    """The fields that the trainer knows by the same name, and those it knows by another."""
    own = {name for name in arguments.__annotations__ if hasattr(config, name)}
    return {name: getattr(config, name) for name in own} | {
        "rollout_batch_size": config.batch_size,
        "max_new_tokens": config.max_target_length,
        "kl_target": config.kl_target if config.adaptive_kl else None,
        "remove_unused_columns": False,
    }


def _check_processes(config: PPOConfig, processes: int) -> None:
    if config.sources_per_rollout % processes:
        mend = f"give a multiple of {processes}, the number of processes"
        raise UserError("sources_per_rollout", config.sources_per_rollout, "cannot be shared out", mend)
    factor = config.samples_per_source * config.gradient_accumulation * processes
    if config.mini_batch_size % factor:
        mend = f"give a multiple of samples_per_source × gradient_accumulation × processes = {factor}"
        raise UserError("mini_batch_size", config.mini_batch_size, "cannot be shared out", mend)
