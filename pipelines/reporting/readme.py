"""Rewrites the results in a document from a file, so that no figure in it is typed by hand.

    python -m pipelines.reporting.readme docs/results/demo.json README.md [--check | --run runs/demo]

The results stand between the lines ``<!-- results:begin -->`` and ``<!-- results:end -->``; a document with several of
them names each by its file: ``<!-- results:begin prompting -->`` and ``<!-- results:end prompting -->`` for
``prompting.json``. With ``--run`` the file is taken from a run first (of summarization systems, of a comparison of
prompts, of image models or of an exercise), and ``*_run.json`` beside it notes how long each stage took, and where; of
summaries also how they were generated. Several runs of image models or of summaries, one a seed, each have their own
``--run``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.precision import processor
from pipelines.reporting.kept import kept, opened, read_kept, results_block
from pipelines.reporting.metrics import write_text
from pipelines.reporting.run import Run

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def facts_of(runs: Sequence[Run], stamp: Path) -> dict[str, Any]:
    """The seconds of the stages (of several runs their means), and the machine.

    Where summaries were evaluated, also how they were generated, and the seconds of the installation.

    Args:
        runs: at least one; several are runs of the same chain.
        stamp: the file that ``make install`` leaves.
    """
    facts: dict[str, Any] = {}
    seconds = {}
    first = runs[0]
    if evaluations := first.of_kind("evaluate"):
        facts["generation"] = {}
        for stage in evaluations:
            facts["generation"] |= stage.json("settings.json") or {}
        if stamp.is_file() and stamp.read_text(encoding="utf-8").strip().isdigit():
            seconds["installation"] = float(stamp.read_text(encoding="utf-8"))
    for stages in zip(*(run.stages for run in runs), strict=True):
        if all(stage.finished for stage in stages):
            taken = [stage.record["duration_seconds"] for stage in stages]
            seconds[stages[0].name] = round(sum(taken) / len(taken), 1)
    facts |= {"seconds": seconds, "processor": processor(), "cores": os.cpu_count()}
    if evaluations:
        facts["reference"] = first.reference
    return facts | ({"runs": len(runs)} if len(runs) > 1 else {})


def facts_lines(facts: Mapping[str, Any]) -> list[str]:
    """The generation settings (of each system, where they differ) and the minutes of each stage, a sentence each."""
    by_settings: dict[str, list[str]] = {}
    for name, settings in facts.get("generation", {}).items():
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items())
        by_settings.setdefault(shown, []).append(name)
    lines = [f"Generation of {', '.join(names)}: {shown}.\n" for shown, names in by_settings.items()]
    seconds = facts["seconds"]
    minutes = [f"{name} {taken / 60:.1f}" for name, taken in seconds.items()]
    total, where = sum(seconds.values()) / 60, f"{facts['cores']} cores ({facts['processor']})"
    what = f"What a run took, in minutes (mean of {facts['runs']})" if "runs" in facts else "What it took, in minutes"
    shown = f"{total:.1f} in all; {', '.join(minutes)}" if len(minutes) > 1 else f"{total:.1f}"
    return [*lines, f"{what}, on {where}: {shown}.\n"]


def marks(text: str, name: str) -> tuple[str, str]:
    """The lines between which the results of ``name`` stand in a document: named ones where it has them."""
    named = f"<!-- results:begin {name} -->", f"<!-- results:end {name} -->"
    return named if any(mark in text for mark in named) else (BEGIN, END)


def updated(text: str, name: str, block: str, where: str = "README.md") -> str:
    """A document's text with its results rewritten.

    Args:
        text: the document.
        name: that of the results, by which its marks may go.
        block: what shall stand between them.
        where: what the document is called.

    Raises:
        UserError: if the marks are missing, repeated or in the wrong order.
    """
    begin, end = marks(text, name)
    for mark in (begin, end):
        if text.count(mark) != 1:
            mend = f"put each mark in once; one of several results is named: <!-- results:begin {name} -->"
            raise UserError("document", where, f"{mark} stands {text.count(mark)} times in it", mend)
    before, rest = text.split(begin)
    if end not in rest:
        raise UserError("document", where, f"{end} stands before {begin}", "put them in order")
    return f"{before}{begin}\n\n{block}\n{end}{rest.split(end)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the document is up to date, 1 when ``--check`` finds it stale, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.reporting.readme", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the file of the results, such as docs/results/demo.json")
    parser.add_argument("document", type=Path, help="the document with the two marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the results are stale")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        action="append",
        help="first take the results and times of this run; several times for runs that differ in the seed alone",
    )
    options = parser.parse_args(arguments)
    if options.check and options.run:
        parser.error("--check writes nothing, --run writes the file: give one of them")
    facts_file = options.results.with_name(f"{options.results.stem}_run.json")
    written = {}
    try:
        if options.run:
            runs = [opened(folder) for folder in options.run]
            content, facts = kept(runs), facts_of(runs, Path(".venv/.installed"))
            written = {options.results: content, facts_file: facts}
        else:
            content = read_kept(options.results)
            facts = read_kept(facts_file) if facts_file.is_file() else {}
        block = "\n".join(
            [results_block(content, facts.get("reference") or "sft"), *(facts_lines(facts) if facts else [])]
        )
        try:
            old = options.document.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                "document", str(options.document), f"cannot be read ({error.strerror})", "check the path"
            ) from None
        new = updated(old, options.results.stem, block, str(options.document))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for path, value in written.items():
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    if new == old:
        return 0
    if options.check:
        print(
            f"{options.document}: its results are not those of {options.results}; run this without --check",
            file=sys.stderr,
        )
        return 1
    write_text(options.document, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
