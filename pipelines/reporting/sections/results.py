"""The results: every system with its intervals, the generation settings beside them, and the same as a figure."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import Estimate, estimate, measure_of
from pipelines.reporting.page import Section, figure, figures, folded, join, paragraph
from pipelines.reporting.run import Run
from pipelines.reporting.tables import (
    BASELINES,
    Table,
    html_table,
    metrics_table,
    results_table,
    show,
    system_label,
    systems_in,
)

KINDS = ("evaluate",)


def results(run: Run) -> Section | None:
    """Table and figures of every measured system; None until something was measured."""
    table = results_table(run.metrics, run.order)
    if table is None:
        return None
    stages = run.of_kind(*KINDS)
    parts = [html_table(table, "Results of every system")]
    parts.append(paragraph("Small print: 95 % bootstrap intervals over held-out documents.", "note"))
    parts.extend(_settings(stage.json("settings.json")) for stage in stages)
    parts.append(figures(_figures(run)))
    parts.append(folded("Every number of the run", html_table(metrics_table(run.metrics), "Every metric")))
    lead = (
        "ROUGE and gold score compare with the human reference; the win rate is the share of documents on which the "
        "gold judge prefers a system to SFT; KL is the divergence from SFT over whole sequences."
    )
    return Section("results", "Results", join(parts), lead, frozenset(s.name for s in stages))


def _figures(run: Run) -> list[Markup]:
    systems = systems_in(run.metrics, run.order)
    made = []
    for measure, title, reference, caption in (
        ("rouge1", "ROUGE-1", None, "To the right is better. Grey: needs no training. Bars: 95 % intervals."),
        (
            "gold_win_rate",
            "Win rate against SFT",
            50.0,
            "Right of the dashed line beats SFT; an interval that crosses it shows no difference.",
        ),
    ):
        rows = [
            (system_label(s), _shown(estimate(run.metrics, f"{s}/{measure}"), measure), s not in BASELINES)
            for s in systems
            if f"{s}/{measure}" in run.metrics
        ]
        if not rows:
            continue
        unit = "per cent of documents, gold judge" if reference else "0–100, with stemming"
        alt = title + ": " + "; ".join(f"{label} {found.value:.1f}" for label, found, _ in rows)
        svg = plots.forest(f"forest-{measure}", rows, f"{title} ({unit})", alt, reference=reference)
        made.append(figure(svg, caption, title))
    return made


def _shown(found: Estimate, measure: str) -> Estimate:
    scale = measure_of(measure).scale
    ends = [None if end is None else end * scale for end in (found.low, found.high)]
    return Estimate(found.value * scale, *ends)


def _settings(settings: object) -> Markup:
    """The generation settings: one line where all systems share them, else a table."""
    if not isinstance(settings, Mapping) or not settings:
        return Markup("")
    per_system = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    common = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    if per_system and all(v == next(iter(per_system.values())) for v in per_system.values()):
        common = {**next(iter(per_system.values())), **common}
        per_system = {}
    parts = []
    if common:
        text = " · ".join(f"{k.replace('_', ' ')} {show(v)}" for k, v in common.items())
        parts.append(Markup('<p class="note"><b>Generation settings:</b> {}</p>').format(text))
    if per_system:
        names = list(dict.fromkeys(k for v in per_system.values() for k in v))
        rows = [[system_label(s), *[show(v.get(n)) for n in names]] for s, v in per_system.items()]
        table = Table(["Generation settings", *[n.replace("_", " ") for n in names]], rows)
        parts.append(html_table(table, "Generation settings"))
    return join(parts)
