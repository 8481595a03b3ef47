"""Tasks are read from the formats people have, and what is wrong with a file is told by its line."""

import json

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.tasks import Choice, Example, TaskFields, load_task
from pipelines.prompting.tasks_words import IRREGULAR_NOUNS, group_of, nouns_of, plural, regular_plural

LABELS = "ABCDE"


def question(number: int, answer: str | None = "B", choices: int = 3) -> dict:
    """A question as CommonsenseQA's files have it."""
    found = [{"label": LABELS[i], "text": f"thing {number} {i}"} for i in range(choices)]
    row = {"id": f"q{number}", "question": {"question_concept": "x", "stem": f"Which {number}?", "choices": found}}
    return row if answer is None else row | {"answerKey": answer}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields(**values) -> TaskFields:
    return validate(TaskFields, values)


def test_commonsense_qa_as_its_files_and_as_the_hub_have_it_are_the_same(tmp_path):
    rows = [question(n) for n in range(20)]
    nested = load_task(fields(task="multiple_choice", dataset=str(write(tmp_path / "a.jsonl", rows))))
    flat = [
        {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": {key: [c[key] for c in row["question"]["choices"]] for key in ("label", "text")},
            "answerKey": row["answerKey"],
        }
        for row in rows
    ]
    assert load_task(fields(task="multiple_choice", dataset=str(write(tmp_path / "b.jsonl", flat)))) == nested
    assert [len(part) for part in (nested.train, nested.validation, nested.test)] == [16, 2, 2]
    one = nested.test[0]
    number = one.id[1:]
    assert (one.input, one.answer, one.choices[1]) == (f"Which {number}?", "B", Choice("B", f"thing {number} 1"))


def test_a_split_without_answers_matters_only_where_it_is_measured(tmp_path):
    for name, answer in (("train", "A"), ("dev", "C"), ("test", None)):
        write(tmp_path / f"{name}.jsonl", [question(n, answer) for n in range(4)])
    given = fields(task="multiple_choice", dataset=str(tmp_path))
    task = load_task(given, ("train", "validation"))
    assert [e.answer for e in task.validation] == ["C"] * 4
    assert task.test == []
    with pytest.raises(UserError, match=r"test\.jsonl line 1: the answer key 'answerKey' is missing; give .*split="):
        load_task(given, ("train", "test"))


def test_a_saved_dataset_with_the_hubs_features_is_read(tmp_path):
    """``tau/commonsense_qa`` has its choices as a mapping of two lists, and a test split whose keys are empty."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    text = Value("string")
    features = Features(
        {"id": text, "question": text, "choices": {"label": List(text), "text": List(text)}, "answerKey": text}
    )

    def split(key: str) -> Dataset:
        choices = {"label": ["A", "B"], "text": ["x", "y"]}
        rows = [{"id": f"{key}{n}", "question": f"Which {n}?", "choices": choices, "answerKey": key} for n in range(3)]
        return Dataset.from_list(rows, features=features)

    saved = DatasetDict({"train": split("A"), "validation": split("B"), "test": split("")})
    saved.save_to_disk(str(tmp_path / "hub"))
    task = load_task(fields(task="multiple_choice", dataset=str(tmp_path / "hub")), ("train", "validation"))
    assert task.validation[2] == Example("B2", "Which 2?", "B", (Choice("A", "x"), Choice("B", "y")))


def broken(change) -> dict:
    row = question(7)
    change(row)
    return row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (broken(lambda r: r.pop("answerKey")), "'answerKey' is missing"),
        (broken(lambda r: r.update(answerKey="Z")), "the answer key 'Z' is no choice's label; give one of A, B, C"),
        (broken(lambda r: r["question"]["choices"][2].update(label="A")), "the label 'A' stands twice"),
        (broken(lambda r: r["question"]["choices"][2].pop("text")), r"question.choices\[2\].text' holds null"),
        (broken(lambda r: r["question"].pop("choices")), "is no list of choices"),
        (broken(lambda r: r["question"]["choices"].__delitem__(slice(1, 9))), "is no list of choices"),
        (broken(lambda r: r.update(question="Which?", choices={"label": ["A", "B"], "text": ["x"]})), "2 labels for 1"),
        (broken(lambda r: r["question"].pop("stem")), "'question.stem' holds null"),
        (broken(lambda r: r.pop("question")), "'question' holds null"),
    ],
)
def test_a_broken_question_is_one_line_with_its_place(tmp_path, row, message):
    file = write(tmp_path / "q.jsonl", [question(n) for n in range(3)] + [row])
    with pytest.raises(UserError, match=message) as caught:
        load_task(fields(task="multiple_choice", dataset=str(file)))
    assert len(caught.value.problems) == 1
    assert "line 4" in str(caught.value)


def test_multiple_choice_needs_data():
    with pytest.raises(UserError, match="dataset=pydocs: has no questions with choices"):
        fields(task="multiple_choice")


def test_plurals_and_their_groups():
    pairs = {"box": "boxes", "city": "cities", "boy": "boys", "church": "churches", "child": "children"}
    for noun, target in pairs.items():
        assert plural(noun) == target
        assert group_of(noun, target) == ("irregular" if noun == "child" else "regular")
    assert regular_plural("child") == "childs"
    assert len(set(IRREGULAR_NOUNS)) == len(IRREGULAR_NOUNS)
    for noun in IRREGULAR_NOUNS:
        assert plural(noun) not in (noun, regular_plural(noun)), noun


def test_nouns_are_told_from_other_words_by_determiner_and_plural():
    texts = [
        "Return the name of a file, or the file itself.",
        "All files and names quickly.",
        "Copy the box. Creates boxes as the user likes. Information about an information.",
        "A parser and its child; two children.",
    ]
    assert nouns_of(texts) == ["box", "file", "name"]  # child follows no determiner, parser has no plural there


def test_words_come_from_a_file_with_or_without_targets(tmp_path):
    words = ["cat", "dog", "box", "city", "child", "wolf", "lens", "hat", "cup", "key", "tree", "house"]
    file = tmp_path / "w.csv"
    file.write_text("word\n" + "\n".join(words) + "\n")
    task = load_task(fields(dataset=str(file), test_fraction=0.25))
    found = [*task.train, *task.validation, *task.test]
    assert {e.input: e.answer for e in found} == {word: plural(word) for word in words}
    assert len(task.test) == 3
    assert not {e.input for e in task.test} & {e.input for e in [*task.train, *task.validation]}

    own = write(tmp_path / "own.jsonl", [{"w": word, "past": word + "ed"} for word in words])
    task = load_task(fields(dataset=str(own), word_column="w", target_column="past", max_test=1))
    assert task.train[0].answer == task.train[0].input + "ed"
    assert len(task.test) == 1
    with pytest.raises(UserError, match=r"word_column=word: no such column.*it has: 'w', 'past'"):
        load_task(fields(dataset=str(own)))


def test_summaries_come_through_the_corpus(tmp_path):
    rows = [{"abstract": f"text {n} of some length", "tldr": [f"short {n}", "or so"]} for n in range(12)]
    file = write(tmp_path / "s.jsonl", rows)
    given = {"task": "summarization", "dataset": str(file), "text_column": "abstract", "summary_column": "tldr"}
    one = load_task(fields(**given)).test[0]
    number = one.input.split()[1]
    assert (one.answer, one.references) == (f"short {number}", (f"short {number}", "or so"))
