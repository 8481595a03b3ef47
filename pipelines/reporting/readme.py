"""Rewrites the results table of a README from a metrics file, so that no figure in it is typed by hand.

    python -m pipelines.reporting.readme docs/results/demo.json README.md [--check | --run runs/demo]

The table stands between the lines ``<!-- results:begin -->`` and ``<!-- results:end -->``. With ``--run`` the metrics
file is taken from a run first, and ``*_run.json`` beside it notes how the run generated its summaries, how long each
stage took, and where.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.precision import processor
from pipelines.reporting.metrics import format_mean, read_metrics, write_metrics, write_text
from pipelines.reporting.run import read_run
from pipelines.reporting.tables import README_MEASURES, markdown_table, results_table, system_label

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def facts_of(run_dir: Path, stamp: Path) -> dict[str, Any]:
    """How a run generated its summaries, and the seconds of its stages and of the installation, and the machine.

    Args:
        run_dir: a run's folder.
        stamp: the file that ``make install`` leaves.
    """
    seconds = {}
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip().isdigit():
        seconds["installation"] = float(stamp.read_text(encoding="utf-8"))
    run = read_run(run_dir)
    seconds |= {stage.name: stage.record["duration_seconds"] for stage in run.stages if stage.finished}
    generation: dict[str, Any] = {}
    for stage in run.of_kind("evaluate"):
        generation |= stage.json("settings.json") or {}
    where = {"processor": processor(), "cores": os.cpu_count()}
    return {"generation": generation, "seconds": seconds, **where, "reference": run.reference}


def facts_lines(facts: Mapping[str, Any]) -> list[str]:
    """The generation settings (of each system, where they differ) and the minutes of each stage, a sentence each."""
    by_settings: dict[str, list[str]] = {}
    for name, settings in facts["generation"].items():
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items())
        by_settings.setdefault(shown, []).append(name)
    lines = [f"Generation of {', '.join(names)}: {shown}.\n" for shown, names in by_settings.items()]
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in facts["seconds"].items())
    total, where = sum(facts["seconds"].values()) / 60, f"{facts['cores']} cores ({facts['processor']})"
    return [*lines, f"What it took, in minutes, on {where}: {total:.1f} in all; {parts}.\n"]


def results_block(metrics: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> str:
    """The Markdown between the marks: the table of systems, the reward model's accuracy, and the facts of the run.

    Raises:
        UserError: if no system was measured.
    """
    table = results_table(metrics, measures=README_MEASURES)
    if table is None:
        raise UserError(
            "metrics",
            f"{len(metrics)} keys",
            "no system was evaluated",
            "give the metrics.json of a run with its evaluation",
        )
    lines = [markdown_table(table)]
    if "reward/accuracy" in metrics:
        lines.append(f"Reward-model accuracy on held-out policy pairs: {format_mean(metrics, 'reward/accuracy')}.\n")
    base = system_label((facts or {}).get("reference") or "sft")
    text = (
        "In brackets: 95 % bootstrap intervals. Gold win rate: share of documents on which the judge (which sees the\n"
    )
    text += f"reference) prefers the system to {base}, a tie counting half."
    lines.append(text + (f" KL: from {base}, over whole sequences.\n" if _has(metrics, "kl") else "\n"))
    if facts is not None:
        lines.extend(facts_lines(facts))
    return "\n".join(lines)


def _has(metrics: Mapping[str, float], measure: str) -> bool:
    return any(key.endswith(f"/{measure}") for key in metrics)


def updated(
    readme: str, metrics: Mapping[str, float], name: str = "README.md", facts: Mapping[str, Any] | None = None
) -> str:
    """The README's text with its block rewritten.

    Raises:
        UserError: if the marks are missing, repeated or in the wrong order, or no system was measured.
    """
    for mark in (BEGIN, END):
        if readme.count(mark) != 1:
            raise UserError("README", name, f"{mark} stands {readme.count(mark)} times in it", "put each mark in once")
    before, rest = readme.split(BEGIN)
    if END not in rest:
        raise UserError("README", name, f"{END} stands before {BEGIN}", "put them in order")
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{results_block(metrics, facts)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the README is up to date, 1 when ``--check`` finds it stale, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.reporting.readme", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="a metrics.json")
    parser.add_argument("readme", type=Path, help="the README with the two marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the table is stale")
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="first take the metrics, settings and times of this run"
    )
    options = parser.parse_args(arguments)
    facts_file = options.metrics.with_name(f"{options.metrics.stem}_run.json")
    try:
        if options.run is not None:
            options.metrics.parent.mkdir(parents=True, exist_ok=True)
            write_metrics(options.metrics, read_metrics(options.run / "metrics.json"))
            write_text(facts_file, json.dumps(facts_of(options.run, Path(".venv/.installed")), indent=1) + "\n")
        metrics = read_metrics(options.metrics)
        facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else None
        try:
            old = options.readme.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                "README", str(options.readme), f"cannot be read ({error.strerror})", "check the path"
            ) from None
        new = updated(old, metrics, str(options.readme), facts)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if new == old:
        return 0
    if options.check:
        print(
            f"{options.readme}: its results are not those of {options.metrics}; run this without --check",
            file=sys.stderr,
        )
        return 1
    write_text(options.readme, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
