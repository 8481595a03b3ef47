"""The listwise DPO stage: align a model directly on ranked lists of completions and measure it on held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.config import INERT, Problem, Source, config
from pipelines.corpus.fields import RankingFields
from pipelines.errors import UserError
from pipelines.seq2seq.lora import LoraFields, load_policy, lora_settings, merged
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig


@config
class ListwiseConfig(RankingFields, LengthConfig, LoraFields, TrainingConfig):
    """Listwise DPO of an encoder-decoder: the Plackett–Luce likelihood of whole rankings of K completions."""

    output_dir: str = Field("runs/listwise", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source = Field(description="encoder-decoder to align, usually the supervised fine-tuned one; the reference")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, in reward units a nat")
    top_k: int | None = Field(
        None, ge=1, description="believe only so many leading places of each ranking; null: all that it has"
    )
    precompute_ref_log_probs: bool = Field(
        True, description="compute the reference's log-probabilities once before training and keep no reference model"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    epochs: float = Field(1.0, gt=0, description="passes over the lists")
    batch_size: int = Field(8, ge=1, description="lists a device takes in one forward pass")

    def problems(self) -> list[Problem]:
        return super().problems() + model_problems({"model": self.model})


def listwise(config: ListwiseConfig) -> dict[str, float]:
    """Align a model on ranked lists with listwise DPO and measure it.

    Writes the model (adapters merged into it, and by themselves under ``adapter``), its tokenizer and
    ``log_history.json`` into ``config.output_dir``.

    Returns:
        Held out: ``listwise/loss`` (Plackett–Luce, nats a list; log K! at the reference for full rankings),
        ``listwise/accuracy`` (share of a list's decided pairs that the implicit rewards β log π/π_ref order alike, with
        its interval), ``listwise/top1`` (share of lists whose best has the highest implicit reward, with its interval),
        ``listwise/margin`` (mean difference of implicit rewards of the first and the last, with its interval),
        ``listwise/lists``, ``listwise/completions`` (mean length of a list); and the shares of texts that were cut.

    Raises:
        UserError: from the model, the tokenizer or the data; or log-probabilities that are not finite.
    """
    import math

    from accelerate import PartialState
    from transformers import set_seed
    from trl import DPOConfig

    from pipelines.corpus import load_rankings
    from pipelines.seq2seq.listwise_trainer import ListwiseDPOTrainer, list_log_probs, tokenize_rankings
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        global_batch,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model, field="model")
    model = load_policy(config.model)
    texts = load_rankings(config)
    lists, cut = {}, {}
    for split in ("train", "validation", "test"):
        lists[split], cut[split] = tokenize_rankings(texts[split], tokenizer, config, top_k=config.top_k)

    global_batch(config, len(lists["train"]), field="rankings", noun="lists")
    watch = len(lists["validation"]) > 0
    arguments = training_arguments(
        config,
        DPOConfig,
        beta=config.beta,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        precompute_ref_batch_size=config.eval_batch_size,
        eval_strategy="steps" if watch else "no",
        eval_steps=config.save_steps,
    )
    trainer = ListwiseDPOTrainer(
        model,
        arguments,
        lists["train"],
        tokenizer,
        config,
        eval_dataset=lists["validation"] if watch else None,
        peft_config=lora_settings(config),
        callbacks=[checkpoint_marker()],
        optimizer_cls_and_kwargs=optimizer_choice(config),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(config))
    save_history(trainer, config)

    folder, main = Path(config.output_dir), PartialState().is_main_process
    model = merged(trainer.accelerator.unwrap_model(trainer.model), config, folder, save=main)
    device = next(model.parameters()).device
    policy = list_log_probs(model, lists["test"], tokenizer, config.eval_batch_size)
    reference = load_policy(config.model).to(device)
    references = list_log_probs(reference, lists["test"], tokenizer, config.eval_batch_size)
    if not all(math.isfinite(value) for values in policy for value in values):
        raise UserError("learning_rate", config.learning_rate, "the policy gives NaN log-probabilities", "lower it")
    if main:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    PartialState().wait_for_everyone()
    counts = {
        f"listwise/truncated_{what}": sum(c[what] for c in cut.values()) / total
        for what, total in (
            ("documents", sum(map(len, lists.values()))),
            ("summaries", sum(len(ids) for part in lists.values() for ids in part["completion_ids"])),
        )
    }
    return _metrics(config.beta, policy, references, lists["test"]) | counts


def _metrics(beta: float, policy: list, reference: list, lists: Any) -> dict[str, float]:
    import torch

    from pipelines.seq2seq.listwise_trainer import best_and_worst
    from pipelines.seq2seq.losses import plackett_luce_loss, ranking_agreement
    from pipelines.seq2seq.metrics import with_interval

    columns: dict[str, list[float]] = {"loss": [], "accuracy": [], "top1": [], "margin": []}
    for ours, theirs, order, known in zip(policy, reference, lists["ranking"], lists["known"], strict=True):
        rewards = beta * (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64))[None]
        ranking = torch.tensor([order])
        best, worst = best_and_worst(rewards, ranking)
        columns["loss"].append(plackett_luce_loss(rewards, ranking, top_k=known).item())
        columns["accuracy"].append(ranking_agreement(rewards, ranking, top_k=known).item())
        columns["top1"].append(float(best.item() >= rewards.max().item()))
        columns["margin"].append((best - worst).item())
    loss = columns.pop("loss")
    found = {"listwise/loss": sum(loss) / len(loss)}
    for name, values in columns.items():
        found |= with_interval(f"listwise/{name}", values)
    return found | {
        "listwise/lists": float(len(policy)),
        "listwise/completions": sum(map(len, policy)) / len(policy),
    }
