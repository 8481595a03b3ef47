"""Strategies: what a template becomes, whose solved examples it holds, and one line for each thing wrong with one."""

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from pipelines.errors import UserError
from pipelines.prompting.strategies import (
    PLACEHOLDERS,
    Strategy,
    continuations,
    draw_shots,
    load_strategies,
    render,
    shipped,
    wrong_answers,
)
from pipelines.prompting.tasks import Choice, Example

CHOICES = (Choice("A", "seeds"), Choice("B", "stone"), Choice("C", "wind"))
QUESTIONS = [Example(f"q{n}", f"Who eats {n}?", "ABC"[n % 3], CHOICES) for n in range(12)]
WORDS = [Example(f"w{n}", word, word + "s") for n, word in enumerate(["cat", "dog", "hat", "cup", "key", "tree"])]
DOCUMENTS = [Example(f"d{n}", f"A long text about {n}.", f"About {n}.", references=(f"About {n}.",)) for n in range(6)]
EXAMPLES = {"multiple_choice": QUESTIONS, "words": WORDS, "summarization": DOCUMENTS}


def strategy(kind: str, **fields) -> Strategy:
    return load_strategies({"mine": fields}, kind)["mine"]


def prompt(kind: str, name: str, shots: int | None = None):
    found = load_strategies({name: None if shots is None else {"shots": shots}}, kind)[name]
    some = EXAMPLES[kind]
    return render(found, some[0], draw_shots(some, found.shots, 0, without=some[0]), seed=0, others=some)


def test_the_shipped_strategies_read_as_they_should():
    assert prompt("multiple_choice", "simple").text == "Who eats 0?\n"
    assert prompt("multiple_choice", "simple").choices == ("seeds", "stone", "wind")
    assert prompt("multiple_choice", "simple_qa").text == "Q: Who eats 0?\nA:"
    assert prompt("multiple_choice", "simple_qa").answer == " seeds"
    with_instruction = prompt("multiple_choice", "qa_with_instruction")
    assert with_instruction.text == (
        "Choose the best answer to the question. Answer with its letter.\n\n"
        "Question: Who eats 0?\nA. seeds\nB. stone\nC. wind\nAnswer:"
    )
    assert with_instruction.choices == (" A", " B", " C")
    few = prompt("multiple_choice", "few_shot", 2)
    *solved, asked = few.text.split("\n\n")
    assert asked == "Question: Who eats 0?\nA. seeds\nB. stone\nC. wind\nAnswer:"
    by_id = {e.id: e for e in QUESTIONS}
    for text, shot in zip(solved, few.shots, strict=True):
        assert text == f"Question: {by_id[shot].input}\nA. seeds\nB. stone\nC. wind\nAnswer: {by_id[shot].answer}"
    assert prompt("summarization", "instruction").text.startswith("Summarize the following text in one sentence.\n\nA ")
    assert prompt("summarization", "tldr").text == "A long text about 0.\n\nTL;DR:"
    assert prompt("summarization", "few_shot", 1).text.endswith("\n\nText: A long text about 0.\nSummary:")
    assert prompt("words", "few_shot", 0).text == "cat ->"
    assert prompt("words", "few_shot", 1).text.count(" -> ") == 1


@pytest.mark.parametrize("kind", sorted(PLACEHOLDERS))
def test_every_shipped_strategy_is_sound(kind):
    loaded = load_strategies(dict.fromkeys(shipped(kind)), kind)
    assert loaded
    for name in loaded:
        assert EXAMPLES[kind][0].input in prompt(kind, name).text


@pytest.mark.parametrize("kind", ["multiple_choice", "words", "summarization"])
def test_wrong_labels_change_the_answers_and_nothing_else(kind):
    some = EXAMPLES[kind]
    right = load_strategies({"few_shot": {"shots": 4}}, kind)["few_shot"]
    wrong = load_strategies({"mine": {"like": "few_shot", "shots": 4, "wrong_labels": True}}, kind)["mine"]
    shots = draw_shots(some, 4, 7, without=some[0])
    one, two = (render(s, some[0], shots, seed=7, others=some) for s in (right, wrong))
    assert one.shots == two.shots
    assert (one.choices, one.answer) == (two.choices, two.answer)
    parts = right.shot_separator
    assert one.text != two.text
    for shot, a, b in zip(shots, one.text.split(parts), two.text.split(parts), strict=False):
        common = a[: a.rindex(right.answer_prefix)]
        assert b.startswith(common)
        assert a != b
        assert not b.endswith(f"{right.answer_prefix}{shot.answer}")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 11))
def test_shots_are_nested_never_the_question_and_a_function_of_the_seed(seed, count):
    drawn = draw_shots(QUESTIONS, count, seed, without=QUESTIONS[3])
    assert drawn == draw_shots(QUESTIONS, 11, seed, without=QUESTIONS[3])[:count]
    assert QUESTIONS[3] not in drawn
    assert len({e.id for e in drawn}) == count


def test_wrong_answers_are_wrong_and_spread_evenly():
    shots = [QUESTIONS[0]] * 1
    seen = [wrong_answers(shots, seed)[0] for seed in range(400)]
    assert set(seen) == {"B", "C"}
    assert 150 < seen.count("B") < 250
    alike = [Example(f"w{n}", f"x{n}", "same") for n in range(5)]
    with pytest.raises(UserError, match="wrong_labels=True: w0 has no wrong answer"):
        wrong_answers(alike[:1], 0, alike)


def test_more_shots_than_examples_is_one_line():
    with pytest.raises(UserError, match="shots=6: there are only 5 examples to draw them from; give shots=5 or less"):
        draw_shots(WORDS, 6, 0, without=WORDS[0])


def test_braces_and_choices_can_be_written_as_one_likes():
    mine = strategy(
        "multiple_choice",
        query='{{"q": "{question}", "of": [{choices}]}} of {labels} ->',
        choice="({label}) {text}",
        choice_separator=" | ",
        answer="text",
        answer_prefix="{",
        shots=1,
        shot="{question}={answer};",
    )
    text = render(mine, QUESTIONS[0], [QUESTIONS[1]]).text
    assert text == 'Who eats 1?=stone;{"q": "Who eats 0?", "of": [(A) seeds | (B) stone | (C) wind]} of A, B, C ->'
    assert continuations(mine, QUESTIONS[0]) == ("{seeds", "{stone", "{wind")
    plain = strategy("words", query="{{{word}}}:", answer_prefix="{", shots=1)
    assert render(plain, WORDS[0], [WORDS[1]]).text == "{dog}:{dogs\n\n{cat}:"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "words",
            {"query": "{wrod} ->"},
            r"mine\.query=\{wrod\} ->: unknown placeholder \{wrod\}; did you mean 'word'",
        ),
        ("words", {"query": "{question}"}, r"unknown placeholder \{question\}; the placeholders are: word"),
        ("words", {"query": "{word"}, r"mine\.query=\{word: not a template .*; write a literal brace twice"),
        ("words", {"query": "{}"}, r"\{\} is no placeholder"),
        ("words", {"query": "{word:>9}"}, r"\{word:>9\} is no placeholder"),
        ("words", {"query": "{word!r}"}, r"\{word!r\} is no placeholder"),
        ("words", {"query": "{word.__class__}"}, r"\{word.__class__\} is no placeholder"),
        ("words", {"query": "plural:"}, r"does not show what is asked; put \{word\} into it"),
        ("words", {"query": "{word}", "shot": "{word}"}, r"mine\.shot=\{word\}: a solved example without its"),
        ("words", {"query": "{word} {answer}"}, r"unknown placeholder \{answer\}"),
        ("words", {"query": "{word}", "instruction": "{word}"}, r"mine\.instruction=.*unknown placeholder"),
        ("words", {"query": "{word}", "wrong_labels": True}, r"mine\.wrong_labels=True: there are no solved examples"),
        ("words", {"query": "{word}", "shots": -1}, r"mine\.shots=-1"),
        ("words", {"query": "{word}", "shot_count": 3}, r"mine\.shot_count=3: unknown key"),
        ("words", {}, r"strategies\.mine=\{\}: unknown for words; give it a query, or take a shipped one: few_shot"),
        ("words", {"like": "tldr"}, r"mine\.like=tldr: no such strategy"),
        ("multiple_choice", {"query": "{question}", "choice": "{name}"}, r"mine\.choice=\{name\}: unknown placeholder"),
    ],
)
def test_a_wrong_strategy_is_one_line(kind, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        strategy(kind, **fields)
    assert len(caught.value.problems) == 1


def test_all_mistakes_show_at_once():
    with pytest.raises(UserError) as caught:
        load_strategies(
            yaml.safe_load("{a: {query: '{x}'}, b: {query: '{word}', shots: many}, c: , few_shot: {stop: [x], zz: 1}}"),
            "words",
        )
    assert [p.what for p in caught.value.problems] == [
        "strategies.a.query",
        "strategies.b.shots",
        "strategies.c",
        "strategies.few_shot.zz",
        "strategies.few_shot.stop",
    ]
