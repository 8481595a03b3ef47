"""One look for every figure: small panels, drawn by matplotlib, written as SVG whose colours follow the page.

Colours are written as ``var(--name, #hex)``: in the report the page's light or dark scheme decides, a figure on its own
(``standalone=True``) has the light colours. Text stays text, ids carry the figure's name, no date is written: the same
numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipelines.reporting.metrics import Estimate

# Each colour is used for nothing else, so that it can be found again in the SVG. The page defines its two schemes.
INK, MUTED, GRID = "#22262b", "#6a727c", "#dfe3e8"
SERIES = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#b83280")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--series-{i + 1}" for i, c in enumerate(SERIES)}

WIDTH = 4.5  # inches: at 72 points an inch the panel fits a phone without its letters shrinking
POINTS = 400
STEPS = (1, 2, 5, 10)  # ticks at round numbers

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: its name in the legend; empty for none.
        x, y: equally many numbers.
        smooth: draw the raw values faintly and their running mean strongly.
        points: draw dots instead of a line, faint ones for clouds of many.
        colour: index into ``SERIES``.
        bars: the (low, high) ends of an interval at each x, drawn as a bar; empty for none.
        marks: draw large dots instead of a line, for a few places that count.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    points: bool = False
    colour: int | None = None
    bars: Sequence[tuple[float, float]] = ()
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: curves, and what the vertical one measures (with its unit); ``log`` for a logarithmic scale."""

    series: Sequence[Series]
    ylabel: str
    zero: bool = False
    log: bool = False


def svg(figure: Figure, name: str, alt: str, *, standalone: bool = False) -> str:
    """The figure as SVG text.

    Args:
        figure: the figure.
        name: prefix of every id in it; two figures of one page must have different names.
        alt: what the figure shows, for those who cannot see it.
        standalone: a whole file in fixed light colours, else an element to be put into a page.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise ValueError(f"a figure's name is made of letters, digits, _ and -: {name!r}")
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty, bbox_inches="tight", pad_inches=0.04)
    text = buffer.getvalue().decode("utf-8")
    if standalone:
        return text
    text = text[text.index("<svg") :]
    text = prefixed(re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL), name)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font, sans-serif)", text)
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening).group()  # the page decides the size
    alt = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {box} role="img" aria-label="{alt}">{rest}'


def png(figure: Figure, dots_an_inch: int = 130) -> bytes:
    """The figure as a PNG file on white, for pages that know neither of the two schemes of colours."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format="png", dpi=dots_an_inch, facecolor="white", bbox_inches="tight", metadata={"Software": None}
        )
    return buffer.getvalue()


def prefixed(text: str, name: str) -> str:
    """The SVG text with ``name`` and a dash before every id, so that two figures of one page share none."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)


def new_figure(
    rows: int = 1, height: float = 2.6, width: float = WIDTH, **subplots: object
) -> tuple[Figure, list[Axes]]:
    """An empty figure of ``rows`` panels, one under the other, in the common style.

    Args:
        rows: number of panels.
        height, width: of the whole, in inches.
        **subplots: passed to ``Figure.subplots``.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, **subplots)[:, 0]
    return figure, list(axes)


def lines(name: str, panels: Sequence[Panel], xlabel: str, alt: str, *, logx: bool = False) -> str:
    """Curves in panels that share the horizontal axis (``logx``: a logarithmic one), as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels), height=2.6 if len(panels) == 1 else 1.75 * len(panels), sharex=True)
        for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            for i, series in enumerate(panel.series):
                _draw(axis, series, SERIES[(series.colour if series.colour is not None else number + i) % len(SERIES)])
            axis.set_ylabel(panel.ylabel)
            if panel.log:
                axis.set_yscale("log")
            else:
                axis.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
            axis.margins(x=0.02)
            if panel.zero:
                axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            if any(s.label for s in panel.series):
                axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.4)
        axes[-1].set_xlabel(xlabel)
        figure.align_ylabels(axes)
        if logx:
            _log_ticks(axes[-1])
        else:
            axes[-1].xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        return svg(figure, name, alt)


def _log_ticks(axis: Axes) -> None:
    """A logarithmic horizontal axis; over less than three decades it has plain numbers at 1, 2 and 5 of each."""
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    if high / low < 1000:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(axis: Axes, series: Series, colour: str) -> None:
    x, y = thinned(series.x, series.y)
    if series.bars:
        axis.vlines(series.x, *zip(*series.bars, strict=True), color=colour, linewidth=1.2, alpha=0.6)
    if series.marks:
        axis.plot(x, y, "o", color=colour, markersize=5.5, label=series.label or None)
        return
    if series.points:
        axis.plot(x, y, "o", color=colour, markersize=2.6, markeredgewidth=0, alpha=0.45, label=series.label or None)
        return
    if not series.smooth or len(x) < 8:
        marker = "o" if len(x) < 25 else None
        axis.plot(x, y, color=colour, marker=marker, markersize=3, label=series.label or None)
        return
    axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(x, running_mean(y, max(3, len(y) // 15)), color=colour, label=series.label or None)


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` pairs: means over consecutive, equally large groups (the last may be smaller)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) <= points:
        return x, y
    group = -(-len(x) // points)
    starts = np.arange(0, len(x), group)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def running_mean(y: Sequence[float], window: int) -> np.ndarray:
    """The mean over a window centred on each value; at the ends, over the part of it that exists.

    Args:
        y: (n,) values.
        window: its width; an even one is widened by one.
    """
    y, half = np.asarray(y, float), window // 2
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def binned(x: Sequence[float], y: Sequence[float], bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and y over ``bins`` equally populated groups along x (fewer when there are fewer values)."""
    order = np.argsort(np.asarray(x, float), kind="stable")
    groups = np.array_split(order, min(bins, max(1, len(order) // 2)))
    x, y = np.asarray(x, float), np.asarray(y, float)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def forest(
    name: str, rows: Sequence[tuple[str, Estimate, bool]], xlabel: str, alt: str, *, reference: float | None = None
) -> str:
    """Values with their intervals, one a row, as SVG.

    Args:
        name: the figure's name.
        rows: (label, estimate in shown units, whether it stands out), the first on top.
        xlabel: what is measured, with its unit.
        alt: what the figure shows, in words.
        reference: a value marked by a dashed line (50 % for a win rate).
    """
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(height=0.75 + 0.3 * max(len(rows), 2))
        if reference is not None:
            axis.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for y, (_, found, stands_out) in enumerate(reversed(rows)):
            colour = SERIES[0] if stands_out else MUTED
            if found.low is not None and found.high is not None:
                axis.plot([found.low, found.high], [y, y], color=colour, linewidth=2)
            axis.plot([found.value], [y], "o", color=colour, markersize=5.5)
        axis.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.08)
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axis.set_xlabel(xlabel)
        return svg(figure, name, alt)


def dots(
    panels: Sequence[tuple[str, Mapping[str, Estimate], bool]], systems: Sequence[tuple[str, str]], muted: str
) -> Figure:
    """One measure a panel, one system a row, the same rows in all panels; intervals as bars.

    Args:
        panels: (what is measured, system -> value, whether on a logarithmic scale).
        systems: (key, label), the first on top.
        muted: key of the system drawn in grey.
    """
    places = {key: place for place, (key, _) in enumerate(reversed(systems))}
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels), height=(0.55 + 0.24 * len(systems)) * len(panels))
        for axis, (label, values, logarithmic) in zip(axes, panels, strict=True):
            for key, found in values.items():
                colour = MUTED if key == muted else SERIES[0]
                if found.low is not None and found.high is not None:
                    axis.plot([found.low, found.high], [places[key]] * 2, color=colour, linewidth=2)
                axis.plot(found.value, places[key], "o", color=colour, markersize=5.5)
            if logarithmic:
                axis.set_xscale("log")
            else:
                axis.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
            axis.set_yticks(list(places.values()), [dict(systems)[key] for key in places])
            axis.tick_params(axis="y", labelcolor=INK)
            axis.set_ylim(-0.6, len(systems) - 0.4)
            axis.margins(x=0.08)
            axis.set_xlabel(label)
        return figure


def calibration(name: str, bins: Sequence[dict], alt: str, *, of: str = "verdict") -> str:
    """Confidence against the share that is right, with intervals, and the diagonal of a calibrated model, as SVG.

    Args:
        name: the figure's name.
        bins: ``{"predicted", "observed", "low", "high", "count"}`` each, probabilities in 0-1.
        alt: what the figure shows, in words.
        of: what the model is confident of, for the axes.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(height=3.0)
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        x = [b["predicted"] for b in bins]
        largest = max((b["count"] for b in bins), default=1)
        for b in bins:
            axis.plot([b["predicted"]] * 2, [b["low"], b["high"]], color=SERIES[0], linewidth=1.4, alpha=0.6)
            size = 3 + 5 * (b["count"] / largest) ** 0.5  # area grows with the number of pairs
            axis.plot(b["predicted"], b["observed"], "o", color=SERIES[0], markersize=size)
        low = min([*x, *(b["low"] for b in bins), 0.45])
        axis.set_xlim(max(0.0, low - 0.05), 1.02)
        axis.set_ylim(max(0.0, low - 0.05), 1.02)
        axis.set_xlabel(f"the model's confidence in its {of}")
        axis.set_ylabel(f"share of {of}s that are right")
        return svg(figure, name, alt)
