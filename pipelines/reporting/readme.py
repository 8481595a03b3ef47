"""Rewrites the results table of a README from a metrics file, so that no figure in it is typed by hand.

    python -m pipelines.reporting.readme docs/results/demo.json README.md [--check]

The table stands between the lines ``<!-- results:begin -->`` and ``<!-- results:end -->``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import UserError
from pipelines.reporting.metrics import format_mean, read_metrics, write_text
from pipelines.reporting.tables import README_MEASURES, markdown_table, results_table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def results_block(metrics: Mapping[str, float]) -> str:
    """The Markdown between the marks: the table of systems and the reward model's accuracy.

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
    lines.append(
        "In brackets: 95 % bootstrap intervals. Gold win rate: share of documents on which the judge (which sees the\n"
        "reference) prefers the system to SFT, a tie counting half. KL: from SFT, over whole sequences.\n"
    )
    return "\n".join(lines)


def updated(readme: str, metrics: Mapping[str, float], name: str = "README.md") -> str:
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
    return f"{before}{BEGIN}\n\n{results_block(metrics)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the README is up to date, 1 when ``--check`` finds it stale, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.reporting.readme", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="a metrics.json")
    parser.add_argument("readme", type=Path, help="the README with the two marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the table is stale")
    options = parser.parse_args(arguments)
    try:
        metrics = read_metrics(options.metrics)
        try:
            old = options.readme.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                "README", str(options.readme), f"cannot be read ({error.strerror})", "check the path"
            ) from None
        new = updated(old, metrics, str(options.readme))
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
