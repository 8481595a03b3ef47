"""The configuration fields that name text data; every stage that reads data takes them from here."""

from __future__ import annotations

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
