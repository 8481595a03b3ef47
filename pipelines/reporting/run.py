"""What lies in a run folder, read once: the run, its stages in order, their histories and the merged metrics."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.reporting.metrics import read_json, read_metrics

NOT_STARTED = "not started"


@dataclass(frozen=True)
class Stage:
    """One stage of a run, finished or not.

    Args:
        name: its name in the chain.
        folder: where its files lie (they may be missing).
        record: its ``stage.json``; empty when it was never started.
    """

    name: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return str(self.record.get("state", NOT_STARTED))

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def kind(self) -> str:
        """What it does, by its recipe (``ppo`` of ``summarization/ppo``); its own name when it has none."""
        return str(self.record.get("recipe") or self.name).rsplit("/", 1)[-1]

    @property
    def config(self) -> dict[str, Any]:
        return self.record.get("config") or {}

    @property
    def metrics(self) -> dict[str, float]:
        return self.record.get("metrics") or {}

    @property
    def versions(self) -> dict[str, str]:
        return self.record.get("versions") or {}

    @property
    def duration(self) -> float | None:
        """Seconds, over all the times it was resumed."""
        return self.record.get("duration_seconds")

    def json(self, name: str) -> Any | None:
        """The content of one of its JSON files, None when there is none.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """The entries of ``log_history.json``, oldest first."""
        found = self.json("log_history.json")
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one key of the history; entries without a finite value are left out."""
        pairs = [
            (float(entry.get("step", number)), float(entry[key]))
            for number, entry in enumerate(self.history, start=1)
            if is_number(entry.get(key))
        ]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a JSON-lines file, none when there is no file.

        Raises:
            UserError: naming the line that is damaged.
        """
        path = self.folder / name
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        "file", f"{path} line {number}", f"not valid JSON ({error})", "run its stage again"
                    ) from None


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        folder: the folder.
        name, about, command: what was run, in the words of its ``run.json``.
        seed: the seed that all stages share, None when they differ.
        stages: every stage of the chain, in order.
        metrics: the merged, flat metrics.
    """

    folder: Path
    name: str
    about: str
    command: str
    seed: int | None
    stages: tuple[Stage, ...]
    metrics: dict[str, float]

    def of_kind(self, *kinds: str) -> list[Stage]:
        """The stages that do one of the things named, in order."""
        return [stage for stage in self.stages if stage.kind in kinds]

    @property
    def reference(self) -> str:
        """The system that the others' win rate and KL are measured against."""
        named = [stage.config.get("reference_system") for stage in self.of_kind("evaluate")]
        return next(filter(None, named), "sft")

    @property
    def order(self) -> list[str]:
        """The names of the stages, in order."""
        return [stage.name for stage in self.stages]


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def anchor(text: str) -> str:
    """``text`` as an element id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"


def read_run(folder: Path | str) -> Run:
    """Everything that the report needs from a run folder; stages that are missing or unfinished are kept as such.

    Raises:
        UserError: if the folder is missing, holds no run, or one of its files is damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError("DIR", str(folder), "no such folder", "give the output folder of a run")
    about = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not isinstance(about, dict):
        raise UserError("DIR", str(folder), "its run.json is not a JSON object", "run the chain again")
    names = [entry["name"] if isinstance(entry, dict) else str(entry) for entry in about.get("stages", [])]
    if not names:
        found = sorted(p.parent.name for p in folder.glob("*/stage.json"))
        names = [n.removeprefix(".").removesuffix(".partial") if n.startswith(".") else n for n in found]
    if not names:
        problem = "not a run folder (no run.json, no stage in it)"
        raise UserError("DIR", str(folder), problem, "give the output folder of a run")
    metrics = folder / "metrics.json"
    stages = tuple(_read_stage(folder, name) for name in dict.fromkeys(names))
    seeds = {stage.record["seed"] for stage in stages if "seed" in stage.record}
    return Run(
        folder=folder,
        name=str(about.get("name") or folder.resolve().name),
        about=str(about.get("about") or ""),
        command=str(about.get("command") or ""),
        seed=about.get("seed", seeds.pop() if len(seeds) == 1 else None),
        stages=stages,
        metrics=read_metrics(metrics) if metrics.is_file() else {},
    )


def opened(folder: Path | str) -> Run:
    """A run's folder, or that of a stage which was run by itself (a recipe, an exercise), as a run of one stage.

    Raises:
        UserError: if it is neither, or one of its files is damaged.
    """
    folder = Path(folder).expanduser()
    if (folder / "run.json").is_file() or not (folder / "stage.json").is_file():
        return read_run(folder)
    stage = _stage_in(folder, folder.resolve().name)
    exercise = stage.json("exercise.json")
    name, title = (exercise["page"], exercise["title"]) if isinstance(exercise, dict) else (stage.kind, stage.kind)
    stage = Stage(name, folder, stage.record)
    return Run(folder, name, title, "", stage.record.get("seed"), (stage,), stage.metrics)


def _read_stage(folder: Path, name: str) -> Stage:
    for place in (folder / name, folder / f".{name}.partial"):  # an unfinished stage lies in its working folder
        if (place / "stage.json").is_file():
            return _stage_in(place, name)
    return Stage(name, folder / name)


def _stage_in(place: Path, name: str) -> Stage:
    record = read_json(place / "stage.json")
    if not isinstance(record, dict):
        raise UserError("file", str(place / "stage.json"), "not a JSON object", "run its stage again")
    return Stage(name, place, record)
