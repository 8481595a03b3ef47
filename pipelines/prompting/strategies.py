"""Strategies: small templates that turn an example, and k solved ones before it, into a prompt.

A strategy is a few lines of YAML. It is filled in with ``{placeholders}``; a literal brace is written twice.

    few_shot:
      shots: 5
      shot: "Question: {question}\\n{choices}\\nAnswer: {answer}\\n\\n"
      query: "Question: {question}\\n{choices}\\nAnswer:"

The placeholders that each kind of task has are in ``PLACEHOLDERS``.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.config import config, nearest, read_yaml, validate
from pipelines.errors import Problem, UserError
from pipelines.prompting.tasks import Example, TaskKind

PLACEHOLDERS: dict[str, dict[str, str]] = {
    "multiple_choice": {
        "question": "the question's stem",
        "choices": "every choice by the template `choice`, joined by `choice_separator`",
        "labels": "the choices' labels, joined by ', '",
    },
    "summarization": {"document": "the text that is summarized"},
    "words": {"word": "the word that is changed"},
}
"""Kind of task -> placeholder -> meaning. ``shot`` also has ``{answer}``; ``choice`` has ``{label}`` and ``{text}``."""


_TRIES = 200  # draws of an answer before it is taken that none is wrong


@config
class Strategy:
    """How a prompt is made."""

    query: str = Field(description="template of the example that is asked")
    instruction: str = Field("", description="what stands before all else, once")
    shot: str | None = Field(None, description="template of a solved example; null: the query, answer_prefix, {answer}")
    shots: int = Field(0, ge=0, description="solved examples before the query")
    shot_separator: str = Field("\n\n", description="what follows each solved example where shot is null")
    wrong_labels: bool = Field(False, description="give the solved examples wrong answers")
    choice: str = Field("{label}. {text}", description="multiple choice: template of one choice, of {label} and {text}")
    choice_separator: str = Field("\n", description="multiple choice: what stands between two choices")
    answer: Literal["label", "text"] = Field("label", description="multiple choice: what is answered and scored")
    answer_prefix: str = Field(" ", description="what stands between the query and an answer")
    max_new_tokens: int | None = Field(None, ge=1, description="tokens generated; null takes the stage's")
    stop: str | None = Field("\n", description="generation ends before this text; null: at the end mark only")

    def problems(self) -> list[Problem]:
        return []


@dataclass(frozen=True)
class Prompt:
    """A prompt and what may follow it.

    Attributes:
        text: the prompt.
        choices: continuations that are scored, each with the strategy's ``answer_prefix``; empty where there are none.
        answer: the right continuation.
        shots: ids of the solved examples in it.
    """

    text: str
    choices: tuple[str, ...]
    answer: str
    shots: tuple[str, ...]


def _names(template: str, what: str) -> list[str]:
    """The placeholders of a template.

    Raises:
        UserError: a lone brace, an empty placeholder, or one with a format or an attribute.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(what, template, f"not a template ({error})", "write a literal brace twice: {{ or }}") from None
    found = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
            mend = "write a plain {name}; a literal brace is written twice: {{ or }}"
            raise UserError(what, template, f"{shown} is no placeholder", mend)
        found.append(name)
    return found


def _check_names(template: str, what: str, known: Sequence[str]) -> list[str]:
    names = _names(template, what)
    for name in names:
        if name not in known:
            mend = nearest(name, list(known)).replace("the keys are:", "the placeholders are:")
            raise UserError(what, template, f"unknown placeholder {{{name}}}", mend)
    return names


def strategy_problems(name: str, strategy: Strategy, kind: TaskKind, where: str = "strategies.") -> list[Problem]:
    """What is wrong with a strategy's templates for a kind of task.

    Args:
        name: of the strategy, for messages.
        strategy: it.
        kind: of the task.
        where: put before the name.
    """
    known = list(PLACEHOLDERS[kind])
    found: list[Problem] = []
    given = {"instruction": (strategy.instruction, []), "query": (strategy.query, known)}
    if strategy.shot is not None:
        given["shot"] = (strategy.shot, [*known, "answer"])
    if kind == "multiple_choice":
        given["choice"] = (strategy.choice, ["label", "text"])
    for field, (template, names) in given.items():
        what = f"{where}{name}.{field}"
        try:
            used = _check_names(template, what, names)
        except UserError as error:
            found.extend(error.problems)
            continue
        if field == "query" and known[0] not in used:
            mend = f"put {{{known[0]}}} into it"
            found.append(Problem(what, template, "does not show what is asked", mend))
        if field == "shot" and "answer" not in used:
            found.append(Problem(what, template, "a solved example without its {answer}", "put {answer} into it"))
    if strategy.wrong_labels and not strategy.shots:
        what, mend = f"{where}{name}.wrong_labels", "give shots=1 or more, or drop wrong_labels"
        found.append(Problem(what, True, "there are no solved examples to give wrong answers to", mend))
    return found


def continuations(strategy: Strategy, example: Example) -> tuple[str, ...]:
    """What may follow the prompt of an example: one continuation a choice, with the ``answer_prefix``."""
    return tuple(strategy.answer_prefix + getattr(choice, strategy.answer) for choice in example.choices)


def answer_text(strategy: Strategy, example: Example, answer: str | None = None) -> str:
    """The answer as it is written: a choice's label or text; of other tasks the target itself.

    Args:
        strategy: says which.
        example: whose answer.
        answer: another one than the right one (a label of multiple choice, or a text).
    """
    answer = example.answer if answer is None else answer
    if not example.choices:
        return answer
    return next(getattr(choice, strategy.answer) for choice in example.choices if choice.label == answer)


def _fill(strategy: Strategy, template: str, example: Example, **more: str) -> str:
    names = {"question": example.input, "document": example.input, "word": example.input}
    if example.choices:
        parts = [strategy.choice.format(label=c.label, text=c.text) for c in example.choices]
        names["choices"] = strategy.choice_separator.join(parts)
        names["labels"] = ", ".join(c.label for c in example.choices)
    return template.format(**names, **more)


def draw_shots(
    train: Sequence[Example], count: int, seed: int | str, *, without: Example | None = None
) -> list[Example]:
    """The solved examples of a prompt: the first ``count`` of a random order, so that k shots are among k + 1.

    Args:
        train: what they are drawn from.
        count: k.
        seed: of the order.
        without: an example that may not be among them (it is asked).

    Raises:
        UserError: fewer examples than shots.
    """
    free = [e for e in train if without is None or (e.id, e.input) != (without.id, without.input)]
    if count > len(free):
        problem = f"there are only {len(free)} examples to draw them from"
        raise UserError("shots", count, problem, f"give shots={len(free)} or less, or more training examples")
    order = list(range(len(free)))
    random.Random(f"shots {seed}").shuffle(order)
    return [free[i] for i in order[:count]]


def wrong_answers(shots: Sequence[Example], seed: int | str, others: Sequence[Example] = ()) -> list[str]:
    """For each solved example an answer that is wrong: another choice, or what another example has for an answer.

    Args:
        shots: the solved examples.
        seed: of the draw.
        others: more examples whose answers may be taken, where there are no choices.

    Raises:
        UserError: no other answer is to be had.
    """
    found = []
    for example in shots:
        draw = random.Random(f"wrong {seed} {example.id}")
        if example.choices:
            found.append(draw.choice([choice.label for choice in example.choices if choice.label != example.answer]))
            continue
        right = {example.answer, *example.references}
        pool = others or shots
        tried = (draw.choice(pool).answer for _ in range(_TRIES))
        wrong = next((answer for answer in tried if answer not in right), None)
        if wrong is None:
            raise UserError("wrong_labels", True, f"{example.id} has no wrong answer", "give more examples")
        found.append(wrong)
    return found


def render(
    strategy: Strategy,
    example: Example,
    shots: Sequence[Example],
    *,
    seed: int | str = 0,
    others: Sequence[Example] = (),
) -> Prompt:
    """The prompt of one example.

    Args:
        strategy: the templates.
        example: what is asked.
        shots: solved examples, in the order in which they are shown.
        seed: of the wrong answers.
        others: what wrong answers are taken from, where there are no choices; the solved examples where empty.

    Raises:
        UserError: there are no wrong answers to be had.
    """
    template = strategy.shot
    if template is None:
        template = strategy.query + strategy.answer_prefix.replace("{", "{{").replace("}", "}}") + "{answer}"
        template += strategy.shot_separator.replace("{", "{{").replace("}", "}}")
    answers: list[str | None] = [None] * len(shots)
    if strategy.wrong_labels:
        answers = list(wrong_answers(shots, seed, others))
    parts = [strategy.instruction.format()]
    for shot, answer in zip(shots, answers, strict=True):
        parts.append(_fill(strategy, template, shot, answer=answer_text(strategy, shot, answer)))
    parts.append(_fill(strategy, strategy.query, example))
    right = strategy.answer_prefix + answer_text(strategy, example)
    return Prompt("".join(parts), continuations(strategy, example), right, tuple(shot.id for shot in shots))


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return read_yaml(Path(__file__).with_name("strategies.yaml"))


def shipped(kind: TaskKind) -> dict[str, dict[str, Any]]:
    """The strategies that come with the project for a kind of task: name -> plain table."""
    return dict(_shipped()[kind])


def load_strategies(tables: Mapping[str, Mapping[str, Any] | None], kind: TaskKind) -> dict[str, Strategy]:
    """The strategies of a configuration.

    Args:
        tables: name -> fields of ``Strategy``. A name that is shipped starts from the shipped one, and so does any
            other with ``like: NAME``; null takes it as it is.
        kind: of the task.

    Raises:
        UserError: one line for every unknown name, field and placeholder.
    """
    known = shipped(kind)
    problems: list[Problem] = []
    found: dict[str, Strategy] = {}
    for name, given in tables.items():
        table = dict(given or {})
        base = table.pop("like", name if name in known else None)
        if base is not None and base not in known:
            problems.append(Problem(f"strategies.{name}.like", base, "no such strategy", nearest(base, list(known))))
            continue
        if base is None and "query" not in table:
            mend = f"give it a query, or take a shipped one: {', '.join(known)}"
            problems.append(Problem(f"strategies.{name}", table, f"unknown for {kind}", mend))
            continue
        try:
            strategy = validate(Strategy, (known[base] if base else {}) | table, f"strategies.{name}.")
        except UserError as error:
            problems.extend(error.problems)
            continue
        problems.extend(strategy_problems(name, strategy, kind))
        found[name] = strategy
    if problems:
        raise UserError.of(problems)
    return found
