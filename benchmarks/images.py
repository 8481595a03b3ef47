"""Training of image models beside a plain loop over a DataLoader and beside two packages that do the same.

    python benchmarks/images.py [--peer PEER/bin/python] [--cases …] [--rounds 3]

PEER is an environment with pythae and denoising-diffusion-pytorch (see README.md); without it their rows are said to be
not measured. Both sides of a row train the same kind of network on the same images, each in a process of its own, and
take turns of some steps, so that a machine that slows down slows both; who goes first alternates. Quoted are medians of
the ratios of neighbouring turns, with the least and the greatest. Writes results/images.json and a table of it,
results/images.md. Of the standard library only: it must not weigh on what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from against_trl_0_11 import HERE, Side, spread

SCRIPT = HERE / "peers" / "images.py"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        title: what the table calls it.
        other: the side that this project is compared with.
        job: what is asked of both.
        target: the ratio (other's time / project's) to reach.
        peer: whether the other side needs the peers' interpreter.
    """

    title: str
    other: str
    job: dict[str, Any]
    target: float
    peer: bool = True


_VAE = {"model": "vae", "side": 28, "batch": 100, "steps": 100, "images": 10_000}
# 651,041 weights; its dim brings the peer's network (646,685) as near to them as it gets.
_DDPM = {"model": "ddpm", "side": 28, "batch": 64, "steps": 4, "images": 2_560, "channels": [32, 64], "dim": 28}

CASES = {
    "vae-loader": Case("Course VAE / plain DataLoader loop", "loader", _VAE, 1.5, peer=False),
    "vae-pythae": Case("Course VAE / pythae", "pythae", _VAE, 1.0),
    "ddpm": Case("DDPM / denoising-diffusion-pytorch", "lucidrains", _DDPM, 1.0),
}


def one_round(case: Case, job: dict[str, Any], python: str, turned: bool) -> dict[str, Side]:
    """Both sides' runs, interleaved; ``turned``: this project goes first."""
    pythons = {"other": python, "project": sys.executable}
    names = ("project", "other") if turned else ("other", "project")
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in names:
            asked = job | {"side_name": case.other if name == "other" else "project"}
            sides[name] = Side(name, pythons[name], asked, Path(folder) / name, SCRIPT)
        try:
            going = [side for side in sides.values() if side.read()]
            while going:
                going = [side for side in going if side.turn()][::-1]
        finally:
            for side in sides.values():
                side.process.kill()
                side.process.wait()
    return sides


def compared(case: Case, rounds: list[dict[str, Side]], job: dict[str, Any]) -> dict[str, Any]:
    """Ratios of the turns after the first, and images a second of both sides."""
    row: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        ratios = []
        for sides in rounds:
            other, own = ([t[clock] for t in sides[n].turns if t["turn"] == "steps"] for n in ("other", "project"))
            ratios += [a / b for a, b in zip(other, own, strict=True)]
        row["ratio" if clock == "wall" else "cpu_ratio"] = spread(ratios)
        row.setdefault("compared", {})[clock] = ratios
    for name in ("other", "project"):
        walls = [t["wall"] for sides in rounds for t in sides[name].turns if t["turn"] == "steps"]
        row[name] = {"images_per_second": job["batch"] * job["steps"] / spread(walls)["median"]}
        row[name]["parameters"] = rounds[0][name].last["parameters"]
    return row | {"met": row["ratio"]["median"] >= case.target}


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown, line by line."""
    yield "| training | weights, theirs / ours | theirs, images/s | ours | ratio (min–max) | CPU time | target | met |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        if "ratio" not in row:
            yield f"| {row['title']} | | | | not measured: no --peer | | ≥ {row['target']} | |"
            continue
        weights = " / ".join(f"{row[name]['parameters']:,}" for name in ("other", "project"))
        rates = " | ".join(f"{row[name]['images_per_second']:.0f}" for name in ("other", "project"))
        ratio, cpu = row["ratio"], row["cpu_ratio"]["median"]
        yield (
            f"| {row['title']} | {weights} | {rates} | **{ratio['median']:.2f}×** "
            f"({ratio['min']:.2f}–{ratio['max']:.2f}) "
            f"| {cpu:.2f}× | ≥ {row['target']} | {'yes' if row['met'] else '**no**'} |"
        )


def main() -> None:
    """Measure, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", default=os.environ.get("IMAGE_PEERS_PYTHON"), help="its interpreter; default: $IMAGE_PEERS_PYTHON"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes for a case")
    parser.add_argument("--turns", type=int, default=6, help="turns of each, the first one not counted")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 on both sides (DDPM)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "images.json")
    options = parser.parse_args()

    settings = {name: getattr(options, name) for name in ("rounds", "turns", "bf16", "threads")}
    machine = {"processors": os.cpu_count(), "machine": platform.machine()}
    # Above 0.3 others were computing too, and the figures are worth little.
    results: dict[str, Any] = {**settings, **machine, "load_average": round(os.getloadavg()[0], 2), "rows": []}
    for name in options.cases:
        case = CASES[name]
        row: dict[str, Any] = {"case": name, "title": case.title, "target": case.target}
        results["rows"].append(row)
        if case.peer and not options.peer:
            print(f"{name}: not measured: give an interpreter by --peer or IMAGE_PEERS_PYTHON (benchmarks/README.md)")
            continue
        job = {**settings, **case.job, "bf16": options.bf16 and case.job["model"] == "ddpm"}
        python = options.peer if case.peer else sys.executable
        rounds = [one_round(case, job, python, turned=bool(n % 2)) for n in range(options.rounds)]
        row |= compared(case, rounds, job)
        ratio = row["ratio"]
        print(f"{name:12}{ratio['median']:6.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = list(table(results))
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
