"""Random numbers of image models: each is a function of the seed and of what it is for, so no generator is kept."""

from __future__ import annotations

import numpy as np
import torch

ORDER, PIXELS, NOISE, DROPOUT, SAMPLES, TEST_PIXELS, TEST_NOISE, TEST_NOISE_AGAIN = range(8)
"""What random numbers are for: the second of the keys of ``seeded``."""


def seeded(seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of the seed and the keys (any number of non-negative integers)."""
    return torch.Generator(device).manual_seed(_mixed(seed, *keys))


def seed_dropout(seed: int, *keys: int, device: torch.device) -> None:
    """Seed torch's global generators (``torch.manual_seed`` takes a millisecond for devices there are not)."""
    mixed = _mixed(seed, DROPOUT, *keys)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def _mixed(seed: int, *keys: int) -> int:
    # numpy takes trailing zeros for nothing: the number of keys tells (1,) from (1, 0)
    return int(np.random.SeedSequence([seed, len(keys), *keys]).generate_state(1, np.uint64)[0] >> np.uint64(1))
