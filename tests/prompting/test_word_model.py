"""The small model of word tasks: its tokenizer and episodes, what is hidden from it, and that it resumes exactly."""

import hashlib
import json
import re
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_local import LocalBackend, load_local
from pipelines.prompting.tasks import Example, Task, load_task
from pipelines.prompting.word_model import WordModelConfig, _often, _tasks, _usable
from pipelines.prompting.word_model_data import Episodes, answers_right, by_position, character_tokenizer
from tests.images.conftest import check_two_processes
from tests.prompting.conftest import write_word_files

SMALL = ["max_steps=6", "batch_size=4", "hidden_size=16", "intermediate_size=32", "num_layers=2", "num_heads=2"]
SMALL += ["logging_steps=1", "save_steps=2", "precision=fp32", "report_to=none", "row_length=96", "at_least=1"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """``key=value`` of a file of made-up nouns and one of text with made-up verbs and those nouns."""
    return [*write_word_files(tmp_path_factory.mktemp("words")), *SMALL]


def config_of(words, **more) -> WordModelConfig:
    values = dict(word.split("=") for word in words)
    return validate(WordModelConfig, {**values, "max_steps": 6, **more})


def test_characters_come_back_as_they_were():
    tokenizer = character_tokenizer(64)
    text = 'box -> boxes\nA "b" <c> -> d\\n~ ->\n ->x- >'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) - 2 * text.count(" ->")
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) == 4 + 1 + 95


def test_an_episode_is_lines_of_one_task_and_its_labels_the_answers():
    tokenizer = character_tokenizer(256)
    tasks = {"copy": {"ab": "ab", "cde": "cde"}, "upper": {"ab": "AB", "f": "F"}}
    episodes = Episodes(tasks, tokenizer, often={"upper": ["ab"]}, count=40, length=50, seed=3)
    seen = set()
    for index in range(len(episodes)):
        item, (name, lines) = episodes[index], episodes.lines(index)
        seen.add(name)
        text = tokenizer.decode(item["input_ids"])
        assert len(item["input_ids"]) == len(item["labels"]) == 50
        assert "".join(asked + answered for asked, answered in lines).startswith(text)
        whole = text.split("\n")[:-1]
        assert all(tasks[name][line.split(" -> ")[0]] == line.split(" -> ")[1] for line in whole)
        kept = item["input_ids"][item["labels"] != -100]
        assert torch.equal(kept, item["labels"][item["labels"] != -100])
        answered = tokenizer.decode(kept)
        assert answered.startswith("".join(f" {line.split(' -> ')[1]}\n" for line in whole))
        assert "->" not in answered
    assert seen == {"copy", "upper"}
    again = Episodes(tasks, tokenizer, often={"upper": ["ab"]}, count=40, length=50, seed=3)
    assert torch.equal(again[7]["input_ids"], episodes[7]["input_ids"])
    assert not torch.equal(again[8]["input_ids"], episodes[7]["input_ids"])


def test_words_that_are_often_asked_are_half_of_all():
    pairs = {f"w{n}": "x" for n in range(100)}
    episodes = Episodes(
        {"t": pairs}, character_tokenizer(64), often={"t": ["w1", "w2", "w200"]}, count=200, length=60, seed=0
    )
    asked = [line[0] for index in range(200) for line in episodes.lines(index)[1]]
    share = sum(line in ("w1 ->", "w2 ->") for line in asked) / len(asked)
    assert share == pytest.approx(0.51, abs=0.04)


def test_answers_are_right_only_as_a_whole():
    labels = torch.tensor([[-100, 5, 6, 9, -100, 7, 9, -100, 8]])
    wanted = torch.tensor([5, 6, 9, 0, 7, 9, 0, 8, 0])
    logits = torch.nn.functional.one_hot(wanted, 10).float()[None]
    assert answers_right(logits, labels, 9) == [[True, True]]  # the last one is cut off
    logits[0, 1] = torch.nn.functional.one_hot(torch.tensor(1), 10).float()
    assert answers_right(logits, labels, 9) == [[False, True]]
    assert by_position([[True, False], [False]], [0, 1]) == {0: 0.5, 1: 0.0}
    with pytest.raises(ValueError, match="no episode has 3 whole answers"):
        by_position([[True, False]], [2])


def test_no_held_out_noun_and_no_plural_of_one_stands_in_any_episode(words):
    config = config_of(words)
    task = load_task(config)
    tasks, fresh, _ = _tasks(config, task)
    hidden = {word for e in (*task.validation, *task.test) for word in (e.input, e.answer)}
    assert len(hidden) > 20
    episodes = Episodes(tasks, character_tokenizer(256), often=_often(tasks), count=600, length=96, seed=0)
    seen = set()
    for index in range(len(episodes)):
        for asked, answered in episodes.lines(index)[1]:
            seen.add(asked.removesuffix(" ->"))
            seen |= set(re.findall(r"[a-z]+", answered.lower()))
    assert not seen & hidden
    assert {e.input for e in task.train} <= seen
    # nor do the words of the measured episodes stand in them, but for what is asked of verbs and nouns alike
    assert not set(fresh["copy"]) & set(tasks["copy"])
    assert set(fresh["plural"]) == {e.input for e in task.validation}


def digests(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "stage.json")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_killed_it_ends_with_the_same_bits_and_loads_as_any_causal_model(prompting_cli, words, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, printed = prompting_cli.run("--recipe", "prompting/word_model", *words, f"output_dir={whole}")
    assert code == 0, printed[-3000:]
    argv = ["--recipe", "prompting/word_model", *words, f"output_dir={killed}"]
    code, printed = prompting_cli.run(*argv, kill_at_step=6)
    assert code == -signal.SIGKILL, printed[-3000:]
    assert {p.parent.name for p in (tmp_path / ".killed.partial").rglob("complete")} == {"checkpoint-2", "checkpoint-4"}
    code, printed = prompting_cli.run(*argv)
    assert code == 0, printed[-3000:]
    assert digests(killed) == digests(whole)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole)
    assert tokenizer.decode(tokenizer("cat -> cats\n")["input_ids"]) == "cat -> cats\n"
    assert type(model).__name__ == "LlamaForCausalLM"
    metrics = json.loads((whole / "stage.json").read_text())["metrics"]
    assert metrics["word_model/parameters"] == sum(p.numel() for p in model.parameters())
    assert {f"word_model/accuracy_{k}" for k in (0, 1, 2, 4)} <= set(metrics)
    local = LocalBackend(*load_local(str(whole), "model"))
    assert local.generate(["cat -> cats\nbox ->"], Sampling(max_new_tokens=3))[0][0].failure is None
    # what comes after asks the very words that were hidden here
    task = load_task(config_of(words))
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (whole / "nouns" / f"{split}.jsonl").read_text().splitlines()]
        assert [(row["word"], row["plural"]) for row in rows] == [(e.input, e.answer) for e in getattr(task, split)]


@pytest.mark.slow
def test_two_processes_do_what_one_does(prompting_cli, words, tmp_path):
    given = [word for word in words if not word.startswith(("batch_size", "precision"))]
    check_two_processes(prompting_cli, tmp_path, "prompting/word_model", given, 4)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"task": "summarization"}, "task=summarization: the model is one of word tasks"),
        ({"hidden_size": 18}, "hidden_size=18: does not divide into even heads; give a multiple of 4"),
        ({"row_length": 2000}, "row_length=2000: the model has no positions for it; give at most max_positions=1024"),
        ({"max_steps": -1}, "max_steps=-1: says not how long to train"),
    ],
)
def test_a_wrong_field_is_one_line(words, given, line):
    with pytest.raises(UserError) as error:
        config_of(words, **given)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


def test_too_little_text_is_one_line(words, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"document": f"few words {n}", "summary": "few"}) + "\n" for n in range(20)))
    config = config_of(words, text=str(file))
    with pytest.raises(UserError, match=r"text=.*gives 2 words and 0 verbs; give more English text"):
        _tasks(config, load_task(config))


def test_a_training_noun_that_shares_a_held_out_plural_is_left_out():
    def split(*pairs):
        return [Example(noun, noun, plural) for noun, plural in pairs]

    train = split(("base", "bases"), ("city", "cities"), ("encyclopedia", "encyclopedias"))
    found = _usable(Task("words", train, split(("cup", "cups")), split(("basis", "bases"))), 10)
    assert [e.input for e in found.train] == ["city"]
    assert [e.input for e in found.test] == ["basis"]
