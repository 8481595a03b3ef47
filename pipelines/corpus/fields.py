"""The configuration fields that name text data; every stage that reads data takes them from here."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, Problem, Source, config

EMBEDDED = "pydocs"

_OF_DATA = {"of": ["dataset", "preferences", "rankings"]}
"""Marks a field that says how to read data; a stage that takes its data from another has no use for it."""


def _parent(instance: object, cls: type, method: str, empty: object) -> object:
    """``super().method()`` where the mixin's next class has it; the mixins also stand alone, without a StageConfig."""
    function = getattr(super(cls, instance), method, None)
    return empty if function is None else function()


@config
class SplitFields:
    """How one file becomes three splits, and how much of each is used."""

    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the training file that becomes the validation set where there is none",
        json_schema_extra=_OF_DATA,
    )
    test_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the training file that becomes the test set where there is none",
        json_schema_extra=_OF_DATA,
    )
    split_seed: int = Field(
        0,
        ge=0,
        description="seed of that split and of the samples below (not the training seed)",
        json_schema_extra=_OF_DATA,
    )
    max_train: int | None = Field(
        None, ge=1, description="use a random sample of at most so many training examples", json_schema_extra=_OF_DATA
    )
    max_validation: int | None = Field(
        None, ge=1, description="use at most so many validation examples", json_schema_extra=_OF_DATA
    )
    max_test: int | None = Field(
        None, ge=1, description="use at most so many test examples", json_schema_extra=_OF_DATA
    )

    def problems(self) -> list[Problem]:
        """Whether the splits leave something to train on."""
        found = list(_parent(self, SplitFields, "problems", []))
        if self.validation_fraction + self.test_fraction >= 1:
            value = self.validation_fraction + self.test_fraction
            mend = "lower validation_fraction or test_fraction"
            found.append(Problem("validation_fraction+test_fraction", value, "leaves nothing to train on", mend))
        return found


@config
class CorpusFields(SplitFields):
    """Documents with summaries: the embedded set, own files, a saved dataset folder or a hub id."""

    dataset: Source = Field(
        EMBEDDED,
        description="pydocs (embedded: docstrings of the installed packages), a .jsonl, .json, .csv, .tsv or .parquet "
        "file, a folder holding train/validation/test files or a saved dataset, or a hub id",
    )
    validation_dataset: Source | None = Field(
        None, description="file or folder of the validation set", json_schema_extra=_OF_DATA
    )
    test_dataset: Source | None = Field(None, description="file or folder of the test set", json_schema_extra=_OF_DATA)
    dataset_config: str | None = Field(
        None, description="configuration of a hub dataset, e.g. 3.0.0 of cnn_dailymail", json_schema_extra=_OF_DATA
    )
    text_column: str = Field(
        "document", description="column of the documents (a list of sentences is joined)", json_schema_extra=_OF_DATA
    )
    summary_column: str = Field(
        "summary", description="column of the summaries (a list is a list of references)", json_schema_extra=_OF_DATA
    )
    id_column: str = Field("id", description="column of the ids, used where it exists", json_schema_extra=_OF_DATA)

    def problems(self) -> list[Problem]:
        """Columns and data that are named twice, and splits beside a set that brings its own."""
        found = super().problems()
        if self.text_column == self.summary_column:
            mend = "name two different columns"
            found.append(Problem("summary_column", self.summary_column, "is text_column too", mend))
        given = [
            (name, value)
            for name in ("dataset", "validation_dataset", "test_dataset")
            if (value := getattr(self, name)) is not None
        ]
        found.extend(_same_twice(given))
        if self.dataset == EMBEDDED and len(given) > 1:
            mend = "drop it, or give your training set as dataset="
            found.append(Problem(given[1][0], given[1][1], "pydocs brings its own splits", mend))
        return found

    def environment(self) -> dict[str, str]:
        """The versions of the packages read, where the set is made of them."""
        from pipelines.corpus.pydocs import environment_key

        found = dict(_parent(self, SplitFields, "environment", {}))
        return found | ({EMBEDDED: environment_key()} if self.dataset == EMBEDDED else {})


@config
class TextFields:
    """Documents without summaries, to pretrain on: the embedded raw text, own files, or a hub id."""

    text: Source = Field(
        EMBEDDED,
        description="pydocs (embedded: all docstrings and prose documentation of the installed packages), a folder "
        "that the text stage saved, a .txt, .md, .rst or .jsonl file, a folder of such files, or a hub id (streamed)",
    )
    # Inert as a path: what it holds decides the result, and that is in ``environment()``.
    site_packages: str | None = Field(
        None,
        description="folder of further installed packages whose text pydocs reads too; none of them is imported",
        json_schema_extra=INERT,
    )
    text_config: str | None = Field(None, description="configuration of a hub data set of texts")
    raw_column: str = Field("text", description="column of the texts in .jsonl files and hub data sets")
    max_documents: int | None = Field(
        None, ge=2, description="read at most so many documents of a file, folder or hub data set"
    )
    text_validation_fraction: float = Field(
        0.01, gt=0, lt=1, description="share of those documents that is held out (pydocs holds out whole packages)"
    )
    pairs: Source | None = Field(
        None,
        description="documents with summaries to mix in, whatever `dataset` of the corpus stage takes (its test split "
        "is never read); left out: those of text, where it is pydocs or was saved with pairs",
    )

    def problems(self) -> list[Problem]:
        """Packages for a text that is not theirs."""
        found = list(_parent(self, TextFields, "problems", []))
        if self.site_packages is not None and self.text != EMBEDDED:
            problem, mend = f"is read for text={EMBEDDED} only, and text is {self.text}", "drop one of the two"
            found.append(Problem("site_packages", self.site_packages, problem, mend))
        return found

    def environment(self) -> dict[str, str]:
        """The versions of the packages read, where the text is theirs.

        Raises:
            UserError: ``site_packages`` holds none. A chain that names a folder still to be filled is valid before.
        """
        from pipelines.corpus.packages import text_key

        found = dict(_parent(self, TextFields, "environment", {}))
        return found | ({"text": text_key(self.site_packages)} if self.text == EMBEDDED else {})


@config
class PreferenceFields(SplitFields):
    """Preference pairs: what the preferences stage saved, or a file of human preferences."""

    preferences: Source = Field(
        description="folder that the preferences stage saved, or own data with the columns prompt, chosen, rejected: a "
        ".jsonl, .json, .csv, .tsv or .parquet file, a folder of train/validation/test files, or a hub id"
    )
    validation_preferences: Source | None = Field(
        None, description="file or folder of the validation pairs", json_schema_extra=_OF_DATA
    )
    test_preferences: Source | None = Field(
        None, description="file or folder of the test pairs", json_schema_extra=_OF_DATA
    )

    def problems(self) -> list[Problem]:
        """Data that are named twice."""
        found = super().problems()
        names = ("preferences", "validation_preferences", "test_preferences")
        return found + _same_twice([(name, value) for name in names if (value := getattr(self, name)) is not None])


@config
class RankingFields(SplitFields):
    """Ranked lists of completions: what the preferences stage saved under ``rankings``, or a file of people's own."""

    rankings: Source = Field(
        description="folder ``rankings`` that the preferences stage saved, or own data with the columns prompt, "
        "completions (a list of texts) and ranking (their numbers from 0, best first; those left out are worse than "
        "those named): a .jsonl, .json or .parquet file, a folder of train/validation/test files, or a hub id"
    )
    validation_rankings: Source | None = Field(
        None, description="file or folder of the validation lists", json_schema_extra=_OF_DATA
    )
    test_rankings: Source | None = Field(
        None, description="file or folder of the test lists", json_schema_extra=_OF_DATA
    )

    def problems(self) -> list[Problem]:
        """Data that are named twice."""
        found = super().problems()
        names = ("rankings", "validation_rankings", "test_rankings")
        return found + _same_twice([(name, value) for name in names if (value := getattr(self, name)) is not None])


def _same_twice(given: list[tuple[str, str]]) -> list[Problem]:
    found, seen = [], {}
    for name, value in given:
        if value in seen:
            found.append(Problem(name, value, f"is {seen[value]} too", "give each split data of its own"))
        seen.setdefault(value, name)
    return found


@config
class MixtureSet:
    """A further set of a mixture."""

    source: Source = Field(description="file, folder, glob pattern or hub id")
    weight: float = Field(gt=0, description="examples drawn from it for one of the first set's")
    name: str | None = Field(None, description="what its metrics are called; left out: the source's last part")
    config: str | None = Field(None, description="configuration of a hub data set")
    text_column: str | None = Field(None, description="column of the documents; left out: as in the first set")
    summary_column: str | None = Field(None, description="column of the summaries; left out: as in the first set")


@config
class StreamFields:
    """Training data read from disk or the Hub as training goes; see ``pipelines/corpus/stream.py``."""

    streaming: bool = Field(
        False,
        description="read training examples as they are needed instead of all at the start: memory does not grow with "
        "the set. Needs max_steps; .jsonl (.gz), .csv, .tsv and .parquet files, folders or patterns (data/*.jsonl) of "
        "them, saved data sets, hub ids",
    )
    mixture: list[MixtureSet] = Field(
        default_factory=list,
        description="further sets, a list of {source, weight, name, config, text_column, summary_column}: of every "
        "1 + Σ weight examples one comes from the first set, whatever the sets' sizes; needs streaming=true",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, description="streaming: examples read ahead, shuffled and grouped by length; they are in memory"
    )
    bucket_by_length: bool = Field(True, description="streaming: the examples of a step are of like length")
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="streaming: what happens at a row that cannot be used: an error, or it is left out, counted"
    )

    _stream_field: ClassVar[str] = "dataset"

    def problems(self) -> list[Problem]:
        """Fields that mean nothing of a stream, or of what is no stream."""
        found = list(_parent(self, StreamFields, "problems", []))
        first = getattr(self, self._stream_field)
        if self.mixture and not self.streaming:
            problem = "sets are mixed as they are read"
            found.append(Problem("mixture", f"{len(self.mixture)} sets", problem, "give streaming=true"))
        if not self.streaming:
            return found
        if self.max_steps <= 0:
            problem = "a stream has no length that epochs could count"
            found.append(Problem("max_steps", self.max_steps, problem, "give max_steps=N"))
        if first == EMBEDDED:
            mend = f"give {self._stream_field}=FILES-or-hub-id, or streaming=false"
            found.append(Problem("streaming", True, f"{EMBEDDED} lies in memory as a whole", mend))
        if getattr(self, "max_train", None) is not None:
            problem = "there is no sample of a stream"
            found.append(Problem("max_train", self.max_train, problem, "drop it; max_steps says how much is read"))
        names = self.set_names()
        for place, name in enumerate(names):
            if not re.fullmatch(r"[a-z0-9_]+", name):
                problem = "cannot be part of a metric's name"
                found.append(Problem(f"mixture.{place - 1}.name", name, problem, "write a to z, 0 to 9 and _"))
            if name in names[:place]:
                problem = "another set has this name"
                found.append(Problem(f"mixture.{place - 1}.name", name, problem, "give it a name=… of its own"))
        return found

    def set_names(self) -> list[str]:
        """What the sets are called in metrics, the first set's name first."""
        given = [(getattr(self, self._stream_field), None), *((part.source, part.name) for part in self.mixture)]
        return [name if name is not None else _plain_name(str(source)) for source, name in given]

    def set_weights(self) -> list[float]:
        """The sets' weights, the first set's first."""
        return [1.0, *(part.weight for part in self.mixture)]


def _plain_name(source: str) -> str:
    """``data/CNN-dm.jsonl.gz`` -> ``cnn_dm``: a source's last part as part of a metric's name."""
    last = [part for part in re.split(r"[/\\]+", source) if part and "*" not in part] or ["set"]
    return re.sub(r"[^a-z0-9]+", "_", last[-1].split(".")[0].lower()).strip("_") or "set"
