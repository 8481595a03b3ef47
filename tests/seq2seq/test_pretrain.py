"""Pretraining as a stage: it learns, resumes exactly, keeps the best, and says what is wrong with its input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq.pretrain import PretrainConfig, pretrain, sentinel_ids
from tests.chain.test_whole import documented

FIELDS = {
    "max_source_length": 32,
    "max_target_length": 12,
    "batch_size": 8,
    "optimizer": "adafactor",
    "learning_rate": 2e-2,
    "warmup_ratio": 0.1,
    "lr_scheduler": "inverse_sqrt",
    "logging_steps": 4,
    "save_steps": 4,
    "max_steps": 12,
    "eval_examples": 16,
    "rouge_examples": 8,
    "precision": "fp32",
    "report_to": "none",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "raw_column": "words",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_corpus) -> Path:
    """Documents of two to six of the corpus's sentences, one a line."""
    from datasets import load_from_disk

    sentences = [f"{row['summary']} {row['references'][1]}" for row in load_from_disk(str(tiny_corpus))["train"]]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for index in range(200):
            chosen = [sentences[(7 * index + k * k) % len(sentences)] for k in range(2 + index % 5)]
            out.write(json.dumps({"words": " ".join(chosen)}) + "\n")
    return file


@pytest.fixture
def configure(tmp_path, texts, tiny_corpus, tiny_tokenizer):
    """Makes a configuration that writes into a folder of its own."""

    def make(name: str = "out", **changes) -> PretrainConfig:
        given = {"text": str(texts), "pairs": str(tiny_corpus), "tokenizer": str(tiny_tokenizer)}
        return validate(PretrainConfig, FIELDS | given | {"output_dir": str(tmp_path / name)} | changes)

    return make


def _history(config: PretrainConfig) -> list[dict]:
    return json.loads((Path(config.output_dir) / "log_history.json").read_text())


def _weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model.safetensors")


def test_held_out_losses_fall_and_the_folder_is_a_plain_model(configure, root):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    config = configure(
        max_steps=80, logging_steps=20, save_steps=40, eval_steps=40, copy_steps=10, save_dtype="bf16", batch_size=16
    )
    metrics = pretrain(config)
    history = _history(config)
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [40, 80, 80]
    for name in ("span", "copy", "gap", "supervised"):
        for measure in (f"eval_{name}_loss", f"eval_{name}_bits_per_byte"):
            assert evaluations[1][measure] < evaluations[0][measure], measure
    assert evaluations[1]["eval_loss"] < 0.92 * evaluations[0]["eval_loss"]
    assert metrics["pretrain/rouge1"] > 20
    assert metrics["pretrain/steps"] == 80
    tokens = [entry["tokens"] for entry in history if "tokens" in entry]
    assert tokens == sorted(tokens)
    assert metrics["pretrain/tokens"] == tokens[-1]
    assert not any("per_second" in key for entry in history for key in entry)
    # 16 rows of 32 and, of the packed objective, a target: more is not to be had.
    assert 80 * 16 * 20 < tokens[-1] < 80 * 16 * (32 + 12)

    model = T5ForConditionalGeneration.from_pretrained(config.output_dir)
    AutoTokenizer.from_pretrained(config.output_dir)
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in _weights(config).values()} == {torch.bfloat16}
    assert metrics["pretrain/parameters"] == sum(p.numel() for p in model.parameters())
    assert model.generation_config.max_new_tokens == 12
    for key in metrics:
        assert any(pattern.fullmatch(key) for pattern in documented(root)), key
    names = {path.name for path in Path(config.output_dir).iterdir()}
    assert "training_args.bin" not in names

    # What is said is of the weights that were saved: going on from them for no time finds the same.
    again = pretrain(configure("again", model=config.output_dir, tokenizer=None, max_steps=1, learning_rate=1e-12))
    for name in ("pretrain/span_loss", "pretrain/supervised_loss", "pretrain/gap_bits_per_byte", "pretrain/rouge1"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)


def test_losses_are_nats_a_token_of_each_objective(configure, texts, tiny_corpus):
    """The mean loss is that of the objectives by their weights; the supervised one is the Trainer's definition."""
    from pipelines.corpus import load_corpus
    from pipelines.corpus.fields import CorpusFields
    from pipelines.seq2seq.models import load_seq2seq, load_tokenizer

    config = configure(max_steps=4, span_weight=3.0, gap_weight=0, copy_weight=0, supervised_weight=1.0)
    metrics = pretrain(config)
    expected = (3 * metrics["pretrain/span_loss"] + metrics["pretrain/supervised_loss"]) / 4
    assert metrics["pretrain/eval_loss"] == pytest.approx(expected)
    assert "pretrain/copy_loss" not in metrics
    model, tokenizer = load_seq2seq(config.output_dir).eval(), load_tokenizer(config.output_dir)
    rows = load_corpus(CorpusFields(dataset=str(tiny_corpus)))["validation"].to_list()
    rows = [rows[i * len(rows) // 16] for i in range(16)]
    nats = tokens = size = 0
    for row in rows:
        source = tokenizer(row["document"])["input_ids"]
        source = source if len(source) <= 32 else [*source[:31], tokenizer.eos_token_id]
        labels = torch.tensor([tokenizer(row["summary"])["input_ids"][:12]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([source]), labels=labels).loss.item()
        nats, tokens, size = nats + loss * labels.numel(), tokens + labels.numel(), size + len(row["summary"].encode())
    assert metrics["pretrain/supervised_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    bits = nats / torch.log(torch.tensor(2.0)).item() / size
    assert metrics["pretrain/supervised_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("scheduler", ["cosine", "inverse_sqrt"])
def test_adamw_learns_from_a_smaller_initialization(configure, scheduler):
    changes = {"optimizer": "adamw", "lr_scheduler": scheduler, "learning_rate": 3e-2, "initializer_factor": 0.3}
    config = configure(max_steps=40, logging_steps=10, save_steps=40, feed_forward_proj="gated-gelu", **changes)
    pretrain(config)
    losses = [entry["loss"] for entry in _history(config) if "loss" in entry]
    rates = [entry["learning_rate"] for entry in _history(config) if "learning_rate" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert rates == sorted(rates, reverse=True)  # logged after the warm-up


@pytest.mark.parametrize("stop", [6, 9])
def test_resume_is_exact(configure, monkeypatch, stop):
    """Cut off in the copy phase or after it; two batches a step; the best weights so far are kept through it."""
    from transformers import Trainer

    changes = {"copy_steps": 7, "gradient_accumulation": 2, "keep": "best", "best": "loss", "dropout": 0.2}
    whole, cut = configure("whole", **changes), configure("cut", **changes)
    expected = pretrain(whole)

    class Killed(Exception):
        pass

    plain, left = Trainer.training_step, 2 * stop

    def training_step(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(Killed):
            pretrain(cut)
    assert (Path(cut.output_dir) / "checkpoints" / f"checkpoint-{stop // 4 * 4}" / "complete").exists()
    assert pretrain(cut) == expected
    assert _history(cut) == _history(whole)
    first, second = _weights(whole), _weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_best_weights_are_kept(configure):
    """A rate that ruins the model after its first evaluations: what is kept is what was best."""
    changes = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "best": "loss", "max_steps": 12, "learning_rate": 3.0}
    best, last = configure("best", keep="best", **changes), configure("last", **changes, eval_steps=4)
    kept, ended = pretrain(best), pretrain(last)
    losses = [entry["eval_loss"] for entry in _history(last) if "eval_loss" in entry][:-1]
    assert min(losses) < losses[-1]
    assert kept["pretrain/eval_loss"] == pytest.approx(min(losses))
    assert ended["pretrain/eval_loss"] == pytest.approx(losses[-1])


def test_steps_follow_from_epochs(configure):
    weights = {"span_weight": 0, "copy_weight": 0, "gap_weight": 0}
    metrics = pretrain(configure(max_steps=-1, epochs=1.5, **weights))  # 96 pairs, 8 a step
    assert metrics["pretrain/steps"] == 18
    assert metrics["pretrain/supervised_passes"] == 1.5


def _without_sentinels(folder: Path, source: Path) -> str:
    shutil.copytree(source, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<extra_id_", "<other_id_"))
    return str(folder)


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


WRONG = {
    "all weights 0": (
        {"span_weight": 0, "copy_weight": 0, "gap_weight": 0, "supervised_weight": 0},
        "span_weight=0.0: all four weights are 0",
    ),
    "a negative weight": ({"gap_weight": -1}, "gap_weight=-1"),
    "copy steps without copying": ({"copy_weight": 0, "copy_steps": 5}, "copy_steps=5: copy_weight is 0"),
    "no model and no tokenizer": ({"tokenizer": None}, "neither a model nor a tokenizer"),
    "no sentinels": (
        lambda tmp, tok: {"tokenizer": _without_sentinels(tmp / "bare", tok)},
        "it has no sentinels",
    ),
    "more spans than sentinels": (
        {"max_source_length": 512, "mean_span": 1.0, "noise_density": 0.5},
        "max_source_length=512: a row has 255 hidden spans, the tokenizer 100 sentinels",
    ),
    "no text": (lambda tmp, tok: {"text": str(tmp / "none.jsonl")}, "no such file"),
    "an empty folder": (lambda tmp, tok: {"text": str(tmp)}, "text="),
    "an empty file": (lambda tmp, tok: {"text": _write(tmp / "a.jsonl", "")}, "text="),
    "another column": ({"raw_column": "wrds"}, "wrds"),
    "pairs wanted, none given": ({"pairs": None}, "supervised_weight=1.0: there are no documents with summaries"),
    "best ROUGE without pairs": (
        {"pairs": None, "supervised_weight": 0, "keep": "best"},
        "best=rouge: there are no documents with summaries",
    ),
    "best ROUGE, none measured": ({"keep": "best", "rouge_examples": 0}, "rouge_examples=0"),
    "evaluations beside the saves": ({"keep": "best", "eval_steps": 3}, "a divisor of save_steps=4"),
    "a batch beyond the text": ({"batch_size": 97, "span_weight": 0, "copy_weight": 0}, "less than one batch of"),
    "a prefix that fills the source": ({"copy_prefix": "read " * 40}, "copy_prefix=read read"),
    "a scale for the noise": ({"noise_density": 1.5}, "noise_density=1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_for_what_cannot_be(tmp_path, configure, tiny_tokenizer, case):
    changes, says = WRONG[case]
    before = tmp_path / "before"
    before.mkdir()
    if callable(changes):
        changes = changes(before, tiny_tokenizer)
    with pytest.raises(UserError) as error:
        pretrain(configure(**changes))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_text_too_short_for_a_gap(tmp_path, configure):
    file = _write(tmp_path / "short.jsonl", "".join(json.dumps({"words": f"file {i}"}) + "\n" for i in range(40)))
    with pytest.raises(UserError, match="0 examples of the objective gap; give more text, or gap_weight=0"):
        pretrain(configure(text=file))


def test_sentinels_are_found(tiny_tokenizer):
    from pipelines.seq2seq.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_tokenizer))
    ids = sentinel_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == [f"<extra_id_{i}>" for i in range(100)]
