"""How a local model reads prompts and choices: chat template, special tokens, the tokens they share, its context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.prompting.backends_fields import adapter_config, check_local
from pipelines.seq2seq.models import loading_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_reader(path: str, field: str, *, name: str, chat: bool = False) -> Reader:
    """The reader of a model whose weights are not loaded: enough to tell whether prompts fit.

    Args:
        path: folder or hub id of a model, or an adapter's folder.
        field: the configuration field that named it, for messages.
        name: what the model is called in messages.
        chat: see ``Reader``.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_local(path, field)
    adapter = adapter_config(path) or {}
    source = str(adapter.get("base_model_name_or_path", path))
    found = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    try:
        config, tokenizer = AutoConfig.from_pretrained(found), AutoTokenizer.from_pretrained(found)
    except Exception as error:
        raise loading_error(field, path, "model", error) from error
    virtual = int(adapter.get("num_virtual_tokens") or 0)
    return Reader(tokenizer, config, name=name, chat=chat, virtual_tokens=virtual)


class Reader:
    """Texts to token ids, as one model reads them.

    Args:
        tokenizer: the model's.
        config: the model's.
        name: what the model is called in messages.
        chat: put every prompt into the tokenizer's chat template as the user's message.
        virtual_tokens: of a soft prompt, which take places of the context.
        ends: ids of the end marks; those of ``config`` or else of the tokenizer where None.

    Raises:
        UserError: ``chat`` with a tokenizer that has no chat template.

    Attributes:
        encodes: whether the model is an encoder-decoder.
        room: places of its context; None where it has no limit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        *,
        name: str,
        chat: bool = False,
        virtual_tokens: int = 0,
        ends: Any = None,
    ):
        self.tokenizer, self.name, self.chat = tokenizer, name, chat
        self.encodes = bool(config.is_encoder_decoder)
        for known in (ends, getattr(config, "eos_token_id", None), tokenizer.eos_token_id, []):
            if known is not None:
                self.ends = [known] if isinstance(known, int) else list(known)
                break
        limit = getattr(config, "max_position_embeddings", None)
        self.room = None if limit is None else int(limit) - virtual_tokens
        if chat and not tokenizer.chat_template:
            mend = f"leave {name} out of chat_models, or give an instruction-tuned model"
            raise UserError(f"models.{name}", tokenizer.name_or_path, "its tokenizer has no chat template", mend)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, with what the tokenizer and the chat template put around a text.

        Of a causal model the end mark that some tokenizers put behind a text is left out: the text goes on.
        """
        if self.chat:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        if not texts:
            return []
        # A chat template writes its own special tokens.
        rows = self.tokenizer(list(texts), add_special_tokens=not self.chat, truncation=False, verbose=False)
        rows = [list(row) for row in rows["input_ids"]]
        if not self.encodes:
            rows = [row[:-1] if row and row[-1] in self.ends else row for row in rows]
        return rows

    def prompts(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """Token ids of prompts, at least one token each.

        Args:
            texts: the prompts.
            room: tokens that an answer may take.

        Raises:
            UserError: a prompt that leaves fewer of the model's places.
        """
        rows = self.ids(texts)
        for row, text in zip(rows, texts, strict=True):
            if not row:
                row.append(self._first_token())
            needed = len(row) if self.encodes else len(row) + room
            if self.room is not None and needed > self.room:
                more = "" if self.encodes else f" and {room} for the answer"
                problem = f"a prompt takes {len(row)} tokens{more}, {self.name} reads {self.room}"
                mend = "give fewer shots, shorter examples, a smaller max_new_tokens, or another model"
                raise UserError("prompt", text, problem, mend)
        return rows

    def with_choices(self, prompt: str, choices: Sequence[str]) -> tuple[list[list[int]], int]:
        """Ids of a prompt with each of its choices, and the first place that is scored, the same for all.

        Prompt and choice are tokenized as one text. Where that merges the prompt's last characters into a choice's
        first token, the place is that of the last token that all of them and the prompt share.

        Raises:
            UserError: prompt and choice take more places than the model has.
        """
        base = self.ids([prompt])[0]
        if self.chat:
            # The template ends where the answer begins, so that no token can span both.
            own = self.tokenizer([choice.lstrip() for choice in choices], add_special_tokens=False)["input_ids"]
            wholes = [base + list(ids) for ids in own]
        else:
            wholes = self.ids([prompt + choice for choice in choices])
        start = min(_common_prefix(base, whole) for whole in wholes)
        if start == 0:
            first = self._first_token()
            wholes, start = [[first, *whole] for whole in wholes], 1
        longest = max(map(len, wholes)) - 1
        if self.room is not None and longest > self.room:
            problem = f"with its longest choice it takes {longest} tokens, {self.name} reads {self.room}"
            raise UserError("prompt", prompt, problem, "give fewer shots, shorter examples, or another model")
        return wholes, start

    def decoder_choices(self, choices: Sequence[str]) -> list[list[int]]:
        """Ids of choices as an encoder-decoder writes them: without white space around them and without an end mark."""
        rows = self.tokenizer(text_target=[c.strip() for c in choices], truncation=False, verbose=False)["input_ids"]
        return [list(row[:-1] if row[-1] in self.ends else row) for row in rows]

    def _first_token(self) -> int:
        start = self.tokenizer.bos_token_id
        if start is None and not self.ends:
            raise UserError("prompt", "", "is empty, and the model has no token to begin with", "give a prompt")
        return self.ends[0] if start is None else start


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
