"""A judge of the user's own works, and each thing that can be wrong with it ends in one line."""

from __future__ import annotations

import pytest

from pipelines.errors import UserError
from pipelines.seq2seq.annotators import load_annotator
from pipelines.seq2seq.metrics import rouge

MODULE = """
import numpy
def length(documents, summaries, references):
    return numpy.array([-len(s) for s in summaries])
def raises(documents, summaries, references):
    raise RuntimeError("no\\nluck")
def short(documents, summaries, references):
    return [1.0]
def nan(documents, summaries, references):
    return [float("nan")] * len(summaries)
def words(documents, summaries, references):
    return ["good"] * len(summaries)
def one(documents, summaries, references):
    return 1.0
number = 3
"""
BATCH = (["d1", "d2"], ["a cat", "the dog ran"], [["a cat"], ["a dog", "the dog walked"]])


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "my_judge_module.py").write_text(MODULE)
    (tmp_path / "broken_judge_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)


def test_rouge_is_the_mean_of_three():
    scores = rouge(BATCH[1], BATCH[2])
    expected = (scores["rouge1"] + scores["rouge2"] + scores["rougeL"]) / 3
    assert load_annotator("rouge")(*BATCH) == pytest.approx(expected.tolist())


@pytest.mark.usefixtures("judge")
def test_own_function():
    scores = load_annotator("my_judge_module:length")(*BATCH)
    assert scores == [-5.0, -11.0]
    assert all(type(value) is float for value in scores)


@pytest.mark.usefixtures("judge")
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rogue", "neither 'rouge' nor of the form module:function"),
        ("no_such_module_here:f", "no module named"),
        ("broken_judge_module:f", "raised ZeroDivisionError"),
        ("my_judge_module:missing", "has no 'missing'"),
        ("my_judge_module:number", "not a function"),
    ],
)
def test_what_cannot_be_loaded(spec, says):
    with pytest.raises(UserError) as error:
        load_annotator(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("judge")
@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", "raised RuntimeError: no luck"),
        ("short", "1 scores for 2 summaries"),
        ("nan", "score 0 is nan"),
        ("words", "not a number"),
        ("one", "not a list"),
    ],
)
def test_what_it_may_not_return(function, says):
    annotate = load_annotator(f"my_judge_module:{function}", field="reward_function")
    with pytest.raises(UserError) as error:
        annotate(*BATCH)
    assert says in str(error.value)
    assert str(error.value).startswith("reward_function=")
    assert "\n" not in str(error.value)
