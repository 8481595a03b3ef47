"""Rewrites the results in a document from a file, so that no figure in it is typed by hand.

    python -m pipelines.reporting.readme docs/results/demo.json README.md [--check | --run runs/demo]
    python -m pipelines.reporting.readme docs/results/mnist.json docs/images.md --add --run runs/mnist1

The results stand between the lines ``<!-- results:begin -->`` and ``<!-- results:end -->``; a document with several of
them names each by its file: ``<!-- results:begin prompting -->`` and ``<!-- results:end prompting -->`` for
``prompting.json``. With ``--run`` the file is taken from a run first (of summarization systems, of a comparison of
prompts, of image models, of a sweep of autoencoders or of an exercise), and ``*_run.json`` beside it notes how long
each stage took, and where; of summaries also how they were generated. Several runs of image models or of summaries, one
a seed, each have their own ``--run``; ``--add`` puts them beside those that the file keeps already. The pictures of
what is kept lie in a folder of the file's name beside it.
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
from pipelines.reporting.kept import WITHOUT_STAGES, added, kept, read_kept, results_block
from pipelines.reporting.metrics import write_bytes, write_text
from pipelines.reporting.pictures import picture_names, pictures_of
from pipelines.reporting.run import Run, opened

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


def joined_facts(old: Mapping[str, Any], new: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The means of the seconds over the runs of both, which counts each run once, and the rest as it was.

    Args:
        old, new: as ``facts_of`` gives them.
        file: where the old ones stand.

    Raises:
        UserError: if the two are of different machines, whose minutes have no mean, or of different generation.
    """
    for name in ("processor", "cores", "generation"):
        if old.get(name) != new.get(name):
            problem = f"has {name} {json.dumps(old.get(name))}, the runs to be added have {json.dumps(new.get(name))}"
            mend = "give --leave-minutes" if name != "generation" else "give runs that differ in the seed alone"
            raise UserError("file", file, problem, mend)
    before, more = old.get("runs", 1), new.get("runs", 1)
    seconds = {
        name: round((taken * before + new["seconds"].get(name, taken) * more) / (before + more), 1)
        for name, taken in old["seconds"].items()
    }
    return {**old, "seconds": seconds, "runs": before + more}


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


def _facts_file(results: Path) -> Path:
    return results.with_name(f"{results.stem}_run.json")


def _taken(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """What is kept, the times, and the pictures that are to be written: from the runs, or from the files."""
    file, where = _facts_file(options.results), str(options.results)
    facts = read_kept(file) if file.is_file() and (options.add or not options.run) else {}
    if not options.run:
        content, folder = read_kept(options.results), options.results.with_suffix("")
        for name in picture_names(content):
            if not (folder / name).is_file():
                raise UserError("picture", str(folder / name), "no such file", "give the run once more by --run")
        return content, facts, {}
    runs = [opened(folder) for folder in options.run]
    if options.add:
        content = added(read_kept(options.results), runs, where, clock=not options.leave_minutes)
    else:
        content = kept(runs)
    if not options.leave_minutes:
        taken = facts_of(runs, Path(".venv/.installed"))
        facts = joined_facts(facts, taken, str(file)) if facts else taken
    return content, facts, pictures_of(content, runs)


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
    parser.add_argument("--add", action="store_true", help="keep the runs beside those that the file keeps already")
    parser.add_argument(
        "--leave-minutes",
        action="store_true",
        help="with --add: leave the stages' minutes, and all that the clock measured, as they are (of runs whose "
        "machine others shared)",
    )
    options = parser.parse_args(arguments)
    if options.check and options.run:
        parser.error("--check writes nothing, --run writes the file: give one of them")
    if options.add and not options.run:
        parser.error("--add needs the runs that are to be added: give --run DIR")
    if options.leave_minutes and not options.add:
        parser.error("--leave-minutes is for runs that are added: give --add")
    folder = options.results.with_suffix("")
    try:
        content, facts, pictures = _taken(options)
        shown = Path(os.path.relpath(folder, options.document.parent)).as_posix()
        lines = facts_lines(facts) if facts else []
        block = "\n".join([results_block(content, facts.get("reference") or "sft", shown), *lines])
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
    if options.run:
        for path, value in ((options.results, content), (_facts_file(options.results), facts)):
            if value:
                write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    for name, picture in pictures.items():
        write_bytes(folder / name, picture)
    if options.add and WITHOUT_STAGES in content:
        seeds = ", ".join(map(str, content[WITHOUT_STAGES]))
        same = "settings, steps, parameters and the classifier's measures are the same, other fields"
        compared = f"{same if 'settings' in content else 'those'} could not be compared"
        print(f"{options.results}: keeps no fields of the stages of seed {seeds}; {compared}", file=sys.stderr)
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
