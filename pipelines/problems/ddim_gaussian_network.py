"""A small network that learns what a reverse step needs from samples of X₀ alone, without knowing their law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class CleanSample(nn.Module):
    """f(x, t): (n,), (n,) -> (n,), what the clean sample is expected to be; it reads x and log √t, the noise's scale.

    Args:
        width: of its two hidden layers.
    """

    def __init__(self, width: int):
        super().__init__()
        layers = (nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.stack([x, t.log() / 2], dim=-1)).squeeze(-1)


@dataclass(frozen=True)
class Training:
    """How it is trained: ``steps`` of ``batch`` samples each at a rate that falls from ``rate`` to 0 as a cosine."""

    steps: int
    batch: int
    width: int
    rate: float
    seed: int


def train(
    samples: Tensor, levels: int, how: Training, target: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[CleanSample, list[float]]:
    """Minimize E|f(x_t, t) − x₀|² with x_t = x₀ + √t·z and t drawn from {1/levels, …, 1}.

    The target is the sample itself, which the data give; the minimizer is E[X₀ | X_t], which nobody was told.

    Args:
        samples: (n,) of X₀.
        levels: T.
        how: see ``Training``.
        target: of (x_t, t), shown in place of the sample; None: the sample.

    Returns:
        The network, and the loss of each step.
    """
    generator = torch.Generator().manual_seed(how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        network = CleanSample(how.width)
    optimizer = torch.optim.Adam(network.parameters(), lr=how.rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    losses = []
    for _ in range(how.steps):
        clean = samples[torch.randint(len(samples), (how.batch,), generator=generator)]
        t = torch.randint(1, levels + 1, (how.batch,), generator=generator) / levels
        noisy = clean + t.sqrt() * torch.randn(how.batch, generator=generator)
        wanted = clean if target is None else target(noisy, t)
        loss = (network(noisy, t) - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.item())
    return network, losses


@torch.no_grad()
def expected(network: CleanSample, x: np.ndarray, t: float) -> np.ndarray:
    """f(x, t) of many x at one t."""
    values = torch.as_tensor(x, dtype=torch.float32)
    return network(values, torch.full_like(values, t)).double().numpy()


def sample(network: CleanSample, x: np.ndarray, steps: int, generator: np.random.Generator | None) -> np.ndarray:
    """Run the reverse chain with what the network says, from ``x`` at t = 1.

    E[X_{t−Δt} | x_t] = x_t + (Δt/t)(E[X₀ | x_t] − x_t): on the straight way from here to the clean sample. With a
    generator: that mean and noise of the variance (t−Δt)Δt/t of X_{t−Δt} given X_t *and* X₀ would lack the spread of
    X₀; so noise of variance Δt is added, as one does who knows no σ. Without: half of that way and no noise (DDIM).
    """
    for level in range(steps, 0, -1):
        way = (expected(network, x, level / steps) - x) / level
        noise = None if generator is None else generator.standard_normal(len(x)) / np.sqrt(steps)
        x = x + way / 2 if noise is None else x + way + noise
    return x
