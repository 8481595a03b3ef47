"""From texts to tokens: sentences to be predicted, and the memory-mapped files that pretraining reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from pipelines.cache import cache_folder
from pipelines.corpus.token_cache import made_once, tokenizer_digest
from pipelines.seq2seq.metrics import sentences
from pipelines.seq2seq.pretrain_data import TokenRows, TokenWriter
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation")
FILES = ("stream", "gap-source", "gap-target", "copy", "source", "target")
_CHUNK = 1000
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_MIN_GAP_TOKENS = 5


def document_sentences(text: str) -> list[str]:
    """The sentences of a document whose lines may be wrapped: a blank line ends one, a single line break does not."""
    found: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        found.extend(sentences(" ".join(paragraph.split())))
    return found


def is_prose(sentence: str) -> bool:
    """Whether a sentence is one that a person would say: it begins with a letter and is letters for the most part."""
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return sentence[:1].isalpha() and letters >= 0.8 * len(sentence)


def overlap_f1(part: Counter, whole: Counter) -> float:
    """ROUGE-1 F1 between a sentence and the rest of its text, by token: both as counts of tokens."""
    rest = whole - part
    common = sum((part & rest).values())
    return 2.0 * common / max(part.total() + rest.total(), 1)


def windows(lengths: Sequence[int], limit: int) -> Iterator[range]:
    """Runs of neighbouring sentences that fit into ``limit`` tokens; a longer sentence stands in none."""
    start, total = 0, 0
    for index, length in enumerate(lengths):
        if total + length > limit and start < index:
            yield range(start, index)
            start, total = index, 0
        if length > limit:
            start, total = index + 1, 0
        else:
            total += length
    if start < len(lengths):
        yield range(start, len(lengths))


def gap_sentence(rows: Sequence[Sequence[int]], usable: Sequence[bool]) -> int | None:
    """The sentence that overlaps most with the rest of its text, PEGASUS's choice; None where none can be taken.

    Zhang et al. 2020 (https://arxiv.org/abs/1912.08777, §3.1, "Ind-Orig" with one sentence).

    Args:
        rows: token ids of each sentence of a window.
        usable: whether it may be taken.
    """
    counts = [Counter(row) for row in rows]
    whole = sum(counts, Counter())
    scores = {i: overlap_f1(counts[i], whole) for i in range(len(rows)) if usable[i]}
    return max(scores, key=lambda i: (scores[i], -i)) if scores and len(rows) > 1 else None


def gap_examples(
    rows: Sequence[Sequence[int]],
    usable: Sequence[bool],
    limit: int,
    choice: Literal["first", "principal", "both"],
) -> Iterator[tuple[list[int], int, list[int]]]:
    """Texts with one sentence taken out.

    Args:
        rows: token ids of the sentences of a document.
        usable: whether each may be taken.
        limit: tokens of the text around it, at most.
        choice: ``first``: the document's first sentence, as what says what follows; ``principal``: of each window the
            sentence that overlaps most with the rest; ``both``: the first one of the first window, the principal one of
            the others.

    Yields:
        The tokens before the sentence and after it as one list, where in it the sentence stood, and its tokens.
    """
    for number, window in enumerate(windows([len(row) for row in rows], limit)):
        if number and choice == "first":
            return
        if choice != "principal" and window.start == 0:
            taken = 0 if usable[0] and len(window) > 1 else None
        elif choice == "first":
            return
        else:
            found = gap_sentence([rows[i] for i in window], [usable[i] for i in window])
            taken = None if found is None else window.start + found
        if taken is None:
            continue
        before = [token for i in range(window.start, taken) for token in rows[i]]
        after = [token for i in range(taken + 1, window.stop) for token in rows[i]]
        yield before + after, len(before), list(rows[taken])


@dataclass(frozen=True)
class TokenSettings:
    """All that decides which tokens are written, beside the text and the tokenizer.

    Args:
        max_source_length: tokens of a source.
        max_target_length: tokens of a target.
        prefix: of documents to be summarized.
        copy_prefix: of documents to be copied from.
        gap_prefix: of texts that lack a sentence.
        gap_choice: which sentence they lack.
    """

    max_source_length: int
    max_target_length: int
    prefix: str
    copy_prefix: str
    gap_prefix: str
    gap_choice: Literal["first", "principal", "both"]


def prefix_ids(tokenizer: PreTrainedTokenizerBase, prefix: str) -> list[int]:
    """Token ids of a prefix."""
    return list(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else []


def token_folder(settings: TokenSettings, tokenizer: PreTrainedTokenizerBase, text: Sequence[str]) -> Path:
    """Where in the cache the tokens of a text lie, by the content of all that decides them.

    Args:
        settings: lengths, prefixes, the choice of sentences.
        tokenizer: its whole definition counts.
        text: what names the text's content (digests).
    """
    whole = [settings.__dict__, tokenizer_digest(tokenizer), list(text), Path(__file__).read_text()]
    return cache_folder("pretrain") / hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


def _texts(split: Any, columns: Sequence[str], progress: str | None) -> Iterator[dict[str, list[str]]]:
    bar = tqdm(total=len(split), desc=progress, unit="text", disable=progress is None)
    with bar:
        for start in range(0, len(split), _CHUNK):
            rows = split[start : start + _CHUNK]
            yield {column: list(rows[column]) for column in columns}
            bar.update(min(_CHUNK, len(split) - start))


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []


def _gap_rows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], settings: TokenSettings, sentinel: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Sources ``prefix before <sentinel> after </s>`` and targets ``sentence </s>``."""
    end, prefix = tokenizer.eos_token_id, prefix_ids(tokenizer, settings.gap_prefix)
    split = [document_sentences(text) for text in texts]
    flat = [sentence for one in split for sentence in one]
    rows = _plain(tokenizer, flat)
    most = settings.max_target_length - 1
    usable = [is_prose(s) and _MIN_GAP_TOKENS <= len(r) <= most for s, r in zip(flat, rows, strict=True)]
    sources, targets, start = [], [], 0
    # The sentence taken out leaves room, so a window may be as much longer.
    limit = settings.max_source_length - len(prefix) - 2
    for one in split:
        stop = start + len(one)
        for text, place, taken in gap_examples(rows[start:stop], usable[start:stop], limit, settings.gap_choice):
            sources.append([*prefix, *text[:place], sentinel, *text[place:], end])
            targets.append([*taken, end])
        start = stop
    return sources, targets


def _lengths(settings: TokenSettings, prefix: str) -> LengthConfig:
    return LengthConfig(
        max_source_length=settings.max_source_length, max_target_length=settings.max_target_length, prefix=prefix
    )


def rows_of_texts(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    objectives: Sequence[str],
    sentinel: int,
    copied: bool,
) -> dict[str, list[list[int]]]:
    """What raw texts give: name of the rows (as in ``FILES``) -> token ids.

    Args:
        texts: documents.
        tokenizer: of the model.
        settings: lengths, prefixes, the choice of sentences.
        objectives: those that are wanted.
        sentinel: id of the first one.
        copied: whether copying takes its documents from here.
    """
    found: dict[str, list[list[int]]] = {}
    if "span" in objectives:
        found["stream"] = _plain(tokenizer, texts)
    if "gap" in objectives:
        found["gap-source"], found["gap-target"] = _gap_rows(tokenizer, texts, settings, sentinel)
    if "copy" in objectives and copied:
        found["copy"] = tokenize_sources(tokenizer, texts, _lengths(settings, settings.copy_prefix))["input_ids"]
    return found


def rows_of_pairs(
    documents: list[str],
    summaries: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    objectives: Sequence[str],
) -> dict[str, list[list[int]]]:
    """What documents with summaries give, as ``rows_of_texts``."""
    found: dict[str, list[list[int]]] = {}
    if "span" in objectives:
        found["stream"] = _plain(tokenizer, documents)
    if "copy" in objectives:
        found["copy"] = tokenize_sources(tokenizer, documents, _lengths(settings, settings.copy_prefix))["input_ids"]
    if "supervised" in objectives:
        found["source"] = tokenize_sources(tokenizer, documents, _lengths(settings, settings.prefix))["input_ids"]
        found["target"] = tokenize_targets(tokenizer, summaries, _lengths(settings, ""))["input_ids"]
    return found


def _write(
    folder: Path,
    text: Any,
    pairs: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    objectives: Sequence[str],
    sentinel: int,
    progress: bool,
) -> None:
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"

    def writer(name: str, split: str) -> TokenWriter:
        return TokenWriter(folder / f"{name}-{split}.bin", dtype)

    for split in SPLITS:
        files = {name: writer(name, split) for name in FILES}
        for rows in _texts(text[split], ["text"], f"tokenizing text ({split})" if progress else None):
            found = rows_of_texts(rows["text"], tokenizer, settings, objectives, sentinel, pairs is None)
            for name, ids in found.items():
                files[name].extend(ids)
        columns = ["document", "summary"]
        for rows in _texts(pairs[split], columns, f"tokenizing pairs ({split})" if progress else None) if pairs else ():
            found = rows_of_pairs(rows["document"], rows["summary"], tokenizer, settings, objectives)
            for name, ids in found.items():
                files[name].extend(ids)
        for file in files.values():
            file.close()
    (folder / "dtype").write_text(dtype, encoding="utf-8")


def write_tokens(folder: Path, *args: Any, **kwargs: Any) -> None:
    """Write the tokens of a text into ``folder`` unless they are there; of several processes one does it.

    Args:
        folder: as ``token_folder`` says.
        args: the text's and the pairs' splits, the tokenizer, settings, names of the objectives, the id of the first
            sentinel, and whether progress is shown.
        kwargs: the same by name.
    """
    made_once(folder, lambda partial: _write(partial, *args, **kwargs))


def open_tokens(folder: Path, name: str, split: str) -> TokenRows:
    """The rows of a split that ``write_tokens`` wrote under one of the names in ``FILES``."""
    return TokenRows.open(folder / f"{name}-{split}.bin", (folder / "dtype").read_text(encoding="utf-8"))
