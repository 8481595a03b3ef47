"""The stage's figures against what its own predictions say; KL against enumeration; the same after a kill."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq.evaluate import EvaluateConfig, evaluate, sequence_kl
from pipelines.seq2seq.generation import GenerationConfig


@pytest.fixture(scope="module")
def second_t5(tmp_path_factory, tiny_t5):
    """The tiny model with noise on its weights: another policy with the same tokenizer."""
    from pipelines.seq2seq.models import load_seq2seq

    folder = tmp_path_factory.mktemp("second") / "t5"
    shutil.copytree(tiny_t5, folder)
    model = load_seq2seq(str(folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def _config(output, corpus, systems, **changes) -> EvaluateConfig:
    fields = {
        "output_dir": str(output),
        "dataset": str(corpus),
        "systems": {name: str(path) for name, path in systems.items()},
        "max_source_length": 32,
        "max_target_length": 8,
        "precision": "fp32",
        "max_examples": 10,
        "shard_size": 4,
        "resamples": 200,
    }
    return validate(EvaluateConfig, fields | changes)


def test_figures_are_those_of_the_predictions(tmp_path, tiny_corpus, tiny_t5, second_t5):
    from rouge_score.rouge_scorer import RougeScorer

    metrics = evaluate(_config(tmp_path, tiny_corpus, {"sft": tiny_t5, "ppo": second_t5}, do_sample=True))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["evaluate/examples"] == 10
    assert list(lines[0]["outputs"]) == ["lead1", "name", "qualified_name", "random_summary", "sft", "ppo"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = {
        name: [
            {k: v.fmeasure * 100 for k, v in scorer.score_multi(line["references"], line["outputs"][name]).items()}
            for line in lines
        ]
        for name in lines[0]["outputs"]
    }
    for name, rows in scores.items():
        for kind in ("rouge1", "rouge2", "rougeL"):
            assert metrics[f"{name}/{kind}"] == pytest.approx(np.mean([row[kind] for row in rows]))
            assert metrics[f"{name}/{kind}_ci_low"] <= metrics[f"{name}/{kind}"] <= metrics[f"{name}/{kind}_ci_high"]
    gold = {name: np.array([np.mean(list(row.values())) for row in scores[name]]) for name in ("sft", "ppo")}
    for name in gold:
        np.testing.assert_allclose([line["gold"][name] for line in lines], gold[name])
    difference = gold["ppo"] - gold["sft"]
    assert metrics["ppo/gold_win_rate"] == pytest.approx(np.mean((difference > 1e-9) + 0.5 * (abs(difference) < 1e-9)))
    assert "sft/gold_win_rate" not in metrics
    assert "sft/kl" not in metrics
    assert metrics["ppo/kl"] > 0
    for baseline in ("lead1", "name", "qualified_name", "random_summary"):
        wanted = metrics["sft/rouge1"] - metrics[f"{baseline}/rouge1"]
        assert metrics[f"sft/rouge1_minus_{baseline}"] == pytest.approx(wanted)
    assert metrics["ppo/rouge1_minus_sft"] == pytest.approx(metrics["ppo/rouge1"] - metrics["sft/rouge1"])
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["ppo"]["do_sample"] is True
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_system_against_itself_ties(tmp_path, tiny_corpus, tiny_t5):
    config = _config(tmp_path, tiny_corpus, {"sft": tiny_t5, "same": tiny_t5}, baselines=False)
    metrics = evaluate(config)
    assert metrics["same/gold_win_rate"] == metrics["same/gold_win_rate_ci_high"] == 0.5
    assert metrics["same/kl"] == pytest.approx(0.0, abs=1e-5)
    assert not any(key.startswith("lead1/") for key in metrics)


def test_a_killed_run_ends_the_same(tmp_path, monkeypatch, tiny_corpus, tiny_t5, second_t5):
    import pipelines.seq2seq.generation as generation

    systems = {"sft": tiny_t5, "ppo": second_t5}
    whole = evaluate(_config(tmp_path / "whole", tiny_corpus, systems))
    generate, calls = generation.generate_summaries, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(generation, "generate_summaries", dying)
    config = _config(tmp_path / "cut", tiny_corpus, systems)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert evaluate(config) == whole
    assert len(calls) == 5 + 6 - 4  # two systems of three shards each, four of which had been written
    assert (tmp_path / "whole/predictions.jsonl").read_bytes() == (tmp_path / "cut/predictions.jsonl").read_bytes()


def _small_t5(seed: int):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.3
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight.mul_(2.0)
    return model


def test_kl_against_enumeration():
    """Every sequence over six tokens up to three long, ended by the end token or by the length limit."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    policy, reference = _small_t5(1), _small_t5(2)
    inputs = tokenizer(["a b c"], return_tensors="pt")
    sequences = [[*middle, 1] for n in range(3) for middle in itertools.product([0, 2, 3, 4, 5], repeat=n)] + [
        list(s) for s in itertools.product([0, 2, 3, 4, 5], repeat=3)
    ]
    policy.eval(), reference.eval()
    logs = []
    for model in (policy, reference):
        each = []
        for sequence in sequences:
            with torch.no_grad():
                logits = model(
                    input_ids=inputs.input_ids,
                    attention_mask=inputs.attention_mask,
                    decoder_input_ids=torch.tensor([[0, *sequence[:-1]]]),
                ).logits[0]
            each.append(logits.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None]).sum().item())
        logs.append(np.array(each))
    shares = np.exp(logs[0])
    assert shares.sum() == pytest.approx(1.0, abs=1e-5)
    exact = (shares * (logs[0] - logs[1])).sum()
    spread = math.sqrt((shares * (logs[0] - logs[1] - exact) ** 2).sum())
    policy.train()  # the estimate must silence dropout by itself
    draws = 6000
    settings = GenerationConfig(max_source_length=8, max_target_length=3, precision="fp32")
    (found,) = sequence_kl(policy, reference, tokenizer, ["a b c"], settings, samples=draws)
    assert exact > 0.1
    assert found == pytest.approx(exact, abs=4 * spread / math.sqrt(draws))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"systems": {}}, "there is nothing to measure"),
        ({"systems": {"ppo": "x"}}, "is not one of systems"),
        ({"systems": {"sft": "x", "lead1": "x"}}, "names a baseline"),
        ({"systems": {"sft": "/no/such/folder"}}, "no such file or folder"),
    ],
)
def test_one_line_for_what_cannot_be(tmp_path, tiny_corpus, changes, says):
    with pytest.raises(UserError) as error:
        _config(tmp_path, tiny_corpus, **changes)
    assert says in str(error.value)
