"""What aligning directly on preferences is made of, be they pairs (DPO) or ranked lists (listwise DPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from pipelines.config import Problem, Source, config
from pipelines.distributed import Strategy
from pipelines.seq2seq.lora import LoraFields, load_policy, lora_settings, merged
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.seq2seq.streamed import StreamedExamples

T = TypeVar("T")


@config
class DirectFields(LengthConfig, LoraFields, TrainingConfig):
    """Fields that DPO and its listwise form share."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp")

    model: Source = Field(description="encoder-decoder to align, usually the supervised fine-tuned one; the reference")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, in reward units a nat")
    precompute_ref_log_probs: bool | None = Field(
        None,
        description="compute the reference's log-probabilities once before training and keep no reference model; null: "
        "yes, except where the preferences are streamed",
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    epochs: float = Field(1.0, gt=0, description="passes over the preferences")

    @property
    def precomputes(self) -> bool:
        """Whether the reference's log-probabilities are computed before training."""
        if self.precompute_ref_log_probs is None:
            return not getattr(self, "streaming", False)
        return self.precompute_ref_log_probs

    def problems(self) -> list[Problem]:
        """Whether the model can be had."""
        return super().problems() + model_problems({"model": self.model})


def tokenized_splits(
    texts: Mapping[str, Dataset], tokenize: Callable[[Dataset], tuple[Dataset, dict[str, int]]]
) -> tuple[dict[str, Dataset], dict[str, int]]:
    """The train, validation and test sets of a preference file, tokenized.

    Args:
        texts: the sets.
        tokenize: gives a tokenized set and how many ``documents`` and ``summaries`` were cut.

    Returns:
        The tokenized sets, and how many were cut in all of them.
    """
    sets, cut = {}, {"documents": 0, "summaries": 0}
    for split in ("train", "validation", "test"):
        sets[split], counts = tokenize(texts[split])
        cut = {what: cut[what] + counts[what] for what in cut}
    return sets, cut


def train_directly(
    settings: DirectFields,
    trainer_class: type,
    model: PreTrainedModel,
    sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    stream: StreamedExamples | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Train the policy, going on from the newest checkpoint, and write ``log_history.json``.

    Args:
        settings: of the stage.
        trainer_class: ``EncoderDecoderDPOTrainer`` or a subclass.
        model: what training begins with, from ``load_policy``.
        sets: tokenized; the validation set may be empty.
        tokenizer: the model's.
        stream: trained on instead of ``sets["train"]``, of which TRL's trainer then sees no more than its columns.
        arguments: of TRL's ``DPOConfig``, beside those that follow from ``settings``.

    Returns:
        The policy, its adapters merged into it (and written by themselves under ``adapter``).
    """
    from accelerate import PartialState
    from trl import DPOConfig

    from pipelines.seq2seq import training
    from pipelines.seq2seq.streamed import RememberStream, resume_stream

    watch = len(sets["validation"]) > 0
    given = training.training_arguments(
        settings,
        DPOConfig,
        beta=settings.beta,
        precompute_ref_log_probs=settings.precomputes,
        precompute_ref_batch_size=settings.eval_batch_size,
        eval_strategy="steps" if watch else "no",
        eval_steps=settings.save_steps,
        **arguments,
    )
    trainer = trainer_class(
        model,
        given,
        sets["train"],
        tokenizer,
        settings,
        eval_dataset=sets["validation"] if watch else None,
        peft_config=lora_settings(settings),
        callbacks=[*([RememberStream(stream)] if stream is not None else []), training.checkpoint_marker()],
        optimizer_cls_and_kwargs=training.optimizer_choice(settings),
    )
    checkpoint = training.last_checkpoint(settings)
    if stream is not None:
        trainer.train_dataset = stream
        resume_stream(stream, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    training.save_history(trainer, settings)
    policy, folder = trainer.accelerator.unwrap_model(trainer.model), Path(settings.output_dir)
    return merged(policy, settings, folder, save=PartialState().is_main_process)


def scored_and_saved(
    settings: DirectFields, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score: Callable[[Any], T]
) -> tuple[T, T]:
    """What ``score`` says of the policy and of the reference it began as; then the policy is saved with its tokenizer.

    Raises:
        Whatever ``score`` raises; then nothing is saved.
    """
    from accelerate import PartialState

    from pipelines.seq2seq.sharded import save_whole, whole

    with whole(policy):
        found = score(policy), score(load_policy(settings.model).to(next(policy.parameters()).device))
    save_whole(policy, settings.output_dir, main=PartialState().is_main_process)
    if PartialState().is_main_process:
        tokenizer.save_pretrained(settings.output_dir)
    PartialState().wait_for_everyone()
    return found
