"""The reward stage: fit a reward model to preferences and measure it on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, Problem, Source, config
from pipelines.corpus.fields import PreferenceFields, StreamFields
from pipelines.distributed import Strategy
from pipelines.errors import UserError
from pipelines.seq2seq.direct import tokenized_splits
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig


@config
class RewardConfig(StreamFields, PreferenceFields, LengthConfig, TrainingConfig):
    """Train a reward model on preference pairs: the encoder reads the document, the decoder each summary."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp")

    output_dir: str = Field("runs/reward", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source = Field(description="encoder-decoder to start from, usually the supervised fine-tuned one")
    use_margin: bool = Field(False, description="ask for a score difference above the pair's stored margin × scale")
    margin_scale: float = Field(0.1, gt=0, description="what a margin of 1 is worth in scores, with use_margin=true")
    centre: float = Field(0.0, ge=0, description="weight of the term that keeps the scores of a pair centred on 0")
    dropout: bool = Field(True, description="train with the dropout of the model's configuration")
    keep: Literal["last", "best"] = Field(
        "last", description="last: the model after the last step; best: that of lowest loss on the validation pairs"
    )
    calibration_bins: int = Field(10, ge=2, le=100, description="bins of calibration.json")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs; more than one or two overfit")

    _stream_field: ClassVar[str] = "preferences"

    def problems(self) -> list[Problem]:
        """Whether the model can be had."""
        return super().problems() + model_problems({"model": self.model})


def reward(config: RewardConfig) -> dict[str, float]:
    """Train a reward model and measure it.

    Writes the model, its tokenizer, ``log_history.json`` and ``calibration.json`` into ``config.output_dir``.

    Returns:
        ``reward/accuracy`` (share of held-out pairs ranked right, with its interval), ``reward/train_accuracy``,
        ``reward/loss`` (held-out Bradley–Terry loss in nats), ``reward/calibration_error``, ``reward/length_accuracy``
        (the baseline "the longer summary wins"), ``reward/pairs`` and the shares of texts that were cut (of a stream:
        of what is held out and of the first training pairs). With a mixture also ``reward/loss_<set>`` and
        ``reward/accuracy_<set>``; of a stream also ``reward/skipped_rows``.

    Raises:
        UserError: from the model, the tokenizer or the data; or a loss that is not finite.
    """
    import numpy as np
    import torch
    from accelerate import PartialState
    from transformers import TrainingArguments, set_seed

    from pipelines.corpus import load_preferences
    from pipelines.seq2seq import training
    from pipelines.seq2seq.collators import tokenize_pairs
    from pipelines.seq2seq.losses import bradley_terry_loss
    from pipelines.seq2seq.metrics import with_interval
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.reward_model import EncoderDecoderRewardModel
    from pipelines.seq2seq.reward_trainer import RewardTrainer, calibration, score_pairs
    from pipelines.seq2seq.sharded import save_whole, whole
    from pipelines.seq2seq.streamed import RememberStream, resume_stream, streamed_preferences
    from pipelines.seq2seq.view import silence_dropout
    from pipelines.stage import write_json

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model, field="model")
    model = EncoderDecoderRewardModel.from_seq2seq(config.model, config)
    if not config.dropout:
        silence_dropout(model)
    parts, stream = None, None
    if config.streaming:
        texts, parts, stream = streamed_preferences(
            config, tokenizer, config.margin_scale if config.use_margin else None
        )
    else:
        texts = load_preferences(config)
    if config.use_margin:
        texts = _scaled_margins(texts, config.margin_scale)
    keep = ("margin",) if config.use_margin else ()
    pairs, cut = tokenized_splits(texts, lambda split: tokenize_pairs(split, tokenizer, config, keep=keep))

    if stream is None:
        training.global_batch(config, len(pairs["train"]), field="preferences", noun="pairs")
    watch = len(pairs["validation"]) > 0
    if config.keep == "best" and not watch:
        raise UserError("keep", "best", "there are no validation pairs to choose by", "give keep=last")
    arguments = training.training_arguments(
        config,
        TrainingArguments,
        eval_strategy="steps" if watch else "no",
        eval_steps=config.save_steps,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer = RewardTrainer(
        model,
        arguments,
        pairs["train"] if stream is None else stream,
        pairs["validation"] if watch else None,
        tokenizer,
        use_margin=config.use_margin,
        centre=config.centre,
        callbacks=[*([RememberStream(stream)] if stream is not None else []), training.checkpoint_marker()],
        optimizer_cls_and_kwargs=training.optimizer_choice(config),
    )
    checkpoint = training.last_checkpoint(config)
    if stream is not None:
        resume_stream(stream, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    training.save_history(trainer, config)

    folder, main = Path(config.output_dir), PartialState().is_main_process
    model = trainer.accelerator.unwrap_model(trainer.model)
    seen = pairs["train"].select(range(min(1000, len(pairs["train"]))))
    with whole(model):
        (chosen, rejected), (train_chosen, train_rejected) = (
            score_pairs(model, some, tokenizer.pad_token_id, config.eval_batch_size) for some in (pairs["test"], seen)
        )
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise UserError("learning_rate", config.learning_rate, "the reward model gives NaN scores", "lower it")
    bins, calibration_error = calibration(chosen, rejected, config.calibration_bins)
    save_whole(model, folder, main=main)
    if main:
        tokenizer.save_pretrained(folder)
        write_json(folder / "calibration.json", bins)
    PartialState().wait_for_everyone()

    lengths = [np.array([len(text.split()) for text in texts["test"][side]]) for side in ("chosen", "rejected")]
    losses = bradley_terry_loss(torch.from_numpy(chosen), torch.from_numpy(rejected)).numpy()
    right, of_sets = _right(chosen, rejected), {}
    for name, (loss, accuracy) in (parts.of(losses, right) if parts is not None else {}).items():
        of_sets |= {f"reward/loss_{name}": float(loss.mean()), **with_interval(f"reward/accuracy_{name}", accuracy)}
    total = sum(map(len, pairs.values()))
    return {
        **with_interval("reward/accuracy", right),
        **with_interval("reward/length_accuracy", _right(*lengths)),
        "reward/train_accuracy": float(_right(train_chosen, train_rejected).mean()),
        "reward/loss": float(losses.mean()),
        "reward/calibration_error": calibration_error,
        "reward/pairs": float(len(chosen)),
        "reward/truncated_documents": cut["documents"] / total,
        "reward/truncated_summaries": cut["summaries"] / (2 * total),
        **of_sets,
        **({} if stream is None else {"reward/skipped_rows": float(stream.skipped())}),
    }


def _right(chosen, rejected):
    """(N,) 1 where the chosen one is above, 0 where below, 1/2 at a tie."""
    from pipelines.seq2seq.metrics import wins

    return wins(chosen, rejected)


def _scaled_margins(texts, scale: float):
    """The sets with their ``margin`` times ``scale``."""
    return type(texts)(
        {
            name: split.remove_columns("margin").add_column("margin", [scale * value for value in split["margin"]])
            for name, split in texts.items()
        }
    )
