"""The listwise DPO stage: align a model directly on ranked lists of completions and measure it on held-out ones."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.corpus.fields import RankingFields
from pipelines.errors import UserError
from pipelines.seq2seq.direct import DirectFields, scored_and_saved, tokenized_splits, train_directly
from pipelines.seq2seq.lora import load_policy


@config
class ListwiseConfig(RankingFields, DirectFields):
    """Listwise DPO of an encoder-decoder: the Plackett–Luce likelihood of whole rankings of K completions."""

    output_dir: str = Field("runs/listwise", description="folder the stage writes into", json_schema_extra=INERT)
    top_k: int | None = Field(
        None, ge=1, description="believe only so many leading places of each ranking; null: all that it has"
    )
    batch_size: int = Field(8, ge=1, description="lists a device takes in one forward pass")


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

    from transformers import set_seed

    from pipelines.corpus import load_rankings
    from pipelines.seq2seq.listwise_trainer import ListwiseDPOTrainer, list_log_probs, tokenize_rankings
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.training import global_batch

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model, field="model")
    model = load_policy(config.model)
    lists, cut = tokenized_splits(
        load_rankings(config), lambda texts: tokenize_rankings(texts, tokenizer, config, top_k=config.top_k)
    )
    global_batch(config, len(lists["train"]), field="rankings", noun="lists")
    trained = train_directly(config, ListwiseDPOTrainer, model, lists, tokenizer)

    def score(model) -> list[list[float]]:
        found = list_log_probs(model, lists["test"], tokenizer, config.eval_batch_size)
        if not all(math.isfinite(value) for values in found for value in values):
            raise UserError("learning_rate", config.learning_rate, "the policy gives NaN log-probabilities", "lower it")
        return found

    policy, reference = scored_and_saved(config, trained, tokenizer, score)
    counts = {
        f"listwise/truncated_{what}": cut[what] / total
        for what, total in (
            ("documents", sum(map(len, lists.values()))),
            ("summaries", sum(len(ids) for part in lists.values() for ids in part["completion_ids"])),
        )
    }
    return _metrics(config.beta, policy, reference, lists["test"]) | counts


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
