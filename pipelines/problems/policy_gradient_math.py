"""The policy gradient of sequences in a world whose completions are all enumerated; torch, float64.

E_{y~π(·|x)}[r(x, y)] is to grow, so the loss is its negative, and its gradient is (Williams 1992, REINFORCE; for
sequences Ranzato et al. 2016, equation 9)

    −E_x E_{y~π}[ (r(x, y) − b(x)) Σ_i ∇ log π(y_i | y_<i, x) ],

for any baseline b that does not depend on y. With all completions at hand, expectations are sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.seq2seq.enumerable import World


def make_model(world: World, *, seed: int) -> Any:
    """A random policy of a few thousand weights over the world's vocabulary, float64.

    Padding is an ordinary token there. ``nn.Embedding`` keeps the gradient of its padding's row at 0, so that what
    autograd gives would not be the gradient: no row is padding here.
    """
    from pipelines.seq2seq.enumerable import make_policy

    model = make_policy(world, width=16, seed=seed).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


def parameters_of(model: Any) -> list[Tensor]:
    """The parameters that a gradient is taken of."""
    return [p for p in model.parameters() if p.requires_grad]


def flat_gradient(value: Tensor, parameters: list[Tensor], *, keep: bool = False) -> Tensor:
    """∂value/∂parameters as one vector (D,); a parameter that ``value`` does not depend on has zeros.

    Args:
        value: a scalar with a graph.
        parameters: D numbers in all.
        keep: keep the graph for another gradient.
    """
    found = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def expected_reward(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """J = (1/S) Σ_x Σ_y π(y|x) r(x, y), a scalar with the gradient of ``log_probs``.

    Args:
        log_probs: (S, N) log π of every completion.
        rewards: (S, N).
    """
    return (log_probs.exp() * rewards).sum(1).mean()


def scores(world: World, model: Any) -> tuple[Tensor, Tensor]:
    """Probabilities and scores of all completions.

    Returns:
        π(y|x), (S, N); and Σ_i ∇ log π(y_i | y_<i, x), (S, N, D), one backward pass each.
    """
    parameters = parameters_of(model)
    log_probs = world.log_probs(model, gradient=True)
    rows = [flat_gradient(value, parameters, keep=True) for value in log_probs.flatten()]
    return log_probs.detach().exp(), torch.stack(rows).view(*log_probs.shape, -1)


def estimates(score: Tensor, rewards: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """−(r − b) Σ_i ∇ log π(y_i | y_<i, x): what one sample says of the gradient of −J.

    Args:
        score: (…, D).
        rewards: (…).
        baseline: b, broadcast against ``rewards``.

    Returns:
        (…, D).
    """
    return -(rewards - baseline)[..., None] * score


def total_variance(probabilities: Tensor, score: Tensor, rewards: Tensor, baseline: Tensor | float = 0.0) -> float:
    """Trace of the covariance of one sample's estimate, x uniform and y ~ π(·|x), by enumeration.

    Args:
        probabilities: π(y|x), (S, N).
        score: (S, N, D).
        rewards: (S, N).
        baseline: broadcast against ``rewards``.
    """
    each = estimates(score, rewards, baseline)
    weight = probabilities / len(probabilities)
    mean = torch.einsum("sn,snd->d", weight, each)
    return float((weight * (each**2).sum(-1)).sum() - (mean**2).sum())


def mean_reward(probabilities: Tensor, rewards: Tensor) -> Tensor:
    """b(x) = E_{y~π}[r(x, y)], (S, 1): the usual baseline, which a value network learns."""
    return (probabilities * rewards).sum(1, keepdim=True)


def best_baseline(probabilities: Tensor, score: Tensor, rewards: Tensor) -> Tensor:
    """b(x) = E[r |∇log π|²] / E[|∇log π|²], (S, 1): of all b(x) the one of least variance.

    Source: Greensmith, Bartlett and Baxter 2004, "Variance Reduction Techniques for Gradient Estimates", theorem 8.
    """
    squares = probabilities * (score**2).sum(-1)
    return (squares * rewards).sum(1, keepdim=True) / squares.sum(1, keepdim=True)


def cross_entropy_gradient(world: World, model: Any, target: Tensor) -> Tensor:
    """∇ of −(1/S) Σ_x Σ_y target(y|x) log π(y|x), by transformers' own loss of labelled examples: (D,).

    Args:
        world: sources and completions.
        model: an encoder-decoder whose forward takes ``labels``.
        target: P_data(y|x), (S, N); a row of zeros leaves its source out.
    """
    total = torch.zeros((), dtype=torch.float64)
    for source, shares in zip(world.sources, target, strict=True):
        for completion, share in zip(world.completions, shares, strict=True):
            mean = model(input_ids=torch.tensor([source]), labels=torch.tensor([completion])).loss
            total = total + share / len(world.sources) * mean * len(completion)
    return flat_gradient(total, parameters_of(model))
