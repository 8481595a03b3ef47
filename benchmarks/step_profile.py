"""Where the time of a DPO step and of a PPO rollout goes, by kind of operation.

    python benchmarks/step_profile.py [--shape 128x32] [--threads 2] [--output docs/results/step_profile.json]

The trainers, model and data are those of against_trl_0_11.py. Ten steps (three rollouts) are timed without PyTorch's
profiler and as many with it; its shares are shown, and what of a step no operation accounts for is Python between them.
Writes the JSON file and a table of it beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers"), str(HERE)]

import this_project  # noqa: E402
import torch  # noqa: E402
from against_trl_0_11 import parse_shape  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from pipelines.memory import keep_freed_memory  # noqa: E402

KINDS = {
    "matrix products": r"(add|b|badd)?mm|addmv|mv|dot",
    "attention kernels, softmax": r"_scaled_dot_.+|_(log_)?softmax(_backward_data)?",
    "copies, gathers, embedding": (
        r"copy|cat|gather|scatter(_add)?|index|index_select|_index_put_impl|index_add|masked_scatter|masked_select|"
        r"masked_fill|embedding|embedding_dense_backward|fill|zero"
    ),
    "optimizer, gradient norm": r"_fused_.+|_foreach_.+|linalg_vector_norm",
    "elementwise, sums": (
        r"add|sub|rsub|mul|div|remainder|exp|log|log1p|neg|pow|sqrt|rsqrt|square|relu|threshold_backward|clamp(_min)?|"
        r"where|sum|mean|var|amax|max|min|argmax|argmin|cumsum|addcmul|addcdiv|abs|sign|tanh|sigmoid|"
        r"log_sigmoid_(forward|backward)|logsumexp|random|normal|uniform|bitwise_.+|eq|ne|lt|gt|le|ge|any|all|isfinite|sort"
    ),
}
"""Kind -> pattern of its operations' names, without ``aten::`` and a last underscore; the first that fits counts. All
others are dispatch: views, allocations, and what autograd does around its functions."""
DISPATCH, PYTHON = "views, allocation, autograd", "Python between operations"
CASES = {
    "DPO, cached reference": {"method": "dpo", "cached": True, "samples": 1, "turns": 10},
    "DPO, reference beside the policy": {"method": "dpo", "cached": False, "samples": 1, "turns": 10},
    "PPO, 1 completion a source": {"method": "ppo", "samples": 1, "turns": 3},
    "PPO, 4 completions a source": {"method": "ppo", "samples": 4, "turns": 3},
}
WARM = 2


class Watch:
    """Takes the place of a turn's reports: times some turns as they are, then profiles as many."""

    def __init__(self, turns: int):
        self.turns, self.number, self.plain, self.profiled = turns, 0, [], []
        self.profiler, self.start = profile(activities=[ProfilerActivity.CPU]), 0.0

    def wait(self, label: str | None = None, details: Any = None) -> None:
        """A turn has ended, if it has a label."""
        now = time.perf_counter()
        if label in (None, "caching"):
            self.start = now
            return
        if self.number >= WARM:
            (self.plain if self.number < WARM + self.turns else self.profiled).append(now - self.start)
        self.number += 1
        if self.number == WARM + self.turns:
            self.profiler.start()
        elif self.number == WARM + 2 * self.turns:
            self.profiler.stop()
        self.start = time.perf_counter()


def kind_of(name: str) -> str:
    """The kind that an operation's time counts for."""
    plain = name.removeprefix("aten::").rstrip("_")
    fits = (kind for kind, pattern in KINDS.items() if name.startswith("aten::") and re.fullmatch(pattern, plain))
    return next(fits, DISPATCH)


def measured(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a turn without the profiler, and the shares of a profiled one by kind."""
    job = settings | case | {"steps": WARM + 2 * case["turns"], "epochs": 4 if case["method"] == "ppo" else 1}
    job |= {"mini_batches": 1, "parts": case["method"] == "ppo"}
    watch = Watch(case["turns"])
    with tempfile.TemporaryDirectory() as folder:
        {"dpo": this_project.dpo, "ppo": this_project.ppo}[case["method"]](job, watch, folder)
    spent: Counter[str] = Counter()
    for event in watch.profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    whole = sum(watch.profiled)
    shares = {kind: spent[kind] / whole for kind in (*KINDS, DISPATCH)}
    return {
        "milliseconds": 1000 * statistics.median(watch.plain),
        "profiled_milliseconds": 1000 * statistics.median(watch.profiled),
        "shares": shares | {PYTHON: max(0.0, 1 - sum(shares.values()))},
    }


def main() -> None:
    """Measure all cases, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=parse_shape, default=(128, 32))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "step_profile.json")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    # The profiler's records lie between the tensors, which then move to memory that nobody has touched yet: a page
    # fault each, as no step has them by itself. So it is touched before.
    touched = [torch.ones(31 * 2**18) for _ in range(24)]
    del touched
    source, target = options.shape
    settings = {"source": source, "target": target, "threads": options.threads, "batch": 16, "size": "tiny"}
    settings["bf16"] = False
    load = round(os.getloadavg()[0], 2)
    cases = {name: measured(case, settings) for name, case in CASES.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = {**settings, "load_average": load, "cases": cases}
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"| {source} × {target}, {options.threads} threads | " + " | ".join(cases) + " |",
        "|---" + "|---:" * len(cases) + "|",
        "| a step or rollout, ms | " + " | ".join(f"{case['milliseconds']:.0f}" for case in cases.values()) + " |",
    ]
    for kind in (*KINDS, DISPATCH, PYTHON):
        lines.append(f"| {kind}, % | " + " | ".join(f"{100 * c['shares'][kind]:.0f}" for c in cases.values()) + " |")
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
