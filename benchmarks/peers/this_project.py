"""This project's DPO and PPO trainers on a small random T5, one turn at a time; run by against_trl_0_11.py."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig

from pipelines.memory import keep_freed_memory
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.ppo_arguments import PPOArguments
from pipelines.seq2seq.ppo_trainer import PPOTrainer
from pipelines.seq2seq.reward_model import EncoderDecoderRewardModel, RewardScorer
from pipelines.seq2seq.rewards import RewardFunction, Rewards
from pipelines.seq2seq.sampling import GumbelSampler, prompt_keys, sample_completions
from pipelines.seq2seq.training import LengthConfig
from pipelines.seq2seq.view import encode


class _StepByStep(TrainerCallback):
    """Ends a turn after every ``every`` optimizer steps."""

    def __init__(self, turns: workload.Turns, name: str, every: int = 1, details: Callable[[], dict] = dict):
        self.turns, self.name, self.every, self.details = turns, name, every, details

    def on_train_begin(self, *args, **kwargs):
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            first = state.global_step == self.every
            self.turns.wait(f"first {self.name}" if first else self.name, self.details)


class _CountedCaching(EncoderDecoderDPOTrainer):
    """Reports the pass that caches the reference's log-probabilities as a turn of its own."""

    turns: workload.Turns

    def _precompute_ref_logps(self, *args, **kwargs):
        self.turns.wait()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.turns.wait("caching")
        return found


def common(job: dict, folder: str) -> dict:
    """Arguments of both trainers, as the stages set them."""
    return {
        "output_dir": folder,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": job["bf16"],
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def dpo(job: dict, turns: workload.Turns, folder: str) -> None:
    """``epochs`` passes over ``steps`` batches of pairs, with a reference model beside it or with a cached one."""
    batch, source, target = job["batch"], job["source"], job["target"]
    args = DPOConfig(
        per_device_train_batch_size=batch,
        num_train_epochs=job["epochs"],
        logging_steps=job["steps"],
        precompute_ref_log_probs=job["cached"],
        precompute_ref_batch_size=2 * batch,  # the stages' batch without gradients, by default twice the other
        **common(job, folder),
    )
    _CountedCaching.turns = turns
    _CountedCaching(
        workload.model(job["size"]),
        args,
        Dataset.from_dict(workload.Texts().pairs(batch * job["steps"], source, target)),
        workload.tokenizer(),
        LengthConfig(max_source_length=source, max_target_length=target),
        callbacks=[_StepByStep(turns, "step")],
    ).train()


def even_words(documents: list[str], summaries: list[str], references: list[list[str]]) -> list[float]:
    """The peer's reward, from texts."""
    return [workload.reward([int(word[1:]) for word in text.split() if word[1:].isdigit()]) for text in summaries]


def reward_model(job: dict, folder: Path) -> Callable:
    """A reward model of the policy's size, as PPO is given one."""
    workload.model(job["size"]).save_pretrained(folder)
    lengths = LengthConfig(max_source_length=job["source"], max_target_length=job["target"] + 1)
    EncoderDecoderRewardModel.from_seq2seq(str(folder), lengths).save_pretrained(folder)
    workload.tokenizer().save_pretrained(folder)
    scorer = RewardScorer(str(folder), batch_size=job["batch"] * job["samples"])
    return lambda documents, summaries, references: scorer(documents, summaries)


def ppo(job: dict, turns: workload.Turns, folder: str) -> None:
    """Rollouts of ``batch`` sources with ``samples`` completions each, trained on for ``epochs`` epochs.

    With ``parts`` the reward is a model's, and after every rollout its raw parts are timed on the same data.
    """
    batch, samples, texts = job["batch"], job["samples"], workload.Texts()
    args = PPOArguments(
        rollouts=job["steps"],
        sources_per_rollout=batch,
        samples_per_source=samples,
        ppo_epochs=job["epochs"],
        mini_batch_size=batch * samples // job["mini_batches"],
        rollout_batch_size=batch * samples,
        max_new_tokens=job["target"],
        value_clip_range=0.2,
        samples_kept=0,
        **common(job, folder),
    )
    sources = [
        {"id": str(number), "input_ids": ids, "document": " ".join(map(workload.word, ids[:-1])), "references": [""]}
        for number, ids in enumerate(texts.ids(job["source"]) for _ in range(batch * job["steps"]))
    ]
    function = reward_model(job, Path(folder) / "reward") if job["parts"] else even_words
    # Its end token is none of the model's: every completion has its full length, as the peer's has.
    tokenizer = workload.tokenizer(end="<end>")
    rewards = Rewards([RewardFunction("reward", 1.0, function)])
    trainer = PPOTrainer(workload.model(job["size"]), args, sources, tokenizer, rewards)
    details = (lambda: raw_parts(trainer)) if job["parts"] else dict
    trainer.add_callback(_StepByStep(turns, "rollout", args.steps_per_rollout, details))
    trainer.train()


def raw_parts(trainer: PPOTrainer) -> dict[str, float]:
    """Seconds of what a rollout cannot do without, each part called by itself on the rollout just finished.

    Sampling, the reference's and the reward's forward passes, and a forward and backward pass of the policy for every
    mini-batch of every epoch. No optimizer, no advantages, no logging, no log-probabilities from before the epochs.
    """
    args, model, rollout = trainer.args, trainer.model, trainer.rollout
    samples, number = args.samples_per_source, trainer.state.global_step // args.steps_per_rollout - 1
    names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
    examples = [trainer.train_dataset[i] for i in trainer.sources_of(number)]
    keys = prompt_keys([example["id"] for example in examples]).repeat_interleave(samples)
    first = number * args.steps_per_rollout
    micro_batches = [trainer.micro_batch(first + step) for step in range(args.steps_per_rollout)]

    def generate() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            sample_completions(
                model.policy,
                encode(model.policy, rollout["source_ids"], rollout["source_mask"]),
                rollout["source_mask"],
                GumbelSampler(0, keys, torch.arange(samples).repeat(len(examples)), step=number),
                samples=samples,
                max_new_tokens=args.max_new_tokens,
                eos_token_id=trainer.processing_class.eos_token_id,
                pad_token_id=trainer.processing_class.pad_token_id,
            )

    def reference() -> None:
        with trainer.accelerator.autocast():
            trainer.reference.log_probs(*(rollout[name] for name in names))

    def reward() -> None:
        written = trainer.processing_class.batch_decode(rollout["completion_ids"].tolist(), skip_special_tokens=True)
        documents = [example["document"] for example in examples for _ in range(samples)]
        trainer.rewards(documents, written, [[""]] * len(documents))

    def epochs() -> None:
        for batch in micro_batches:
            with trainer.accelerator.autocast():
                found = model(*(batch[name] for name in names))
            (found["log_probs"].sum() + found["values"].sum()).backward()
            model.zero_grad()

    seconds = {}
    for part in (generate, reference, reward, epochs):
        start = time.perf_counter()
        part()
        seconds[part.__name__] = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    keep_freed_memory()  # as every stage does
    asked = workload.job()
    imported = workload.peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        turns = workload.Turns()
        {"dpo": dpo, "ppo": ppo}[asked["method"]](asked, turns, folder)
        turns.done(imported=imported, gpu_peak=workload.gpu_peak_megabytes())
