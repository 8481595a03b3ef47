"""Headless Chromium on a report: what it shows at the widths of a desktop and of a phone, in both colour schemes."""

from __future__ import annotations

import contextlib
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

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
needs_browser = pytest.mark.skipif(
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
    formulas: page.querySelectorAll("math").length,
    formula: Math.min(...[...page.querySelectorAll("math")].map(m => parseFloat(view.getComputedStyle(m).fontSize))),
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


@contextlib.contextmanager
def served(folder: Path, widths: tuple[str, ...] = tuple(WIDTHS)) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine with a folder that holds ``run/report.html``; its address and what was asked of it.

    ``/measure.html`` frames the report at each of the widths, ``/phone.html`` at the phone's alone.
    """
    report = "run/report.html"
    frames = "".join(
        f'<iframe name="{name}" src="{report}" style="width:{width}px;height:900px;border:0"></iframe>'
        for name, width in WIDTHS.items()
        if name in widths
    )
    (folder / "measure.html").write_text(PAGE.replace("FRAMES", frames), encoding="utf-8")
    phone = f'<body style="margin:0"><iframe src="{report}" style="width:{WIDTHS["phone"]}px;height:900px;border:0">'
    (folder / "phone.html").write_text(f'<!doctype html><link rel="icon" href="data:,">{phone}', encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    finally:
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
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


def measured_in(url: str, folder: Path, schemes: tuple[str, ...] = ("light", "dark")) -> dict[str, dict]:
    """What the browser saw of a served report, in each scheme, closed and with every folded part open."""
    found = {}
    for scheme in schemes:
        preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
        done = browse(f"{url}/measure.html", folder, "--dump-dom", preferred)
        text = re.search(r"FOUND(.*)END", done.stdout, flags=re.DOTALL).group(1)
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0").replace("&amp;", "&")
        found |= {f"{scheme} {name}": seen for name, seen in json.loads(text).items()}
        assert "CONSOLE" not in done.stderr, done.stderr
    return found


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = np.array([float(p) for p in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
