"""How near to the known optimum each method comes, in a world whose 40 completions of a source can be enumerated.

    python benchmarks/known_optimum.py [--only dpo ppo] [--output benchmarks/results]

Every method starts from the same policy and is held near it with the same β; the optimum π* ∝ π_ref e^{r/β} and the
distance KL(π‖π*) are exact (see pipelines/seq2seq/enumerable.py). Writes known_optimum.json and known_optimum.png.
``grpo, divergence in the loss`` is GRPO as published, whose optimum is another; where it should end is worked out too.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import transformers
from matplotlib.figure import Figure

from pipelines.seq2seq.enumerable import divergence, make_world
from pipelines.seq2seq.known_optimum import (
    Problem,
    expected_dpo_loss,
    token_divergence_optimum,
    train_dpo,
    train_exactly,
    train_grpo,
    train_listwise,
    train_ppo,
)

RESULTS = Path(__file__).resolve().parent / "results"
Curve = list[list[float]]

METHODS: dict[str, tuple[float, Callable[[Problem, str], Curve]]] = {
    "dpo, exact gradient": (0.02, lambda p, _: train_exactly(p, expected_dpo_loss, steps=300, rate=1e-2)),
    "dpo": (0.02, lambda p, f: train_dpo(p, f, steps=300, batch_size=512, copies=10, rate=1e-2)),
    "listwise dpo": (0.05, lambda p, f: train_listwise(p, f, steps=300, batch_size=192, copies=48, rate=1e-2)),
    "ppo": (0.05, lambda p, f: train_ppo(p, f, rollouts=150, samples=128, rate=5e-3)),
    "grpo": (0.05, lambda p, f: train_grpo(p, f, rollouts=150, samples=128, rate=5e-3)),
    "grpo, divergence in the loss": (
        math.inf,
        lambda p, f: train_grpo(p, f, rollouts=150, samples=128, rate=5e-3, kl_in="loss"),
    ),
}
"""Method -> (the distance it has to come below, how it is trained)."""


def draw(curves: dict[str, Curve], elsewhere: float, file: Path) -> None:
    """The distances against the share of the steps, on a logarithmic scale."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot([step / curve[-1][0] for step, _ in curve], [max(kl, 1e-5) for _, kl in curve], label=name)
    axis.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
    axis.axhline(0.02, color="grey", linewidth=0.8, linestyle=":")
    axis.axhline(elsewhere, color="black", linewidth=0.6)
    axis.text(0.0, elsewhere, "where a divergence in the loss ends", ha="left", va="top", fontsize=8)
    axis.set_yscale("log")
    axis.set_xlabel("share of the training")
    axis.set_ylabel("KL(π‖π*), nats")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def main() -> None:
    """Train, print a table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to train")
    parser.add_argument("--spread", type=float, default=1.5, help="standard deviation of the rewards, in units of β")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()

    problem = Problem(make_world(vocabulary=4, length=3, sources=2, spread=options.spread))
    elsewhere = divergence(token_divergence_optimum(problem), problem.optimum)
    print(f"at the start {problem.first_distance:.4f} nats; a divergence in the loss ends at {elsewhere:.4f}")
    curves: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            limit, train = METHODS[name]
            start = time.perf_counter()
            curves[name] = train(problem, folder)
            reached, seconds = curves[name][-1][1], time.perf_counter() - start
            verdict = "" if math.isinf(limit) else f"  (below {limit}: {'yes' if reached < limit else 'NO'})"
            print(f"{name:30}{reached:9.4f} nats {seconds:7.1f} s{verdict}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    written = {
        "unit": "KL(pi||pi*) in nats by step",
        "completions": len(problem.world.completions),
        "beta": problem.beta,
        "start": problem.first_distance,
        "divergence_in_the_loss_ends_at": elsewhere,
        "final": {name: curve[-1][1] for name, curve in curves.items()},
        "curves": curves,
    }
    (options.output / "known_optimum.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(curves, elsewhere, options.output / "known_optimum.png")


if __name__ == "__main__":
    main()
