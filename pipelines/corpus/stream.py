"""Training examples read as training goes: a mixture of sets, shuffled a pool at a time, the same after every restart.

A pool is as many examples as ``shuffle_buffer`` says, rounded up to whole optimizer steps. Pool k takes from each set
the rows that come next there; which set an example comes from, the order of a set's pieces in each pass over it, and
the order within the pool are functions of the seed and of numbers that count from the beginning. So all that has to be
remembered to go on in the middle is where each set was when the pool began: a few numbers, written beside each
checkpoint; without them the rows before are read again, and come to the same.

Held out of a set are its own validation and test files where it has them; else the rows whose document hashes into the
first shares of [0, 1), wherever they stand. Training leaves those out, all of them, and no document is on two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from pipelines.corpus.fields import CorpusFields, PreferenceFields, StreamFields, TextFields
from pipelines.corpus.local import check_column, corpus_example, preference_example, text_of
from pipelines.corpus.mixture import pool_order, set_of_slots, share_of
from pipelines.corpus.pieces import ROW_SUFFIXES, TEXT_SUFFIXES, Pieces, open_pieces
from pipelines.corpus.readers import Rows
from pipelines.errors import UserError, problems_of

HELD_OUT = 1000
"""Held-out examples of each set and split that are read where no limit is given; they are kept in memory."""

_LOOKED_AT = 100

Example = dict[str, Any]


class Cursor(NamedTuple):
    """Where the reading of a set stands.

    Args:
        turn: passes over the set that are behind it.
        piece: how-manieth piece of this pass.
        at: place in the piece.
        skipped: rows left out so far because they could not be used.
    """

    turn: int = 0
    piece: int = 0
    at: int = 0
    skipped: int = 0


@dataclass
class SetStream:
    """One set, pass after pass, its pieces in another order each time.

    Args:
        name: of the set, in metrics.
        splits: its pieces, ``train`` at least.
        example_of: (row, place, what) -> example.
        key: what an example is known by when it is held out (its document).
        fractions: split -> share held out, of the splits beside ``train`` that are wanted.
        seed: of the order of the pieces.
        split_seed: of what is held out.
        skip: leave rows out that cannot be used, instead of an error.
    """

    name: str
    splits: Mapping[str, Pieces]
    example_of: Callable[[dict[str, Any], str, str], Example]
    key: str
    fractions: Mapping[str, float]
    seed: int
    split_seed: int
    skip: bool = False
    _hashed: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._hashed = {split: share for split, share in self.fractions.items() if split not in self.splits}

    def split_of(self, example: Example) -> str:
        """The split that a row of the training files belongs to."""
        if not self._hashed:
            return "train"
        point = share_of(example[self.key], self.split_seed)
        for split, share in self._hashed.items():
            if point < share:
                return split
            point -= share
        return "train"

    def _usable(self, pieces: Pieces, cursor: Cursor) -> Iterator[tuple[Cursor, Example | None]]:
        """The usable rows of the rest of a pass, where the reading stands after each, and None at its end."""
        order = np.random.default_rng([self.seed, cursor.turn]).permutation(len(pieces))
        skipped = cursor.skipped
        for number in range(cursor.piece, len(order)):
            at = cursor.at if number == cursor.piece else 0
            for after, place, row in pieces.rows(int(order[number]), at):
                try:
                    if isinstance(row, UserError):
                        raise row
                    example = self.example_of(row, place, pieces.what)
                except UserError as error:
                    if not self.skip:
                        error.problems[0] = _with_mend(error)
                        raise
                    skipped += 1
                    continue
                yield Cursor(cursor.turn, number, after, skipped), example
        yield Cursor(cursor.turn + 1, 0, 0, skipped), None

    def train(self, cursor: Cursor) -> Iterator[tuple[Cursor, Example]]:
        """The training examples from a place on, without an end.

        Raises:
            UserError: a row that cannot be used; or a whole pass without a training example.
        """
        pieces = self.splits["train"]
        while True:
            found = cursor.piece > 0 or cursor.at > 0
            for after, example in self._usable(pieces, cursor):
                cursor = after
                if example is not None and self.split_of(example) == "train":
                    found = True
                    yield after, example
            if not found:
                problem = "none of its rows is a training example"
                mend = "give more rows, or hold out less (validation_fraction, test_fraction)"
                raise UserError(pieces.what, pieces.source, problem, mend)

    def held_out(self, limits: Mapping[str, int]) -> dict[str, list[Example]]:
        """The first held-out examples of each split, in the order of the first pass.

        Args:
            limits: split -> at most so many.
        """
        found: dict[str, list[Example]] = {split: [] for split in limits}
        for split in set(limits) & set(self.splits):
            rows = (example for _, example in self._usable(self.splits[split], Cursor()) if example is not None)
            found[split] = list(islice(rows, limits[split]))
        wanted = set(limits) & set(self._hashed)
        for _, example in self._usable(self.splits["train"], Cursor()) if wanted else ():
            split = "train" if example is None else self.split_of(example)
            if split in wanted and len(found[split]) < limits[split]:
                found[split].append(example)
                if all(len(found[split]) >= limits[split] for split in wanted):
                    break
        return found


def _with_mend(error: UserError) -> Any:
    from dataclasses import replace

    first = error.problems[0]
    return replace(first, mend=f"{first.mend}, or give bad_rows=skip")


class Pool(NamedTuple):
    """Some examples of a run, in the order in which they are seen.

    Args:
        number: of the pool.
        examples: in order.
        sets: (N,) the set that each comes from.
        before: where each set stood when the pool began.
        after: where it stands behind it.
    """

    number: int
    examples: list[Example]
    sets: np.ndarray
    before: list[Cursor]
    after: list[Cursor]


class MixedStream:
    """All examples of a run, pool by pool.

    Args:
        sets: of the mixture.
        weights: of the sets.
        pool_size: examples in memory together; rounded up to whole steps.
        step_size: examples of one optimizer step, over all processes.
        seed: of every order.
        length_of: what examples of a step are alike in; None: no grouping.
    """

    def __init__(
        self,
        sets: Sequence[SetStream],
        weights: Sequence[float],
        *,
        pool_size: int,
        step_size: int,
        seed: int,
        length_of: Callable[[Example], int] | None = None,
    ):
        self.sets, self.weights, self.seed, self.length_of = list(sets), list(weights), seed, length_of
        self.step_size = step_size
        self.pool_size = -(-pool_size // step_size) * step_size
        self._readers: list[Iterator[tuple[Cursor, Example]] | None] = [None] * len(self.sets)
        self._stand: list[Cursor] = [Cursor()] * len(self.sets)

    def _rows(self, index: int, cursor: Cursor, count: int) -> Iterator[tuple[Cursor, Example]]:
        # An open reader that stands where it is wanted goes on; otherwise one is opened there.
        if self._readers[index] is None or self._stand[index] != cursor:
            self._readers[index] = self.sets[index].train(cursor)
        for _ in range(count):
            after, example = next(self._readers[index])
            self._stand[index] = after
            yield after, example

    def pool(self, number: int, before: Sequence[Cursor]) -> Pool:
        """Pool ``number``, which begins where each set stands at ``before``.

        Raises:
            UserError: a row that cannot be used.
        """
        slots = set_of_slots(self.weights, number * self.pool_size, self.pool_size, self.seed)
        examples: list[Example] = [{}] * self.pool_size
        after = list(before)
        for index in range(len(self.sets)):
            places = np.flatnonzero(slots == index)
            for place, (cursor, example) in zip(places, self._rows(index, before[index], len(places)), strict=True):
                examples[place], after[index] = example, cursor
        lengths = None if self.length_of is None else [self.length_of(example) for example in examples]
        order = pool_order(lengths, self.step_size, self.seed, number, self.pool_size)
        return Pool(number, [examples[place] for place in order], slots[order], list(before), after)

    def start(self) -> list[Cursor]:
        """Where each set stands at the beginning."""
        return [Cursor()] * len(self.sets)

    def head(self, count: int) -> list[Example]:
        """The first ``count`` training examples, sets by their weights, without changing anything."""
        slots = set_of_slots(self.weights, 0, count, self.seed)
        readers = [each.train(Cursor()) for each in self.sets]
        return [next(readers[index])[1] for index in slots]

    def held_out(self, limits: Mapping[str, int]) -> dict[str, list[list[Example]]]:
        """Split -> for each set its held-out examples.

        Raises:
            UserError: a set has none.
        """
        found: dict[str, list[list[Example]]] = {split: [] for split in limits}
        for each in self.sets:
            pieces = each.splits["train"]
            for split, examples in each.held_out(limits).items():
                if not examples:
                    problem = f"none of its rows falls into the {split} set"
                    raise UserError(pieces.what, pieces.source, problem, f"give more rows, or a {split} file")
                found[split].append(examples)
        return found


# --- the streams of the stages ----------------------------------------------------------------------------------------


def _first_rows(fields: Any, pieces: Pieces, count: int = _LOOKED_AT) -> list[tuple[Any, dict[str, Any]]]:
    """Where the first rows stand, and what they hold: they are looked at before any work begins.

    Raises:
        UserError: there are none; or one cannot be read, and such rows are not to be left out.
    """
    every = ((place, row) for piece in range(len(pieces)) for _, place, row in pieces.rows(piece, 0))
    rows = list(islice(every, count))
    wrong = [row for _, row in rows if isinstance(row, UserError)]
    if wrong and fields.bad_rows == "stop":
        raise wrong[0]
    rows = [(place, row) for place, row in rows if not isinstance(row, UserError)]
    if not rows:
        raise UserError(pieces.what, pieces.source, "holds no examples", "give a set with at least one")
    return rows


def _check_columns(fields: Any, pieces: Pieces, columns: Mapping[str, str], option: bool) -> None:
    rows = _first_rows(fields, pieces)
    found = Rows(pieces.what, pieces.source, rows, list(rows[0][1]), pieces.typed)
    for named_by, column in columns.items():
        check_column(found, named_by if option else pieces.what, column, option=option)


def _opened(
    fields: Any, first: tuple[str, str | None], others: Mapping[str, str | None], suffixes: Sequence[str] = ROW_SUFFIXES
) -> Iterator[tuple[str, str, dict[str, Pieces], Any]]:
    """For each set its name, the field that named it, its splits, and its part of the mixture (None: the first)."""
    field_name = fields._stream_field
    given = [(field_name, *first, None)]
    given += [(f"mixture.{i}.source", part.source, part.config, part) for i, part in enumerate(fields.mixture)]
    for name, (what, source, hub_config, part) in zip(fields.set_names(), given, strict=True):
        splits = open_pieces(source, what, hub_config, suffixes)
        if part is None:
            for split, value in others.items():
                if value is None:
                    continue
                if split in splits:
                    problem = f"{source} has a {split} split of its own"
                    option = f"{split}_{field_name}"
                    raise UserError(option, value, problem, f"drop {option}, or give only the training file")
                found = open_pieces(value, f"{split}_{field_name}", None, suffixes)
                splits[split] = found.get(split, found["train"])
        yield name, what, splits, part


def corpus_stream(fields: Any, *, step_size: int, splits: Sequence[str] = ("validation", "test")) -> MixedStream:
    """The documents and summaries that a stage streams.

    Args:
        fields: a configuration with ``CorpusFields``, ``StreamFields``, ``seed`` and lengths.
        step_size: examples of one optimizer step, over all processes.
        splits: held out by hash where a set does not name them.

    Returns:
        Examples with ``document``, ``summary`` and ``references``.

    Raises:
        UserError: a set that cannot be opened, or lacks a column.
    """
    others = {"validation": fields.validation_dataset, "test": fields.test_dataset}
    sets = []
    for name, what, found, part in _opened(fields, (fields.dataset, fields.dataset_config), others):
        text, summary = fields.text_column, fields.summary_column
        prefix = ""
        if part is not None:
            text, summary = part.text_column or text, part.summary_column or summary
            prefix = what.removesuffix("source")
        _check_columns(fields, found["train"], {f"{prefix}text_column": text, f"{prefix}summary_column": summary}, True)
        sets.append((name, found, partial(corpus_example, text_column=text, summary_column=summary)))
    return _mixed(fields, sets, "document", splits, step_size, ("document", "summary"))


def preference_stream(fields: Any, *, step_size: int) -> MixedStream:
    """The preference pairs that a stage streams: ``prompt``, ``chosen``, ``rejected``, scores and ``margin``.

    Args:
        fields: a configuration with ``PreferenceFields``, ``StreamFields``, ``seed`` and lengths.
        step_size: pairs of one optimizer step, over all processes.

    Raises:
        UserError: a set that cannot be opened, or lacks a column.
    """
    others = {"validation": fields.validation_preferences, "test": fields.test_preferences}
    sets = []
    for name, _, found, _ in _opened(fields, (fields.preferences, None), others):
        _check_columns(fields, found["train"], {column: column for column in ("prompt", "chosen", "rejected")}, False)
        sets.append((name, found, preference_example))
    columns = ("prompt", "chosen", "rejected")
    return _mixed(fields, sets, "prompt", ("validation", "test"), step_size, columns)


def _text_example(row: dict[str, Any], place: str, what: str, column: str) -> Example:
    name = "text" if "text" in row and column not in row else column
    if name not in row:
        raise UserError(what, place, f"the column {column!r} is missing there", "add it or drop the row")
    return {"text": text_of(row[name], name, place, what)}


def text_stream(fields: Any, *, step_size: int) -> MixedStream:
    """The raw documents that pretraining streams: ``text``.

    Args:
        fields: a configuration with ``TextFields``, ``StreamFields`` and ``seed``.
        step_size: documents of a pool are a multiple of this.

    Raises:
        UserError: a set that cannot be opened, or lacks a column.
    """
    sets = []
    suffixes = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
    for name, _, found, part in _opened(fields, (fields.text, fields.text_config), {}, suffixes):
        column = (part and part.text_column) or fields.raw_column
        sets.append((name, found, partial(_text_example, column=column)))
        _check_texts(fields, found["train"], column)
    return _mixed(fields, sets, "text", ("validation",), step_size, None)


def _check_texts(fields: Any, pieces: Pieces, column: str) -> None:
    rows = _first_rows(fields, pieces, 10)  # documents may be long
    wrong = problems_of(*(partial(_text_example, row, place, pieces.what, column) for place, row in rows))
    if wrong and (fields.bad_rows == "stop" or len(wrong) == len(rows)):
        raise UserError.of(wrong[:1])


def _mixed(
    fields: Any,
    opened: Sequence[tuple[str, dict[str, Pieces], Callable[..., Example]]],
    key: str,
    splits: Sequence[str],
    step_size: int,
    columns: Sequence[str] | None,
) -> MixedStream:
    shares = {"validation": _share(fields, "validation"), "test": _share(fields, "test")}
    sets = [
        SetStream(
            name,
            found,
            example_of,
            key,
            {split: shares[split] for split in splits},
            seed=int(np.random.SeedSequence([fields.seed, index]).generate_state(1)[0]),
            split_seed=getattr(fields, "split_seed", 0),
            skip=fields.bad_rows == "skip",
        )
        for index, (name, found, example_of) in enumerate(opened)
    ]
    return MixedStream(
        sets,
        fields.set_weights(),
        pool_size=fields.shuffle_buffer,
        step_size=step_size,
        seed=fields.seed,
        length_of=partial(_characters, columns=columns) if fields.bucket_by_length and columns else None,
    )


def _share(fields: CorpusFields | PreferenceFields | TextFields | StreamFields, split: str) -> float:
    if hasattr(fields, "text_validation_fraction"):
        return fields.text_validation_fraction
    return getattr(fields, f"{split}_fraction")


def _characters(example: Example, columns: Sequence[str]) -> int:
    # Characters, not tokens: then a process tokenizes only the examples that it trains on.
    return sum(len(example[column]) for column in columns)


def limits_of(fields: Any, splits: Sequence[str]) -> dict[str, int]:
    """Split -> how many held-out examples of each set are read."""
    return {split: getattr(fields, f"max_{split}", None) or HELD_OUT for split in splits}
