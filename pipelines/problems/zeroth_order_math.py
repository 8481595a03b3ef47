"""Gradients of E_{y∼p}[L(y)] from values of L alone, at the logits: estimators, their means and variances.

For p = softmax(z) the score is ∇_z log p(y) = e_y − p, so an estimator at the logits is a (B, C) tensor that
back-propagation carries on to the weights. Losses are what a black box answered: numbers, never differentiated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (B, C), labels drawn from softmax(logits) (B, K), their losses (B, K)) -> gradient at the logits (B, C)."""


def expected_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """J = E_{y∼softmax(z)} L(y) of each row.

    Args:
        logits: (B, C).
        losses: (B, C), the loss of every label.

    Returns:
        (B,).
    """
    return (logits.softmax(1) * losses).sum(1)


def exact_gradient(logits: Tensor, losses: Tensor) -> Tensor:
    """∇_z J = p ⊙ (L − J): what all the estimators estimate. Arguments as of ``expected_loss``; (B, C)."""
    p = logits.softmax(1)
    return p * (losses - (p * losses).sum(1, keepdim=True))


def score_gradient(logits: Tensor, labels: Tensor, losses: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """REINFORCE: (1/K) Σ_k (L_k − b) (e_{y_k} − p) (Williams 1992).

    Unbiased for every b that does not depend on the labels drawn, since Σ_y p(y) ∇log p(y) = ∇ Σ_y p(y) = 0.

    Args:
        logits: (B, C).
        labels: (B, K), drawn from softmax(logits) with replacement.
        losses: (B, K), what the black box said of them.
        baseline: b, a number or (B, 1).

    Returns:
        (B, C), the estimate of ∇_z E L of each row.
    """
    scores = one_hot(labels, logits.shape[1]).to(logits) - logits.softmax(1).unsqueeze(1)
    return ((losses - baseline).unsqueeze(2) * scores).mean(1)


def leave_one_out_gradient(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """REINFORCE where each draw's baseline is the mean loss of the other K − 1 (Kool, van Hoof and Welling 2019).

    The baseline of draw k does not depend on y_k, so it stays unbiased. Arguments and result as of
    ``score_gradient``; K ≥ 2.
    """
    count = labels.shape[1]
    others = (losses.sum(1, keepdim=True) - losses) / (count - 1)
    scores = one_hot(labels, logits.shape[1]).to(logits) - logits.softmax(1).unsqueeze(1)
    return ((losses - others).unsqueeze(2) * scores).mean(1)


def moments_by_enumeration(estimator: Estimator, logits: Tensor, losses: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Mean and total variance of an estimator over all C^K tuples of labels, weighted by their probability.

    Args:
        estimator: what is summed over.
        logits: (B, C).
        losses: (B, C), the loss of every label.
        samples: K.

    Returns:
        (B, C) means, and (B,) sums of the variances of the C components.
    """
    rows, classes = logits.shape
    log_p = logits.log_softmax(1)
    mean, square = torch.zeros_like(logits), torch.zeros(rows, dtype=logits.dtype)
    for chosen in itertools.product(range(classes), repeat=samples):
        labels = torch.tensor(chosen).expand(rows, -1)
        weight = log_p.gather(1, labels).sum(1).exp()
        found = estimator(logits, labels, losses.gather(1, labels))
        mean += weight[:, None] * found
        square += weight * found.square().sum(1)
    return mean, square - mean.square().sum(1)


def best_baseline(logits: Tensor, losses: Tensor) -> Tensor:
    """The constant b of least variance of one-sample REINFORCE, E[L‖e_y − p‖²]/E‖e_y − p‖² (Greensmith et al. 2004).

    Arguments as of ``expected_loss``; (B, 1).
    """
    p = logits.softmax(1)
    size = 1 - 2 * p + p.square().sum(1, keepdim=True)  # ‖e_y − p‖²
    return (p * losses * size).sum(1, keepdim=True) / (p * size).sum(1, keepdim=True)


def entropy_gradient(logits: Tensor) -> Tensor:
    """∇_z of −H(softmax(z)), H in nats: p ⊙ (log p + H). (B, C) to (B, C).

    Added β times, it makes E[L] − βH the objective, whose minimum is p ∝ e^{−L/β} instead of a single label: labels
    that seem wrong go on being tried now and then (Williams and Peng 1991).
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return p * (log_p - (p * log_p).sum(1, keepdim=True))


def draw_labels(logits: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """(B, K) labels from softmax(logits), with replacement."""
    return torch.multinomial(logits.softmax(1), samples, replacement=True, generator=generator)
