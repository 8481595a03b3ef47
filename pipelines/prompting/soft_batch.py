"""Several soft prompts, and none, in one batch of one backbone (Lester et al. 2021, section 2.1).

The learnt vectors get ids behind those of the vocabulary, and a prompt begins with them. So a soft
prompt takes part in padding and positions as text does. PEFT's own batches put the vectors before the padding, which
moves them away from the text the more padding a row has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.prompting.backends_local import LocalBackend
from pipelines.prompting.backends_text import Reader

_BEGIN, _END = "\ue000", "\ue001"  # of the private use area: no text has them


def prompt_vectors(model: Any) -> Tensor:
    """The vectors (n, d) that a PEFT model of prompt tuning or P-tuning puts before the text.

    Raises:
        ValueError: the model has learnt something else.
    """
    kind = str(getattr(model.active_peft_config, "peft_type", "")).rpartition(".")[2]
    if kind not in ("PROMPT_TUNING", "P_TUNING"):
        raise ValueError(f"{kind} has no vectors that stand before the text")
    with torch.no_grad():
        return model.get_prompt(batch_size=1)[0, : model.active_peft_config.num_virtual_tokens].detach().clone()


class MixedBackend(LocalBackend):
    """A backbone that answers prompts with any of several soft prompts before them, in the same batch.

    ``marked(name, text)`` is the prompt ``text`` after the soft prompt ``name``; a text without a mark has none.

    Args:
        model: the backbone, without adapters. Its input embedding is replaced by one that knows more ids; what it is
            asked without a mark it answers as before.
        tokenizer: its tokenizer.
        prompts: name -> (n, d) vectors.
        more: as of ``LocalBackend``.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Mapping[str, Tensor], **more: Any):
        super().__init__(model, tokenizer, **more)
        self.reader = _MarkReader(tokenizer, model.config, name=self.name, chat=self.reader.chat, ends=self.ends)
        embedding = model.get_input_embeddings()
        first, rows = embedding.weight.shape[0], 0
        self.virtual = self.reader.virtual
        for name, vectors in prompts.items():
            self.virtual[name] = list(range(first + rows, first + rows + len(vectors)))
            rows += len(vectors)
        if rows:
            model.set_input_embeddings(_Extended(embedding, torch.cat(list(prompts.values()))))

    def marked(self, name: str, text: str) -> str:
        """The prompt ``text`` with a soft prompt before it.

        Raises:
            KeyError: there is no soft prompt of this name.
        """
        self.virtual[name]
        return f"{_BEGIN}{name}{_END}{text}"


class _MarkReader(Reader):
    """Reads a mark as the ids of its soft prompt, before whatever the tokenizer puts before a text."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.virtual: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        split = [text[1:].split(_END, 1) if text.startswith(_BEGIN) else ["", text] for text in texts]
        rows = super().ids([text for _, text in split])
        return [self.virtual.get(name, []) + row for (name, _), row in zip(split, rows, strict=True)]


class _Extended(nn.Module):
    """An embedding whose ids go on, behind its own, with learnt vectors.

    Args:
        embedding: the model's own.
        vectors: (n, d).
    """

    def __init__(self, embedding: nn.Module, vectors: Tensor):
        super().__init__()
        self.embedding, self.first = embedding, embedding.weight.shape[0]
        self.register_buffer("vectors", vectors.to(embedding.weight))

    @property
    def weight(self) -> Tensor:
        """Of the model's own ids, as what is tied to it expects."""
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        own = self.embedding(ids.clamp(max=self.first - 1))
        learnt = F.embedding((ids - self.first).clamp(min=0), self.vectors)
        return torch.where((ids < self.first).unsqueeze(-1), own, learnt)
