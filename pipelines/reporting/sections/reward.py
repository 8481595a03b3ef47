"""The reward model: how often it ranks held-out pairs right, and whether its confidence can be believed."""

from __future__ import annotations

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import format_mean, is_interval_key, measure_of
from pipelines.reporting.page import Section, figure, figures, heading, join
from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.curves import curves_of
from pipelines.reporting.tables import Cell, Table, html_table

KINDS = ("reward",)


def reward_model(run: Run) -> Section | None:
    """Accuracy, calibration and learning curves of every reward-model stage that has begun."""
    stages = [s for s in run.of_kind(*KINDS) if s.metrics or s.history or s.json("calibration.json")]
    parts = []
    for stage in stages:
        if len(stages) > 1:
            parts.append(heading(stage.name))
        if stage.metrics:
            keys = [k for k in stage.metrics if not is_interval_key(k)]
            rows = [[Cell(measure_of(k).label), Cell(format_mean(stage.metrics, k))] for k in sorted(keys)]
            parts.append(html_table(Table(["On held-out pairs", "Value (95 % interval)"], rows), "Reward model"))
        parts.append(figures([*_calibration(stage), *curves_of(stage)]))
    if not parts:
        return None
    lead = "Pairs of policy samples, ranked by the gold judge. A model that guesses is right on 50 % of them."
    return Section("reward", "Reward model", join(parts), lead, frozenset(s.name for s in stages))


def _calibration(stage: Stage) -> list[Markup]:
    bins = stage.json("calibration.json")
    if not bins:
        return []
    alt = "Predicted against observed: " + "; ".join(f"{b['predicted']:.2f}: {b['observed']:.2f}" for b in bins)
    svg = plots.calibration(f"calibration-{stage.name}", bins, alt)
    caption = "On the dashed line the confidence is honest; below it, too high. Larger dots: more pairs; bars: 95 %."
    return [figure(svg, caption, "Calibration")]
