"""A policy whose every completion can be enumerated and differentiated, and what DPO's derivation says of it.

The world, its rewards and the optimum are those by which the trainers are tested (``pipelines.seq2seq.enumerable``).
Source of the statements: Rafailov et al. 2023, "Direct Preference Optimization", sections 4 and 5, appendix A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.seq2seq.enumerable import World


@dataclass(frozen=True)
class Tree:
    """An autoregressive policy as a table: a row of logits for every prefix of a completion.

    Args:
        nodes: (N, T) the row in which token t of completion n is drawn.
        tokens: (N, T) that token; 0 beyond the end.
        real: (N, T) where a completion has a token.
        prefixes: P, how many rows there are.
        vocabulary: V, logits of a row.
    """

    nodes: Tensor
    tokens: Tensor
    real: Tensor
    prefixes: int
    vocabulary: int

    def log_probs(self, logits: Tensor) -> Tensor:
        """log π(y) = Σ_t log softmax(logits of y_<t)[y_t] of every completion: (P, V) -> (N,)."""
        steps = logits.log_softmax(1)[self.nodes, self.tokens]
        return steps.masked_fill(~self.real, 0).sum(1)


def tree(completions: Sequence[Sequence[int]], vocabulary: int) -> Tree:
    """The table's layout for a list of all completions."""
    rows = {(): 0}
    for completion in completions:
        for size in range(1, len(completion)):
            rows.setdefault(tuple(completion[:size]), len(rows))
    longest = max(map(len, completions))
    nodes, tokens = torch.zeros(2, len(completions), longest, dtype=torch.long)
    real = torch.zeros(len(completions), longest, dtype=torch.bool)
    for number, completion in enumerate(completions):
        for place, token in enumerate(completion):
            nodes[number, place] = rows[tuple(completion[:place])]
            tokens[number, place] = token
            real[number, place] = True
    return Tree(nodes, tokens, real, len(rows), vocabulary)


@dataclass(frozen=True)
class Setting:
    """One prompt: the world, π_ref and β, as the losses of the known optimum take them (their ``Task`` has more).

    Args:
        world: with a single source.
        reference: (1, N) log π_ref, fp64.
        beta: β.
    """

    world: World
    reference: Tensor
    beta: float


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) in nats, of log-probabilities (..., N): (...)."""
    return (p.exp() * (p - q)).sum(-1)


def log_partition(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z = log Σ_y π_ref(y) e^{r(y)/β}, of log π_ref (N,) and r (N,)."""
    return (reference + rewards / beta).logsumexp(-1)


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r̂ = β log(π/π_ref): the reward that a policy is optimal for, but for β log Z (equation 5)."""
    return beta * (policy - reference)


def all_preferences(rewards: Tensor) -> Tensor:
    """(N, N): P(y_i ≻ y_j) = σ(r_i − r_j), Bradley and Terry (1952)."""
    return torch.sigmoid(rewards[:, None] - rewards)


def all_rankings(size: int) -> Tensor:
    """(K!, K): every ranking of K things, best first."""
    return torch.tensor(list(itertools.permutations(range(size))))


def gumbel_rankings(rewards: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rankings drawn by noise: (count, K), the order of r + G with G standard Gumbel.

    That they follow Plackett–Luce is a theorem (Yellott 1977), and uses none of its products.
    """
    noise = -torch.log(-torch.log(torch.rand(count, len(rewards), generator=generator, dtype=torch.float64)))
    return (rewards + noise).argsort(dim=1, descending=True)


def relative_error_of_z(reference: Tensor, rewards: Tensor, beta: float) -> float:
    """Standard deviation of e^{r/β} under π_ref in units of its mean Z: a sample's relative error as estimate of Z."""
    first, second = (log_partition(reference, power * rewards, beta) for power in (1, 2))
    return math.sqrt(max(math.expm1(float(second - 2 * first)), 0.0))
