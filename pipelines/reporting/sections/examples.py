"""Held-out documents with the reference and what each system wrote, drawn at random and never chosen."""

from __future__ import annotations

import random
from collections.abc import Mapping

from markupsafe import Markup, escape

from pipelines.reporting.page import Section, join
from pipelines.reporting.run import Run, Stage, is_number
from pipelines.reporting.tables import BASELINES, system_label

COUNT = 20
KINDS = ("evaluate",)


def examples(run: Run) -> Section | None:
    """Twenty rows of ``predictions.jsonl``, drawn with the run's seed; None when nothing was evaluated."""
    parts, shown = [], []
    for stage in run.of_kind(*KINDS):
        rows = list(stage.lines("predictions.jsonl"))
        if not rows:
            continue
        seed = run.seed if run.seed is not None else stage.record.get("seed", 0)
        drawn = sorted(random.Random(seed).sample(range(len(rows)), min(COUNT, len(rows))))
        parts.append(_table([rows[i] for i in drawn], run, stage))
        shown.append(f"{len(drawn)} of {len(rows):,} held-out documents")
    if not parts:
        return None
    lead = f"{', '.join(shown)}, drawn at random with the run's seed. Open a row to read its document."
    return Section(
        "examples", "Summaries side by side", join(parts), lead, frozenset(s.name for s in run.of_kind(*KINDS))
    )


def _table(rows: list[dict], run: Run, stage: Stage) -> Markup:
    systems = list(dict.fromkeys(s for row in rows for s in row.get("outputs", {})))
    order = [*BASELINES, *run.order]
    systems.sort(key=lambda s: order.index(s) if s in order else len(order))
    baselines = [s for s in systems if s in BASELINES]
    # One baseline stands beside the models, the strongest that was measured; the others are in the folded part.
    best = max(baselines, key=lambda s: (run.metrics.get(f"{s}/rouge1", 0.0), -baselines.index(s)), default=None)
    columns = [s for s in systems if s not in BASELINES or s == best]
    folded = [s for s in baselines if s != best]
    labels = ["Reference", *[system_label(s) for s in columns]]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(label) for label in labels)
    body = Markup("").join(_row(row, columns, folded) for row in rows)
    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="Summaries side by side">'
        '<table class="examples"><thead><tr>{}</tr></thead>{}</table></div>'
    ).format(head, body)


def _row(row: Mapping, columns: list[str], folded: list[str]) -> Markup:
    outputs, references = row.get("outputs", {}), row.get("references") or []
    more = [("Another reference", text) for text in references[1:]]
    more += [(system_label(s), outputs[s]) for s in folded if s in outputs]
    extra = Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(label, text) for label, text in more)
    name = row.get("name") or row.get("id", "")
    title = Markup(
        '<tr class="title"><th colspan="{}" scope="rowgroup"><details><summary>{}</summary>'
        "<pre>{}</pre>{}</details></th></tr>"
    ).format(
        len(columns) + 1, name, row.get("document", ""), Markup("<dl>{}</dl>").format(extra) if extra else Markup("")
    )
    cells = [
        Markup('<td data-label="Reference" class="reference">{}</td>').format(references[0] if references else "–")
    ]
    cells += [_output(row, s) for s in columns]
    return Markup("<tbody>{}<tr>{}</tr></tbody>").format(title, Markup("").join(cells))


def _output(row: Mapping, system: str) -> Markup:
    text = row.get("outputs", {}).get(system)
    shown = Markup("–") if text is None else escape(text) if text.strip() else Markup("<i>(empty)</i>")
    scores = [
        f"{label} {row[key][system]:.{digits}f}"
        for key, label, digits in (("gold", "gold", 1), ("proxy", "proxy", 2))
        if is_number((row.get(key) or {}).get(system))
    ]
    small = Markup("<small>{}</small>").format(" · ".join(scores)) if scores else Markup("")
    return Markup('<td data-label="{}">{}{}</td>').format(system_label(system), shown, small)
