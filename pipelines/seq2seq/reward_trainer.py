"""Training a reward model on preferences: transformers' Trainer with the Bradley–Terry loss.

TRL's RewardTrainer reads prompt and completion as one sequence of a classifier, which an encoder-decoder is not; all it
would give here is the Trainer, so this stands on that directly. Chosen and rejected share one encoding of the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from pipelines.seq2seq.collators import PAIR_COLUMNS, GroupedByLength, PairCollator
from pipelines.seq2seq.held_out import HeldOutMeans
from pipelines.seq2seq.losses import bradley_terry_loss
from pipelines.seq2seq.metrics import calibration_bins
from pipelines.seq2seq.reward_model import EncoderDecoderRewardModel, score_tokens
from pipelines.seq2seq.sharded import InParts


class RewardTrainer(HeldOutMeans, GroupedByLength, InParts, Trainer):
    """Fits a reward model to preference pairs.

    Args:
        model: the reward model.
        args: transformers' training arguments.
        train_dataset: tokenized pairs (``tokenize_pairs``), with a ``margin`` column where ``use_margin``.
        eval_dataset: the same, or None.
        processing_class: the tokenizer, saved with checkpoints.
        use_margin: take the ``margin`` column as Bradley–Terry margin.
        centre: weight of the centring term.
        callbacks: of the Trainer.
    """

    # The loss is a mean over the batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: EncoderDecoderRewardModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        *,
        use_margin: bool = False,
        centre: float = 0.0,
        callbacks: list[TrainerCallback] | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ):
        self.use_margin = use_margin
        self.centre = centre
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=PairCollator(processing_class.pad_token_id, model.config.decoder_start_token_id),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*PAIR_COLUMNS, "margin"]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean Bradley–Terry loss of the pairs of a batch, as the Trainer asks for it.

        Args:
            model: the reward model, perhaps wrapped.
            inputs: a batch as ``PairCollator`` makes it.
            return_outputs: also give the scores.
            num_items_in_batch: not read: the loss is a mean over pairs.

        Returns:
            A scalar in nats; with ``return_outputs`` also (B, 2) scores of chosen and rejected summaries.
        """
        inputs = {name: value for name, value in inputs.items() if name != "completion_mask"}
        margin = inputs.pop("margin", None) if self.use_margin else None
        chosen, rejected = model(**inputs).logits.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, margin=margin, centre=self.centre).mean()
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def held_out(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss, accuracy, margin and mean score of a batch of pairs, for the means over all held-out pairs.

        Args:
            model: the reward model, perhaps wrapped.
            inputs: a batch of B pairs as ``PairCollator`` makes it.

        Returns:
            Scalars: ``loss`` in nats, ``accuracy`` in [0, 1], ``margin`` (chosen less rejected) and ``score`` (of all
            2·B summaries) in units of the score.
        """
        loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        margin = scores[:, 0] - scores[:, 1]
        return {"loss": loss, "accuracy": (margin > 0).float().mean(), "margin": margin.mean(), "score": scores.mean()}


def score_pairs(
    model: EncoderDecoderRewardModel, pairs: Dataset, pad_id: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of tokenized pairs in fp32, each document encoded once.

    Args:
        model: the reward model; it is put into evaluation mode.
        pairs: N tokenized pairs.
        pad_id: padding id.
        batch_size: pairs in one pass.

    Returns:
        chosen and rejected scores, (N,) float64 each.
    """
    count = len(pairs)
    summaries: Sequence[Sequence[int]] = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    owner = [*range(count), *range(count)]
    scores = score_tokens(model, list(pairs["prompt_ids"]), summaries, owner, pad_id, 2 * batch_size)
    return np.array(scores[:count]), np.array(scores[count:])


def calibration(chosen: np.ndarray, rejected: np.ndarray, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """How far the model's confidence in its verdicts agrees with how often they are right.

    The confidence in a verdict is σ(|r_w − r_l|) in [0.5, 1], cut into bins of equal width; a verdict is right where
    r_w > r_l, half right at a tie. The interval of a bin is Wilson's (1927) at 95 %.

    Args:
        chosen: (N,) scores of the preferred summaries.
        rejected: (N,) scores of the others.
        bins: how many.

    Returns:
        The non-empty bins as ``{"predicted", "observed", "low", "high", "count"}``, and the expected calibration error
        Σ (n_b / N)·|observed_b − predicted_b| (Naeini et al. 2015).
    """
    difference = np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)
    confidence = F.sigmoid(torch.from_numpy(np.abs(difference))).numpy()
    right = np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))
    return calibration_bins(confidence, right, low=0.5, bins=bins)
