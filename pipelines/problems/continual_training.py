"""A classifier that learns permuted images task after task: plainly, with EWC's penalty, or with rehearsal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.problems.continual_math import (
    QuadraticPenalty,
    fisher_diagonal,
    flat_parameters,
    shortcut_diagonal,
)
from pipelines.problems.image_data import Labelled, LabelledSet
from pipelines.problems.small_networks import accuracy, convolutional, perceptron

if TYPE_CHECKING:
    from pipelines.problems.continual_learning import ContinualLearningConfig


class Run(NamedTuple):
    """One sequence of tasks.

    Attributes:
        network: mlp or cnn.
        method: naive, ewc, shortcut or rehearsal.
        value: λ of ewc and shortcut, images kept of each task of rehearsal, 0 of naive.
        tasks: how many.
        seed: of weights, permutations, order and draws; all methods of a seed see the same tasks.
    """

    network: str
    method: str
    value: float
    tasks: int
    seed: int


class Permutation:
    """A task: the same images with their pixels in another order. The first task leaves them as they are.

    Args:
        pixels: values of an image.
        seed: of the sequence of tasks.
        number: of the task, from 0.
        device: of the images.
    """

    def __init__(self, pixels: int, seed: int, number: int, device: torch.device):
        order = torch.arange(pixels)
        if number:
            order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed * 1000 + number))
        self.order = order.to(device)

    def __call__(self, part: Labelled) -> Labelled:
        """The images as this task shows them."""
        return Labelled(part.images.flatten(1)[:, self.order].reshape(part.images.shape), part.labels)


class Method:
    """Naive fine-tuning, and what the others change of it."""

    def penalty(self, network: nn.Module) -> Tensor | None:
        """What is added to a step's loss; None for nothing."""
        return None

    def replay(self, generator: torch.Generator) -> Labelled | None:
        """Images of earlier tasks that join a step's batch; None for none."""
        return None

    def end_task(self, network: nn.Module, task: Labelled, generator: torch.Generator) -> None:
        """Called with a task's training images when it has been learned."""


class Ewc(Method):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): a penalty for leaving what earlier tasks need.

    Args:
        strength: λ.
        config: how many images, and which labels, the Fisher information is estimated by.
        shortcut: take the squared mean gradient of batches in place of the mean squared gradient.
    """

    def __init__(self, strength: float, config: ContinualLearningConfig, *, shortcut: bool = False):
        self.strength, self.config, self.shortcut = strength, config, shortcut
        self._penalty: QuadraticPenalty | None = None

    def penalty(self, network: nn.Module) -> Tensor | None:
        return None if self._penalty is None else self._penalty(flat_parameters(network))

    def end_task(self, network: nn.Module, task: Labelled, generator: torch.Generator) -> None:
        some = task[_chosen(len(task), self.config.fisher_examples, generator)]
        kind, draws = self.config.fisher_labels, _on(task.images.device, generator)
        if self.shortcut:
            size = min(self.config.batch, len(some))
            labels = "data" if kind == "data" else "sampled"
            fisher = shortcut_diagonal(network, some.images, some.labels, size, labels, draws)
        else:
            fisher = fisher_diagonal(network, some.images, some.labels, kind, draws)
        weights = flat_parameters(network).detach()
        if self._penalty is None:
            self._penalty = QuadraticPenalty(self.strength, len(weights), weights)
        self._penalty.add(fisher, weights)


class Rehearsal(Method):
    """Experience replay (Chaudhry et al. 2019): some images of each task are kept and learned again with the next ones.

    Args:
        memory: images kept of each task.
        batch: at most so many of them join a step.
    """

    def __init__(self, memory: int, batch: int):
        self.memory, self.batch = memory, batch
        self._kept: Labelled | None = None

    def replay(self, generator: torch.Generator) -> Labelled | None:
        if self._kept is None:
            return None
        return self._kept[_chosen(len(self._kept), self.batch, generator).to(self._kept.labels.device)]

    def end_task(self, network: nn.Module, task: Labelled, generator: torch.Generator) -> None:
        new = task[_chosen(len(task), self.memory, generator).to(task.labels.device)]
        if self._kept is not None:
            both = (self._kept, new)
            new = Labelled(torch.cat([b.images for b in both]), torch.cat([b.labels for b in both]))
        self._kept = new


def _chosen(count: int, at_most: int, generator: torch.Generator) -> Tensor:
    """At most so many different rows of ``count``, at random."""
    return torch.randperm(count, generator=generator)[:at_most]


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on the device, seeded by another on the CPU."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def make_network(name: str, shape: tuple[int, ...], classes: int, config: ContinualLearningConfig) -> nn.Module:
    """``mlp`` or ``cnn``, with weights from torch's global generator."""
    return (
        perceptron(shape, classes, config.hidden) if name == "mlp" else convolutional(shape, classes, config.channels)
    )


def make_method(run: Run, config: ContinualLearningConfig) -> Method:
    """What a run learns by."""
    if run.method == "rehearsal":
        return Rehearsal(int(run.value), config.batch)
    if run.method == "naive":
        return Method()
    return Ewc(run.value, config, shortcut=run.method == "shortcut")


def learn_task(
    network: nn.Module, task: Labelled, method: Method, config: ContinualLearningConfig, generator: torch.Generator
) -> None:
    """A task's epochs: SGD with momentum on cross-entropy, whatever the method adds to it.

    Images that are replayed join the batch: each image of both counts the same.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=config.momentum, fused=True)
    for _ in range(config.epoch_count):
        order = torch.randperm(len(task), generator=generator).to(task.labels.device)
        for rows in order.split(config.batch):
            images, labels = task.images[rows], task.labels[rows]
            old = method.replay(generator)
            if old is not None:
                images, labels = torch.cat([images, old.images]), torch.cat([labels, old.labels])
            loss = cross_entropy(network(images), labels)
            penalty = method.penalty(network)
            optimizer.zero_grad()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()


def learn_sequence(
    run: Run, images: LabelledSet, validation: Labelled, config: ContinualLearningConfig
) -> dict[str, Any]:
    """Learn the tasks one after the other.

    Args:
        run: which sequence, how.
        images: training images (without the validation images) and test images.
        validation: images by which λ is chosen.
        config: of the stage.

    Returns:
        ``test`` and ``validation``: (T, T) lists, row t the accuracies on all tasks after learning task t.
    """
    shape, device = tuple(images.train.images.shape[1:]), images.train.labels.device
    torch.manual_seed(run.seed)
    network = make_network(run.network, shape, images.classes, config).to(device)
    pixels = images.train.images[0].numel()
    tasks = [Permutation(pixels, run.seed, number, device) for number in range(run.tasks)]
    method, generator = make_method(run, config), torch.Generator().manual_seed(run.seed)
    shown = {"test": images.test, "validation": validation}
    found: dict[str, Any] = {name: [] for name in shown}
    for task in tasks:
        learning = task(images.train)
        learn_task(network, learning, method, config, generator)
        method.end_task(network, learning, generator)
        for name, part in shown.items():
            seen = [other(part) for other in tasks]
            found[name].append([accuracy(network, s.images, s.labels) for s in seen])
    return found
