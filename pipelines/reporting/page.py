"""The building blocks of a page: sections, figures with captions, folded parts. Every plain text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from markupsafe import Markup

from pipelines.reporting.run import Run


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Args:
        key: its anchor, unique on the page.
        title: its heading.
        body: its content.
        lead: one or two sentences under the heading, plain text.
        stages: names of the stages it shows; a stage that no section shows gets a plain one.
    """

    key: str
    title: str
    body: Markup
    lead: str = ""
    stages: frozenset[str] = field(default_factory=frozenset)


class SectionWriter(Protocol):
    """Makes a section from a run, or several, or None when the run has nothing for it; a family adds its own."""

    def __call__(self, run: Run) -> Section | Sequence[Section] | None: ...


def join(parts: Iterable[Markup]) -> Markup:
    """The parts, one after the other."""
    return Markup("\n").join(parts)


def figure(svg: str, caption: str, title: str = "") -> Markup:
    """A figure with its caption.

    Args:
        svg: SVG as ``plots.svg`` writes it (its texts are escaped there), or a ``picture``.
        caption: one line that says what to see.
        title: a short heading above it.
    """
    heading = Markup("<h4>{}</h4>").format(title) if title else Markup("")
    return Markup("<figure>{}{}<figcaption>{}</figcaption></figure>").format(heading, Markup(svg), caption)


def picture(path: Path, alt: str) -> Markup:
    """A PNG file (an animated one too) as an element that carries it, to be put into ``figure``.

    Args:
        path: the file.
        alt: what it shows, for those who cannot see it.
    """
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(content, alt)


def figures(parts: Iterable[Markup]) -> Markup:
    """Figures side by side where there is room."""
    parts = list(parts)
    return Markup('<div class="figures">{}</div>').format(join(parts)) if parts else Markup("")


def folded(summary: str, body: Markup, note: str = "") -> Markup:
    """A part that is shown when one asks for it."""
    small = Markup(" <small>{}</small>").format(note) if note else Markup("")
    return Markup("<details><summary>{}{}</summary>{}</details>").format(summary, small, body)


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>").format(text)


def paragraph(text: str, css: str = "") -> Markup:
    """A paragraph of plain text."""
    return Markup('<p class="{}">{}</p>').format(css, text) if css else Markup("<p>{}</p>").format(text)
