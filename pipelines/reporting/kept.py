"""What is kept of finished runs under docs/results, and the Markdown that a document shows of it.

There are six kinds: metrics of summarization systems (the flat ``metrics.json`` of a run), those of several runs (one a
seed), a comparison of written and learnt prompts (the stage's ``comparison.json``), runs of image models (one a seed),
a sweep of autoencoders that blur, and an exercise of the problem set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.reporting.alike import check_measured, check_stages, configurations, judge
from pipelines.reporting.kept_images import WITHOUT_CLOCK, image_metrics, images_block
from pipelines.reporting.metrics import HIGH, LOW, check_metrics, format_mean, read_json, read_metrics
from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.problems import EXERCISE, exercise_table
from pipelines.reporting.sections.prompting_compare import CHOSEN, compared
from pipelines.reporting.sections.vae_blur import ALT, DRAWN, PICTURE, SHARPNESS, explained, sweep_table
from pipelines.reporting.sections.vae_blur import SWEEP as SWEEP_FILE
from pipelines.reporting.tables import (
    BASELINES,
    README_MEASURES,
    markdown_table,
    results_table,
    system_label,
    systems_in,
    systems_table,
)

SEEDS, COMPARISON, PAGE, SWEEP = "runs", "points", "page", "sweep"
"""The key by which the content of each kind is told; metrics of one run of summarization systems have none of them."""

STAGES, WITHOUT_STAGES = "stages", "without_stages"
"""Of runs one a seed: the fields of their stages, and the seeds whose fields were not kept."""

HEADLINES = {
    "continual_learning": ("methods", "long"),
    "early_exit_network": ("networks", "times"),
    "zeroth_order": ("methods",),
}
"""Exercise -> which of its tables are kept; of others all of them."""

_COUNTS = {"train_images": "training images", "test_images": "test images", "seeds": "seeds"}


def kept(runs: Sequence[Run]) -> dict[str, Any]:
    """What a table needs of one run, or of several of one kind; the kind is found by the stages that they have.

    Args:
        runs: at least one; several are of image models or of summarization systems, one a seed.

    Raises:
        UserError: if they hold no results, are several of another kind, or differ in more than the seed.
    """
    if len(runs) > 1 or _the(runs[0], "measure", "settings.json"):
        return _one_a_seed(runs)
    (run,) = runs
    if (run.folder / EXERCISE).is_file():
        return _kept_exercise(run)
    if swept := _the(run, "vae_blur", SWEEP_FILE):
        return _kept_sweep(swept)
    comparison = _the(run, "compare", "comparison.json")
    return comparison.json("comparison.json") if comparison else read_metrics(run.folder / "metrics.json")


def _one_a_seed(runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept of runs of image models or of summarization systems, of which there may be several."""
    measured = [_the(run, "measure", "settings.json") for run in runs]
    if all(measured):
        settings = measured[0].json("settings.json")
        drawn = [name for name in settings["families"] if (measured[0].folder / f"{name}.png").is_file()]
        pictures = {"seed": measured[0].record.get("seed"), "systems": drawn}
        return {"settings": settings, "pictures": pictures, **_by_seed(runs, measured, image_metrics)}
    evaluated = [_the(run, "evaluate", "settings.json") for run in runs]
    if all(evaluated):
        return _by_seed(runs, evaluated, lambda run, _: run.metrics)
    what, found = ("image models", measured) if any(measured) else ("summaries", evaluated)
    without = next(run for run, stage in zip(runs, found, strict=True) if stage is None)
    mend = "give one run, or several finished ones of image models or of summaries, one a seed"
    raise UserError("--run", str(without.folder), f"has measured no {what}", mend)


def _the(run: Run, kind: str, file: str) -> Stage | None:
    """The one finished stage of a kind that left a file; None where there is none."""
    found = [stage for stage in run.of_kind(kind) if stage.finished and (stage.folder / file).is_file()]
    if len(found) > 1:
        names = " and ".join(stage.name for stage in found)
        raise UserError("--run", str(run.folder), f"holds {names}, two of a kind", "give a run with one of them")
    return found[0] if found else None


def _by_seed(
    runs: Sequence[Run], measured: Sequence[Stage], metrics_of: Callable[[Run, Stage], Mapping[str, float]]
) -> dict[str, Any]:
    """The stages' fields, which all runs must share, and the seed and metrics of each."""
    found: dict[str, Any] = {STAGES: configurations(runs[0]), SEEDS: []}
    for run, stage in zip(runs, measured, strict=True):
        entry = {"seed": stage.record.get("seed"), "metrics": metrics_of(run, stage)}
        if run is not runs[0]:
            _check_run(found, configurations(run), entry, str(run.folder), str(runs[0].folder))
        found[SEEDS].append(entry)
    return found


def _check_run(
    content: Mapping[str, Any], stages: Mapping[str, Any], entry: Mapping[str, Any], where: str, than: str
) -> None:
    """Refuse a run that differs in more than the seed from those kept, as far as the content can tell."""
    if STAGES in content:
        check_stages(content[STAGES], stages, where, than)
    first = content[SEEDS][0]["metrics"]
    if any(key.startswith("measure/") for key in first):
        check_measured(first, entry["metrics"], judge(stages), where, than)
    if entry["seed"] in [other["seed"] for other in content[SEEDS]]:
        problem = f"is another run of the seed {entry['seed']}, which {than} has"
        raise UserError("--run", where, problem, "give runs of different seeds")


def added(content: Mapping[str, Any], runs: Sequence[Run], than: str, *, clock: bool = True) -> dict[str, Any]:
    """What a file keeps together with further runs, one a seed, that differ from those it keeps in the seed alone.

    Args:
        content: of the file. One that was written before the stages' fields were kept is compared by what it has:
            settings, counts, and the measures of the classifier. ``WITHOUT_STAGES`` then names its seeds.
        runs: the further ones; pictures of samples are the first one's, where the file has none.
        than: what the file is called.
        clock: whether what the clock measured of the further ones counts.

    Raises:
        UserError: if the file keeps none of several, or the runs are not like those it keeps.
    """
    if SEEDS not in content:
        raise UserError("--add", than, "keeps one run, not one a seed", "leave out --add and give every run by --run")
    new = _one_a_seed(runs)
    if ("settings" in new) != ("settings" in content):
        kind = "image models" if "settings" in content else "summaries"
        raise UserError("--run", str(runs[0].folder), f"has not what {than} keeps", f"give finished runs of {kind}")
    for name in sorted({*content.get("settings", {})} & {*new.get("settings", {})}):
        if content["settings"][name] != new["settings"][name]:
            problem = f"{name} is {new['settings'][name]} in it, not {content['settings'][name]}"
            mend = f"give runs that differ from those of {than} in the seed alone"
            raise UserError("--run", str(runs[0].folder), problem, mend)
    found = {**new, **content, STAGES: content.get(STAGES, new[STAGES]), SEEDS: list(content[SEEDS])}
    if STAGES not in content:
        found[WITHOUT_STAGES] = [entry["seed"] for entry in content[SEEDS]]
    for run, entry in zip(runs, new[SEEDS], strict=True):
        _check_run({**content, SEEDS: found[SEEDS]}, new[STAGES], entry, str(run.folder), than)
        found[SEEDS].append(entry)
    if not clock:
        found[WITHOUT_CLOCK] = [*content.get(WITHOUT_CLOCK, []), *(entry["seed"] for entry in new[SEEDS])]
    order = ("settings", "pictures", STAGES, WITHOUT_STAGES, WITHOUT_CLOCK, SEEDS)
    return {name: found[name] for name in order if name in found}


def _kept_exercise(run: Run) -> dict[str, Any]:
    found = read_json(run.folder / EXERCISE)
    tables = {name: found["tables"][name] for name in HEADLINES.get(found[PAGE], found["tables"])}
    return {PAGE: found[PAGE], "values": found["values"], "metrics": run.metrics, "tables": tables}


def _kept_sweep(stage: Stage) -> dict[str, Any]:
    """The sweep, and the fields that its autoencoders share."""
    told = ("dataset", "binarize", "max_steps", "epochs", "variance", "seed")
    settings = {name: stage.config[name] for name in told if name in stage.config}
    settings |= {"dataset": Path(settings["dataset"]).name} if "dataset" in settings else {}  # not where it lies
    files = [name for name in (PICTURE,) if (stage.folder / name).is_file()]
    return {SWEEP: stage.json(SWEEP_FILE), "fields": settings, "pictures": {"files": [SHARPNESS, *files]}}


def read_kept(path: Path) -> dict[str, Any]:
    """The content of a file that ``kept`` was written to.

    Raises:
        UserError: if it is missing, damaged or not a JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("results", str(path), "not a JSON object", "give the file that was written with --run")
    return content


def results_block(content: Mapping[str, Any], reference: str = "sft", folder: str = "") -> str:
    """The Markdown of what was kept: its tables, and what their numbers are.

    Args:
        content: as ``kept`` gives it.
        reference: the summarization system that the others' win rate and KL are measured against.
        folder: where its pictures lie, as seen from the document.

    Raises:
        UserError: if nothing in it was measured.
    """
    if SEEDS in content:
        return images_block(content, folder) if "settings" in content else _summaries_by_seed(content, reference)
    if SWEEP in content:
        return _sweep(content, folder)
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


def _sweep(content: Mapping[str, Any], folder: str) -> str:
    texts = " ".join(explained(content["fields"], content[SWEEP]))
    lines = [markdown_table(sweep_table(content[SWEEP])), f"{texts}\n", f"![{ALT}]({folder}/{SHARPNESS})\n"]
    if PICTURE in content["pictures"]["files"]:
        lines += [f"![Reconstructions of each autoencoder]({folder}/{PICTURE})\n", f"{DRAWN}\n"]
    return "\n".join(lines)


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
