"""Supervised fine-tuning of an encoder-decoder on documents and their summaries, or training one from scratch.

transformers' ``Seq2SeqTrainer`` does the work. What is ours is the order of the examples: which one is seen at which
step is a function of (seed, step) alone, so a killed run goes on exactly where it was, through a copy phase too.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem, UserError, problems_of
from pipelines.seq2seq.models import check_model, check_tokenizer, model_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@config
class SFTConfig(CorpusFields, LengthConfig, TrainingConfig):
    """Fine-tune a model on documents and summaries, or train a T5 from scratch where no model is given."""

    output_dir: str = Field("runs/sft", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source | None = Field(None, description="folder or hub id of the model; null trains a T5 from scratch")
    tokenizer: Source | None = Field(None, description="folder or hub id of the tokenizer; null takes the model's own")
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
    d_model: int = Field(128, ge=8, description="from scratch: width of the states")
    d_kv: int = Field(32, ge=4, description="from scratch: width of one attention head")
    d_ff: int = Field(512, ge=8, description="from scratch: width of the feed-forward layers")
    num_layers: int = Field(2, ge=1, description="from scratch: layers of the encoder")
    num_decoder_layers: int | None = Field(
        None, ge=1, description="from scratch: layers of the decoder; as the encoder"
    )
    num_heads: int = Field(4, ge=1, description="from scratch: attention heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="from scratch: dropout rate")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.model is None and self.tokenizer is None:
            mend = "give model=FOLDER-or-id to fine-tune, or tokenizer=FOLDER to train from scratch"
            found.append(Problem("model", None, "there is neither a model nor a tokenizer", mend))
        if self.tokenizer is None:
            found += model_problems({"model": self.model})
        else:
            given = [partial(check_model, self.model, "model")] if self.model is not None else []
            found += problems_of(*given, partial(check_tokenizer, self.tokenizer, "tokenizer"))
        if self.keep == "best" and self.eval_steps is not None and self.save_steps % self.eval_steps:
            mend = f"give a divisor of save_steps={self.save_steps}"
            found.append(Problem("eval_steps", self.eval_steps, "keep=best needs an evaluation at every save", mend))
        return found


def new_t5(settings: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A T5 with random weights of the size that ``settings`` says, drawn from its seed."""
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    set_seed(settings.seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=settings.d_model,
            d_kv=settings.d_kv,
            d_ff=settings.d_ff,
            num_layers=settings.num_layers,
            num_decoder_layers=settings.num_decoder_layers or settings.num_layers,
            num_heads=settings.num_heads,
            dropout_rate=settings.dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _load(settings: SFTConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from pipelines.seq2seq.generation import check_lengths
    from pipelines.seq2seq.models import load_seq2seq, load_tokenizer

    tokenizer = (
        load_tokenizer(settings.tokenizer)
        if settings.tokenizer is not None
        else load_tokenizer(settings.model, field="model")
    )
    model = new_t5(settings, tokenizer) if settings.model is None else load_seq2seq(settings.model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        problem = f"it has {len(tokenizer)} tokens, the model's embedding {rows}"
        raise UserError("tokenizer", settings.tokenizer, problem, "give the model's own tokenizer, or drop tokenizer=")
    check_lengths(model, settings)
    return model, tokenizer


def _steps(settings: SFTConfig, examples: int, batch: int) -> int:
    """Optimizer steps of the summary phase."""
    if settings.max_steps > 0:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * (examples // batch)))


def _save(trainer: Any, settings: SFTConfig) -> None:
    """The model, its tokenizer and plain generation settings, as any transformers user reads them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = model.generation_config
    own.max_length, own.max_new_tokens = None, settings.max_target_length
    folder = Path(settings.output_dir)
    trainer.save_model(str(folder))
    # A pickle, with this run's paths in it; stage.json says what there is to say.
    (folder / "training_args.bin").unlink(missing_ok=True)


def sft(config: SFTConfig) -> dict[str, float]:
    """Fine-tune (or train from scratch) and save the model, its tokenizer and generation settings.

    The examples of an optimizer step are of like length; steps are shuffled, epochs are drawn anew. Writes the model
    folder and ``log_history.json`` into ``output_dir``.

    Returns:
        ``sft/eval_loss`` and ``sft/eval_perplexity`` (validation, nats a token, without label smoothing),
        ``sft/train_loss`` (mean of the last logged steps), ``sft/steps``, ``sft/train_examples``, ``sft/parameters``,
        ``sft/truncated_sources`` and ``sft/truncated_targets`` (shares of the training set that were cut).

    Raises:
        UserError: unusable data, model, tokenizer or lengths; fewer examples than a step takes.
    """
    from accelerate import PartialState
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

    from pipelines.corpus import load_corpus
    from pipelines.seq2seq.sft_trainer import ExampleSchedule, SFTTrainer, TokenizedPairs
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        global_batch,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    state = PartialState()
    model, tokenizer = _load(config)
    corpus = load_corpus(config)
    bar = state.is_main_process
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
    eval_steps = config.eval_steps or (config.save_steps if config.keep == "best" else None)
    arguments = training_arguments(
        config,
        Seq2SeqTrainingArguments,
        max_steps=config.copy_steps + steps,
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
        train_dataset=schedule,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
        callbacks=[checkpoint_marker()],
    )
    trainer.optimizer_cls_and_kwargs = optimizer_choice(config)
    trainer.schedule = schedule
    trainer.train(resume_from_checkpoint=last_checkpoint(config))
    eval_loss = trainer.evaluate()["eval_loss"]
    history = save_history(trainer, config)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    _save(trainer, config)
    state.wait_for_everyone()
    return {
        "sft/eval_loss": eval_loss,
        "sft/eval_perplexity": math.exp(min(eval_loss, 50.0)),
        "sft/train_loss": losses[-1] if losses else eval_loss,
        "sft/steps": float(config.copy_steps + steps),
        "sft/train_examples": float(len(pairs)),
        "sft/parameters": float(sum(p.numel() for p in model.parameters())),
        "sft/truncated_sources": pairs.truncated_sources / len(pairs),
        "sft/truncated_targets": pairs.truncated_targets / len(pairs),
    }
