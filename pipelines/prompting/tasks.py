"""Tasks: questions with choices, documents to summarize, words to change. One shape of example serves all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
