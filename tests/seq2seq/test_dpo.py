"""DPO on TRL's trainer: loss and gradient against the definition, references, LoRA, resuming, what is refused."""

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
import transformers
from preference_environment import LENGTHS, arguments, same_outcome, stage_settings, t5
from tiny_models import loud, save_pairs, tiny

from pipelines.errors import UserError
from pipelines.seq2seq.collators import tokenize_pairs
from pipelines.seq2seq.dpo import DPOStageConfig, dpo
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer, pair_log_probs
from pipelines.seq2seq.losses import dpo_loss, sequence_sum
from pipelines.seq2seq.training import last_checkpoint
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_corpus):
    return save_pairs(tmp_path_factory.mktemp("pairs") / "preferences", tiny_corpus)


@pytest.fixture(scope="module")
def rows(pairs):
    from datasets import load_from_disk

    return load_from_disk(str(pairs))["train"]


def first_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def settings(tiny_t5, pairs, output, **fields) -> DPOStageConfig:
    return stage_settings(DPOStageConfig, output, model=tiny_t5, preferences=pairs, **fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5, pairs):
    output = tmp_path_factory.mktemp("dpo")
    config = settings(tiny_t5, pairs, output)
    return config, output, dpo(config)


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
def test_first_loss_is_ln2_in_training_mode_with_dropout_configured(tiny_t5, rows, tokenizer, tmp_path, cached):
    model = t5(tiny_t5)
    assert model.config.dropout_rate > 0
    trainer = EncoderDecoderDPOTrainer(
        model, arguments(tmp_path, precompute_ref_log_probs=cached), rows, tokenizer, LENGTHS
    )
    assert (trainer.ref_model is None) == cached
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_logged_entropy_is_that_of_the_plain_models_distributions(tiny_t5, rows, tokenizer, tmp_path):
    """Of the policy as the step found it, at the tokens of both completions: far from ln V, where it says nothing."""
    model = loud(t5(tiny_t5), 1.0)
    plain = copy.deepcopy(model).eval()
    trainer = EncoderDecoderDPOTrainer(model, arguments(tmp_path, max_steps=1), rows, tokenizer, LENGTHS)
    collate, seen = trainer.data_collator, []
    trainer.data_collator = lambda examples: seen.append(collate(examples)) or seen[-1]
    trainer.train()
    batch = seen[0]
    with torch.no_grad():
        logits = plain(
            input_ids=batch["encoder_input_ids"].repeat(2, 1),
            attention_mask=batch["encoder_attention_mask"].repeat(2, 1),
            decoder_input_ids=batch["input_ids"][:, :-1],
        ).logits
    found = torch.distributions.Categorical(logits=logits).entropy()[batch["completion_mask"][:, 1:].bool()]
    assert 0.5 < found.mean() < math.log(len(tokenizer)) - 0.5
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(found.mean().item(), abs=1e-4)


def test_loss_and_gradient_are_those_of_the_paper(tiny_t5, rows, tokenizer, tmp_path):
    """∇L = −β σ(r̂_l − r̂_w)(∇ log π(y_w) − ∇ log π(y_l)) (Rafailov et al. 2023, section 4), away from the reference."""
    beta = 1.0
    trainer = EncoderDecoderDPOTrainer(
        t5(tiny_t5), arguments(tmp_path, precompute_ref_log_probs=True, beta=beta), rows, tokenizer, LENGTHS
    )
    model = trainer.model
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    mask = batch["completion_mask"][:, 1:]
    states = encode(model, batch["encoder_input_ids"], batch["encoder_attention_mask"])
    log_probs = sequence_log_probs(
        model, states, batch["encoder_attention_mask"], batch["input_ids"][:, 1:], mask, order="sample-major"
    )
    chosen, rejected = sequence_sum(log_probs, mask)
    reference = batch["ref_chosen_logps"][0], batch["ref_rejected_logps"][0]
    rewards = beta * (chosen - reference[0]).item(), beta * (rejected - reference[1]).item()
    assert abs(rewards[0] - rewards[1]) > 1e-2  # not at the reference, where every formula gives ln 2
    surprise = 1 / (1 + math.exp(rewards[0] - rewards[1]))
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(dpo_loss(chosen, rejected, *reference, beta=beta).item(), abs=1e-5)
    expected = -beta * surprise * (gradient(chosen) - gradient(rejected))
    torch.testing.assert_close(gradient(loss), expected, rtol=1e-3, atol=1e-5)


def test_cached_reference_log_probs_are_those_of_each_pair(tiny_t5, rows, tokenizer, tmp_path):
    trainer = EncoderDecoderDPOTrainer(
        t5(tiny_t5), arguments(tmp_path, precompute_ref_log_probs=True), rows, tokenizer, LENGTHS
    )
    tokenized, cut = tokenize_pairs(rows, tokenizer, LENGTHS)
    chosen, rejected = pair_log_probs(as_view(t5(tiny_t5)), tokenized, tokenizer, batch_size=5)
    assert trainer.train_dataset["ref_chosen_logps"] == pytest.approx(chosen.tolist(), abs=1e-4)
    assert trainer.train_dataset["ref_rejected_logps"] == pytest.approx(rejected.tolist(), abs=1e-4)
    assert cut["summaries"] == 0
    assert len(set(trainer.train_dataset["ref_chosen_logps"])) > 10


def test_bart_with_a_logits_bias_takes_its_first_steps(tiny_tokenizer, rows, tokenizer, tmp_path):
    config = tiny("bart").config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    trainer = EncoderDecoderDPOTrainer(
        model, arguments(tmp_path, precompute_ref_log_probs=False), rows, tokenizer, LENGTHS
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]


def test_a_view_that_scores_wrongly_is_caught_on_the_first_batch(tiny_t5, rows, tokenizer, tmp_path):
    trainer = EncoderDecoderDPOTrainer(
        t5(tiny_t5), arguments(tmp_path, precompute_ref_log_probs=True), rows, tokenizer, LENGTHS
    )
    trainer.model.__dict__["_view_scale"] = 0.0  # uniform logits: entropy ln V, and a loss that looks healthy
    with pytest.raises(RuntimeError, match="log-probabilities differ"):
        trainer.train()


def test_a_decoder_only_model_is_refused(rows, tokenizer, tmp_path):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2)
    )
    with pytest.raises(UserError, match="not an encoder-decoder"):
        EncoderDecoderDPOTrainer(model, arguments(tmp_path), rows, tokenizer, LENGTHS)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2 is not an encoder-decoder model") as caught:
        dpo(DPOStageConfig(model=str(tmp_path / "gpt2"), preferences="x", output_dir=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)


def test_the_stage_raises_chosen_over_rejected(trained, tiny_t5, pairs, tokenizer):
    _, output, metrics = trained
    assert metrics["dpo/accuracy"] > 0.8
    assert metrics["dpo/accuracy_ci_low"] <= metrics["dpo/accuracy"] <= metrics["dpo/accuracy_ci_high"]
    assert metrics["dpo/margin_ci_low"] > 0
    assert metrics["dpo/loss"] < math.log(2) - 0.01
    history = json.loads((output / "log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not any("num_tokens" in key for entry in history for key in entry)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(output)
    assert type(plain) is transformers.T5ForConditionalGeneration
    assert json.loads((output / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    generated = plain.generate(torch.tensor([[5, 6, 7, 1]]), max_new_tokens=4)
    assert generated.shape[0] == 1
    assert not any(path.name == "README.md" for path in output.rglob("*"))


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(trained, tiny_t5, pairs, tmp_path, cached):
    _, output, metrics = trained
    if not cached:
        output = tmp_path / "whole"
        metrics = dpo(settings(tiny_t5, pairs, output, precompute_ref_log_probs=False))
    # 96 pairs in batches of 16: checkpoint 8 lies in the middle of the second pass.
    kept = output / "checkpoints" / "checkpoint-8"
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    resumed = settings(tiny_t5, pairs, tmp_path / "again", precompute_ref_log_probs=cached)
    assert last_checkpoint(resumed).endswith(kept.name)
    assert dpo(resumed) == metrics
    assert same_outcome(output, tmp_path / "again")


def test_nothing_is_written_beside_the_data(trained, pairs):
    assert {path.name for path in pairs.rglob("*") if path.is_file()} == {
        "dataset_dict.json",
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
    }


def test_lora_trains_adapters_only_and_saves_a_merged_plain_model(tiny_t5, pairs, tmp_path):
    config = settings(tiny_t5, pairs, tmp_path / "out", lora_r=4, learning_rate=1e-2, max_steps=6, save_steps=3)
    metrics = dpo(config)
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["dpo/margin_ci_low"] > 0
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    before = t5(tiny_t5)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert any("EncDecAttention" in name for name in changed)
    assert not any("shared" in name or "lm_head" in name or "layer_norm" in name for name in changed)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert str(tiny_t5) not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    # Killed after half of it: the resumed run ends with the same weights.
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-3"
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    assert dpo(dataclasses.replace(config, output_dir=str(tmp_path / "again"))) == metrics
    assert same_outcome(tmp_path / "out", tmp_path / "again")


def test_impossible_combinations_are_named():
    common = {"model": "m", "preferences": "p"}
    for fields, what in (
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing"),
        ({"loss_type": "exo_pair"}, "label_smoothing"),
        ({"loss_type": "nca_pair", "f_divergence": "js_divergence"}, "f_divergence"),
    ):
        assert [p.what for p in DPOStageConfig(**common, **fields).problems()] == [what]
    for loss_type in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"):
        assert DPOStageConfig(**common, loss_type=loss_type, label_smoothing=0.1).problems() == []
