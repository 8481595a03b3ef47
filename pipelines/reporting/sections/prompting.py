"""Hard prompts: models and strategies with intervals, shots, wrong labels, the larger model, calibration, failures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import Estimate, Measure, estimate
from pipelines.reporting.page import Section, figure, figures, folded, heading, join, paragraph
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Cell, Table, html_table

KINDS = ("hard",)
PER_CENT = Measure("", "%", digits=1, scale=100.0)
POINTS = Measure("", digits=1)
COLUMNS = {
    "rouge1": ("ROUGE-1", POINTS),
    "rouge2": ("ROUGE-2", POINTS),
    "rougeL": ("ROUGE-L", POINTS),
    "accuracy": ("Right, %", PER_CENT),
    "accuracy_regular": ("Regular, %", PER_CENT),
    "accuracy_irregular": ("Irregular, %", PER_CENT),
    "valid_rate": ("Valid, %", PER_CENT),
    "plausible_rate": ("Valid but wrong, %", PER_CENT),
    "uninformative_rate": ("Empty or a line's end, %", PER_CENT),
    "invalid_rate": ("No answer in it, %", PER_CENT),
    "confidence_right": ("Confidence, right, %", PER_CENT),
    "confidence_wrong": ("Confidence, wrong, %", PER_CENT),
    "calibration_error": ("Calibration error, %", PER_CENT),
    "failed": ("Failed", Measure("", digits=0)),
}
FAULTS = ("uninformative_rate", "invalid_rate", "failed")
BASELINES = {"chance": "Chance", "spelling_rules": "The rules of spelling", "lead1": "The first sentence"}
LARGEST_CALIBRATIONS = 6
_MINUS = "_minus_"


def prompting(run: Run) -> Section | None:
    """Every stage of hard prompts that is finished; None when there are none."""
    stages = [stage for stage in run.of_kind(*KINDS) if stage.metrics and stage.json("trials.json")]
    if not stages:
        return None
    parts = []
    for stage in stages:
        trials = stage.json("trials.json")
        parts += [heading(stage.name)] if len(stages) > 1 else []
        parts.append(html_table(results(stage, trials), f"Answers of {stage.name}"))
        parts.append(figures([*_shots(stage, trials), *_differences(stage, trials), *_calibrations(stage, trials)]))
        parts += [_asked(trial) for trial in trials]
    lead = (
        "Small print: 95 % intervals, Wilson's for shares. Right and valid are shares of the questions that were "
        "answered; differences are paired, on the same questions."
    )
    return Section("prompting", "Hard prompts", join(parts), lead, frozenset(stage.name for stage in stages))


def interval_cell(metrics: Mapping[str, float], key: str, measure: Measure) -> Cell:
    """A value with its interval under it; a dash where there is none."""
    found = estimate(metrics, key)
    if found is None:
        return Cell("–")
    if found.low is None or found.high is None:
        return Cell(measure.number(found.value))
    return Cell(measure.number(found.value), f"{measure.number(found.low)}–{measure.number(found.high)}")


def results(stage: Stage, trials: Sequence[Mapping[str, Any]]) -> Table:
    """Baselines, then every model with every strategy; columns that nobody has are left out."""
    metrics = stage.metrics
    rows = [(label, f"hard/{name}") for name, label in BASELINES.items()]
    rows += [(f"{t['model']}: {t['strategy'].replace('_', ' ')}", f"hard/{t['model']}/{t['strategy']}") for t in trials]
    rows = [row for row in rows if any(key.startswith(f"{row[1]}/") for key in metrics)]
    measured = {column: [metrics.get(f"{prefix}/{column}") for _, prefix in rows] for column in COLUMNS}
    # What went wrong nowhere needs no column.
    columns = [
        column
        for column, values in measured.items()
        if (any(values) if column in FAULTS else any(value is not None for value in values))
    ]
    body = [
        [Cell(label), *[interval_cell(metrics, f"{prefix}/{column}", COLUMNS[column][1]) for column in columns]]
        for label, prefix in rows
    ]
    return Table(["Model: strategy", *[COLUMNS[column][0] for column in columns]], body)


def _metric(stage: Stage) -> str:
    return "rouge1" if any(key.endswith("/rouge1") for key in stage.metrics) else "accuracy"


def _shots(stage: Stage, trials: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Quality against the number of solved examples, for strategies that were tried with several."""
    metric = _metric(stage)
    measure = COLUMNS[metric][1]
    found: dict[str, list[tuple[int, Estimate]]] = {}
    for trial in trials:
        value = estimate(stage.metrics, f"hard/{trial['model']}/{trial['strategy']}/{metric}")
        family = re.sub(rf"_{trial['shots']}(?=$|_likelihood$)", "", trial["strategy"])
        if value is not None and value.low is not None and value.high is not None and family != trial["strategy"]:
            found.setdefault(f"{trial['model']}: {family.replace('_', ' ')}", []).append((trial["shots"], value))
    names = [name for name, points in found.items() if len(points) > 1]
    if not names:
        return []
    series = []
    for number, name in enumerate(names):
        points = sorted(found[name], key=lambda point: point[0])
        # Side by side, so that the bars of two strategies do not hide one another.
        x = [shots + 0.08 * (number - (len(names) - 1) / 2) for shots, _ in points]
        y = [value.value * measure.scale for _, value in points]
        bars = [(value.low * measure.scale, value.high * measure.scale) for _, value in points]
        series.append(Series(str(number + 1), x, y, colour=number, bars=bars))
    panels = [Panel(series, f"{COLUMNS[metric][0]}", zero=True)]
    svg = plots.lines(f"shots-{anchor(stage.name)}", panels, "solved examples in the prompt", "; ".join(names))
    listed = "; ".join(f"{number}. {name}" for number, name in enumerate(names, 1))
    return [figure(svg, f"Bars: 95 %. {listed}.", "Shots")]


def _differences(stage: Stage, trials: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Wrong labels against right ones, and each model against the first one."""
    metric = _metric(stage)
    scale = COLUMNS[metric][1].scale
    models = list(dict.fromkeys(trial["model"] for trial in trials))
    groups: dict[str, list[tuple[str, Estimate, bool]]] = {"Wrong labels": [], f"Against {models[0]}": []}
    for trial in trials:
        prefix = f"hard/{trial['model']}/{trial['strategy']}/{metric}{_MINUS}"
        title = f"{trial['model']}: {trial['strategy'].replace('_', ' ')}"
        for group, other in zip(groups, (trial["twin"], models[0]), strict=True):
            found = estimate(stage.metrics, f"{prefix}{other}")
            if found is not None:
                low, high = (None if end is None else end * scale for end in (found.low, found.high))
                groups[group].append((title, Estimate(found.value * scale, low, high), True))
    drawn = []
    unit = "points" if metric == "rouge1" else "percentage points"
    captions = (
        "Solved examples with wrong answers against the same ones with right answers: left of the line, they harm.",
        f"The same questions, each model against {models[0]}: right of the line, it does better.",
    )
    for (title, rows), caption in zip(groups.items(), captions, strict=True):
        if rows:
            name = f"{anchor(title)}-{anchor(stage.name)}"
            label = f"difference in {COLUMNS[metric][0].removesuffix(', %').lower()} ({unit})"
            drawn.append(figure(plots.forest(name, rows, label, caption, reference=0.0), caption, title))
    return drawn


def _calibrations(stage: Stage, trials: Sequence[Mapping[str, Any]]) -> list[Markup]:
    drawn = []
    for trial in [t for t in trials if t["curve"]][:LARGEST_CALIBRATIONS]:
        title = f"{trial['model']}: {trial['strategy'].replace('_', ' ')}"
        shown = "; ".join(f"{b['predicted']:.2f}: {b['observed']:.2f}" for b in trial["curve"])
        name = f"sure-{anchor(stage.name)}-{anchor(trial['model'])}-{anchor(trial['strategy'])}"
        alt = f"Confidence against the share that is right: {shown}"
        svg = plots.calibration(name, trial["curve"], alt, of="answer")
        caption = (
            "On the dashed line confidence is honest; below it, too high. Larger dots: more questions; bars: 95 %."
        )
        drawn.append(figure(svg, caption, title))
    return drawn


def _asked(trial: Mapping[str, Any]) -> Markup:
    """One prompt as it was, what came, and wrong answers."""
    body = [Markup("<pre>{}<b>{}</b></pre>").format(trial["prompt"], trial["answer"])]
    if trial["failures"]:
        rows = [[f["input"], f["answer"] or "(empty)", f["right"], f["kind"]] for f in trial["failures"]]
        body += [paragraph("Wrong answers, the first ones:", "note")]
        body.append(html_table(Table(["Asked", "Answered", "Right", "Kind"], rows, numeric=False), "Wrong answers"))
    return folded(f"{trial['model']}: {trial['strategy'].replace('_', ' ')}", join(body), "a prompt as it was asked")
