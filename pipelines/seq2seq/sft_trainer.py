"""The parts of supervised fine-tuning: flat token ids, the order of the examples, and the Trainer that uses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from pipelines.corpus.token_cache import CACHED_FROM, made_once, token_folder
from pipelines.seq2seq.pretrain_data import TokenRows, TokenWriter
from pipelines.seq2seq.sharded import InParts
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets
from pipelines.stage import write_json

if TYPE_CHECKING:
    from pipelines.seq2seq.streamed import Parts

_CHUNK = 4096


class Ragged:
    """Rows of token ids of different lengths in one flat int32 array: 4 bytes a token, not a Python object each."""

    def __init__(self, rows: Sequence[Sequence[int]] = ()):
        self._parts: list[np.ndarray] = []
        self._lengths: list[int] = []
        self.extend(rows)

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Append rows."""
        self._parts.extend(np.asarray(row, dtype=np.int32) for row in rows)
        self._lengths.extend(len(row) for row in rows)

    def freeze(self) -> Ragged:
        """Lay the rows out flat; to be called once, before reading."""
        self.lengths = np.asarray(self._lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._flat = np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.int32)
        self._parts = []
        return self

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> list[int]:
        end = self._ends[index]
        return self._flat[end - self.lengths[index] : end].tolist()


class TokenizedPairs(Dataset):
    """Documents and summaries as token ids; item i is ``{input_ids, attention_mask, labels}`` (lists)."""

    def __init__(
        self,
        sources: Ragged | TokenRows,
        targets: Ragged | TokenRows,
        truncated_sources: int = 0,
        truncated_targets: int = 0,
    ):
        self.sources, self.targets = (
            rows.freeze() if isinstance(rows, Ragged) else rows for rows in (sources, targets)
        )
        self.truncated_sources, self.truncated_targets = truncated_sources, truncated_targets

    @classmethod
    def of(
        cls,
        split: Any,
        tokenizer: PreTrainedTokenizerBase,
        lengths: LengthConfig,
        *,
        progress: str | None = None,
    ) -> TokenizedPairs:
        """Tokenize the ``document`` and ``summary`` columns of a split; those of a large one are kept in the cache.

        Args:
            split: a ``datasets.Dataset``.
            tokenizer: of the model.
            lengths: where documents and summaries are cut, and the prefix.
            progress: what the progress bar says; no bar without it.
        """
        if len(split) < CACHED_FROM:
            sources, targets = Ragged(), Ragged()
            cut = cls._tokenize(split, tokenizer, lengths, sources, targets, progress)
            return cls(sources, targets, *cut)
        settings = [lengths.max_source_length, lengths.max_target_length, lengths.prefix]
        folder = token_folder("pairs", split, ("document", "summary"), tokenizer, settings)

        def make(partial: Path) -> None:
            sources, targets = (TokenWriter(partial / f"{name}.bin", "int32") for name in ("sources", "targets"))
            cut = cls._tokenize(split, tokenizer, lengths, sources, targets, progress)
            sources.close()
            targets.close()
            write_json(partial / "cut.json", list(cut))

        made_once(folder, make)
        rows = (TokenRows.open(folder / f"{name}.bin", "int32") for name in ("sources", "targets"))
        return cls(*rows, *json.loads((folder / "cut.json").read_text(encoding="utf-8")))

    @staticmethod
    def _tokenize(
        split: Any,
        tokenizer: PreTrainedTokenizerBase,
        lengths: LengthConfig,
        sources: Ragged | TokenWriter,
        targets: Ragged | TokenWriter,
        progress: str | None,
    ) -> tuple[int, int]:
        """Fill ``sources`` and ``targets``; returns how many of each were cut."""
        cut_sources = cut_targets = 0
        for start in tqdm(range(0, len(split), _CHUNK), desc=progress, unit_scale=_CHUNK, disable=progress is None):
            rows = split[start : start + _CHUNK]
            found = tokenize_sources(tokenizer, list(rows["document"]), lengths)
            sources.extend(found["input_ids"])
            cut_sources += found["truncated"]
            found = tokenize_targets(tokenizer, list(rows["summary"]), lengths)
            targets.extend(found["input_ids"])
            cut_targets += found["truncated"]
        return cut_sources, cut_targets

    def __len__(self) -> int:
        return len(self.sources)

    def item(self, index: int, labels: list[int] | None = None) -> dict[str, list[int]]:
        """Example ``index``, with other labels than its summary where they are given."""
        ids = self.sources[index]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": self.targets[index] if labels is None else labels,
        }

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.item(index)


class ExampleSchedule(Dataset):
    """All examples of a whole run in the order they are seen; position p belongs to optimizer step p div global batch.

    The first ``copy_steps`` steps ask for tokens of the document itself, then come the summaries. In each of the two
    phases every epoch is a new permutation in which the examples of one step are of like length (transformers'
    ``get_length_grouped_indices``) and the steps are shuffled; an incomplete last step is left out. The order is a
    function of the arguments alone, so resuming is skipping.

    Args:
        pairs: the examples.
        steps: optimizer steps on summaries.
        global_batch: examples of one optimizer step, over all devices.
        seed: of the order.
        copy_steps: optimizer steps of the copy phase, which come first.
        copy_length: how many tokens of the document are copied.
        copy_from: ``start``: its first tokens; ``anywhere``: as many in a row, from a random place.
        end: id of the end token, which closes what is copied.
    """

    def __init__(
        self,
        pairs: TokenizedPairs,
        *,
        steps: int,
        global_batch: int,
        seed: int,
        copy_steps: int = 0,
        copy_length: int = 16,
        copy_from: str = "start",
        end: int = 1,
    ):
        self.pairs, self.copy_steps, self.copy_length, self.end = pairs, copy_steps, copy_length, end
        self.global_batch = global_batch
        self.steps_per_epoch = len(pairs) // global_batch
        if not self.steps_per_epoch:
            raise ValueError(f"{len(pairs)} examples do not fill one step of {global_batch}")
        self.order = np.concatenate(
            [self._phase(phase, count, seed) for phase, count in enumerate((copy_steps, steps)) if count]
        )
        copies = copy_steps * global_batch
        self.copy_starts = np.random.default_rng([seed, copies]).random(copies) * (copy_from == "anywhere")

    def _phase(self, phase: int, steps: int, seed: int) -> np.ndarray:
        lengths = self.pairs.sources.lengths.tolist()
        parts: list[np.ndarray] = []
        for epoch in range(-(-steps // self.steps_per_epoch)):
            # One generator an epoch and phase: the order of the summaries does not depend on how long was copied.
            entropy = np.random.SeedSequence([seed, phase, epoch]).generate_state(2, np.uint64)
            generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
            grouped = get_length_grouped_indices(lengths, self.global_batch, generator=generator)
            blocks = np.asarray(grouped[: self.steps_per_epoch * self.global_batch]).reshape(-1, self.global_batch)
            parts.append(blocks[np.random.default_rng(entropy[1]).permutation(len(blocks))])
        return np.concatenate(parts)[:steps].reshape(-1)

    def epoch_at(self, step: int) -> float:
        """Passes over the summaries after ``step`` optimizer steps; 0 in the copy phase."""
        return max(0, step - self.copy_steps) / self.steps_per_epoch

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        index = int(self.order[position])
        if position >= self.copy_steps * self.global_batch:
            return self.pairs.item(index)
        source = self.pairs.sources[index][:-1]
        start = int(self.copy_starts[position] * (len(source) - self.copy_length + 1)) if len(source) else 0
        return self.pairs.item(index, [*source[max(0, start) :][: self.copy_length], self.end])


class SFTTrainer(InParts, Seq2SeqTrainer):
    """``Seq2SeqTrainer`` whose evaluation loss is plain nats a token, whatever the batches and the label smoothing."""

    schedule: ExampleSchedule
    parts: Parts | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        # T5, BART and others take the number of tokens in a step, so the Trainer believes, and average over their own
        # part of the batch all the same: a step of several devices or parts would be several times too long.
        super().__init__(*args, compute_loss_func=self._mean_loss, compute_metrics=self._nats_a_token, **kwargs)

    def _nats_a_token(self, prediction: EvalPrediction) -> dict[str, float]:
        """Nats a token over all held-out examples; of a mixture, of each set and their mean by the sets' weights."""
        found = np.asarray(prediction.predictions, dtype=np.float64)
        losses = {}
        for name, (part,) in (self.parts.of(found) if self.parts is not None else {}).items():
            nats, tokens = part.sum(axis=0)
            losses[f"eval_loss_{name}"] = float(nats / tokens)
        if losses:
            return {"eval_loss": float(np.average(list(losses.values()), weights=self.parts.weights))} | losses
        nats, tokens = found.sum(axis=0)
        return {"eval_loss": float(nats / tokens)}

    def _mean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Label-smoothed cross-entropy over the tokens of the whole step, nats a token."""
        logits, smoothing = outputs["logits"].float(), self.args.label_smoothing_factor
        flat = logits.view(-1, logits.shape[-1]), labels.reshape(-1)
        total = F.cross_entropy(*flat, reduction="sum", label_smoothing=smoothing)
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **_: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Nats and tokens of each example, (B, 2), instead of a loss.

        The loop gives every batch the same weight, and processes that run short see examples twice: of what belongs to
        examples it drops those again.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with self.compute_loss_context_manager():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(1)
        found = torch.stack([nats, (labels != -100).sum(1).float()], dim=1)
        return None, found, torch.ones(len(found), device=found.device)

    def log(self, logs, *args, **kwargs):
        """Log with ``epoch`` counted in passes over the summaries."""
        # The whole run is one epoch to the Trainer (see ExampleSchedule); readers want passes over the data.
        self.state.epoch = round(self.schedule.epoch_at(self.state.global_step), 4)
        super().log(logs, *args, **kwargs)

    def save_plain(self, folder: str | Path, max_new_tokens: int) -> None:
        """Write the model, its tokenizer and plain generation settings, as any transformers user reads them."""
        own = self.accelerator.unwrap_model(self.model).generation_config
        own.max_length, own.max_new_tokens = None, max_new_tokens
        self.save_model(str(folder))
        # A pickle, with this run's paths in it; stage.json says what there is to say.
        (Path(folder) / "training_args.bin").unlink(missing_ok=True)
