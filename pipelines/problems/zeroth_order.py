"""0th-order optimization: a classifier trained by policy gradient on a loss that only answers right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, Figure
from pipelines.problems.image_data import ImageExerciseConfig

if TYPE_CHECKING:
    from pipelines.problems.fits import Interval

METHODS = {
    "supervised": "supervised",
    "exact": "exact",
    "leave_one_out": "leave one out",
    "several": "several draws",
    "mean": "running mean",
    "none": "no baseline",
}
_GOAL = 0.9


@config
class ZerothOrderConfig(ImageExerciseConfig):
    """Train a classifier on right-or-wrong answers by policy gradient, with several baselines, against supervision."""

    output_dir: str = Field("runs/zeroth_order", description="folder the stage writes into", json_schema_extra=INERT)
    width: int = Field(64, ge=2, description="units of each of the two hidden layers")
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: 2000 on the digits, 4000 on other data")
    batch_size: int = Field(64, ge=1, description="images of a step, drawn with replacement")
    learning_rate: float = Field(5e-4, gt=0, description="of Adam, the same for all methods")
    entropy: float | None = Field(
        None,
        ge=0,
        le=10,
        description="β of an entropy bonus, E[L] − βH, of all methods but supervision: no label is given up; null: 0 "
        "on the digits, 0.1 on other data",
    )
    samples: int = Field(4, ge=2, le=64, description="labels drawn for an image where a method draws several")
    seeds: int = Field(5, ge=1, le=50, description="trainings of each method, with their own weights and draws")
    curve_points: int = Field(20, ge=2, le=200, description="moments at which accuracy and scatter are measured")
    estimates: int = Field(16, ge=2, description="estimates of one gradient by which its scatter is measured")

    @property
    def step_count(self) -> int:
        """Optimizer steps of a training."""
        return self.steps or (2000 if self.embedded else 4000)

    @property
    def entropy_weight(self) -> float:
        """β of the entropy bonus."""
        return self.entropy if self.entropy is not None else 0.0 if self.embedded else 0.1

    @property
    def moments(self) -> list[int]:
        """Steps at which something is measured, from 0 to the last; denser at first, where most is learned."""
        last = self.curve_points - 1
        return sorted({round(self.step_count * (i / last) ** 2) for i in range(self.curve_points)})

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.steps is not None and self.steps < self.curve_points:
            mend = f"give at least {self.curve_points} steps, or fewer curve_points"
            found.append(Problem("steps", self.steps, f"has no {self.curve_points} moments to measure at", mend))
        return found


def zeroth_order(config: ZerothOrderConfig) -> dict[str, float]:
    """Check the estimators by enumeration, train with each of them over several seeds, and compare.

    Returns:
        For each method ``zeroth_order/METHOD_accuracy`` on test images after the last step, with Student's interval
        over seeds; ``zeroth_order/checks`` and ``…/checks_failed``.

    Raises:
        UserError: images that cannot be read or have no labels; several processes.
    """
    from pipelines.problems.fits import seed_interval
    from pipelines.problems.image_data import load_labelled
    from pipelines.problems.machine import own_device
    from pipelines.problems.zeroth_order_training import train
    from pipelines.seq2seq.shards import run_shards

    images = load_labelled(config, own_device())
    answer = Answer(config, "zeroth_order", "0th-order optimization: a loss that only answers")
    _check_identities(answer, config)
    runs = [(method, config.seed + number) for method in METHODS for number in range(config.seeds)]

    def work(rows: Sequence[tuple[str, int]], what: str) -> list[Any]:
        return [train(method, seed, images, config) for method, seed in rows]

    made = run_shards(config.output_dir, "runs", runs, work, size=1)
    curves: dict[str, list[Any]] = {method: [] for method in METHODS}
    for (method, _), curve in zip(runs, made, strict=True):
        curves[method].append(curve)
    final = {m: seed_interval([c["accuracy"][-1] for c in found]) for m, found in curves.items()}
    answer.value(
        train_images=len(images.train),
        test_images=len(images.test),
        seeds=config.seeds,
        steps=config.step_count,
        samples=config.samples,
        batch_size=config.batch_size,
        entropy=config.entropy_weight,
        **{f"{method}_accuracy": interval.value for method, interval in final.items()},
    )
    _compare(answer, curves, final)
    _draw(answer, curves)
    metrics = answer.write()
    for method, (value, low, high) in final.items():
        key = f"zeroth_order/{method}_accuracy"
        metrics |= {key: value, f"{key}_ci_low": low, f"{key}_ci_high": high}
    return metrics


def _check_identities(answer: Answer, config: ZerothOrderConfig) -> None:
    """The score identity by autograd; bias and variance of every estimator by enumeration of all draws."""
    import torch

    from pipelines.problems import zeroth_order_math as math

    generator = torch.Generator().manual_seed(config.seed)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 1.5
    losses = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    exact = math.exact_gradient(logits, losses)

    z = logits.clone().requires_grad_(True)
    worst = 0.0
    for label in range(logits.shape[1]):
        p, log_p = z.softmax(1)[:, label], z.log_softmax(1)[:, label]
        (direct,) = torch.autograd.grad(p.sum(), z, retain_graph=True)
        (score,) = torch.autograd.grad(log_p.sum(), z, retain_graph=True)
        worst = max(worst, float((direct - p.detach()[:, None] * score).abs().max()))
    answer.check("p∇log p − ∇p = 0 for every label", worst, 0.0, 1e-12, "autograd of both sides, softmax of 4 labels")
    (gradient,) = torch.autograd.grad(math.expected_loss(z, losses).sum(), z)
    answer.check("‖∇E[L] − p(L − E[L])‖∞ = 0", float((gradient - exact).abs().max()), 0.0, 1e-12, "autograd of E[L]")

    b = losses.mean().item()
    estimators = {
        "one draw, no baseline": (lambda z, y, loss: math.score_gradient(z, y, loss), 1),
        "one draw, a constant baseline": (lambda z, y, loss: math.score_gradient(z, y, loss, b), 1),
        "three draws, no baseline": (lambda z, y, loss: math.score_gradient(z, y, loss), 3),
        "three draws, leave one out": (math.leave_one_out_gradient, 3),
        "one draw, the best baseline": (
            lambda z, y, loss: math.score_gradient(z, y, loss, math.best_baseline(logits, losses)),
            1,
        ),
    }
    variances = {}
    for name, (estimator, samples) in estimators.items():
        mean, variance = math.moments_by_enumeration(estimator, logits, losses, samples)
        variances[name] = float(variance.mean())
        route = f"enumeration of all {4**samples} draws for 6 random softmaxes"
        worst = float((mean - exact).abs().max())
        answer.check(f"bias of {name} = 0 (largest component)", worst, 0.0, 1e-12, route)
    answer.check(
        "variance of three draws / variance of one = 1/3",
        variances["three draws, no baseline"] / variances["one draw, no baseline"],
        1 / 3,
        1e-12,
        "enumeration of both",
    )
    count = 4000
    many, theirs = logits.repeat(count, 1), losses.repeat(count, 1)
    labels = math.draw_labels(many, 1, generator)
    scores = math.score_gradient(many, labels, theirs.gather(1, labels)).reshape(count, *exact.shape)
    per_draw = (scores - exact).square().sum(2).mean(1)
    answer.check(
        "variance of one draw, no baseline, by enumeration = by simulation",
        float(per_draw.mean()),
        variances["one draw, no baseline"],
        4 * float(per_draw.std()) / count**0.5,
        f"simulation of {count:,} draws, 4 standard errors",
    )
    answer.table(
        "variances",
        ["estimator at the logits", "variance", "against no baseline"],
        [[n, f"{v:.4f}", f"{v / variances['one draw, no baseline']:.3f}"] for n, v in variances.items()],
        "Total variance, mean of 6 random softmaxes of 4 labels with random losses, by enumeration.",
    )


def _reached(curve: dict[str, Any], what: str) -> float:
    """Steps or queries at the first moment at which the goal was reached; infinite if it never was."""
    return next((x for x, y in zip(curve[what], curve["accuracy"], strict=True) if y >= _GOAL), float("inf"))


def _compare(answer: Answer, curves: dict[str, list[Any]], final: dict[str, Interval]) -> None:
    import numpy as np

    def median(found: list[Any], what: str) -> str:
        middle = float(np.median([_reached(c, what) for c in found]))
        return f"{middle:,.0f}" if middle < float("inf") else "never"

    rows = []
    for method, label in METHODS.items():
        found = curves[method]
        ends = [c["accuracy"][-1] for c in found]
        spread = f"{np.std(ends, ddof=1):.4f}" if len(ends) > 1 else "–"
        asked = found[0]["queries"][-1]
        queries = [f"{asked:,}", median(found, "queries")] if asked else ["–", "–"]
        rows.append([label, final[method].shown(), spread, f"{min(ends):.3f}", median(found, "steps"), *queries])
    answer.table(
        "methods",
        ["trained by", "test accuracy (95 %)", "s.d. of seeds", "worst seed", "steps to 90 %", "questions", "to 90 %"],
        rows,
        "Steps and questions put to the black box until 90 % of the test images are right: medians over seeds.",
    )


def _draw(answer: Answer, curves: dict[str, list[Any]]) -> None:
    import numpy as np

    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    means, worst = [], []
    for number, (method, label) in enumerate(METHODS.items()):
        values, steps = 100 * np.array([c["accuracy"][1:] for c in curves[method]]), curves[method][0]["steps"][1:]
        means.append(Series(label, steps, values.mean(0), colour=number))
        worst.append(Series("", steps, values.min(0), colour=number))
    alt = "; ".join(f"{s.label}: {s.y[-1]:.1f} % at the end" for s in means)
    panels = [Panel(means, "accuracy, %", zero=True), Panel(worst, "of the worst seed, %", zero=True)]
    answer.figure(
        Figure(
            "convergence",
            svg=plots.lines("zeroth_order-convergence", panels, "optimizer steps", alt, logx=True),
            caption="Test accuracy, mean over the seeds and of the worst one: a baseline buys an early start.",
            title="How fast each learns",
        )
    )
    _draw_scatter(answer, curves["leave_one_out"][0])


def _draw_scatter(answer: Answer, curve: dict[str, Any]) -> None:
    """Figure and table of how the estimates scatter at the weights of one training."""
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    names = ("none", "mean", "several", "leave_one_out")
    steps, found = curve["steps"], curve["scatter"]
    shown = [
        Series(METHODS[n], steps[1:], [max(s[n], 1e-12) for s in found[1:]], colour=list(METHODS).index(n))
        for n in names
    ]
    shown.append(Series("‖g‖²", steps[1:], [max(s["gradient"], 1e-12) for s in found[1:]], colour=1))
    alt = "; ".join(f"{s.label}: from {s.y[0]:.2g} to {s.y[-1]:.2g}" for s in shown)
    answer.figure(
        Figure(
            "scatter",
            svg=plots.lines(
                "zeroth_order-scatter", [Panel(shown, "E‖ĝ − g‖²", log=True)], "optimizer steps", alt, logx=True
            ),
            caption="Scatter of the estimates of one batch's gradient, all at the same weights, beside that gradient.",
            title="Variance of the gradient while it learns",
        )
    )
    last = len(steps) - 1
    rows = []
    for at in sorted({0, last // 4, last // 2, 3 * last // 4, last}):
        here = found[at]
        rows.append([steps[at], f"{here['loss']:.3f}", *(f"{here[n]:.2g}" for n in ("gradient", *names))])
    columns = ["step", "expected loss", "‖g‖²", *(METHODS[n] for n in names)]
    answer.table("scatter", columns, rows, "E‖ĝ − g‖² in the space of the weights, for one batch of images.")
    begin = found[0]
    answer.value(first_ratio=begin["none"] / begin["mean"], first_noise=begin["none"] / begin["gradient"])
