"""The results: every system with its intervals, the generation settings beside them, and the same as a figure."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import MINUS, Estimate, estimate, format_mean, is_interval_key, measure_of
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
    differences = _differences(run)
    if differences is not None:
        parts.append(html_table(differences, "Paired differences"))
    parts.append(folded("Every number of the run", html_table(metrics_table(run.metrics), "Every metric")))
    base = system_label(run.reference)
    lead = (
        "ROUGE and gold score compare with the human reference; the win rate is the share of documents on which the "
        f"gold judge prefers a system to {base} (a tie counts half); KL is the divergence from {base} over whole "
        "sequences, in nats."
    )
    return Section("results", "Results", join(parts), lead, frozenset(s.name for s in stages))


def _figures(run: Run) -> list[Markup]:
    systems, base = systems_in(run.metrics, run.order), system_label(run.reference)
    made = []
    for measure, title, reference, caption in (
        ("rouge1", "ROUGE-1", None, "To the right is better. Grey: needs no training. Bars: 95 % intervals."),
        (
            "gold_win_rate",
            f"Win rate against {base}",
            50.0,
            f"Right of the dashed line beats {base}; an interval that crosses it shows no difference.",
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


def _differences(run: Run) -> Table | None:
    """The paired differences between systems; None when none was measured."""
    systems = systems_in(run.metrics, run.order)
    keys = [k for k in run.metrics if MINUS in k and not is_interval_key(k)]
    keys.sort(key=lambda k: (systems.index(s) if (s := k.split("/")[0]) in systems else len(systems), k))
    rows = []
    for key in keys:
        system, difference = key.split("/", 1)
        measure, other = difference.split(MINUS, 1)
        name = f"{system_label(system)} above {system_label(other)}, {measure_of(measure).label}"
        rows.append([name, format_mean(run.metrics, key)])
    return Table(["Paired difference on the same documents", "Mean (95 % interval)"], rows) if rows else None


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
