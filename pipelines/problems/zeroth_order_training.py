"""A classifier trained on answers of a black box by each estimator of the gradient, and how the estimates scatter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.problems.small_networks import accuracy, perceptron
from pipelines.problems.zeroth_order_math import (
    draw_labels,
    entropy_gradient,
    exact_gradient,
    expected_loss,
    leave_one_out_gradient,
    score_gradient,
)

if TYPE_CHECKING:
    from pipelines.problems.image_data import Labelled, LabelledSet
    from pipelines.problems.zeroth_order import ZerothOrderConfig

_DECAY = 0.95  # of the running mean of losses: the last 20 batches or so


class BlackBox:
    """Says whether an answer is wrong (1) or right (0), and counts how often it was asked.

    Args:
        labels: (N,) what is right; nothing else of the training sees them.
    """

    def __init__(self, labels: Tensor):
        self._labels, self.queries = labels, 0

    def __call__(self, rows: Tensor, answers: Tensor) -> Tensor:
        """Losses (B, K) of the answers (B, K) to the images ``rows`` (B,)."""
        self.queries += answers.numel()
        return (answers != self._labels[rows, None]).float()

    def of_all(self, rows: Tensor, classes: int) -> Tensor:
        """Losses (B, C) of every answer there is."""
        return self(rows, torch.arange(classes, device=rows.device).expand(len(rows), -1))


class Baseline:
    """The running mean of the losses of earlier batches: known before a batch's labels are drawn, so without bias."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    @property
    def value(self) -> float:
        """The mean so far; 0 before the first batch."""
        return self._sum / self._weight if self._weight else 0.0

    def update(self, losses: Tensor) -> None:
        """Take in a batch's losses."""
        self._sum = _DECAY * self._sum + (1 - _DECAY) * float(losses.mean())
        self._weight = _DECAY * self._weight + (1 - _DECAY)


def gradient_at_logits(
    method: str, logits: Tensor, rows: Tensor, box: BlackBox, baseline: Baseline, samples: int, draws: torch.Generator
) -> Tensor:
    """What a method back-propagates from the logits (B, C) of the images ``rows``: its estimate of ∇_z of their losses.

    Args:
        method: exact, none, mean, several or leave_one_out.
        logits: (B, C), without history.
        rows: (B,).
        box: asked for losses.
        baseline: of ``mean``; updated after it was used.
        samples: K of several and leave_one_out; the others draw one label.
        draws: generator of the labels.
    """
    if method == "exact":
        return exact_gradient(logits, box.of_all(rows, logits.shape[1]))
    labels = draw_labels(logits, samples if method in ("several", "leave_one_out") else 1, draws)
    losses = box(rows, labels)
    if method == "leave_one_out":
        return leave_one_out_gradient(logits, labels, losses)
    found = score_gradient(logits, labels, losses, baseline.value if method == "mean" else 0.0)
    baseline.update(losses)
    return found


def train(method: str, seed: int, images: LabelledSet, config: ZerothOrderConfig) -> dict[str, Any]:
    """Train one classifier.

    Args:
        method: supervised (cross-entropy, which sees the labels) or one of ``gradient_at_logits``.
        seed: of the first weights, the order of the images and the labels drawn. All methods begin with the same
            weights and see the same batches.
        images: to learn and to be measured on.
        config: of the stage.

    Returns:
        ``steps``, ``queries`` and ``accuracy`` (on the test images) at equally many moments; of leave_one_out and the
        first seed ``scatter`` too, else an empty list in its place.
    """
    torch.manual_seed(seed)
    device = images.train.labels.device
    network = perceptron(tuple(images.train.images.shape[1:]), images.classes, config.width).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    order = torch.Generator().manual_seed(seed + 1)
    draws = torch.Generator(device).manual_seed(seed + 2)
    box, baseline = BlackBox(images.train.labels), Baseline()
    steps, moments = config.step_count, config.moments
    curve: dict[str, Any] = {"steps": [], "queries": [], "accuracy": [], "scatter": []}
    for step in range(steps + 1):
        if step in moments:
            curve["steps"].append(step)
            curve["queries"].append(box.queries)
            curve["accuracy"].append(accuracy(network, images.test.images, images.test.labels))
            if method == "leave_one_out" and seed == config.seed:
                curve["scatter"].append(scatter(network, images.train, config, seed=step))
        if step == steps:
            return curve
        rows = torch.randint(len(images.train), (config.batch_size,), generator=order).to(device)
        logits = network(images.train.images[rows])
        optimizer.zero_grad()
        if method == "supervised":
            cross_entropy(logits, images.train.labels[rows]).backward()
        else:
            found = gradient_at_logits(method, logits.detach(), rows, box, baseline, config.samples, draws)
            logits.backward((found + config.entropy_weight * entropy_gradient(logits.detach())) / len(rows))
        optimizer.step()


def scatter(network: nn.Module, train: Labelled, config: ZerothOrderConfig, seed: int) -> dict[str, float]:
    """How far each method's estimate of one batch's gradient lies from that gradient, all at the same weights.

    Args:
        network: at whose weights.
        train: the batch is its first ``batch_size`` images.
        config: ``estimates`` says how many estimates of each method are drawn.
        seed: of the labels drawn.

    Returns:
        method -> mean of ‖ĝ − g‖² over the estimates, in the space of the weights; ``gradient`` -> ‖g‖²; ``loss`` ->
        the batch's expected loss J.
    """
    batch = train[: config.batch_size]
    rows = torch.arange(len(batch), device=batch.labels.device)
    box, draws = BlackBox(batch.labels), torch.Generator(rows.device).manual_seed(seed)
    parameters = list(network.parameters())
    logits = network(batch.images)

    def weights_gradient(at_logits: Tensor) -> Tensor:
        found = torch.autograd.grad(logits, parameters, at_logits / len(rows), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    fixed = logits.detach()
    losses = box.of_all(rows, fixed.shape[1])
    exact, expected = weights_gradient(exact_gradient(fixed, losses)), expected_loss(fixed, losses).mean()
    found = {"gradient": float(exact.square().sum()), "loss": float(expected)}
    for method in ("none", "mean", "several", "leave_one_out"):
        distances = []
        for _ in range(config.estimates):
            baseline = Baseline()
            baseline.update(expected)  # what the running mean is near, at these weights
            at_logits = gradient_at_logits(method, fixed, rows, box, baseline, config.samples, draws)
            distances.append(float((weights_gradient(at_logits) - exact).square().sum()))
        found[method] = sum(distances) / len(distances)
    return found
