"""A stream as a Trainer reads it: as long as the run, tokenized a batch at a time, going on exactly after a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset
from transformers import TrainerCallback

from pipelines.corpus.stream import Cursor, Example, MixedStream, Pool, limits_of
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets
from pipelines.stage import write_json
from pipelines.training import checkpoint_folder

if TYPE_CHECKING:
    from datasets import Dataset as Rows
    from transformers import PreTrainedTokenizerBase

STREAM_FILE = "stream.json"
_KEPT = 3

Tokenize = Callable[[Sequence[Example]], list[dict[str, Any]]]


class StreamedExamples(Dataset):
    """All examples of a run in the order they are seen; position p belongs to optimizer step p div ``step_size``.

    To be read from the front to the back. A position far ahead of the last one costs the reading, not the tokenizing,
    of what is between, unless ``load_state`` was told where its pool begins.

    Args:
        stream: of examples.
        steps: optimizer steps of the run.
        tokenize: examples -> what the collator takes.
    """

    def __init__(self, stream: MixedStream, steps: int, tokenize: Tokenize):
        self.stream, self.steps, self.tokenize = stream, steps, tokenize
        self._begins: dict[int, list[Cursor]] = {0: stream.start()}
        self._pools: dict[int, Pool] = {}

    def __len__(self) -> int:
        return self.steps * self.stream.step_size

    def pool(self, number: int) -> Pool:
        """A pool; those between the last known one and it are read too."""
        if number not in self._pools:
            known = max(begin for begin in self._begins if begin <= number)
            for each in range(known, number + 1):
                found = self.stream.pool(each, self._begins[each])
                self._pools[each], self._begins[each + 1] = found, found.after
                for old in [key for key in self._pools if key < each]:
                    del self._pools[old]
                # Batches that were fetched ahead of a checkpoint may belong to the pool after that of its next step.
                for old in [key for key in self._begins if 0 < key <= each - _KEPT]:
                    del self._begins[old]
        return self._pools[number]

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """The examples at positions of the run, as texts."""
        places = [divmod(position, self.stream.pool_size) for position in positions]
        return [self.pool(number).examples[place] for number, place in places]

    def sets(self, positions: Sequence[int]) -> np.ndarray:
        """The set of the mixture that each position's example comes from."""
        places = [divmod(position, self.stream.pool_size) for position in positions]
        return np.array([self.pool(number).sets[place] for number, place in places])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        return self.tokenize(self.examples(positions))

    def epoch_at(self, step: int) -> float:
        """The share of the run that is done: a stream has no epochs."""
        return step / self.steps

    def skipped(self) -> int:
        """Rows left out so far because they could not be used."""
        return sum(cursor.skipped for cursor in self._begins[max(self._begins)])

    def state(self) -> dict[str, Any]:
        """Where the latest pools begin."""
        return {"begins": {str(number): [list(cursor) for cursor in begin] for number, begin in self._begins.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._begins |= {int(number): [Cursor(*each) for each in begin] for number, begin in state["begins"].items()}


class RememberStream(TrainerCallback):
    """Writes ``stream.json`` into every checkpoint; to stand before the callback that marks checkpoints as whole."""

    def __init__(self, examples: Any):
        self.examples = examples

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(checkpoint_folder(args.output_dir, state.global_step) / STREAM_FILE, self.examples.state())


def resume_stream(examples: Any, checkpoint: str | None) -> None:
    """Have a stream go on where a checkpoint was written, if there is one."""
    if checkpoint is not None:
        file = Path(checkpoint) / STREAM_FILE
        examples.load_state(json.loads(file.read_text(encoding="utf-8")))


def step_size(settings: Any) -> int:
    """Examples of one optimizer step, over all processes."""
    from accelerate import PartialState

    return settings.batch_size * settings.gradient_accumulation * PartialState().num_processes


def tokenize_corpus(tokenizer: PreTrainedTokenizerBase, lengths: LengthConfig) -> Tokenize:
    """Makes ``{input_ids, attention_mask, labels}`` of documents with summaries."""

    def tokenize(examples: Sequence[Example]) -> list[dict[str, Any]]:
        sources = tokenize_sources(tokenizer, [example["document"] for example in examples], lengths)["input_ids"]
        targets = tokenize_targets(tokenizer, [example["summary"] for example in examples], lengths)["input_ids"]
        return [
            {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}
            for source, target in zip(sources, targets, strict=True)
        ]

    return tokenize


def tokenize_preferences(
    tokenizer: PreTrainedTokenizerBase, lengths: LengthConfig, margin_scale: float | None = None
) -> Tokenize:
    """Makes ``{prompt_ids, chosen_ids, rejected_ids}`` of pairs; with a scale also ``margin``."""

    def tokenize(examples: Sequence[Example]) -> list[dict[str, Any]]:
        columns = {
            "prompt_ids": tokenize_sources(tokenizer, [example["prompt"] for example in examples], lengths),
            "chosen_ids": tokenize_targets(tokenizer, [example["chosen"] for example in examples], lengths),
            "rejected_ids": tokenize_targets(tokenizer, [example["rejected"] for example in examples], lengths),
        }
        rows = [{name: found["input_ids"][i] for name, found in columns.items()} for i in range(len(examples))]
        if margin_scale is not None:
            for row, example in zip(rows, examples, strict=True):
                row["margin"] = margin_scale * example["margin"]
        return rows

    return tokenize


class Parts:
    """Which held-out examples belong to which set of a mixture: they stand one set after the other.

    Args:
        names: of the sets.
        counts: held-out examples of each.
        weights: of the sets.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int], weights: Sequence[float]):
        self.names, self.weights = list(names), list(weights)
        ends = np.cumsum(counts)
        self.slices = [slice(int(end - count), int(end)) for end, count in zip(ends, counts, strict=True)]

    def of(self, *values: np.ndarray) -> dict[str, tuple[np.ndarray, ...]]:
        """Set -> its part of each array, where there is more than one set."""
        if len(self.names) < 2:
            return {}
        return {name: tuple(v[part] for v in values) for name, part in zip(self.names, self.slices, strict=True)}


def held_out_rows(
    stream: MixedStream, settings: Any, splits: Sequence[str], columns: Sequence[str]
) -> tuple[dict[str, Rows], dict[str, Parts]]:
    """The held-out examples of all sets, in memory, and whose they are.

    Args:
        stream: whose.
        settings: with the limits.
        splits: which.
        columns: that are kept.

    Raises:
        UserError: a set has none.
    """
    from datasets import Dataset as Rows

    found, names = stream.held_out(limits_of(settings, splits)), settings.set_names()
    rows = {
        split: Rows.from_list([{name: row[name] for name in columns} for part in parts for row in part])
        for split, parts in found.items()
    }
    parts = {split: Parts(names, list(map(len, parts)), stream.weights) for split, parts in found.items()}
    return rows, parts


def head_rows(stream: MixedStream, count: int, columns: Sequence[str]) -> Rows:
    """The first training examples as a set in memory.

    Raises:
        UserError: a row that cannot be used.
    """
    from datasets import Dataset as Rows

    return Rows.from_list([{name: row[name] for name in columns} for row in stream.head(count)])


def streamed_preferences(
    settings: Any, tokenizer: PreTrainedTokenizerBase, margin_scale: float | None = None
) -> tuple[dict[str, Rows], Parts, StreamedExamples]:
    """What a stage trains on and measures where its preference pairs are streamed.

    Args:
        settings: a configuration with ``PreferenceFields``, ``StreamFields``, lengths and ``max_steps``.
        tokenizer: of the model.
        margin_scale: where margins are wanted, what one is worth.

    Returns:
        Texts in memory: the validation and test pairs and the first training pairs (as ``train``); whose the test pairs
        are; and all training pairs, tokenized as they come.

    Raises:
        UserError: from the data.
    """
    from pipelines.corpus.local import PREFERENCE_COLUMNS
    from pipelines.corpus.stream import HELD_OUT, preference_stream

    columns = PREFERENCE_COLUMNS[1:]
    stream = preference_stream(settings, step_size=step_size(settings))
    texts, parts = held_out_rows(stream, settings, ("validation", "test"), columns)
    texts["train"] = head_rows(stream, HELD_OUT, columns)
    tokenize = tokenize_preferences(tokenizer, settings, margin_scale)
    return texts, parts["test"], StreamedExamples(stream, settings.max_steps, tokenize)
