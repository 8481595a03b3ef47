"""What a family of generative models is to the training loop: a few functions on batches of images.

The loop (``loop.py``) knows nothing of diffusion, variational bounds or games. It owns the data order, the devices and
processes, precision, gradients, optimizer steps, averages of weights, logs, pictures and checkpoints. A method owns its
networks, its losses, its sampler and its bounds; it keeps no state outside its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Batch:
    """Images as a method sees them.

    Attributes:
        images: (B, C, H, W), float32 in [0, 1]; exactly 0 or 1 where the configuration binarizes.
        labels: (B,), int64, from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


class Draws:
    """The random numbers of some rows of a step: a function of (seed, step, row) alone, whoever holds the row.

    Every call draws for all rows of the step and keeps those that are wanted. So a batch cut into parts, on one process
    or on several, sees the same numbers as the whole; and a resumed run the same as one never stopped. What makes this
    true is that all holders of rows make the same calls in the same order.

    Args:
        generator: seeded for the step, on the device of the images.
        rows: rows of the whole step.
        start: first row wanted.
        stop: end of the rows wanted (exclusive).
    """

    def __init__(self, generator: torch.Generator, rows: int, start: int = 0, stop: int | None = None):
        self.generator, self.rows = generator, rows
        self.wanted = slice(start, rows if stop is None else stop)
        self.device = generator.device

    def __len__(self) -> int:
        return self.wanted.stop - self.wanted.start

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape), float32, uniform on [0, 1)."""
        return torch.rand(self.rows, *shape, generator=self.generator, device=self.device)[self.wanted]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), float32, standard normal."""
        return torch.randn(self.rows, *shape, generator=self.generator, device=self.device)[self.wanted]

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape), int64, uniform on low..high-1."""
        size = (self.rows, *shape)
        return torch.randint(low, high, size, generator=self.generator, device=self.device)[self.wanted]


class Method(Protocol):
    """One family of models, ready to be trained, sampled and measured.

    Attributes:
        name: prefix of its metrics, ``vae`` in ``vae/negative_elbo``.
        parts: name -> module. All are moved to the device, checkpointed and restored, buffers included.
        phases: names of the parts that have an optimizer, in the order in which a step updates them. Where a step has
            several phases (a GAN), each phase sees the whole batch and the weights that the phases before it left; the
            parts of the other phases take no gradient meanwhile.
        averaged: names of the parts of which an exponential moving average is kept (if the configuration asks for one).
        estimated: measures of ``evaluate`` that are estimates by random draws and whose Monte Carlo error is reported.
    """

    name: str
    parts: dict[str, nn.Module]
    phases: tuple[str, ...]
    averaged: tuple[str, ...]
    estimated: tuple[str, ...]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Phase -> an optimizer of that part's parameters (``training.adam`` makes the usual one)."""

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some rows of the step's batch.

        Args:
            phase: whose part is updated.
            batch: rows; the loss has to be a mean over them, since parts of a batch are averaged.
            draws: their random numbers, fresh for each phase.
            step: optimizer steps done before this one.

        Returns:
            A scalar, and what to log (detached; means over the rows; the same names every time): scalars, or vectors
            whose norm is logged once the mean over all rows of the step is taken.
        """

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """New images.

        Args:
            count: how many.
            generator: of the noise.
            labels: (count,), int64: wanted classes, for conditional models; ignored by others.

        Returns:
            (count, C, H, W), float32 in [0, 1], without gradients.
        """

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Quantities of each held-out image: bounds in nats, reconstruction errors … Empty where there are none.

        The caller walks over the test set, shares it out over the processes and makes means and standard errors of it.

        Returns:
            measure -> (B,), float; it becomes the metric ``NAME/measure``.
        """

    def pictures(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Pictures beyond plain samples, each (rows, columns, C, H, W) in [0, 1]: reconstructions, strips …

        Args:
            batch: some held-out images.
            generator: of the noise.

        Yields:
            Name of the file (without suffix) and the picture.
        """

    def pipeline(self) -> DiffusionPipeline:
        """The parts as they are now, as a pipeline whose ``save_pretrained`` is what others load."""
