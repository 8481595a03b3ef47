"""What the page of every exercise is held to, on a run of it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from pipelines.reporting.markdown import quoted
from pipelines.reporting.report import render
from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.problems import page_text, problems


def assert_page_is_filled(folder: Path) -> str:
    """Every placeholder has its value, figure or table, every one of those is used, and the section is sound.

    Args:
        folder: what an exercise wrote.

    Returns:
        The exercise's section as HTML.
    """
    found = json.loads((folder / "exercise.json").read_text(encoding="utf-8"))
    text = page_text(found["page"])
    assert text.startswith(f"# {found['title']}\n"), found["page"]
    names = quoted(text)
    for kind in ("value", "figure", "table"):
        assert names[kind] == set(found[f"{kind}s"]), f"{kind}s of {found['page']}"
    stage = Stage(found["page"], folder, {"recipe": f"problems/{found['page']}", "state": "finished"})
    run = Run(folder, "x", "", "", 0, (stage,), {})
    (section,) = problems(run)
    html = str(section.body)
    assert "{{" not in html
    assert html.count("<figure>") == len(found["figures"])
    for formula in re.findall(r"<math.*?</math>", html, flags=re.DOTALL):
        assert "\\" not in formula, formula
        ElementTree.fromstring(formula)
    for check in found["checks"]:
        assert check["route"]
        assert check["passed"], check
    assert f"{len(found['checks'])} hold" in html
    assert section.title in render(run)
    return html
