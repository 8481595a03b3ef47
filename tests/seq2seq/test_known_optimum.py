"""Where all completions can be enumerated, every method must end at π* ∝ π_ref e^{r/β}."""

import math

import pytest
import torch

from pipelines.seq2seq.enumerable import PAD, all_lists, all_pairs, divergence, make_world
from pipelines.seq2seq.known_optimum import (
    Problem,
    expected_dpo_loss,
    regularized_reward_loss,
    token_divergence_optimum,
    train_dpo,
    train_exactly,
    train_grpo,
    train_listwise,
    train_ppo,
)
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs


@pytest.fixture(scope="module")
def problem():
    return Problem(make_world(vocabulary=4, length=2, sources=2, spread=1.5))


@pytest.fixture(scope="module")
def larger():
    return Problem(make_world(vocabulary=4, length=3, sources=2, spread=1.5))


@pytest.mark.parametrize("name", ["problem", "larger"])
def test_the_completions_are_all_there_are(name, request):
    problem = request.getfixturevalue(name)
    world = problem.world
    assert len(world.completions) == sum(3**size for size in range(world.length)) + 3**world.length
    assert len(set(map(tuple, world.completions))) == len(world.completions)
    torch.testing.assert_close(problem.reference.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert problem.first_distance > 0.3  # or there would be nothing to learn
    plain = problem.policy().eval()
    for number in (0, 5, len(world.completions) - 1):
        target = world.completions[number]
        with torch.no_grad():
            logits = plain(
                input_ids=torch.tensor([world.sources[1]]), decoder_input_ids=torch.tensor([[PAD, *target[:-1]]])
            ).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)[range(len(target)), target]
        assert problem.reference[1, number].item() == pytest.approx(log_probs.sum().item(), abs=1e-4)


def test_the_optimum_is_where_the_regularized_reward_is_largest(problem):
    """Its value is β log E_ref[e^{r/β}], and any other policy's is lower by β KL(π‖π*)."""
    best = -regularized_reward_loss(problem, problem.optimum).item()
    partition = (problem.reference + problem.world.rewards / problem.beta).logsumexp(1) * problem.beta
    assert best == pytest.approx(partition.mean().item())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = torch.randn(problem.reference.shape, generator=generator, dtype=torch.float64).log_softmax(1)
        gap = best + regularized_reward_loss(problem, other).item()
        assert gap == pytest.approx(problem.beta * divergence(other, problem.optimum))


@pytest.mark.parametrize("loss", [expected_dpo_loss, regularized_reward_loss])
def test_the_gradient_is_zero_at_the_optimum_and_nowhere_near(problem, loss):
    for where, at_optimum in ((problem.optimum, True), (problem.reference, False)):
        logits = where.clone().requires_grad_()
        loss(problem, logits.log_softmax(1)).backward()
        assert (logits.grad.abs().max() < 1e-9) == at_optimum


@pytest.mark.parametrize("loss", [expected_dpo_loss, regularized_reward_loss])
def test_the_exact_gradient_leads_there(larger, loss):
    curve = train_exactly(larger, loss, steps=200, rate=1e-2)
    assert curve[-1][1] < 0.02


def test_the_policy_gradient_of_samples_is_that_of_the_enumeration(problem):
    """E_y[(r − β log π/π_ref − b) ∇ log π(y|x)] over all y weighted by π, against autograd of the objective."""
    world, model = problem.world, as_view(problem.policy())
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    exact = flat(regularized_reward_loss(problem, world.log_probs(model, gradient=True)))
    log_probs = world.log_probs(model, gradient=True)
    advantages = world.rewards - problem.beta * (log_probs.detach() - problem.reference) - 0.7
    estimate = flat(-(log_probs.detach().exp() * advantages * log_probs).sum(1).mean())
    assert exact.norm() > 1e-2
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=1e-5)


def test_the_pairs_are_as_often_as_bradley_terry_prefers_them(problem):
    rows = all_pairs(problem.world, copies=10)
    count = len(problem.world.completions)
    assert len(rows) == 2 * 10 * count * (count - 1) // 2
    one, other = problem.world.completions[0], problem.world.completions[4]
    source = problem.world.sources[1]
    won = [r for r in rows if (r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) == (source, one, other)]
    rewards = problem.world.rewards[1]
    assert len(won) == round(10 / (1 + math.exp(rewards[4] - rewards[0])))


def test_the_lists_are_as_often_as_plackett_luce_has_them(problem):
    rows = all_lists(problem.world, size=3, copies=60)
    first = [row for row in rows if row["completion_ids"] == rows[0]["completion_ids"]]
    first = [row for row in first if row["prompt_ids"] == rows[0]["prompt_ids"]]
    assert len(first) == 60
    numbers = [problem.world.completions.index(ids) for ids in rows[0]["completion_ids"]]
    wins = torch.tensor([sum(row["ranking"][0] == i for row in first) / 60 for i in range(3)], dtype=torch.float64)
    # The share of first places is the softmax of the rewards.
    torch.testing.assert_close(wins, problem.world.rewards[0, numbers].softmax(0), rtol=0, atol=0.05)


def test_dpo_finds_the_optimum(problem, tmp_path):
    curve = train_dpo(problem, tmp_path, steps=110, batch_size=320, copies=10, rate=1e-2, points=4)
    assert curve[-1][1] < 0.02


def test_listwise_dpo_finds_the_optimum(problem, tmp_path):
    curve = train_listwise(problem, tmp_path, steps=100, batch_size=96, copies=48, rate=1e-2, points=4)
    assert curve[-1][1] < 0.05


def test_ppo_finds_the_optimum(problem, tmp_path):
    curve = train_ppo(problem, tmp_path, rollouts=50, samples=96, rate=5e-3, points=4)
    assert curve[-1][1] < 0.05


def test_grpo_finds_the_optimum(problem, tmp_path):
    curve = train_grpo(problem, tmp_path, rollouts=50, samples=96, rate=5e-3, points=4)
    assert curve[-1][1] < 0.05


def test_a_divergence_in_the_loss_ends_elsewhere(problem, tmp_path):
    """GRPO as published rests where a token does not see what its successors are charged, not at π*."""
    there = token_divergence_optimum(problem)
    torch.testing.assert_close(there.exp().sum(1), torch.ones(2, dtype=torch.float64))
    gap = divergence(there, problem.optimum)
    assert 0.01 < gap < 0.1
    policies = {}
    for kl_in in ("loss", "reward"):
        model = problem.policy()
        train_grpo(problem, tmp_path, rollouts=50, samples=96, rate=5e-3, points=1, kl_in=kl_in, policy=model)
        policies[kl_in] = problem.world.log_probs(model)
    assert divergence(policies["loss"], there) < 0.02 < gap
    assert divergence(policies["loss"], there) < divergence(policies["loss"], problem.optimum)
    assert divergence(policies["reward"], problem.optimum) < divergence(policies["reward"], there)


def test_log_probs_of_the_world_go_through_the_view(problem):
    """Two sources, a row: the table is not by chance that of another order."""
    world, model = problem.world, as_view(problem.policy())
    ids = torch.tensor([world.completions[7]])
    states = encode(model, torch.tensor([world.sources[1]]), None)
    with torch.no_grad():
        found = sequence_log_probs(model, states, None, ids, torch.ones_like(ids)).sum()
    assert found.item() == pytest.approx(problem.reference[1, 7].item(), abs=1e-4)
