"""Documented definitions of Python source files, read with ``ast``: nothing is imported and no code runs.

One definition (function, method or class) gives one pair: the document is its qualified name, signature and body
without docstrings; the summary is the first sentence its author wrote in the docstring (PEP 257's summary line).
"""

from __future__ import annotations

import ast
import gc
import json
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent

MAX_DOCUMENT_CHARACTERS = 1000
"""A document is cut after the last whole line within this many characters."""

MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS = 4, 30
MIN_BODY_CHARACTERS = 40
MIN_TEXT_WORDS = 5


@dataclass(frozen=True)
class Pair:
    """A documented definition.

    Args:
        name: qualified name, ``package.module.Class.method``.
        document: the name, then signature and body without docstrings.
        summary: the human first sentence of the docstring.
    """

    name: str
    document: str
    summary: str


# --- the human line -----------------------------------------------------------------------------------------------

_ROLE = re.compile(r":(?:[a-zA-Z]+:)?[a-zA-Z-]+:`~?!?\.?([^`<>]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"\[`?([^\[\]`]+)`?\](?:\([^()\s]*\)|\[[^\[\]]*\])?(?=[\s.,;:)]|$)")
_HYPERLINK = re.compile(r"`([^`<>]+?)\s*<[^`<>]*>`__?")
_TICKS = re.compile(r"`+([^`]+)`+_{0,2}")
_STARS = re.compile(r"(?<![\w*])(\*{1,2})([^\s*](?:[^*]*[^\s*])?)\1(?![\w*])")
_SENTENCE_END = re.compile(
    r"(?<=[\w)\"'][.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\bcf\.)(?<!w\.r\.t\.)(?<!\bresp\.)(?<!\beg\.)"
    r"(?<!\bie\.)(?<!\bapprox\.)(?<!\bno\.)(?<!\beq\.)(?<!\bfig\.)(?<!\b[A-Z]\.)\s+(?=[A-Za-z])"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# What is not a summary: notices, cross-references, section heads, field lists, templates, markup that survived.
_NOISE = re.compile(
    r"""deprecated|discouraged|docstring|\bnot\ implemented|\bfor\ internal\ use|\bsame\ as\b|\binherit(?:s|ed)?\ doc
    |\b(?:todo|fixme|xxx)\b|auto-?generated|automatically\ generated|do\ not\ (?:edit|call|use)
    |^(?:see|refer)\b|\bsee\ (?:also|the\ doc|class|base|super|parent|above|below|method|function|documentation)
    |\bsee\ for\ (?:details|more)
    |^(?:alias|synonym|wrapper|shortcut|shorthand|equivalent|same|like|identical|similar|analogous)\b
    |^(?:inherit\w*|overrid\w*|copied|adapted|taken|borrowed|modified)\b|\btemporarily\b
    |^(?:args?|arguments|param\w*|returns?|raises?|yields?|notes?|examples?|usage|attributes|warning)\s*:
    |^(?:internal|private|abstract)\s*:|^(?:not\ implemented|no-?op|placeholder|stub|dummy|mixin|helper)\b
    |^tests?\b|^(?:copyright|license)|^constructor\b|^create\ and\ return\ a\ new\ object
    |^initiali[sz](?:e|es|er)\s+(?:self|the\ (?:class|object|instance)|an?\ (?:new\ )?instance)
    |https?://|www\.|>>>|\.\.\s|::|@\w|\{|\}|<|>|\\|\$|\||==|\[|\]|\#|%\(|`|\*\*|->|=>|\s=\s|--|__|\.\.\.|~|\^""",
    re.IGNORECASE | re.VERBOSE,
)
_SIGNATURE = re.compile(r"^[\w.]+\s?\(|\b\w+\((?:[^)]*,[^)]*)\)")
_FIELD = re.compile(r"^:?\w+\s*:(?:\s|$)|^:\w+")


def plain(text: str) -> str:
    """``text`` with reStructuredText and Markdown inline markup taken off and white space made single."""
    text = _HYPERLINK.sub(r"\1", _ROLE.sub(lambda m: m.group(1).rsplit(".", 1)[-1], text))
    text = _LINK.sub(r"\1", text)
    text = _STARS.sub(r"\2", _TICKS.sub(r"\1", text))
    text = unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY)
    return " ".join(text.split())


_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2011": "-"}
)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph of ``docstring``, as plain text; empty where there is none."""
    paragraph = []
    for line in docstring.strip().splitlines():
        line = line.strip()
        if not line or set(line) <= set("=-~*^"):
            break
        # A list, a field list or a doctest right under the first line is not part of its sentence.
        if paragraph and re.match(
            r"[-*+•]\s|:\w+|@\w+|>>>|\d+[.)]\s|\.\.\s|\w+\s*:\s*$|(?:Args|Returns|Parameters)\b", line
        ):
            break
        paragraph.append(line)
    # A word broken at the end of a line ("sum-of-" / "products") is one word again.
    joined = re.sub(r"(?<=[A-Za-z]-)\n(?=[a-z])", "", "\n".join(paragraph))
    return _SENTENCE_END.split(plain(joined), maxsplit=1)[0]


def name_words(name: str) -> list[str]:
    """The words of the last part of a qualified name, in lower case: ``a.b.getItem_2`` -> ``get item 2``."""
    return [word.lower() for word in _NAME_WORD.findall(name.rsplit(".", 1)[-1])]


def _stem(word: str) -> str:
    for suffix in ("ing", "ies", "ed", "es", "s", "e"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


# fmt: off
_EMPTY_WORDS = frozenset((
    "a", "an", "the", "this", "that", "it", "its", "of", "for", "to", "in", "on", "with", "from", "by", "as", "at",
    "and", "or", "is", "be", "return", "get", "set", "class", "method", "function",
))
# fmt: on


def is_summary(text: str, name: str) -> bool:
    """Whether ``text`` is a sentence that a person wrote about the definition ``name``, and says more than the name."""
    words = _WORD.findall(text)
    if not MIN_SUMMARY_WORDS <= len(words) <= MAX_SUMMARY_WORDS or len(text) > 220:
        return False
    if not text.isascii() or not text[0].isalpha() or text.endswith((":", ",", ";", "-", "(")):
        return False
    if _NOISE.search(text) or _SIGNATURE.search(text) or _FIELD.search(text):
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.85 * len(text) or text.isupper():
        return False
    if text.count("(") != text.count(")") or text.count('"') % 2:
        return False
    meaning = {_stem(w.lower()) for w in words} - {_stem(w) for w in _EMPTY_WORDS}
    return len(meaning - {_stem(w) for w in name_words(name)}) >= 2


# --- the document ---------------------------------------------------------------------------------------------------

_GENERATED = re.compile(rb"automatically generated|auto-?generated|@generated|do not edit", re.IGNORECASE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _docstring_node(node: ast.AST) -> ast.Expr | None:
    if not isinstance(node, _DEFINITIONS) or not node.body:
        return None
    first = node.body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text else None


def _is_stub(node: ast.AST) -> bool:
    """Whether a function does nothing that could be summarized (``pass``, ``...``, ``raise NotImplementedError``)."""
    if isinstance(node, ast.ClassDef):
        return False
    rest = [s for s in node.body[1:] if not isinstance(s, ast.Pass)]
    if not rest:
        return True
    only = rest[0]
    if len(rest) > 1:
        return False
    if isinstance(only, ast.Raise) and only.exc is not None:
        return "NotImplemented" in ast.dump(only.exc)
    return isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements and clauses right under ``node``; ``ast.walk`` would visit every expression too."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, part, None)
        if isinstance(inner, list):
            yield from inner


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Every documented definition at module or class level, with its qualified name (nested functions are left out)."""
    for child in _statements(node):
        if isinstance(child, _DEFINITIONS):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _definitions(child, prefix)


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and every definition nested in its statements."""
    if isinstance(node, _DEFINITIONS):
        yield node
    for child in _statements(node):
        yield from _within(child)


def _removed_lines(node: ast.AST) -> set[int] | None:
    """Line numbers of all docstrings within ``node``; None where a docstring shares its line with code."""
    removed: set[int] = set()
    for inner in _within(node):
        text = _docstring_node(inner)
        if text is None:
            continue
        if text.lineno == inner.lineno or (len(inner.body) > 1 and inner.body[1].lineno <= text.end_lineno):
            return None
        removed.update(range(text.lineno, text.end_lineno + 1))
    return removed


def _code(node: ast.AST, lines: list[str]) -> str | None:
    removed = _removed_lines(node)
    if removed is None:
        return None
    # A call as decorator often carries the documentation itself (templates, substitutions): only plain names stay.
    start = node.lineno
    for decorator in reversed(node.decorator_list):
        if not isinstance(decorator, (ast.Name, ast.Attribute)) or decorator.lineno != start - 1:
            break
        start = decorator.lineno
    kept = [lines[i - 1] for i in range(start, node.end_lineno + 1) if i not in removed]
    text = dedent("\n".join(line.rstrip() for line in kept if line.strip()).expandtabs(4))
    return text


def cut(text: str, characters: int) -> str:
    """``text`` up to the last whole line within ``characters`` (a longer first line is cut within)."""
    if len(text) <= characters:
        return text
    end = text.rfind("\n", 0, characters + 1)
    return text[: end if end > 0 else characters].rstrip()


def pairs_of(source: bytes, module: str, max_characters: int = MAX_DOCUMENT_CHARACTERS) -> list[Pair]:
    """The pairs of one Python file, in the order in which they stand in it.

    Args:
        source: the file's content; a file that this Python cannot parse gives no pair.
        module: its dotted module name.
        max_characters: documents are cut after the last whole line within this many characters.
    """
    tree = _parsed(source)
    if tree is None:
        return []
    lines = _text(source).split("\n")
    pairs = []
    for name, node in _definitions(tree, module):
        node_text = _docstring_node(node)
        if node_text is None or _is_stub(node):
            continue
        summary = first_sentence(node_text.value.value)
        if not is_summary(summary, name):
            continue
        code = _code(node, lines)
        if code is None or not code.isascii() or len(code) < MIN_BODY_CHARACTERS or _repeats(code, summary):
            continue
        if summary[-1].isalnum():
            summary += "."
        pairs.append(Pair(name, cut(f"{name}\n{code}", max_characters), summary[0].upper() + summary[1:]))
    return pairs


def _repeats(code: str, summary: str) -> bool:
    """Whether the summary stands word for word in the code (a comment, a message, a ``help=``)."""
    return " ".join(_WORD.findall(summary.lower())) in " ".join(_WORD.findall(code.lower()))


def texts_of(source: bytes, module: str) -> list[list[str]]:
    """``[qualified name, text]`` of every docstring of one Python file, whole, with its indentation taken off.

    Modules, classes and functions count, nested and private ones too; those of fewer than ``MIN_TEXT_WORDS`` words say
    nothing. What is generated or cannot be parsed gives none, as in ``pairs_of``.
    """
    tree = _parsed(source)
    if tree is None:
        return []
    found = []
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        text = ast.get_docstring(node) if isinstance(node, (ast.Module, *_DEFINITIONS)) else None
        if text and len(text.split()) >= MIN_TEXT_WORDS:
            found.append([name, text.strip()])
        for child in reversed(list(_statements(node))):
            stack.append((f"{name}.{child.name}" if isinstance(child, _DEFINITIONS) else name, child))
    return found


def _parsed(source: bytes) -> ast.Module | None:
    """The syntax tree of a file that holds docstrings people wrote; None of any other."""
    if (b'"""' not in source and b"'''" not in source) or _GENERATED.search(source[:2000]):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(_text(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _text(source: bytes) -> str:
    return source.decode("utf-8-sig").replace("\r\n", "\n").replace("\f", " ")


def _main() -> None:
    """Worker: ``[[path, module], …]`` as JSON on stdin; for each, a JSON list of its pairs as one line on stdout.

    With the argument ``texts``: of its docstrings.
    """
    read = texts_of if sys.argv[1:] == ["texts"] else _rows
    # Syntax trees hold no cycles, and the collector would walk their millions of nodes again and again.
    gc.disable()
    for path, module in json.load(sys.stdin):
        try:
            with open(path, "rb") as file:
                source = file.read()
        except OSError:
            source = b""
        print(json.dumps(read(source, module)), flush=True)


def _rows(source: bytes, module: str) -> list[list[str]]:
    return [[pair.name, pair.document, pair.summary] for pair in pairs_of(source, module)]


if __name__ == "__main__":
    _main()
