"""Examples as a soft prompt is trained on them: what the model reads, and the answer, which alone is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipelines.errors import UserError
from pipelines.prompting.strategies import Prompt
from pipelines.seq2seq.sft_trainer import Ragged, TokenizedPairs

IGNORED = -100


def answer_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, encodes: bool, end: str | None, open_end: bool
) -> TokenizedPairs:
    """Token ids of prompts and of their right answers.

    A decoder-only model reads both as one text, tokenized as one: a tokenizer may join the prompt's last character with
    the answer's first, and the labels then begin with that token.

    Args:
        tokenizer: of the model.
        prompts: N prompts.
        encodes: whether the model is an encoder-decoder.
        end: the text that ends an answer; None: the tokenizer's end mark does.
        open_end: whether answers are followed by their end at all; that of a choice is not, which is only scored.

    Returns:
        N sources and N targets.

    Raises:
        UserError: a prompt or an answer without tokens.
    """
    texts, answers = [prompt.text for prompt in prompts], [prompt.answer for prompt in prompts]
    closing = [tokenizer.eos_token_id] if open_end and end is None and tokenizer.eos_token_id is not None else []
    if encodes:
        sources = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        bare = tokenizer(text_target=[answer.strip() for answer in answers], truncation=False, verbose=False)
        targets = [list(row) for row in bare["input_ids"]]
        if not open_end:
            targets = [row[:-1] if row[-1:] == [tokenizer.eos_token_id] else row for row in targets]
    else:
        tail = end if open_end and end is not None else ""
        plain = [_without_end(row, tokenizer) for row in _ids(tokenizer, texts)]
        wholes = [
            _without_end(row, tokenizer) for row in _ids(tokenizer, [t + a + tail for t, a in _pairs(texts, answers)])
        ]
        shared = [_shared(*pair) for pair in _pairs(plain, wholes)]
        sources = [whole[:count] for whole, count in _pairs(wholes, shared)]
        targets = [whole[count:] + closing for whole, count in _pairs(wholes, shared)]
    for prompt, source, target in zip(prompts, sources, targets, strict=True):
        if not source or not target:
            what = "prompt" if not source else "answer"
            raise UserError(what, prompt.text if not source else prompt.answer, "has no tokens", "give it some text")
    return TokenizedPairs(Ragged(sources), Ragged(targets))


def _pairs(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=True))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


def _without_end(row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids without the end mark that some tokenizers put behind a text: the text goes on."""
    return row[:-1] if row and row[-1] == tokenizer.eos_token_id else row


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@dataclass
class CausalCollator:
    """Prompt and answer in one row, padded on the right: soft prompt, text and padding keep their distances.

    Args:
        pad_token_id: what stands at masked places.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        rows = [feature["input_ids"] + feature["labels"] for feature in features]
        shape = (len(rows), max(map(len, rows)))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for number, (row, feature) in enumerate(zip(rows, features, strict=True)):
            start = len(feature["input_ids"])
            batch["input_ids"][number, : len(row)] = torch.tensor(row)
            batch["attention_mask"][number, : len(row)] = 1
            batch["labels"][number, start : len(row)] = torch.tensor(feature["labels"])
        return batch
