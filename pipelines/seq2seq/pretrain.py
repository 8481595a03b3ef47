"""Pretraining of a T5 on raw text and pairs: a mixture of span corruption, copying, gap sentences and summaries.

The objectives are mixed by weights, as T5 mixed its denoising with supervised tasks (Raffel et al. 2020, §3.5.2). Text
is tokenized once, into memory-mapped files in the cache; which batch comes at which step is a function of (seed, step)
alone, so a killed run goes on exactly where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.config import INERT, config, fields_of
from pipelines.corpus.fields import StreamFields, TextFields
from pipelines.distributed import Strategy
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.scratch import ScratchConfig, load_or_new
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.seq2seq.pretrain_data import Mixture, Objective, TokenRows
    from pipelines.seq2seq.pretrain_stream import StreamedMixture
    from pipelines.seq2seq.pretrain_text import TokenSettings
    from pipelines.seq2seq.pretrain_trainer import HeldOut


@config
class PretrainConfig(ScratchConfig, StreamFields, TextFields, LengthConfig, TrainingConfig):
    """Pretrain a T5 from scratch, or go on with a given model."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp")

    output_dir: str = Field("runs/pretrain", description="folder the stage writes into", json_schema_extra=INERT)
    span_weight: float = Field(1.0, ge=0, description="share of span corruption among the batches (any scale)")
    copy_weight: float = Field(0.5, ge=0, description="share of copying a piece of the document")
    gap_weight: float = Field(0.5, ge=0, description="share of predicting a sentence that was taken out of its text")
    supervised_weight: float = Field(1.0, ge=0, description="share of documents with their summaries")
    noise_density: float = Field(0.15, gt=0, le=0.9, description="span corruption: share of the tokens that is hidden")
    mean_span: float = Field(3.0, ge=1, description="span corruption: mean length of a hidden span, in tokens")
    copy_steps: int = Field(0, ge=0, description="the first steps only copy: that ability comes first in a small model")
    copy_length: int = Field(16, ge=1, description="copying: tokens of the document, at most")
    copy_from: Literal["start", "anywhere"] = Field(
        "start", description="copying: the first tokens of the document, or as many from a random place"
    )
    copy_prefix: str = Field("copy: ", description="copying: put before every document, so that the task is known")
    gap_prefix: str = Field("gap: ", description="gap sentences: put before every text")
    gap_choice: Literal["first", "principal", "both"] = Field(
        "both",
        description="gap sentences: the document's first, the one of each window that overlaps most with the rest, or "
        "the first of the first window and the principal one of the others",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations on held-out text; null: at the end (best: save_steps)"
    )
    eval_examples: int = Field(256, ge=1, description="held-out rows of each objective at an evaluation")
    rouge_examples: int = Field(200, ge=0, description="validation documents summarized at an evaluation; 0: none")
    keep: Literal["last", "best"] = Field("last", description="weights that are kept: the last, or the best evaluated")
    best: Literal["rouge", "loss"] = Field("rouge", description="keep=best: by held-out ROUGE-1, or by mean loss")
    save_dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="numbers that the weights are saved as")

    _stream_field: ClassVar[str] = "text"

    def problems(self) -> list[Problem]:
        """Objectives that are asked for and have no weight or no data, and what ``keep`` needs."""
        found = super().problems()
        if not self.weights():
            mend = "give one of span_weight, copy_weight, gap_weight, supervised_weight above 0"
            found.append(Problem("span_weight", self.span_weight, "all four weights are 0", mend))
        if self.copy_steps and not self.copy_weight:
            mend = "give copy_weight above 0, or copy_steps=0"
            found.append(Problem("copy_steps", self.copy_steps, "copy_weight is 0", mend))
        if self.keep == "best" and self.best == "rouge" and not self.rouge_examples:
            mend = "give rouge_examples=200, or best=loss"
            found.append(Problem("rouge_examples", 0, "the best ROUGE is to be kept and none is measured", mend))
        if self.keep == "best" and self.eval_steps is not None and self.save_steps % self.eval_steps:
            mend = f"give a divisor of save_steps={self.save_steps}"
            found.append(Problem("eval_steps", self.eval_steps, "keep=best needs an evaluation at every save", mend))
        if self.streaming and self.supervised_weight and self.pairs is None:
            problem, mend = "there are no documents with summaries", "give pairs=FILES, or supervised_weight=0"
            found.append(Problem("supervised_weight", self.supervised_weight, problem, mend))
        return found

    def weights(self) -> dict[str, float]:
        """Objective -> weight, of those whose weight is above 0."""
        found = {name: getattr(self, f"{name}_weight") for name in ("span", "copy", "gap", "supervised")}
        return {name: weight for name, weight in found.items() if weight}


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>`` … as far as the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (token := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[token])
    return found


def _check_tokenizer(settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot mark what is hidden, and prefixes that leave no room for text."""
    from pipelines.seq2seq.pretrain_spans import packed_length, span_counts
    from pipelines.seq2seq.pretrain_text import prefix_ids

    sentinels = len(sentinel_ids(tokenizer))
    if not sentinels and (settings.span_weight or settings.gap_weight):
        field = "model" if settings.tokenizer is None else "tokenizer"
        mend = "give a tokenizer with them (T5's, or the stage tokenizer's), or span_weight=0 gap_weight=0"
        raise UserError(field, getattr(settings, field), "it has no sentinels (<extra_id_0> …)", mend)
    if settings.span_weight:
        length = packed_length(settings.max_source_length, settings.noise_density, settings.mean_span)
        spans = span_counts(length, settings.noise_density, settings.mean_span)[1]
        if spans > sentinels:
            problem = f"a row has {spans} hidden spans, the tokenizer {sentinels} sentinels"
            mend = "give less, or a larger mean_span"
            raise UserError("max_source_length", settings.max_source_length, problem, mend)
    for name in ("prefix", "copy_prefix", "gap_prefix"):
        taken = len(prefix_ids(tokenizer, getattr(settings, name)))
        if taken + 4 > settings.max_source_length:
            problem = f"its {taken} tokens leave no room in max_source_length={settings.max_source_length}"
            raise UserError(name, getattr(settings, name), problem, "shorten it, or raise max_source_length")


def token_settings(settings: PretrainConfig) -> TokenSettings:
    """All that decides which tokens a text gives, beside the tokenizer."""
    from pipelines.seq2seq.pretrain_text import TokenSettings

    return TokenSettings(
        settings.max_source_length,
        settings.max_target_length,
        settings.prefix,
        settings.copy_prefix,
        settings.gap_prefix,
        settings.gap_choice,
    )


def _tokens(
    settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> tuple[Path, Dataset | None]:
    """The folder of the text's tokens, written if need be, and the validation documents with their summaries."""
    from pipelines.corpus.text import open_text
    from pipelines.seq2seq.pretrain_text import token_folder, write_tokens
    from pipelines.stage import identity

    chosen = token_settings(settings)
    content = [str(getattr(settings, name)) for name in fields_of(TextFields) if name not in ("text", "pairs")]
    content += [identity(value) for value in (settings.text, settings.pairs) if value is not None]
    content += [*settings.environment().values(), *settings.weights()]
    folder = token_folder(chosen, tokenizer, content)
    data = open_text(settings, folder.with_name(f"{folder.name}-text"))
    if data.pairs is None:
        problem = "there are no documents with summaries"
        if settings.supervised_weight:
            mend = "give pairs=FILE-or-folder, or supervised_weight=0"
            raise UserError("supervised_weight", settings.supervised_weight, problem, mend)
        if settings.keep == "best" and settings.best == "rouge":
            raise UserError("best", settings.best, problem, "give pairs=FILE-or-folder, or best=loss")
    sentinel = next(iter(sentinel_ids(tokenizer)), -1)
    write_tokens(folder, data.text, data.pairs, tokenizer, chosen, list(settings.weights()), sentinel, progress)
    return folder, None if data.pairs is None else data.pairs["validation"]


def objectives_of(
    settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, rows_called: Callable[[str], TokenRows], where: str
) -> dict[str, Objective]:
    """The objectives whose weight is above 0.

    Args:
        settings: of the stage.
        tokenizer: of the model.
        rows_called: gives the rows of a name in ``pretrain_text.FILES``.
        where: what they are of, for messages.

    Raises:
        UserError: an objective has no rows there.
    """
    from pipelines.seq2seq.pretrain_data import CopyObjective, PairObjective, SpanObjective
    from pipelines.seq2seq.pretrain_spans import PackedText, packed_length
    from pipelines.seq2seq.pretrain_text import prefix_ids

    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    noise = settings.noise_density, settings.mean_span

    def rows(name: str, objective: str) -> TokenRows:
        found = rows_called(name)
        if len(found.flat) < 2:
            mend = f"give more text, or {objective}_weight=0"
            problem = f"{where} gives {len(found)} examples of the objective {objective}"
            raise UserError("text", settings.text, problem, mend)
        return found

    def span() -> Objective:
        text = PackedText(rows("stream", "span").flat, packed_length(settings.max_source_length, *noise))
        return SpanObjective(text, np.asarray(sentinel_ids(tokenizer), dtype=np.int64), *noise, pad, end)

    def copy() -> Objective:
        skipped = len(prefix_ids(tokenizer, settings.copy_prefix))
        length = min(settings.copy_length, settings.max_target_length - 1)
        return CopyObjective(rows("copy", "copy"), skipped, length, settings.copy_from == "anywhere", pad, end)

    def gap() -> Objective:
        return PairObjective(rows("gap-source", "gap"), rows("gap-target", "gap"), pad)

    def supervised() -> Objective:
        return PairObjective(rows("source", "supervised"), rows("target", "supervised"), pad)

    makers = {"span": span, "copy": copy, "gap": gap, "supervised": supervised}
    return {name: makers[name]() for name in settings.weights()}


def _of_split(
    settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, split: str
) -> dict[str, Objective]:
    from pipelines.seq2seq.pretrain_text import open_tokens

    return objectives_of(settings, tokenizer, lambda name: open_tokens(folder, name, split), f"its {split} split")


def _mixture(
    settings: PretrainConfig, objectives: dict[str, Objective], processes: int, pad: int, start: int
) -> Mixture:
    from pipelines.seq2seq.pretrain_data import Mixture

    size, weights = settings.batch_size * processes, settings.weights()
    passes = {name: objective.batches_a_pass(size) for name, objective in objectives.items()}
    for name, batches in passes.items():
        if not batches:
            problem = f"its training text gives less than one batch of {name} (devices × batch_size = {size})"
            raise UserError("text", settings.text, problem, "give more text, or a smaller batch_size")
    steps = settings.max_steps
    if steps <= 0:
        # As many as the objective that is the last to have gone through its text needs for the passes asked for.
        longest = max(batches * sum(weights.values()) / weights[name] for name, batches in passes.items())
        steps = settings.copy_steps + max(1, math.ceil(settings.epochs * longest / settings.gradient_accumulation))
    accumulation, seed = settings.gradient_accumulation, settings.seed
    return Mixture(objectives, weights, steps, accumulation, size, seed, pad, start, settings.copy_steps)


def held_out_of(
    settings: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    objectives: dict[str, Objective],
    chosen: list[dict[str, Any]],
) -> HeldOut:
    """What is measured at every evaluation.

    Args:
        settings: of the stage.
        tokenizer: of the model.
        objectives: over held-out text; one that is none of the stage's is measured and not counted.
        chosen: held-out documents to be summarized, with their summary or references.
    """
    from pipelines.seq2seq.pretrain_trainer import HeldOut

    return HeldOut.of(
        objectives,
        dict.fromkeys(objectives, 0.0) | settings.weights(),
        tokenizer,
        size=settings.eval_batch_size,
        limit=settings.eval_examples,
        seed=settings.seed,
        documents=[row["document"] for row in chosen],
        references=[row.get("references") or [row["summary"]] for row in chosen],
    )


def arguments_of(settings: PretrainConfig, steps: int, **overrides: Any) -> Any:
    """The arguments of a ``PretrainTrainer`` that takes so many steps."""
    from transformers import Seq2SeqTrainingArguments

    from pipelines.seq2seq.training import training_arguments

    eval_steps = settings.eval_steps or (settings.save_steps if settings.keep == "best" else None)
    return training_arguments(
        settings,
        Seq2SeqTrainingArguments,
        max_steps=steps,
        num_train_epochs=1,
        # The trainer itself casts: accelerate would turn all logits to float32 at once.
        bf16=False,
        # The mixture itself is the order.
        train_sampling_strategy="sequential",
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        load_best_model_at_end=settings.keep == "best",
        metric_for_best_model="eval_rouge1" if settings.best == "rouge" else "eval_loss",
        greater_is_better=settings.best == "rouge",
        remove_unused_columns=False,
        **overrides,
    )


def pretrain(config: PretrainConfig) -> dict[str, float]:
    """Pretrain and save a plain model folder: weights in ``save_dtype``, tokenizer, generation settings.

    Writes the model folder and ``log_history.json`` into ``output_dir``. All that is returned is measured on the
    weights as they are saved, rounded to ``save_dtype``.

    Returns:
        ``pretrain/eval_loss`` (held-out nats a token, mean of the objectives by weight), for each objective
        ``pretrain/<objective>_loss`` and ``pretrain/<objective>_bits_per_byte`` (of the target's text) and
        ``pretrain/<objective>_passes``; ``pretrain/rouge1``, ``pretrain/rouge2``, ``pretrain/rougeL`` of greedy
        summaries of validation documents; ``pretrain/train_loss``, ``pretrain/steps``, ``pretrain/tokens`` (trained on,
        source and target), ``pretrain/text_tokens`` (of the packed text), ``pretrain/parameters``. Of a stream there
        are no passes and no count of its tokens, but ``pretrain/skipped_rows``; of a mixture also each loss on each
        set's own held-out text (``pretrain/span_<set>_loss`` …).

    Raises:
        UserError: unusable text, model, tokenizer or lengths; less text than a step takes.
    """
    from accelerate import PartialState

    from pipelines.precision import choose_precision
    from pipelines.seq2seq.generation import GenerationConfig
    from pipelines.seq2seq.pretrain_speed import train_fast_on_cpu
    from pipelines.seq2seq.pretrain_trainer import PretrainTrainer
    from pipelines.seq2seq.streamed import RememberStream, resume_stream
    from pipelines.seq2seq.training import checkpoint_marker, last_checkpoint, optimizer_choice, save_history

    state = PartialState()
    model, tokenizer = load_or_new(config)
    _check_tokenizer(config, tokenizer)
    precision = choose_precision(config.precision)
    if state.device.type == "cpu":
        train_fast_on_cpu(model, precision)
    start = model.config.decoder_start_token_id
    mixture, held_out = (_streamed if config.streaming else _in_files)(config, tokenizer, start)
    trainer = PretrainTrainer(
        model=model,
        args=arguments_of(config, mixture.steps),
        train_dataset=mixture,
        eval_dataset=mixture,
        data_collator=as_it_is,
        processing_class=tokenizer,
        callbacks=[*([RememberStream(mixture)] if config.streaming else []), checkpoint_marker()],
    )
    trainer.optimizer_cls_and_kwargs = optimizer_choice(config)
    trainer.schedule, trainer.held_out = mixture, held_out
    trainer.settings = GenerationConfig(
        max_source_length=config.max_source_length,
        max_target_length=config.max_target_length,
        prefix=config.prefix,
        precision=precision,
        generation_batch_size=config.eval_batch_size,
    )
    checkpoint = last_checkpoint(config)
    if config.streaming:
        resume_stream(mixture, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    _round(trainer.accelerator.unwrap_model(trainer.model), config.save_dtype)
    measured = trainer.evaluate()
    history = save_history(trainer, config)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = trainer.count_tokens()
    _round(trainer.accelerator.unwrap_model(trainer.model), config.save_dtype, keep=True)
    trainer.save_plain(config.output_dir, config.max_target_length)
    state.wait_for_everyone()
    found = {f"pretrain/{name.removeprefix('eval_')}": value for name, value in measured.items()}
    found["pretrain/eval_loss"] = found.pop("pretrain/loss")
    found |= {f"pretrain/{name}_passes": value for name, value in mixture.passes(mixture.steps).items()}
    if config.streaming:
        found["pretrain/skipped_rows"] = float(mixture.skipped())
    elif "span" in mixture.objectives:
        found["pretrain/text_tokens"] = float(len(mixture.objectives["span"].text.stream))
    return found | {
        "pretrain/train_loss": losses[-1] if losses else measured["eval_loss"],
        "pretrain/steps": float(mixture.steps),
        "pretrain/tokens": float(tokens),
        "pretrain/parameters": float(sum(p.numel() for p in model.parameters())),
    }


def _in_files(settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, start: int) -> tuple[Mixture, HeldOut]:
    from accelerate import PartialState

    from pipelines.corpus.local import sample

    state = PartialState()
    folder, pairs = _tokens(settings, tokenizer, state.is_main_process)
    objectives = _of_split(settings, tokenizer, folder, "train")
    mixture = _mixture(settings, objectives, state.num_processes, tokenizer.pad_token_id, start)
    chosen = []
    if pairs is not None:
        chosen = pairs.select(sample(len(pairs), settings.rouge_examples, 0, "validation")).to_list()
    return mixture, held_out_of(settings, tokenizer, _of_split(settings, tokenizer, folder, "validation"), chosen)


def _streamed(
    settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, start: int
) -> tuple[StreamedMixture, HeldOut]:
    from pipelines.seq2seq.pretrain_stream import streamed_mixture

    return streamed_mixture(settings, tokenizer, start)


def as_it_is(batch: Any) -> Any:
    """The collator of batches that come ready-made."""
    return batch


def _round(model: PreTrainedModel, dtype: str, keep: bool = False) -> None:
    """Round the weights to ``dtype``; they stay float32 unless they are to be kept in it."""
    import torch

    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model.to(chosen)
    if not keep:
        model.to(torch.float32)
