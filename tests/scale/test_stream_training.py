"""Stages train on streams: they go on exactly, measure each set by itself, and cache what is tokenized as a whole."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from pipelines.config import validate
from pipelines.corpus import token_cache
from pipelines.errors import UserError
from pipelines.seq2seq import collators, sft_trainer
from pipelines.seq2seq.dpo import DPOStageConfig, dpo
from pipelines.seq2seq.pretrain import PretrainConfig, pretrain
from pipelines.seq2seq.reward import RewardConfig, reward
from pipelines.seq2seq.sft import SFTConfig, sft
from tests.chain.test_whole import documented
from tests.scale.conftest import documents, preferences, write_lines

_COMMON = {
    "streaming": True,
    "shuffle_buffer": 24,
    "max_steps": 12,
    "save_steps": 4,
    "logging_steps": 1,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "report_to": "none",
    "max_source_length": 32,
    "max_target_length": 12,
    "warmup_ratio": 0.0,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of documents and two of pairs."""
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for word, count in (("read", 200), ("sort", 60)):
        found[f"{word}_documents"] = str(write_lines(folder / f"{word}_documents.jsonl", documents(count, word=word)))
        found[f"{word}_pairs"] = str(write_lines(folder / f"{word}_pairs.jsonl", preferences(count, word=word)))
        rows = ({"text": f"{row['document']}. {row['summary']} It does so at once."} for row in documents(count))
        found[f"{word}_text"] = str(write_lines(folder / f"{word}_text.jsonl", rows))
    return found


def _stage(name, sets, tiny_t5):
    """A stage function, its configuration's class and its own fields."""
    mixed = {"documents": "dataset", "pairs": "preferences", "text": "text"}

    def source(kind):
        return {mixed[kind]: sets[f"read_{kind}"], "mixture": [{"source": sets[f"sort_{kind}"], "weight": 0.5}]}

    model = {"model": str(tiny_t5)}
    if name == "sft":
        return sft, SFTConfig, model | source("documents")
    if name == "reward":
        return reward, RewardConfig, model | source("pairs") | {"use_margin": True}
    if name == "dpo":
        return dpo, DPOStageConfig, model | source("pairs")
    weights = {"gap_weight": 0.0, "supervised_weight": 0.5, "copy_steps": 3, "rouge_examples": 4, "eval_examples": 8}
    weights["text_validation_fraction"] = 0.2
    return pretrain, PretrainConfig, model | source("text") | weights | {"pairs": sets["read_documents"]}


def _run(function, cls, output, fields):
    output.mkdir(parents=True, exist_ok=True)
    return function(validate(cls, _COMMON | fields | {"output_dir": str(output)}))


class _Killed(BaseException):
    pass


def _interrupted(function, cls, output, fields, step, monkeypatch):
    """Run until the training step of that number begins."""
    plain, left = Trainer.training_step, step

    def training_step(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise _Killed
        return plain(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(_Killed):
        _run(function, cls, output, fields)
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "pretrain"])
def test_a_stage_goes_on_exactly_in_the_middle_of_its_stream(name, sets, tiny_t5, tmp_path, monkeypatch, root):
    function, cls, fields = _stage(name, sets, tiny_t5)
    metrics = _run(function, cls, tmp_path / "whole", fields)
    # step 10 lies behind the checkpoint of step 8, in the middle of a pool of six steps
    _interrupted(function, cls, tmp_path / "again", fields, 10, monkeypatch)
    checkpoint = tmp_path / "again" / "checkpoints" / "checkpoint-8"
    assert (checkpoint / "stream.json").is_file()
    assert not (tmp_path / "again" / "model.safetensors").exists()
    assert _run(function, cls, tmp_path / "again", fields) == metrics
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    histories = [(tmp_path / folder / "log_history.json").read_text() for folder in ("whole", "again")]
    assert histories[0] == histories[1]
    assert len([entry for entry in json.loads(histories[0]) if "loss" in entry]) == 12
    assert metrics[f"{name}/skipped_rows"] == 0
    measured = {"sft": "eval_loss", "reward": "accuracy", "dpo": "loss", "pretrain": "span"}[name]
    ending = "_loss" if name == "pretrain" else ""
    for key in metrics:
        plain = key.removesuffix("_ci_low").removesuffix("_ci_high")
        assert any(pattern.fullmatch(plain) for pattern in documented(root)), (
            f"docs/metrics.md does not explain {plain}"
        )
    of_sets = [metrics[f"{name}/{measured}_{kind}_{_kind(name)}{ending}"] for kind in ("read", "sort")]
    assert len(of_sets) == 2
    if name == "sft":
        assert metrics["sft/eval_loss"] == pytest.approx((of_sets[0] + 0.5 * of_sets[1]) / 1.5)


def _kind(name):
    return {"sft": "documents", "pretrain": "text"}.get(name, "pairs")


def test_the_losses_of_the_sets_are_those_of_each_alone(sets, tiny_t5, tmp_path):
    function, cls, fields = _stage("sft", sets, tiny_t5)
    fields |= {"learning_rate": 1e-12, "max_steps": 1, "save_steps": 1}
    mixed = _run(function, cls, tmp_path / "mixed", fields)
    for word in ("read", "sort"):
        alone = fields | {"dataset": sets[f"{word}_documents"], "mixture": []}
        found = _run(function, cls, tmp_path / word, alone)
        assert mixed[f"sft/eval_loss_{word}_documents"] == pytest.approx(found["sft/eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_streaming_learns_what_training_in_memory_learns(sets, tiny_t5, tmp_path):
    fields = {"model": str(tiny_t5), "dataset": sets["read_documents"], "max_steps": 150, "save_steps": 150}
    fields |= {"learning_rate": 1e-2, "batch_size": 8, "shuffle_buffer": 100}
    streamed = _run(sft, SFTConfig, tmp_path / "stream", fields)
    memory = _run(sft, SFTConfig, tmp_path / "memory", fields | {"streaming": False})
    assert streamed["sft/eval_loss"] < 3.0
    assert streamed["sft/eval_loss"] == pytest.approx(memory["sft/eval_loss"], abs=0.5)


@pytest.mark.parametrize(
    ("cls", "fields", "says"),
    [
        (SFTConfig, {"max_steps": -1}, "max_steps=-1: a stream has no length that epochs could count"),
        (SFTConfig, {"copy_steps": 5}, "copy_steps=5: a stream has no copy phase"),
        (DPOStageConfig, {"precompute_ref_log_probs": True}, "a stream cannot be gone through before training"),
        (PretrainConfig, {}, "supervised_weight=1.0: there are no documents with summaries"),
        (PretrainConfig, {"text": "pydocs", "supervised_weight": 0}, "streaming=True: pydocs lies in memory"),
    ],
)
def test_what_cannot_be_streamed_is_said_before_work_starts(cls, fields, says, sets, tiny_t5):
    source = {SFTConfig: "dataset", DPOStageConfig: "preferences", PretrainConfig: "text"}[cls]
    given = {source: sets["read_documents"], "model": str(tiny_t5), "streaming": True, "max_steps": 5}
    with pytest.raises(UserError) as told:
        validate(cls, given | fields)
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_pool_too_small_for_a_step_of_pretraining_is_one_line(sets, tiny_t5, tmp_path):
    function, cls, fields = _stage("pretrain", sets, tiny_t5)
    with pytest.raises(UserError, match=r"shuffle_buffer=2: so many documents give .* raise it, or lower batch_size"):
        _run(function, cls, tmp_path / "small", fields | {"shuffle_buffer": 2})


def test_the_mixture_is_part_of_the_fingerprint_by_content(sets, tiny_t5, tmp_path):
    from pipelines.stage import fingerprint

    _, cls, fields = _stage("sft", sets, tiny_t5)
    first = validate(cls, _COMMON | fields)
    digest, inputs = fingerprint(sft, first)
    assert set(inputs) == {"dataset", "model", "mixture.0.source"}
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(sets["sort_documents"]).read_bytes())
    moved = [{"source": str(copy), "weight": 0.5, "name": "sort_documents"}]
    named = [{"source": sets["sort_documents"], "weight": 0.5, "name": "sort_documents"}]
    both = [fingerprint(sft, validate(cls, _COMMON | fields | {"mixture": each}))[0] for each in (moved, named)]
    assert both[0] == both[1]
    copy.write_bytes(copy.read_bytes().replace(b"sort 1 ", b"sort 9 "))
    assert fingerprint(sft, validate(cls, _COMMON | fields | {"mixture": moved}))[0] != both[0]
    assert fingerprint(sft, dataclasses.replace(first, shuffle_buffer=25))[0] != digest


# --- sets in memory: tokens are made once -----------------------------------------------------------------------------


@pytest.fixture
def cached_from_one(monkeypatch):
    """Cache sets of any size."""
    for module in (sft_trainer, collators, token_cache):
        monkeypatch.setattr(module, "CACHED_FROM", 1)


@pytest.mark.parametrize("name", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_tokens_are_made_once_and_found_again(name, sets, tiny_t5, tmp_path, monkeypatch, cached_from_one):
    source = {"dataset": sets["read_documents"]} if name == "sft" else {"preferences": sets["read_pairs"]}
    function, cls = {"sft": (sft, SFTConfig), "dpo": (dpo, DPOStageConfig)}[name]
    fields = source | {"model": str(tiny_t5), "streaming": False, "max_steps": 1, "save_steps": 1}
    module = sft_trainer if name == "sft" else collators
    calls = []
    plain = module.tokenize_sources
    monkeypatch.setattr(module, "tokenize_sources", lambda *args: calls.append(len(args[1])) or plain(*args))
    first = _run(function, cls, tmp_path / "first", fields)
    once = 180 if name == "sft" else 200  # SFT has no use for the test split
    assert sum(calls) == once
    assert _run(function, cls, tmp_path / "second", fields) == first
    assert sum(calls) == once
    monkeypatch.setattr(module, "CACHED_FROM", 10**6)
    assert _run(function, cls, tmp_path / "third", fields) == first
    assert sum(calls) == 2 * once
    monkeypatch.setattr(module, "CACHED_FROM", 1)
    _run(function, cls, tmp_path / "shorter", fields | {"max_source_length": 16})
    assert sum(calls) == 3 * once
