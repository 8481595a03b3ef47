"""Tasks: questions with choices, documents to summarize, words to change. One shape of example serves all.

Questions come in CommonsenseQA's file format (Talmor et al. 2019), JSON lines or a hub id:

    {"id": "1", "answerKey": "B", "question": {"stem": "…", "choices": [{"label": "A", "text": "…"}, …]}}

or as the hub has it, ``question`` being the stem and ``choices`` ``{"label": […], "text": […]}`` beside it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import config
from pipelines.corpus.fields import EMBEDDED, CorpusFields
from pipelines.errors import Problem, UserError

if TYPE_CHECKING:
    from pipelines.corpus.readers import Rows

TaskKind = Literal["multiple_choice", "summarization", "words"]


@dataclass(frozen=True)
class Choice:
    """One choice of a question: its label (``A``) and its text."""

    label: str
    text: str


@dataclass(frozen=True)
class Example:
    """One thing that is asked.

    Attributes:
        id: unique in its split.
        input: the question's stem, the document, or the word.
        answer: the right choice's label, the summary, or the changed word.
        choices: of multiple choice, in their order; else empty.
        references: every right answer, where there are several (summaries); ``answer`` is the first.
        group: what results are also given by (``regular`` or ``irregular``); empty for none.
    """

    id: str
    input: str
    answer: str
    choices: tuple[Choice, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Task:
    """Examples to learn from and to be measured on.

    Attributes:
        kind: what is asked.
        train: what shots are drawn from, and soft prompts are trained on.
        validation: what settings are chosen on.
        test: what is measured. Words of it are in neither of the others.
    """

    kind: TaskKind
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def metric(self) -> str:
        """What is measured first: ``rouge1`` of summaries (0–100), ``accuracy`` of all else (0–1)."""
        return "rouge1" if self.kind == "summarization" else "accuracy"


@config
class TaskFields(CorpusFields):
    """What is asked, and where the examples come from."""

    task: TaskKind = Field("words", description="multiple_choice, summarization, or words (plurals of nouns)")
    word_column: str = Field("word", description="words: column of the words", json_schema_extra={"of": ["dataset"]})
    target_column: str | None = Field(
        None,
        description="words: column of what each becomes; null takes the plural by the inflect package",
        json_schema_extra={"of": ["dataset"]},
    )

    max_words: int | None = Field(
        None, ge=1, description="summarization: words of a document that are shown, the first ones; null shows all"
    )

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.max_words is not None and self.task != "summarization":
            mend = "give task=summarization, or leave it out"
            found.append(Problem("max_words", self.max_words, f"{self.task} has no documents to cut", mend))
        if self.task == "multiple_choice" and self.dataset == EMBEDDED:
            mend = "give a file in CommonsenseQA's format, or tau/commonsense_qa"
            found.append(Problem("dataset", self.dataset, "has no questions with choices", mend))
        return found

    def environment(self) -> dict[str, str]:
        """The version of the package that decides what is right, where one does."""
        found = super().environment()
        if self.task == "words" and self.target_column is None:
            # Where it is missing, loading the task says so.
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found["inflect"] = importlib.metadata.version("inflect")
        return found


def load_task(fields: TaskFields, needed: Sequence[str] = ("train", "validation", "test")) -> Task:
    """The task that ``fields`` name.

    Args:
        fields: which.
        needed: splits that are read; the others are left empty (CommonsenseQA's test split has no answers).

    Raises:
        UserError: whatever is wrong with the data, with the file and line where there is one.
    """
    splits = {
        "multiple_choice": partial(_own, _questions, "input"),
        "summarization": _summaries,
        "words": _nouns if fields.dataset == EMBEDDED else partial(_own, _words, "input"),
    }[fields.task](fields, needed)
    return Task(
        fields.task, *(splits.get(name, []) if name in needed else [] for name in ("train", "validation", "test"))
    )


def _limited(splits: dict[str, list[Example]], fields: TaskFields) -> dict[str, list[Example]]:
    from pipelines.corpus.local import sample

    limits = {"train": fields.max_train, "validation": fields.max_validation, "test": fields.max_test}
    return {
        name: [examples[i] for i in sample(len(examples), limits[name], fields.split_seed, name)]
        for name, examples in splits.items()
    }


def _summaries(fields: TaskFields, needed: Sequence[str]) -> dict[str, list[Example]]:
    from pipelines.corpus import load_corpus

    return {
        name: [
            Example(
                row["id"], _first_words(row["document"], fields.max_words), row["summary"], (), tuple(row["references"])
            )
            for row in part
        ]
        for name, part in load_corpus(fields).items()
        if name in needed
    }


def _first_words(text: str, count: int | None) -> str:
    """The text up to the end of its ``count``-th word, as it stands."""
    if count is None:
        return text
    ends = itertools.islice(re.finditer(r"\S+", text), count - 1, count)
    return next((text[: word.end()] for word in ends), text)


def _nouns(fields: TaskFields, needed: Sequence[str]) -> dict[str, list[Example]]:
    """The embedded nouns; each split has its share of the irregular ones."""
    from pipelines.corpus.local import split_by_group
    from pipelines.prompting.tasks_words import documentation_nouns

    examples = [_noun(word, word) for word in documentation_nouns()]
    fractions = {"validation": fields.validation_fraction, "test": fields.test_fraction}
    splits: dict[str, list[Example]] = {}
    for group in ("regular", "irregular"):
        mine = [example for example in examples if example.group == group]
        for name, chosen in split_by_group([e.input for e in mine], fractions, fields.split_seed).items():
            splits.setdefault(name, []).extend(mine[i] for i in chosen)
    return _limited({name: sorted(part, key=lambda e: e.input) for name, part in splits.items()}, fields)


def _noun(identifier: str, word: str) -> Example:
    from pipelines.prompting.tasks_words import group_of, plural

    target = plural(word)
    return Example(identifier, word, target, group=group_of(word, target))


def _own(examples_of: Any, key: str, fields: TaskFields, needed: Sequence[str]) -> dict[str, list[Example]]:
    from pipelines.corpus.local import gather, split_examples, with_ids

    def plain(rows: Rows, split: str, _: Any) -> list[dict[str, Any]]:
        if split not in needed:
            return []
        made = examples_of(rows, fields)
        given = with_ids([{"input": e.input} for e in made], [row.get("id") for _, row in rows.rows], split)
        return [{"input": e.input, "example": replace(e, id=i["id"])} for e, i in zip(made, given, strict=True)]

    sources = {
        "train": ("dataset", fields.dataset),
        "validation": ("validation_dataset", fields.validation_dataset),
        "test": ("test_dataset", fields.test_dataset),
    }
    splits = split_examples(gather(sources, fields.dataset_config), sources, fields, key, plain)
    return _limited({name: [row["example"] for row in rows] for name, rows in splits.items()}, fields)


def _words(rows: Rows, fields: TaskFields) -> list[Example]:
    from pipelines.corpus.local import check_column, text_of
    from pipelines.prompting.tasks_words import group_of

    check_column(rows, "word_column", fields.word_column)
    if fields.target_column is not None:
        check_column(rows, "target_column", fields.target_column)
    found = []
    for place, row in rows.rows:
        word = text_of(row.get(fields.word_column), fields.word_column, place, rows.what)
        if fields.target_column is None:
            found.append(_noun("", word))
            continue
        target = text_of(row.get(fields.target_column), fields.target_column, place, rows.what)
        found.append(Example("", word, target, group=group_of(word, target)))
    return found


def _questions(rows: Rows, fields: TaskFields) -> list[Example]:
    return [_question(row, place, rows.what) for place, row in rows.rows]


def _question(row: dict[str, Any], place: str, what: str) -> Example:
    from pipelines.corpus.local import text_of

    question = row.get("question")
    nested = isinstance(question, dict)
    stem = text_of(question.get("stem") if nested else question, "question.stem" if nested else "question", place, what)
    choices = _choices(question.get("choices") if nested else row.get("choices"), nested, place, what)
    labels = [choice.label for choice in choices]
    key = row.get("answerKey")
    if key is None or key == "":
        mend = "give the right choice's label, or measure a split that has its answers (split=validation)"
        raise UserError(what, place, "the answer key 'answerKey' is missing", mend)
    if key not in labels:
        mend = f"give one of {', '.join(labels)}"
        raise UserError(what, place, f"the answer key {key!r} is no choice's label", mend)
    return Example("", stem, key, tuple(choices))


def _choices(value: Any, nested: bool, place: str, what: str) -> list[Choice]:
    from pipelines.corpus.local import text_of

    name = "question.choices" if nested else "choices"
    if isinstance(value, dict) and all(isinstance(value.get(k), (list, tuple)) for k in ("label", "text")):
        if len(value["label"]) != len(value["text"]):
            problem = f"{len(value['label'])} labels for {len(value['text'])} texts in {name!r}"
            raise UserError(what, place, problem, "give each choice a label and a text")
        value = [{"label": label, "text": text} for label, text in zip(value["label"], value["text"], strict=True)]
    if not isinstance(value, (list, tuple)) or len(value) < 2 or not all(isinstance(item, dict) for item in value):
        mend = 'write "choices": [{"label": "A", "text": "…"}, …], two or more of them'
        raise UserError(what, place, f"{name!r} is no list of choices", mend)
    found = []
    for number, item in enumerate(value):
        label, text = (text_of(item.get(key), f"{name}[{number}].{key}", place, what) for key in ("label", "text"))
        if label in [choice.label for choice in found]:
            raise UserError(what, place, f"the label {label!r} stands twice in {name!r}", "give each choice its own")
        found.append(Choice(label, text))
    return found
