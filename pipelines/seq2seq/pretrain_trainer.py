"""The Trainer of pretraining: batches that come ready-made, held-out loss of each objective, ROUGE, tokens a second."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.seq2seq.generation import GenerationConfig, generate_summaries, inference
from pipelines.seq2seq.metrics import rouge
from pipelines.seq2seq.pretrain_data import IGNORED, Arrays, Mixture, Objective, model_inputs, seed_of
from pipelines.seq2seq.pretrain_speed import SummedCrossEntropy
from pipelines.seq2seq.sft_trainer import SFTTrainer
from pipelines.seq2seq.sharded import whole

ROUGE = ("rouge1", "rouge2", "rougeL")


def bits_per_byte(nats: float, size: int) -> float:
    """Cross-entropy of a text in bits for each byte of it, which does not depend on how it is cut into tokens.

    Args:
        nats: negative log-likelihood of the whole text, its end mark and sentinels included.
        size: bytes of the text in UTF-8, without those marks.
    """
    return nats / (math.log(2.0) * max(size, 1))


@dataclass(frozen=True)
class HeldOut:
    """What is measured at every evaluation, the same each time.

    Args:
        batches: objective -> batches of sources and targets.
        sizes: objective -> bytes of its targets' text, as the tokenizer writes it out.
        weights: objective -> its share in the mean loss.
        documents: to be summarized greedily.
        references: one or more for each of them.
    """

    batches: Mapping[str, Sequence[Arrays]]
    sizes: Mapping[str, int]
    weights: Mapping[str, float]
    documents: Sequence[str]
    references: Sequence[Sequence[str]]

    @classmethod
    def of(
        cls,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
        *,
        size: int,
        limit: int,
        seed: int,
        documents: Sequence[str] = (),
        references: Sequence[Sequence[str]] = (),
    ) -> HeldOut:
        """The first ``limit`` held-out rows of each objective, in batches of ``size``."""
        batches = {
            name: list(objective.held_out(size, limit, seed_of(seed, kind)))
            for kind, (name, objective) in enumerate(objectives.items())
        }
        sizes = {name: sum(target_bytes(tokenizer, targets) for _, targets in found) for name, found in batches.items()}
        return cls(batches, sizes, weights, documents, references)


def target_bytes(tokenizer: PreTrainedTokenizerBase, targets: np.ndarray) -> int:
    """Bytes of the text of targets (B, T), without sentinels and end marks."""
    rows = [row[row != IGNORED].tolist() for row in targets]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(rows, skip_special_tokens=True))


class PretrainTrainer(SFTTrainer):
    """``SFTTrainer`` over a ``Mixture``; its evaluation measures each objective and the summaries it writes.

    Set ``schedule`` (the mixture), ``held_out`` and ``settings`` (how the summaries are written) before training.
    """

    schedule: Mixture
    held_out: HeldOut
    settings: GenerationConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._uncounted: torch.Tensor | int = 0
        self._clock: tuple[float, int] | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step of ``SFTTrainer``'s, its tokens counted: of source and target, without padding."""
        if self._clock is None:
            self._clock = time.monotonic(), self.state.num_input_tokens_seen
        # Not fetched from the device here: that would wait for it at each step.
        self._uncounted = self._uncounted + inputs["attention_mask"].sum() + (inputs["labels"] != IGNORED).sum()
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        """Autocast to bfloat16 where that is the precision."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _mean_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy over the tokens of the whole step, nats a token."""
        total = SummedCrossEntropy.apply(outputs["logits"], labels)
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    def count_tokens(self) -> int:
        """Tokens trained on so far, by all processes; kept in the trainer's state."""
        self.state.num_input_tokens_seen += round(self._summed([float(self._uncounted)])[0])
        self._uncounted = 0
        return self.state.num_input_tokens_seen

    def _summed(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        local = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(local, reduction="sum").tolist()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.count_tokens()
        super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the tokens so far and, since the last log, tokens a second (evaluations not counted)."""
        if "loss" in logs:
            logs["tokens"] = self.count_tokens()
            if self._clock is not None:
                since, before = self._clock
                logs["tokens_per_second"] = round((logs["tokens"] - before) / (time.monotonic() - since), 1)
            self._clock = None
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss of each objective (nats a token) and bits per byte, their weighted mean, and ROUGE.

        Returns:
            ``eval_<objective>_loss``, ``eval_<objective>_bits_per_byte``, ``eval_loss`` (mean of the losses by the
            objectives' weights), ``eval_rouge1``, ``eval_rouge2``, ``eval_rougeL`` (where there are documents).
        """
        start = time.monotonic()
        model = self.accelerator.unwrap_model(self.model)
        with whole(model):
            found = self._losses(model, self.settings.precision) | self._rouge(model)
        logs = {f"eval_{name}": value for name, value in found.items()}
        self.log(logs | {"eval_runtime": round(time.monotonic() - start, 2)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._clock = None
        return logs

    def _losses(self, model: PreTrainedModel, precision: str) -> dict[str, float]:
        held_out, rank, world = self.held_out, self.args.process_index, self.args.world_size
        found: dict[str, float] = {}
        mean = 0.0
        for name, batches in held_out.batches.items():
            nats = tokens = 0.0
            with inference(model, precision):
                for arrays in batches[rank::world]:
                    inputs = model_inputs(*arrays, self.schedule.pad, self.schedule.start)
                    inputs = {key: value.to(self.args.device) for key, value in inputs.items()}
                    labels = inputs.pop("labels")
                    logits = model(**inputs, use_cache=False).logits.float()
                    nats += F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
                    tokens += (labels != IGNORED).sum().item()
            nats, tokens = self._summed([nats, tokens])
            found[f"{name}_loss"] = nats / max(tokens, 1)
            found[f"{name}_bits_per_byte"] = bits_per_byte(nats, held_out.sizes[name])
            mean += held_out.weights[name] * found[f"{name}_loss"]
        return found | {"loss": mean / sum(held_out.weights.values())}

    def _rouge(self, model: PreTrainedModel) -> dict[str, float]:
        documents, references = self.held_out.documents, self.held_out.references
        if not documents:
            return {}
        mine = slice(self.args.process_index, None, self.args.world_size)
        written = generate_summaries(model, self.processing_class, documents[mine], self.settings)
        scores = rouge([texts[0] for texts in written], references[mine], ROUGE)
        sums = self._summed([float(scores[name].sum()) for name in ROUGE])
        return {name: total / len(documents) for name, total in zip(ROUGE, sums, strict=True)}
