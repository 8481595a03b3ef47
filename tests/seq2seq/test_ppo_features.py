"""What each option of PPO does to rewards, losses and gradients, against the plain model and arithmetic by hand."""

import math

import pytest
import torch
from ppo_environment import VOCABULARY, count_w5, make_policy, make_trainer

from pipelines.seq2seq.losses import kl_estimate, masked_mean

# Nothing but the score: one discount, no baseline (the value head begins at 0), no price, no whitening.
BARE = {"kl_coefficient": 0.0, "gamma": 1.0, "lam": 1.0, "whiten_advantages": False}


def scores_of(trainer, rollout) -> torch.Tensor:
    """(R,) what the toy reward gives each completion of a rollout."""
    texts = trainer.processing_class.batch_decode(rollout["completion_ids"].tolist(), skip_special_tokens=True)
    return torch.tensor(count_w5(None, texts, None))


def every_return(rollout, wanted: torch.Tensor) -> bool:
    """Whether the return of every token is its completion's."""
    mask = rollout["completion_mask"].bool()
    return torch.allclose(rollout["returns"][mask], wanted[:, None].expand(mask.shape)[mask], atol=1e-5)


def missing_end(rollout) -> torch.Tensor:
    """(R,) whether a completion was cut before its end token."""
    return (rollout["completion_ids"] * rollout["completion_mask"] == 1).sum(1) == 0


def test_without_options_a_completion_is_worth_its_score(tmp_path):
    trainer = make_trainer(tmp_path, **BARE)
    rollout = trainer.make_rollout(0)
    scores = scores_of(trainer, rollout)
    assert scores.max() > 0
    assert every_return(rollout, scores)


def test_a_missing_end_is_charged_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, **BARE, missing_eos_penalty=0.75)
    rollout = trainer.make_rollout(0)
    cut = missing_end(rollout)
    assert 0 < cut.sum() < len(cut)
    assert every_return(rollout, scores_of(trainer, rollout) - 0.75 * cut)
    assert trainer.record["objective/ended"] == pytest.approx(1 - float(cut.float().mean()))
    assert trainer.record["objective/proxy_reward"] == pytest.approx(float(scores_of(trainer, rollout).mean()))


def test_scaled_scores_are_divided_by_the_deviation_of_all_seen(tmp_path):
    trainer = make_trainer(tmp_path, **BARE, scale_rewards=True)
    seen = torch.empty(0)
    for number in range(3):
        rollout = trainer.make_rollout(number)
        scores = scores_of(trainer, rollout)
        seen = torch.cat([seen, scores])
        assert every_return(rollout, scores / seen.std())


@pytest.mark.parametrize("scaled", [False, True])
def test_scores_are_clipped_last_of_all(tmp_path, scaled):
    """After the penalty and after the scaling."""
    trainer = make_trainer(tmp_path, **BARE, missing_eos_penalty=1.0, scale_rewards=scaled, reward_clip=0.4)
    rollout = trainer.make_rollout(0)
    charged = scores_of(trainer, rollout) - 1.0 * missing_end(rollout)
    wanted = charged / charged.std() if scaled else charged
    assert wanted.min() < -0.4
    assert wanted.max() > 0.4
    assert every_return(rollout, wanted.clamp(-0.4, 0.4))


def moved(trainer, size: float = 0.3) -> None:
    """Take the policy away from the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_in_the_reward_is_charged_token_by_token(tmp_path, estimator):
    trainer = make_trainer(tmp_path, **BARE | {"kl_coefficient": 0.3}, kl_estimator=estimator)
    moved(trainer)
    rollout = trainer.make_rollout(0)
    mask = rollout["completion_mask"].bool()
    plain, tokens = make_policy().eval(), rollout["completion_ids"]
    with torch.no_grad():
        logits = plain(
            input_ids=rollout["source_ids"].repeat_interleave(4, 0),
            attention_mask=rollout["source_mask"].repeat_interleave(4, 0),
            labels=tokens,
        ).logits
    reference = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    charged = 0.3 * kl_estimate(rollout["log_probs"], reference, estimator) * mask
    assert charged.abs().max() > 0.05
    # What is still to come: the score, less the price of this token and of those after it.
    wanted = scores_of(trainer, rollout)[:, None] - charged.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rollout["returns"][mask], wanted[mask], rtol=0, atol=1e-4)
    kl = (rollout["log_probs"] - reference) * mask
    assert trainer.record["objective/kl"] == pytest.approx(float(kl.sum(1).mean()), abs=1e-4)


def losses(trainer, rollout, **fields) -> torch.Tensor:
    """The loss of the first mini-batch under other arguments."""
    for name, value in fields.items():
        setattr(trainer.args, name, value)
    trainer.rollout = rollout
    return trainer.compute_loss(trainer.model, trainer.micro_batch(0))


def plain_entropy(trainer, batch) -> float:
    """Mean entropy of the policy's distributions at the real tokens of a batch, by the plain class's forward."""
    policy, mask = trainer.model.policy, batch["completion_mask"]
    with torch.no_grad():
        logits = (
            type(policy)
            ._plain_class.forward(
                policy,
                input_ids=batch["source_ids"].repeat_interleave(4, 0),
                attention_mask=batch["source_mask"].repeat_interleave(4, 0),
                labels=batch["completion_ids"],
            )
            .logits
        )
    found = logits.log_softmax(-1)
    return float(masked_mean(-(found.exp() * found).sum(-1), mask))


def test_the_logged_entropy_is_that_of_the_plain_models_distributions(tmp_path):
    """Of the policy that sampled, at the sampled tokens: far from ln V, where it says nothing."""
    trainer = make_trainer(tmp_path, rollouts=1)
    moved(trainer, 1.5)
    expected = plain_entropy(trainer, trainer.make_rollout(0))
    assert 0.3 < expected < math.log(VOCABULARY) - 0.3
    trainer.train()
    assert trainer.state.log_history[0]["objective/entropy"] == pytest.approx(expected, abs=1e-5)


def test_the_entropy_bonus_is_the_entropy_of_the_policy(tmp_path):
    trainer = make_trainer(tmp_path)
    moved(trainer, 1.5)
    rollout = trainer.make_rollout(0)
    without, bonus = (losses(trainer, rollout, entropy_coefficient=c) for c in (0.0, 0.1))
    expected = plain_entropy(trainer, trainer.micro_batch(0))
    assert 0.3 < expected < 2.8  # neither certain nor uniform over the 20 tokens
    assert float(without - bonus) == pytest.approx(0.1 * expected, abs=1e-5)


def test_the_entropy_bonus_keeps_the_policy_undecided(tmp_path):
    found = []
    for coefficient in (0.0, 1.0):
        options = {"sources_per_rollout": 16, "mini_batch_size": 32, "kl_coefficient": 0.0}
        trainer = make_trainer(
            tmp_path, rollouts=10, ppo_epochs=4, learning_rate=2e-2, entropy_coefficient=coefficient, **options
        )
        trainer.train()
        found.append([e["objective/entropy"] for e in trainer.state.log_history if "rollout" in e])
    assert found[0][0] == pytest.approx(found[1][0])  # the same first rollout
    assert found[1][-1] > found[0][-1] + 0.3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_in_the_loss_has_the_reference_and_the_coefficient(tmp_path, estimator):
    trainer = make_trainer(tmp_path, kl_coefficient=0.0)
    rollout = trainer.make_rollout(0)
    without = losses(trainer, rollout, kl_in="reward")
    moved(trainer)
    apart = losses(trainer, rollout, kl_in="reward")
    assert float((apart - without).abs().detach()) > 1e-3
    trainer.record["objective/kl_coefficient"] = 0.4
    charged = losses(trainer, rollout, kl_in="loss", kl_estimator=estimator)
    batch = trainer.micro_batch(0)
    names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
    with torch.no_grad():
        now = trainer.model(*(batch[name] for name in names))["log_probs"]
    penalty = kl_estimate(now, batch["reference"], estimator)
    if estimator == "k1":
        ratio = (now - batch["log_probs"]).exp()
        assert (ratio - 1).abs().max() > 0.05
        penalty = ratio * penalty
    penalty = float(masked_mean(penalty, batch["completion_mask"]))
    assert abs(penalty) > 0.05
    assert float((charged - apart).detach()) == pytest.approx(0.4 * penalty, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_in_the_loss_holds_the_policy(tmp_path, estimator):
    """A price that leaves little room: the reward still pulls, and the policy goes less far than without it."""
    options = {"rollouts": 8, "sources_per_rollout": 16, "mini_batch_size": 32, "ppo_epochs": 4, "learning_rate": 2e-2}
    found = []
    for coefficient in (0.0, 3.0):
        fields = options | {"kl_in": "loss", "kl_estimator": estimator, "kl_coefficient": coefficient}
        trainer = make_trainer(tmp_path, **fields)
        trainer.train()
        found.append(trainer.record["objective/kl"])
    assert found[0] > 0.5
    assert found[1] < 0.5 * found[0]


def policy_gradient(trainer, rollout, coefficient: float) -> torch.Tensor:
    trainer.model.zero_grad()
    losses(trainer, rollout, value_coefficient=coefficient).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("separate", [False, True])
def test_the_value_loss_reaches_the_policy_only_where_it_shares_its_trunk(tmp_path, separate):
    trainer = make_trainer(tmp_path, separate_critic=separate)
    with torch.no_grad():
        trainer.model.value_head.linear.weight.fill_(0.5)  # at 0 nothing would flow back through it
    rollout = trainer.make_rollout(0)
    gap = policy_gradient(trainer, rollout, 1.0) - policy_gradient(trainer, rollout, 0.0)
    assert (gap.abs().max() < 1e-7) == separate
    losses(trainer, rollout, value_coefficient=1.0).backward()
    trunk = trainer.model.critic.get_encoder() if separate else trainer.model.policy.get_encoder()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trunk.parameters())


def test_a_separate_critic_does_not_move_with_the_policy(tmp_path):
    trainer = make_trainer(tmp_path, separate_critic=True)
    with torch.no_grad():
        trainer.model.value_head.linear.weight.normal_()
    rollout = trainer.make_rollout(0)
    names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
    with torch.no_grad():
        before = trainer.model(*(rollout[name] for name in names))
        moved(trainer)
        after = trainer.model(*(rollout[name] for name in names))
    assert torch.equal(before["values"], after["values"])
    assert before["values"].std() > 0.01
    assert not torch.allclose(before["log_probs"], after["log_probs"], atol=1e-3)


def test_an_epoch_ends_at_the_divergence_that_is_asked_for(tmp_path):
    """``stop_kl`` is compared with the mean of the mini-batch that was just trained on, nats a token."""
    limit = 2e-3
    trainer = make_trainer(tmp_path, rollouts=1, ppo_epochs=6, learning_rate=2e-2, stop_kl=limit)
    found, plain = [], trainer.compute_loss

    def compute_loss(model, inputs, *arguments, **options):
        names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
        with torch.no_grad():
            now = model(*(inputs[name] for name in names))["log_probs"]
        found.append(float(masked_mean(kl_estimate(inputs["log_probs"], now, "k3"), inputs["completion_mask"])))
        return plain(model, inputs, *arguments, **options)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert trainer.stopped
    assert found[-1] > limit
    assert all(kl <= limit for kl in found[:-1])
    assert 1 < len(found) < trainer.args.steps_per_rollout
