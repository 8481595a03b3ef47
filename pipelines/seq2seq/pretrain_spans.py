"""Span corruption and packing, in numpy and whole batches at a time.

Span corruption is the objective of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, §3.1.4): a share of the
tokens of a text is noise, in spans; each span is replaced by a sentinel in the source, and the target is each sentinel
followed by the tokens it stands for. As in the released code a text begins with a span that is kept and ends with one
of noise, so the target ends with that span's tokens and the end mark, without the last sentinel of the paper's figure.
"""

from __future__ import annotations

import numpy as np


def span_counts(tokens: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens of a text are noise, and in how many spans.

    Args:
        tokens: length of the text, at least 2.
        density: share of the tokens that is noise, in (0, 1).
        mean_span: mean length of a span of noise, at least 1.

    Raises:
        ValueError: a text of fewer than two tokens, of which none could be kept or none hidden.
    """
    if tokens < 2:
        raise ValueError(f"a text of {tokens} tokens cannot be corrupted")
    noise = min(max(round(tokens * density), 1), tokens - 1)
    spans = min(max(round(noise / mean_span), 1), noise, tokens - noise)
    return noise, spans


def source_length(tokens: int, density: float, mean_span: float) -> int:
    """Length of the corrupted source of a text of so many tokens, its end mark included."""
    noise, spans = span_counts(tokens, density, mean_span)
    return tokens - noise + spans + 1


def target_length(tokens: int, density: float, mean_span: float) -> int:
    """Length of the target of a text of so many tokens, its end mark included."""
    noise, spans = span_counts(tokens, density, mean_span)
    return noise + spans + 1


def packed_length(limit: int, density: float, mean_span: float) -> int:
    """The most tokens of text whose corrupted source fits into ``limit`` tokens.

    Raises:
        ValueError: a limit below 3, which one token that is kept, a sentinel and the end mark take.
    """
    if limit < 3:
        raise ValueError(f"no corrupted text fits into {limit} tokens")
    tokens = 2
    while source_length(tokens + 1, density, mean_span) <= limit:
        tokens += 1
    return tokens


def random_partitions(generator: np.random.Generator, rows: int, total: int, parts: int) -> np.ndarray:
    """Ways to write ``total`` as a sum of ``parts`` positive numbers, each drawn uniformly from all of them.

    Returns:
        (rows, parts) int64.
    """
    if parts == 1:
        return np.full((rows, 1), total, dtype=np.int64)
    # The places between neighbours of a row of `total`, of which parts - 1 are where it is cut.
    keys = generator.random((rows, total - 1))
    cuts = np.sort(np.argpartition(keys, parts - 2, axis=1)[:, : parts - 1], axis=1) + 1
    edges = np.concatenate([np.zeros((rows, 1), np.int64), cuts, np.full((rows, 1), total)], axis=1)
    return np.diff(edges, axis=1)


def noise_mask(
    generator: np.random.Generator, rows: int, tokens: int, density: float, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are noise, and which of those begin a span: two (rows, tokens) arrays of truth values."""
    noise, spans = span_counts(tokens, density, mean_span)
    lengths = np.empty((rows, 2 * spans), dtype=np.int64)
    lengths[:, 1::2] = random_partitions(generator, rows, noise, spans)
    lengths[:, 0::2] = random_partitions(generator, rows, tokens - noise, spans)
    starts = np.zeros((rows, tokens), dtype=np.int8)
    np.put_along_axis(starts, np.cumsum(lengths, axis=1)[:, :-1], 1, axis=1)
    number = np.cumsum(starts, axis=1)
    mask = number % 2 == 1
    return mask, mask & (starts == 1)


def corrupt(
    generator: np.random.Generator,
    texts: np.ndarray,
    sentinels: np.ndarray,
    end: int,
    density: float,
    mean_span: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt texts of one length.

    Args:
        generator: of the spans.
        texts: (B, N) token ids.
        sentinels: ids of ``<extra_id_0>``, ``<extra_id_1>`` …, at least as many as there are spans.
        end: id of the end mark.
        density: share of noise.
        mean_span: mean length of a span.

    Returns:
        Sources (B, ``source_length(N)``) and targets (B, ``target_length(N)``): no row needs padding.
    """
    rows, tokens = texts.shape
    mask, starts = noise_mask(generator, rows, tokens, density, mean_span)
    marks = sentinels[np.maximum(np.cumsum(starts, axis=1) - 1, 0)]
    ends = np.full((rows, 1), end, dtype=texts.dtype)
    source = np.where(starts, marks, texts)[~mask | starts].reshape(rows, -1)
    both = np.stack([marks, texts], axis=2)
    target = both[np.stack([starts, mask], axis=2)].reshape(rows, -1)
    return np.concatenate([source, ends], axis=1), np.concatenate([target, ends], axis=1)


class PackedText:
    """A stream of tokens cut into rows, all of one length or one token less, that lose and repeat nothing in a pass.

    Every pass begins at another place of the stream (whose end is joined to its beginning), so that the cuts fall
    elsewhere, and visits the rows in another order.

    Args:
        stream: (N,) token ids, held in memory or mapped.
        length: most tokens of a row.
    """

    def __init__(self, stream: np.ndarray, length: int):
        if len(stream) < 2:
            raise ValueError(f"a stream of {len(stream)} tokens makes no row")
        self.stream = stream
        rows = -(-len(stream) // length)
        self.edges = np.arange(rows + 1, dtype=np.int64) * len(stream) // rows

    def __len__(self) -> int:
        return len(self.edges) - 1

    def starts(self, rows: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Where rows begin in the stream when the pass begins at ``offset``, and how long they are: two (B,) arrays."""
        return self.edges[rows] + offset, self.edges[rows + 1] - self.edges[rows]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Rows of one length: (B, length) int64."""
        places = (starts[:, None] + np.arange(length)) % len(self.stream)
        return self.stream[places].astype(np.int64)
