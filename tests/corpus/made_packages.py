"""Packages made in a folder, as a wheel's installer leaves them, for tests of what reads installed packages."""

import itertools
import random

VERBS = ["Measure", "Collect", "Rotate", "Merge", "Filter", "Encode", "Balance", "Trace", "Shuffle", "Repair"]
THINGS = ["river", "window", "circuit", "ledger", "planet", "bridge", "garden", "signal", "carpet", "engine"]
ENDS = [
    "before dawn",
    "with great care",
    "under heavy load",
    "across borders",
    "at low cost",
    "in reverse",
    "by weight",
]


def function(name, summary, body="    total = [value * 3 for value in numbers if value]\n    return total"):
    return f'def {name}(numbers):\n    """{summary}"""\n    label = "{name}"\n{body}\n\n'


def sentences():
    """A hundred different summaries; no six words of one stand in another."""
    pairs = zip(itertools.product(VERBS, THINGS), itertools.cycle(ENDS), strict=False)
    lines = [f"{verb} every {thing} {end}." for (verb, thing), end in pairs]
    random.Random(1).shuffle(lines)
    return lines


def install(site, name, version, files, metadata=""):
    """An installed distribution: its files, METADATA (further fields, or a blank line and a text) and RECORD."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
    record = [f"{info.name}/METADATA,,"]
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        record.append(f"{path},,")
    (info / "RECORD").write_text("\n".join(record) + "\n")
