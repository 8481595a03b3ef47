"""Stage ``text``: raw text to pretrain on, and pairs to mix in, written once as Arrow files that are read from disk.

A folder it saves holds ``text/`` and ``pairs/`` (where there are pairs), each with the splits ``train`` and
``validation``, and ``stats.json``. Any example is had at once, so a run that resumes finds its place without reading
what came before; nothing but the example asked for is in memory, however large the set is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import StageConfig, config, looks_local
from pipelines.corpus.fields import EMBEDDED, CorpusFields, TextFields
from pipelines.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

    from pipelines.corpus.documents import Document

SPLITS = ("train", "validation")
STATS_FILE = "stats.json"


@config
class TextConfig(TextFields, StageConfig):
    """Reads raw text (embedded, local or from the hub) and pairs, and saves them for pretraining."""

    output_dir: str = Field("runs/text", description="folder the text and the pairs are saved into")


@dataclass(frozen=True)
class TextData:
    """What a model is pretrained on, read from disk example by example.

    Attributes:
        text: splits train and validation; columns ``text`` and ``source`` (where it stands: file and line, package).
        pairs: splits train and validation; columns ``id``, ``document``, ``summary`` and ``references``; None where
            there are no pairs.
        stats: documents, words and bytes of each split; for ``pydocs`` also packages with versions and licences (see
            ``packages.embedded_text``).
    """

    text: DatasetDict
    pairs: DatasetDict | None
    stats: dict[str, Any]


def text(config: TextConfig) -> dict[str, float]:
    """Saves text, pairs and ``stats.json`` into ``output_dir``.

    Returns:
        For each split ``text/<split>_documents``, ``text/<split>_words`` (separated by white space),
        ``text/<split>_bytes`` (of UTF-8) and ``text/<split>_pairs``; for ``pydocs`` also ``text/packages``,
        ``text/duplicates`` and ``text/leaks`` (documents and pairs dropped because they stand twice or repeat held-out
        text) and ``text/leak_rate`` (share of the held-out examples of ``pydocs`` that training pairs repeat).

    Raises:
        UserError: whatever is wrong with the data; nothing is written then.
    """
    stats = open_text(config, Path(config.output_dir)).stats
    metrics = {
        f"text/{split}_{what}": float(stats["splits"][split][what])
        for split in SPLITS
        for what in ("documents", "words", "bytes", "pairs")
    }
    if config.text == EMBEDDED:
        metrics["text/packages"] = len(stats["packages"])
        metrics |= {f"text/{what}": stats[what] for what in ("duplicates", "leaks", "leak_rate")}
    return metrics


def open_text(fields: TextFields, folder: Path) -> TextData:
    """The text and the pairs that ``fields`` name.

    A folder that the stage saved is opened as it is. Anything else is first written into ``folder``; what was written
    there before is found again, so ``folder`` must be one that belongs to these fields. Several processes may call
    this at once: one of them writes, the others wait for it.

    Raises:
        UserError: whatever is wrong with the data; nothing is left in ``folder`` then.
    """
    from filelock import FileLock

    if fields.text != EMBEDDED and is_saved_text(fields.text):
        found = open_saved(fields.text)
        return found if fields.pairs is None else TextData(found.text, _given_pairs(fields.pairs), found.stats)
    if not (folder / STATS_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder / ".lock"))
        with lock:
            if not (folder / STATS_FILE).is_file():
                _write(fields, folder)
            # Whoever still waits for this very file finds everything written.
            Path(lock.lock_file).unlink(missing_ok=True)
    return open_saved(folder)


def is_saved_text(folder: str | Path) -> bool:
    """Whether the stage made this folder."""
    folder = Path(folder).expanduser()
    return (folder / STATS_FILE).is_file() and (folder / "text" / "dataset_dict.json").is_file()


def check_saved(folder: str) -> None:
    """Refuses what the stage did not make; what is no existing path is left to ``StageConfig.problems``.

    Raises:
        UserError: another folder, or no folder.
    """
    if folder.startswith("${") or (looks_local(folder) and not Path(folder).expanduser().exists()):
        return
    if not is_saved_text(folder):
        mend = "give the folder that recipes/summarization/text.py saved"
        raise UserError("text", folder, "is no folder that the text stage saved", mend)


def open_saved(folder: str | Path) -> TextData:
    """What the stage saved in ``folder``.

    Raises:
        UserError: it is damaged.
    """
    import datasets

    folder = Path(folder).expanduser()
    try:
        text = datasets.load_from_disk(str(folder / "text"))
        pairs = datasets.load_from_disk(str(folder / "pairs")) if (folder / "pairs").is_dir() else None
        stats = json.loads((folder / STATS_FILE).read_text(encoding="utf-8"))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("text", folder, f"a damaged text folder ({reason})", "make it again") from None
    return TextData(text, pairs, stats)


def _given_pairs(source: str) -> DatasetDict:
    import datasets

    from pipelines.corpus.local import load_corpus

    found = load_corpus(CorpusFields(dataset=source))
    return datasets.DatasetDict({split: found[split] for split in SPLITS})


def _write(fields: TextFields, folder: Path) -> None:
    from pipelines.stage import write_json

    parts = {name: folder / f".{name}.partial" for name in ("text", "pairs")}
    for part in parts.values():
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    try:
        pairs, stats = None, {}
        if fields.text == EMBEDDED:
            from pipelines.corpus.local import as_datasets
            from pipelines.corpus.packages import embedded_text

            found = embedded_text(fields.site_packages)
            documents: Iterable[Document] = ((s, *item) for s in SPLITS for item in found.texts[s])
            stats = dict(found.stats)
            if fields.pairs is None:
                pairs = as_datasets(found.pairs)
        else:
            from pipelines.corpus.documents import documents as read

            documents = read(fields)
        if fields.pairs is not None:
            pairs = _given_pairs(fields.pairs)
        counts = _write_documents(documents, parts["text"], fields)
        if pairs is not None:
            pairs.save_to_disk(str(parts["pairs"]))
        for split in SPLITS:
            counts[split]["pairs"] = 0 if pairs is None else len(pairs[split])
        for name, part in parts.items():
            if part.is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(part, folder / name)
        # Last, since it says that the rest is whole.
        write_json(folder / STATS_FILE, {"splits": counts, **stats})
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)


def _write_documents(documents: Iterable[Document], folder: Path, fields: TextFields) -> dict[str, Counter]:
    """Writes documents as they come; returns documents, words and bytes of each split.

    Those without a split are dealt out by a hash of their text, so that a document and its exact copies are on one side
    whatever else there is; of a set so small that none would be held out, the one with the least hash is.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features({"text": datasets.Value("string"), "source": datasets.Value("string")})
    folder.mkdir(parents=True)
    files = {split: folder / f"{split}.arrow" for split in SPLITS}
    writers = {split: ArrowWriter(path=str(files[split]), features=features) for split in SPLITS}
    counts = {split: Counter(documents=0, words=0, bytes=0) for split in SPLITS}
    # By default `datasets` would put the time of writing into what it saves.
    digests = {split: hashlib.sha256() for split in SPLITS}
    least = (2**64, 0)
    for split, source, text in documents:
        if split is None:
            number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
            split = "validation" if number < fields.text_validation_fraction * 2**64 else "train"
            least = min(least, (number, counts["train"]["documents"]))
        writers[split].write({"text": text, "source": source})
        digests[split].update(f"{source}\n{text}\n".encode())
        counts[split].update(_count(text))
    made = {}
    for split, writer in writers.items():
        # An Arrow file without rows cannot be finalized.
        if counts[split]["documents"]:
            writer.finalize()
            table = datasets.table.MemoryMappedTable.from_file(str(files[split]))
            made[split] = datasets.Dataset(table, fingerprint=digests[split].hexdigest()[:16])
        else:
            writer.close()
    if "train" in made and "validation" not in made and least[0] < 2**64:
        held_out = made["train"][least[1]]["text"]
        same = [text == held_out for text in made["train"]["text"]]
        for split, wanted in (("validation", True), ("train", False)):
            chosen = [index for index, value in enumerate(same) if value is wanted]
            counts[split] = sum((_count(made["train"][i]["text"]) for i in chosen), Counter(documents=0))
            made[split] = made["train"].select(chosen, new_fingerprint=f"{made['train']._fingerprint}{split}")
    for split in SPLITS:
        if not counts[split]["documents"]:
            total = counts["train"]["documents"] + counts["validation"]["documents"]
            problem = f"its {total} documents leave none for the {split} split"
            mend = "give more documents, or another text_validation_fraction"
            raise UserError("text", fields.text, problem, mend)
    datasets.DatasetDict({split: made[split] for split in SPLITS}).save_to_disk(str(folder))
    for file in files.values():
        file.unlink()
    return counts


def _count(text: str) -> Counter:
    return Counter(documents=1, words=len(text.split()), bytes=len(text.encode()))
