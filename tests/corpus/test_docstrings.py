"""Reading docstrings with ast: what becomes a pair, and what does not."""

import ast
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.docstrings import cut, first_sentence, is_summary, name_words, pairs_of, plain

SOURCE = b'''
"""Module text."""
import nothing_like_this_exists

class Tree(Base):
    """A rooted tree whose nodes keep the order of their children.

    More about it.
    """
    limit = 3

    def prune(self, depth: int) -> "Tree":
        """Cut off every branch
        that grows below the given level. And more.
        """
        def inner(x):
            """A helper that nobody shall see in the document."""
            return x
        kept = [inner(c) for c in self.children if c.level < depth]
        return Tree(kept)

    @property
    def height(self):
        """Number of edges on the longest path down to a leaf"""
        return max((c.height + 1 for c in self.children), default=0)

    @register("Replace the old key by another one in place")
    def rename(self, old, new):
        """Give another label to all nodes that carry the old one."""
        self.labels = {k: new if v == old else v for k, v in self.labels.items()}

if True:
    async def fetch(url, retries=3):
        """Load the page and try again when the line breaks."""
        return await client.get(url, retries)
'''


def test_pairs_hold_name_code_and_the_human_line():
    pairs = {pair.name: pair for pair in pairs_of(SOURCE, "pkg.mod")}
    assert list(pairs) == [
        "pkg.mod.Tree", "pkg.mod.Tree.prune", "pkg.mod.Tree.height", "pkg.mod.Tree.rename", "pkg.mod.fetch",
    ]  # fmt: skip
    prune = pairs["pkg.mod.Tree.prune"]
    assert prune.summary == "Cut off every branch that grows below the given level."
    assert prune.document.splitlines()[:2] == ["pkg.mod.Tree.prune", 'def prune(self, depth: int) -> "Tree":']
    assert prune.document.splitlines()[-1] == "    return Tree(kept)"
    assert pairs["pkg.mod.Tree.height"].summary.endswith("a leaf.")
    assert pairs["pkg.mod.Tree.height"].document.splitlines()[1] == "@property"
    assert "limit = 3" in pairs["pkg.mod.Tree"].document
    # A decorator that is called may carry the documentation itself.
    assert "Replace the old" not in pairs["pkg.mod.Tree.rename"].document
    # No docstring, its own or another's, is part of any document.
    for pair in pairs.values():
        for text in ("Cut off", "nobody", "Number of edges", "A rooted", "Give another"):
            assert text not in pair.document
        ast.parse(pair.document.partition("\n")[2])


@pytest.mark.parametrize(
    "body",
    [
        "    pass",
        "    ...",
        "    raise NotImplementedError('later')",
        "",
    ],
)
def test_stubs_say_nothing_to_summarize(body):
    code = f'def walk_through(tree, order):\n    """Visit all nodes in the order asked for."""\n{body}\n'
    assert pairs_of(code.encode(), "m") == []


HEAD = b'def walk(nodes, seen):\n    """Visit all nodes in the order asked for."""\n'
BODY = b"    return [node for node in nodes if node not in seen]\n"


def test_the_file_that_those_below_spoil_has_a_pair():
    assert len(pairs_of(HEAD + BODY, "m")) == 1


@pytest.mark.parametrize(
    "source",
    [
        HEAD.replace(b"seen)", b"seen") + BODY,
        HEAD + BODY.replace(b"node", b"n\xff", 1),
        HEAD.replace(b"nodes in", "nœuds in".encode()) + BODY,
        b"# Automatically generated: DO NOT EDIT\n" + HEAD + BODY,
        b'def walk(nodes, seen): """Visit all nodes in the order asked for."""; ' + BODY.strip(),
        HEAD + b"    # visit all nodes, in the order asked for\n" + BODY,
        HEAD + BODY + b"y = " + b"(" * 3000 + b")" * 3000,
    ],
    ids=["syntax", "encoding", "not ASCII", "generated", "one line", "repeated in a comment", "too deep"],
)
def test_files_without_usable_pairs(source):
    assert pairs_of(source, "m") == []


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum.", "Return the sum."),
        ("\n    Return the\n    weighted sum.\n\n    Long text.", "Return the weighted sum."),
        ("Read, e.g. from a file. Close it.", "Read, e.g. from a file."),
        ("Build a :class:`~pkg.Tree` from ``pairs`` of *keys*.", "Build a Tree from pairs of keys."),
        ("Use `this page <http://x.org>`_ now.", "Use this page now."),
        ("See the [`Trainer`] class.", "See the Trainer class."),
        ("The \u201cquoted\u201d word\u2014here.", 'The "quoted" word-here.'),
        ("A sum-of-\n    products form.", "A sum-of-products form."),
        ("Short title\n-----------\nMore.", "Short title"),
        ("List of names\n- one\n- two", "List of names"),
        ("Find it.\nParameters\n    x: int", "Find it."),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    "text",
    [
        "Return it.",
        "Deprecated: use the other function instead of this.",
        "See the documentation of the base class.",
        "TODO write down what this function does.",
        "add(a, b) gives the sum of both.",
        "Parameters: the first and the second number.",
        "Gibt die Größe der Datei in Bytes zurück.",
        "Get the name of item.",
        "Same as the other one but faster here.",
        "Compute x = y + z for all of them.",
        "Read https://example.org for how it works.",
        "one two three four five six seven " * 5,
        "Template for {name} of all the things.",
        "Auto-generated wrapper of the native call here.",
        "This sentence ends in the middle of:",
    ],
)
def test_noise_is_no_summary(text):
    assert not is_summary(text, "pkg.get_item_name")


@pytest.mark.parametrize("text", ["Return the label that the user gave to a node.", "Whether all of the files exist."])
def test_human_lines_are_summaries(text):
    assert is_summary(text, "pkg.get_item_name")


def test_name_words():
    assert name_words("a.b.getHTTPServer_name2") == ["get", "http", "server", "name", "2"]


@given(st.text(string.ascii_letters + " \n", max_size=200), st.integers(1, 60))
def test_cut_keeps_a_prefix_of_whole_lines(text, size):
    short = cut(text, size)
    assert len(short) <= max(size, len(text) if len(text) <= size else 0)
    assert text.startswith(short)
    if short != text and "\n" in text[: size + 1].strip("\n"):
        assert text[len(short) :].lstrip(" ").startswith("\n") or short == text[:size].rstrip()


@given(st.text(max_size=120))
def test_plain_is_one_line_and_never_fails(text):
    shown = plain(text)
    assert "\n" not in shown
    assert shown == " ".join(shown.split())
