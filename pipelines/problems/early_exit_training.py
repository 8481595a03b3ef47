"""Training of a network with exits and of its plain rivals, and what each answers, costs and takes of the clock."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.problems.early_exit_layers import (
    StagedNetwork,
    counted_macs,
    exit_points,
    joint_loss,
    macs_to_each_exit,
)
from pipelines.problems.image_data import Labelled, LabelledSet
from pipelines.problems.machine import least_seconds
from pipelines.problems.small_networks import accuracy, parameter_count

if TYPE_CHECKING:
    from pipelines.problems.early_exit_network import EarlyExitNetworkConfig

_ROWS = 500  # images that go through a network at a time, where only the answers are wanted


def held_out(train: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Images to train on, and a random share of them to choose a threshold by."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.labels.device)
    count = max(1, round(len(train) * share))
    return train[order[count:]], train[order[:count]]


def fit(network: StagedNetwork, train: Labelled, config: EarlyExitNetworkConfig, seed: int) -> StagedNetwork:
    """Train by AdamW, the rate falling along a half cosine; returns the network in evaluation mode.

    Args:
        network: with exits, by ``joint_loss``; without, by its output's cross-entropy.
        train: whole batches of it are taken, in an order drawn afresh each epoch.
        config: of the stage.
        seed: of that order.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    a_pass = len(train) // config.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epoch_count * a_pass)
    order = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(config.epoch_count):
        rows = torch.randperm(len(train), generator=order).to(train.labels.device)
        for part in rows[: a_pass * config.batch_size].split(config.batch_size):
            batch = train[part]
            optimizer.zero_grad()
            if len(network.exits) > 1:
                loss = joint_loss(network.every_exit(batch.images), batch.labels, config.early_weight)
            else:
                loss = cross_entropy(network(batch.images), batch.labels)
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def all_logits(network: StagedNetwork, images: Tensor) -> list[Tensor]:
    """Logits (n, classes) of every exit."""
    parts = [network.every_exit(part) for part in images.split(_ROWS)]
    return [torch.cat(of_exit) for of_exit in zip(*parts, strict=True)]


def measured(seed: int, images: LabelledSet, config: EarlyExitNetworkConfig, *, timed: bool) -> dict[str, Any]:
    """Train the network with exits, the same without, and a smaller plain one, and measure them.

    Args:
        seed: of weights and order.
        images: to learn and to be measured on.
        config: of the stage.
        timed: also take wall-clock times and count work under skipping.

    Returns:
        ``baseline``, ``small`` and ``early`` (accuracy of the last exit), each ``{accuracy, macs, parameters}``;
        ``exit_macs``; ``validation`` and ``test``, lists of ``ExitPoint`` as plain lists; ``by_exit``, for each
        threshold (accuracy, confidence) of those that leave by each exit; if ``timed``, ``skipping`` and ``seconds``.
    """
    device = images.train.labels.device
    channels = images.train.images.shape[1]
    train, validation = held_out(images.train, config.validation_fraction, config.split_seed)
    one = images.test.images[:1]
    sizes = {
        "early": (config.width, config.blocks, True),
        "baseline": (config.width, config.blocks, False),
        "small": (config.small_width, config.small_blocks, False),
    }
    networks, found = {}, {}
    for name, (width, blocks, exits) in sizes.items():
        torch.manual_seed(seed)
        made = StagedNetwork(channels, images.classes, width, config.stages, blocks, exits=exits).to(device)
        networks[name] = fit(made, train, config, seed)
        with counted_macs(made) as total, torch.no_grad():
            made(one)
        right = accuracy(made, images.test.images, images.test.labels)
        found[name] = {"accuracy": right, "macs": total[0], "parameters": parameter_count(made)}
    early = networks["early"]
    found["exit_macs"] = macs_to_each_exit(early, one)
    for part, these in (("validation", validation), ("test", images.test)):
        points = exit_points(all_logits(early, these.images), these.labels, found["exit_macs"], config.thresholds)
        found[part] = [list(point) for point in points]
    found["by_exit"] = [_by_exit(early, images.test, threshold) for threshold in config.thresholds]
    if timed:
        chosen = config.thresholds[len(config.thresholds) // 2]
        found["skipping"] = _skipping(early, images.test, chosen)
        found["seconds"] = _seconds(networks, images.test.images, config)
    return found


def _by_exit(network: StagedNetwork, test: Labelled, threshold: float) -> list[list[float] | None]:
    """(accuracy, mean confidence) of the images that leave by each exit; None where none does."""
    logits, left_by = _left(network, test.images, threshold)
    found = []
    for number in range(len(network.exits)):
        here = left_by == number
        if not bool(here.any()):
            found.append(None)
            continue
        right = (logits[here].argmax(1) == test.labels[here]).float().mean()
        found.append([float(right), float(logits[here].softmax(1).amax(1).mean())])
    return found


def _left(network: StagedNetwork, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    parts = [network.leave_early(part, threshold) for part in images.split(_ROWS)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _skipping(network: StagedNetwork, test: Labelled, threshold: float) -> dict[str, float]:
    """What really leaving early gives at a threshold: accuracy, work counted while it ran, and images one by one."""
    with counted_macs(network) as total:
        logits, left_by = _left(network, test.images, threshold)
    few = test.images[:64].double()
    exact = network.double()
    together, by_together = exact.leave_early(few, threshold)
    alone = [exact.leave_early(image[None], threshold) for image in few]
    apart = (torch.cat([a[0] for a in alone]) - together).abs().max()
    other = int((torch.cat([a[1] for a in alone]) != by_together).sum())
    network.float()
    return {
        "threshold": threshold,
        "accuracy": float((logits.argmax(1) == test.labels).double().mean()),
        "macs": total[0] / len(test),
        "mean_exit": float(left_by.double().mean()),
        "alone_difference": float(apart),
        "alone_other_exit": other,
    }


def _seconds(
    networks: dict[str, StagedNetwork], images: Tensor, config: EarlyExitNetworkConfig
) -> dict[str, dict[str, list[float]]]:
    """Seconds an image of each network, [wall, processor]: one by one and in a batch; with exits at each threshold."""
    few = images[: config.timed_images]
    found = {}
    for kind, parts in (("single", few.split(1)), ("batch", images[: config.timed_batch].split(config.timed_batch))):
        actions = {name: [partial(_answer, networks[name], part) for part in parts] for name in ("baseline", "small")}
        for threshold in config.thresholds:
            actions[f"{threshold:g}"] = [partial(networks["early"].leave_early, part, threshold) for part in parts]
        count = sum(len(part) for part in parts)
        taken = least_seconds(actions, config.timed_repeats)
        found[kind] = {name: [seconds / count for seconds in both] for name, both in taken.items()}
    return found


@torch.no_grad()
def _answer(network: StagedNetwork, images: Tensor) -> Tensor:
    return network(images)
