"""DPO and PPO beside TRL 0.11.4, the last release whose trainers took encoder-decoder models.

    python benchmarks/against_trl_0_11.py --peer PEER/bin/python [--shapes 128x32 512x64] [--cases …] [--rounds 3]

PEER is an environment with that release (see README.md); without it nothing is measured. Both sides train the same
random T5 on the same data with their own trainers, each in a process of its own, and take turns step by step, so that
a machine that slows down slows both; who goes first alternates. Quoted are medians of the ratios of neighbouring turns
(of whole runs where a caching pass counts), with the least and the greatest. Writes results/against_trl_0_11.json and
a table of it, results/against_trl_0_11.md. Of the standard library only: it must not weigh on what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIDES = ("peer", "project")


@dataclass(frozen=True)
class Case:
    """One comparison: what both sides are asked to do.

    Args:
        title: what the table calls it.
        job: what is asked of both sides.
        own: what is asked of this project alone, otherwise.
        whole: whole runs count, first steps and caching pass included.
        target: the ratio to reach; for ``parts`` the ratio not to pass.
        parts: this project alone, against the sum of its own raw parts.
    """

    title: str
    job: dict[str, Any]
    target: float
    own: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    parts: bool = False


def _dpo(cached: bool, epochs: int) -> dict[str, Any]:
    return {"method": "dpo", "cached": cached, "epochs": epochs, "samples": 1}


def _ppo(samples: int, parts: bool = False) -> dict[str, Any]:
    return {"method": "ppo", "samples": samples, "epochs": 4, "mini_batches": 1, "parts": parts}


CASES = {
    "dpo-online": Case("DPO, reference beside the policy", _dpo(False, 1), 1.8),
    "dpo-cached": Case("DPO, 3 epochs, both cache the reference", _dpo(True, 3), 1.8, whole=True),
    "dpo-cached-against-online": Case(
        "DPO, 3 epochs, only this project caches", _dpo(False, 3), 2.3, own={"cached": True}, whole=True
    ),
    "ppo-1": Case("PPO, 1 completion a source", _ppo(1), 1.2),
    "ppo-4": Case("PPO, 4 completions a source", _ppo(4), 2.0),
    "ppo-parts-1": Case("PPO rollout / its raw parts, 1 completion", _ppo(1, parts=True), 1.2, parts=True),
    "ppo-parts-4": Case("PPO rollout / its raw parts, 4 completions", _ppo(4, parts=True), 1.2, parts=True),
}


class Side:
    """A process that does one side's work a turn at a time."""

    def __init__(self, name: str, python: str, job: dict[str, Any], log: Path, script: Path | None = None):
        script = script or HERE / "peers" / ("trl_0_11.py" if name == "peer" else "this_project.py")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["OMP_NUM_THREADS"] = str(job["threads"])
        if python == sys.executable:
            environment["PYTHONPATH"] = str(HERE.parent)
        self.name, self.log, self.turns, self.last = name, log, [], {}
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )

    def read(self) -> bool:
        """Take in the next report; False after the last."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"the {self.name} ended early:\n{self.log.read_text()[-2000:]}")
        report = json.loads(line)
        if report.get("done"):
            self.last = report
            self.process.wait()
            return False
        if report["turn"] is not None:
            self.turns.append(report)
        return True

    def turn(self) -> bool:
        """Let it do its next turn and wait for it; False after the last."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def one_round(case: Case, jobs: dict[str, dict[str, Any]], pythons: dict[str, str], turned: bool) -> dict[str, Side]:
    """Both sides' runs, interleaved; ``turned``: this project goes first."""
    with tempfile.TemporaryDirectory() as folder:
        names = SIDES[::-1] if turned else SIDES
        sides = {n: Side(n, pythons[n], jobs[n], Path(folder) / n) for n in names if n == "project" or not case.parts}
        try:
            going = [side for side in sides.values() if side.read()]
            while going:
                going = [side for side in going if side.turn()][::-1]
        finally:
            for side in sides.values():
                side.process.kill()
                side.process.wait()
    return sides


def measured(side: Side, whole: bool) -> list[dict[str, float]]:
    """The turns that count: all of a whole run, otherwise those after the first."""
    return [turn for turn in side.turns if whole or not turn["turn"].startswith("first")]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(rounds: list[dict[str, Side]], case: Case, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios (peer's time / project's), throughput and memory of both sides."""
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for sides in rounds:
        peer, project = (measured(sides[name], case.whole) for name in SIDES)
        for clock, found in ratios.items():
            if case.whole:
                found.append(sum(t[clock] for t in peer) / sum(t[clock] for t in project))
            else:
                found += [a[clock] / b[clock] for a, b in zip(peer, project, strict=True)]
    row: dict[str, Any] = {"ratio": spread(ratios["wall"]), "cpu_ratio": spread(ratios["cpu"]), "compared": ratios}
    row["met"] = row["ratio"]["median"] >= case.target
    for name in SIDES:
        job = jobs[name]
        samples = job["batch"] * job["samples"] * (job["steps"] * job["epochs"] if case.whole else 1)
        turns = [measured(sides[name], case.whole) for sides in rounds]
        seconds = (
            [sum(t["wall"] for t in run) for run in turns] if case.whole else [t["wall"] for r in turns for t in r]
        )
        rate = samples / statistics.median(seconds)
        tokens = job["source"] + job["target"] * (2 if job["method"] == "dpo" else 1)
        last = [sides[name].last for sides in rounds]
        row[name] = {"samples_per_second": rate, "tokens_per_second": rate * tokens, **_memory(last)}
    row["memory_ratio"] = row["project"]["peak_mb"] / row["peer"]["peak_mb"]
    return row


def _memory(last: list[dict[str, Any]]) -> dict[str, float]:
    found = {"peak_mb": statistics.median(r["peak"] for r in last)}
    found["above_imports_mb"] = statistics.median(r["peak"] - r["imported"] for r in last)
    if last[0]["gpu_peak"] is not None:
        found["gpu_peak_mb"] = statistics.median(r["gpu_peak"] for r in last)
    return found


def against_parts(rounds: list[dict[str, Side]], case: Case) -> dict[str, Any]:
    """A rollout's time over the sum of its raw parts' times."""
    names = ("generate", "reference", "reward", "epochs")
    turns = [turn for sides in rounds for turn in measured(sides["project"], case.whole)]
    ratios = [turn["wall"] / sum(turn[name] for name in names) for turn in turns]
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in ("wall", *names)}
    row = {"ratio": spread(ratios), "compared": {"wall": ratios}, "seconds": seconds}
    return row | {"met": row["ratio"]["median"] <= case.target}


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown, line by line."""
    yield from _head("what", "TRL 0.11.4, samples/s", "this project", "ratio (min–max)", "CPU time", "target", "met")
    for row in results["rows"]:
        if "peer" in row:
            ratio, cpu = row["ratio"], row["cpu_ratio"]["median"]
            rates = f"{row['peer']['samples_per_second']:.1f} | {row['project']['samples_per_second']:.1f}"
            yield (
                f"| {row['shape']} | {row['title']} | {rates} | **{ratio['median']:.2f}×** "
                f"({ratio['min']:.2f}–{ratio['max']:.2f}) | {cpu:.2f}× | ≥ {row['target']} | {_word(row['met'])} |"
            )
    yield ""
    yield from _head("peak memory, MB (above imports)", "TRL 0.11.4", "this project", "ratio", "target", "met")
    for row in results["rows"]:
        if "peer" in row:
            both = " | ".join(f"{row[n]['peak_mb']:.0f} ({row[n]['above_imports_mb']:.0f})" for n in SIDES)
            ratio = row["memory_ratio"]
            yield f"| {row['shape']} | {row['title']} | {both} | {ratio:.2f} | ≤ 1 | {_word(ratio <= 1)} |"
    own = [row for row in results["rows"] if "peer" not in row]
    if own:
        yield ""
        parts = ("generate", "reference", "reward", "epochs")
        yield from _head("what", "rollout, s", *parts, "ratio (min–max)", "target", "met")
    for row in own:
        seconds, ratio = " | ".join(f"{value:.3f}" for value in row["seconds"].values()), row["ratio"]
        yield (
            f"| {row['shape']} | {row['title']} | {seconds} | **{ratio['median']:.2f}** "
            f"({ratio['min']:.2f}–{ratio['max']:.2f}) | ≤ {row['target']} | {_word(row['met'])} |"
        )


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(("source × target", *names)) + " |"
    yield "|---" * (1 + len(names)) + "|"


def _word(met: bool) -> str:
    return "yes" if met else "**no**"


def parse_shape(text: str) -> tuple[int, int]:
    """``128x32``: tokens of a source and of a target."""
    try:
        source, target = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 128x32") from None
    if min(source, target) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: lengths must be at least 2")
    return source, target


def main() -> None:
    """Measure, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", default=os.environ.get("TRL_0_11_PYTHON"), help="its interpreter; default: $TRL_0_11_PYTHON"
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(128, 32), (512, 64)])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes for a case and shape")
    parser.add_argument("--steps", type=int, default=6, help="DPO steps of an epoch; rollouts: half of it, at least 2")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a DPO step, sources of a rollout")
    parser.add_argument("--size", default="tiny", help="tiny (128 wide, 4+4 layers), small, base: T5's")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "against_trl_0_11.json")
    options = parser.parse_args()
    if not options.peer:
        print(
            "not measured: give an interpreter that has TRL 0.11.4 by --peer or TRL_0_11_PYTHON (benchmarks/README.md)"
        )
        return

    settings = {name: getattr(options, name) for name in ("size", "bf16", "batch", "rounds", "steps", "threads")}
    machine = {"processors": os.cpu_count(), "machine": platform.machine()}
    # Above 0.3 others were computing too, and the figures are worth little.
    results: dict[str, Any] = {**settings, **machine, "load_average": round(os.getloadavg()[0], 2), "rows": []}
    pythons = {"peer": options.peer, "project": sys.executable}
    for source, target in options.shapes:
        for name in options.cases:
            case = CASES[name]
            ppo = case.job["method"] == "ppo"
            job = {**settings, **case.job, "source": source, "target": target}
            if ppo:
                job["steps"] = 1 + max(2, options.steps // 2)
            elif not case.whole:
                job["steps"] = 1 + options.steps
            jobs = {"peer": job, "project": job | case.own}
            rounds = [one_round(case, jobs, pythons, turned=bool(n % 2)) for n in range(options.rounds)]
            found = against_parts(rounds, case) if case.parts else compare(rounds, case, jobs)
            row = {"case": name, "title": case.title, "shape": f"{source} × {target}", "target": case.target, **found}
            results["rows"].append(row)
            ratio = row["ratio"]
            memory = f", memory {row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
            cpu = f", CPU {row['cpu_ratio']['median']:.2f}" if "cpu_ratio" in row else ""
            low, high = ratio["min"], ratio["max"]
            print(
                f"{row['shape']:>9} {name:26}{ratio['median']:6.2f} ({low:.2f} to {high:.2f}){cpu}{memory}", flush=True
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = list(table(results))
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
