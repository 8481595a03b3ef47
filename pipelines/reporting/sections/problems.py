"""The problem set: each exercise's page with the numbers of this run, its figures, and what was checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from pipelines.reporting.markdown import number_text, rendered
from pipelines.reporting.page import Section, figure, folded, heading, join, paragraph, picture
from pipelines.reporting.plots import prefixed
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Cell, Table, html_table, metrics_table
from pipelines.share import shared_folder

EXERCISE = "exercise.json"
PAGES = "docs/problems"
_LONG = 28  # characters of a cell, above which a table is one of texts


def problems(run: Run) -> Sequence[Section]:
    """A section for every exercise, in the order of the chain, which is that of the questions."""
    return [_section(stage, found) for stage in run.stages if isinstance(found := stage.json(EXERCISE), Mapping)]


def failed_checks(stage: Stage) -> tuple[int, int]:
    """How many of an exercise's checks failed, and how many there are; (0, 0) of a stage that is none."""
    found = stage.json(EXERCISE)
    checks = found["checks"] if isinstance(found, Mapping) else []
    return sum(not check["passed"] for check in checks), len(checks)


def page_text(page: str) -> str:
    """The Markdown of an exercise's page; empty where there is none."""
    file = shared_folder(PAGES) / f"{page}.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _section(stage: Stage, found: Mapping) -> Section:
    values = {name: float(v) if isinstance(v, str) else v for name, v in found["values"].items()}
    body = [rendered(page_text(found["page"]), values, _blocks(stage, found)), *_checks(stage, found["checks"])]
    if any(key.rpartition("/")[2] not in ("checks", "checks_failed") for key in stage.metrics):
        body.append(folded("Metrics", html_table(metrics_table(stage.metrics), f"Metrics of {stage.name}")))
    return Section(f"exercise-{anchor(stage.name)}", found["title"], join(body), stages=frozenset([stage.name]))


def _blocks(stage: Stage, found: Mapping) -> dict[tuple[str, str], Markup]:
    blocks = {}
    for name, entry in found["figures"].items():
        path = stage.folder / entry["file"]
        if path.suffix == ".png":
            content = picture(path, entry["caption"])
        else:
            content = prefixed(path.read_text(encoding="utf-8"), f"exercise-{anchor(stage.name)}")
        blocks["figure", name] = figure(content, entry["caption"], entry["title"])
    for name, entry in found["tables"].items():
        parts = [html_table(exercise_table(entry), entry["caption"] or name)]
        blocks["table", name] = join([*parts, *([paragraph(entry["caption"], "note")] if entry["caption"] else [])])
    return blocks


def exercise_table(entry: Mapping) -> Table:
    """A table of ``exercise.json`` (its ``columns`` and ``rows``), numbers written as one reads them."""
    cells = [[cell if isinstance(cell, str) else number_text(cell) for cell in row] for row in entry["rows"]]
    numeric = all(len(cell) <= _LONG for row in cells for cell in row[1:])
    return Table(entry["columns"], cells, numeric=numeric)


def _checks(stage: Stage, checks: Sequence[Mapping]) -> Iterator[Markup]:
    if not checks:
        return
    failed, count = failed_checks(stage)
    verdict = f"{failed} of {count} do not hold." if failed else f"All {count} hold."
    yield heading("Checked in this run")
    yield paragraph(f"{verdict} Each number was found by a route of its own, named under the statement.", "note")
    rows = []
    for check in checks:
        numbers = [number_text(float(check[key]), ".5g") for key in ("found", "expected")]
        mark, css = ("✓", "held") if check["passed"] else ("✗", "failed")
        tolerance = number_text(float(check["tolerance"]), ".2g")
        rows.append([Cell(f"{mark} {check['statement']}", check["route"], css), *numbers, tolerance])
    table = Table(["Statement", "Found", "Expected", "Tolerance"], rows)
    yield Markup('<div class="checks">{}</div>').format(html_table(table, f"Checks of {stage.name}"))
