"""Direct Preference Optimization of an encoder-decoder on TRL's DPOTrainer.

TRL's trainer reads causal language models. Three seams make it train an encoder-decoder: the models become views, the
data are tokenized into source and completions, the collator lays them out decoder-side. Losses, f-divergences, LoRA
references, cached references and logging stay TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pipelines.distributed import launched_strategy
from pipelines.errors import UserError
from pipelines.seq2seq.collators import (
    PAIR_COLUMNS,
    CollateSources,
    GroupedByLength,
    PairCollator,
    pair_lengths,
    sources_of,
    tokenize_pairs,
)
from pipelines.seq2seq.guard import check_batch
from pipelines.seq2seq.held_out import HeldOutMeans
from pipelines.seq2seq.losses import sequence_sum
from pipelines.seq2seq.scoring import score_in_one_pass
from pipelines.seq2seq.sharded import InParts, share_embedding
from pipelines.seq2seq.shared_attention import can_share
from pipelines.seq2seq.stacks import run_encoder, source_name, unwrap
from pipelines.seq2seq.training import LengthConfig
from pipelines.seq2seq.view import (
    as_view,
    decoder_start_id,
    in_shards,
    sequence_log_probs,
    silence_dropout,
)

REFERENCE_FILE = "reference.safetensors"


def smoothed(
    loss_types: Sequence[str], weights: Sequence[float], label_smoothing: float
) -> tuple[list[str], list[float]]:
    """TRL's losses and their weights, ``sigmoid`` made into cDPO's (Mitchell 2023) where labels are smoothed.

    TRL smooths some of its losses and not this one, but cDPO's is a sum of two that it has. With L± = −log σ(±βΔ), of
    which ``sigmoid`` is L₊ and ``robust`` ((1−ε) L₊ − ε L₋) / (1−2ε) (Chowdhury et al. 2024),

        (1−ε) L₊ + ε L₋ = 2 (1−ε) sigmoid − (1−2ε) robust.

    Args:
        loss_types: TRL's names.
        weights: one for each.
        label_smoothing: ε in [0, 0.5).

    Returns:
        Names and weights of a sum that is the wanted one; those that came in where ε is 0.

    Raises:
        UserError: ε is 0.5 or more, of which TRL's ``robust`` makes no loss.
    """
    if label_smoothing >= 0.5:
        problem = "as many labels would be wrong as right"
        raise UserError("label_smoothing", label_smoothing, problem, "give a share below 0.5")
    found: list[tuple[str, float]] = []
    for name, weight in zip(loss_types, weights, strict=True):
        if name == "sigmoid" and label_smoothing:
            parts = (("sigmoid", 2 * (1 - label_smoothing)), ("robust", -(1 - 2 * label_smoothing)))
            found += [(part, weight * share) for part, share in parts]
        else:
            found.append((name, weight))
    return [name for name, _ in found], [weight for _, weight in found]


class EncoderDecoderDPOTrainer(HeldOutMeans, GroupedByLength, InParts, DPOTrainer):
    """TRL's DPOTrainer for encoder-decoder models; each source is encoded once for chosen and rejected.

    Args:
        model: an encoder-decoder; its class is swapped for its view. A PEFT model is taken too.
        args: TRL's configuration. ``max_length`` has no meaning here: ``lengths`` rules. ``label_smoothing`` also makes
            the loss ``sigmoid`` that of cDPO.
        train_dataset: with the text columns ``prompt``, ``chosen``, ``rejected``, or tokenized by ``tokenize_pairs``.
            Sources that are not text stand in a column of the encoder's own name for them instead of ``prompt``.
        processing_class: the model's tokenizer.
        lengths: prefix and lengths of the texts.
        eval_dataset: as ``train_dataset``, or None.
        ref_model: the reference; by default a copy of the model, or the model without its adapter under LoRA. Under
            ``precompute_ref_log_probs`` the model itself before its first step, and no copy is kept (in parts, one is
            made for that).
        peft_config: LoRA settings, or None.
        collate_sources: makes the encoder's batch from examples, e.g. by an image processor; all columns reach it.
            By default token ids are padded, and features stacked.
        callbacks: of the Trainer.
        optimizer_cls_and_kwargs: of the Trainer.

    Raises:
        UserError: the model is no encoder-decoder that a view can be made of; ``label_smoothing`` of 0.5 or more; or
            ``sync_ref_model`` with parameters in shards (ZeRO-3, FSDP).
    """

    collator_class: type = PairCollator

    def __init__(
        self,
        model: PreTrainedModel,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        lengths: LengthConfig,
        *,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any = None,
        collate_sources: CollateSources | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ):
        self.lengths = lengths
        self._unchecked, self._in_one_pass = True, False
        as_view(model)
        by_adapter = peft_config is not None or is_peft_model(model)
        in_parts, own_reference = launched_strategy() == "fsdp", ref_model is None
        if own_reference and not by_adapter and (in_parts or not args.precompute_ref_log_probs):
            # TRL would load the checkpoint again by name and put its fused head on the plain class; in parts also to
            # precompute, because the policy is not cut before it trains.
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            as_view(ref_model)
            ref_model.requires_grad_(False).eval()
        if args.disable_dropout:
            # TRL's own switch misses dropout held as numbers: policy and reference would then differ from the start.
            silence_dropout(model)
            if ref_model is not None:
                silence_dropout(ref_model)
        for each in filter(None, (model, ref_model)):
            can_share(each)  # found out here, where parameters are not in shards yet
        if ref_model is not None and in_parts:
            share_embedding(ref_model)  # TRL cuts it as it is given
        args.max_length = None
        inner, pad_id = unwrap(model), processing_class.pad_token_id
        self._text = collate_sources is None and source_name(inner) == "input_ids"
        sources = {} if self._text else {"collate_sources": collate_sources or sources_of(inner, pad_id)}
        if not self._text:
            args.remove_unused_columns = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=self.collator_class(pad_id, decoder_start_id(model), **sources),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        if own_reference and args.precompute_ref_log_probs:
            self.ref_model = None
        self._score_in_one_pass()
        self.loss_types, self.loss_weights = smoothed(self.loss_types, self.loss_weights, args.label_smoothing)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        if args.sync_ref_model and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            problem = "a reference in shards cannot be moved and saved"
            raise UserError("sync_ref_model", True, problem, "start with accelerate_configs/ddp.yaml")

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        # TRL joins prompt and completion into one string and looks for the boundary in the tokens afterwards; with two
        # tensors there is none to look for.
        if set(PAIR_COLUMNS[1:]) <= set(dataset.column_names):
            return dataset
        keep = () if self._text else dataset.column_names
        return tokenize_pairs(dataset, processing_class, self.lengths, keep=keep, with_sources=self._text)[0]

    def _score_in_one_pass(self) -> None:
        if self.accelerator.mixed_precision != "no" or self._in_one_pass:
            return
        self._in_one_pass = True
        outputs = ("entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if self.use_weighting else ()))
        score_in_one_pass(unwrap(self.model), outputs)
        if self.ref_model is not None:
            score_in_one_pass(self.accelerator.unwrap_model(self.ref_model))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._score_in_one_pass()  # TRL's constructor comes here before it is at its end
        # TRL keeps these in a cache file, for sets in memory in a temporary folder that outlives no run and is torn
        # when killed. They are a deterministic function of the reference: here they stay in memory.
        # Batches of like length: half the padding.
        order = np.argsort(self._lengths(dataset), kind="stable")
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        model = self.ref_model or self.model
        found: list[list[Tensor]] = [[], []]
        for batch in self.accelerator.prepare(loader):
            pair = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for column, values in zip(found, pair, strict=True):
                column.append(values.float().cpu())
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), found, strict=True):
            in_order = np.empty(len(dataset), dtype=np.float32)
            in_order[order] = torch.cat(values).numpy()
            dataset = dataset.add_column(
                column, in_order.tolist(), new_fingerprint=f"{dataset._fingerprint[:40]}-{column}"
            )
        return dataset

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._unchecked:
            self._check_log_probs(inputs)
            self._unchecked = False
        result = super()._compute_loss(model, inputs, return_outputs)
        # A running count that no checkpoint holds: after a resume it would say something else.
        self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)
        return result

    def held_out(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        """Loss of a batch, and what TRL logs beside it, for the means over all held-out pairs.

        Args:
            model: the policy, perhaps wrapped.
            inputs: a batch as the collator makes it.

        Returns:
            Scalars: ``loss``, and under TRL's names ``rewards/…`` (β log π/π_ref), ``logps/…`` and ``entropy`` in nats.
        """
        loss = self.compute_loss(model, inputs)
        logged = {name: values.pop() for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        return {"loss": loss} | logged

    @torch.no_grad()
    def _check_log_probs(self, inputs: dict[str, Any]) -> None:
        """Compare log-probabilities of the first batch as TRL gets them with the plain model's teacher-forced ones.

        The failures this trainer could have are silent (a completion scored without its source or with another's,
        against a shifted label, through half a head: entropies that mean nothing and a loss that falls all the same),
        so the first batch is proof.

        Raises:
            RuntimeError: they differ.
        """
        inner = unwrap(self.model)
        if not inputs["completion_mask"].any(dim=1).all():
            raise RuntimeError("there is a completion without a token")
        if in_shards(inner):
            return
        training = inner.training
        inner.eval()
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        side = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
        with self.accelerator.autocast():
            given = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False} | side
            fused = inner(**given, labels=ids.masked_fill(mask == 0, -100), fused_lm_head=True).log_probs
            order = side.pop("encoder_rows", "sample-major")
            sources = {name.removeprefix("encoder_"): value for name, value in side.items()}
            check_batch(inner, sources, ids[:, 1:], mask[:, 1:], fused, order=order)
        inner.train(training)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model and self.args.should_save:
            # It moves with the policy and cannot be had again from the model that training began with.
            save_model(self.accelerator.unwrap_model(self.ref_model), Path(output_dir) / REFERENCE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.sync_ref_model and checkpoint is not None:
            load_model(self.accelerator.unwrap_model(self.ref_model), Path(checkpoint) / REFERENCE_FILE)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card is written when the model is published, not into every checkpoint."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def pair_log_probs(
    model: nn.Module,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    *,
    collate_sources: CollateSources | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """log π(y | x) of chosen and rejected completions in fp32, summed over tokens.

    Args:
        model: a view or a PEFT model around one; put into evaluation mode.
        pairs: N tokenized pairs.
        tokenizer: for its padding id.
        batch_size: pairs in one pass.
        collate_sources: as for ``EncoderDecoderDPOTrainer``.

    Returns:
        chosen and rejected, (N,) float64 each in nats, in the order of ``pairs``.
    """
    model.eval()
    inner, device = unwrap(model), next(model.parameters()).device
    sources = collate_sources or sources_of(inner, tokenizer.pad_token_id)
    collate = PairCollator(tokenizer.pad_token_id, decoder_start_id(model), sources)
    order = np.argsort(pair_lengths(pairs), kind="stable")
    found = np.empty((2, len(pairs)))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].tolist()
            batch = {name: value.to(device) for name, value in collate([pairs[row] for row in rows]).items()}
            side = {name.removeprefix("encoder_"): v for name, v in batch.items() if name.startswith("encoder_")}
            ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
            log_probs = sequence_log_probs(
                model, run_encoder(inner, side), side.get("attention_mask"), ids, mask, order="sample-major"
            )
            found[:, rows] = sequence_sum(log_probs, mask).view(2, -1).cpu().numpy()
    return found[0], found[1]
