"""Own data as a corpus or as preference pairs: found, checked wholly, split, and given the columns all stages read."""

from __future__ import annotations

import contextlib
import difflib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.corpus.fields import EMBEDDED, CorpusFields, PreferenceFields, RankingFields, SplitFields
from pipelines.corpus.readers import (
    Rows,
    from_dataset,
    is_saved,
    load_hub,
    load_saved,
    read_file,
    rows_of_files,
    split_files,
    type_of,
)
from pipelines.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")
CORPUS_COLUMNS = ("id", "document", "summary", "references")
PREFERENCE_COLUMNS = ("id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin")
RANKING_COLUMNS = ("id", "prompt", "completions", "ranking")

Example = dict[str, Any]


# --- values -----------------------------------------------------------------------------------------------------------


def text_of(value: Any, column: str, place: str, what: str) -> str:
    """A cell as text without white space around it; a list of sentences is joined with blanks.

    Raises:
        UserError: null, not text, empty, or not representable as UTF-8.
    """
    if isinstance(value, (list, tuple)):
        parts = [_one_text(part, f"{column}[{i}]", place, what) for i, part in enumerate(value)]
        return _not_empty(" ".join(part for part in parts if part), column, place, what)
    return _not_empty(_one_text(value, column, place, what), column, place, what)


def references_of(value: Any, column: str, place: str, what: str) -> list[str]:
    """A cell as its list of reference texts: text gives one, a list of texts is kept.

    Raises:
        UserError: as ``text_of``; also for an empty list.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            raise UserError(what, place, f"the column {column!r} is an empty list", "give a text or drop the example")
        return [text_of(part, f"{column}[{i}]", place, what) for i, part in enumerate(value)]
    return [text_of(value, column, place, what)]


def _one_text(value: Any, column: str, place: str, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(what, place, f"the column {column!r} holds {type_of(value)}, not text", "give text there")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"the column {column!r} holds half of a surrogate pair (\\ud800-\\udfff)"
        raise UserError(what, place, problem, "mend that text") from None
    return value.strip()


def _not_empty(text: str, column: str, place: str, what: str) -> str:
    if not text:
        raise UserError(what, place, f"the column {column!r} is empty", "give a text or drop the example")
    return text


def _number(value: Any, column: str, place: str, what: str) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = value if isinstance(value, float) else type_of(value)
        raise UserError(what, place, f"the column {column!r} holds {shown}, not a number", "give a finite number there")
    return float(value)


def check_column(rows: Rows, field: str, name: str, option: bool = True) -> None:
    """Refuse a column that is not there, or holds numbers where texts are wanted.

    Args:
        rows: of a source.
        field: the configuration field that names the column, or that named the source.
        name: of the column.
        option: whether the user can name another column by ``field``.

    Raises:
        UserError: with the columns there are.
    """
    if name in rows.columns:
        values = [row.get(name) for _, row in rows.rows]
        if not rows.typed and all(_is_number(value) for value in values):
            problem = f"holds numbers, not text, in {rows.source}"
            raise UserError(field, name, problem, f"pass {field}=NAME of a column of texts" if option else "give texts")
        return
    near = difflib.get_close_matches(name, rows.columns, n=1)
    has = f"it has: {', '.join(map(repr, rows.columns))}" if rows.columns else "it has none"
    mend = f"pass {field}={near[0] if near else 'NAME'}" if option else f"name a column {name!r}"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(field, name, f"no such column in {rows.source} ({has}){hint}", mend)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _cell(row: dict[str, Any], column: str, place: str, what: str) -> Any:
    if column not in row:
        raise UserError(what, place, f"the column {column!r} is missing there", "add it or drop the example")
    return row[column]


# --- examples ---------------------------------------------------------------------------------------------------------


def _corpus_examples(rows: Rows, split: str, fields: CorpusFields) -> list[Example]:
    check_column(rows, "text_column", fields.text_column)
    check_column(rows, "summary_column", fields.summary_column)
    if fields.id_column != "id":
        check_column(rows, "id_column", fields.id_column)
    columns = fields.text_column, fields.summary_column
    examples = [corpus_example(row, place, rows.what, *columns) for place, row in rows.rows]
    return with_ids(examples, [row.get(fields.id_column) for _, row in rows.rows], split)


def corpus_example(row: dict[str, Any], place: str, what: str, text_column: str, summary_column: str) -> Example:
    """A row as ``document``, ``summary`` and ``references``.

    Raises:
        UserError: a column is missing there, or holds no text.
    """
    text, summary = _cell(row, text_column, place, what), _cell(row, summary_column, place, what)
    references = references_of(summary, summary_column, place, what)
    document = text_of(text, text_column, place, what)
    return {"document": document, "summary": references[0], "references": references}


def _preference_examples(rows: Rows, split: str, fields: PreferenceFields) -> list[Example]:
    for column in ("prompt", "chosen", "rejected"):
        check_column(rows, rows.what, column, option=False)
    examples = [preference_example(row, place, rows.what) for place, row in rows.rows]
    return with_ids(examples, [row.get("id") for _, row in rows.rows], split)


def preference_example(row: dict[str, Any], place: str, what: str) -> Example:
    """A row as ``prompt``, ``chosen``, ``rejected``, their scores and their ``margin``.

    Raises:
        UserError: a column is missing there, or holds no text; the texts are identical, or scored the wrong way round.
    """
    texts = {c: _cell(row, c, place, what) for c in ("prompt", "chosen", "rejected")}
    for column, value in texts.items():
        if isinstance(value, (list, tuple)) and any(isinstance(part, dict) for part in value):
            problem = f"the column {column!r} holds chat messages, not text"
            raise UserError(what, place, problem, "give the texts themselves")
    example: Example = {c: text_of(value, c, place, what) for c, value in texts.items()}
    if example["chosen"] == example["rejected"]:
        raise UserError(what, place, "chosen and rejected are identical", "drop that pair")
    # People say which, not by how much: such a pair counts as one apart.
    scores = {"chosen_score": 1.0, "rejected_score": 0.0}
    if all(row.get(column) is not None for column in scores):
        scores = {column: _number(row[column], column, place, what) for column in scores}
        if scores["chosen_score"] <= scores["rejected_score"]:
            problem = f"chosen_score {scores['chosen_score']:g} is not above rejected_score"
            raise UserError(what, place, problem, "swap the two or drop that pair")
    return example | scores | {"margin": scores["chosen_score"] - scores["rejected_score"]}


def _ranking_examples(rows: Rows, split: str, fields: RankingFields) -> list[Example]:
    for column in ("prompt", "completions", "ranking"):
        check_column(rows, rows.what, column, option=False)
    examples = []
    for place, row in rows.rows:
        texts = _cell(row, "completions", place, rows.what)
        if not isinstance(texts, (list, tuple)) or len(texts) < 2:
            problem = f"the column 'completions' holds {type_of(texts)}, not a list of at least two texts"
            if isinstance(texts, (list, tuple)):
                problem = f"the column 'completions' holds {len(texts)} texts: there is nothing to rank"
            raise UserError(rows.what, place, problem, "give a list of two or more texts")
        completions = [text_of(text, f"completions[{i}]", place, rows.what) for i, text in enumerate(texts)]
        if len(set(completions)) < len(completions):
            twice = next(i for i, text in enumerate(completions) if text in completions[:i])
            raise UserError(rows.what, place, f"completions[{twice}] stands there twice", "keep one of them")
        ranking = _ranking_of(_cell(row, "ranking", place, rows.what), len(completions), place, rows.what)
        prompt = text_of(_cell(row, "prompt", place, rows.what), "prompt", place, rows.what)
        examples.append({"prompt": prompt, "completions": completions, "ranking": ranking})
    return with_ids(examples, [row.get("id") for _, row in rows.rows], split)


def _ranking_of(value: Any, count: int, place: str, what: str) -> list[int]:
    mend = f"give the completions' numbers from 0 to {count - 1}, best first"
    if not isinstance(value, (list, tuple)):
        raise UserError(what, place, f"the column 'ranking' holds {type_of(value)}, not a list of numbers", mend)
    if not value:
        raise UserError(what, place, "the column 'ranking' is empty", mend)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise UserError(what, place, f"the column 'ranking' holds {number!r}, no completion's number", mend)
    if len(set(value)) < len(value):
        raise UserError(what, place, "the column 'ranking' names a completion twice", mend)
    return list(value)


def with_ids(examples: list[Example], given: list[Any], split: str) -> list[Example]:
    """Examples with an ``id``: the given ids where they are all there and unique, else ``train-0``, ``train-1`` …"""
    sound = all(isinstance(i, (str, int)) and not isinstance(i, bool) for i in given) and len(set(given)) == len(given)
    ids = map(str, given) if sound else (f"{split}-{index}" for index in range(len(given)))
    return [{"id": identifier, **example} for identifier, example in zip(ids, examples, strict=True)]


# --- splits -----------------------------------------------------------------------------------------------------------


def split_by_group(groups: Sequence[str], fractions: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Random split of indices by group: examples of one group (one document) never stand in two splits.

    Args:
        groups: the group of every example.
        fractions: split -> share of the groups, of the splits beside ``train``; each gets at least one group.
        seed: of the order in which groups are dealt out.

    Returns:
        Split -> indices in ascending order, ``train`` first.

    Raises:
        ValueError: fewer groups than splits.
    """
    names = list(dict.fromkeys(groups))
    if len(names) <= len(fractions):
        raise ValueError(f"{len(names)} groups cannot make {len(fractions) + 1} splits")
    random.Random(seed).shuffle(names)
    split_of: dict[str, str] = {}
    start = 0
    for position, (split, fraction) in enumerate(fractions.items()):
        # Each split still to come, train among them, keeps at least one group.
        left = len(names) - start - (len(fractions) - position)
        size = max(1, min(left, round(fraction * len(names))))
        split_of.update(dict.fromkeys(names[start : start + size], split))
        start += size
    found: dict[str, list[int]] = {"train": [], **{split: [] for split in fractions}}
    for index, group in enumerate(groups):
        found[split_of.get(group, "train")].append(index)
    return found


def _complete(splits: dict[str, list[Example]], key: str, fields: SplitFields, what: str, value: str) -> None:
    """Makes the splits that are missing out of ``train``."""
    if "train" not in splits:
        raise UserError(what, value, f"no training split (it has: {', '.join(splits)})", "give a training set")
    fractions = {"validation": fields.validation_fraction, "test": fields.test_fraction}
    fractions = {split: share for split, share in fractions.items() if split not in splits}
    if not fractions:
        return
    train = splits["train"]
    try:
        indices = split_by_group([example[key] for example in train], fractions, fields.split_seed)
    except ValueError:
        problem = f"too few different examples to also make {' and '.join(fractions)}"
        raise UserError(what, value, problem, "give more examples, or a file for each split") from None
    splits.update({split: [train[i] for i in chosen] for split, chosen in indices.items()})


def sample(size: int, limit: int | None, seed: int, split: str) -> list[int]:
    """Indices of a random sample of at most ``limit`` of ``size`` examples, in ascending order."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(random.Random(f"{seed} {split}").sample(range(size), limit))


def _limited(splits: DatasetDict, fields: SplitFields) -> DatasetDict:
    limits = {"train": fields.max_train, "validation": fields.max_validation, "test": fields.max_test}
    for split, limit in limits.items():
        size = len(splits[split])
        if limit is not None and limit < size:
            splits[split] = splits[split].select(sample(size, limit, fields.split_seed, split))
    return splits


# --- sources ----------------------------------------------------------------------------------------------------------


def _splits_of(value: str, what: str, config: str | None = None) -> tuple[dict[str, Any], bool]:
    """Split -> rows or dataset of one source; and whether the source names its splits (a single file does not)."""
    path = Path(value).expanduser()
    if path.is_dir():
        if is_saved(path):
            return load_saved(path, what), (path / "dataset_dict.json").is_file()
        files = split_files(path, what)
        return {split: rows_of_files(found, what) for split, found in files.items()}, True
    if path.exists() or path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return {"train": read_file(path, what)}, False
    return load_hub(value, what, config), True


def gather(sources: dict[str, tuple[str, str | None]], config: str | None) -> dict[str, Any]:
    """Split -> rows or dataset of the main source and the ones given for validation and test.

    Args:
        sources: split -> (field, value), ``train`` being the main source, which may hold all the splits.
    """
    what, value = sources["train"]
    splits, _ = _splits_of(value, what, config)
    seen = {Path(value).expanduser().resolve(): what}
    for split in ("validation", "test"):
        what, value = sources[split]
        if value is None:
            continue
        if split in splits:
            problem = f"{sources['train'][1]} has a {split} split of its own"
            raise UserError(what, value, problem, f"drop {what}, or give only the training file")
        path = Path(value).expanduser().resolve()
        if path in seen:
            raise UserError(what, value, f"is {seen[path]} too", "give each split data of its own")
        seen[path] = what
        found, named = _splits_of(value, what)
        if named and split not in found and len(found) > 1:
            raise UserError(what, value, f"has no {split} split (it has: {', '.join(found)})", "give the file itself")
        splits[split] = found[split] if split in found else next(iter(found.values()))
    return splits


def split_examples(
    found: dict[str, Any],
    sources: dict[str, tuple[str, str | None]],
    fields: SplitFields,
    key: str,
    examples_of: Callable[[Rows, str, Any], list[Example]],
) -> dict[str, list[Example]]:
    """The examples of every split that ``gather`` found; those that are missing are made out of ``train``.

    Args:
        found: split -> rows or dataset.
        sources: as given to ``gather``.
        fields: how splits are made; passed on to ``examples_of``.
        key: what an example is grouped by when it is split.
        examples_of: (rows, split, fields) -> examples.
    """
    splits = {}
    for split, part in found.items():
        what, value = sources[split] if sources[split][1] is not None else sources["train"]
        rows = part if isinstance(part, Rows) else from_dataset(part, what, value, split)
        splits[split] = examples_of(rows, split, fields)
    _complete(splits, key, fields, *sources["train"])
    return splits


def _load(
    sources: dict[str, tuple[str, str | None]],
    fields: SplitFields,
    columns: tuple[str, ...],
    key: str,
    examples_of: Callable[[Rows, str, Any], list[Example]],
    config: str | None = None,
    as_they_are: bool = True,
) -> DatasetDict:
    import datasets

    found = gather(sources, config)
    if as_they_are and set(found) == set(SPLITS) and all(_is_sound(part, columns) for part in found.values()):
        extra = [c for c in found["train"].column_names if c == "name"]
        ready = {split: found[split].select_columns([*columns, *extra]) for split in SPLITS}
        return _limited(datasets.DatasetDict(ready), fields)
    splits = split_examples(found, sources, fields, key, examples_of)
    return _limited(as_datasets(splits), fields)


def _is_sound(part: Any, columns: tuple[str, ...]) -> bool:
    """Whether a saved dataset already is what loading makes, so that it can stay on disk instead of in memory."""
    import datasets
    import pyarrow.compute as pc

    if not isinstance(part, datasets.Dataset) or not set(columns) <= set(part.column_names) or not len(part):
        return False
    wanted = _features(columns)
    if any(part.features[column] != wanted[column] for column in columns):
        return False
    values = {column: part.data.column(column) for column in columns}
    if any(column.null_count for column in values.values()):
        return False
    texts = [values[column] for column in columns if wanted[column] == datasets.Value("string")]
    if "references" in values:
        if pc.min(pc.list_value_length(values["references"])).as_py() < 1:
            return False
        texts.append(pc.list_flatten(values["references"]))
    if any(t.null_count or pc.min(pc.utf8_length(pc.utf8_trim_whitespace(t))).as_py() < 1 for t in texts):
        return False
    # `not (x > 0)` is also true of NaN.
    if "margin" in values and not pc.min(pc.greater(values["margin"], 0.0)).as_py():
        return False
    return "chosen" not in values or not pc.max(pc.equal(values["chosen"], values["rejected"])).as_py()


def _features(columns: Sequence[str]) -> Any:
    import datasets

    text, number = datasets.Value("string"), datasets.Value("float64")
    kinds = {"references": datasets.List(text), "chosen_score": number, "rejected_score": number, "margin": number}
    kinds |= {"completions": datasets.List(text), "ranking": datasets.List(datasets.Value("int64"))}
    return datasets.Features({column: kinds.get(column, text) for column in columns})


def as_datasets(splits: dict[str, list[Example]]) -> DatasetDict:
    """Examples by split as a ``DatasetDict``, the splits in their usual order."""
    import datasets

    made: dict[str, Dataset] = {}
    for split in [split for split in SPLITS if split in splits]:
        columns = list(splits[split][0])
        values = {column: [example[column] for example in splits[split]] for column in columns}
        made[split] = datasets.Dataset.from_dict(values, features=_features(columns))
    return datasets.DatasetDict(made)


def load_corpus(fields: CorpusFields) -> DatasetDict:
    """The corpus that ``fields`` name: splits train, validation and test.

    Returns:
        Columns ``id``, ``document``, ``summary`` (the first reference) and ``references`` (at least one); ``pydocs``
        also has ``name``, the qualified name of what is described.

    Raises:
        UserError: whatever is wrong with the data, with the file and line where there is one.
    """
    if fields.dataset == EMBEDDED:
        from pipelines.corpus.pydocs import pydocs

        return _limited(as_datasets(pydocs()[0]), fields)
    sources = {
        "train": ("dataset", fields.dataset),
        "validation": ("validation_dataset", fields.validation_dataset),
        "test": ("test_dataset", fields.test_dataset),
    }
    # A saved corpus whose columns the user names otherwise goes the long way.
    plain = (fields.text_column, fields.summary_column, fields.id_column) == ("document", "summary", "id")
    return _load(
        sources, fields, CORPUS_COLUMNS, "document", _corpus_examples, fields.dataset_config, as_they_are=plain
    )


def load_preferences(fields: PreferenceFields, *, field: str = "preferences") -> DatasetDict:
    """The preference pairs that ``fields`` name: splits train, validation and test; pairs of one prompt stay together.

    Args:
        fields: where the pairs are.
        field: what the user calls ``fields.preferences``, for messages.

    Returns:
        Columns ``id``, ``prompt``, ``chosen``, ``rejected``, ``chosen_score``, ``rejected_score`` and ``margin``,
        their difference. Where the data holds no scores (people's preferences), they are 1, 0 and 1.

    Raises:
        UserError: whatever is wrong with the data, also a pair of identical texts, or one scored the wrong way round.
    """
    sources = {
        "train": (field, fields.preferences),
        "validation": ("validation_preferences", fields.validation_preferences),
        "test": ("test_preferences", fields.test_preferences),
    }
    return _load(sources, fields, PREFERENCE_COLUMNS, "prompt", _preference_examples)


def load_rankings(fields: RankingFields) -> DatasetDict:
    """The ranked lists that ``fields`` name: splits train, validation and test; lists of one prompt stay together.

    Returns:
        Columns ``id``, ``prompt``, ``completions`` (K ≥ 2 different texts) and ``ranking`` (numbers of completions,
        best first; those that are not named are worse than those that are, in no order).

    Raises:
        UserError: whatever is wrong with the data, with the file and line where there is one.
    """
    sources = {
        "train": ("rankings", fields.rankings),
        "validation": ("validation_rankings", fields.validation_rankings),
        "test": ("test_rankings", fields.test_rankings),
    }
    return _load(sources, fields, RANKING_COLUMNS, "prompt", _ranking_examples, as_they_are=False)
