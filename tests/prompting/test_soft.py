"""The stage of soft prompts through its recipe: what it writes and measures, killed and resumed, in two processes."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_local import LocalBackend, load_local
from tests.images.conftest import check_two_processes

WORDS = ["max_steps=6", "batch_size=4", "save_steps=2", "logging_steps=1", "precision=fp32", "report_to=none"]
WORDS += ["virtual_tokens=3", "learning_rate=0.05", "split=test", "max_new_tokens=4", "resamples=200"]
METHODS = ["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full"]


def digests(folder: Path) -> dict[str, str]:
    """What a stage leaves, but for what says where and how long."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "stage.json")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def done(prompting_cli, tiny_folder, nouns_file, tmp_path_factory):
    """The folder of a finished stage: two seeds, two sizes."""
    folder = tmp_path_factory.mktemp("soft") / "stage"
    words = [f"model={tiny_folder}", f"dataset={nouns_file}", "repeats=2", "train_sizes=[8]", f"output_dir={folder}"]
    code, printed = prompting_cli.run("--recipe", "prompting/soft", *WORDS, *words)
    assert code == 0, printed[-3000:]
    return folder


def test_a_stage_trains_from_every_seed_on_every_size_and_says_what_it_measured(done, tiny_folder):
    results = json.loads((done / "results.json").read_text())
    names = [(run["examples"], run["seed"]) for run in results["runs"]]
    assert names == [(16, 0), (16, 1), (8, 0), (8, 1)]
    folders = {f"{size}-examples-seed{seed}" for size, seed in names}
    assert {path.name for path in done.iterdir() if path.is_dir()} == folders
    metrics = json.loads((done / "stage.json").read_text())["metrics"]
    values = np.array([run["values"] for run in results["runs"]])
    assert metrics["soft/accuracy"] == values[:2].mean()
    assert metrics["soft/accuracy_8"] == values[2:].mean()
    assert metrics["soft/trainable_parameters"] == 3 * 32
    assert metrics["soft/train_loss"] == np.mean([run["train_loss"] for run in results["runs"][:2]])
    assert (metrics["soft/seeds"], metrics["soft/train_examples"], metrics["soft/steps"]) == (2, 16, 6)
    irregular = [group == "irregular" for group in results["groups"]]
    assert 0 < sum(irregular) < len(irregular)
    assert metrics["soft/accuracy_irregular"] == values[:2][:, irregular].mean()
    first = json.loads((done / "16-examples-seed0" / "log_history.json").read_text())
    assert json.loads((done / "log_history.json").read_text()) == first
    assert first[-1]["loss"] < first[0]["loss"]


def test_its_predictions_are_what_the_saved_adapter_says(done):
    for folder in (done / "16-examples-seed0", done / "8-examples-seed1"):
        model, tokenizer = load_local(str(folder), "model")
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        sampling = Sampling(max_new_tokens=4, stop="\n")
        made = LocalBackend(model, tokenizer).generate([f"{line['input']} ->" for line in lines], sampling)
        assert [one.text.strip() for (one,) in made] == [line["output"] for line in lines]
        assert not list(folder.glob("*.bin"))  # nothing pickled


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m == "p_tuning" else pytest.mark.slow) for m in METHODS]
)
def test_killed_in_its_second_training_it_ends_with_the_same_bits(
    prompting_cli, tiny_folder, nouns_file, tmp_path, method
):
    # P-tuning's network and a prefix's projection are not in what PEFT saves: training could not go on from that
    words = [*WORDS, f"model={tiny_folder}", f"dataset={nouns_file}", "repeats=2", f"method={method}"]
    words += ["prefix_projection=true"] if method == "prefix_tuning" else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, printed = prompting_cli.run("--recipe", "prompting/soft", *words, f"output_dir={whole}")
    assert code == 0, printed[-3000:]
    argv = ["--recipe", "prompting/soft", *words, f"output_dir={killed}"]
    code, printed = prompting_cli.run(*argv, kill_at_step=11)  # six of the first, the fifth of the second
    assert code == -signal.SIGKILL, printed[-3000:]
    partial = tmp_path / ".killed.partial"
    assert (partial / "16-examples-seed0" / "training.json").exists()
    assert not (partial / "16-examples-seed1").exists()
    saved = {path.parent.name for path in partial.rglob("checkpoints/16-examples-seed1/*/complete")}
    assert saved == {"checkpoint-2", "checkpoint-4"}
    before = (partial / "16-examples-seed0" / "training.json").stat().st_mtime_ns
    code, printed = prompting_cli.run(*argv)
    assert code == 0, printed[-3000:]
    assert (killed / "16-examples-seed0" / "training.json").stat().st_mtime_ns == before  # not done again
    assert digests(killed) == digests(whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_two_processes_do_what_one_does(prompting_cli, tiny_folder, nouns_file, tmp_path, method, family):
    folder = tiny_folder
    if family == "t5":
        from tests.prompting.tiny_causal import save, tiny_t5, tiny_tokenizer

        tokenizer = tiny_tokenizer()
        model = tiny_t5(len(tokenizer))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.dropout_rate = 0.0
        folder = save(tmp_path / "model", model, tokenizer)
    words = [word for word in WORDS if not word.startswith("batch_size")]
    words += [f"model={folder}", f"dataset={nouns_file}", f"method={method}", "lr_scheduler=constant"]
    # Adam divides by the gradients' own size, so their rounding comes back in the weights as a share of the rate.
    words[words.index("learning_rate=0.05")] = "learning_rate=0.002"
    check_two_processes(prompting_cli, tmp_path / "runs", "prompting/soft", words, 4)


def test_choices_are_scored_and_summaries_measured_by_rouge(prompting_cli, tiny_folder, questions_file, tmp_path):
    words = [*WORDS, f"model={tiny_folder}", "task=multiple_choice", f"dataset={questions_file}"]
    code, printed = prompting_cli.run("--recipe", "prompting/soft", *words, f"output_dir={tmp_path / 'choice'}")
    assert code == 0, printed[-3000:]
    results = json.loads((tmp_path / "choice" / "results.json").read_text())
    assert set(results["runs"][0]["values"]) <= {0.0, 1.0}
    assert all(results["runs"][0]["valid"])
    rows = [{"document": f"the dog and cat {n} play", "summary": f"cat {n} play"} for n in range(30)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, f"model={tiny_folder}", "task=summarization", f"dataset={file}"]
    code, printed = prompting_cli.run("--recipe", "prompting/soft", *words, f"output_dir={tmp_path / 'texts'}")
    assert code == 0, printed[-3000:]
    metrics = json.loads((tmp_path / "texts" / "stage.json").read_text())["metrics"]
    assert 0 <= metrics["soft/rouge1_ci_low"] <= metrics["soft/rouge1"] <= metrics["soft/rouge1_ci_high"] <= 100


def test_a_size_that_is_not_there_leaves_nothing(prompting_cli, tiny_folder, nouns_file, tmp_path):
    words = [*WORDS, f"model={tiny_folder}", f"dataset={nouns_file}", "train_sizes=[17]"]
    words += [f"output_dir={tmp_path / 'x'}"]
    code, _, errors = prompting_cli.answer("--recipe", "prompting/soft", *words)
    assert code == 2
    assert errors.strip().splitlines()[-1] == "error: train_sizes=17: there are 16 training examples; give 16 or less"
    assert not list(tmp_path.iterdir())


def test_what_was_done_is_not_done_again(prompting_cli, done, tiny_folder, nouns_file, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    words = [f"model={tiny_folder}", f"dataset={nouns_file}", "repeats=2", "train_sizes=[8]", f"output_dir={copy}"]
    code, printed = prompting_cli.run("--recipe", "prompting/soft", *WORDS, *words)
    assert code == 0, printed[-3000:]
    assert digests(copy) == digests(done)
    assert "'loss'" not in printed


def test_a_document_is_shown_up_to_so_many_words(tmp_path):
    from pipelines.config import validate
    from pipelines.errors import UserError
    from pipelines.prompting.tasks import TaskFields, load_task

    file = tmp_path / "texts.jsonl"
    rows = [{"document": f"one  two\n three{n} four", "summary": "x"} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {"task": "summarization", "dataset": str(file)}
    for count, text in ((1, "one"), (2, "one  two"), (4, "four"), (9, "four"), (None, "four")):
        example = load_task(validate(TaskFields, shown | {"max_words": count})).train[0]
        assert example.input.endswith(text)
        assert example.input.startswith("one")
    with pytest.raises(UserError, match="max_words=3: words has no documents to cut"):
        validate(TaskFields, {"task": "words", "max_words": 3})
