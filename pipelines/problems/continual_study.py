"""The Fisher information of EWC: against loops, closed forms and divergences, and beside the usual shortcut."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from pipelines.problems.continual_math import (
    QuadraticPenalty,
    fisher_diagonal,
    flat_parameters,
    largest_strength,
    per_example_gradients,
    shortcut_diagonal,
)
from pipelines.problems.continual_training import Method, learn_task, make_network
from pipelines.problems.exercise import Answer, Figure

if TYPE_CHECKING:
    from pipelines.problems.continual_learning import ContinualLearningConfig
    from pipelines.problems.image_data import LabelledSet

_DRAWS = 20  # independent draws of all labels, by which a mean's standard error is known
_SHOWN = 300  # weights in the scatter plot


def study_fisher(answer: Answer, images: LabelledSet, config: ContinualLearningConfig) -> None:
    """Train on the first task and compare the Fisher diagonal with what it should equal, and with the shortcut."""
    device = images.train.labels.device
    torch.manual_seed(config.seed)
    shape = tuple(images.train.images.shape[1:])
    network = make_network(config.networks[0], shape, images.classes, config).to(device)
    learn_task(network, images.train, Method(), config, torch.Generator().manual_seed(config.seed))
    size = min(config.batch, config.fisher_examples, len(images.train) // 4)
    count = min(config.fisher_examples, len(images.train)) // size * size
    some, labels = images.train.images[:count], images.train.labels[:count]
    fisher = fisher_diagonal(network, some, labels, "expected")
    _check_gradients(answer, network, some[:20], labels[:20])
    _check_softmax_regression(answer, some, images.classes)
    _check_divergence(answer, network, some[:100].double(), labels[:100])
    _check_penalty(answer)

    generator = torch.Generator(device).manual_seed(config.seed)
    draws = [shortcut_diagonal(network, some, labels, size, "sampled", generator) for _ in range(_DRAWS)]
    sampled = fisher_diagonal(network, some, labels, "sampled", generator)
    ratios = torch.stack([draw.sum() for draw in draws]) / fisher.sum()
    answer.check(
        f"E[squared mean gradient of {size} images] · {size} / Fisher = 1, summed over the weights",
        float(ratios.mean()) * size,
        1.0,
        4 * float(ratios.std()) * size / _DRAWS**0.5,
        f"{_DRAWS} draws of all labels from the model, 4 standard errors",
    )
    whole = shortcut_diagonal(network, images.train.images, images.train.labels, len(images.train), "data")
    empirical = fisher_diagonal(network, some, labels, "data")
    rows = {
        "mean of squares, labels expected (the Fisher)": fisher,
        "mean of squares, labels drawn once": sampled,
        "mean of squares, the data's labels (empirical)": empirical,
        f"square of the mean of {size}, labels drawn": draws[0],
        f"square of the sum of {size}, labels drawn": draws[0] * size**2,
        f"square of the mean of all {len(images.train):,}, the data's labels": whole,
    }
    answer.table(
        "fisher",
        ["what is computed", "sum over the weights", "against the Fisher", "rank correlation with it"],
        [
            [name, f"{float(v.sum()):.4g}", f"{float(v.sum() / fisher.sum()):.3g}", f"{_correlation(v, fisher):.3f}"]
            for name, v in rows.items()
        ],
        f"Of the {config.networks[0]} after the first task, {count} images.",
    )
    answer.value(
        fisher_batch=size,
        fisher_count=count,
        lambda_limit=largest_strength(fisher, config.learning_rate, config.momentum),
        shortcut_ratio=float(ratios.mean()),
        sum_ratio=float(ratios.mean()) * size**2,
        shortcut_correlation=_correlation(draws[0], fisher),
        sampled_correlation=_correlation(sampled, fisher),
        whole_ratio=float(whole.sum() / fisher.sum()),
        empirical_ratio=float(empirical.sum() / fisher.sum()),
    )
    _scatter(answer, fisher, sampled, draws[0], size)


def _correlation(one: Tensor, other: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one.cpu().numpy(), other.cpu().numpy()).statistic)


def _check_gradients(answer: Answer, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Per-example gradients by one back-propagation for each example."""
    found = per_example_gradients(network, images, labels)
    alone = []
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(network(image[None]), label[None])
        parts = torch.autograd.grad(loss, list(network.parameters()))
        alone.append(torch.cat([g.reshape(-1) for g in parts]).square())
    by_loop = torch.stack(alone).mean(0)
    apart = (found.square().mean(0) - by_loop).abs().max() / by_loop.max()
    route = f"back-propagation of {len(images)} examples one by one, float32"
    answer.check("largest |F − F by a loop| / max F", float(apart), 0.0, 1e-5, route)


def softmax_regression_fisher(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Closed form for softmax regression: F of W_ck is E[p_c (1 − p_c) x_k²], of b_c it is E[p_c (1 − p_c)].

    Args:
        images: (N, d).
        weight: (C, d).
        bias: (C,).

    Returns:
        (C·d + C,), W's rows before b, as ``flat_parameters`` of a linear layer.
    """
    p = (images @ weight.T + bias).softmax(1)
    spread = p * (1 - p)
    return torch.cat([(spread.T @ images.square()).reshape(-1), spread.sum(0)]) / len(images)


def _check_softmax_regression(answer: Answer, images: Tensor, classes: int) -> None:
    flat = images.flatten(1).double()
    torch.manual_seed(0)
    layer = nn.Linear(flat.shape[1], classes).to(flat)
    found = fisher_diagonal(layer, flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device), "expected")
    wanted = softmax_regression_fisher(flat, layer.weight.detach(), layer.bias.detach())
    route = "per-example gradients of every label against p(1 − p)x², float64"
    apart = float((found - wanted).abs().max())
    answer.check("largest |F − closed form| of softmax regression", apart, 0.0, 1e-12, route)


def _check_divergence(answer: Answer, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What the Fisher is: the curvature of KL(p_θ‖p_θ') at θ' = θ, seen by moving single weights a little."""
    exact = copy.deepcopy(network).double()
    fisher = fisher_diagonal(exact, images, labels, "expected")
    with torch.no_grad():
        here = exact(images).log_softmax(1)
    step, found = 2e-5, 0.0  # small: a ReLU on the way that switches would bend the divergence
    places = fisher.argsort(descending=True)[:: max(1, len(fisher) // 200)][:10]
    weights = flat_parameters(exact).detach().clone()
    for place in places:
        for sign in (1, -1):  # the odd terms cancel
            moved = weights.clone()
            moved[place] += sign * step
            nn.utils.vector_to_parameters(moved, exact.parameters())
            with torch.no_grad():
                there = exact(images).log_softmax(1)
            found += float(kl_div(there, here, reduction="batchmean", log_target=True)) / step**2
    expected = float(fisher[places].sum())
    route = "10 weights moved by ±2e-5 one at a time, KL summed over all labels, float64"
    answer.check("Σ 2 KL(p_θ‖p_θ+εe) / ε² = Σ F", found, expected, 1e-3 * expected, route)


def _check_penalty(answer: Answer) -> None:
    """The three running sums against the sum over tasks as it is written."""
    generator = torch.Generator().manual_seed(0)
    fishers = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    anchors = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    weights = torch.randn(50, generator=generator, dtype=torch.float64)
    penalty = QuadraticPenalty(3.0, 50, weights)
    for fisher, anchor in zip(fishers, anchors, strict=True):
        penalty.add(fisher, anchor)
    written = 3.0 * (fishers * (weights - anchors).square()).sum()
    answer.check("λ Σ_k Σ F_k (θ − θ*_k)² of 4 tasks", float(penalty(weights)), float(written), 1e-10, "term by term")


def _scatter(answer: Answer, fisher: Tensor, sampled: Tensor, shortcut: Tensor, size: int) -> None:
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    alive = ((fisher > 0) & (sampled > 0) & (shortcut > 0)).nonzero()[:, 0]
    rows = alive[:: max(1, len(alive) // _SHOWN)][:_SHOWN]
    x, drawn, short = (values[rows].tolist() for values in (fisher, sampled, shortcut))
    ends = [min(x), max(x)]
    series = [
        Series("labels drawn once", x, drawn, points=True, colour=0),
        Series("shortcut", x, short, points=True, colour=1),
        Series("equal", ends, ends, colour=2),
    ]
    alt = f"The shortcut lies about {size} times below the Fisher"
    answer.figure(
        Figure(
            "fisher",
            svg=plots.lines(
                "continual_learning-fisher", [Panel(series, "estimate", log=True)], "F of a weight", alt, logx=True
            ),
            caption="A dot is a weight: squared mean gradients lie too low, by the size of the batch.",
            title="The Fisher diagonal and its shortcut",
        )
    )
