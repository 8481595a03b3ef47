"""The summarizer from scratch against the fine-tuned one: what is quoted is what the stages say; wrong input."""

import json
import shutil

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems.summarization_scratch import (
    SummarizationScratchConfig,
    same_first_word,
    summarization_scratch,
)
from pipelines.runner import load_recipe
from tests.problems.pages import assert_page_is_filled


def given(finished, tmp_path, **changes) -> dict:
    fields = {"evaluation": str(finished / "evaluate"), "scratch": "sft", "finetuned": "ppo"}
    return fields | {"prompting": str(finished / "hard"), "output_dir": str(tmp_path / "out")} | changes


def test_the_same_first_word():
    assert same_first_word("Return the name.", ["Gives it", "return: a name"]) == 1.0
    assert same_first_word("The name.", ["Return the name."]) == 0.0
    assert same_first_word("", ["Return"]) == 0.0
    assert same_first_word("Return", [""]) == 0.0


def test_the_stage_through_its_recipe(finished, tmp_path):
    with pytest.raises(SystemExit) as ended:
        load_recipe("problems/summarization_scratch")([f"{k}={v}" for k, v in given(finished, tmp_path).items()])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "exercise.json").read_text())
    assert_page_is_filled(tmp_path / "out")
    assert len(found["checks"]) == 5
    metrics = json.loads((finished / "evaluate" / "stage.json").read_text())["metrics"]
    assert found["values"]["finetuned_rouge1"] == metrics["ppo/rouge1"]
    assert found["values"]["gain"] == pytest.approx(metrics["ppo/rouge1_minus_sft"])
    rows = found["tables"]["differences"]["rows"]
    assert [row[0] for row in rows] == ["sft", "ppo", "base/bare", "the reference"]
    texts = [row[1:] for row in found["tables"]["examples"]["rows"]]
    assert [row[0] for row in texts[:4]] == ["the reference", "sft", "ppo", "base/bare"]
    assert len(texts) == 20


def test_without_a_prompted_model(finished, tmp_path):
    (tmp_path / "out").mkdir()
    config = validate(SummarizationScratchConfig, given(finished, tmp_path, prompting=None, shown=2))
    metrics = summarization_scratch(config)
    assert metrics["summarization_scratch/rouge1_gain_ci_low"] <= metrics["summarization_scratch/rouge1_gain"]
    tables = json.loads((tmp_path / "out" / "exercise.json").read_text())["tables"]
    assert [row[0] for row in tables["differences"]["rows"]] == ["sft", "ppo", "the reference"]


def test_wrong_input_is_refused(finished, tmp_path):
    for changes, message in (
        ({"evaluation": str(finished / "ppo")}, "finished stage of summarization/evaluate"),
        ({"finetuned": "sft"}, "is the model from scratch too"),
        ({"prompting": None, "prompted": "base/bare"}, "there is no prompting stage"),
    ):
        with pytest.raises(UserError, match=message):
            validate(SummarizationScratchConfig, given(finished, tmp_path, **changes))
    for changes, message in (
        ({"scratch": "sfd"}, "no system of this name; did you mean 'sft'"),
        ({"prompted": "base/bore"}, "was not asked; did you mean 'base/bare'"),
    ):
        with pytest.raises(UserError, match=message):
            summarization_scratch(validate(SummarizationScratchConfig, given(finished, tmp_path, **changes)))


def test_answers_about_other_documents_are_refused(finished, tmp_path):
    other = tmp_path / "hard"
    shutil.copytree(finished / "hard", other)
    lines = [json.loads(line) for line in (other / "answers.jsonl").read_text().splitlines()]
    (other / "answers.jsonl").write_text("".join(json.dumps(row | {"id": f"x{row['id']}"}) + "\n" for row in lines))
    config = validate(SummarizationScratchConfig, given(finished, tmp_path, prompting=str(other)))
    with pytest.raises(UserError, match="none of the evaluation's documents"):
        summarization_scratch(config)
