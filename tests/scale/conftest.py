"""Sets on disk of any size, and tiny models to train on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.seq2seq.conftest import tiny_t5, tiny_tokenizer, tokenizer

__all__ = ["tiny_t5", "tiny_tokenizer", "tokenizer"]

_NOUNS = ("file", "list", "table", "image", "server", "matrix", "token", "graph")
_ADJECTIVES = ("small", "open", "sorted", "binary", "remote", "local", "empty", "nested")


def documents(count: int, seed: int = 0, word: str = "read") -> Iterator[dict]:
    """Documents of 3 to 20 words with their summaries, each different; the ``word`` says which set they are of."""
    draw = random.Random(seed)
    # A million of them have to be made quickly.
    ends = [" ".join(draw.choices(_NOUNS + _ADJECTIVES, k=draw.randint(3, 20))) for _ in range(997)]
    for number in range(count):
        noun, adjective = _NOUNS[number % 8], _ADJECTIVES[number // 8 % 8]
        rest = ends[number % 997]
        yield {"document": f"{word} {number} {adjective} {noun} {rest}", "summary": f"{word} the {adjective} {noun}."}


def preferences(count: int, seed: int = 0, word: str = "read") -> Iterator[dict]:
    """Pairs on the same documents: the summary against another one with a word too many."""
    for row in documents(count, seed, word):
        yield {"prompt": row["document"], "chosen": row["summary"], "rejected": f"{word} the empty graph table."}


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    """JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path
