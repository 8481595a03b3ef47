"""The report in a real browser: nothing overflows, nothing is fetched, every figure can be read in both schemes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic
from browser import WIDTHS, browse, contrast, measured_in, needs_browser, served
from PIL import Image

from pipelines.reporting.report import write_report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, list[str]]]:
    """A server on this machine with the report of a run and the measuring page; what was asked of it."""
    folder = tmp_path_factory.mktemp("site")
    write_report(synthetic.write_run(folder / "run"))
    with served(folder) as (url, asked):
        yield url, folder, asked


@pytest.fixture(scope="module")
def measured(site: tuple[str, Path, list[str]]) -> dict[str, dict]:
    """What the browser saw, in the light and the dark scheme, closed and with every folded part open."""
    url, folder, asked = site
    found = measured_in(url, folder)
    assert set(asked) == {"/measure.html", "/run/report.html"}
    return found


def test_nothing_overflows(measured: dict[str, dict]) -> None:
    assert len(measured) == 8
    for where, seen in measured.items():
        name = where.split()[1].removesuffix("-open")
        assert seen["width"] == WIDTHS[name]
        assert seen["scroll"] <= seen["width"], (where, seen["wide"])
        assert seen["wide"] == [], where


def test_nothing_is_fetched_and_nothing_runs(measured: dict[str, dict]) -> None:
    for seen in measured.values():
        assert seen["fetched"] == []
        assert seen["scripts"] == 0
        assert seen["ids"] == []


def test_the_figures_are_whole_and_large_enough_to_read(measured: dict[str, dict]) -> None:
    for where, seen in measured.items():
        assert seen["figures"] >= 12, where
        assert seen["lost"] == [], where
    phone = measured["light phone"]
    assert phone["letter"] >= 9
    assert phone["small"] >= 4  # a single digit is narrower than it is high


def test_both_schemes_have_contrast(measured: dict[str, dict]) -> None:
    for where, seen in measured.items():
        for colour in seen["fill"]:
            assert contrast(colour, seen["card"]) >= 4.5, (where, colour, seen["card"])
        assert contrast(*seen["body"]) >= 7, where
    assert measured["light desktop"]["card"] != measured["dark desktop"]["card"]


def test_model_texts_are_shown_as_they_are(measured: dict[str, dict]) -> None:
    assert synthetic.HOSTILE in measured["light desktop"]["text"]
    assert "raise ValueError" not in measured["light desktop"]["text"]  # the document is folded away
    assert "# & <done>" in measured["light desktop-open"]["text"]


@pytest.mark.parametrize(("page", "width"), [("run/report.html", 1280), ("phone.html", 500)])
def test_screenshots_show_something(site: tuple[str, Path, list[str]], page: str, width: int) -> None:
    url, folder, _ = site
    picture = folder / f"{width}.png"
    browse(f"{url}/{page}", folder, f"--screenshot={picture}", f"--window-size={width},900")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == width
    left = pixels[:, : min(width, WIDTHS["phone"])]
    assert len(np.unique(left.reshape(-1, 3), axis=0)) > 50
    assert left.std() > 10
