"""What every exercise of the problem set is made of: its configuration, its checks and figures, and its answer.

An exercise is a stage. It computes, collects what its page ``docs/problems/NAME.md`` quotes in an ``Answer``, and ends
with ``return answer.write() | {its own metrics}``. The page takes a value by ``{{name}}`` or ``{{name:.3g}}``, a figure
by a line ``{{figure:name}}`` and a table by a line ``{{table:name}}``; the report appends the table of the checks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.errors import Problem
from pipelines.stage import write_json

EXERCISE_FILE = "exercise.json"
FIGURES = "figures"
_PAGE_PACKAGES = ("latex2mathml", "markdown_it", "mdit_py_plugins")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@config
class ExerciseConfig(StageConfig):
    """What every exercise takes; each adds its own parameters."""

    output_dir: str = Field("runs/exercise", description="folder the stage writes into", json_schema_extra=INERT)

    def problems(self) -> list[Problem]:
        found = super().problems()
        for package in _PAGE_PACKAGES:
            if importlib.util.find_spec(package) is None:
                mend = "pip install 'genalign[problems]'"
                found.append(Problem("package", package, "is missing; the exercises' pages are rendered by it", mend))
        return found


@dataclass(frozen=True)
class Check:
    """A statement that was verified by a route independent of it.

    Args:
        statement: what is claimed, in plain text with the mathematics' own signs (``Var X₁ = σ² + 1``).
        found: the number that the independent route gave.
        expected: the number that the statement gives.
        tolerance: how far apart the two may be, absolute, at least 0.
        route: how ``found`` was had: enumeration, quadrature, simulation (with its size and the number of standard
            errors that the tolerance is), autograd.
    """

    statement: str
    found: float
    expected: float
    tolerance: float
    route: str

    @property
    def passed(self) -> bool:
        """Whether |found − expected| ≤ tolerance; two equal infinities agree, NaN never does."""
        return self.found == self.expected or abs(self.found - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Figure:
    """A figure of the page: an SVG as ``pipelines.reporting.plots`` writes it, or a PNG for grids of images.

    Args:
        name: letters a-z, digits and _; what the page calls it.
        svg: its text; the report sees to it that no two figures of a page share an id.
        png: its bytes, in place of ``svg``.
        caption: one line that says what one should see.
        title: a short heading above it.
    """

    name: str
    svg: str | None = None
    png: bytes | None = None
    caption: str = ""
    title: str = ""


class Answer:
    """Collects what an exercise's page shows and writes it into the stage's folder.

    Args:
        config: the exercise's configuration.
        page: name of the exercise, of its page ``docs/problems/PAGE.md`` and of its metrics ``PAGE/…``.
        title: the heading of its part of the report.
    """

    def __init__(self, config: ExerciseConfig, page: str, title: str):
        self.config, self.page, self.title = config, _named(page, "page"), title
        self.values: dict[str, float | int] = {}
        self.checks: list[Check] = []
        self.figures: dict[str, Figure] = {}
        self.tables: dict[str, dict[str, Any]] = {}

    def value(self, **numbers: float) -> None:
        """Numbers that the page quotes, by name; integers stay integers, infinities are allowed.

        Raises:
            ValueError: a name given twice, or NaN.
        """
        for name, value in numbers.items():
            _new(name, self.values, "value")
            self.values[name] = _plain(value)
            if math.isnan(self.values[name]):
                raise ValueError(f"the value {name} of {self.page} is not a number")

    def check(self, statement: str, found: float, expected: float, tolerance: float, route: str) -> Check:
        """Add a ``Check`` of those arguments; one that fails is counted and shown, it does not stop the run.

        Raises:
            ValueError: a negative or undefined tolerance, or a statement given twice.
        """
        made = Check(statement, float(found), float(expected), float(tolerance), route)
        if not made.tolerance >= 0:
            raise ValueError(f"a tolerance is at least 0: {tolerance!r} of {statement!r}")
        if any(statement == known.statement for known in self.checks):
            raise ValueError(f"stated twice in {self.page}: {statement!r}")
        self.checks.append(made)
        return made

    def figure(self, figure: Figure) -> None:
        """Add a figure.

        Raises:
            ValueError: a name given twice or that is none, not exactly one of SVG and PNG, or no caption.
        """
        _new(figure.name, self.figures, "figure")
        if (figure.svg is None) == (figure.png is None):
            raise ValueError(f"the figure {figure.name} needs an SVG or a PNG, one of the two")
        if not figure.caption or "\n" in figure.caption:
            raise ValueError(f"the figure {figure.name} needs one line of caption")
        self.figures[_named(figure.name, "figure")] = figure

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """Add a table; its cells are texts and numbers (format numbers yourself where digits matter).

        Raises:
            ValueError: a name given twice or that is none, or a row of another length.
        """
        _new(_named(name, "table"), self.tables, "table")
        cells = [[_plain(cell) if isinstance(cell, numbers.Number) else str(cell) for cell in row] for row in rows]
        if any(len(row) != len(columns) for row in cells):
            raise ValueError(f"the table {name} has {len(columns)} columns; a row has another length")
        self.tables[name] = {"columns": list(columns), "rows": cells, "caption": caption}

    def write(self) -> dict[str, float]:
        """Write ``exercise.json`` and the figures.

        Returns:
            ``PAGE/checks`` and ``PAGE/checks_failed``: how many statements were checked, and how many did not hold.
        """
        folder = Path(self.config.output_dir)
        if self.figures:
            (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        shown = {}
        for name, figure in self.figures.items():
            file = f"{FIGURES}/{name}.{'svg' if figure.png is None else 'png'}"
            (folder / file).write_bytes(figure.svg.encode() if figure.png is None else figure.png)
            shown[name] = {"file": file, "caption": figure.caption, "title": figure.title}
        checks = [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks]
        written = {
            "page": self.page,
            "title": self.title,
            "values": self.values,
            "checks": checks,
            "figures": shown,
            "tables": self.tables,
        }
        write_json(folder / EXERCISE_FILE, _storable(written))
        failed = sum(not check.passed for check in self.checks)
        return {f"{self.page}/checks": float(len(self.checks)), f"{self.page}/checks_failed": float(failed)}


def _named(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name of a {what} is made of a-z, 0-9 and _: {name!r}")
    return name


def _new(name: str, known: dict[str, Any], what: str) -> None:
    if name in known:
        raise ValueError(f"the {what} {name} is given twice")


def _plain(number: Any) -> float | int:
    """A Python number of a Python, numpy or 0-dimensional torch one."""
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _storable(value: Any) -> Any:
    """The same for JSON, which has no infinities and no NaN: they become texts that ``float`` reads."""
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
