"""A small encoder-decoder, a tokenizer and a corpus, built here in a second: no download, no stored weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

_ADJECTIVES = ("small", "open", "sorted", "binary", "remote", "local", "empty", "nested")
_NOUNS = ("file", "list", "table", "image", "server", "matrix", "token", "graph")
_VERBS = ("read", "write", "sort", "close", "merge", "count", "parse", "draw")


def _rows(count: int, seed: int, split: str) -> list[dict]:
    """Documents whose summary can be learned: a verb, an adjective and a noun stand in it, among other words."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        verb, adjective, noun = draw.choice(_VERBS), draw.choice(_ADJECTIVES), draw.choice(_NOUNS)
        extra = " ".join(draw.choices(_NOUNS + _ADJECTIVES, k=draw.randint(3, 12)))
        summary = f"{verb.capitalize()} the {adjective} {noun}."
        rows.append(
            {
                "id": f"{split}-{index}",
                "document": f"kit.{noun}s.{verb}_{noun}\ndef {verb}_{noun}({adjective}): return {extra}",
                "summary": summary,
                "references": [summary, f"{verb.capitalize()} a {noun}."],
                "name": f"kit.{noun}s.{verb}_{noun}",
            }
        )
    return rows


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Folder of a corpus as its stage saves it: 96/24/24 rows with id, document, summary, references and name."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("tiny_corpus")
    splits = (("train", 96, 1), ("validation", 24, 2), ("test", 24, 3))
    DatasetDict({name: Dataset.from_list(_rows(count, seed, name)) for name, count, seed in splits}).save_to_disk(
        str(folder)
    )
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """Folder of the project's own kind of tokenizer, with every word of ``tiny_corpus``; the same in every process."""
    from pipelines.corpus.unigram import train

    texts = [text for row in _rows(200, 1, "train") for text in (row["document"], row["summary"])]
    tokenizer = train(texts, 320, lowercase=True)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer):
    """``tiny_tokenizer``, loaded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_tokenizer))


def _save_t5(folder: Path, tokenizer_folder: Path, seed: int) -> Path:
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=4,
                dropout_rate=0.1,
                decoder_start_token_id=0,
                initializer_factor=0.3,
            )
        )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folder of an untrained T5 (one layer, d_model 32) with ``tiny_tokenizer``; load it, do not write into it."""
    return _save_t5(tmp_path_factory.mktemp("tiny_t5"), tiny_tokenizer, seed=0)
