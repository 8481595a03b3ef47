"""The PPO trainer on tiny models: exact ratios, encode once, learning, exact resume."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_environment import VOCABULARY, StopAt, make_policy, make_trainer
from transformers import T5ForConditionalGeneration

from pipelines.seq2seq import ppo_trainer as module
from pipelines.seq2seq.view import as_view, encode


def record_compute_loss(trainer):
    """Keep what every loss saw."""
    seen, plain = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        with torch.no_grad():
            names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
            now = model(*(inputs[name] for name in names), temperature=trainer.args.temperature)
        seen.append((model.training, now["log_probs"], inputs))
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize("options", [{}, {"separate_critic": True}, {"temperature": 0.7}, {"lora": 4}])
def test_the_first_ratio_is_one_in_training_mode(tmp_path, options):
    """With a dropout of 0.3 in the configuration, and a reference equal to the policy."""
    trainer = make_trainer(tmp_path, rollouts=1, ppo_epochs=1, mini_batch_size=16, dropout=0.3, **options)
    seen = record_compute_loss(trainer)
    trainer.train()
    training, now, inputs = seen[0]
    assert training
    mask = inputs["completion_mask"].bool()
    assert (now - inputs["log_probs"])[mask].abs().max() < 1e-6
    assert (inputs["reference"] - inputs["log_probs"])[mask].abs().max() < 1e-6
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert trainer.model.config.dropout_rate == 0.3
    # After an optimizer step it is no longer one, or nothing was learned.
    later = [(n - i["log_probs"])[i["completion_mask"].bool()].abs().max() for _, n, i in seen[1:]]
    assert max(later) > 1e-4


def test_log_probs_are_the_plain_models(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=1)
    rollout = trainer.make_rollout(0)
    plain = make_policy()
    ids, mask = rollout["completion_ids"], rollout["completion_mask"]
    samples = trainer.args.samples_per_source
    with torch.no_grad():
        logits = plain.eval()(
            input_ids=rollout["source_ids"].repeat_interleave(samples, 0),
            attention_mask=rollout["source_mask"].repeat_interleave(samples, 0),
            labels=ids,
        ).logits
    expected = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1) * mask
    assert torch.allclose(rollout["log_probs"], expected, atol=1e-5)
    rows = trainer.args.sources_per_rollout * samples
    for name in ("completion_ids", "log_probs", "reference", "values", "advantages", "returns"):
        assert rollout[name].shape == (rows, mask.shape[1]), name
    assert rollout["source_ids"].shape[0] == trainer.args.sources_per_rollout
    real = rollout["advantages"][mask.bool()]
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float(real.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_source_is_encoded_once_for_all_its_completions(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=1, ppo_epochs=2, mini_batch_size=16, samples_per_source=4)
    trainer._checked = {"rollout", "batch"}  # checks against the plain model encode a source for each row
    encoded = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model.policy), ("reference", trainer.reference.model)):
        encoder = model.get_encoder()

        def count(module, args, kwargs, name=name):
            encoded[name] += len(kwargs["input_ids"])

        encoder.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    sources = trainer.args.sources_per_rollout
    # Sampling, scoring by the policy and its values share one pass; each epoch adds one.
    assert encoded == {"policy": sources * (1 + 2), "reference": sources}


def test_the_reward_rises(tmp_path):
    """Pay for one token: its count per completion must rise well above that of the first rollout."""
    trainer = make_trainer(
        tmp_path, rollouts=10, ppo_epochs=4, learning_rate=2e-2, sources_per_rollout=16, mini_batch_size=32
    )
    trainer.train()
    rewards = [entry["objective/proxy_reward"] for entry in trainer.state.log_history if "rollout" in entry]
    assert len(rewards) == 10
    assert sum(rewards[-3:]) / 3 > rewards[0] + 2.0
    last = [entry for entry in trainer.state.log_history if "rollout" in entry][-1]
    assert last["objective/kl"] > 0.5
    assert 0 < last["objective/entropy"] < math.log(VOCABULARY) - 0.5


def test_what_a_rollout_is_does_not_depend_on_how_it_is_computed(tmp_path):
    """Chunks of another size, and gradients in parts: the same completions, the same update."""
    plain = make_trainer(tmp_path, rollouts=2)
    parts = make_trainer(tmp_path, rollouts=2, rollout_batch_size=8, gradient_accumulation_steps=2)
    for trainer in (plain, parts):
        trainer.train()
    for name in ("completion_ids", "source_ids"):
        assert torch.equal(plain.rollout[name], parts.rollout[name]), name
    for one, other in zip(plain.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    first, second = ([e for e in t.state.log_history if "rollout" in e] for t in (plain, parts))
    for one, other in zip(first, second, strict=True):
        for name in set(one) - {"step", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_every_source_is_taken_once_in_a_pass(tmp_path):
    trainer = make_trainer(tmp_path, sources_per_rollout=6, mini_batch_size=12)
    number = len(trainer.train_dataset) // 6
    taken = [i for rollout in range(number) for i in trainer.sources_of(rollout)]
    assert len(taken) == len(set(taken)) == number * 6
    assert trainer.sources_of(0) != trainer.sources_of(number), "the next pass must be shuffled anew"


def test_an_epoch_is_left_when_the_policy_has_moved_too_far(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=1, ppo_epochs=4, learning_rate=5e-2, stop_kl=1e-3)
    seen = record_compute_loss(trainer)
    trainer.train()
    assert trainer.stopped
    assert 1 < len(seen) < trainer.args.steps_per_rollout
    assert trainer.state.global_step == trainer.args.steps_per_rollout
    # Steps without gradients must not move the weights: replay with the schedule cut there.
    moved = {name: p.clone() for name, p in trainer.model.named_parameters()}
    again = make_trainer(tmp_path, rollouts=1, ppo_epochs=4, learning_rate=5e-2, callbacks=[StopAt(len(seen) - 1)])
    again.train()
    for name, p in again.model.named_parameters():
        assert torch.equal(p, moved[name]), name


def test_training_ends_when_the_divergence_passes_the_limit(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=30, learning_rate=3e-2, ppo_epochs=4, kl_coefficient=0.0, max_kl=0.5)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rollout" in entry]
    assert len(entries) < 30
    assert entries[-1]["objective/kl"] > 0.5
    assert all(entry["objective/kl"] <= 0.5 for entry in entries[:-1])


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coefficient": 0.01, "kl_in": "loss", "kl_estimator": "k3"},
        {"scale_rewards": True, "reward_clip": 1.0, "missing_eos_penalty": 1.0, "value_clip_range": 0.2},
        {"gradient_checkpointing": True},
        {"value_learning_rate": 1e-2, "separate_critic": True, "whiten_advantages": False},
    ],
)
def test_options_train(tmp_path, options):
    trainer = make_trainer(tmp_path, rollouts=2, kl_target=1.0, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rollout" in entry]
    assert entries[0]["objective/kl_coefficient"] != entries[1]["objective/kl_coefficient"]
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("value_head.") for name in moved)
    assert any(name.startswith("critic.") for name in moved) == options.get("separate_critic", False)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert (1e-2 in rates) == ("value_learning_rate" in options)


@pytest.mark.parametrize("lora", [0, 2])
def test_an_encoder_that_is_not_trained_stays(tmp_path, lora):
    trainer = make_trainer(tmp_path, rollouts=1, train_encoder=False, learning_rate=1e-2, lora=lora)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert not any("encoder.block" in name for name in moved)
    assert any("decoder.block" in name for name in moved)


def test_a_checkpoint_is_a_plain_model_with_the_critic_beside_it(tmp_path):
    trainer = make_trainer(tmp_path / "run", rollouts=1, save_strategy="steps", save_steps=2, separate_critic=True)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    plain, report = T5ForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    assert (checkpoint / "value_head.safetensors").exists()
    assert (checkpoint / "critic" / "config.json").exists()
    other = make_trainer(tmp_path / "other", seed=1, separate_critic=True)
    other._load_from_checkpoint(str(checkpoint))
    saved = make_trainer(tmp_path / "again", rollouts=1, separate_critic=True, callbacks=[StopAt(2)])
    saved.train()
    for (name, one), two in zip(other.model.named_parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(plain.shared.weight, saved.model.policy.shared.weight)


def test_under_lora_a_separate_critic_is_a_plain_model_that_learns(tmp_path):
    """It begins as the policy, with what its adapters had learned; its folder is the plain class's."""
    policy = as_view(make_policy())
    adapters = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(tmp_path, policy=get_peft_model(policy, adapters), rollouts=1, separate_critic=True)
    critic, ids = trainer.model.critic, torch.tensor([[5, 6, 7, 1]])
    assert {name for name, _ in critic.named_parameters()} == {name for name, _ in make_policy().named_parameters()}
    assert all(p.requires_grad for p in critic.parameters())
    with torch.no_grad():
        began, base = (encode(model, ids, ids.ne(0)) for model in (critic, as_view(make_policy()).eval()))
        torch.testing.assert_close(began, encode(trainer.model.policy, ids, ids.ne(0)), rtol=0, atol=1e-5)
        assert (began - base).abs().max() > 1e-3
        trainer.model.value_head.linear.weight.normal_()  # at 0 nothing would flow back into the trunk
    trainer.train()
    trainer.model.save_critic(tmp_path)
    saved, report = T5ForConditionalGeneration.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not any(report.values()), report
    saved = as_view(saved).eval()
    with torch.no_grad():
        after = encode(critic, ids, ids.ne(0))
        torch.testing.assert_close(encode(saved, ids, ids.ne(0)), after, rtol=0, atol=1e-6)
    assert (after - began).abs().max() > 1e-4


def test_under_lora_the_reference_is_the_model_with_its_adapter_off(tmp_path):
    """Also once the adapter has moved: what the second rollout holds is what the model said before training."""
    trainer = make_trainer(tmp_path, rollouts=2, lora=4, learning_rate=3e-2)
    trainer.train()
    rollout, samples = trainer.rollout, trainer.args.samples_per_source
    names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
    source_ids, source_mask, ids, mask = (rollout[name] for name in names)
    with torch.no_grad():
        logits = (
            make_policy()
            .eval()(
                input_ids=source_ids.repeat_interleave(samples, 0),
                attention_mask=source_mask.repeat_interleave(samples, 0),
                labels=ids,
            )
            .logits
        )
        before = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1) * mask
        policy = trainer.model(source_ids, source_mask, ids, mask)["log_probs"]
    assert (policy - before).abs().max() > 1e-2  # with the adapter on it has moved
    torch.testing.assert_close(rollout["reference"], before, rtol=0, atol=1e-5)
    again = trainer.reference.log_probs(source_ids, source_mask, ids, mask)
    torch.testing.assert_close(again, before, rtol=0, atol=1e-5)
    kl = float((rollout["log_probs"] - before).sum(1).mean())
    assert abs(kl) > 1e-3
    assert trainer.record["objective/kl"] == pytest.approx(kl, abs=1e-4)


RESUME = {
    "rollouts": 3,
    "ppo_epochs": 2,
    "kl_target": 0.5,
    "kl_horizon": 100,
    "scale_rewards": True,
    "save_strategy": "steps",
    "save_steps": 3,
    "separate_critic": True,
}


def outcome(trainer) -> tuple[dict, list, str]:
    history = [entry for entry in trainer.state.log_history if "rollout" in entry]
    return trainer.model.state_dict(), history, trainer.samples.file.read_text()


@pytest.mark.parametrize("options", [{}, {"lora": 2, "separate_critic": False}, {"lora": 2}])
def test_resume_in_the_middle_of_a_rollouts_epochs_is_exact(tmp_path, options):
    """Four steps a rollout; stopped at step 6, saved at 3 and 6: step 7 needs the rollout that step 5 began."""
    settings = RESUME | options
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert whole.args.steps_per_rollout == 4
    stopped = make_trainer(tmp_path / "stopped", **settings, callbacks=[StopAt(7)])
    stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-6"
    with stopped.samples.file.open("a") as file:
        file.write('{"rollout": 2, "text": "cut by the ki')
    # Generators elsewhere must play no part.
    torch.manual_seed(12345)
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (weights, history, samples), (again, history_again, samples_again) = outcome(whole), outcome(resumed)
    assert weights.keys() == again.keys()
    for name in weights:
        assert torch.equal(weights[name], again[name]), name
    assert history == history_again
    assert samples == samples_again
    assert whole.kl_coefficient == resumed.kl_coefficient != whole.args.kl_coefficient


def test_too_few_sources_and_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fewer than sources_per_rollout"):
        make_trainer(tmp_path, sources_per_rollout=64, mini_batch_size=64)
    with pytest.raises(ValueError, match="mini_batch_size=12"):
        make_trainer(tmp_path, mini_batch_size=12)
    with pytest.raises(ValueError, match="processes"):
        make_trainer(tmp_path, samples_per_source=4, mini_batch_size=4, gradient_accumulation_steps=2)


def test_a_policy_gone_to_nan_is_said_in_one_line(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=1)
    trainer.model.policy.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(module.UserError, match=r"learning_rate=.*NaN"):
        trainer.train()
