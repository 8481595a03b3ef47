"""Supervised fine-tuning of an encoder-decoder on documents and their summaries, or training one from scratch.

transformers' ``Seq2SeqTrainer`` does the work. What is ours is the order of the examples: which one is seen at which
step is a function of (seed, step) alone, so a killed run goes on exactly where it was, through a copy phase too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.corpus.fields import CorpusFields, StreamFields
from pipelines.distributed import Strategy
from pipelines.errors import Problem
from pipelines.seq2seq.scratch import ScratchConfig, load_or_new
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from pipelines.seq2seq.sft_trainer import ExampleSchedule, TokenizedPairs
    from pipelines.seq2seq.streamed import Parts, StreamedExamples


@config
class SFTConfig(ScratchConfig, StreamFields, CorpusFields, LengthConfig, TrainingConfig):
    """Fine-tune a model on documents and summaries, or train a T5 from scratch where no model is given."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp", "zero2", "zero3")

    output_dir: str = Field("runs/sft", description="folder the stage writes into", json_schema_extra=INERT)
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability spread evenly over the vocabulary")
    keep: Literal["last", "best"] = Field("last", description="weights that are kept: the last, or of least eval loss")
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations on the validation split; null: at the end (best: save_steps)"
    )
    copy_steps: int = Field(
        0,
        ge=0,
        description="steps before the summaries in which the model learns to copy tokens of the document; a small "
        "model trained from scratch needs them. They come on top of max_steps or epochs",
    )
    copy_length: int = Field(16, ge=1, description="tokens of the document copied in the copy phase")
    copy_from: Literal["start", "anywhere"] = Field(
        "anywhere",
        description="copy phase: as many tokens from a random place in the document (it learns to go on with what it "
        "has begun), or its first ones",
    )

    def problems(self) -> list[Problem]:
        """What ``keep=best`` and a stream cannot go with."""
        found = super().problems()
        if self.keep == "best" and self.eval_steps is not None and self.save_steps % self.eval_steps:
            mend = f"give a divisor of save_steps={self.save_steps}"
            found.append(Problem("eval_steps", self.eval_steps, "keep=best needs an evaluation at every save", mend))
        if self.streaming and self.copy_steps:
            mend = "give copy_steps=0; pretraining copies from streams (recipes/summarization/pretrain.py)"
            found.append(Problem("copy_steps", self.copy_steps, "a stream has no copy phase", mend))
        return found


def _steps(settings: SFTConfig, examples: int, batch: int) -> int:
    """Optimizer steps of the summary phase."""
    if settings.max_steps > 0:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * (examples // batch)))


@dataclass
class _Data:
    """What is trained on, in its order, and what is held out.

    Attributes:
        schedule: all examples of the run.
        held_out: of the validation split, one set after the other.
        parts: whose they are, of a stream.
        steps: optimizer steps, those of the copy phase among them.
        examples: trained on (of a stream: as often as they are seen).
        cut: the split that says how many texts are cut.
    """

    schedule: ExampleSchedule | StreamedExamples
    held_out: TokenizedPairs
    parts: Parts | None
    steps: int
    examples: int
    cut: TokenizedPairs


def sft(config: SFTConfig) -> dict[str, float]:
    """Fine-tune (or train from scratch) and save the model, its tokenizer and generation settings.

    The examples of an optimizer step are of like length; steps are shuffled, epochs are drawn anew. Writes the model
    folder and ``log_history.json`` into ``output_dir``.

    Returns:
        ``sft/eval_loss`` and ``sft/eval_perplexity`` (validation, nats a token, without label smoothing),
        ``sft/train_loss`` (mean of the last logged steps), ``sft/steps``, ``sft/train_examples``, ``sft/parameters``,
        ``sft/truncated_sources`` and ``sft/truncated_targets`` (shares of the training set that were cut; of a stream,
        of what is held out). With a mixture also ``sft/eval_loss_<set>``, and ``sft/eval_loss`` is their mean by the
        sets' weights; of a stream also ``sft/skipped_rows``.

    Raises:
        UserError: unusable data, model, tokenizer or lengths; fewer examples than a step takes.
    """
    from accelerate import PartialState
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

    from pipelines.seq2seq.sft_trainer import SFTTrainer
    from pipelines.seq2seq.streamed import RememberStream, resume_stream
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    state = PartialState()
    model, tokenizer = load_or_new(config)
    data = (_streamed if config.streaming else _in_memory)(config, tokenizer)
    eval_steps = config.eval_steps or (config.save_steps if config.keep == "best" else None)
    arguments = training_arguments(
        config,
        Seq2SeqTrainingArguments,
        max_steps=data.steps,
        num_train_epochs=1,
        label_smoothing_factor=config.label_smoothing,
        # The schedule itself groups by length: the Trainer's own grouping cannot be resumed in the middle of an epoch.
        train_sampling_strategy="sequential",
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data.schedule,
        eval_dataset=data.held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
        callbacks=[*([RememberStream(data.schedule)] if config.streaming else []), checkpoint_marker()],
    )
    trainer.optimizer_cls_and_kwargs = optimizer_choice(config)
    trainer.schedule, trainer.parts = data.schedule, data.parts
    checkpoint = last_checkpoint(config)
    if config.streaming:
        resume_stream(data.schedule, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    measured = trainer.evaluate()
    eval_loss = measured["eval_loss"]
    history = save_history(trainer, config)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    trainer.save_plain(config.output_dir, config.max_target_length)
    state.wait_for_everyone()
    return {
        "sft/eval_loss": eval_loss,
        "sft/eval_perplexity": math.exp(min(eval_loss, 50.0)),
        "sft/train_loss": losses[-1] if losses else eval_loss,
        "sft/steps": float(data.steps),
        "sft/train_examples": float(data.examples),
        "sft/parameters": float(sum(p.numel() for p in model.parameters())),
        "sft/truncated_sources": data.cut.truncated_sources / len(data.cut),
        "sft/truncated_targets": data.cut.truncated_targets / len(data.cut),
        **{f"sft/{key}": value for key, value in measured.items() if key.startswith("eval_loss_")},
        **({"sft/skipped_rows": float(data.schedule.skipped())} if config.streaming else {}),
    }


def _in_memory(config: SFTConfig, tokenizer: Any) -> _Data:
    from accelerate import PartialState

    from pipelines.corpus import load_corpus
    from pipelines.seq2seq.sft_trainer import ExampleSchedule, TokenizedPairs
    from pipelines.seq2seq.training import global_batch

    corpus, bar = load_corpus(config), PartialState().is_main_process
    pairs = TokenizedPairs.of(corpus["train"], tokenizer, config, progress="tokenizing train" if bar else None)
    held_out = TokenizedPairs.of(corpus["validation"], tokenizer, config, progress="validation" if bar else None)
    batch = global_batch(config, len(pairs))
    steps = _steps(config, len(pairs), batch)
    schedule = ExampleSchedule(
        pairs,
        steps=steps,
        global_batch=batch,
        seed=config.seed,
        copy_steps=config.copy_steps,
        copy_length=min(config.copy_length, config.max_target_length - 1),
        copy_from=config.copy_from,
        end=tokenizer.eos_token_id,
    )
    return _Data(schedule, held_out, None, config.copy_steps + steps, len(pairs), pairs)


def _streamed(config: SFTConfig, tokenizer: Any) -> _Data:
    from pipelines.corpus.stream import corpus_stream
    from pipelines.seq2seq.sft_trainer import TokenizedPairs
    from pipelines.seq2seq.streamed import StreamedExamples, held_out_rows, step_size, tokenize_corpus

    stream = corpus_stream(config, step_size=step_size(config))
    rows, parts = held_out_rows(stream, config, ("validation",), ("document", "summary"))
    held_out = TokenizedPairs.of(rows["validation"], tokenizer, config)
    schedule = StreamedExamples(stream, config.max_steps, tokenize_corpus(tokenizer, config))
    return _Data(schedule, held_out, parts["validation"], config.max_steps, len(schedule), held_out)
