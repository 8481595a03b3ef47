"""The log of a training: means over steps, measures on the way, the time they took; kept for ``log_history.json``, and
sent to trackers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.tracking import LOGS, PROJECT, named, run_name
from pipelines.training import check_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.images.training import ImageTrainingConfig

CLOCKS = ("train_runtime", "train_cpu_runtime")
"""Entries of the log: seconds of training by the clock and by the processor."""


class Clock:
    """Time that training took, from ``start`` to ``stop``, by the clock and by the processor (of all threads).

    Args:
        train_runtime: seconds by the clock, so far.
        train_cpu_runtime: seconds of processor time of this process, so far.
    """

    def __init__(self, train_runtime: float = 0.0, train_cpu_runtime: float = 0.0):
        self._sums = [train_runtime, train_cpu_runtime]

    def start(self) -> None:
        self._since = [time.monotonic(), time.process_time()]

    def stop(self) -> None:
        now = [time.monotonic(), time.process_time()]
        self._sums = [total + end - begin for total, end, begin in zip(self._sums, now, self._since, strict=True)]

    def read(self) -> dict[str, float]:
        """The two sums by name; what ran since the last ``start`` is not in them."""
        return {name: round(value, 3) for name, value in zip(CLOCKS, self._sums, strict=True)}


class TrainingLog:
    """Entries with ``step``, ``epoch``, the two clocks and what was found; the same to the trackers.

    Args:
        config: where to, and the learning rate for messages.
        accelerator: of the stage.
        steps_per_epoch: optimizer steps.

    Attributes:
        entries: so far.
        clock: runs while it trains.
    """

    def __init__(self, config: ImageTrainingConfig, accelerator: Accelerator, steps_per_epoch: int):
        self.config, self.accelerator, self.steps_per_epoch = config, accelerator, steps_per_epoch
        self.entries: list[dict[str, Any]] = []
        self.clock = Clock()
        self._sums: dict[str, Tensor] = {}

    def open(self) -> None:
        """Start the trackers."""
        if self.config.report_to != "none":
            name = LOGS if self.config.report_to == "tensorboard" else PROJECT
            given = {self.config.report_to: {"name": run_name(self.config.output_dir)}}
            self.accelerator.init_trackers(name, init_kwargs={} if name == LOGS else given)

    def close(self) -> None:
        """End the trackers."""
        if self.config.report_to != "none":
            self.accelerator.end_training()

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in scalars of a step, under the same names in every step."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def write(self, step: int, rates: dict[str, float]) -> None:
        """An entry with the means over the steps since the last one, and over the processes.

        Args:
            step: the last of them.
            rates: learning rates.

        Raises:
            UserError: a loss that is not finite.
        """
        count = (step - 1) % self.config.logging_steps + 1
        values = [torch.as_tensor(value, device=self.accelerator.device) for value in self._sums.values()]
        means = torch.stack(values) / count
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        entry = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums = {}
        for name, value in entry.items():
            if name.endswith("loss"):
                check_finite(value, name, step, self.config.learning_rate)
        self.note(step, entry | rates)

    def note(self, step: int, found: dict[str, float]) -> None:
        """An entry of what was found after a step."""
        place = {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        self.entries.append(found | place | self.clock.read())
        if self.config.report_to != "none":
            counted = {"epoch": place["epoch"]} | (
                {} if self.config.report_to == "tensorboard" else {"global_step": step}
            )
            self.accelerator.log(named(found | counted), step=step)
