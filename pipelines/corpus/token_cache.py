"""Tokens of large sets are made once and found again: by the texts, the tokenizer and where texts are cut.

They lie under ``$GENALIGN_CACHE/tokens``, mapped into memory when they are used, so a set may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipelines.cache import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CACHED_FROM = 10_000
"""Sets with fewer examples are tokenized within a second or two, in memory."""

_ROWS = 1000


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer is: its whole definition counts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(definition.encode()).hexdigest()


def text_digest(rows: Dataset, columns: Sequence[str]) -> str:
    """The content of columns of texts; a gigabyte takes a few seconds."""
    found = hashlib.blake2b(digest_size=16)
    for batch in rows.select_columns(list(columns)).iter(_ROWS):
        for column in columns:
            for text in batch[column]:
                data = text.encode()
                found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def token_folder(
    what: str, rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: Sequence[Any]
) -> Path:
    """Where the tokens of a set lie, by the content of all that decides them.

    Args:
        what: is kept there; two layouts need two names.
        rows: the texts.
        columns: that are tokenized.
        tokenizer: of the model.
        settings: lengths and prefix.
    """
    whole = [what, text_digest(rows, columns), tokenizer_digest(tokenizer), list(settings)]
    return cache_folder("tokens") / hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:24]


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` write into ``folder`` unless it is there, whole; of several processes one does it.

    Args:
        folder: in the cache.
        make: writes into the folder that it is given, which is renamed when it returns.
    """
    with FileLock(str(folder.with_name(f".{folder.name}.lock"))):
        if folder.exists():
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        os.replace(partial, folder)
