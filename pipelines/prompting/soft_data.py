"""Examples as a soft prompt is trained on them: what the model reads, and the answer, which alone is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.prompting.backends_text import Reader
from pipelines.prompting.strategies import Prompt
from pipelines.seq2seq.sft_trainer import Ragged, TokenizedPairs

IGNORED = -100


def answer_rows(reader: Reader, prompts: Sequence[Prompt], *, end: str | None, open_end: bool) -> TokenizedPairs:
    """Token ids of prompts and of their right answers.

    Args:
        reader: of the model.
        prompts: N prompts.
        end: the text that ends an answer; None: the end mark does, as it always does of an encoder-decoder's.
        open_end: whether answers are followed by their end; that of a choice is not, which is only scored.

    Returns:
        N sources and N targets.

    Raises:
        UserError: a prompt that does not fit into the model with its answer.
    """
    mark = [reader.ends[0]] if open_end and reader.ends and (end is None or reader.encodes) else []
    if reader.encodes:
        sources = reader.prompts([prompt.text for prompt in prompts], 0)
        targets = reader.decoder_choices([prompt.answer for prompt in prompts])
    else:
        tail = end if open_end and end is not None else ""
        sources, targets = [], []
        for prompt in prompts:
            (whole,), start = reader.with_choices(prompt.text, [prompt.answer + tail])
            sources.append(whole[:start])
            targets.append(whole[start:])
    return TokenizedPairs(Ragged(sources), Ragged([target + mark for target in targets]))


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
