"""Each kind of wrong input ends in one line that says what, where, which value and how to mend it; nothing is left.

Every case of the tables (``wrong_input_*.py``) goes through a real command line in a process of its own.
"""

import json
import re
import shutil
import subprocess

import pytest

from tests.chain import wrong_input_config, wrong_input_data, wrong_input_folders, wrong_input_models
from tests.chain.conftest import CHAIN
from tests.chain.wrong_input import KINDS, At, contents, errors_in, fits

TABLES = (wrong_input_config, wrong_input_data, wrong_input_models, wrong_input_folders)  # they fill KINDS

SHAPE = re.compile(r"[^=]+=.*: \S.*; \S.*")


@pytest.mark.parametrize("name", KINDS)
def test_wrong_input(genalign, data, uninterrupted, tmp_path, name):
    at = At(tmp_path, data, uninterrupted)
    with at.stack:
        wrong = KINDS[name](at)
        before, run_before = contents(at.folder), contents(uninterrupted)
        code, printed, errors = genalign.answer(*wrong.argv, cwd=at.folder)
        assert code == 2, printed + errors
        said = errors_in(errors)
        assert len(said) == len(wrong.says), errors
        for line, wanted in zip(said, wrong.says, strict=True):
            assert fits(line, wanted), f"said:   {line}\nwanted: {wanted}"
            assert SHAPE.fullmatch(line), line
        assert "Traceback" not in printed + errors
        assert "error: " not in printed
        assert contents(at.folder) == before
        assert contents(uninterrupted) == run_before


def test_there_are_at_least_35_kinds():
    assert len(KINDS) >= 35


def test_a_disk_that_fills_up_in_training_is_one_line_and_the_run_goes_on_from_there(
    genalign, data, uninterrupted, tmp_path
):
    at = At(tmp_path, data, uninterrupted)
    words = [f"dataset={at.run}/corpus", f"model={at.run}/sft", "max_source_length=40", "max_target_length=12"]
    words += ["max_steps=12", "save_steps=2", "logging_steps=2", "batch_size=8", "precision=fp32"]
    with at.stack:
        at.mount("size=1m")
        argv = ["--recipe", "summarization/sft", *words, f"output_dir={at.out}/sft"]
        code, printed, errors = genalign.answer(*argv, cwd=at.folder)
        assert code == 2, printed + errors
        mend = "free some space and give the same command again: it goes on from there"
        assert errors_in(errors) == [f"output_dir={at.out}/sft: the disk is full; {mend}"], errors
        assert "Traceback" not in printed + errors
        assert not (at.out / "sft").exists()
        assert list((at.out / ".sft.partial" / "checkpoints").glob("checkpoint-*/complete"))
        subprocess.run(["mount", "-o", "remount,size=20m", at.out], check=True)
        code, printed, errors = genalign.answer(*argv, cwd=at.folder)
        assert code == 0, printed + errors
        again = (at.out / "sft" / "model.safetensors").read_bytes()
    whole = ["--recipe", "summarization/sft", *words, f"output_dir={at.folder}/whole"]
    assert genalign.answer(*whole, cwd=at.folder)[0] == 0
    assert again == (at.folder / "whole" / "model.safetensors").read_bytes()


def test_documents_longer_than_the_limit_are_cut_counted_and_reported(genalign, data, uninterrupted, tmp_path):
    from transformers import AutoTokenizer

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("corpus", "tokenizer"):
        shutil.copytree(uninterrupted / name, run_dir / name)
    argv = ["run", str(CHAIN), f"dataset={data}", "--output_dir", str(run_dir), "--until", "preferences"]
    argv += ["max_source_length=14", "sft.max_steps=2", "sft.copy_steps=0", "sft.save_steps=2"]
    code, printed, errors = genalign.answer(*argv, cwd=tmp_path)
    assert code == 0, printed + errors
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    cut = {}
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        cut[split] = [len(tokenizer(" ".join(row["source"]))["input_ids"]) > 14 for row in rows]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    share = sum(cut["train"]) / len(cut["train"])
    assert 0.05 < share < 0.95
    assert metrics["sft/truncated_sources"] == pytest.approx(share)
    everything = [was for several in cut.values() for was in several]
    assert metrics["preferences/truncated_documents"] == pytest.approx(sum(everything) / len(everything))
    report = (run_dir / "report.html").read_text()
    assert f"sft: {100 * share:.1f} % of sources cut" in report


def test_a_judge_that_was_mended_is_another_judge(genalign, data, uninterrupted, tmp_path):
    at = At(tmp_path, data, uninterrupted)
    limits = ["max_train=8", "max_validation=4", "max_test=4", "max_source_length=40", "max_target_length=12"]
    words = [f"dataset={at.run}/corpus", f"model={at.run}/sft", "precision=fp32", *limits]
    argv = at.recipe("preferences", *words, f"annotator={at.judge('return [len(summary) for summary in summaries]')}")
    first = genalign.answer(*argv, cwd=at.folder)
    margin = json.loads((at.out / "stage.json").read_text())["metrics"]["preferences/mean_margin"]
    at.judge("return [2 * len(summary) for summary in summaries]")
    second = genalign.answer(*argv, cwd=at.folder)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert json.loads((at.out / "stage.json").read_text())["metrics"]["preferences/mean_margin"] == 2 * margin
