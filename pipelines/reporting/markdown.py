"""Markdown pages with formulas and quoted numbers, as HTML for the report: no script, no network, readable on a phone.

Formulas ``$…$`` and ``$$…$$`` become MathML, which browsers draw themselves. ``{{name}}`` and ``{{name:.3g}}`` quote a
number, in the text and in formulas; a line ``{{figure:name}}`` or ``{{table:name}}`` stands for a figure or a table.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from pipelines.reporting.page import figures, join

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_VALUE = re.compile(r"\{\{([a-z][a-z0-9_]*)(?::([^{}\n]*))?\}\}")
_BLOCK = re.compile(r"^\{\{(figure|table):([a-z][a-z0-9_]*)\}\}[ \t]*$", re.MULTILINE)
_TITLE = re.compile(r"\A\s*# .*\n")
_LETTER = re.compile(r'<(mi|mn) mathvariant="([a-z-]+)">([^<]+)</\1>')
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def quoted(text: str) -> dict[str, set[str]]:
    """The names that a page quotes: ``{"value": …, "figure": …, "table": …}``."""
    found: dict[str, set[str]] = {"value": set(), "figure": set(), "table": set()}
    for kind, name in _BLOCK.findall(text):
        found[kind].add(name)
    found["value"] |= {name for name, _ in _VALUE.findall(_BLOCK.sub("", text))}
    return found


def number_text(value: float, form: str = "") -> str:
    """A number as one reads it: ``1,797``, ``−0.25``, ``1.2·10⁻⁵``, ``12.3 %``, ``∞``.

    Args:
        value: the number.
        form: how it is formatted, as in ``format(value, form)``; empty for whole numbers in full and four digits else.

    Raises:
        ValueError: ``form`` is none.
    """
    mantissa, exponent = _parts(value, form)
    text = mantissa.replace("-", "−").replace("inf", "∞").replace("%", "\u00a0%")
    return f"{text}·10{str(exponent).translate(_SUPERSCRIPTS)}" if exponent is not None else text


def number_latex(value: float, form: str = "") -> str:
    """The same inside a formula."""
    mantissa, exponent = _parts(value, form)
    text = mantissa.replace(",", "{,}").replace("inf", r"\infty").replace("%", r"\,\%")
    # In braces of its own, so that it can be raised to a power.
    return rf"{{{text}\cdot 10^{{{exponent}}}}}" if exponent is not None else text


def _parts(value: float, form: str) -> tuple[str, int | None]:
    """Mantissa and decimal exponent of a formatted number; None where it is written out."""
    if not form and math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}", None
    text = format(value, form or ".4g")
    if not math.isfinite(value):
        return re.sub(r"[^-a-z]", "", text), None
    mantissa, letter, exponent = text.partition("e")
    return mantissa, int(exponent) if letter else None


def filled(text: str, values: Mapping[str, float], written: Callable[[float, str], str] = number_text) -> str:
    """The text with its numbers in place; a name that no value has is left as it stands.

    Args:
        text: with ``{{name}}`` or ``{{name:form}}``.
        values: name -> number.
        written: how a number is written.
    """

    def put(match: re.Match) -> str:
        name, form = match.groups()
        return written(values[name], form or "") if name in values else match.group()

    return _VALUE.sub(put, text)


@cache
def mathml(latex: str, *, display: bool = False) -> str:
    """A formula as MathML.

    Letters of another alphabet (``\\mathbb{E}``, ``\\mathcal{N}``, ``\\mathbf{x}``) become Unicode's own: browsers
    follow ``mathvariant`` no more, except to ``normal`` (MathML Core, section 2.1.1).

    Args:
        latex: the formula without its dollars.
        display: whether it stands in a line of its own.
    """
    from latex2mathml.converter import convert

    made = convert(latex, display="block" if display else "inline")
    return _LETTER.sub(lambda m: m.group() if m[2] == "normal" else f"<{m[1]}>{_styled(m[3], m[2])}</{m[1]}>", made)


def _styled(text: str, variant: str) -> str:
    """The mathematical alphanumerics of a variant (``double-struck``), where Unicode has them."""
    style = variant.upper().replace("BOLD-", "BOLD ").replace("SANS-SERIF-", "SANS-SERIF ")
    return "".join(_letter(letter, style) for letter in html.unescape(text))


def _letter(letter: str, style: str) -> str:
    name = unicodedata.name(letter, "").removeprefix("LATIN ").removeprefix("GREEK ").replace("LETTER ", "")
    older = {"FRAKTUR": "BLACK-LETTER"}.get(style, style)  # a few were there before the block of the others
    for candidate in (f"MATHEMATICAL {style} {name}", f"{older} {name}"):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return letter


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    dollarmath_plugin(parser, allow_space=False, allow_labels=False)
    rules = {
        "text": lambda self, tokens, i, options, env: html.escape(filled(tokens[i].content, env["values"])),
        "math_inline": lambda self, tokens, i, options, env: _formula(tokens[i].content, env["values"], display=False),
        "math_block": lambda self, tokens, i, options, env: _formula(tokens[i].content, env["values"], display=True),
        "heading_open": lambda self, tokens, i, options, env: f"<{_lower(tokens[i].tag)}>",
        "heading_close": lambda self, tokens, i, options, env: f"</{_lower(tokens[i].tag)}>\n",
        "table_open": lambda self, tokens, i, options, env: '<div class="scroll" tabindex="0"><table class="text">',
        "table_close": lambda self, tokens, i, options, env: "</table></div>\n",
    }
    for name, rule in rules.items():
        parser.add_render_rule(name, rule)
    return parser


def _formula(latex: str, values: Mapping[str, float], *, display: bool) -> str:
    made = mathml(filled(latex.strip(), values, number_latex), display=display)
    # A formula wider than a phone scrolls in a box of its own.
    return (
        f'<div class="scroll formula" role="region" tabindex="0" aria-label="formula">{made}</div>\n'
        if display
        else made
    )


def _lower(tag: str) -> str:
    """A page's own headings stand under the section's, which is an h2."""
    return f"h{min(int(tag[1]) + 1, 6)}"


def rendered(text: str, values: Mapping[str, float], blocks: Mapping[tuple[str, str], Markup]) -> Markup:
    """A page as HTML. Raw HTML in it is shown as text; its title (a first line ``# …``) is left to the section.

    Args:
        text: the page.
        values: the numbers that it quotes; a name that is missing is shown as it was written.
        blocks: ``("figure", name)`` or ``("table", name)`` -> what stands there; one that is missing is left out.
    """
    return join([Markup('<div class="page">'), *_pieces(_TITLE.sub("", text), values, blocks), Markup("</div>")])


def _pieces(text: str, values: Mapping[str, float], blocks: Mapping[tuple[str, str], Markup]) -> Iterator[Markup]:
    drawn: list[Markup] = []  # figures that follow one another stand side by side where there is room
    start = 0
    for match in [*_BLOCK.finditer(text), None]:
        between = text[start : match.start() if match else len(text)].strip()
        if between or not match or match[1] == "table":
            yield figures(drawn)
            drawn = []
        if between:
            yield Markup(_parser().render(between, {"values": values}))
        if match:
            block = blocks.get((match[1], match[2]))
            if block is not None and match[1] == "figure":
                drawn.append(block)
            elif block is not None:
                yield block
            start = match.end()
