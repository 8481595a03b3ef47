"""Which set each example of a mixture comes from, and the order of the examples that are in memory together.

Both are functions of the seed and of numbers that count from the beginning of the run, so that a run that was killed
goes on with the very examples that were to come, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = (5**0.5 - 1) / 2


def set_of_slots(weights: Sequence[float], first: int, count: int, seed: int = 0) -> np.ndarray:
    """The set that each of ``count`` examples is drawn from, beginning with example ``first`` of the run.

    Example i goes to the set in whose share of [0, 1) the point (u + i·φ) mod 1 lies, with φ the golden ratio and u
    drawn from the seed. These points are of low discrepancy (Kuipers and Niederreiter 1974, chapter 2): after n
    examples each set is O(log n) of them off its share, where independent draws would be O(√n) off.

    Args:
        weights: of the sets, above 0, of any scale.
        first: number of the first example.
        count: how many.
        seed: of the mixture.

    Returns:
        (count,) int64, indices into ``weights``.
    """
    shares = np.cumsum(np.asarray(weights, dtype=np.float64))
    start = np.random.default_rng([seed, len(weights)]).random()
    # A double holds the fraction of i·φ to 1e-7 still at a billion examples.
    points = (start + np.arange(first, first + count, dtype=np.float64) * _GOLDEN) % 1.0
    return np.minimum(np.searchsorted(shares / shares[-1], points, side="right"), len(weights) - 1)


def pool_order(lengths: Sequence[int] | None, step_size: int, seed: int, pool: int, count: int) -> np.ndarray:
    """The order of the examples of a pool: shuffled; with ``lengths``, those of a step are of like length.

    The shuffled examples are sorted by length (equal ones stay shuffled), cut into steps, and the steps are shuffled.

    Args:
        lengths: (count,) of the examples; None: a plain shuffle.
        step_size: examples of one optimizer step, over all processes; divides ``count``.
        seed: of the order.
        pool: number of the pool in the run.
        count: examples in it.

    Returns:
        (count,) int64, a permutation.
    """
    generator = np.random.default_rng([seed, pool, count])
    order = generator.permutation(count)
    if lengths is None:
        return order
    order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
    return order.reshape(-1, step_size)[generator.permutation(count // step_size)].reshape(-1)


def share_of(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone: which split an example belongs to."""
    import hashlib

    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64
