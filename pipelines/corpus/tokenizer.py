"""Stage ``tokenizer``: trains a tokenizer on the training split, or takes over the one that a model brings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import Source, StageConfig, config
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem, problems_of
from pipelines.publishing.fields import PublishFields

if TYPE_CHECKING:
    from datasets import Dataset


@config
class TokenizerConfig(CorpusFields, PublishFields, StageConfig):
    """Trains a Unigram tokenizer in T5's conventions, or copies the one of a given model."""

    output_dir: str = Field("runs/tokenizer", description="folder the tokenizer is saved into")
    model: Source | None = Field(None, description="model folder or hub id that brings a tokenizer: it is copied")
    text: Source | None = Field(
        None, description="folder that the text stage saved: its training texts and pairs are learnt from too"
    )
    vocab_size: int = Field(
        8192, ge=150, le=250_000, description="size of the vocabulary, 3 special tokens and 100 sentinels included"
    )
    lowercase: bool = Field(
        True, description="give up upper case: a small model trained from scratch learns and copies words sooner"
    )

    def problems(self) -> list[Problem]:
        """Whether the tokenizer or the text can be had, and that only one of them is given."""
        found = super().problems()
        if self.model is not None:
            from pipelines.seq2seq.models import check_tokenizer

            found += problems_of(partial(check_tokenizer, self.model, "model"))
            if self.text is not None:
                found.append(Problem("text", self.text, "the tokenizer of model is taken as it is", "drop one of them"))
        if self.text is not None:
            from pipelines.corpus.text import check_saved

            found += problems_of(partial(check_saved, self.text))
        return found


def tokenizer(config: TokenizerConfig) -> dict[str, float]:
    """Saves a tokenizer that ``AutoTokenizer`` loads into ``output_dir``.

    Returns:
        ``tokenizer/vocab_size``; and on the validation split ``tokenizer/characters_per_token`` (documents and
        summaries), ``tokenizer/unknown_rate`` (share of tokens that are ``<unk>``), ``tokenizer/document_tokens`` and
        ``tokenizer/summary_tokens`` (means, the end mark included).

    Raises:
        UserError: whatever is wrong with the data or the model, or a ``vocab_size`` that is too small.
    """
    from pipelines.corpus.local import load_corpus

    splits = load_corpus(config)
    if config.model is not None:
        from pipelines.seq2seq.models import load_tokenizer

        made = load_tokenizer(config.model, field="model")
    else:
        from pipelines.corpus.unigram import train

        made = train(_training_texts(config, splits["train"]), config.vocab_size, config.lowercase)

    counts = {}
    for column in ("document", "summary"):
        texts = list(_texts(splits["validation"], column))
        rows = made(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        counts[column] = {
            "texts": len(texts),
            "tokens": sum(map(len, rows)),
            "characters": sum(map(len, texts)),
            "unknown": sum(row.count(made.unk_token_id) for row in rows) if made.unk_token_id is not None else 0,
        }
    if int(os.environ.get("RANK", "0")) == 0:
        made.save_pretrained(Path(config.output_dir))

    def total(what: str) -> int:
        return sum(count[what] for count in counts.values())

    return {
        "tokenizer/vocab_size": len(made),
        "tokenizer/characters_per_token": total("characters") / total("tokens"),
        "tokenizer/unknown_rate": total("unknown") / total("tokens"),
        "tokenizer/document_tokens": counts["document"]["tokens"] / counts["document"]["texts"],
        "tokenizer/summary_tokens": counts["summary"]["tokens"] / counts["summary"]["texts"],
    }


def _training_texts(config: TokenizerConfig, split: Dataset) -> Iterator[str]:
    parts = [(split, ("document", "references"))]
    if config.text is not None:
        from pipelines.corpus.text import open_saved

        data = open_saved(config.text)
        parts.append((data.text["train"], ("text",)))
        if data.pairs is not None:
            parts.append((data.pairs["train"], ("document", "references")))
    for part, columns in parts:
        for column in columns:
            yield from _texts(part, column)


def _texts(split: Dataset, column: str) -> Iterator[str]:
    for batch in split.select_columns([column]).iter(1000):
        for value in batch[column]:
            yield from value if isinstance(value, list) else [value]
