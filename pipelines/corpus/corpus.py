"""Stage ``corpus``: reads, checks and normalizes text data once; every later stage reads the splits it saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import StageConfig, config
from pipelines.corpus.fields import EMBEDDED, CorpusFields

if TYPE_CHECKING:
    from datasets import DatasetDict


@config
class CorpusConfig(CorpusFields, StageConfig):
    """Reads documents with summaries (embedded, local or from the hub), checks them all and saves the three splits."""

    output_dir: str = Field("runs/corpus", description="folder the splits are saved into")


def corpus(config: CorpusConfig) -> dict[str, float]:
    """Saves the normalized corpus (``save_to_disk``) and ``stats.json`` into ``output_dir``.

    Returns:
        For each split its size, ``corpus/<split>_examples``; over the training set the mean number of words of
        documents and summaries, ``corpus/document_words`` and ``corpus/summary_words``, and of references,
        ``corpus/references``; ``corpus/duplicate_rate``, the share of held-out documents that also stand in the
        training set; for ``pydocs`` also ``corpus/packages``, ``corpus/leak_rate_before`` and ``corpus/leak_rate`` (see
        ``pydocs.build``).

    Raises:
        UserError: whatever is wrong with the data; nothing is written then.
    """
    from pipelines.corpus.local import load_corpus
    from pipelines.stage import write_json

    splits = load_corpus(config)
    metrics = {f"corpus/{split}_examples": len(part) for split, part in splits.items()}
    stats = {"splits": {split: _lengths(splits, split) for split in splits}}
    metrics["corpus/document_words"] = stats["splits"]["train"]["document_words"]["mean"]
    metrics["corpus/summary_words"] = stats["splits"]["train"]["summary_words"]["mean"]
    metrics["corpus/references"] = sum(map(len, splits["train"]["references"])) / len(splits["train"])
    metrics["corpus/duplicate_rate"] = _duplicate_rate(splits)
    if config.dataset == EMBEDDED:
        from pipelines.corpus.pydocs import pydocs

        figures = pydocs()[1]
        stats |= figures
        metrics["corpus/packages"] = len(figures["packages"])
        metrics["corpus/leak_rate_before"] = figures["leak_rate_before"]
        metrics["corpus/leak_rate"] = figures["leak_rate"]

    if int(os.environ.get("RANK", "0")) != 0:
        return metrics
    folder = Path(config.output_dir)
    splits.save_to_disk(str(folder))
    write_json(folder / "stats.json", stats)
    return metrics


def _lengths(splits: DatasetDict, split: str) -> dict[str, object]:
    part = splits[split]
    return {
        "examples": len(part),
        "document_words": _quantiles([len(text.split()) for text in part["document"]]),
        "summary_words": _quantiles([len(text.split()) for text in part["summary"]]),
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in (("median", 0.5), ("p95", 0.95))}
    return {"mean": sum(ordered) / len(ordered), **at, "largest": ordered[-1]}


def _duplicate_rate(splits: DatasetDict) -> float:
    train = {" ".join(text.split()) for text in splits["train"]["document"]}
    held_out = [" ".join(text.split()) for split in ("validation", "test") for text in splits[split]["document"]]
    return sum(text in train for text in held_out) / len(held_out)
