"""Best-of-n: what picking by the reward model gains under it (proxy) and under the gold judge, at what divergence."""

from __future__ import annotations

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, heading, join
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor

KINDS = ("best_of_n",)


def best_of_n(run: Run) -> Section | None:
    """The curves of every best-of-n stage; None when there are none."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        curve = stage.json("curve.json")
        if curve:
            parts += [heading(stage.name)] if len(run.of_kind(*KINDS)) > 1 else []
            parts.append(figures([_figure(stage, curve)]))
            shown.add(stage.name)
    if not parts:
        return None
    lead = (
        "No training: sample n summaries and keep the one that the reward model scores highest. What a trained policy "
        "gains has to be seen against what this gains at the same KL."
    )
    return Section("best-of-n", "Best of n", join(parts), lead, frozenset(shown))


def _figure(stage: Stage, curve: list[dict]) -> Markup:
    panels = []
    for measure, label, colour in (("proxy", "proxy reward", 0), ("gold", "gold score", 1)):
        y = [point[measure] for point in curve]
        bounds = [[point[f"{measure}_{end}"] for point in curve] for end in ("low", "high")]
        analytic = [point["kl"] for point in curve]
        series = [Series("analytic KL", analytic, y, colour=colour)]
        for x, low, high in zip(analytic, *bounds, strict=True):
            series.append(Series("", [x, x], [low, high], colour=colour))
        series.append(Series("measured KL", [point["kl_measured"] for point in curve], y, points=True, colour=2))
        panels.append(Panel(series, label))
    numbers = ", ".join(str(point["n"]) for point in curve)
    caption = f"n = {numbers}, from left to right; bars: 95 %. Samples that score alike make the measured KL smaller."
    alt = f"{stage.name}: proxy reward and gold score against KL for n = {numbers}"
    svg = plots.lines(f"best-of-n-{anchor(stage.name)}", panels, "KL to the sampled policy (nats a sequence)", alt)
    return figure(svg, caption, "Reward against KL")
