"""The two small classifiers of the exercises: a perceptron of two hidden layers, and a network of two convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def perceptron(shape: tuple[int, ...], classes: int, width: int) -> nn.Module:
    """Two hidden layers of ``width`` units. (n, *shape) to (n, classes) logits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(int(torch.Size(shape).numel()), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def convolutional(shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """Two 3×3 convolutions of stride 2 with ``width`` and 2·``width`` channels, one hidden layer of 4·``width`` units.

    (n, *shape) to (n, classes) logits. Neither network has batch statistics, so the gradient of an example does not
    depend on the others of its batch.
    """
    channels, *sides = shape
    after = [(side + 3) // 4 for side in sides]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * after[0] * after[1], 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, classes),
    )


def parameter_count(network: nn.Module) -> int:
    """How many weights a network has."""
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images (n, C, H, W) whose likeliest class is their label (n,)."""
    answers = torch.cat([network(part).argmax(1) for part in images.split(2000)])
    return float((answers == labels).float().mean())
