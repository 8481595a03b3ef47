"""Mixtures hold their weights, orders are functions of the seed, and a stream goes on exactly where it was."""

import json
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from pipelines.config import StageConfig, config, validate
from pipelines.corpus import pieces as of_pieces
from pipelines.corpus.fields import CorpusFields, StreamFields, TextFields
from pipelines.corpus.mixture import pool_order, set_of_slots, share_of
from pipelines.corpus.stream import corpus_stream, text_stream
from pipelines.errors import UserError
from pipelines.seq2seq.streamed import StreamedExamples
from tests.scale.conftest import documents, write_lines


@config
class Streamed(StreamFields, CorpusFields, StageConfig):
    """A stage's fields, as far as a stream reads them."""

    max_steps: int = 100


@config
class StreamedText(StreamFields, TextFields, StageConfig):
    """The same of raw text."""

    _stream_field: ClassVar[str] = "text"

    max_steps: int = 100


def streamed(**fields) -> Streamed:
    return validate(Streamed, {"streaming": True, "shuffle_buffer": 64, **fields})


def examples(settings, steps=200, step_size=4):
    return StreamedExamples(corpus_stream(settings, step_size=step_size), steps, lambda rows: [dict(r) for r in rows])


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(of_pieces, "PIECE_BYTES", 500)


@pytest.fixture
def three_sets(tmp_path):
    """Sets of 300, 50 and 1000 documents at 1 : 2 : 0.5."""
    paths = [
        write_lines(tmp_path / f"{w}.jsonl", documents(n, word=w)) for w, n in (("a", 300), ("b", 50), ("c", 1000))
    ]
    mixture = [{"source": str(paths[1]), "weight": 2.0}, {"source": str(paths[2]), "weight": 0.5, "name": "third"}]
    return {"dataset": str(paths[0]), "mixture": mixture}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 0.05, 1.0, 3.0]])
def test_shares_hold_after_any_number_of_examples(weights):
    slots = set_of_slots(weights, 0, 100_000, seed=3)
    shares = np.array(weights) / sum(weights)
    for count in (1000, 5000, 30_000, 100_000):
        found = np.bincount(slots[:count], minlength=len(weights))
        # far within the 1 % that independent draws would need ten thousand examples for
        assert np.abs(found / count - shares).max() < 0.005
        assert np.abs(found - count * shares).max() < 8
    parts = [set_of_slots(weights, start, 1000, seed=3) for start in range(0, 100_000, 1000)]
    assert (np.concatenate(parts) == slots).all()
    if len(weights) > 1:
        assert (set_of_slots(weights, 0, 1000, seed=4) != slots[:1000]).any()


def test_the_order_of_a_pool_groups_like_lengths_and_shuffles():
    lengths = np.random.default_rng(0).integers(1, 500, 640)
    order = pool_order(lengths, 16, seed=1, pool=0, count=640)
    assert sorted(order) == list(range(640))
    steps = lengths[order].reshape(-1, 16)
    padding = 1 - steps.sum() / (steps.max(1) * 16).sum()
    plain = lengths[pool_order(None, 16, 1, 0, 640)].reshape(-1, 16)
    assert padding < 0.05 < 0.3 < 1 - plain.sum() / (plain.max(1) * 16).sum()
    assert (np.diff(steps.mean(1)) < 0).any()
    assert (pool_order(lengths, 16, 1, 1, 640) != order).any()
    equal = pool_order(np.ones(640), 16, 1, 0, 640)
    assert (np.diff(equal) != 1).any()


def test_shares_of_texts_are_uniform_and_differ_by_seed():
    points = np.array([[share_of(f"text {i}", seed) for i in range(4000)] for seed in (0, 1)])
    for row in points:
        assert np.abs(np.histogram(row, 10, (0, 1))[0] / 400 - 1).max() < 0.25
    assert abs(np.corrcoef(points)[0, 1]) < 0.1


def test_a_mixture_holds_its_weights_and_repeats_the_smaller_set(three_sets):
    settings = streamed(**three_sets)
    assert settings.set_names() == ["a", "b", "third"]
    run = examples(settings, steps=500)
    positions = list(range(2000))
    words = Counter(row["document"].split()[0] for row in run.examples(positions))
    for word, weight in zip("abc", (1.0, 2.0, 0.5), strict=True):
        assert words[word] / 2000 == pytest.approx(weight / 3.5, abs=0.01)
    assert Counter(settings.set_names()[i] for i in examples(settings, 500).sets(positions)) == {
        "a": words["a"],
        "b": words["b"],
        "third": words["c"],
    }


def test_every_pass_has_every_row_once_in_another_order(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", documents(100))
    settings = streamed(dataset=str(path), shuffle_buffer=1, bucket_by_length=False)
    stream = corpus_stream(settings, step_size=1)
    # what is held out stays out of every pass
    held_out = {row["document"] for rows in stream.held_out({"validation": 99, "test": 99}).values() for row in rows[0]}
    assert 5 < len(held_out) < 40
    count = 100 - len(held_out)
    seen = [row["document"] for row in examples(settings, 3 * count, 1).examples(range(3 * count))]
    passes = [seen[i * count : (i + 1) * count] for i in range(3)]
    for each in passes:
        assert len(set(each)) == count
        assert not set(each) & held_out
    assert passes[0] != passes[1]


@pytest.mark.parametrize("stop", [1, 15, 16, 17, 100, 163])
def test_a_stream_goes_on_exactly_in_the_middle_of_a_pool(three_sets, stop):
    settings = streamed(**three_sets)
    whole = [row["document"] for row in examples(settings).examples(range(800))]
    first = examples(settings)
    for step in range(stop):
        first.examples(range(4 * step, 4 * step + 4))
    state = json.loads(json.dumps(first.state()))
    again = examples(settings)
    again.load_state(state)
    assert [row["document"] for row in again.examples(range(4 * stop, 800))] == whole[4 * stop :]
    # also without its state, at the price of reading what was before
    assert [row["document"] for row in examples(settings).examples(range(4 * stop, 800))] == whole[4 * stop :]


def test_a_state_is_small_however_far_the_stream_is(three_sets):
    run = examples(streamed(**three_sets), steps=3000)
    sizes = []
    for step in range(0, 3000, 500):
        run.examples(range(4 * step, 4 * step + 4))
        sizes.append(len(json.dumps(run.state())))
    assert max(sizes[1:]) < 600


def test_two_processes_see_the_batches_of_one(three_sets):
    settings = streamed(**three_sets)
    one = examples(settings).examples(range(64))
    halves = [
        [
            row
            for step in range(16)
            for row in examples(settings).examples(range(4 * step + 2 * r, 4 * step + 2 * r + 2))
        ]
        for r in (0, 1)
    ]
    assert [row for step in range(16) for half in halves for row in half[2 * step : 2 * step + 2]] == one


def test_steps_are_of_like_length(three_sets):
    rows = examples(streamed(**three_sets, shuffle_buffer=400)).examples(range(400))
    lengths = np.array([len(row["document"]) + len(row["summary"]) for row in rows]).reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 4
    plain = examples(streamed(**three_sets, shuffle_buffer=400, bucket_by_length=False)).examples(range(400))
    mixed = np.array([len(row["document"]) for row in plain]).reshape(-1, 4)
    assert (mixed.max(1) - mixed.min(1)).mean() > 30


def test_own_splits_are_taken_and_nothing_is_hashed_out_of_the_training_files(tmp_path):
    for split, count in (("train", 40), ("validation", 7), ("test", 5)):
        write_lines(tmp_path / f"{split}.jsonl", documents(count, word=split))
    stream = corpus_stream(streamed(dataset=str(tmp_path), max_validation=4), step_size=1)
    found = stream.held_out({"validation": 4, "test": 10})
    assert [len(found[split][0]) for split in ("validation", "test")] == [4, 5]
    assert {row["document"].split()[0] for row in found["validation"][0]} == {"validation"}
    assert len({row["document"] for row in stream.head(40)}) == 40


def test_a_row_that_cannot_be_used_stops_or_is_left_out_and_counted(tmp_path):
    rows = list(documents(50))
    lines = [json.dumps(row) for row in rows]
    lines[20] = lines[20][:-5]
    lines[30] = json.dumps({"document": "", "summary": "x"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl line 21: not valid JSON .*") as told:
        examples(streamed(dataset=str(path))).pool(0)
    assert "\n" not in str(told.value)
    skipping = examples(streamed(dataset=str(path), bad_rows="skip"), steps=40)
    seen = {row["document"] for row in skipping.examples(range(160))}
    assert not seen & {rows[20]["document"], ""}
    assert skipping.skipped() >= 4  # two in each pass


def test_leaving_rows_out_reads_nothing_twice(tmp_path, monkeypatch):
    lines = [json.dumps(row) for row in documents(50)]
    lines[20], lines[30] = lines[20][:-5], json.dumps({"document": "", "summary": "x"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counted = []
    for name in ("__str__", "__repr__"):
        monkeypatch.setattr(of_pieces.Line, name, lambda line: counted.append(line.offset) or "somewhere")
    skipping = examples(streamed(dataset=str(path), bad_rows="skip"), steps=40)
    skipping.examples(range(160))
    assert skipping.skipped() >= 4
    assert counted == []  # a line's number takes all lines before it


def test_bad_texts_at_the_beginning_are_left_out_too(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["{", json.dumps({"text": ""}), *(json.dumps({"text": row["document"]}) for row in documents(50))]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def stream(**fields):
        return text_stream(validate(StreamedText, {"text": str(path), "streaming": True, **fields}), step_size=1)

    with pytest.raises(UserError, match=r"a.jsonl line 1: not valid JSON"):
        stream()
    skipping = stream(bad_rows="skip")
    assert len({row["text"] for row in skipping.head(30)}) == 30
    path.write_text(json.dumps({"words": "some"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="the column 'body' is missing there"):
        stream(bad_rows="skip", raw_column="body")
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no examples"):
        stream()


def test_memory_of_a_pool_is_let_go(three_sets):
    run = examples(streamed(**three_sets), steps=3000)
    for step in range(0, 3000, 10):
        run.examples(range(4 * step, 4 * step + 4))
        assert len(run._pools) == 1
        assert len(run._begins) <= 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_steps": -1}, "max_steps=-1: a stream has no length that epochs could count; give max_steps=N"),
        ({"dataset": "pydocs"}, "streaming=True: pydocs lies in memory as a whole; give dataset=FILES-or-hub-id"),
        ({"max_train": 5}, "max_train=5: there is no sample of a stream; drop it; max_steps says how much is read"),
        ({"mixture": [{"source": "FILE", "weight": 0}]}, "mixture.0.weight=0: input should be greater than 0"),
        ({"mixture": [{"source": "FILE"}]}, "mixture"),
        ({"mixture": [{"source": "FILE", "weight": 1}]}, "mixture.0.name=a: another set has this name"),
        ({"mixture": [{"source": "no.jsonl", "weight": 1}]}, "mixture.0.source=no.jsonl: no such file or folder"),
        ({"mixture": [{"source": "FILE", "weight": 1, "name": "A b"}]}, "mixture.0.name=A b: cannot be part of"),
        ({"mixture": [{"source": "FILE", "weight": 1}], "streaming": False}, "mixture=1 sets: sets are mixed"),
        ({"text_column": "body"}, "text_column=body: no such column in"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_read(tmp_path, fields, says):
    path = str(write_lines(tmp_path / "a.jsonl", documents(5)))
    given = {"dataset": path, **fields}
    if "mixture" in given:
        given["mixture"] = [part | {"source": part["source"].replace("FILE", path)} for part in given["mixture"]]
    with pytest.raises(UserError) as told:
        corpus_stream(streamed(**given), step_size=1)
    assert says in str(told.value)
    assert "\n" not in str(told.value)
