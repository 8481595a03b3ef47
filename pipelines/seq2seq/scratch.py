"""The model that training begins with: a given one, or a T5 with random weights of a given size."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.config import Source, config
from pipelines.errors import Problem, UserError, problems_of
from pipelines.seq2seq.models import check_model, check_tokenizer, model_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config


@config
class ScratchConfig:
    """A model and its tokenizer, or the size of a T5 that is trained from scratch."""

    model: Source | None = Field(None, description="folder or hub id of the model; null trains a T5 from scratch")
    tokenizer: Source | None = Field(None, description="folder or hub id of the tokenizer; null takes the model's own")
    d_model: int = Field(128, ge=8, description="from scratch: width of the states")
    d_kv: int = Field(32, ge=4, description="from scratch: width of one attention head")
    d_ff: int = Field(512, ge=8, description="from scratch: width of the feed-forward layers")
    num_layers: int = Field(2, ge=1, description="from scratch: layers of the encoder")
    num_decoder_layers: int | None = Field(
        None, ge=1, description="from scratch: layers of the decoder; as the encoder"
    )
    num_heads: int = Field(4, ge=1, description="from scratch: attention heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="from scratch: dropout rate")
    feed_forward_proj: Literal["relu", "gated-gelu"] = Field(
        "relu", description="from scratch: feed-forward layers of T5 (relu) or of T5 v1.1 (gated-gelu)"
    )
    initializer_factor: float = Field(
        1.0, gt=0, description="from scratch: scale of T5's random weights; adamw learns sooner below 1"
    )

    def problems(self) -> list[Problem]:
        """Whether there is something to begin with, and whether it can be: a model, or a tokenizer for a new one."""
        parent = getattr(super(), "problems", None)  # a mixin: the stage's class brings the rest
        found: list[Problem] = parent() if parent is not None else []
        if self.model is None and self.tokenizer is None:
            mend = "give model=FOLDER-or-id to go on with it, or tokenizer=FOLDER to train from scratch"
            found.append(Problem("model", None, "there is neither a model nor a tokenizer", mend))
        if self.tokenizer is None:
            found += model_problems({"model": self.model})
        else:
            given = [partial(check_model, self.model, "model")] if self.model is not None else []
            found += problems_of(*given, partial(check_tokenizer, self.tokenizer, "tokenizer"))
        return found


def t5_config(settings: ScratchConfig, vocabulary: int, *, start: int = 0, pad: int = 0, end: int = 1) -> T5Config:
    """The configuration of a T5 of the size that ``settings`` says; embeddings tied, as in T5.

    Args:
        settings: a stage's configuration with these fields.
        vocabulary: tokens.
        start: id of the decoder's start token.
        pad: padding id.
        end: id of the end mark.
    """
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary,
        d_model=settings.d_model,
        d_kv=settings.d_kv,
        d_ff=settings.d_ff,
        num_layers=settings.num_layers,
        num_decoder_layers=settings.num_decoder_layers or settings.num_layers,
        num_heads=settings.num_heads,
        dropout_rate=settings.dropout,
        feed_forward_proj=settings.feed_forward_proj,
        initializer_factor=settings.initializer_factor,
        decoder_start_token_id=start,
        pad_token_id=pad,
        eos_token_id=end,
    )


def new_t5(settings: ScratchConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A T5 with random weights of the size that ``settings`` says, drawn from its seed.

    Args:
        settings: a stage's configuration with these fields and a ``seed``.
        tokenizer: gives the vocabulary and the special tokens.
    """
    from transformers import T5ForConditionalGeneration, set_seed

    set_seed(settings.seed)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return T5ForConditionalGeneration(t5_config(settings, len(tokenizer), start=pad, pad=pad, end=end))


def load_or_new(settings: ScratchConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that ``settings`` name, or a new T5, and its tokenizer.

    Args:
        settings: a stage's configuration with these fields, a ``seed`` and lengths.

    Raises:
        UserError: a model or tokenizer that cannot be loaded, that do not fit, or lengths beyond the model's positions.
    """
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
