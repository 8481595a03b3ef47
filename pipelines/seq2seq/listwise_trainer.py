"""Listwise DPO: ranked lists of completions under Plackett–Luce, on the DPO trainer.

All completions of a source are rows of one decoder batch and share one encoding. Models, references (cached, online,
adapter off), the check of the first batch and logging are those of ``EncoderDecoderDPOTrainer``; new are the batch and
the loss. Lists may differ in length: every row says which source it belongs to, and none is filled up with empty rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.seq2seq.collators import check_reads_text, pad_rows, token_counts
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.losses import plackett_luce_loss, ranking_agreement, sequence_sum
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets
from pipelines.seq2seq.view import as_view, decoder_start_id, encode, sequence_log_probs

LIST_COLUMNS = ("prompt_ids", "completion_ids", "ranking", "known")
"""Columns of a tokenized set of lists: ids of the source, K lists of ids, their numbers from best to worst, and how
many leading places of that ranking are known."""


@dataclass
class ListCollator:
    """Collates ranked lists, rows source-major: the completions of the first source, then those of the second …

    Args:
        pad_id: padding id of encoder and decoder.
        start_id: the token every decoder row begins with.

    A call takes B examples with ``LIST_COLUMNS`` (and ``ref_logps``, a number a completion, where present) and returns

    - ``input_ids``, ``attention_mask``, ``completion_mask`` (R, 1 + T) as ``PairCollator``, R the completions in all;
    - ``encoder_input_ids``, ``encoder_attention_mask`` (B, S), and ``encoder_rows``: the source of each row (R,), or
      ``source-major`` where all lists are equally long;
    - ``ranking`` (B, K), K the longest list, −1 beyond the end of a shorter one, and ``known`` (B,);
    - ``ref_logps`` (R,) fp32.
    """

    pad_id: int
    start_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        counts = [len(example["completion_ids"]) for example in examples]
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        rows = [[self.start_id, *ids] for example in examples for ids in example["completion_ids"]]
        ids, mask = pad_rows(rows, self.pad_id)
        completion_mask = mask.clone()
        completion_mask[:, 0] = 0
        source_ids, source_mask = pad_rows([example["prompt_ids"] for example in examples], self.pad_id)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "completion_mask": completion_mask,
            "encoder_input_ids": source_ids,
            "encoder_attention_mask": source_mask,
            "encoder_rows": "source-major" if len(set(counts)) == 1 else owners,
            "ranking": pad_rows([example["ranking"] for example in examples], -1)[0],
            "known": torch.tensor([example["known"] for example in examples]),
        }
        if "ref_logps" in examples[0]:
            values = [value for example in examples for value in example["ref_logps"]]
            batch["ref_logps"] = torch.tensor(values, dtype=torch.float32)
        return batch


class ListwiseDPOTrainer(EncoderDecoderDPOTrainer):
    """DPO on ranked lists; arguments as for ``EncoderDecoderDPOTrainer``, sets as ``tokenize_rankings`` makes them.

    Raises:
        UserError: as there; also for a model of speech or images, as lists hold their sources as token ids.
    """

    collator_class = ListCollator
    _NO_MODEL_INPUTS = ("completion_mask", "ranking", "known", "ref_logps")

    def __init__(self, model: PreTrainedModel, *arguments: Any, **options: Any):
        check_reads_text(as_view(model), "listwise DPO takes")
        super().__init__(model, *arguments, **options)

    def _lengths(self, dataset: Dataset) -> list[int]:
        return token_counts(dataset, ("prompt_ids", "completion_ids")).tolist()

    def _set_signature_columns_if_needed(self) -> None:
        # The columns that the Trainer leaves in the set.
        self._signature_columns = [*LIST_COLUMNS, "ref_logps"]

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        return dataset

    def _sequence_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(R,) log π(y | x), by TRL's fused head inside the model's forward, where DDP and FSDP want it."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {name: value for name, value in inputs.items() if name not in self._NO_MODEL_INPUTS}
        return model(**given, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(dim=1)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """log π_ref(y | x) of a batch's completions, summed over tokens; under LoRA with the adapter off.

        Args:
            model: the reference, or the policy whose adapter is switched off.
            inputs: as ``ListCollator`` makes them.

        Returns:
            (R,) nats, without gradient.
        """
        given = {name: value for name, value in inputs.items() if name not in ("ranking", "known", "ref_logps")}
        # TRL splits its rows into chosen and rejected halves.
        return torch.cat(super().compute_ref_log_probs(model, given))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # As for pairs: in memory, batches of like length. Lists of unequal length are gathered as filled-up matrices.
        counts = [len(completions) for completions in dataset["completion_ids"]]
        order = np.argsort(self._lengths(dataset), kind="stable")
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        found = []
        for batch in self.accelerator.prepare(loader):
            values = self.compute_ref_log_probs(self.ref_model or self.model, batch).float()
            matrix = _by_source(values, batch["ranking"] >= 0)
            found.extend(self.accelerator.gather_for_metrics(self._filled(matrix, max(counts))).cpu().tolist())
        in_order: list[list[float]] = [[]] * len(dataset)
        for index, values in zip(order.tolist(), found, strict=True):
            in_order[index] = values[: counts[index]]
        return dataset.add_column("ref_logps", in_order, new_fingerprint=f"{dataset._fingerprint[:40]}-ref_logps")

    @staticmethod
    def _filled(matrix: Tensor, width: int) -> Tensor:
        return nn.functional.pad(matrix, (0, width - matrix.shape[1]))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._unchecked:
            self._check_log_probs(inputs)
            self._unchecked = False
        policy = self._sequence_log_probs(model, inputs)
        if self.precompute_ref_logps:
            reference = inputs["ref_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        ranking, known = inputs["ranking"], inputs["known"]
        rewards = _by_source(self.beta * (policy - reference), ranking >= 0)
        loss = plackett_luce_loss(rewards, ranking, top_k=known).mean()
        with torch.no_grad():
            mode = "train" if self.model.training else "eval"
            agreement = ranking_agreement(rewards, ranking, top_k=known)
            best, worst = best_and_worst(rewards, ranking)
            for name, values in (
                ("rewards/accuracies", agreement),
                ("rewards/margins", best - worst),
                ("rewards/best", best),
                ("rewards/worst", worst),
            ):
                self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values).mean().item())
        return (loss, None) if return_outputs else loss


def _by_source(values: Tensor, present: Tensor) -> Tensor:
    """(R,) values of source-major rows as (B, K), 0 beyond the end of a shorter list; ``present`` (B, K) says where."""
    filled = torch.arange(present.shape[1], device=values.device) < present.sum(dim=1, keepdim=True)
    return values.new_zeros(filled.shape).masked_scatter(filled, values)


def best_and_worst(rewards: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of the first and the last of each ranking.

    Args:
        rewards: (B, K), as for ``plackett_luce_loss``.
        ranking: (B, K), −1 beyond the end of a shorter list.

    Returns:
        Two (B,). The last of a ranking of which only the first places are known is one of those that are worse.
    """
    ends = torch.stack([torch.zeros_like(ranking[:, 0]), (ranking >= 0).sum(dim=1) - 1], dim=1)
    return rewards.gather(1, ranking.gather(1, ends)).unbind(dim=1)


def tokenize_rankings(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, lengths: LengthConfig, *, top_k: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """Token ids of ranked lists, held in memory.

    Args:
        dataset: with ``prompt``, ``completions`` and ``ranking``, as ``load_rankings`` makes it.
        tokenizer: of the model that will read them.
        lengths: prefix and lengths; what is longer is cut, its end token kept.
        top_k: believe at most so many leading places of each ranking.

    Returns:
        The set with ``LIST_COLUMNS``, and how many ``documents`` and ``summaries`` were cut.
    """
    cut = {"documents": 0, "summaries": 0}

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sources = tokenize_sources(tokenizer, batch["prompt"], lengths)
        cut["documents"] += sources["truncated"]
        columns: dict[str, list[Any]] = {"prompt_ids": sources["input_ids"]}
        columns |= {name: [] for name in LIST_COLUMNS[1:]}
        for texts, ranking in zip(batch["completions"], batch["ranking"], strict=True):
            targets = tokenize_targets(tokenizer, texts, lengths)
            cut["summaries"] += targets["truncated"]
            columns["completion_ids"].append(targets["input_ids"])
            columns["ranking"].append([*ranking, *(i for i in range(len(texts)) if i not in ranking)])
            columns["known"].append(min(len(ranking), top_k or len(ranking)))
        return columns

    number = Value("int32")
    kinds = (List(number), List(List(number)), List(number), number)
    tokenized = dataset.map(
        tokenize,
        batched=True,
        keep_in_memory=True,
        load_from_cache_file=False,
        features=Features(dict(zip(LIST_COLUMNS, kinds, strict=True))),
        remove_columns=dataset.column_names,
        new_fingerprint=f"{dataset._fingerprint[:44]}-lists-{top_k or 0}",
        desc="tokenizing lists",
    )
    return tokenized, cut


@torch.no_grad()
def list_log_probs(
    model: nn.Module, lists: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[Sequence[float]]:
    """log π(y | x) of every completion in fp32, summed over tokens.

    Args:
        model: a view or a PEFT model around one; put into evaluation mode.
        lists: N tokenized lists.
        tokenizer: for its padding id.
        batch_size: lists in one pass.

    Returns:
        N lists of numbers in nats, in the order of ``lists`` and of their completions.
    """
    model.eval()
    device = next(model.parameters()).device
    collate = ListCollator(tokenizer.pad_token_id, decoder_start_id(model))
    order = sorted(range(len(lists)), key=lambda index: len(lists[index]["prompt_ids"]))
    found: list[Sequence[float]] = [[]] * len(lists)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([lists[index] for index in chosen])
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        states = encode(model, batch["encoder_input_ids"], batch["encoder_attention_mask"])
        mask, rows = batch["completion_mask"][:, 1:], batch["encoder_rows"]
        log_probs = sequence_log_probs(
            model, states, batch["encoder_attention_mask"], batch["input_ids"][:, 1:], mask, order=rows
        )
        counts = (batch["ranking"] >= 0).sum(dim=1).tolist()
        for index, values in zip(chosen, sequence_sum(log_probs, mask).cpu().split(counts), strict=True):
            found[index] = values.tolist()
    return found
