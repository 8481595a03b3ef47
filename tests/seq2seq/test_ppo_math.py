"""PPO's mathematics against brute force, closed forms and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.seq2seq import ppo_math

LENGTHS = [5, 1, 3, 7]


@pytest.fixture
def mask():
    return (torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]).long()


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(gamma=st.floats(0.1, 1.0), lam=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_gae_is_the_quadratic_time_sum(gamma, lam, seed):
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(7)[None] < lengths[:, None]).long()
    rewards, values = numbers(seed, 4, 7), numbers(seed + 1, 4, 7)
    # What stands beyond the end must not be read, whatever it is.
    values = values.masked_fill(mask == 0, 1e6)
    advantages, returns = ppo_math.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        v = [*values[row, :length].double().tolist(), 0.0]
        r = rewards[row].double().tolist()
        for t in range(7):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(t, length)]
            expected = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-4)
            assert float(returns[row, t]) == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-4)


def test_gae_at_lambda_one_is_the_discounted_return_less_the_value(mask):
    rewards, values = numbers(0, 4, 7), numbers(1, 4, 7)
    _, returns = ppo_math.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected = sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length))
            assert float(returns[row, t]) == pytest.approx(expected, abs=1e-5)


def test_gae_at_lambda_zero_is_one_step(mask):
    rewards, values = numbers(2, 4, 7), numbers(3, 4, 7) * mask
    advantages, _ = ppo_math.gae(rewards, values, mask, gamma=0.5, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], dim=1)
    assert torch.allclose(advantages, (rewards + 0.5 * following - values) * mask, atol=1e-6)


def test_whitening_reads_the_real_tokens_only(mask):
    values = 100 + 3 * numbers(4, 4, 7)
    white = ppo_math.whiten(values.masked_fill(mask == 0, 1e9), mask)
    real = white[mask.bool()]
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float(real.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float(white[mask == 0].abs().max()) == 0
    ordered = values[mask.bool()]
    assert torch.equal(ordered.argsort(), real.argsort())
    assert float(ppo_math.whiten(torch.full((4, 7), 5.0), mask).abs().max()) < 1e-3


def test_moments_keep_their_digits_far_from_zero(mask):
    values = 1e4 + numbers(5, 4, 7)
    mean, variance = ppo_math.masked_moments(values, mask)
    real = values[mask.bool()].double()
    assert float(mean) == pytest.approx(float(real.mean()), rel=1e-6)
    assert float(variance) == pytest.approx(float(real.var(correction=0)), rel=1e-2)


def test_token_rewards_put_the_score_on_the_last_token(mask):
    scores, kl = torch.tensor([1.0, 2.0, 3.0, 4.0]), numbers(6, 4, 7)
    rewards = ppo_math.token_rewards(scores, kl, mask, 0.1)
    expected = -0.1 * kl * mask
    for row, length in enumerate(LENGTHS):
        expected[row, length - 1] += scores[row]
    assert torch.allclose(rewards, expected)
    # The sum is the sequence's reward, Ziegler et al. eq. 2.
    assert torch.allclose(rewards.sum(1), scores - 0.1 * (kl * mask).sum(1), atol=1e-6)
    empty = ppo_math.token_rewards(scores, kl, torch.zeros_like(mask), 0.1)
    assert float(empty.abs().max()) == 0


def test_a_missing_end_costs_the_penalty():
    scores = ppo_math.penalize_missing_end(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.75)
    assert scores.tolist() == [1.0, 0.25]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # moved too far the good way: clipped at 1.2
        (0.5, 2.0, -1.0, 0.0),  # moved the bad way: still pulled back
        (0.5, -2.0, 1.6, 1.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 0.0),
    ],
)
def test_the_clipped_surrogate_by_cases(ratio, advantage, expected, clipped):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    result = ppo_math.policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert float(result.clipped) == clipped
    result.loss.sum().backward()
    # Where it is clipped nothing pushes; elsewhere d(−ρA)/d log π = −ρA.
    assert float(log_prob.grad) == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-6)


def test_the_surrogates_gradient_at_ratio_one_is_the_policy_gradient():
    logits = numbers(7, 3, 4, 6).requires_grad_()
    actions = torch.randint(0, 6, (3, 4), generator=torch.Generator().manual_seed(8))
    advantages = numbers(9, 3, 4)
    log_probs = torch.log_softmax(logits, -1).gather(-1, actions[..., None]).squeeze(-1)
    (surrogate,) = torch.autograd.grad(
        ppo_math.policy_loss(log_probs, log_probs.detach(), advantages, 0.2).loss.sum(), logits, retain_graph=True
    )
    (plain,) = torch.autograd.grad(-(log_probs * advantages).sum(), logits)
    assert torch.allclose(surrogate, plain, atol=1e-6)


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    values, old, returns = (torch.tensor([x]) for x in ([1.0, 1.0, 0.1], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]))
    plain = ppo_math.value_loss(values, old, returns, 0.0)[0].tolist()
    assert plain == pytest.approx([0.5, 0.5, 0.405])
    clipped = ppo_math.value_loss(values, old, returns, 0.2)[0].tolist()
    # ½(0.2 − 2)² is worse than ½(1 − 2)²; ½·1² is worse than ½·0.2²; within the range nothing changes.
    assert clipped == pytest.approx([1.62, 0.5, 0.405])


def test_approximate_kl_tends_to_the_kl():
    old, new = torch.log_softmax(numbers(10, 5), -1), torch.log_softmax(numbers(11, 5), -1)
    drawn = torch.multinomial(old.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    estimate = ppo_math.approximate_kl(new[drawn], old[drawn], torch.ones_like(drawn))
    assert float(estimate) == pytest.approx(float((old.exp() * (old - new)).sum()), rel=0.02)


def test_explained_variance(mask):
    returns = numbers(12, 4, 7)
    assert float(ppo_math.explained_variance(returns, returns, mask)) == pytest.approx(1)
    assert float(ppo_math.explained_variance(torch.full((4, 7), 3.0), returns, mask)) == pytest.approx(0, abs=1e-5)
    assert float(ppo_math.explained_variance(-returns, returns, mask)) == pytest.approx(-3, abs=1e-4)
    assert float(ppo_math.explained_variance(returns, torch.ones(4, 7), mask)) == 0


def test_the_adaptive_coefficient_is_zieglers():
    change = lambda kl: ppo_math.adapt_kl_coefficient(0.1, kl, target=6.0, samples=256, horizon=10_000)  # noqa: E731
    assert change(6.0) == pytest.approx(0.1)
    assert change(60.0) == pytest.approx(0.1 * (1 + 0.2 * 256 / 10_000))
    assert change(0.0) == pytest.approx(0.1 * (1 - 0.2 * 256 / 10_000))
    assert change(6.6) == pytest.approx(0.1 * (1 + 0.1 * 256 / 10_000))


def test_running_moments_are_those_of_all_scores():
    parts = [numbers(seed, size) * 3 + 1e3 for seed, size in ((0, 1), (1, 5), (2, 17))]
    moments = ppo_math.RunningMoments()
    for part in parts:
        moments = ppo_math.RunningMoments(*moments.state())
        moments.update(part)
    assert moments.deviation == pytest.approx(float(torch.cat(parts).double().std()), rel=1e-9)
    assert ppo_math.RunningMoments().deviation == 1.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("steps_away", [0.0, 0.8])
def test_the_divergence_in_the_loss_has_the_gradient_of_a_divergence(estimator, steps_away):
    """Enumerated over all tokens, each as often as the policy that sampled draws it: no sampling error."""
    start, way, reference = (1.5 * numbers(seed, 2, 5).double() for seed in (40, 41, 42))
    logits = (start + steps_away * way).requires_grad_()
    log_probs, old, base = (torch.log_softmax(x, -1) for x in (logits, start, reference))
    divergence = (log_probs.exp() * (log_probs - base)).sum()
    backward = (base.exp() * (base - log_probs)).sum()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    (other,) = torch.autograd.grad(backward, logits, retain_graph=True)
    assert (wanted - other).abs().max() > 0.1
    expected = (old.exp() * ppo_math.loss_kl(log_probs, old, base, estimator)).sum()
    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    if estimator == "k1":  # also when the policy is no longer the one that sampled
        assert float(expected.detach()) == pytest.approx(float(divergence.detach()), abs=1e-6)
        assert torch.allclose(found, wanted, atol=1e-5)
        # As it stands it would pull nowhere at first, and away from what was sampled later, whatever the reference is.
        (bare,) = torch.autograd.grad((old.exp() * (log_probs - base)).sum(), logits)
        assert torch.allclose(bare, old.exp() - log_probs.exp(), atol=1e-6)
    elif steps_away == 0:
        assert torch.allclose(found, wanted if estimator == "k2" else other, atol=1e-6)
    else:
        assert not torch.allclose(found, wanted, atol=1e-2)


def test_the_policy_gradient_of_a_sequence_is_the_enumerated_expectation():
    """Sampled token-level surrogate gradients, averaged, tend to ∇ Σ_y π(y) (r(y) − β log π(y)/π_ref(y))."""
    vocabulary, length, end, beta = 3, 3, 0, 0.3
    tables = [numbers(20 + t, vocabulary, vocabulary).double().requires_grad_() for t in range(length)]
    reference = [numbers(30 + t, vocabulary, vocabulary).double() for t in range(length)]
    score = {}

    def sequences(prefix=()):
        if len(prefix) == length or (prefix and prefix[-1] == end):
            yield prefix
            return
        for token in range(vocabulary):
            yield from sequences((*prefix, token))

    def log_prob(tables, sequence):
        previous, terms = 1, []
        for t, token in enumerate(sequence):
            terms.append(torch.log_softmax(tables[t][previous], -1)[token])
            previous = token
        return torch.stack(terms)

    objective = 0.0
    every = list(sequences())
    for index, sequence in enumerate(every):
        score[sequence] = math.sin(3 * index) * 2
        log_p = log_prob(tables, sequence).sum()
        gap = log_p - log_prob(reference, sequence).sum()
        objective = objective + log_p.exp() * (score[sequence] - beta * gap)
    expected = torch.autograd.grad(objective, tables)

    # Every sequence once, weighted by its probability: the expectation of the sampled estimator, without its noise.
    mask = torch.tensor([[float(t < len(s)) for t in range(length)] for s in every])
    rows = [log_prob(tables, s) for s in every]
    now = torch.stack([torch.cat([row, row.new_zeros(length - len(row))]) for row in rows])
    base = torch.stack([torch.nn.functional.pad(log_prob(reference, s), (0, length - len(s))) for s in every])
    kl = (now - base).detach().float()
    rewards = ppo_math.token_rewards(torch.tensor([score[s] for s in every]), kl, mask, beta)
    values = 0.7 * torch.ones_like(rewards)
    advantages, _ = ppo_math.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    surrogate = ppo_math.policy_loss(now, now.detach(), advantages, 0.2).loss
    weights = (now.detach() * mask).sum(1).exp()
    found = torch.autograd.grad(-(surrogate * mask * weights[:, None]).sum(), tables)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
