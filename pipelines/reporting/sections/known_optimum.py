"""The known optimum: how near each method came to it, where it can be enumerated."""

from __future__ import annotations

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, heading, join
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Table, html_table

KINDS = ("known_optimum",)
LABELS = {
    "dpo": "DPO",
    "listwise": "listwise DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "grpo_kl_in_loss": "GRPO, KL in the loss",
}
_SMALLEST = 1e-5  # nats: below it the logarithmic scale would show rounding


def known_optimum(run: Run) -> Section | None:
    """Curve and table of every known-optimum stage; None when there are none."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        found = stage.json("curves.json")
        if found:
            parts += [heading(stage.name)] if len(run.of_kind(*KINDS)) > 1 else []
            parts += [figures([_figure(stage, found)]), html_table(_table(found), "Distance from the optimum")]
            shown.add(stage.name)
    if not parts:
        return None
    lead = (
        "A test of the methods, not of this run's models: a vocabulary of a few tokens, where the best policy "
        "π* ∝ π_ref e^(r/β) and the distance from it are known exactly. GRPO that charges its divergence token by "
        "token in the loss, as published, rests at another policy."
    )
    return Section("known-optimum", "The known optimum", join(parts), lead, frozenset(shown))


def _figure(stage: Stage, found: dict) -> Markup:
    series = [
        Series(
            LABELS.get(name, name), [step / curve[-1][0] for step, _ in curve], [max(y, _SMALLEST) for _, y in curve]
        )
        for name, curve in found["curves"].items()
    ]
    alt = "; ".join(f"{s.label}: from {s.y[0]:.2g} to {s.y[-1]:.2g} nats" for s in series)
    panels = [Panel(series, "KL(π‖π*), nats", log=True)]
    svg = plots.lines(f"known-optimum-{anchor(stage.name)}", panels, "share of the training", alt)
    return figure(svg, "All begin at the reference. The scale is logarithmic.", "Distance from the optimum")


def _table(found: dict) -> Table:
    rows = [["Reference, before training", f"{found['start']:.4f}"]]
    rows += [[LABELS.get(name, name), f"{curve[-1][1]:.4f}"] for name, curve in found["curves"].items()]
    rows.append(["Where a KL in the loss comes to rest (worked out)", f"{found['rest']:.4f}"])
    return Table(["Policy", "KL(π‖π*), nats"], rows)
