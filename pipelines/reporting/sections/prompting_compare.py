"""The best written prompt against soft prompts, LoRA and full fine-tuning: one table, and one figure of two panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes

from pipelines.reporting import plots
from pipelines.reporting.metrics import Measure
from pipelines.reporting.page import Section, figure, heading, join
from pipelines.reporting.run import Run, anchor
from pipelines.reporting.sections.prompting import BASELINES
from pipelines.reporting.tables import Cell, Table, html_table

KINDS = ("compare",)
CHOSEN = "The best written prompt was chosen on these very examples, in its favour."
_MARKERS = "osD"
_SHOWN = {
    "accuracy": ("Right, %", Measure("", digits=1, scale=100.0), Measure("", digits=1, scale=100.0, signed=True)),
    "rouge1": ("ROUGE-1", Measure("", digits=1), Measure("", digits=1, signed=True)),
}

Point = Mapping[str, Any]


def prompting_compare(run: Run) -> Section | None:
    """The table and figure of every comparison; None when there are none."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        comparison = stage.json("comparison.json")
        if comparison:
            parts += [heading(stage.name)] if len(run.of_kind(*KINDS)) > 1 else []
            parts += [html_table(compared(comparison), f"Comparison of {stage.name}"), _figure(stage.name, comparison)]
            shown.add(stage.name)
    if not parts:
        return None
    lead = (
        f"On the same held-out examples. {CHOSEN} "
        "Small print: 95 % intervals over seeds and examples; the seeds' own means beside them."
    )
    return Section("prompting-compare", "Written and learnt prompts", join(parts), lead, frozenset(shown))


def compared(comparison: Mapping[str, Any]) -> Table:
    """What needs no model, written prompts in the order they were asked, what was learnt, on most examples first."""
    label, measure, difference = _SHOWN[comparison["metric"]]
    rows = []
    for point in comparison["points"]:
        trivial = point["kind"] == "baseline"
        name = BASELINES.get(point["label"], point["label"]) if trivial else point["label"].replace("_", " ")
        seeds = ", ".join(measure.number(value) for value in point["seeds"]) or "–"
        gain = point.get("gain")
        rows.append(
            [
                Cell(name + (" (the best)" if point.get("best") else "")),
                Cell(f"{point['trained']:,}" if point["kind"] == "learnt" else "–"),
                Cell("–" if trivial else f"{point['examples']:,}"),
                Cell(
                    measure.number(point["value"]),
                    _ends(measure, point["low"], point["high"]) if point["low"] < point["high"] else "",
                ),
                Cell("–") if gain is None else Cell(difference.number(gain[0]), _ends(difference, *gain[1:])),
                Cell(seeds),
            ]
        )
    columns = ["System", "Trained parameters", "Examples", label, "Against the best prompt", "Each seed"]
    return Table(columns, rows)


def _ends(measure: Measure, low: float, high: float) -> str:
    ends = measure.number(low), measure.number(high)
    return " to ".join(ends) if low < 0 or measure.signed else "–".join(ends)


def _figure(name: str, comparison: Mapping[str, Any]) -> Markup:
    """Quality against trained parameters, and against examples (shots of written prompts); both on log scales."""
    label, measure, _ = _SHOWN[comparison["metric"]]
    hard = [point for point in comparison["points"] if point["kind"] == "hard"]
    best = next(point for point in hard if point["best"])
    learnt: dict[str, list[Point]] = {}
    for point in comparison["points"]:
        if point["kind"] == "learnt":
            learnt.setdefault(point["label"], []).append(point)
    with matplotlib.rc_context(plots.STYLE):
        drawn, (first, second) = plots.new_figure(2, height=5.4)
        for axis in (first, second):
            axis.axhline(best["value"] * measure.scale, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axis.set_xscale("log")
            axis.set_ylabel(label)
            axis.margins(x=0.06)
        prompts = sorted((p for p in hard if p["examples"]), key=lambda p: p["examples"])
        _draw(second, prompts, "examples", measure.scale, (plots.MUTED, "o"), "written")
        for number, (system, points) in enumerate(learnt.items()):
            # Where the colours begin anew, another marker tells the systems apart.
            style = plots.SERIES[number % len(plots.SERIES)], _MARKERS[number // len(plots.SERIES) % len(_MARKERS)]
            whole = [point for point in points if point["whole"]]
            _draw(first, whole, "trained", measure.scale, style, system.replace("_", " "))
            ordered = sorted(points, key=lambda point: point["examples"])
            _draw(second, ordered, "examples", measure.scale, style, "")
        first.set_xlabel("trained parameters")
        second.set_xlabel("examples: shots of a written prompt, or training examples")
        for axis in (first, second):
            axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.4)
        alt = "; ".join(_told(system, points[0], measure) for system, points in learnt.items())
        alt = f"{_told('best written prompt', best, measure)}; {alt}"
        svg = plots.svg(drawn, f"compare-{anchor(name)}", alt)
    caption = (
        f"Dashed: the best written prompt ({best['label'].replace('_', ' ')}). Bars: 95 %, over seeds and examples."
    )
    return figure(svg, caption, "Quality against trained parameters and examples")


def _told(name: str, point: Point, measure: Measure) -> str:
    return f"{name.replace('_', ' ')} {measure.number(point['value'])}"


def _draw(axis: Axes, points: Sequence[Point], across: str, scale: float, style: tuple[str, str], label: str) -> None:
    colour, marker = style
    for point in points:
        axis.plot([point[across]] * 2, [point["low"] * scale, point["high"] * scale], color=colour, linewidth=1.2)
    x, y = [point[across] for point in points], [point["value"] * scale for point in points]
    axis.plot(x, y, color=colour, marker=marker, markersize=4, label=label or None)
