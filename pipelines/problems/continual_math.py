"""Elastic weight consolidation's Fisher information, its penalty, and the measures of continual learning.

The Fisher information of a classifier is F = E_x E_{y∼p_θ(·|x)} [∇log p_θ(y|x) ∇log p_θ(y|x)ᵀ]; its diagonal is a mean
of *squared per-example* gradients (Kirkpatrick et al. 2017; Kunstner, Balles and Hennig 2019 on which labels to take).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

Labels = Literal["sampled", "expected", "data"]
_CHUNK = 128  # examples whose gradients are held at a time


def flat_parameters(network: nn.Module) -> Tensor:
    """All weights in one vector, (P,), in the order of ``network.parameters()``; differentiable."""
    return torch.cat([p.reshape(-1) for p in network.parameters()])


def per_example_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """∇_θ −log p_θ(y_n|x_n) of each example.

    Args:
        network: (n, …) to (n, classes) logits, without layers that mix examples.
        images: (N, …).
        labels: (N,).

    Returns:
        (N, P), P in the order of ``flat_parameters``.
    """
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, weights, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    return torch.cat([found[name].flatten(1) for name in weights], dim=1)


def fisher_diagonal(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    kind: Labels = "sampled",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diagonal of the Fisher information: the mean of squared per-example gradients of log p_θ(y|x).

    Args:
        network: see ``per_example_gradients``.
        images: (N, …), over which the mean is taken.
        labels: (N,) of the data, looked at by ``data`` alone.
        kind: sampled: y drawn once from p_θ(·|x) for each image, an unbiased estimate; expected: Σ_y p_θ(y|x) over
            every y, exact and as many times as slow as there are classes; data: the data's own labels, the
            *empirical* Fisher, which is another quantity.
        generator: of the sampled labels, on the device of the images.

    Returns:
        (P,).
    """
    total = torch.zeros_like(flat_parameters(network).detach())
    for part, given in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        with torch.no_grad():
            p = network(part).softmax(1)
        if kind == "expected":
            for label in range(p.shape[1]):
                squares = per_example_gradients(network, part, torch.full_like(given, label)).square()
                total += p[:, label] @ squares
            continue
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0] if kind == "sampled" else given
        total += per_example_gradients(network, part, drawn).square().sum(0)
    return total / len(images)


def shortcut_diagonal(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    kind: Labels = "sampled",
    generator: torch.Generator | None = None,
) -> Tensor:
    """What is often computed in its place: the mean over batches of the *squared mean* gradient of a batch.

    With labels from the model every example's gradient has mean zero, so a batch's squared mean is on average 1/B of
    the Fisher diagonal (and the square of its sum B times it): B enters where λ should. With the data's labels and
    whole passes, it falls to nothing as training drives the mean gradient to zero.

    Args and result as of ``fisher_diagonal``; the last batch, if it is short, is left out.
    """
    total, batches = torch.zeros_like(flat_parameters(network).detach()), len(images) // batch_size
    for part, given in list(zip(images.split(batch_size), labels.split(batch_size), strict=True))[:batches]:
        logits = network(part)
        if kind == "sampled":
            given = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        found = torch.autograd.grad(cross_entropy(logits, given), list(network.parameters()))
        total += torch.cat([g.reshape(-1) for g in found]).square()
    return total / batches


class QuadraticPenalty:
    """λ Σ_k Σ_i F_{k,i} (θ_i − θ*_{k,i})² over the earlier tasks k, kept as three sums however many tasks there are.

    Σ_k F_k (θ − θ*_k)² = θ² ΣF − 2θ ΣFθ* + ΣFθ*²: written around the centre ΣFθ*/ΣF, which keeps its digits where θ is
    near the θ*. There is no ½ in it, as in the course's form; Kirkpatrick et al. 2017 (eq. 3) write λ/2.

    Args:
        strength: λ.
        size: P.
        like: a tensor of the dtype and device to keep.
    """

    def __init__(self, strength: float, size: int, like: Tensor):
        self.strength = strength
        self.precision = torch.zeros(size, dtype=like.dtype, device=like.device)  # ΣF
        self.centre = torch.zeros_like(self.precision)  # ΣFθ*/ΣF
        self.constant = torch.zeros((), dtype=like.dtype, device=like.device)

    def add(self, fisher: Tensor, weights: Tensor) -> None:
        """Hold on to a task's weights (P,) by its Fisher diagonal (P,)."""
        whole = self.precision + fisher
        share = torch.where(whole > 0, fisher / whole.clamp_min(torch.finfo(whole.dtype).tiny), torch.zeros_like(whole))
        apart = weights - self.centre
        # two parabolas a(θ−c)² + b(θ−w)² make (a+b)(θ−m)² + ab/(a+b)·(w−c)²
        self.constant = self.constant + (self.precision * share * apart.square()).sum()
        self.centre = self.centre + share * apart
        self.precision = whole

    def __call__(self, weights: Tensor) -> Tensor:
        """The penalty at weights (P,); differentiable."""
        return self.strength * ((self.precision * (weights - self.centre).square()).sum() + self.constant)


def largest_strength(fisher: Tensor, learning_rate: float, momentum: float) -> float:
    """The λ from which on SGD with momentum diverges on the penalty: (1 + μ)/(η max F).

    A heavy ball on a parabola of curvature h comes to rest only if ηh < 2(1 + μ) (Polyak 1964); here h = 2λF.

    Args:
        fisher: (P,), of all earlier tasks together.
        learning_rate: η.
        momentum: μ.
    """
    return (1 + momentum) / (learning_rate * float(fisher.max()))


def average_accuracy(matrix: Tensor) -> float:
    """Mean accuracy over all T tasks after the last (Lopez-Paz and Ranzato 2017).

    Args:
        matrix: (T, T); row t: accuracies after learning task t, column j: on task j.
    """
    return float(matrix[-1].mean())


def forgetting(matrix: Tensor) -> float:
    """Mean over the tasks before the last of the best accuracy a task ever had before the end, less that at the end.

    Chaudhry et al. 2018, eqs. 3–4. Argument as of ``average_accuracy``, T ≥ 2; negative if old tasks improved.
    """
    return float((matrix[:-1, :-1].tril().amax(0) - matrix[-1, :-1]).mean())


def plasticity(matrix: Tensor) -> float:
    """Mean accuracy on each task right after it was learned. Argument as of ``average_accuracy``."""
    return float(matrix.diagonal().mean())


def stability(matrix: Tensor) -> float:
    """Mean accuracy on the tasks before the last after the last. Argument as of ``average_accuracy``, T ≥ 2."""
    return float(matrix[-1, :-1].mean())
