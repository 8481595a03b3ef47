"""Held-out means in which every example counts once, however many processes share the examples.

accelerate fills the last batches up with examples from the beginning, which would count twice, and the Trainer weighs
a batch by its nominal size. Here nothing is filled up, and a batch weighs what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput


class SharedBatches(Sampler[list[int]]):
    """The batches of one of W processes that go through N examples together, in as many steps each.

    As long as there are enough, every process takes another part of the next W·B examples; then each the same share of
    those that are left; and what is fewer than W every process takes, so that all of them have the same to do.

    Args:
        examples: N.
        batch_size: B, examples a process takes at once.
        processes: W.
        process: which of them this is.

    Attributes:
        counts: for each step how many examples it stands for, over all processes.
    """

    def __init__(self, examples: int, batch_size: int, processes: int = 1, process: int = 0):
        self.batches: list[list[int]] = []
        self.counts: list[int] = []
        start = 0
        while start < examples:
            share = min(batch_size, (examples - start) // processes)
            taken = share * processes or min(batch_size, examples - start)
            first = start + process * share
            self.batches.append(list(range(first, first + (share or taken))))
            self.counts.append(taken)
            start += taken

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class HeldOutMeans:
    """Mixin for a Trainer whose evaluation is the means over the held-out examples of what ``held_out`` gives."""

    def held_out(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        """Means over a batch: its ``loss`` and whatever is logged beside it."""
        raise NotImplementedError

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """This process's batches of the held-out set; accelerate must not share them out again."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        shares = (self.args.eval_batch_size, self.args.world_size, self.args.process_index)
        return DataLoader(dataset, batch_sampler=SharedBatches(len(dataset), *shares), collate_fn=self.data_collator)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop; the means go into its metrics."""
        counts = dataloader.batch_sampler.counts
        self._counts, self._sums = iter(counts), {}
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value / sum(counts) for name, value in self._sums.items()}
        )
        return output

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Adds a step's means to the sums; nothing is left for the Trainer to gather."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            means = self.held_out(model, inputs)
        values = torch.tensor([float(value) for value in means.values()], device=self.args.device)
        count = next(self._counts)
        for name, value in zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + count * value
        return None, None, None
