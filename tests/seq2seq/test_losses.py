"""The pure functions against closed forms, brute force and autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.seq2seq.losses import (
    bradley_terry_loss,
    dpo_loss,
    entropy,
    kl_estimate,
    masked_mean,
    sequence_sum,
    token_log_probs,
)

numbers = st.floats(-20, 20, allow_nan=False, width=32)


def test_token_log_probs_equal_the_definition():
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    ids = torch.randint(7, (3, 4))
    for temperature in (1.0, 0.7):
        powers = (logits / temperature).exp()
        expected = (powers.gather(-1, ids[..., None])[..., 0] / powers.sum(-1)).log()
        torch.testing.assert_close(token_log_probs(logits, ids, temperature=temperature), expected)


def test_half_precision_is_widened_before_the_softmax():
    logits = torch.randn(2, 3, 1000).bfloat16()
    ids = torch.randint(1000, (2, 3))
    found = token_log_probs(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_log_probs(logits.double(), ids).float())


def test_entropy_of_a_uniform_and_of_a_coin():
    assert entropy(torch.zeros(2, 50)).tolist() == pytest.approx([math.log(50)] * 2)
    coin = torch.tensor([0.2, 0.8]).log()
    assert entropy(coin).item() == pytest.approx(-(0.2 * math.log(0.2) + 0.8 * math.log(0.8)))


def test_sums_and_means_leave_padding_out():
    values, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert sequence_sum(values, mask).tolist() == [3.0, 4.0]
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0


@given(numbers, numbers, st.floats(0, 3))
def test_bradley_terry_is_the_likelihood_of_the_preference(chosen, rejected, margin):
    won, lost = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)
    loss = bradley_terry_loss(won, lost, margin=torch.tensor([margin])).item()
    difference = chosen - rejected - float(torch.tensor(margin))
    assert loss == pytest.approx(math.log1p(math.exp(-difference)), rel=1e-6, abs=1e-9)


def test_bradley_terry_gradient_is_the_surprise():
    won = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    lost = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(won, lost).sum().backward()
    surprise = torch.sigmoid(lost.detach() - won.detach())
    torch.testing.assert_close(won.grad, -surprise)
    torch.testing.assert_close(lost.grad, surprise)


def test_margin_and_centring_agree_with_finite_differences():
    def function(won, lost):
        return bradley_terry_loss(won, lost, margin=torch.tensor([0.5, 0.0], dtype=torch.float64), centre=0.2)

    inputs = tuple(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(function, inputs)


def test_centring_pulls_the_sum_to_zero():
    plain = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]))
    centred = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]), centre=0.01)
    assert (centred - plain).item() == pytest.approx(0.01 * 16)


def test_dpo_is_ln2_at_the_reference_and_bradley_terry_of_implicit_rewards():
    generator = torch.Generator().manual_seed(1)
    policy_w, policy_l, reference_w, reference_l = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    at_reference = dpo_loss(policy_w, policy_l, policy_w, policy_l)
    torch.testing.assert_close(at_reference, torch.full((8,), math.log(2), dtype=torch.float64))
    loss = dpo_loss(policy_w, policy_l, reference_w, reference_l, beta=0.3)
    rewards = 0.3 * (policy_w - reference_w), 0.3 * (policy_l - reference_l)
    torch.testing.assert_close(loss, bradley_terry_loss(*rewards))
    smooth = dpo_loss(policy_w, policy_l, reference_w, reference_l, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(smooth, 0.9 * loss + 0.1 * bradley_terry_loss(*rewards[::-1]))


def test_kl_estimators_have_the_right_mean_and_sign():
    generator = torch.Generator().manual_seed(2)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum().item()
    # Expectations over all outcomes, weighted by the policy: no sampling error.
    mean = {name: (policy.exp() * kl_estimate(policy, reference, name)).sum().item() for name in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(exact)
    assert mean["k3"] == pytest.approx(exact)
    assert mean["k2"] != pytest.approx(exact, rel=1e-3)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    assert (kl_estimate(policy, reference, "k1") < 0).any()
    near = policy + 1e-3 * reference
    near = near.log_softmax(0)
    exact_near = (policy.exp() * (policy - near)).sum().item()
    assert (policy.exp() * kl_estimate(policy, near, "k2")).sum().item() == pytest.approx(exact_near, rel=1e-2)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(policy, reference, "k4")
