"""The objectives' batches, their mixture, gap sentences, and bits per byte: against definitions and by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.seq2seq.pretrain_data import (
    IGNORED,
    CopyObjective,
    Mixture,
    PairObjective,
    SpanObjective,
    TokenRows,
    TokenWriter,
    gather,
    interleave,
    model_inputs,
)
from pipelines.seq2seq.pretrain_spans import PackedText
from pipelines.seq2seq.pretrain_text import (
    TokenSettings,
    document_sentences,
    gap_examples,
    gap_sentence,
    is_prose,
    open_tokens,
    overlap_f1,
    token_folder,
    windows,
    write_tokens,
)

PAD, END = 0, 1


def _rows(count: int, seed: int, low: int = 3, high: int = 20) -> TokenRows:
    """Rows that end in the end mark, each token of a row naming its row (so that rows can be told apart)."""
    lengths = np.random.default_rng(seed).integers(low, high, count)
    flat = np.concatenate([np.r_[np.full(n - 1, 10 + row), END] for row, n in enumerate(lengths)])
    return TokenRows(flat.astype(np.int32), lengths)


def _mixture(steps: int = 12, size: int = 4, seed: int = 0, **changes) -> Mixture:
    stream = np.arange(10, 1010, dtype=np.uint16)
    sources, targets = _rows(50, 1), _rows(50, 2, 2, 6)
    objectives = {
        "span": SpanObjective(PackedText(stream, 30), np.arange(5000, 4900, -1), 0.15, 3.0, PAD, END),
        "copy": CopyObjective(sources, 0, 5, True, PAD, END),
        "supervised": PairObjective(sources, targets, PAD),
    }
    weights = {"span": 2.0, "copy": 1.0, "supervised": 1.0}
    return Mixture(objectives, weights, steps, 2, size, seed, PAD, PAD, **changes)


# --- the mixture ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.floats(0, 10), min_size=1, max_size=5), count=st.integers(1, 300))
def test_every_beginning_of_a_run_keeps_the_shares(weights, count):
    if not any(w > 1e-3 for w in weights):
        weights[0] = 1.0
    weights = [w if w > 1e-3 else 0.0 for w in weights]
    kinds, turns = interleave({str(i): w for i, w in enumerate(weights)}, count)
    assert len(kinds) == len(turns) == count
    for kind, weight in enumerate(weights):
        came = np.cumsum(kinds == kind)
        due = np.arange(1, count + 1) * weight / sum(weights)
        assert np.abs(came - due).max() <= 1.0 + len(weights) / 2
        assert turns[kinds == kind].tolist() == list(range(came[-1]))
        assert weight or not came[-1]


def test_shares_over_a_long_run():
    kinds, _ = interleave({"a": 0.2, "b": 1.0, "c": 0.0, "d": 0.8}, 20_000)
    assert np.bincount(kinds, minlength=4).tolist() == [2000, 10_000, 0, 8000]
    # evenly: any hundred neighbours hold the shares too
    for start in range(0, 20_000, 777):
        assert np.abs(np.bincount(kinds[start : start + 100], minlength=4) - [10, 50, 0, 40]).max() <= 2


def test_a_batch_is_a_function_of_seed_and_number():
    first, again, other = _mixture(seed=3), _mixture(seed=3), _mixture(seed=4)
    differ = 0
    for number in reversed(range(24)):  # in whatever order they are asked for
        one = first.__getitems__(list(range(number * 4, number * 4 + 4)))
        two = again.__getitems__(list(range(number * 4, number * 4 + 4)))
        three = other.__getitems__(list(range(number * 4, number * 4 + 4)))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        differ += not torch.equal(one["labels"], three["labels"])
    assert differ > 20


def test_two_halves_are_the_batch():
    mixture = _mixture()
    for number in range(24):
        whole = mixture.__getitems__(list(range(number * 4, number * 4 + 4)))
        halves = [mixture.__getitems__(list(range(number * 4 + i, number * 4 + i + 2))) for i in (0, 2)]
        for name in whole:
            assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])


def test_copying_comes_first_where_it_is_asked_for():
    mixture = _mixture(copy_steps=3)
    copy = mixture.names.index("copy")
    assert (mixture.kinds[:6] == copy).all()
    assert (mixture.kinds[6:] == copy).sum() in (4, 5)  # a quarter of the other 18
    assert mixture.turns[mixture.kinds == copy].tolist() == list(range((mixture.kinds == copy).sum()))
    assert mixture.passes(3) == {"span": 0.0, "copy": 6 / 12, "supervised": 0.0}
    assert mixture.epoch_at(0) == 0.0


# --- objectives -------------------------------------------------------------------------------------------------------


def test_a_pass_over_pairs_sees_each_once_in_batches_of_like_length():
    sources, targets = _rows(403, 1, 3, 100), _rows(403, 2, 2, 6)
    objective = PairObjective(sources, targets, PAD)
    assert objective.batches_a_pass(8) == 50
    orders = []
    for turn in (0, 1):
        seen, padding, cells = [], 0, 0
        for number in range(turn * 50, turn * 50 + 50):
            source, target = objective.batch(number, 8, seed=0)
            for one, other in zip(source, target, strict=True):
                row = one[0] - 10
                assert one[one != PAD].tolist() == sources[row]
                assert other[other != IGNORED].tolist() == targets[row]
                seen.append(int(row))
            padding, cells = padding + (source == PAD).sum(), cells + source.size
        assert len(set(seen)) == 400  # three are left for other passes
        assert padding / cells < 0.1
        orders.append(seen)
    assert orders[0] != orders[1]
    assert set(orders[0]) != set(orders[1])


def test_a_pass_over_packed_text_sees_every_token_once():
    stream = np.arange(10, 10 + 960, dtype=np.uint16)
    objective = SpanObjective(PackedText(stream, 30), np.arange(5000, 4900, -1), 0.15, 3.0, PAD, END)
    cuts = []
    for turn in (0, 1):
        counts, first = Counter(), set()
        for number in range(turn * 8, turn * 8 + 8):
            source, target = objective.batch(number, 4, seed=9)
            for row in (*source, *target):
                counts.update(row[(row < 4000) & (row >= 10)].tolist())
            first |= set(source[:, 0].tolist())
        assert counts == Counter(stream.tolist())
        cuts.append(first)
    assert not cuts[0] & cuts[1]  # the second pass cuts the text elsewhere


def test_rows_of_two_lengths_are_padded():
    objective = SpanObjective(PackedText(np.arange(10, 71), 20), np.arange(500, 400, -1), 0.15, 3.0, PAD, END)
    (source, target), *_ = objective.held_out(8, 8, seed=0)  # 61 tokens in four rows: 15, 15, 15, 16
    assert source.shape == (4, 16)
    assert sorted((source != PAD).sum(1).tolist()) == [15, 15, 15, 16]
    tokens = [t for row in (*source, *target) for t in row.tolist() if 10 <= t < 400]
    assert sorted(tokens) == list(range(10, 71))


@pytest.mark.parametrize("anywhere", [False, True])
def test_what_is_copied_stands_in_the_source(anywhere):
    flat, lengths = [], np.random.default_rng(0).integers(5, 30, 64)
    for n in lengths:
        flat += [7, 8, *range(100, 100 + n - 3), END]  # two tokens of prefix
    objective = CopyObjective(TokenRows(np.array(flat), lengths), 2, 10, anywhere, PAD, END)
    starts = Counter()
    for number in range(40):
        source, target = objective.batch(number, 16, seed=2)
        for one, other in zip(source, target, strict=True):
            text = one[one != PAD][2:-1].tolist()
            copied = other[other != IGNORED].tolist()
            assert copied.pop() == END
            assert len(copied) == min(10, len(text))
            start = copied[0] - 100
            assert copied == text[start : start + 10]
            assert start <= len(text) - len(copied)
            starts[start] += 1
    assert (set(starts) == {0}) is not anywhere


def test_held_out_rows_are_the_same_at_every_call():
    for name, objective in _mixture().objectives.items():
        first, again = (list(objective.held_out(8, 20, seed=5)) for _ in range(2))
        assert sum(len(source) for source, _ in first) == 20, name
        assert all((a == b).all() for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


def test_gather_pads_on_the_right():
    flat = np.arange(10, 20)
    assert gather(flat, np.array([0, 7, 4]), np.array([2, 3, 0]), -1).tolist() == [
        [10, 11, -1],
        [17, 18, 19],
        [-1, -1, -1],
    ]
    unsigned = gather(flat.astype(np.uint16), np.array([0, 8]), np.array([3, 2]), IGNORED)
    assert unsigned.tolist() == [[10, 11, 12], [18, 19, IGNORED]]


def test_the_decoder_reads_what_it_wrote():
    targets = np.array([[5, 6, END], [7, END, IGNORED]])
    made = model_inputs(np.array([[4, 4], [4, PAD]]), targets, PAD, 9)
    assert made["decoder_input_ids"].tolist() == [[9, 5, 6], [9, 7, END]]
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]


# --- text -------------------------------------------------------------------------------------------------------------


def test_sentences_run_over_line_breaks_but_not_over_paragraphs():
    text = "Reads a file\nline by line. Closes it\nafterwards.\n\nReturns\n  \nThe lines"
    expected = ["Reads a file line by line.", "Closes it afterwards.", "Returns", "The lines"]
    assert document_sentences(text) == expected
    assert is_prose("Reads a file, line by line.")
    assert not is_prose("x = [1, 2, 3]; y = {4}")
    assert not is_prose(">>> f(x)")
    assert not is_prose("")


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=20), limit=st.integers(1, 20))
def test_windows_hold_every_sentence_that_fits_once(lengths, limit):
    found = list(windows(lengths, limit))
    assert all(sum(lengths[i] for i in window) <= limit for window in found)
    assert [i for window in found for i in window] == [i for i, n in enumerate(lengths) if n <= limit]
    for one, two in pairwise(found):  # none could have been longer
        if one.stop == two.start:
            assert sum(lengths[i] for i in one) + lengths[two.start] > limit


def test_overlap_is_rouge1():
    from pipelines.seq2seq.metrics import rouge

    part, rest = "the cat sat on the mat", "a cat and the dog sat"
    expected = rouge([part], [rest], ["rouge1"])["rouge1"][0] / 100
    assert overlap_f1(Counter(part.split()), Counter((part + " " + rest).split())) == pytest.approx(expected)


def test_the_principal_sentence_overlaps_most():
    rows = [[1, 2], [9, 9, 9], [2, 3, 4, 1], [3, 4]]
    assert gap_sentence(rows, [True] * 4) == 2
    assert gap_sentence(rows, [True, True, False, False]) == 0
    assert gap_sentence(rows, [False] * 4) is None
    assert gap_sentence(rows[:1], [True]) is None  # nothing would be left


def test_what_is_taken_out_and_what_is_left_are_the_text():
    rows = [[1, 2, 3], [4, 5], [1, 4, 6], [7, 8], [7, 8, 9]]
    found = {choice: list(gap_examples(rows, [True] * 5, 8, choice)) for choice in ("first", "principal", "both")}
    assert found["first"] == [([4, 5, 1, 4, 6], 0, [1, 2, 3])]
    assert found["principal"] == [([1, 2, 3, 4, 5], 5, [1, 4, 6]), ([7, 8, 9], 0, [7, 8])]
    assert found["both"] == [found["first"][0], found["principal"][1]]
    for text, place, taken in found["principal"]:
        assert [*text[:place], *taken, *text[place:]] in (rows[0] + rows[1] + rows[2], rows[3] + rows[4])
    assert list(gap_examples(rows, [False] + [True] * 4, 8, "first")) == []
    assert list(gap_examples([], [], 8, "both")) == []


def test_rows_are_written_and_mapped(tmp_path):
    writer = TokenWriter(tmp_path / "a.bin", "uint16")
    rows = [[1, 2, 65535], [], [4]]
    writer.extend(rows[:2])
    writer.extend(rows[2:])
    writer.close()
    mapped = TokenRows.open(tmp_path / "a.bin", "uint16")
    assert [mapped[i] for i in range(len(mapped))] == rows
    assert isinstance(mapped.flat, np.memmap)
    assert (tmp_path / "a.bin").stat().st_size == 8


def test_tokens_of_a_text(tmp_path, monkeypatch, tiny_corpus, tiny_tokenizer):
    from datasets import Dataset, load_from_disk

    from pipelines.seq2seq.models import load_tokenizer

    monkeypatch.setenv("GENALIGN_CACHE", str(tmp_path))
    tokenizer, corpus = load_tokenizer(str(tiny_tokenizer)), load_from_disk(str(tiny_corpus))
    texts = ["Read the open file. Close the local file. Sort the nested list.", "Draw a small graph"]
    text = {"train": Dataset.from_dict({"text": texts}), "validation": Dataset.from_dict({"text": texts[1:]})}
    chosen = TokenSettings(40, 12, "", "copy: ", "gap: ", "first")
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    folder = token_folder(chosen, tokenizer, ["a"])
    names = ["span", "copy", "gap", "supervised"]
    write_tokens(folder, text, corpus, tokenizer, chosen, names, sentinel, False)
    stamp = (folder / "stream-train.bin").stat().st_mtime_ns
    write_tokens(folder, text, corpus, tokenizer, chosen, names, sentinel, False)
    assert (folder / "stream-train.bin").stat().st_mtime_ns == stamp  # not written again

    stream = open_tokens(folder, "stream", "train").flat.tolist()
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (*texts, *corpus["train"]["document"])]
    assert stream == [token for row in plain for token in row]
    gap, taken = (open_tokens(folder, f"gap-{side}", "train") for side in ("source", "target"))
    assert len(gap) == len(taken) == 1
    marks = tokenizer.convert_ids_to_tokens(gap[0])
    assert tokenizer.decode(gap[0], skip_special_tokens=True) == "gap: close the local file. sort the nested list."
    assert marks.index("<extra_id_0>") == len(tokenizer("gap: ", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(taken[0], skip_special_tokens=True) == "read the open file."
    source, target = (open_tokens(folder, side, "validation") for side in ("source", "target"))
    assert len(source) == len(target) == len(corpus["validation"])
    copy = open_tokens(folder, "copy", "train")
    assert tokenizer.decode(copy[3]).startswith("copy: kit.")
    assert max(copy.lengths) <= 40
    others = (TokenSettings(41, 12, "", "copy: ", "gap: ", "first"), chosen)
    assert len({folder, token_folder(others[0], tokenizer, ["a"]), token_folder(chosen, tokenizer, ["b"])}) == 3


def test_bits_per_byte_by_hand(tiny_tokenizer):
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.pretrain_trainer import bits_per_byte, target_bytes

    # 4 bytes, each with probability 1/8: three bits a byte.
    assert bits_per_byte(-4 * math.log(1 / 8), 4) == pytest.approx(3.0)
    assert bits_per_byte(10.0, 5) == pytest.approx(10.0 / 5 / math.log(2))
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    rows = tokenizer(["read the file", "sort a list"])["input_ids"]
    marked = [tokenizer.convert_tokens_to_ids("<extra_id_3>"), *rows[0]]
    width = max(len(marked), len(rows[1]))
    targets = np.array([r + [IGNORED] * (width - len(r)) for r in (marked, rows[1])])
    assert target_bytes(tokenizer, targets) == len(b"read the file") + len(b"sort a list")
