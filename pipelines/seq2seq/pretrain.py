"""Pretraining of a T5 on raw text and pairs: a mixture of span corruption, copying, gap sentences and summaries.

The objectives are mixed by weights, as T5 mixed its denoising with supervised tasks (Raffel et al. 2020, §3.5.2). Text
is tokenized once, into memory-mapped files in the cache; which batch comes at which step is a function of (seed, step)
alone, so a killed run goes on exactly where it was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, config, fields_of
from pipelines.corpus.fields import TextFields
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.scratch import ScratchConfig, load_or_new
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.seq2seq.pretrain_data import Objective


@config
class PretrainConfig(ScratchConfig, TextFields, LengthConfig, TrainingConfig):
    """Pretrain a T5 from scratch, or go on with a given model."""

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

    def problems(self) -> list[Problem]:
        found = super().problems()
        if not any(self.weights().values()):
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
        return found

    def weights(self) -> dict[str, float]:
        """Objective -> weight."""
        return {
            "span": self.span_weight,
            "copy": self.copy_weight,
            "gap": self.gap_weight,
            "supervised": self.supervised_weight,
        }


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>`` … as far as the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (token := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[token])
    return found


def _check_sentinels(settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, sentinels: list[int]) -> int:
    """The tokens of a packed row, all of whose spans have a sentinel.

    Raises:
        UserError: no sentinels, too few of them, or a source too short to be corrupted.
    """
    from pipelines.seq2seq.pretrain_spans import packed_length, span_counts

    field, value = ("model", settings.model) if settings.tokenizer is None else ("tokenizer", settings.tokenizer)
    if not sentinels and (settings.span_weight or settings.gap_weight):
        mend = "give a tokenizer with them (T5's, or the stage tokenizer's), or span_weight=0 gap_weight=0"
        raise UserError(field, value, "it has no sentinels (<extra_id_0> …)", mend)
    if not settings.span_weight:
        return 0
    length = packed_length(settings.max_source_length, settings.noise_density, settings.mean_span)
    spans = span_counts(length, settings.noise_density, settings.mean_span)[1]
    if spans > len(sentinels):
        problem = f"a row has {spans} hidden spans, the tokenizer {len(sentinels)} sentinels"
        raise UserError("max_source_length", settings.max_source_length, problem, "give less, or a larger mean_span")
    return length


def _check_prefixes(settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    from pipelines.seq2seq.pretrain_text import prefix_ids

    for name in ("prefix", "copy_prefix", "gap_prefix"):
        taken = len(prefix_ids(tokenizer, getattr(settings, name)))
        if taken + 4 > settings.max_source_length:
            problem = f"its {taken} tokens leave no room in max_source_length={settings.max_source_length}"
            raise UserError(name, getattr(settings, name), problem, "shorten it, or raise max_source_length")


def _objectives(
    settings: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Any,
    split: str,
    names: list[str],
    sentinels: list[int],
    row_length: int,
) -> dict[str, Objective]:
    import numpy as np

    from pipelines.seq2seq.pretrain_data import CopyObjective, PairObjective, SpanObjective
    from pipelines.seq2seq.pretrain_spans import PackedText
    from pipelines.seq2seq.pretrain_text import open_tokens, prefix_ids

    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    found: dict[str, Objective] = {}
    for name in names:
        if name == "span":
            stream = open_tokens(folder, "stream", split).flat
            if len(stream) < 2:
                raise _too_little(settings, split, "text", "tokens of text", len(stream))
            text = PackedText(stream, row_length)
            marks = np.asarray(sentinels, dtype=np.int64)
            found[name] = SpanObjective(text, marks, settings.noise_density, settings.mean_span, pad, end)
            continue
        if name == "copy":
            rows = open_tokens(folder, "copy", split)
            length = min(settings.copy_length, settings.max_target_length - 1)
            skipped = len(prefix_ids(tokenizer, settings.copy_prefix))
            found[name] = CopyObjective(rows, skipped, length, settings.copy_from == "anywhere", pad, end)
        else:
            files = ("gap-source", "gap-target") if name == "gap" else ("source", "target")
            rows, targets = (open_tokens(folder, file, split) for file in files)
            found[name] = PairObjective(rows, targets, pad)
        if not len(rows):
            raise _too_little(settings, split, name, f"examples of {name}", 0)
    return found


def _too_little(settings: PretrainConfig, split: str, name: str, noun: str, count: int) -> UserError:
    mend = "give more text" + ("" if name == "text" else f", or {name}_weight=0")
    return UserError("text", settings.text, f"its {split} split gives {count} {noun}", mend)


def _steps(settings: PretrainConfig, objectives: dict[str, Objective], size: int) -> int:
    """Optimizer steps: as given, or passes over the text of the objective that gets through its own last."""
    if settings.max_steps > 0:
        return settings.max_steps
    weights = {name: settings.weights()[name] for name in objectives}
    total = sum(weights.values())
    batches = max(o.batches_a_pass(size) * total / weights[name] for name, o in objectives.items())
    return settings.copy_steps + max(1, math.ceil(settings.epochs * batches / settings.gradient_accumulation))


def pretrain(config: PretrainConfig) -> dict[str, float]:
    """Pretrain and save a plain model folder: weights in ``save_dtype``, tokenizer, generation settings.

    Writes the model folder and ``log_history.json`` into ``output_dir``. All that is returned is measured on the
    weights as they are saved, rounded to ``save_dtype``.

    Returns:
        ``pretrain/eval_loss`` (held-out nats a token, mean of the objectives by weight), for each objective
        ``pretrain/<objective>_loss`` and ``pretrain/<objective>_bits_per_byte`` (of the target's text) and
        ``pretrain/<objective>_passes``; ``pretrain/rouge1``, ``pretrain/rouge2``, ``pretrain/rougeL`` of greedy
        summaries of validation documents; ``pretrain/train_loss``, ``pretrain/steps``, ``pretrain/tokens`` (trained on,
        source and target), ``pretrain/text_tokens`` (of the packed text), ``pretrain/parameters``.

    Raises:
        UserError: unusable text, model, tokenizer or lengths; less text than a step takes.
    """
    from accelerate import PartialState
    from transformers import Seq2SeqTrainingArguments

    from pipelines.corpus.local import sample
    from pipelines.corpus.text import open_text
    from pipelines.precision import choose_precision
    from pipelines.seq2seq.generation import GenerationConfig
    from pipelines.seq2seq.pretrain_data import OBJECTIVES, Mixture
    from pipelines.seq2seq.pretrain_text import TokenSettings, token_folder, write_tokens
    from pipelines.seq2seq.pretrain_trainer import ROUGE, HeldOut, PretrainTrainer
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )
    from pipelines.stage import identity

    state = PartialState()
    model, tokenizer = load_or_new(config)
    precision = choose_precision(config.precision)
    if state.device.type == "cpu" and precision == "bf16":
        # The fused kernel for the CPU has no gradient for T5's bias, and what it falls back to is slower than this.
        model.set_attn_implementation("eager")
    sentinels = sentinel_ids(tokenizer)
    row_length = _check_sentinels(config, tokenizer, sentinels)
    _check_prefixes(config, tokenizer)
    names = [name for name in OBJECTIVES if config.weights()[name]]
    settings = TokenSettings(
        config.max_source_length,
        config.max_target_length,
        config.prefix,
        config.copy_prefix,
        config.gap_prefix,
        config.gap_choice,
    )
    content = [str(getattr(config, name)) for name in fields_of(TextFields) if name not in ("text", "pairs")]
    content += [identity(value) for value in (config.text, config.pairs) if value is not None]
    content += [*config.environment().values(), *names]
    folder = token_folder(settings, tokenizer, content)
    data = open_text(config, folder.with_name(f"{folder.name}-text"))
    if data.pairs is None and config.supervised_weight:
        mend = "give pairs=FILE-or-folder, or supervised_weight=0"
        raise UserError("supervised_weight", config.supervised_weight, "there are no documents with summaries", mend)
    if data.pairs is None and config.keep == "best" and config.best == "rouge":
        mend = "give pairs=FILE-or-folder, or best=loss"
        raise UserError("best", config.best, "there are no documents with summaries to measure ROUGE on", mend)
    sentinel = sentinels[0] if sentinels else -1
    write_tokens(folder, data.text, data.pairs, tokenizer, settings, names, sentinel, state.is_main_process)
    objectives = _objectives(config, tokenizer, folder, "train", names, sentinels, row_length)
    size = config.batch_size * state.num_processes
    for name, objective in objectives.items():
        if not objective.batches_a_pass(size):
            problem = f"its training text gives less than one batch of {name} (devices × batch_size = {size})"
            raise UserError("text", config.text, problem, "give more text, or a smaller batch_size")
    steps = _steps(config, objectives, size)
    mixture = Mixture(
        objectives,
        config.weights(),
        steps,
        config.gradient_accumulation,
        size,
        config.seed,
        tokenizer.pad_token_id,
        model.config.decoder_start_token_id,
        config.copy_steps,
    )
    chosen = []
    if data.pairs is not None:
        validation = data.pairs["validation"]
        chosen = validation.select(sample(len(validation), config.rouge_examples, 0, "validation")).to_list()
    held_out = HeldOut.of(
        _objectives(config, tokenizer, folder, "validation", names, sentinels, row_length),
        {name: config.weights()[name] for name in names},
        tokenizer,
        size=config.eval_batch_size,
        limit=config.eval_examples,
        seed=config.seed,
        documents=[row["document"] for row in chosen],
        references=[row.get("references") or [row["summary"]] for row in chosen],
    )
    eval_steps = config.eval_steps or (config.save_steps if config.keep == "best" else None)
    metric = "eval_rouge1" if config.best == "rouge" else "eval_loss"
    arguments = training_arguments(
        config,
        Seq2SeqTrainingArguments,
        max_steps=steps,
        num_train_epochs=1,
        # The mixture itself is the order.
        train_sampling_strategy="sequential",
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model=metric,
        greater_is_better=metric != "eval_loss",
        remove_unused_columns=False,
    )
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=mixture,
        eval_dataset=mixture,
        data_collator=_as_it_is,
        processing_class=tokenizer,
        callbacks=[checkpoint_marker()],
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
    trainer.train(resume_from_checkpoint=last_checkpoint(config))
    _round(trainer.accelerator.unwrap_model(trainer.model), config.save_dtype)
    measured = trainer.evaluate()
    history = save_history(trainer, config)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = trainer.count_tokens()
    _round(trainer.accelerator.unwrap_model(trainer.model), config.save_dtype, keep=True)
    trainer.save_plain(config.output_dir, config.max_target_length)
    state.wait_for_everyone()
    passes = mixture.passes(steps)
    return {
        "pretrain/eval_loss": measured["eval_loss"],
        **{
            f"pretrain/{name}_{what}": measured[f"eval_{name}_{what}"]
            for name in names
            for what in ("loss", "bits_per_byte")
        },
        **{f"pretrain/{name}_passes": passes[name] for name in names},
        **{f"pretrain/{name}": measured[f"eval_{name}"] for name in ROUGE if chosen},
        "pretrain/train_loss": losses[-1] if losses else measured["eval_loss"],
        "pretrain/steps": float(steps),
        "pretrain/tokens": float(tokens),
        **({"pretrain/text_tokens": float(len(objectives["span"].text.stream))} if "span" in names else {}),
        "pretrain/parameters": float(sum(p.numel() for p in model.parameters())),
    }


def _as_it_is(batch: Any) -> Any:
    """The collator of batches that come ready-made."""
    return batch


def _round(model: PreTrainedModel, dtype: str, keep: bool = False) -> None:
    """Round the weights to ``dtype``; they stay float32 unless they are to be kept in it."""
    import torch

    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model.to(chosen)
    if not keep:
        model.to(torch.float32)
