"""The report in a real browser: nothing overflows, nothing is fetched, every figure can be read in both schemes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import synthetic
from PIL import Image

from pipelines.reporting.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (.ci/run installs it: apt package chromium)"
)

WIDTHS = {"desktop": 1280, "phone": 390}

# A window of headless Chromium is never narrower than about 500 px, so a phone is a frame of 390 px inside a page.
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin:0">
FRAMES
<script>
function seen(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, width = page.documentElement.clientWidth;
  const inside = (e, css) => e.closest(css) && e.closest(css) !== e;
  const wide = [...page.querySelectorAll("body *")].filter(e =>
    e.getClientRects().length && e.getBoundingClientRect().right > width + 0.5
    && !inside(e, ".scroll") && !inside(e, "svg"));
  const lost = [...page.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")].filter(t => {
    const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect();
    return a.left < b.left - 3 || a.right > b.right + 3 || a.top < b.top - 3 || a.bottom > b.bottom + 3;
  })).map(t => t.textContent);
  const letters = [...page.querySelectorAll("svg text")];
  const style = view.getComputedStyle(page.documentElement);
  return {
    width: width, scroll: page.documentElement.scrollWidth, wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    lost: lost, figures: page.querySelectorAll("figure svg").length, scripts: page.scripts.length,
    letter: Math.min(...letters.map(t => t.getBoundingClientRect().height)),
    // Turned labels are upright boxes, so the smallest side of a box is its letters' height.
    small: Math.min(...letters.map(t => Math.min(t.getBoundingClientRect().height, t.getBoundingClientRect().width))),
    fill: [...new Set(letters.map(t => view.getComputedStyle(t).fill))],
    card: view.getComputedStyle(page.querySelector("figure")).backgroundColor,
    body: [style.color, style.backgroundColor],
    fetched: view.performance.getEntriesByType("resource").map(r => r.name),
    ids: [...page.querySelectorAll("[id]")].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i),
    text: page.body.innerText,
  };
}
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    found[frame.name] = seen(frame);
    for (const part of frame.contentDocument.querySelectorAll("details")) part.open = true;
    found[frame.name + "-open"] = seen(frame);
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
});
</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, list[str]]]:
    """A server on this machine with the report of a run and the measuring page; what was asked of it."""
    folder = tmp_path_factory.mktemp("site")
    write_report(synthetic.write_run(folder / "run"))
    frames = "".join(
        f'<iframe name="{name}" src="run/report.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for name, width in WIDTHS.items()
    )
    (folder / "measure.html").write_text(PAGE.replace("FRAMES", frames), encoding="utf-8")
    phone = (
        f'<body style="margin:0"><iframe src="run/report.html" style="width:{WIDTHS["phone"]}px;height:900px;border:0">'
    )
    (folder / "phone.html").write_text(f'<!doctype html><link rel="icon" href="data:,">{phone}', encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, server.asked
    server.shutdown()
    server.server_close()
    thread.join()


def browse(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Headless Chromium on one page, in a profile of its own, with every other host unreachable."""
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--window-size=1400,1000",
        f"--user-data-dir={profile}",
        *flags,
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.fixture(scope="module")
def measured(site: tuple[str, Path, list[str]]) -> dict[str, dict]:
    """What the browser saw, in the light and the dark scheme, closed and with every folded part open."""
    url, folder, asked = site
    found = {}
    for scheme, number in (("light", 1), ("dark", 0)):
        done = browse(f"{url}/measure.html", folder, "--dump-dom", f"--blink-settings=preferredColorScheme={number}")
        text = re.search(r"FOUND(.*)END", done.stdout, flags=re.DOTALL).group(1)
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0").replace("&amp;", "&")
        found |= {f"{scheme} {name}": seen for name, seen in json.loads(text).items()}
        assert "CONSOLE" not in done.stderr, done.stderr
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


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = np.array([float(p) for p in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


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
