"""Reward functions: what each is worth, and that a wrong one is named at once."""

import sys

import pytest
import torch

from pipelines.errors import UserError
from pipelines.seq2seq.models import load_tokenizer
from pipelines.seq2seq.reward_model import EncoderDecoderRewardModel
from pipelines.seq2seq.rewards import RewardFunction, Rewards, load_rewards
from pipelines.seq2seq.training import LengthConfig

DOCUMENTS, SUMMARIES = ["a b c d", "e f g"], ["a b", "e f g h"]
REFERENCES = [["a b"], ["x y", "e f"]]


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    lines = [
        "def words(documents, summaries, references): return [len(s.split()) for s in summaries]",
        "def raises(documents, summaries, references): raise RuntimeError('no such word')",
        "def short(documents, summaries, references): return [1.0]",
        "def nan(documents, summaries, references): return [1.0, float('nan')]",
        "def text(documents, summaries, references): return ['good', 'bad']",
    ]
    (tmp_path / "my_rewards.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_weights_and_terms(tokenizer, user_module):
    rewards = load_rewards(["length", f"{user_module}:words", "rouge"], [2.0, 0.5, 0.01], tokenizer)
    assert rewards.names == ["length", f"{user_module}:words", "rouge"]
    rows = rewards(DOCUMENTS, SUMMARIES, REFERENCES)
    lengths = [0.0, -1.0]
    for row, length, words in zip(rows, lengths, (2.0, 4.0), strict=True):
        assert row[1:3] == [length, words]
        assert row[0] == pytest.approx(2 * length + 0.5 * words + 0.01 * row[3])
    assert rows[0][3] == pytest.approx(100)


def test_names_differ_where_the_same_reward_stands_twice(tokenizer):
    assert load_rewards(["length", "length"], None, tokenizer).names == ["length", "length#2"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "raised RuntimeError: no such word"),
        ("short", "1 scores for 2 summaries"),
        ("nan", "score 1 is nan"),
        ("text", "not a number"),
        ("absent", "has no 'absent'"),
    ],
)
def test_a_wrong_function_is_named_at_once(tokenizer, user_module, function, words):
    with pytest.raises(UserError) as error:
        load_rewards([f"{user_module}:{function}"], None, tokenizer)(DOCUMENTS, SUMMARIES, REFERENCES)
    assert words in str(error.value)
    assert f"{user_module}:{function}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_wrong_weights(tokenizer, tmp_path):
    with pytest.raises(UserError, match="reward="):
        load_rewards([str(tmp_path)], None, tokenizer)
    with pytest.raises(UserError, match="2 weights for 1 reward"):
        load_rewards(["length"], [1.0, 2.0], tokenizer)


@pytest.fixture
def reward_folder(tiny_t5, tiny_tokenizer, tmp_path):
    """Folder of an untrained reward model on the tiny T5."""
    torch.manual_seed(0)
    model = EncoderDecoderRewardModel.from_seq2seq(str(tiny_t5), LengthConfig(max_source_length=32))
    folder = tmp_path / "reward"
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_tokenizer)).save_pretrained(folder)
    return folder


def test_a_reward_models_score(reward_folder, tokenizer):
    rewards = load_rewards([str(reward_folder)], None, tokenizer)
    assert rewards.names == ["model"]
    documents = ["sort the list", "sort the list", "open file"]
    rows = rewards(documents, ["Sort it.", "Open it.", "Open it."], [["x"]] * 3)
    assert len({row[0] for row in rows}) == 3
    alone = rewards(documents[1:2], ["Open it."], [["x"]])
    assert alone[0][0] == pytest.approx(rows[1][0], abs=1e-5)


def test_a_reward_model_with_another_tokenizer_is_refused(reward_folder, tokenizer):
    other = load_tokenizer(str(reward_folder))
    other.add_tokens(["<another>"])
    with pytest.raises(UserError, match="reward="):
        load_rewards([str(reward_folder)], None, other)


def test_a_nan_of_a_reward_model_is_named(reward_folder, tokenizer):
    model = EncoderDecoderRewardModel.from_pretrained(reward_folder)
    model.score_head.weight.data.fill_(float("nan"))
    model.save_pretrained(reward_folder)
    with pytest.raises(UserError, match="score 0 is nan"):
        load_rewards([str(reward_folder)], None, tokenizer)(DOCUMENTS, SUMMARIES, REFERENCES)


def test_the_weighted_sum_is_first():
    def constant(value):
        return lambda documents, summaries, references: [value] * len(summaries)

    rewards = Rewards([RewardFunction("one", 3.0, constant(1.0)), RewardFunction("two", -1.0, constant(2.0))])
    assert rewards(DOCUMENTS, SUMMARIES, REFERENCES) == [[1.0, 1.0, 2.0]] * 2
