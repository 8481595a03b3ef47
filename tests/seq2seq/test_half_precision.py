"""DPO and PPO under bf16 autocast: sound first numbers, fp32 weights and log-probabilities, and they still learn."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_environment import make_trainer
from preference_environment import LENGTHS, arguments, t5
from tiny_models import save_pairs
from transformers import AutoTokenizer, T5ForConditionalGeneration

from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.share import shipped


@pytest.fixture(autouse=True)
def precision_stays_here():
    """Nothing that comes after is done in bf16 too; Accelerate's own state is for the next trainer to reset."""
    yield
    assert not torch.is_autocast_enabled("cpu")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_corpus):
    from datasets import load_from_disk

    return load_from_disk(str(save_pairs(tmp_path_factory.mktemp("pairs") / "preferences", tiny_corpus)))["train"]


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
def test_dpo_begins_at_ln2_and_learns(tiny_t5, rows, tokenizer, tmp_path, cached):
    given = arguments(tmp_path, bf16=True, max_steps=8, learning_rate=5e-3, precompute_ref_log_probs=cached)
    trainer = EncoderDecoderDPOTrainer(t5(tiny_t5), given, rows, tokenizer, LENGTHS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3)
    assert losses[-1] < losses[0] - 0.02
    entropy = trainer.state.log_history[0]["entropy"]
    assert 0 < entropy < math.log(len(tokenizer)) - 1e-3
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_trained_model_passes_the_check_of_its_first_batch(rows, tmp_path):
    """Trained weights are far enough from zero that bf16's rounding is seen: the check must be made in bf16 too."""
    folder = shipped("genalign:t5-docstrings")
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    given = arguments(tmp_path, bf16=True, max_steps=1)
    trainer = EncoderDecoderDPOTrainer(model, given, rows, AutoTokenizer.from_pretrained(folder), LENGTHS)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"separate_critic": True}])
def test_ppos_first_ratio_is_near_one_and_the_reward_rises(tmp_path, options):
    trainer = make_trainer(
        tmp_path, bf16=True, rollouts=8, ppo_epochs=4, learning_rate=2e-2, sources_per_rollout=16, mini_batch_size=32,
        **options,
    )  # fmt: skip
    gaps, plain = [], trainer.compute_loss

    def compute_loss(model, inputs, *given, **others):
        with torch.no_grad():
            names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
            now = model(*(inputs[name] for name in names))["log_probs"]
        assert now.dtype == inputs["log_probs"].dtype == torch.float32
        gaps.append(float((now - inputs["log_probs"]).abs().max()))
        return plain(model, inputs, *given, **others)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert gaps[0] < 0.03  # the ratio of every token of the first mini-batch lies within 3 % of one
    entries = [entry for entry in trainer.state.log_history if "rollout" in entry]
    assert entries[0]["objective/kl"] == pytest.approx(0, abs=0.02)
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert entries[-1]["objective/proxy_reward"] > entries[0]["objective/proxy_reward"] + 1
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
