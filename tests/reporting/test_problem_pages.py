"""The problem set's pages: Markdown, formulas and quoted numbers as HTML, and every page in a real browser."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import WIDTHS, contrast, measured_in, needs_browser, served
from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.markdown import mathml, number_latex, number_text, quoted, rendered
from pipelines.reporting.report import write_report
from pipelines.reporting.sections.problems import page_text
from pipelines.share import shared_folder

PAGES = sorted(path.stem for path in shared_folder("docs/problems").glob("*.md"))


@pytest.mark.parametrize(
    ("value", "form", "text", "latex"),
    [
        (1797, "", "1,797", "1{,}797"),
        (200000.0, "", "200,000", "200{,}000"),
        (0.123456, "", "0.1235", "0.1235"),
        (-0.25, ".3f", "−0.250", "-0.250"),
        (1.26e-5, ".2g", "1.3·10⁻⁵", r"{1.3\cdot 10^{-5}}"),
        (3e300, ".0e", "3·10³⁰⁰", r"{3\cdot 10^{300}}"),
        (0.123, ".1%", "12.3\u00a0%", r"12.3\,\%"),
        (float("inf"), ".3g", "∞", r"\infty"),
        (float("-inf"), "", "−∞", r"-\infty"),
        (0.0, "", "0", "0"),
    ],
)
def test_numbers_as_one_reads_them(value, form, text, latex):
    assert number_text(value, form) == text
    assert number_latex(value, form) == latex


def test_a_page_quotes_numbers_in_text_and_in_formulas():
    text = "# Title\n\n## Part\n\nIt is {{one:.2f}}, $x = {{two_more}}$, `{{one}}`, {{none}}.\n\n$$y^{ {{one}} }$$\n"
    html = str(rendered(text, {"one": -1.5, "two_more": 3}, {}))
    assert "Title" not in html  # the section has it
    assert "<h3>Part</h3>" in html
    assert "It is −1.50, <math" in html
    assert "<mn>3</mn>" in html
    assert "<code>{{one}}</code>, {{none}}." in html
    assert re.search(r'<div class="scroll formula".*?display="block".*?<mn>1.5</mn>', html, flags=re.DOTALL)
    assert quoted(text) == {"value": {"one", "two_more", "none"}, "figure": set(), "table": set()}


def test_figures_that_follow_one_another_stand_side_by_side():
    text = "a\n\n{{figure:one}}\n{{figure:two}}\n\nb\n\n{{table:t}}\n\n{{figure:three}}\n{{figure:gone}}\n"
    blocks = {("figure", name): Markup(f"<figure>{name}</figure>") for name in ("one", "two", "three")}
    html = str(rendered(text, {}, blocks | {("table", "t"): Markup("<table></table>")}))
    assert html.count('<div class="figures">') == 2
    assert re.search(r'<div class="figures"><figure>one</figure>\s*<figure>two</figure></div>', html)
    assert html.index("two") < html.index("<p>b</p>") < html.index("<table>") < html.index("three")
    assert quoted(text) == {"value": set(), "figure": {"one", "two", "three", "gone"}, "table": {"t"}}


def test_markup_in_a_page_is_text():
    html = str(
        rendered("<script>x</script> {{a}}\n\n<div>y</div>\n\n| a | b |\n|---|---|\n| 1 | $x$ |\n", {"a": 1}, {})
    )
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;div&gt;" in html
    assert '<div class="scroll" tabindex="0"><table class="text">' in html


@pytest.mark.parametrize(
    ("latex", "letter"),
    [
        (r"\mathbb{E}", "𝔼"),
        (r"\mathbb{R}", "ℝ"),
        (r"\mathcal{N}", "𝒩"),
        (r"\mathcal{L}", "ℒ"),
        (r"\mathbf{x}", "𝐱"),
        (r"\mathbf{1}", "𝟏"),
        (r"\boldsymbol{\theta}", "𝜽"),
    ],
)
def test_letters_of_other_alphabets(latex, letter):
    made = mathml(latex)
    assert letter in "".join(ElementTree.fromstring(made).itertext())
    assert "mathvariant" not in made


def test_every_formula_of_every_page_is_well_formed():
    """No command is left that the converter does not know; signs of comparison are no markup."""
    assert len(PAGES) >= 6
    for page in PAGES:
        text = page_text(page)
        names = quoted(text)
        html = str(rendered(text, dict.fromkeys(names["value"], 0.125), {}))
        assert "{{" not in re.sub(r"<code>.*?</code>", "", html), page
        assert "$" not in re.sub(r"<(code|pre)>.*?</\1>", "", html, flags=re.DOTALL), page
        found = re.findall(r"<math.*?</math>", html, flags=re.DOTALL)
        assert found, page
        for formula in found:
            tree = ElementTree.fromstring(formula)
            assert "\\" not in "".join(tree.itertext()), (page, formula)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A report of every page there is, its numbers, figures and tables made up."""
    folder = tmp_path_factory.mktemp("pages")
    box = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 324 190" role="img" aria-label="a">'
    drawn = box + '<text id="t" x="9" y="20" font-size="10" fill="var(--ink)">label</text></svg>'
    for page in PAGES:
        names = quoted(page_text(page))
        stage = folder / "run" / page
        (stage / "figures").mkdir(parents=True)
        figures = {}
        for name in sorted(names["figure"]):
            (stage / "figures" / f"{name}.svg").write_text(plots.prefixed(drawn, name))
            figures[name] = {"file": f"figures/{name}.svg", "caption": "A line.", "title": name}
        table = {"columns": ["What", "how much", "why"], "rows": [["this", 1.5, "because"]] * 2, "caption": "Made up."}
        check = {"statement": "E[x_t | x_0] = √α_t x_0 " * 3, "found": 0.5, "expected": "inf", "tolerance": 1e-9}
        checks = [check | {"route": "a simulation of 200,000 chains, tolerance 4 standard errors", "passed": False}]
        found = {"page": page, "title": f"The page {page}", "values": dict.fromkeys(names["value"], -12345.678)}
        found |= {"figures": figures, "tables": dict.fromkeys(names["table"], table), "checks": checks}
        (stage / "exercise.json").write_text(json.dumps(found))
        record = {"stage": page, "recipe": f"problems/{page}", "state": "finished", "config": {}, "fingerprint": "0"}
        metrics = {f"{page}/checks": 1.0, f"{page}/checks_failed": 1.0, f"{page}/other": 0.5}
        (stage / "stage.json").write_text(json.dumps(record | {"metrics": metrics}))
    (folder / "run" / "run.json").write_text(json.dumps({"name": "pages", "stages": PAGES}))
    write_report(folder / "run")
    with served(folder, ("phone",)) as (url, _):
        yield url, folder


@pytest.fixture(scope="module")
def seen(site: tuple[str, Path]) -> dict[str, dict]:
    """What the browser saw."""
    return measured_in(*site, schemes=("light",))


@needs_browser
def test_formulas_and_tables_are_readable_on_a_phone(seen: dict[str, dict]) -> None:
    """What is wider than the screen scrolls inside its own box; letters are no smaller than the text's."""
    for where, page in seen.items():
        assert page["width"] == WIDTHS[where.split()[1].removesuffix("-open")]
        assert page["scroll"] <= page["width"], (where, page["wide"])
        assert page["wide"] == [], where
        assert page["lost"] == [], where
        assert page["formulas"] > 30
        assert page["formula"] >= 15, where  # px of the letters' size


@needs_browser
def test_nothing_is_fetched_and_ids_are_unique(seen: dict[str, dict]) -> None:
    for page in seen.values():
        assert page["fetched"] == []
        assert page["scripts"] == 0
        assert page["ids"] == []
        assert contrast(*page["body"]) >= 7


@needs_browser
def test_the_order_is_that_of_the_chain_and_failures_are_told(seen: dict[str, dict]) -> None:
    text = seen["light phone"]["text"]
    # each title stands in the contents and as a heading
    places = [text.rindex(f"The page {page}\n") for page in PAGES]
    assert places == sorted(places)
    assert f"{PAGES[0]}: 1 of its 1 checked statements do not hold." in text
    assert "1 of 1 do not hold." in text
    assert "✗ E[x_t | x_0]" in text
    assert f"of {len(PAGES)}" in text


def test_every_page_has_its_exercise_a_place_in_the_chains_and_a_test(root: Path) -> None:
    """The tests of the exercises hold each page to its values; ``all`` has what the sets have, no more."""
    folder = shared_folder("recipes") / "problems"
    chains = {file.stem: yaml.safe_load(file.read_text())["stages"] for file in folder.glob("*.yaml")}
    names = {chain: {table["recipe"] for table in stages.values()} for chain, stages in chains.items()}
    exercises = {f"problems/{page}" for page in PAGES}
    assert exercises == {f"problems/{file.stem}" for file in folder.glob("*.py")}
    assert exercises == {name for name in names["all"] if name.startswith("problems/")}
    sets = [recipes for chain, recipes in names.items() if chain != "all"]
    assert exercises == {name for recipes in sets for name in recipes if name.startswith("problems/")}
    tests = [file.read_text() for file in (root / "tests" / "problems").glob("test_*.py")]
    held = [text for text in tests if "assert_page_is_filled(" in text]
    for page in PAGES:
        assert any(f"pipelines.problems.{page} import" in text for text in held), page
