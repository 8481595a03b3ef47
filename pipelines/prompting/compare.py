"""The best written prompt against what was learnt: soft prompts, LoRA, full fine-tuning, on the same examples.

The written prompts come from stages of hard prompts, one a seed of their solved examples; which of them is the best is
decided on the very examples that are measured, in their favour. What was learnt comes from stages of soft prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config, nearest
from pipelines.errors import Problem, UserError
from pipelines.prompting.backends_fields import name_problems
from pipelines.prompting.soft import RESULTS_FILE
from pipelines.stage import read_stage, write_json

if TYPE_CHECKING:
    import numpy as np

BEST = "best_hard"
COMPARISON_FILE = "comparison.json"


@config
class CompareConfig(StageConfig):
    """Compare the best hard prompt with what was learnt, in one table and figure."""

    output_dir: str = Field("runs/compare", description="folder the stage writes into", json_schema_extra=INERT)
    hard: list[Source] = Field(description="folders of stages of hard prompts, the same prompts with different seeds")
    learnt: dict[str, Source] = Field(description="name -> folder of a stage of soft prompts, LoRA or full fine-tuning")
    hard_model: str | None = Field(None, description="which of the models that were prompted; null: the first")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval")

    def problems(self) -> list[Problem]:
        found = super().problems() + name_problems("learnt", list(self.learnt))
        for field, empty in (("hard", not self.hard), ("learnt", not self.learnt)):
            if empty:
                found.append(Problem(field, getattr(self, field), "there is nothing to compare", "give folders"))
        if len(set(self.hard)) < len(self.hard):
            found.append(Problem("hard", self.hard, "names a folder twice", "give each once"))
        if BEST in self.learnt:
            found.append(Problem("learnt", BEST, "is the name of the best hard prompt", "choose another name"))
        for number, folder in enumerate(self.hard):
            found += _needs(folder, "answers.jsonl", f"hard.{number}", "a stage of hard prompts")
        for name, folder in self.learnt.items():
            found += _needs(folder, RESULTS_FILE, f"learnt.{name}", "a stage of soft prompts")
        return found


def _needs(folder: str, file: str, field: str, what: str) -> list[Problem]:
    path = Path(folder).expanduser()
    if folder.startswith("${") or not path.exists() or (path / file).is_file():
        return []
    return [Problem(field, folder, f"holds no {file}", f"give the folder of {what}")]


@dataclass(frozen=True)
class System:
    """What is compared.

    Attributes:
        name: of the prompt or of the trained stage.
        values: (seeds, examples), each example's measured value.
        trained: how many parameters were trained.
        examples: how many examples it was trained on, or were shown.
    """

    name: str
    values: np.ndarray
    trained: int
    examples: int


def learnt_systems(name: str, results: Mapping[str, Any], ids: Sequence[str]) -> list[System]:
    """A trained stage as one system for each size of its training set, the largest first.

    Args:
        name: of the stage.
        results: its ``results.json``.
        ids: the examples in the order wanted.

    Raises:
        UserError: it was measured on other examples.
    """
    import numpy as np

    from pipelines.prompting.soft import values_of

    place = {identifier: number for number, identifier in enumerate(results["ids"])}
    if set(place) != set(ids):
        problem = f"was measured on other examples ({len(place)}, of which {len(set(ids) & set(place))} are the same)"
        raise UserError(f"learnt.{name}", name, problem, "give all stages the same dataset, split and max_test")
    order = [place[identifier] for identifier in ids]
    sizes = sorted({run["examples"] for run in results["runs"]}, reverse=True)
    found = []
    for size in sizes:
        trained = next(run["trainable_parameters"] for run in results["runs"] if run["examples"] == size)
        found.append(System(name, np.asarray(values_of(results, size))[:, order], trained, size))
    return found


def hard_systems(
    folders: Sequence[str], model: str | None, metric: str, references: Mapping[str, Sequence[str]]
) -> tuple[list[System], list[str]]:
    """Every written prompt as a system whose rows are the stages, and the examples that all of them asked.

    Args:
        folders: of stages of hard prompts.
        model: which of the models asked; the first where None.
        metric: ``accuracy`` or ``rouge1``.
        references: example -> right answers, of summaries.

    Raises:
        UserError: a damaged file, no such model, prompts or examples that not all stages have, failed answers.
    """
    import numpy as np

    seen: list[dict[str, dict[str, float]]] = []
    shots: dict[str, int] = {}
    for number, folder in enumerate(folders):
        field = f"hard.{number}"
        lines = list(_lines(Path(folder).expanduser() / "answers.jsonl", field))
        models = list(dict.fromkeys(line["model"] for line in lines))
        wanted = models[0] if model is None and models else model
        if wanted not in models:
            raise UserError("hard_model", wanted, f"was not asked in {folder}", nearest(str(wanted), models or ["-"]))
        table: dict[str, dict[str, float]] = {}
        for line in lines:
            if line["model"] != wanted:
                continue
            if line["kind"] == "failed":
                mend = "run that stage again: it asks for what is missing"
                raise UserError(field, folder, f"{line['id']} has no answer to {line['strategy']}", mend)
            table.setdefault(line["strategy"], {})[line["id"]] = _value(line, metric, references)
            shots[line["strategy"]] = len(line["shots"])
        seen.append(table)
    ids = sorted(next(iter(seen[0].values())))
    for number, table in enumerate(seen):
        other = [name for name in {*seen[0], *table} if set(table.get(name, ())) != set(ids)]
        if other:
            problem = f"{min(other)} was not asked the same examples as in {folders[0]}"
            raise UserError(f"hard.{number}", folders[number], problem, "give the stages the same fields but for seed")
    systems = [
        System(name, np.array([[table[name][i] for i in ids] for table in seen]), 0, shots[name]) for name in seen[0]
    ]
    return systems, ids


def _lines(path: Path, field: str) -> Any:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                place = f"{path} line {number}"
                raise UserError(field, place, f"not valid JSON ({error})", "run its stage again") from None


def _value(line: Mapping[str, Any], metric: str, references: Mapping[str, Sequence[str]]) -> float:
    if metric == "accuracy":
        return float(line["kind"] == "right")
    from pipelines.seq2seq.metrics import rouge

    right = references.get(line["id"], [line["right"]])
    return float(rouge([line["answer"] or ""], [right], (metric,))[metric][0])


def baseline_points(metrics: Mapping[str, float], metric: str) -> list[dict[str, Any]]:
    """What needs no model (``hard/NAME/METRIC``: a rule, the first sentence), as a stage of hard prompts measured it.

    Args:
        metrics: of that stage; those of models have one more part.
        metric: ``accuracy`` or ``rouge1``.
    """
    names = [key.split("/")[1] for key in metrics if key.count("/") == 2 and key.endswith(f"/{metric}")]
    points = []
    for name in names:
        value = metrics[f"hard/{name}/{metric}"]  # guessing has no interval
        low, high = (metrics.get(f"hard/{name}/{metric}_ci_{end}", value) for end in ("low", "high"))
        numbers = {"trained": 0, "examples": 0, "value": value, "low": low, "high": high, "seeds": []}
        points.append(numbers | {"kind": "baseline", "label": name})
    return points


def best_of(systems: Sequence[System]) -> System:
    """The system of the highest mean; the first of equals."""
    return max(systems, key=lambda system: system.values.mean())


def compare(config: CompareConfig) -> dict[str, float]:
    """Compare, and write ``comparison.json``: every point of the table and figure.

    Returns:
        Of the best written prompt and of every learnt one ``compare/best_hard/accuracy``, ``compare/NAME/accuracy`` (of
        summaries ``rouge1``) and, of groups of examples, ``…/accuracy_irregular``; of the learnt ones
        ``compare/NAME/accuracy_minus_best_hard``, paired on the examples, ``compare/NAME/accuracy_<n>`` and
        ``compare/NAME/accuracy_<n>_minus_best_hard`` where they were trained on fewer examples as well, and
        ``compare/NAME/trainable_parameters``; ``compare/best_hard/shots``, ``compare/examples``, ``compare/seeds``.
        The intervals resample both seeds and examples (``compare_math``).

    Raises:
        UserError: stages that measured different things, or damaged files.
    """
    from accelerate import PartialState

    tables = {name: _results(name, folder) for name, folder in config.learnt.items()}
    first = next(iter(tables))
    metric = tables[first]["metric"]
    for name, table in tables.items():
        if (table["task"], table["metric"]) != (tables[first]["task"], metric):
            problem = f"is of {table['task']}, {first} of {tables[first]['task']}"
            raise UserError(f"learnt.{name}", config.learnt[name], problem, "compare one task at a time")
    references = dict(zip(tables[first]["ids"], tables[first]["references"], strict=True))
    prompts, ids = hard_systems(config.hard, config.hard_model, metric, references)
    learnt = {name: learnt_systems(name, table, ids) for name, table in tables.items()}
    groups = dict(zip(tables[first]["ids"], tables[first]["groups"], strict=True))
    best = best_of(prompts)
    measured = read_stage(Path(config.hard[0]).expanduser()) or {}
    points = baseline_points(measured.get("metrics", {}), metric)
    metrics = {"compare/examples": float(len(ids)), "compare/seeds": float(len(config.hard))}
    metrics["compare/best_hard/shots"] = float(best.examples)
    for system in prompts:
        point = _point(config, BEST, system, None, metrics if system is best else {}, metric)
        points.append(point | {"kind": "hard", "label": system.name, "best": system is best})
    _of_groups(config, f"compare/{BEST}/{metric}", best, ids, groups, metrics)
    for name, systems in learnt.items():
        metrics[f"compare/{name}/trainable_parameters"] = float(systems[0].trained)
        for system in systems:
            point = _point(config, name, system, best, metrics, metric, whole=system is systems[0])
            points.append(point | {"kind": "learnt", "label": name, "whole": system is systems[0]})
        _of_groups(config, f"compare/{name}/{metric}", systems[0], ids, groups, metrics)
    if PartialState().is_main_process:
        about = {"metric": metric, "task": tables[first]["task"], "examples": len(ids), "best": best.name}
        write_json(Path(config.output_dir) / COMPARISON_FILE, about | {"points": points})
    PartialState().wait_for_everyone()
    return metrics


def _results(name: str, folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser() / RESULTS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"learnt.{name}", folder, f"its {RESULTS_FILE} cannot be read ({error})", "run it again"
        ) from None


def _point(
    config: CompareConfig,
    name: str,
    system: System,
    rival: System | None,
    metrics: dict[str, float],
    metric: str,
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """A point of the figure; its numbers are put into ``metrics`` as well."""
    from pipelines.prompting.compare_math import crossed_difference, crossed_interval

    interval = {"resamples": config.resamples, "seed": config.seed}
    key = f"compare/{name}/{metric}" + ("" if whole else f"_{system.examples}")
    found = crossed_interval(system.values, **interval)
    _put(metrics, key, found)
    point: dict[str, Any] = {
        "trained": system.trained,
        "examples": system.examples,
        "value": found[0],
        "low": found[1],
        "high": found[2],
        "seeds": [float(row.mean()) for row in system.values],
    }
    if rival is not None:
        gain = crossed_difference(system.values, rival.values, **interval)
        _put(metrics, f"{key}_minus_{BEST}", gain)
        point["gain"] = list(gain)
    return point


def _of_groups(
    config: CompareConfig,
    key: str,
    system: System,
    ids: Sequence[str],
    groups: Mapping[str, str],
    metrics: dict[str, float],
) -> None:
    from pipelines.prompting.compare_math import crossed_interval

    for group in sorted({groups[i] for i in ids} - {""}):
        mine = system.values[:, [groups[i] == group for i in ids]]
        _put(metrics, f"{key}_{group}", crossed_interval(mine, resamples=config.resamples, seed=config.seed))


def _put(metrics: dict[str, float], key: str, found: tuple[float, float, float]) -> None:
    metrics |= dict(zip((key, f"{key}_ci_low", f"{key}_ci_high"), found, strict=True))
