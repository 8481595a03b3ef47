"""What is kept of finished runs under docs/results, and the Markdown that a document shows of it.

There are five kinds: metrics of summarization systems (the flat ``metrics.json`` of a run), those of several runs (one
a seed), a comparison of written and learnt prompts (the stage's ``comparison.json``), runs of image models (one a
seed), and an exercise of the problem set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.reporting.metrics import (
    ERROR,
    HIGH,
    LOW,
    check_metrics,
    format_mean,
    is_interval_key,
    read_json,
    read_metrics,
)
from pipelines.reporting.run import Run, Stage, read_run
from pipelines.reporting.sections.images import MEASURES, REAL, explained
from pipelines.reporting.sections.images_training import BOUNDS
from pipelines.reporting.sections.images_training import KINDS as IMAGE_STAGES
from pipelines.reporting.sections.problems import EXERCISE, exercise_table
from pipelines.reporting.sections.prompting_compare import CHOSEN, compared
from pipelines.reporting.tables import (
    BASELINES,
    README_MEASURES,
    Cell,
    Table,
    markdown_table,
    results_table,
    system_label,
    systems_in,
    systems_table,
)

SEEDS, COMPARISON, PAGE = "runs", "points", "page"
"""The key by which the content of each kind is told; metrics of one run of summarization systems have none of them."""

HEADLINES = {
    "continual_learning": ("methods", "long"),
    "early_exit_network": ("networks", "times"),
    "zeroth_order": ("methods",),
}
"""Exercise -> which of its tables are kept; of others all of them."""

_COUNTS = {"train_images": "training images", "test_images": "test images", "seeds": "seeds"}
_SAMPLES = tuple(measure for measure in MEASURES if measure != "bound")
_OF_VAES = ("negative_elbo", "kl", "reconstruction")
_COUNTED = ("parameters", "steps")
_PLACES = 6
_BOUNDS_AND_TIME = ("bound", *_OF_VAES, *_COUNTED, "train_runtime", "train_cpu_runtime", "seconds_a_sample")


def opened(folder: Path) -> Run:
    """A run's folder, or that of an exercise which was run by itself, as a run of one stage.

    Raises:
        UserError: if it is neither, or one of its files is damaged.
    """
    exercise = read_json(folder / EXERCISE) if (folder / EXERCISE).is_file() else None
    if not isinstance(exercise, dict):
        return read_run(folder)
    record = read_json(folder / "stage.json")
    if not isinstance(record, dict):
        raise UserError("file", str(folder / "stage.json"), "not a JSON object", "run its stage again")
    stage = Stage(exercise[PAGE], folder, record)
    return Run(folder, stage.name, exercise["title"], "", record.get("seed"), (stage,), stage.metrics)


def kept(runs: Sequence[Run]) -> dict[str, Any]:
    """What a table needs of one run, or of several of one kind; the kind is found by the stages that they have.

    Args:
        runs: at least one; several are of image models or of summarization systems, one a seed.

    Raises:
        UserError: if they hold no results, are several of another kind, or differ in more than the seed.
    """
    measured = [_the(run, "measure", "settings.json") for run in runs]
    if all(measured):
        return {"settings": measured[0].json("settings.json"), SEEDS: _seeds(runs, measured, _image_metrics)}
    if len(runs) > 1:
        evaluated = [_the(run, "evaluate", "settings.json") for run in runs]
        if all(evaluated):
            return {SEEDS: _seeds(runs, evaluated, lambda run, _: run.metrics)}
        what, found = ("image models", measured) if any(measured) else ("summaries", evaluated)
        without = next(run for run, stage in zip(runs, found, strict=True) if stage is None)
        mend = "give one run, or several finished ones of image models or of summaries, one a seed"
        raise UserError("--run", str(without.folder), f"has measured no {what}", mend)
    (run,) = runs
    if (run.folder / EXERCISE).is_file():
        return _kept_exercise(run)
    comparison = _the(run, "compare", "comparison.json")
    return comparison.json("comparison.json") if comparison else read_metrics(run.folder / "metrics.json")


def _the(run: Run, kind: str, file: str) -> Stage | None:
    """The one finished stage of a kind that left a file; None where there is none."""
    found = [stage for stage in run.of_kind(kind) if stage.finished and (stage.folder / file).is_file()]
    if len(found) > 1:
        names = " and ".join(stage.name for stage in found)
        raise UserError("--run", str(run.folder), f"holds {names}, two of a kind", "give a run with one of them")
    return found[0] if found else None


def _seeds(
    runs: Sequence[Run], measured: Sequence[Stage], metrics_of: Callable[[Run, Stage], Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The seed and metrics of each run, which must be alike in all else."""
    found = []
    for number, (run, stage) in enumerate(zip(runs, measured, strict=True)):
        _check_alike(runs[0], run)
        if any(stage.record.get("fingerprint") == other.record.get("fingerprint") for other in measured[:number]):
            raise UserError("--run", str(run.folder), "is the same as another one", "give runs of different seeds")
        found.append({"seed": stage.record.get("seed"), "metrics": metrics_of(run, stage)})
    return found


def _image_metrics(run: Run, stage: Stage) -> dict[str, float]:
    metrics = {key: value for key, value in run.metrics.items() if not is_interval_key(key)}
    for trained in run.of_kind(*IMAGE_STAGES):
        if timing := trained.json("timing.json"):
            metrics |= {f"{trained.name}/{name}": value for name, value in timing[-1].items() if name != "step"}
            metrics |= _while_training(trained, timing)
    seconds = (stage.json("timing.json") or {}).get("seconds_a_sample", {})
    return metrics | {f"{name}/seconds_a_sample": value for name, value in seconds.items()}


def _while_training(trained: Stage, timing: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The bound as it was measured on the way, and the processor's seconds until then: ``NAME/MEASURE@STEP``."""
    seconds = {entry["step"]: entry["train_cpu_runtime"] for entry in timing if "train_cpu_runtime" in entry}
    found = {}
    for name in BOUNDS:
        for step, value in zip(*trained.curve(f"eval_{name}"), strict=True):
            if step in seconds:
                found[f"{trained.name}/eval_{name}@{step:.0f}"] = value
                found[f"{trained.name}/train_cpu_runtime@{step:.0f}"] = seconds[step]
    return found


def _check_alike(first: Run, run: Run) -> None:
    """Refuse a run whose stages have other values than those of the first, seeds and folders apart."""
    where, mend = str(run.folder), f"give runs that differ from {first.folder} in the seed alone"
    if first.order != run.order:
        raise UserError("--run", where, f"has the stages {', '.join(run.order)}", mend)
    for one, other in zip(first.stages, run.stages, strict=True):
        for name in sorted({*one.config, *other.config} - {"seed", "output_dir"}):
            if _within(one, name) != _within(other, name):
                raise UserError("--run", where, f"{one.name}.{name} is {other.config.get(name)} in it", mend)


def _within(stage: Stage, name: str) -> str:
    """A field's value; of what lies in the run's own folder the place in it."""
    own = str(Path(stage.config.get("output_dir", stage.folder)).parent)
    return json.dumps(stage.config.get(name)).replace(json.dumps(own)[1:-1], "")


def _kept_exercise(run: Run) -> dict[str, Any]:
    found = read_json(run.folder / EXERCISE)
    tables = {name: found["tables"][name] for name in HEADLINES.get(found[PAGE], found["tables"])}
    return {PAGE: found[PAGE], "values": found["values"], "metrics": run.metrics, "tables": tables}


def read_kept(path: Path) -> dict[str, Any]:
    """The content of a file that ``kept`` was written to.

    Raises:
        UserError: if it is missing, damaged or not a JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("results", str(path), "not a JSON object", "give the file that was written with --run")
    return content


def results_block(content: Mapping[str, Any], reference: str = "sft") -> str:
    """The Markdown of what was kept: its tables, and what their numbers are.

    Args:
        content: as ``kept`` gives it.
        reference: the summarization system that the others' win rate and KL are measured against.

    Raises:
        UserError: if nothing in it was measured.
    """
    if SEEDS in content:
        return _images(content) if "settings" in content else _summaries_by_seed(content, reference)
    for key, block in ((COMPARISON, _comparison), (PAGE, _exercise)):
        if key in content:
            return block(content)
    return _summaries(check_metrics(content, "metrics"), reference)


def _summaries(metrics: Mapping[str, float], reference: str) -> str:
    table = results_table(metrics, measures=README_MEASURES)
    if table is None:
        raise UserError(
            "metrics",
            f"{len(metrics)} keys",
            "no system was evaluated",
            "give the metrics.json of a run with its evaluation",
        )
    lines = [markdown_table(table)]
    if "reward/accuracy" in metrics:
        lines.append(f"Reward-model accuracy on held-out policy pairs: {format_mean(metrics, 'reward/accuracy')}.\n")
    return "\n".join([*lines, _explained(metrics, reference)])


def _explained(metrics: Mapping[str, float], reference: str) -> str:
    base = system_label(reference)
    text = (
        "In brackets: 95 % bootstrap intervals. Gold win rate: share of documents on which the judge (which sees the\n"
    )
    text += f"reference) prefers the system to {base}, a tie counting half."
    has_kl = any(key.endswith("/kl") for key in metrics)
    return text + (f" KL: from {base}, over whole sequences.\n" if has_kl else "\n")


def _summaries_by_seed(content: Mapping[str, Any], reference: str) -> str:
    """Every system of every seed, the trivial baselines apart, and each seed's reward model."""
    merged, names = {}, []
    for system in systems_in(content[SEEDS][0]["metrics"]):
        if system in BASELINES:
            continue
        for run in content[SEEDS]:
            names.append(f"{system_label(system)}, seed {run['seed']}")
            for measure in README_MEASURES:
                for end in ("", LOW, HIGH):
                    if (value := run["metrics"].get(f"{system}/{measure}{end}")) is not None:
                        merged[f"{names[-1]}/{measure}{end}"] = value
    table = systems_table(merged, names, README_MEASURES)
    if table is None:
        raise UserError("metrics", f"{len(content[SEEDS])} runs", "no system was evaluated", "give finished runs")
    lines = [markdown_table(table)]
    if "reward/accuracy" in content[SEEDS][0]["metrics"]:
        accuracy = ", ".join(format_mean(run["metrics"], "reward/accuracy") for run in content[SEEDS])
        lines.append(f"Reward-model accuracy on held-out policy pairs, seed by seed: {accuracy}.\n")
    return "\n".join([*lines, _explained(merged, reference)])


def _comparison(content: Mapping[str, Any]) -> str:
    text = (
        f"All on the same {content['examples']:,} held-out examples. {CHOSEN}\nIn brackets: 95 % bootstrap "
        "intervals that resample seeds and examples; a difference is paired on the examples.\n"
    )
    return "\n".join([markdown_table(compared(content)), text])


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what all runs measured, each with its standard error under ``KEY_se`` where there are several runs.

    Args:
        runs: the flat metrics of each.

    Returns:
        The standard error is s/√n, with s² the unbiased variance over the n runs.
    """
    count, found = len(runs), {}
    for key in sorted(set.intersection(*(set(run) for run in runs))):
        values = [run[key] for run in runs]
        found[key] = mean = sum(values) / count
        if count > 1:
            found[key + ERROR] = (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return found


def _images(content: Mapping[str, Any]) -> str:
    families, runs = content["settings"]["families"], content[SEEDS]
    metrics = over_seeds([run["metrics"] for run in runs])
    systems = [*families, *([REAL] if f"{REAL}/precision" in metrics else [])]
    drawn = systems_table(metrics, systems, _SAMPLES)
    # Bit-flip diffusion has a reconstruction term too: that of its first stage alone, which is no VAE's.
    others = {f"{name}/{measure}" for name, family in families.items() if family != "vae" for measure in _OF_VAES}
    others |= {f"{name}/{measure}{ERROR}" for name in families for measure in _COUNTED}
    rest = {key: value for key, value in metrics.items() if key not in others}
    told = systems_table(rest, list(families), _BOUNDS_AND_TIME)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    several = f"Means over {len(runs)} seeds ({seeds}), ± standard error over the seeds."
    texts = [
        several if len(runs) > 1 else f"One seed ({seeds}): how much another would change is not known.",
        *explained(content["settings"], metrics.get("measure/test_examples", 0)),
        "Training: without measuring and drawing; by the clock on the wall, and the processor's time of all threads.",
    ]
    tables = [table for table in (drawn, told, _curves(metrics, list(families))) if table]
    return "\n".join([*map(markdown_table, tables), " ".join(texts) + "\n"])


def _curves(metrics: Mapping[str, float], systems: Sequence[str]) -> Table | None:
    """Bounds against the processor's minutes, at some of the places where they were measured; None without any."""
    rows = []
    for system in systems:
        found = {bound: _steps(metrics, f"{system}/eval_{bound}@") for bound in BOUNDS}
        bound = next((bound for bound, steps in found.items() if steps), None)
        if bound is None:
            continue
        prefix, steps = f"{system}/eval_{bound}@", found[bound]
        places = sorted({round(place * (len(steps) - 1) / (_PLACES - 1)) for place in range(_PLACES)})
        minutes = (metrics[f"{system}/train_cpu_runtime@{steps[place]}"] / 60 for place in places)
        values = (metrics[f"{prefix}{steps[place]}"] for place in places)
        shown = "; ".join(f"{value:.1f} after {time:.1f}" for value, time in zip(values, minutes, strict=True))
        rows.append([Cell(system_label(system)), Cell(shown)])
    heads = ["System", "While training: bound in nats on held-out images, after minutes of a CPU"]
    return Table(heads, rows, numeric=False) if rows else None


def _steps(metrics: Mapping[str, float], prefix: str) -> list[int]:
    return sorted(int(key.removeprefix(prefix)) for key in metrics if key.startswith(prefix) and key[-1].isdigit())


def _exercise(content: Mapping[str, Any]) -> str:
    values, metrics, page = content["values"], content["metrics"], content[PAGE]
    lines = []
    for entry in content["tables"].values():
        lines.append(markdown_table(exercise_table(entry)))
        lines += [entry["caption"] + "\n"] if entry["caption"] else []
    counted = {what: values[key] for key, what in _COUNTS.items() if key in values}
    counts = ", ".join(f"{count:,} {what.removesuffix('s') if count == 1 else what}" for what, count in counted.items())
    texts = [f"{counts}."] if counts else []
    if "seeds" in values:
        one = "With one seed how much another would change is not known."
        texts.append("In brackets: Student's 95 % intervals over the seeds." if values["seeds"] > 1 else one)
    failed, checks = (int(metrics[f"{page}/{name}"]) for name in ("checks_failed", "checks"))
    texts.append(f"{failed} of {checks} checked statements do not hold." if failed else f"All {checks} checks hold.")
    return "\n".join([*lines, " ".join(texts) + "\n"])
