"""The PPO stage on a tiny corpus: what it writes, what it returns, what it refuses."""

import json

import pytest
import torch
from transformers import T5ForConditionalGeneration

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.reporting.run import Stage
from pipelines.reporting.sections.ppo import samples_table
from pipelines.seq2seq.models import load_tokenizer
from pipelines.seq2seq.ppo import PPOConfig, ppo
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs


@pytest.fixture
def options(tiny_corpus, tiny_t5, tmp_path):
    return {
        "dataset": str(tiny_corpus),
        "model": str(tiny_t5),
        "output_dir": str(tmp_path / "ppo"),
        "reward": "rouge",
        "rollouts": 3,
        "sources_per_rollout": 8,
        "samples_per_source": 2,
        "mini_batch_size": 8,
        "max_source_length": 32,
        "max_target_length": 8,
        "precision": "fp32",
        "save_steps": 2,
        "report_to": "none",
    }


def test_the_stage_writes_a_model_logs_and_samples(options, tiny_t5, tmp_path):
    (tmp_path / "ppo").mkdir()
    metrics = ppo(validate(PPOConfig, options | {"reward": ["rouge", "length"], "reward_weights": [0.1, 1.0]}))
    folder = tmp_path / "ppo"
    wanted = {"train_proxy_reward", "train_kl", "train_gold", "train_length", "rollouts", "truncated_sources"}
    assert set(metrics) == {f"ppo/{name}" for name in wanted}
    assert metrics["ppo/rollouts"] == 3
    history = json.loads((folder / "log_history.json").read_text())
    assert [entry["rollout"] for entry in history] == [0, 1, 2]
    for name in (
        *("objective/proxy_reward", "objective/gold", "objective/kl", "objective/kl_coefficient", "objective/entropy"),
        *("objective/length", "policy/clip_fraction", "policy/ratio", "policy/approx_kl", "policy/loss"),
        *("value/loss", "value/explained_variance", "reward/rouge", "reward/length", "step"),
    ):
        assert all(isinstance(entry[name], int | float) for entry in history), name
    assert metrics["ppo/train_proxy_reward"] == history[-1]["objective/proxy_reward"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["rollout"] for row in samples] == [r for r in range(3) for _ in range(4)]
    assert set(samples[0]) == {"rollout", "id", "document", "text", "reward", "gold", "kl"}
    table = samples_table(Stage("ppo", folder, {}))
    assert table.columns == ["Rollout", "Source", "Sample", "Proxy reward", "Gold score", "KL, nats"]
    shown = [row for row in samples if row["rollout"] in (0, 2)]
    assert [row[:3] for row in table.rows] == [
        [str(r["rollout"] + 1), r["document"], r["text"] or "(nothing)"] for r in shown
    ]
    assert [row[5] for row in table.rows] == [f"{r['kl']:.2f}" for r in shown]
    assert all(abs(row["kl"]) < 1e-5 for row in samples[:4])  # the first rollout is the reference's
    assert any(abs(row["kl"]) > 1e-3 for row in samples[4:])
    trained = T5ForConditionalGeneration.from_pretrained(folder)
    before = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    assert not torch.equal(trained.shared.weight, before.shared.weight)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(tiny_t5)).get_vocab()
    assert not list(folder.glob("*.bin")), "no pickle in what is handed on"


def test_two_runs_are_the_same(options, tmp_path):
    found = [ppo(validate(PPOConfig, options | {"output_dir": str(tmp_path / name)})) for name in ("one", "two")]
    assert found[0] == found[1]
    for name in ("model.safetensors", "log_history.json", "samples.jsonl", "value_head.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_adapters_are_merged_and_kept(options, tiny_t5, tmp_path):
    ppo(validate(PPOConfig, options | {"lora_r": 2, "learning_rate": 1e-2, "rollouts": 2, "separate_critic": True}))
    folder = tmp_path / "ppo"
    critic, report = T5ForConditionalGeneration.from_pretrained(folder / "critic", output_loading_info=True)
    assert not any(report.values()), report
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert str(tiny_t5) not in (folder / "adapter" / "adapter_config.json").read_text()
    merged = as_view(T5ForConditionalGeneration.from_pretrained(folder)).eval()
    before = as_view(T5ForConditionalGeneration.from_pretrained(tiny_t5)).eval()
    assert torch.equal(merged.shared.weight, before.shared.weight)
    assert not torch.equal(critic.shared.weight, before.shared.weight)  # it has no adapters: all its weights learn
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        scores = [
            sequence_log_probs(m, encode(m, ids, ids.ne(0)), ids.ne(0), ids, torch.ones_like(ids))
            for m in (merged, before)
        ]
    assert not torch.allclose(*scores)


def test_all_impossible_combinations_show_at_once(options):
    wrong = {
        "mini_batch_size": 6,
        "reward_weights": [1.0, 2.0],
        "epochs": 5.0,
        "adaptive_kl": True,
        "kl_coefficient": 0.0,
    }
    with pytest.raises(UserError) as error:
        validate(PPOConfig, options | wrong)
    named = {problem.what for problem in error.value.problems}
    assert named == {"mini_batch_size", "reward_weights", "epochs", "kl_coefficient"}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["reward", "loss"])
def test_every_estimator_goes_into_the_reward_and_into_the_loss(options, estimator, place):
    config = validate(PPOConfig, options | {"kl_in": place, "kl_estimator": estimator})
    assert (config.kl_in, config.kl_estimator) == (place, estimator)


def test_fewer_documents_than_a_rollout_takes(options):
    settings = options | {"sources_per_rollout": 200, "mini_batch_size": 8}
    with pytest.raises(UserError, match=r"dataset=96 training documents: a rollout takes 200"):
        ppo(validate(PPOConfig, settings))
