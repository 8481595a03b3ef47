"""Supervised fine-tuning learns, resumes exactly (in the copy phase too), and says what is wrong with its input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq.sft import SFTConfig, sft
from pipelines.seq2seq.sft_trainer import ExampleSchedule, Ragged, TokenizedPairs

FIELDS = {
    "max_source_length": 48,
    "max_target_length": 12,
    "batch_size": 16,
    "optimizer": "adafactor",
    "learning_rate": 2e-2,
    "warmup_ratio": 0.0,
    "logging_steps": 4,
    "save_steps": 4,
    "precision": "fp32",
    "report_to": "none",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
}


def _config(output: Path, corpus: Path, **changes) -> SFTConfig:
    return validate(SFTConfig, FIELDS | {"output_dir": str(output), "dataset": str(corpus)} | changes)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_loss_falls_and_the_folder_is_a_plain_model(tmp_path, tiny_corpus, tiny_t5):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    metrics = sft(_config(tmp_path, tiny_corpus, model=str(tiny_t5), max_steps=60, logging_steps=20, save_steps=60))
    history = json.loads((tmp_path / "log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    assert metrics["sft/train_loss"] == losses[-1]
    assert metrics["sft/steps"] == 60
    assert metrics["sft/truncated_sources"] == 0.0
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    assert model.generation_config.max_new_tokens == 12
    assert metrics["sft/parameters"] == sum(p.numel() for p in model.parameters())
    assert not (tmp_path / "training_args.bin").exists()
    assert history[-1]["epoch"] == pytest.approx(60 / (96 // 16))
    assert not any("runtime" in key or "per_second" in key for entry in history for key in entry)


def test_eval_loss_is_nats_a_token(tmp_path, tiny_corpus, tiny_t5):
    from pipelines.corpus import load_corpus
    from pipelines.seq2seq.collators import pad_rows
    from pipelines.seq2seq.models import load_seq2seq, load_tokenizer

    config = _config(
        tmp_path, tiny_corpus, model=str(tiny_t5), max_steps=2, eval_batch_size=5, label_smoothing=0.2, logging_steps=2
    )
    metrics = sft(config)
    model, tokenizer = load_seq2seq(str(tmp_path)).eval(), load_tokenizer(str(tmp_path))
    pairs = TokenizedPairs.of(load_corpus(config)["validation"], tokenizer, config)
    total = tokens = 0.0
    for item in (pairs[i] for i in range(len(pairs))):
        ids, mask = pad_rows([item["input_ids"]], 0)
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([item["labels"]])).loss.item()
        total, tokens = total + loss * len(item["labels"]), tokens + len(item["labels"])
    assert metrics["sft/eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_in_parts_is_the_same_step(tmp_path, tiny_corpus, tiny_t5, smoothing):
    """Parts of unlike numbers of tokens: the loss is a mean over the step's tokens, not a mean or sum of means."""
    changes = {"max_steps": 4, "logging_steps": 1, "max_grad_norm": 0.0, "optimizer": "adamw", "learning_rate": 1e-4}
    changes |= {"model": _without_dropout(tiny_t5, tmp_path / "model"), "label_smoothing": smoothing}
    whole = sft(_config(tmp_path / "whole", tiny_corpus, **changes))
    parts = sft(_config(tmp_path / "parts", tiny_corpus, batch_size=4, gradient_accumulation=4, **changes))
    assert whole == pytest.approx(parts, rel=1e-5)
    logs = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("whole", "parts")]
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


def _without_dropout(source: Path, folder: Path) -> str:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return str(folder)


@pytest.mark.parametrize("stop", [4, 8])
def test_resume_is_exact_in_both_phases(tmp_path, monkeypatch, tiny_corpus, tiny_tokenizer, stop):
    """Six copy steps, then eight on summaries; the first run is cut off in one phase or the other."""
    from transformers import TrainerCallback

    import pipelines.seq2seq.training as training

    changes = {"tokenizer": str(tiny_tokenizer), "copy_steps": 6, "max_steps": 8, "copy_length": 5}
    whole = sft(_config(tmp_path / "whole", tiny_corpus, **changes))

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop + 1:
                raise Killed

    marker = training.checkpoint_marker

    class Both(TrainerCallback):
        def __init__(self):
            self.parts = [marker(), Kill()]

        def on_save(self, *args, **kwargs):
            self.parts[0].on_save(*args, **kwargs)

        def on_step_end(self, *args, **kwargs):
            self.parts[1].on_step_end(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "checkpoint_marker", Both)
        with pytest.raises(Killed):
            sft(_config(tmp_path / "cut", tiny_corpus, **changes))
    assert training.last_checkpoint(_config(tmp_path / "cut", tiny_corpus, **changes)).endswith(f"checkpoint-{stop}")
    torch.manual_seed(99)  # a new process would not share this one's generator
    assert sft(_config(tmp_path / "cut", tiny_corpus, **changes)) == whole
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_best_weights_are_kept(tmp_path, tiny_corpus, tiny_t5):
    # A rate that wrecks the model after its first steps: the best evaluation is not the last.
    config = _config(
        tmp_path, tiny_corpus, model=str(tiny_t5), max_steps=16, keep="best", learning_rate=1.0, lr_scheduler="constant"
    )
    metrics = sft(config)
    history = json.loads((tmp_path / "log_history.json").read_text())
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert metrics["sft/eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


def _pairs(count: int = 50) -> TokenizedPairs:
    rows = [[10 + i] * (2 + (7 * i) % 11) + [1] for i in range(count)]
    return TokenizedPairs(Ragged(rows), Ragged([[5, i, 1] for i in range(count)]))


def test_schedule_shows_every_example_once_an_epoch_and_groups_lengths():
    schedule = ExampleSchedule(_pairs(), steps=24, global_batch=4, seed=3)
    assert len(schedule) == 96
    for epoch in (schedule.order[:48], schedule.order[48:]):
        assert len(set(epoch.tolist())) == 48
    assert schedule.order[:48].tolist() != schedule.order[48:].tolist()
    lengths = schedule.pairs.sources.lengths[schedule.order].reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 3.0  # about 6 where they are drawn at random
    assert (schedule.order == ExampleSchedule(_pairs(), steps=24, global_batch=4, seed=3).order).all()
    assert (schedule.order != ExampleSchedule(_pairs(), steps=24, global_batch=4, seed=4).order).any()


def test_copy_phase_asks_for_the_start_of_the_document():
    plain = ExampleSchedule(_pairs(), steps=10, global_batch=4, seed=0)
    schedule = ExampleSchedule(_pairs(), steps=10, global_batch=4, seed=0, copy_steps=3, copy_length=3, end=1)
    for position in range(12):
        item = schedule[position]
        assert item["labels"] == [*item["input_ids"][:-1][:3], 1]
    for position in range(12, len(schedule)):
        item = schedule[position]
        assert item["labels"] == [5, item["input_ids"][0] - 10, 1]
    # How long was copied does not change the order of what follows.
    assert (schedule.order[12:] == plain.order).all()
    assert [schedule.epoch_at(step) for step in (0, 3, 15)] == [0, 0, 1]


def test_copying_from_anywhere_takes_a_run_of_the_document():
    pairs = TokenizedPairs(Ragged([[*range(10, 10 + 5 + i), 1] for i in range(40)]), Ragged([[5, 1]] * 40))
    schedule = ExampleSchedule(
        pairs, steps=1, global_batch=4, seed=0, copy_steps=60, copy_length=4, copy_from="anywhere"
    )
    starts = set()
    for position in range(240):
        item = schedule[position]
        *copied, end = item["labels"]
        assert end == 1
        assert copied == list(range(copied[0], copied[0] + 4))
        assert set(copied) < set(item["input_ids"])
        starts.add(copied[0])
        if copied[-1] == item["input_ids"][-2]:
            starts.add("last")
    assert len(starts) > 20
    assert {10, "last"} <= starts


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 97}, "97 examples"),
        ({"model": None}, "neither a model nor a tokenizer"),
        ({"keep": "best", "eval_steps": 3}, "a divisor of save_steps=4"),
    ],
)
def test_one_line_for_what_cannot_be(tmp_path, tiny_corpus, tiny_t5, changes, says):
    with pytest.raises(UserError) as error:
        sft(_config(tmp_path, tiny_corpus, **({"model": str(tiny_t5)} | changes)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tiny_corpus, tiny_t5, tiny_tokenizer):
    from transformers import AutoTokenizer

    larger = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    larger.add_tokens(["one", "more"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match="the model's embedding"):
        sft(_config(tmp_path / "out", tiny_corpus, model=str(tiny_t5), tokenizer=str(tmp_path / "larger")))
