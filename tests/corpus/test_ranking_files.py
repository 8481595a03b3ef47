"""Ranked lists from files of {prompt, completions, ranking}."""

import json

import pytest

from pipelines.corpus import RankingFields, load_rankings
from pipelines.errors import UserError

LISTS = [
    {"prompt": f"Document {i // 2}", "completions": [f"Line {i} {k}" for k in range(3)], "ranking": [2, 0, 1]}
    for i in range(40)
]


def write(path, rows=LISTS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_lists_of_one_prompt_stay_together_and_a_saved_folder_is_read_again(tmp_path):
    splits = load_rankings(RankingFields(rankings=write(tmp_path / "r.jsonl")))
    assert [len(part) for part in splits.values()] == [32, 4, 4]
    prompts = [set(part["prompt"]) for part in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 20
    assert splits["train"].column_names == ["id", "prompt", "completions", "ranking"]
    splits.save_to_disk(str(tmp_path / "saved"))
    again = load_rankings(RankingFields(rankings=str(tmp_path / "saved"), max_train=3))
    assert len(again["train"]) == 3
    assert again["test"].to_list() == splits["test"].to_list()


def test_lists_may_differ_in_length_and_rank_the_first_places_only(tmp_path):
    rows = [row | {"completions": row["completions"][: 2 + i % 2], "ranking": [1]} for i, row in enumerate(LISTS)]
    splits = load_rankings(RankingFields(rankings=write(tmp_path / "r.jsonl", rows)))
    assert {len(row["completions"]) for row in splits["train"]} == {2, 3}
    assert all(row["ranking"] == [1] for row in splits["train"])


WRONG = {
    "one": ({"completions": ["a"]}, "line 1: the column 'completions' holds 1 texts"),
    "text": ({"completions": "a"}, "line 1: the column 'completions' holds text, not a list"),
    "empty": ({"completions": ["a", " ", "b"]}, r"line 1: the column 'completions\[1\]' is empty"),
    "twice": ({"completions": ["a", "b", "a "]}, r"line 1: completions\[2\] stands there twice"),
    "from one": ({"ranking": [3, 1, 2]}, "'ranking' holds 3, no completion's number; give .* from 0 to 2"),
    "words": ({"ranking": ["a", "b"]}, "'ranking' holds 'a', no completion's number"),
    "truth": ({"ranking": [True, 0]}, "'ranking' holds True"),
    "no list": ({"ranking": 2}, "'ranking' holds a number, not a list"),
    "nothing": ({"ranking": []}, "'ranking' is empty"),
    "again": ({"ranking": [1, 1, 0]}, "'ranking' names a completion twice"),
    "no prompt": ({"prompt": None}, "line 1: the column 'prompt' holds null"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_one_line(tmp_path, case):
    change, pattern = WRONG[case]
    path = write(tmp_path / "r.jsonl", [LISTS[0] | change, *LISTS[1:]])
    with pytest.raises(UserError, match=pattern) as caught:
        load_rankings(RankingFields(rankings=path))
    assert str(caught.value).startswith("rankings=")
    assert "\n" not in str(caught.value)


def test_wrong_columns_name_the_nearest(tmp_path):
    rows = [{"prompt": r["prompt"], "completions": r["completions"], "rank": r["ranking"]} for r in LISTS]
    with pytest.raises(UserError, match=r"ranking: no such column.*did you mean 'rank'"):
        load_rankings(RankingFields(rankings=write(tmp_path / "r.jsonl", rows)))
