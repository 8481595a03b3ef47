"""Figures: the numbers behind them by brute force, and the SVG that comes out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reporting import plots
from pipelines.reporting.metrics import Estimate
from pipelines.reporting.plots import Panel, Series

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 12))
def test_running_mean_against_brute_force(values: list[float], window: int) -> None:
    half = window // 2
    wanted = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(plots.running_mean(values, window), wanted, atol=1e-8)


@given(VALUES, st.integers(1, 20))
def test_thinning_keeps_the_mean_and_the_limit(values: list[float], points: int) -> None:
    x, y = plots.thinned(range(len(values)), values, points)
    assert len(x) == len(y) <= points or len(values) <= points
    group = 1 if len(values) <= points else -(-len(values) // points)
    wanted = [np.mean(values[i : i + group]) for i in range(0, len(values), group)]
    np.testing.assert_allclose(y, wanted, atol=1e-8)
    assert (np.diff(x) > 0).all()


def test_bins_are_equally_populated_and_ordered() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=120)
    mean_x, mean_y = plots.binned(x, 2 * x, 12)
    wanted = np.sort(x).reshape(12, 10).mean(axis=1)
    np.testing.assert_allclose(mean_x, wanted)
    np.testing.assert_allclose(mean_y, 2 * wanted)


def figures() -> dict[str, str]:
    rng = np.random.default_rng(0)
    x, y = np.arange(50), rng.normal(size=50)
    rows = [("A & <B>", Estimate(52.0, 48.0, 56.0), True), ("C", Estimate(50.0), False)]
    bins = [{"predicted": 0.6, "observed": 0.55, "low": 0.5, "high": 0.6, "count": 30}]
    panels = [Panel([Series("one", x, y, smooth=True), Series("two", x, y, points=True)], "loss (nats)")]
    return {
        "lines": plots.lines("lines", panels, "step", 'a "quoted" <alt> &'),
        "forest": plots.forest("forest", rows, "per cent", "alt", reference=50.0),
        "calibration": plots.calibration("calibration", bins, "alt"),
    }


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert figures() == figures()


def test_svg_is_well_formed_with_its_own_ids_text_and_colours() -> None:
    for name, text in figures().items():
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert all(i.startswith(f"{name}-") for i in ids)
        used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
        assert used <= set(ids)
        assert "metadata" not in text
        assert "DejaVu" not in text
        words = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
        assert words  # text, not outlines
        assert "var(--" in text
        # Only the namespaces' names look like addresses.
        assert set(re.findall(r"https?://[^\"]+", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        left = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", text)))
        assert left <= {"#000000"}, left
    assert "A &amp; &lt;B&gt;" in figures()["forest"]


def test_standalone_figures_have_fixed_colours() -> None:
    figure, (axis,) = plots.new_figure()
    axis.plot([0, 1], [0, 1], color=plots.SERIES[0])
    text = plots.svg(figure, "alone", "alt", standalone=True)
    assert text.startswith("<?xml")
    assert "var(" not in text
    assert "date" not in text.lower()


@pytest.mark.parametrize("name", ["", "1a", "a b", 'a"', "a/b"])
def test_a_name_that_is_no_id_is_refused(name: str) -> None:
    figure, _ = plots.new_figure()
    with pytest.raises(ValueError, match="name"):
        plots.svg(figure, name, "alt")


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_short_series_are_drawn_too(values: list[float]) -> None:
    panel = Panel([Series("x", range(len(values)), values, smooth=True)], "y", zero=True)
    ET.fromstring(plots.lines("short", [panel], "step", "alt"))


def test_a_short_logarithmic_axis_has_plain_numbers_and_a_long_one_powers() -> None:
    def letters(x: list[float]) -> list[str]:
        root = ET.fromstring(plots.lines("log", [Panel([Series("", x, x)], "y")], "x", "alt", logx=True))
        return ["".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")]

    assert {"20", "50", "100"} <= set(letters([12, 48, 192]))
    assert not {"1e-05", "0.0001", "0.001"} & set(letters([1e-5, 1e-2, 10]))
