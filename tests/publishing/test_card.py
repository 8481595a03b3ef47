"""The card: what it says, that the Hub's own classes read it, and what it does not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from pipelines.errors import UserError
from pipelines.publishing.card import write_card
from tests.publishing.conftest import add_adapter, write_stage


def test_it_says_what_how_and_how_well(stage: Path) -> None:
    path = write_card(stage)
    assert path == stage / "README.md"
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["library_name"] == "genalign"
    assert data["pipeline_tag"] == "summarization"
    assert data["base_model"] == "google/flan-t5-small"  # found through the SFT stage
    assert data["base_model_relation"] == "finetune"
    assert data["language"] == "en"  # that of the embedded set, found through the corpus stage
    assert "license" not in data  # that of the base model, which is not known here
    assert {"genalign", "transformers", "ppo", "t5"} <= set(data["tags"])
    results = {r.metric_type: r for r in card.data.eval_results}
    assert set(results) == {"rouge1"}  # the only one with an interval
    assert results["rouge1"].metric_value == 27.31
    assert results["rouge1"].metric_args == {"confidence_level": 0.95, "low": 26.2, "high": 28.4}
    assert "26.2–28.4" in results["rouge1"].metric_name
    assert results["rouge1"].dataset_name == "pydocs"
    assert '"summarize: " + document' in card.text
    assert "| learning_rate | 0.0001 |" in card.text
    assert "Limitations" in card.text
    assert "falls under the licence of the model" in card.text
    assert "trl 1.16.0" in card.text


def test_it_tells_nothing_about_the_machine(stage: Path) -> None:
    text = write_card(stage).read_text()
    assert str(stage.parent) not in text
    assert "home/ada" not in text
    assert "output_dir" not in text
    assert "| reward_model | reward |" in text


def test_the_licence_is_that_which_was_given(stage: Path) -> None:
    card = ModelCard.load(write_card(stage, licence="cc-by-4.0"))
    assert card.data.license == "cc-by-4.0"
    assert "falls under the licence" not in card.text


def test_a_model_from_scratch_has_a_licence(stage: Path) -> None:
    write_stage(stage.parent / "sft", "summarization/sft", {"model": None})
    assert ModelCard.load(write_card(stage)).data.license == "apache-2.0"


def test_nothing_is_said_of_the_licence_of_a_model_that_began_with_a_folder(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "somewhere").mkdir()
    write_stage(stage.parent / "sft", "summarization/sft", {"model": str(tmp_path / "somewhere")})
    data = ModelCard.load(write_card(stage)).data.to_dict()
    assert "license" not in data
    assert "base_model" not in data


def test_writing_it_again_gives_the_same_bytes(stage: Path) -> None:
    first = write_card(stage).read_bytes()
    assert write_card(stage).read_bytes() == first


def test_the_usage_names_repository_and_branch(stage: Path) -> None:
    text = write_card(stage, "ada/demo", branch="v2").read_text()
    assert 'name = "ada/demo"' in text
    assert text.count('revision="v2"') == 2
    assert "# demo" in text
    assert "revision" not in write_card(stage, "ada/demo", branch="main").read_text()


def test_a_card_of_an_adapter(stage: Path) -> None:
    add_adapter(stage)
    path = write_card(stage, "ada/demo-lora", adapter=True, base_model="ada/demo-sft")
    assert path == stage / "adapter" / "README.md"
    data = ModelCard.load(path).data.to_dict()
    assert data["base_model"] == "ada/demo-sft"
    assert data["base_model_relation"] == "adapter"
    assert {"peft", "lora"} <= set(data["tags"])
    assert "transformers" not in data["tags"]
    assert "AutoPeftModelForSeq2SeqLM" in path.read_text()


def test_an_adapter_that_is_not_there(stage: Path) -> None:
    with pytest.raises(UserError, match="holds no LoRA adapter"):
        write_card(stage, adapter=True)


def test_a_card_of_preferences(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    folder = write_stage(tmp_path / "pairs", "summarization/preferences", {"dataset": "pydocs", "annotator": "rouge"})
    rows = Dataset.from_list([{"id": "1", "prompt": "a", "chosen": "b", "rejected": "c"}])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
    DatasetDict({"train": rows}).save_to_disk(str(folder / "rankings"))
    card = DatasetCard.load(write_card(folder, "ada/pairs"))
    data = card.data.to_dict()
    assert data["task_categories"] == ["summarization"]
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*"},
                {"split": "test", "path": "data/test-*"},
            ],
            "default": True,
        },
        {"config_name": "rankings", "data_files": [{"split": "train", "path": "rankings/train-*"}]},
    ]
    assert "license" not in data  # the documents are not ours
    assert "| default | train, test | id, prompt, chosen, rejected |" in card.text
    assert 'load_dataset("ada/pairs", "rankings")' in card.text


@pytest.mark.parametrize("state", ["running", "failed"])
def test_an_unfinished_stage_is_refused(stage: Path, state: str) -> None:
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"state": state}))
    with pytest.raises(UserError, match=f"the stage is {state}"):
        write_card(stage)
    assert not (stage / "README.md").exists()


def test_a_folder_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_card(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a stage's folder"):
        write_card(tmp_path)


def test_a_stage_that_holds_nothing_to_load_is_refused(tmp_path: Path) -> None:
    folder = write_stage(tmp_path / "evaluate", "summarization/evaluate")
    with pytest.raises(UserError, match="holds nothing that could be loaded"):
        write_card(folder)
    assert not (folder / "README.md").exists()
