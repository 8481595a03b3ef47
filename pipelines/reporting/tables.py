"""Tables that are written once and rendered as HTML (the report) or Markdown (the README and the model card)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipelines.reporting.metrics import MEASURES, estimate, format_interval, format_mean, is_interval_key, measure_of

BASELINES = {
    "lead1": "Lead-1 (first sentence)",
    "name": "The name in words",
    "qualified_name": "The qualified name in words",
    "random_summary": "A random training summary",
}
"""What needs no training, in the order in which it is shown."""

MODELS = {"scratch": "Trained from scratch", "finetuned": "Fine-tuned", "sft": "SFT", "ppo": "PPO", "dpo": "DPO"} | {
    "ddpm": "DDPM",
    "bitflip": "Bit-flip diffusion",
    "bitflip_long": "Bit-flip diffusion, trained on",
    "vae": "VAE",
    "vae_course": "VAE of the course",
    "gan": "GAN",
    "training_images": "Training images",
}
"""The trained systems that have a readable name; others go by the name of their stage."""

RESULT_MEASURES = (
    "rouge1",
    "rouge2",
    "rougeL",
    "gold",
    "gold_win_rate",
    "proxy",
    "kl",
    "length",
    "novel_bigrams",
    "repetition",
    "compression",
    "rougeLsum",
)
"""Columns of the results table, in order; those that no system has are left out."""

README_MEASURES = ("rouge1", "rouge2", "rougeL", "gold_win_rate", "kl", "length")


@dataclass(frozen=True)
class Cell:
    """One cell: the value, smaller what stands under it (its interval), and the class it is styled by."""

    text: str
    small: str = ""
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        columns: the headers; the first column names the rows.
        rows: as many cells as columns each; a plain string is a cell without small print.
        numeric: whether the columns after the first hold numbers (aligned to the right).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    numeric: bool = True

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells, the table {len(self.columns)} columns: {row}")


def _cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def html_table(table: Table, label: str = "") -> Markup:
    """The table as HTML that scrolls sideways in its own box; every text is escaped.

    Args:
        table: the table.
        label: what the box is called for those who cannot see it.
    """
    kind = "number" if table.numeric else "text"
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(unbroken(c)) for c in table.columns)
    body = Markup("").join(_html_row(row) for row in table.rows)
    return Markup(
        '<div class="scroll{}" role="region" tabindex="0" aria-label="{}"><table class="{}">'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(" narrow" if len(table.columns) == 2 else "", label or table.columns[0], kind, head, body)


def unbroken(text: str) -> Markup:
    """Text that may break between words but not at a hyphen."""
    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in text.split())


def _html_row(row: Iterable[Cell | str]) -> Markup:
    first, *others = (_cell(c) for c in row)
    cells = [Markup('<th scope="row">{}</th>').format(_html_cell(first))]
    cells += [Markup("<td>{}</td>").format(_html_cell(c)) for c in others]
    return Markup("<tr>{}</tr>").format(Markup("").join(cells))


def _html_cell(cell: Cell) -> Markup:
    text = Markup('<span class="{}">{}</span>').format(cell.css, cell.text) if cell.css else escape(cell.text)
    return text + (Markup("<small>{}</small>").format(cell.small) if cell.small else Markup(""))


def markdown_table(table: Table) -> str:
    """The table as GitHub Markdown, the small print in brackets; pipes and line ends in cells are made harmless."""
    align = "---:" if table.numeric else "---"
    lines = [
        "| " + " | ".join(_markdown_text(c) for c in table.columns) + " |",
        "| " + " | ".join(["---", *[align] * (len(table.columns) - 1)]) + " |",
    ]
    for row in table.rows:
        cells = [_cell(c) for c in row]
        texts = [_markdown_text(c.text + (f" ({c.small})" if c.small else "")) for c in cells]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _markdown_text(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def system_label(system: str) -> str:
    """The readable name of a system; one without any goes by its own."""
    return (BASELINES | MODELS).get(system, system.replace("_", " "))


def systems_in(metrics: Mapping[str, float], order: Sequence[str] = ()) -> list[str]:
    """The systems that were measured (those with a ROUGE-1, a gold score or a gold win rate).

    Args:
        metrics: the flat metrics.
        order: stage names in the order they ran; baselines come before them, all others after, by name.
    """
    measured = {"rouge1", "gold", "gold_win_rate"}
    found = {key.rsplit("/", 1)[0] for key in metrics if "/" in key and key.rsplit("/", 1)[1] in measured}
    ranked = dict.fromkeys([*BASELINES, *order, *MODELS])
    return [s for s in ranked if s in found] + sorted(found - set(ranked))


def results_table(
    metrics: Mapping[str, float], order: Sequence[str] = (), measures: Sequence[str] = RESULT_MEASURES
) -> Table | None:
    """Systems as rows, measures as columns, each mean with its interval; None when no system was measured.

    Args:
        metrics: the flat metrics.
        order: stage names in the order they ran.
        measures: the columns that are wanted, where any system has them.
    """
    return systems_table(metrics, systems_in(metrics, order), measures)


def systems_table(metrics: Mapping[str, float], systems: Sequence[str], measures: Sequence[str]) -> Table | None:
    """The same for given systems, in their order."""
    columns = [m for m in measures if any(f"{s}/{m}" in metrics for s in systems)]
    if not systems or not columns:
        return None
    rows = []
    for system in systems:
        cells = [Cell(system_label(system))]
        for name in columns:
            key = f"{system}/{name}"
            found = estimate(metrics, key)
            cells.append(
                Cell(measure_of(key).number(found.value), format_interval(metrics, key)) if found else Cell("–")
            )
        rows.append(cells)
    return Table(["System", *[header(m) for m in columns]], rows)


def header(measure: str) -> str:
    """The column header of a measure, with its unit: ``KL to SFT, nats``."""
    found = MEASURES[measure]
    return f"{found.label}, {found.unit}" if found.unit else found.label


def mapping_table(mapping: Mapping[str, object], key: str, value: str) -> Table:
    """A two-column table of text."""
    return Table([key, value], [[str(k), show(v)] for k, v in mapping.items()], numeric=False)


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Every value of a metrics mapping, one a row, with its interval."""
    rows = [[key, format_mean(metrics, key)] for key in sorted(metrics) if not is_interval_key(key)]
    return Table(["Metric", "Value (95 % interval)"], rows)


def show(value: object) -> str:
    """A configuration value or count as one would read it aloud: no quotes, no trailing zeros, ``–`` for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {show(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(show(v) for v in value)
    return str(value)
