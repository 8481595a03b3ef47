"""The Plackett–Luce loss against Bradley–Terry, all rankings enumerated, sampling without replacement, differences."""

import itertools
import math

import pytest
import torch

from pipelines.seq2seq.losses import dpo_loss, plackett_luce_loss, ranking_agreement


def random_rewards(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_two_is_the_sigmoid_dpo_loss():
    chosen, rejected, chosen_reference, rejected_reference = 3 * random_rewards(4, 50)
    rewards = 0.3 * torch.stack([rejected - rejected_reference, chosen - chosen_reference], dim=1)
    loss = plackett_luce_loss(rewards, torch.tensor([[1, 0]]).expand(50, 2))
    expected = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, beta=0.3)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    single = plackett_luce_loss(rewards.float(), torch.tensor([[1, 0]]).expand(50, 2))
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


def test_probabilities_of_all_24_rankings_sum_to_one():
    rewards = 2 * random_rewards(4)
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    losses = plackett_luce_loss(rewards.expand(24, 4), rankings)
    assert losses.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)
    best = rankings[losses.argmin()]
    assert best.tolist() == rewards.argsort(descending=True).tolist()
    for ranking, loss in zip(rankings.tolist(), losses.tolist(), strict=True):
        left, product = list(ranking), 1.0
        for number in ranking:  # drawn one after the other, without replacement
            product *= math.exp(rewards[number]) / sum(math.exp(rewards[i]) for i in left)
            left.remove(number)
        assert math.exp(-loss) == pytest.approx(product)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_first_places_have_the_sum_over_the_orders_of_the_rest(top_k):
    rewards = random_rewards(4, seed=1)
    full = {r: -plackett_luce_loss(rewards[None], torch.tensor([r])) for r in itertools.permutations(range(4))}
    for first in itertools.permutations(range(4), top_k):
        ranking = [*first, *(i for i in range(4) if i not in first)]
        partial = plackett_luce_loss(rewards[None], torch.tensor([ranking]), top_k=top_k)
        summed = torch.cat([value for r, value in full.items() if r[:top_k] == first]).exp().sum()
        assert math.exp(-partial) == pytest.approx(summed.item())


def test_a_shorter_list_counts_as_if_it_stood_alone():
    rewards = random_rewards(3, 5, seed=2)
    ranking = torch.tensor([[2, 0, 1, -1, -1], [4, 3, 2, 1, 0], [1, 0, -1, -1, -1]])
    known = torch.tensor([3, 2, 2])
    together = plackett_luce_loss(rewards, ranking, top_k=known)
    for row, count in enumerate((3, 5, 2)):
        alone = plackett_luce_loss(
            rewards[row : row + 1, :count], ranking[row : row + 1, :count], top_k=int(known[row])
        )
        assert together[row].item() == pytest.approx(alone.item(), abs=1e-12)
    rewards[0, 4] = 1e6  # beyond the end of its list
    assert plackett_luce_loss(rewards, ranking, top_k=known)[0].item() == pytest.approx(together[0].item())
    assert plackett_luce_loss(torch.zeros(1, 4), torch.arange(4)[None]).item() == pytest.approx(math.log(24), abs=1e-6)


def test_gradient_agrees_with_finite_differences():
    ranking = torch.tensor([[2, 0, 1, 3], [0, 2, 1, -1], [3, 1, 0, 2]])

    def function(rewards):
        return plackett_luce_loss(rewards, ranking, top_k=torch.tensor([4, 3, 2]))

    rewards = random_rewards(3, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(function, (rewards,))
    gradient = torch.autograd.grad(function(rewards).sum(), rewards)[0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3, dtype=torch.float64))  # a constant added changes nothing
    assert gradient[1, 3] == 0


def test_agreement_counts_the_decided_pairs():
    rewards = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 5.0, 9.0]])
    ranking = torch.tensor([[0, 1, 2, 3], [2, 0, 1, -1]])
    assert ranking_agreement(rewards, ranking).tolist() == pytest.approx([5 / 6, 2.5 / 3])
    # of the first row only who is best is known: 0 above 1, 2 and 3
    assert ranking_agreement(rewards, ranking, top_k=torch.tensor([1, 1])).tolist() == [1, 1]
