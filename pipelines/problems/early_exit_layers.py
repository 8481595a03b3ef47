"""A network of residual stages with a way out after each: joint training, exit by entropy, work counted by hooks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Block(nn.Module):
    """The basic block of He et al. 2016 (fig. 2, table 1): two 3×3 convolutions and a way around them.

    Args:
        before, after: channels.
        stride: of the first convolution; the way around is then a 1×1 convolution.
    """

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, ⌈h/stride⌉, ⌈w/stride⌉)."""
        return (self.body(x) + self.around(x)).relu()


class StagedNetwork(nn.Module):
    """ResNet-18's plan at a small width: a 3×3 stem and stages of basic blocks, each of twice the channels.

    Every stage but the first halves the sides. After each stage stands an exit: means over the pixels and a linear
    layer. The last one's, the network's own output, takes one mean of all pixels, as ResNet does; the early ones take
    those of the four quarters, since early features do not yet say where something is.

    Args:
        channels: of the images.
        classes: how many.
        width: channels of the first stage.
        stages: how many, 4 in ResNet-18.
        blocks: of each stage, 2 in ResNet-18.
        exits: False for the plain network, which has the last exit only.
    """

    def __init__(
        self, channels: int, classes: int, width: int, stages: int = 4, blocks: int = 2, *, exits: bool = True
    ):
        super().__init__()
        widths = [width * 2**i for i in range(stages)]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        for number, after in enumerate(widths):
            before, stride = (width, 1) if number == 0 else (widths[number - 1], 2)
            rest = [Block(after, after, 1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(Block(before, after, stride), *rest))
        self.heads = nn.ModuleDict()
        for number in range(stages) if exits else [stages - 1]:
            parts = 1 if number == stages - 1 else 2
            linear = nn.Linear(widths[number] * parts**2, classes)
            self.heads[str(number)] = nn.Sequential(nn.AdaptiveAvgPool2d(parts), nn.Flatten(), linear)

    @property
    def exits(self) -> list[int]:
        """The stages that have an exit after them, in order; the last stage's is always there."""
        return [int(name) for name in self.heads]

    def every_exit(self, images: Tensor) -> list[Tensor]:
        """Logits (n, classes) of every exit, all stages computed for all images: what training looks at."""
        found, x = [], self.stem(images)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if str(number) in self.heads:
                found.append(self.heads[str(number)](x))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of the last exit alone: no other exit is computed."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.heads[str(len(self.stages) - 1)](x)

    @torch.no_grad()
    def leave_early(self, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Each image leaves at the first exit whose entropy is under the threshold, by itself.

        An image that has left is taken out of the batch, so the stages after its exit are not computed for it. In
        evaluation mode no layer mixes images, so each image's answer is what it would be alone.

        Args:
            images: (n, c, h, w).
            threshold: nats; 0 lets none leave before the last exit.

        Returns:
            Logits (n, classes) of the exit that each image left by, and which exit that was, (n,) from 0.
        """
        rows = torch.arange(len(images), device=images.device)
        logits = images.new_empty(len(images), self.heads[str(len(self.stages) - 1)][-1].out_features)
        left_by = torch.empty(len(images), dtype=torch.int64, device=images.device)
        x = self.stem(images)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if str(number) not in self.heads:
                continue
            here = self.heads[str(number)](x)
            last = number == len(self.stages) - 1
            leaving = torch.ones(len(x), dtype=torch.bool, device=x.device) if last else entropy(here) < threshold
            count = int(leaving.sum())
            if not count:
                continue
            logits[rows[leaving]], left_by[rows[leaving]] = here[leaving], self.exits.index(number)
            if count == len(x):
                break
            rows, x = rows[~leaving], x[~leaving]
        return logits, left_by


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), (n, classes) to (n,)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def joint_loss(exits: Sequence[Tensor], labels: Tensor, early_weight: float) -> Tensor:
    """Cross-entropy of the last exit and ``early_weight`` times that of each other (as in BranchyNet, eq. 1).

    Teerapittayanon, McDanel and Kung 2016. Logits (n, classes) of each exit, labels (n,); in nats an image.
    """
    early = sum((cross_entropy(logits, labels) for logits in exits[:-1]), torch.zeros((), device=labels.device))
    return cross_entropy(exits[-1], labels) + early_weight * early


@contextlib.contextmanager
def counted_macs(network: nn.Module) -> Iterator[list[int]]:
    """Count multiply-accumulates of convolutions and linear layers while the context is open.

    A hook on each layer adds outputs × inputs of one output: for a convolution n·C_out·H_out·W_out times
    C_in/groups·k_h·k_w, for a linear layer n·out times in. Norms, activations and means over pixels are left out, as is
    usual.

    Yields:
        A list of one number: what was counted so far.
    """
    total = [0]

    def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            total[0] += output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        else:
            total[0] += output.numel() * layer.in_features

    hooks = [
        layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def macs_to_each_exit(network: StagedNetwork, image: Tensor) -> list[int]:
    """Multiply-accumulates that one image costs which leaves by each exit, the exits it passed included.

    Args:
        network: any.
        image: (1, c, h, w).
    """
    found = []
    with counted_macs(network) as total:
        x = network.stem(image)
        for number, stage in enumerate(network.stages):
            x = stage(x)
            if str(number) in network.heads:
                network.heads[str(number)](x)
                found.append(total[0])
    return found


class ExitPoint(NamedTuple):
    """What a threshold gives on a set of images.

    Attributes:
        threshold: nats.
        accuracy: share answered rightly.
        macs: mean multiply-accumulates an image.
        shares: share of the images that left by each exit.
    """

    threshold: float
    accuracy: float
    macs: float
    shares: tuple[float, ...]


def exit_points(
    exits: Sequence[Tensor], labels: Tensor, macs: Sequence[int], thresholds: Sequence[float]
) -> list[ExitPoint]:
    """What each threshold would give, read off the logits of all exits (no stage is computed again).

    Args:
        exits: logits (n, classes) of every exit.
        labels: (n,).
        macs: to each exit.
        thresholds: nats.
    """
    uncertain = torch.stack([entropy(logits) for logits in exits])  # (exits, n)
    right = torch.stack([logits.argmax(1) == labels for logits in exits])
    found = []
    for threshold in thresholds:
        leaves = uncertain < threshold
        leaves[-1] = True
        left_by = leaves.int().argmax(0)  # the first exit that lets it go
        shares = [float((left_by == i).double().mean()) for i in range(len(exits))]
        accuracy = float(right.gather(0, left_by[None]).double().mean())
        cost = sum(share * number for share, number in zip(shares, macs, strict=True))
        found.append(ExitPoint(float(threshold), accuracy, cost, tuple(shares)))
    return found


def least_winning(points: Sequence[ExitPoint], accuracy: float, macs: float) -> ExitPoint | None:
    """The least threshold that is at least as accurate as a rival at no more work; None if there is none."""
    winning = [p for p in points if p.accuracy >= accuracy and p.macs <= macs]
    return min(winning, key=lambda p: p.threshold, default=None)
