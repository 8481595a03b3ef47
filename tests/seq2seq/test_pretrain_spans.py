"""Span corruption and packing: exact counts, nothing lost, nothing repeated, the same again from the same seed."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.seq2seq.pretrain_spans import (
    PackedText,
    corrupt,
    noise_mask,
    packed_length,
    random_partitions,
    source_length,
    span_counts,
    target_length,
)

END = 1
SENTINELS = np.arange(1099, 999, -1)


def rebuilt(source: np.ndarray, target: np.ndarray) -> list[int]:
    """The text again, by the definition: each sentinel of the source gives way to what follows it in the target."""
    assert source[-1] == END
    assert target[-1] == END
    hidden: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= 1000:
            assert token not in hidden
            hidden[token] = []
        else:
            hidden[next(reversed(hidden))].append(token)
    text: list[int] = []
    for token in source[:-1].tolist():
        text.extend(hidden.pop(token) if token >= 1000 else [token])
    assert not hidden
    return text


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(2, 300),
    rows=st.integers(1, 5),
    density=st.floats(0.01, 0.99),
    mean_span=st.floats(1.0, 12.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_source_and_target_give_the_text_again(tokens, rows, density, mean_span, seed):
    generator = np.random.default_rng(seed)
    texts = generator.integers(2, 1000, (rows, tokens))
    sentinels = np.arange(1999, 999, -1)
    source, target = corrupt(generator, texts, sentinels, END, density, mean_span)
    noise, spans = span_counts(tokens, density, mean_span)
    assert source.shape == (rows, source_length(tokens, density, mean_span)) == (rows, tokens - noise + spans + 1)
    assert target.shape == (rows, target_length(tokens, density, mean_span)) == (rows, noise + spans + 1)
    for row in range(rows):
        assert rebuilt(source[row], target[row]) == texts[row].tolist()
        for side in (source, target):
            marks = side[row][side[row] >= 1000]
            assert marks.tolist() == sentinels[:spans].tolist()  # in order, each once
        assert source[row, 0] < 1000  # a text begins with what is kept
        assert target[row, 0] >= 1000


def test_the_sizes_of_t5():
    """T5's own: 512 tokens of source take 568 of text, which leaves 114 of target."""
    length = packed_length(512, 0.15, 3.0)
    assert (length, source_length(length, 0.15, 3.0), target_length(length, 0.15, 3.0)) == (568, 512, 114)


@pytest.mark.parametrize("limit", [3, 4, 16, 48, 64, 128, 511])
def test_a_packed_row_fills_its_source(limit):
    length = packed_length(limit, 0.15, 3.0)
    assert source_length(length, 0.15, 3.0) <= limit < source_length(length + 1, 0.15, 3.0)


def test_noise_is_15_percent_in_spans_of_3():
    mask, starts = noise_mask(np.random.default_rng(0), 4000, 200, 0.15, 3.0)
    assert (mask.sum(axis=1) == 30).all()  # in every text, not on average
    assert (starts.sum(axis=1) == 10).all()
    lengths = Counter()
    for row in mask[:500]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        lengths.update((edges[1::2] - edges[::2]).tolist())
    assert sum(k * n for k, n in lengths.items()) / lengths.total() == 3.0
    # The chance that the first of 10 parts of 30 is k, counting partitions: C(29 - k, 8) / C(29, 9).
    for k, chance in ((1, 9 / 29), (2, 20 / 29 * 9 / 28)):
        assert lengths[k] / lengths.total() == pytest.approx(chance, abs=0.02)
    # Every place but the ends is as likely to be hidden as any other, up to the effect of the edges.
    share = mask.mean(axis=0)
    assert share[0] == 0.0
    assert share[-1] == 1.0
    assert np.abs(share[20:-20] - 0.15).max() < 0.03


def test_partitions_are_uniform():
    """All C(6, 2) = 15 ways to write 7 as three numbers, equally often."""
    drawn = random_partitions(np.random.default_rng(1), 30_000, 7, 3)
    assert (drawn.sum(axis=1) == 7).all()
    assert (drawn >= 1).all()
    counts = Counter(map(tuple, drawn.tolist()))
    ways = {(a, b - a, 7 - b) for a, b in combinations(range(1, 7), 2)}
    assert set(counts) == ways
    assert max(abs(n / 30_000 - 1 / 15) for n in counts.values()) < 0.006


def test_the_same_seed_hides_the_same():
    texts = np.arange(2, 402).reshape(2, 200)
    first, again, other = (
        corrupt(np.random.default_rng([5, number]), texts, SENTINELS, END, 0.15, 3.0) for number in (7, 7, 8)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize(("tokens", "length"), [(2, 5), (5, 5), (6, 5), (1000, 7), (999, 100), (1001, 100)])
def test_a_pass_over_packed_text_loses_and_repeats_nothing(tokens, length):
    packed = PackedText(np.arange(tokens, dtype=np.uint16), length)
    assert len(packed) == -(-tokens // length)
    for offset in (0, tokens // 3, tokens - 1):
        starts, lengths = packed.starts(np.arange(len(packed)), offset)
        assert lengths.max() <= length
        assert lengths.max() - lengths.min() <= 1
        rows = [packed.rows(starts[i : i + 1], int(lengths[i]))[0].tolist() for i in range(len(packed))]
        flat = [token for row in rows for token in row]
        assert sorted(flat) == list(range(tokens))
        assert flat == np.roll(np.arange(tokens), -offset).tolist()


@pytest.mark.parametrize("tokens", [0, 1])
def test_too_short_a_text_is_refused(tokens):
    with pytest.raises(ValueError, match=f"{tokens} tokens"):
        span_counts(tokens, 0.15, 3.0)
    with pytest.raises(ValueError, match=f"{tokens} tokens"):
        PackedText(np.zeros(tokens, np.uint16), 8)
    with pytest.raises(ValueError, match="fits"):
        packed_length(2, 0.15, 3.0)
