"""TRL 0.11.4's DPO and PPO trainers on a small random T5, one turn at a time; run by against_trl_0_11.py.

This is the last release whose trainers took encoder-decoder models. It runs under an interpreter of its own.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import warnings

import torch
import workload
from datasets import Dataset
from transformers import TrainerCallback
from trl import AutoModelForSeq2SeqLMWithValueHead, DPOConfig, DPOTrainer, PPOConfig, PPOTrainer, create_reference_model

warnings.simplefilter("ignore")


class _StepByStep(TrainerCallback):
    def __init__(self, turns: workload.Turns):
        self.turns = turns

    def on_train_begin(self, *args, **kwargs):
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.wait("first step" if state.global_step == 1 else "step")


class _CountedCaching(DPOTrainer):
    """Reports the pass that caches the reference's log-probabilities as a turn of its own."""

    turns: workload.Turns

    def get_train_dataloader(self):
        if not self.precompute_ref_log_probs or self._precomputed_train_ref_log_probs:
            return super().get_train_dataloader()
        self.turns.wait()
        loader = super().get_train_dataloader()
        self.turns.wait("caching")
        return loader


def dpo(job: dict, turns: workload.Turns, folder: str) -> None:
    """``epochs`` passes over ``steps`` batches of pairs, with a reference model beside it or with a cached one."""
    batch, source, target, cached = job["batch"], job["source"], job["target"], job["cached"]
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=job["epochs"],
        learning_rate=1e-5,
        logging_steps=job["steps"],
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=job["bf16"],
        is_encoder_decoder=True,
        max_length=source + target,
        max_prompt_length=source,
        max_target_length=target,
        max_completion_length=target,
        remove_unused_columns=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        precompute_ref_log_probs=cached,
    )
    trainer = _CountedCaching(
        workload.model(job["size"]),
        None if cached else workload.model(job["size"]),
        args=args,
        train_dataset=Dataset.from_dict(workload.Texts().pairs(batch * job["steps"], source, target)),
        tokenizer=workload.tokenizer(),
        callbacks=[_StepByStep(turns)],
    )
    trainer.turns = turns
    trainer.train()


def ppo(job: dict, turns: workload.Turns, folder: str) -> None:
    """Rollouts of ``batch`` sources with ``samples`` completions each, trained on for ``epochs`` epochs."""
    source, target = job["source"], job["target"]
    rows = job["batch"] * job["samples"]
    workload.model(job["size"]).save_pretrained(folder)
    policy = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(folder)
    config = PPOConfig(
        batch_size=rows,
        mini_batch_size=rows // job["mini_batches"],
        gradient_accumulation_steps=1,
        ppo_epochs=job["epochs"],
        learning_rate=1e-5,
        log_with=None,
        seed=0,
        accelerator_kwargs={"mixed_precision": "bf16"} if job["bf16"] else {"cpu": not torch.cuda.is_available()},
    )
    trainer = PPOTrainer(config, policy, create_reference_model(policy), workload.tokenizer())
    texts = workload.Texts()
    turns.wait()
    for rollout in range(job["steps"]):
        sources = [torch.tensor(texts.ids(source)) for _ in range(job["batch"])]
        queries = [ids for ids in sources for _ in range(job["samples"])]
        generated = trainer.generate(
            queries,
            batch_size=rows,
            max_new_tokens=target,
            min_new_tokens=target,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            return_prompt=False,
        )
        completions = [ids[1:] for ids in generated]  # the decoder's start token comes back too
        rewards = [torch.tensor(workload.reward(ids.tolist())) for ids in completions]
        trainer.step(queries, completions, rewards)
        turns.wait("first rollout" if rollout == 0 else "rollout")


if __name__ == "__main__":
    import tempfile

    asked = workload.job()
    imported = workload.peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        turns = workload.Turns()
        {"dpo": dpo, "ppo": ppo}[asked["method"]](asked, turns, folder)
        turns.done(imported=imported, gpu_peak=workload.gpu_peak_megabytes())
