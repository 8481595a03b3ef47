"""People's preferences from files of {prompt, chosen, rejected}."""

import json

import datasets
import pytest

from pipelines.corpus import PreferenceFields, load_preferences
from pipelines.errors import UserError

PAIRS = [{"prompt": f"Document {i // 2}", "chosen": f"Good line {i}", "rejected": f"Poor line {i}"} for i in range(40)]


def write(path, rows=PAIRS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_of_one_prompt_stay_together_and_people_give_no_scores(tmp_path):
    splits = load_preferences(PreferenceFields(preferences=write(tmp_path / "p.jsonl")))
    assert [len(part) for part in splits.values()] == [32, 4, 4]
    prompts = [set(part["prompt"]) for part in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 20
    assert splits["train"].column_names == [
        "id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin",
    ]  # fmt: skip
    row = splits["test"][0]
    assert (row["chosen_score"], row["rejected_score"], row["margin"]) == (1.0, 0.0, 1.0)


def test_scores_are_kept_and_a_saved_folder_stays_on_disk(tmp_path):
    rows = [{**row, "chosen_score": i + 0.5, "rejected_score": i - 1, "id": f"p{i}"} for i, row in enumerate(PAIRS)]
    splits = load_preferences(PreferenceFields(preferences=write(tmp_path / "p.jsonl", rows)))
    assert set(splits["train"]["margin"]) == {1.5}
    splits.save_to_disk(str(tmp_path / "saved"))
    again = load_preferences(PreferenceFields(preferences=str(tmp_path / "saved"), max_train=3))
    assert again["train"].cache_files
    assert [len(part) for part in again.values()] == [3, 4, 4]
    assert again["test"].to_list() == splits["test"].to_list()


PAIR = PAIRS[0]
WRONG = {
    "identical": ({"rejected": "Good line 0 "}, "line 1: chosen and rejected are identical"),
    "no chosen": ({"chosen": None}, "line 1: the column 'chosen' holds null"),
    "chat": ({"chosen": [{"role": "user", "content": "x"}]}, "line 1: the column 'chosen' holds chat messages"),
    "empty": ({"prompt": " "}, "line 1: the column 'prompt' is empty"),
    "wrong way round": ({"chosen_score": 1, "rejected_score": 1}, "line 1: chosen_score 1 is not above"),
    "no number": ({"chosen_score": "high", "rejected_score": 1}, "line 1: the column 'chosen_score' holds text"),
    "not finite": ({"chosen_score": float("nan"), "rejected_score": 1}, "holds nan, not a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pairs_are_one_line(tmp_path, case):
    change, pattern = WRONG[case]
    path = write(tmp_path / "p.jsonl", [PAIR | change, *PAIRS[1:]])
    with pytest.raises(UserError, match=pattern) as caught:
        load_preferences(PreferenceFields(preferences=path))
    assert str(caught.value).startswith("preferences=")


def test_wrong_columns_name_the_nearest(tmp_path):
    rows = [{"prompt": r["prompt"], "chosen": r["chosen"], "reject": r["rejected"]} for r in PAIRS]
    with pytest.raises(UserError, match=r"rejected: no such column.*did you mean 'reject'"):
        load_preferences(PreferenceFields(preferences=write(tmp_path / "p.jsonl", rows)))


@pytest.mark.parametrize("change", [{"rejected": "Good line 0"}, {"margin": float("nan")}, {"margin": 0.0}])
def test_saved_pairs_are_checked_too(tmp_path, change):
    scores = {"chosen_score": 2.0, "rejected_score": 1.0, "margin": 1.0, "id": "a"}
    rows = [{**row, **scores, "id": str(i)} for i, row in enumerate(PAIRS)]
    parts = {
        split: datasets.Dataset.from_list([rows[0] | change, *rows[1:]]) for split in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    fields = PreferenceFields(preferences=str(tmp_path / "saved"))
    if "rejected" in change:
        with pytest.raises(UserError, match="train row 1: chosen and rejected are identical"):
            load_preferences(fields)
    else:
        # The margin is worked out anew from the scores.
        assert set(load_preferences(fields)["train"]["margin"]) == {1.0}
