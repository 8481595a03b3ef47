"""The data: sizes, filters and leak check of the corpus, and what the tokenizer and preference stages counted."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from pipelines.reporting.metrics import is_interval_key
from pipelines.reporting.page import Section, folded, heading, join
from pipelines.reporting.run import Run
from pipelines.reporting.tables import Cell, Table, html_table, mapping_table, show

KINDS = ("corpus", "tokenizer", "preferences")

LONG = 16


def data(run: Run) -> Section | None:
    """The counts of the data stages, from their ``stats.json`` and metrics."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        stats = stage.json("stats.json")
        found = _tables(stage.name, stats if isinstance(stats, Mapping) else {}, stage.metrics)
        if found:
            parts += [heading(stage.name.capitalize()), *found]
            shown.add(stage.name)
    return Section("data", "Data", join(parts), "", frozenset(shown)) if parts else None


def _tables(name: str, stats: Mapping, metrics: Mapping[str, float]) -> list[Markup]:
    """Records of one form (a row for each split, for each package) as tables of their own, the rest as one list."""
    records = {
        k: v for k, v in stats.items() if isinstance(v, Mapping) and v and all(_is_record(r) for r in v.values())
    }
    counts = flat({k: v for k, v in stats.items() if k not in records})
    for key, value in metrics.items():
        short = key.split("/")[-1].replace("_", " ")
        if not is_interval_key(key):
            counts.setdefault(short, value)
    parts = []
    for key, rows in records.items():
        columns = list(dict.fromkeys(c for row in rows.values() for c in row))
        body = [[str(row_name), *(_cell(row.get(c)) for c in columns)] for row_name, row in rows.items()]
        title = key.replace("_", " ")
        table = html_table(Table([title, *(c.replace("_", " ") for c in columns)], body), f"{name}: {title}")
        parts.append(table if len(rows) <= LONG else folded(f"{len(rows)} {title}", table))
    if counts:
        parts.append(html_table(mapping_table({k: _rounded(v) for k, v in counts.items()}, "What", "Value"), name))
    return parts


def _is_record(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cell(value: object) -> Cell:
    """A number or text; a distribution by its mean, with the rest in small print."""
    if isinstance(value, Mapping) and "mean" in value:
        rest = ", ".join(f"{k} {show(_rounded(v))}" for k, v in value.items() if k != "mean")
        return Cell(f"{value['mean']:.1f}", rest)
    return Cell(show(_rounded(value)))


def flat(mapping: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested keys joined by a blank; long lists and mappings are counted instead of shown."""
    found: dict[str, object] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found |= flat(value, f"{name} ") if len(value) <= 12 else {name: f"{len(value)} entries"}
        elif isinstance(value, list) and len(value) > 12:
            found[name] = f"{len(value)} entries"
        else:
            found[name] = value
    return found
