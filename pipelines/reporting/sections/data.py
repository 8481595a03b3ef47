"""The data: sizes, filters and leak check of the corpus, and what the tokenizer and preference stages counted."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.reporting.metrics import is_interval_key
from pipelines.reporting.page import Section, heading, join
from pipelines.reporting.run import Run
from pipelines.reporting.tables import html_table, mapping_table

KINDS = ("corpus", "tokenizer", "preferences")


def data(run: Run) -> Section | None:
    """The counts of the data stages, from their ``stats.json`` and metrics."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        stats = stage.json("stats.json")
        counts = flat(stats) if isinstance(stats, Mapping) else {}
        counts |= {k: v for k, v in stage.metrics.items() if not is_interval_key(k) and k.split("/")[-1] not in counts}
        if counts:
            parts += [heading(stage.name.capitalize()), html_table(mapping_table(counts, "What", "Value"), stage.name)]
            shown.add(stage.name)
    return Section("data", "Data", join(parts), "", frozenset(shown)) if parts else None


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
