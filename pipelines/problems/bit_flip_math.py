"""Bit-flip diffusion by brute force, in numpy and float64: coins one by one, paths one by one, whole images one by one.

Nothing here uses ``pipelines.images.bitflip_math``: it is what that is checked against. Pixels are −1 and +1, in
tables in that order; at stage t a pixel flips with probability δ_t: it is replaced by a fair coin with probability 2δ_t
(Sohl-Dickstein et al. 2015, appendix B.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDES = np.array([-1, 1])


# -------------------------------------------------------------------------------------------------------------- a pixel


@dataclass(frozen=True)
class Coins:
    """What became of N pixels that all began at +1.

    Attributes:
        values: Y_T, (N,), ±1.
        replaced: whether a fair coin took the pixel's place at any stage, (N,).
        coins: how many coins were thrown for each, (N,).
    """

    values: np.ndarray
    replaced: np.ndarray
    coins: np.ndarray


def stage_by_stage(draw: np.random.Generator, count: int, deltas: Sequence[float]) -> Coins:
    """Throw a biased coin (replace it?) at every stage, and a fair one (by which side?) where it says so."""
    values, replaced = np.ones(count, int), np.zeros(count, bool)
    coins = np.full(count, len(deltas))
    for delta in deltas:
        now = draw.random(count) < 2 * delta
        values[now] = draw.choice(SIDES, now.sum())
        replaced |= now
        coins += now
    return Coins(values, replaced, coins)


def one_shot(draw: np.random.Generator, count: int, keep: float) -> Coins:
    """Throw one biased coin (was it ever replaced? with probability 1 − keep), and a fair one where it was."""
    values = np.ones(count, int)
    replaced = draw.random(count) >= keep
    values[replaced] = draw.choice(SIDES, replaced.sum())
    return Coins(values, replaced, 1 + replaced)


def replaced_by_enumeration(deltas: Sequence[float]) -> float:
    """P(replaced at some stage), summed over all 2^T outcomes of the biased coins but the one without a replacement."""
    total = 0.0
    for outcome in itertools.product((False, True), repeat=len(deltas)):
        if any(outcome):
            total += np.prod([2 * d if hit else 1 - 2 * d for d, hit in zip(deltas, outcome, strict=True)])
    return float(total)


def paths(deltas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Every path of a pixel from Y_0 = +1, and its probability, the product of its stages'.

    Returns:
        (2^T, T + 1) of ±1, Y_0 first; and (2^T,).
    """
    flips = np.array(list(itertools.product((1, -1), repeat=len(deltas))))
    d = np.asarray(deltas)
    probability = np.where(flips == -1, d, 1 - d).prod(1)
    return np.concatenate([np.ones((len(flips), 1), int), flips.cumprod(1)], axis=1), probability


def posterior_by_paths(deltas: Sequence[float], stage: int) -> dict[int, float]:
    """P(Y_{t−1} = +1 | Y_t = y, Y_0 = +1) for y = ±1: probability of the paths through both, over those through y."""
    values, probability = paths(deltas[:stage])
    found = {}
    for y in SIDES.tolist():
        through = values[:, stage] == y
        found[y] = float(probability[through & (values[:, stage - 1] == 1)].sum() / probability[through].sum())
    return found


def posteriors_by_matrices(deltas: Sequence[float]) -> np.ndarray:
    """The same for t = 1 … T, by products of 2×2 stage matrices: (T, 2), for y = −1 and +1."""
    before, rows = np.array([0.0, 1.0]), []
    for d in deltas:
        joint = before[:, None] * np.array([[1 - d, d], [d, 1 - d]])
        rows.append(joint[1] / joint.sum(0))
        before = joint.sum(0)
    return np.array(rows)


def keeps_by_products(deltas: Sequence[float]) -> np.ndarray:
    """E[Y_t | Y_0 = +1] for t = 0 … T, by products of stage matrices: (T + 1,)."""
    row, found = np.array([0.0, 1.0]), [1.0]
    for d in deltas:
        row = row @ np.array([[1 - d, d], [d, 1 - d]])
        found.append(float(row @ SIDES))
    return np.array(found)


def cosine_deltas(stages: int) -> np.ndarray:
    """δ_1 … δ_T such that ρ_t = cos(πt/2T): small flips while there is much to lose, fair coins at the end. (T,)"""
    keep = np.cos(np.pi / 2 * np.arange(stages + 1) / stages)
    return (1 - keep[1:] / keep[:-1]) / 2


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(Bernoulli(p) ‖ Bernoulli(q)), nats, of the broadcast shape."""
    from scipy.special import rel_entr

    return rel_entr(p, q) + rel_entr(1 - np.asarray(p), 1 - np.asarray(q))


# ------------------------------------------------------------------------------------------------ a world of few pixels


@dataclass(frozen=True)
class World:
    """All images of m pixels, and how probable each is.

    Args:
        images: (2^m, m) of ±1, every one of them.
        data: (2^m,) P(Y_0).
    """

    images: np.ndarray
    data: np.ndarray

    @classmethod
    def random(cls, pixels: int, seed: int) -> World:
        """Uneven random probabilities, so that pixels depend on one another."""
        images = np.array(list(itertools.product(SIDES, repeat=pixels)))
        return cls(images, np.random.default_rng(seed).dirichlet(np.full(len(images), 0.4)))

    def kernel(self, delta: float) -> np.ndarray:
        """P(Y_t = column | Y_{t−1} = row) of whole images: pixels flip independently. (2^m, 2^m)"""
        flips = (self.images[:, None] != self.images[None]).sum(-1)
        return delta**flips * (1 - delta) ** (self.images.shape[1] - flips)

    def marginals(self, deltas: Sequence[float]) -> list[np.ndarray]:
        """P(Y_0), …, P(Y_T), each (2^m,)."""
        found = [self.data]
        for delta in deltas:
            found.append(found[-1] @ self.kernel(delta))
        return found

    def _inside(self, pixel: int) -> np.ndarray:
        return self.images[:, pixel] == 1

    def previous(self, before: np.ndarray, delta: float) -> np.ndarray:
        """P(Y_{t−1,i} = +1 | Y_t) by Bayes over all images: (2^m images Y_t, m pixels i).

        Args:
            before: P(Y_{t−1}).
            delta: δ_t.
        """
        joint = before[:, None] * self.kernel(delta)
        posterior = joint / joint.sum(0)
        return np.stack([posterior[self._inside(i)].sum(0) for i in range(self.images.shape[1])], axis=1)

    def from_others(self, before: np.ndarray, delta: float) -> np.ndarray:
        """P(Y_{t−1,i} = +1 | the other pixels of Y_t), likewise: pixel i of Y_t is summed out."""
        joint, found = before[:, None] * self.kernel(delta), []
        for i in range(self.images.shape[1]):
            others = np.delete(self.images, i, axis=1)
            twin = np.array([np.flatnonzero((others == row).all(1)) for row in others])  # the image itself and its twin
            both = joint[:, twin].sum(-1)
            found.append(both[self._inside(i)].sum(0) / both.sum(0))
        return np.stack(found, axis=1)

    def generated(self, deltas: Sequence[float]) -> np.ndarray:
        """P of what comes out when fair coins go back through all stages, each pixel drawn by itself: (2^m,).

        Every stage draws pixel i from the exact P(Y_{t−1,i} | Y_t). What is lost is only that the pixels of one stage
        are drawn independently of one another.
        """
        found = np.full(len(self.images), 1 / len(self.images))
        marginals = self.marginals(deltas)
        for t in range(len(deltas), 0, -1):
            white = self.previous(marginals[t - 1], deltas[t - 1])
            step = np.where(self.images[None] == 1, white[:, None], 1 - white[:, None]).prod(-1)
            found = found @ step
        return found


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """½ Σ |p − q|: the greatest difference between the probabilities that the two give to any set."""
    return float(0.5 * np.abs(p - q).sum())


def log_odds(p: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)), the inverse of the sigmoid."""
    return np.log(p) - np.log1p(-np.asarray(p))
