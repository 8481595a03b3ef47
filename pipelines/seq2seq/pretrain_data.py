"""The objectives of pretraining: each makes batches of sources and targets; which comes when; what is held out.

Tokens lie in memory-mapped files, a batch is made by a few numpy operations, and all of a batch's rows have one
objective and like lengths, so that hardly any compute is padding. Every batch is a function of (seed, number of the
batch) alone, so a killed run goes on exactly where it was, and two processes take halves of the batch of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from pipelines.seq2seq.pretrain_spans import PackedText, corrupt

IGNORED = -100

# What the random numbers of a generator are for; part of its seed.
_ORDER, _PLACE, _NOISE = range(3)

Arrays = tuple[np.ndarray, np.ndarray]


class TokenRows:
    """Rows of token ids of different lengths, one after the other in a flat array.

    Args:
        flat: (N,) ids of all rows.
        lengths: (R,) tokens of each row.
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray):
        self.flat, self.lengths = flat, np.asarray(lengths, dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths

    @classmethod
    def open(cls, path: Path, dtype: str) -> TokenRows:
        """Map the rows that ``TokenWriter`` wrote."""
        lengths = np.load(path.with_suffix(".npy"), allow_pickle=False)
        flat = np.memmap(path, dtype=dtype, mode="r") if lengths.sum() else np.zeros(0, dtype)
        return cls(flat, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> list[int]:
        start = self.starts[row]
        return self.flat[start : start + self.lengths[row]].tolist()

    def padded(self, rows: np.ndarray, value: int) -> np.ndarray:
        """Rows side by side, padded on the right: (B, longest) int64."""
        return gather(self.flat, self.starts[rows], self.lengths[rows], value)


def gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, value: int) -> np.ndarray:
    """Pieces of a flat array, padded on the right: (B, longest) int64."""
    steps = np.arange(lengths.max(initial=0))
    inside = steps < lengths[:, None]
    places = np.where(inside, starts[:, None] + steps, 0)
    # Widened first: a negative value would wrap around in the unsigned type of the file.
    return np.where(inside, flat[places].astype(np.int64), value)


class TokenWriter:
    """Writes rows of token ids as they come, in two files: the ids, raw, and the rows' lengths beside them (.npy)."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, dtype
        self._file = path.open("wb")
        self._lengths: list[int] = []

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Append rows."""
        self._lengths.extend(map(len, rows))
        for row in rows:
            self._file.write(np.asarray(row, dtype=self.dtype).tobytes())

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        np.save(self.path.with_suffix(".npy"), np.asarray(self._lengths, dtype=np.int64))


class Objective(Protocol):
    """What a kind of batch is made of."""

    def batches_a_pass(self, size: int) -> int:
        """Batches of ``size`` rows in one pass over the text."""

    def batch(self, number: int, size: int, seed: int) -> Arrays:
        """Sources (B, S) and targets (B, T), padded, of the ``number``-th batch of a run."""

    def held_out(self, size: int, limit: int, seed: int) -> Iterator[Arrays]:
        """At most ``limit`` rows in batches of at most ``size``, the same at every call."""


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, *key])


def grouped_order(lengths: np.ndarray, size: int, seed: int, number: int) -> np.ndarray:
    """The order of pass ``number`` over rows: batches of like length, shuffled; rows over are left to other passes.

    Returns:
        (batches, size) row indices.
    """
    entropy = np.random.SeedSequence([seed, number, _ORDER]).generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
    order = np.asarray(get_length_grouped_indices(lengths.tolist(), size, generator=generator))
    blocks = order[: len(order) // size * size].reshape(-1, size)
    return blocks[np.random.default_rng(entropy[1]).permutation(len(blocks))]


def _spread(count: int, limit: int) -> np.ndarray:
    """At most ``limit`` of ``count`` indices, evenly spread."""
    limit = min(count, limit)
    return np.arange(limit, dtype=np.int64) * count // max(limit, 1)


class PairObjective:
    """Sources and targets that were fixed when the text was read: summaries, and sentences taken out of their text.

    Args:
        sources: R rows.
        targets: as many.
        pad: padding id of the sources.
    """

    def __init__(self, sources: TokenRows, targets: TokenRows, pad: int):
        self.sources, self.targets, self.pad = sources, targets, pad
        self._order = lru_cache(maxsize=2)(lambda *key: grouped_order(sources.lengths, *key))

    def batches_a_pass(self, size: int) -> int:
        return len(self.sources) // size

    def _arrays(self, rows: np.ndarray) -> Arrays:
        return self.sources.padded(rows, self.pad), self.targets.padded(rows, IGNORED)

    def batch(self, number: int, size: int, seed: int) -> Arrays:
        turn, place = divmod(number, self.batches_a_pass(size))
        return self._arrays(self._order(size, seed, turn)[place])

    def held_out(self, size: int, limit: int, seed: int) -> Iterator[Arrays]:
        chosen = _spread(len(self.sources), limit)
        chosen = chosen[np.argsort(self.sources.lengths[chosen], kind="stable")]
        for start in range(0, len(chosen), size):
            yield self._arrays(chosen[start : start + size])


class CopyObjective:
    """The target is a piece of the source itself: its first tokens, or as many in a row from a random place.

    Args:
        sources: R rows, each ending in the end mark.
        skipped: tokens at the start of each row that belong to the objective's prefix and are not copied.
        length: tokens copied, fewer where the source is shorter.
        anywhere: from a random place, not from the start.
        pad: padding id of the sources.
        end: id of the end mark.
    """

    def __init__(self, sources: TokenRows, skipped: int, length: int, anywhere: bool, pad: int, end: int):
        self.sources, self.skipped, self.length, self.anywhere = sources, skipped, length, anywhere
        self.pad, self.end = pad, end
        self._order = lru_cache(maxsize=2)(lambda *key: grouped_order(sources.lengths, *key))

    def batches_a_pass(self, size: int) -> int:
        return len(self.sources) // size

    def _arrays(self, rows: np.ndarray, generator: np.random.Generator) -> Arrays:
        available = self.sources.lengths[rows] - self.skipped - 1
        lengths = np.minimum(available, self.length)
        starts = self.sources.starts[rows] + self.skipped
        if self.anywhere:
            starts = starts + (generator.random(len(rows)) * (available - lengths + 1)).astype(np.int64)
        copied = gather(self.sources.flat, starts, lengths, IGNORED)
        targets = np.pad(copied, ((0, 0), (0, 1)), constant_values=IGNORED)
        targets[np.arange(len(rows)), lengths] = self.end
        return self.sources.padded(rows, self.pad), targets

    def batch(self, number: int, size: int, seed: int) -> Arrays:
        turn, place = divmod(number, self.batches_a_pass(size))
        return self._arrays(self._order(size, seed, turn)[place], _generator(seed, number, _PLACE))

    def held_out(self, size: int, limit: int, seed: int) -> Iterator[Arrays]:
        chosen = _spread(len(self.sources), limit)
        chosen = chosen[np.argsort(self.sources.lengths[chosen], kind="stable")]
        for start in range(0, len(chosen), size):
            yield self._arrays(chosen[start : start + size], _generator(seed, start, _PLACE))


class SpanObjective:
    """Span corruption of packed text.

    Args:
        text: the rows.
        sentinels: ids of ``<extra_id_0>`` …, at least as many as a row has spans.
        density: share of noise.
        mean_span: mean length of a span of noise.
        pad: padding id of the sources.
        end: id of the end mark.
    """

    def __init__(self, text: PackedText, sentinels: np.ndarray, density: float, mean_span: float, pad: int, end: int):
        self.text, self.sentinels, self.density, self.mean_span = text, sentinels, density, mean_span
        self.pad, self.end = pad, end
        self._order = lru_cache(maxsize=2)(lambda seed, turn: _generator(seed, turn, _ORDER).permutation(len(text)))

    def batches_a_pass(self, size: int) -> int:
        return len(self.text) // size

    def _arrays(self, rows: np.ndarray, offset: int, generator: np.random.Generator) -> Arrays:
        starts, lengths = self.text.starts(rows, offset)
        made = []
        for length in np.unique(lengths):  # one or two, neighbours
            chosen = np.flatnonzero(lengths == length)
            texts = self.text.rows(starts[chosen], int(length))
            made.append((chosen, *corrupt(generator, texts, self.sentinels, self.end, self.density, self.mean_span)))
        if len(made) == 1:
            return made[0][1:]
        sources = np.full((len(rows), max(m[1].shape[1] for m in made)), self.pad, dtype=np.int64)
        targets = np.full((len(rows), max(m[2].shape[1] for m in made)), IGNORED, dtype=np.int64)
        for chosen, source, target in made:
            sources[chosen, : source.shape[1]] = source
            targets[chosen, : target.shape[1]] = target
        return sources, targets

    def batch(self, number: int, size: int, seed: int) -> Arrays:
        turn, place = divmod(number, self.batches_a_pass(size))
        offset = int(_generator(seed, turn, _PLACE).integers(len(self.text.stream)))
        rows = self._order(seed, turn)[place * size : (place + 1) * size]
        return self._arrays(rows, offset, _generator(seed, number, _NOISE))

    def held_out(self, size: int, limit: int, seed: int) -> Iterator[Arrays]:
        chosen = _spread(len(self.text), limit)
        for start in range(0, len(chosen), size):
            yield self._arrays(chosen[start : start + size], 0, _generator(seed, start, _NOISE))


def interleave(weights: Mapping[str, float], count: int) -> Arrays:
    """Which objective each of ``count`` batches has, as evenly as can be: after any number of batches each objective is
    less than one batch off its share.

    Args:
        weights: objective -> weight; those of weight 0 never come.
        count: number of batches.

    Returns:
        For each batch the index of its objective in ``weights``, and the how-manieth of that objective it is.
    """
    shares = np.array(list(weights.values()), dtype=float)
    shares = shares / shares.sum()
    # Batch j of an objective of share p is due by time j / p; sorted by when the middle of that stretch falls.
    kinds = np.repeat(np.arange(len(shares)), [int(np.ceil(p * count)) + 2 if p > 0 else 0 for p in shares])
    turns = np.concatenate([np.arange(n) for n in np.bincount(kinds, minlength=len(shares))])
    due = (turns + 0.5) / shares[kinds]
    order = np.lexsort((kinds, due))[:count]
    return kinds[order].astype(np.int8), turns[order]


def model_inputs(sources: np.ndarray, targets: np.ndarray, pad: int, start: int) -> dict[str, Tensor]:
    """A batch as an encoder-decoder takes it: ``input_ids``, ``attention_mask``, ``labels``, ``decoder_input_ids``.

    Args:
        sources: (B, S), padded with ``pad``.
        targets: (B, T), padded with -100.
        pad: padding id.
        start: id of the decoder's start token.
    """
    decoder = np.full_like(targets, start)
    decoder[:, 1:] = np.where(targets[:, :-1] == IGNORED, pad, targets[:, :-1])
    arrays = {
        "input_ids": sources,
        "attention_mask": (sources != pad).astype(np.int64),
        "labels": targets,
        "decoder_input_ids": decoder,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


@dataclass
class Mixture(Dataset):
    """All batches of a run in their order; position p belongs to batch p div ``size``.

    Ask for the positions of one batch, or of a part of it, at a time (``__getitems__``): the answer is the batch.

    Args:
        objectives: by name.
        weights: by the same names; shares of the batches.
        steps: optimizer steps.
        batches_a_step: batches of one optimizer step (gradient accumulation).
        size: rows of a batch, over all devices.
        seed: of every choice.
        pad: padding id.
        start: id of the decoder's start token.
        copy_steps: the first steps have the objective ``copy`` alone.
    """

    objectives: Mapping[str, Objective]
    weights: Mapping[str, float]
    steps: int
    batches_a_step: int
    size: int
    seed: int
    pad: int
    start: int
    copy_steps: int = 0

    def __post_init__(self) -> None:
        self.names = list(self.objectives)
        alone = min(self.copy_steps, self.steps) * self.batches_a_step
        weights = {name: self.weights[name] for name in self.names}
        kinds, turns = interleave(weights, self.steps * self.batches_a_step - alone)
        if alone:
            copy = self.names.index("copy")
            turns = turns + alone * (kinds == copy)
            kinds = np.concatenate([np.full(alone, copy, dtype=kinds.dtype), kinds])
            turns = np.concatenate([np.arange(alone), turns])
        self.kinds, self.turns = kinds, turns

    def __len__(self) -> int:
        return len(self.kinds) * self.size

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def arrays(self, number: int) -> Arrays:
        """Sources and targets of a whole batch."""
        kind = int(self.kinds[number])
        # The objectives' own seeds differ, or passes over two of them would go hand in hand.
        return self.objectives[self.names[kind]].batch(int(self.turns[number]), self.size, seed_of(self.seed, kind))

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        number = positions[0] // self.size
        within = np.asarray(positions) - number * self.size
        sources, targets = self.arrays(number)
        return model_inputs(sources[within], targets[within], self.pad, self.start)

    def passes(self, step: int) -> dict[str, float]:
        """Objective -> passes over its text after ``step`` optimizer steps."""
        seen = np.bincount(self.kinds[: step * self.batches_a_step], minlength=len(self.names))
        return {
            name: float(seen[kind] / self.objectives[name].batches_a_pass(self.size))
            for kind, name in enumerate(self.names)
        }

    def epoch_at(self, step: int) -> float:
        """Passes over the text of the objective that is furthest on."""
        return max(self.passes(step).values())


def seed_of(seed: int, kind: int) -> int:
    """The seed of one objective."""
    return int(np.random.SeedSequence([seed, kind]).generate_state(1)[0])
