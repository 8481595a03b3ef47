"""Learning curves of the trained stages."""

from __future__ import annotations

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, heading, join
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage

SHOWN_ELSEWHERE = ("ppo", "reward", "ddpm", "bitflip", "vae", "gan", "classifier")


def learning_curves(run: Run) -> Section | None:
    """Training and held-out loss of every stage that logs one, with accuracies and margins where there are any."""
    parts, shown = [], set()
    for stage in run.stages:
        made = [] if stage.kind in SHOWN_ELSEWHERE else curves_of(stage)
        if made:
            parts += [heading(stage.name.upper() if len(stage.name) <= 3 else stage.name), figures(made)]
            shown.add(stage.name)
    if not parts:
        return None
    lead = "A held-out loss that turns upward while the training loss falls is overfitting."
    return Section("curves", "Learning curves", join(parts), lead, frozenset(shown))


def curves_of(stage: Stage) -> list[Markup]:
    """Figures of the loss and of the preference accuracy and margin, as far as the stage logged them."""
    key = f"curve-{stage.name}".replace("/", "-")
    made = []
    for name, title, train, held_out, label, caption in (
        ("loss", "Loss", ("loss",), ("eval_loss",), "loss (nats)", "Faint: each entry; strong: running mean."),
        (
            "accuracy",
            "Pairs ranked right",
            ("rewards/accuracies", "accuracy"),
            ("eval_rewards/accuracies", "eval_accuracy"),
            "share of pairs",
            "A half is guessing.",
        ),
        (
            "margin",
            "Margin of chosen over rejected",
            ("rewards/margins", "margin"),
            ("eval_rewards/margins", "eval_margin"),
            "reward difference",
            "The larger, the surer; one that keeps growing after the accuracy has stopped is overconfidence.",
        ),
        (
            "rouge",
            "Held-out ROUGE-1",
            (),
            ("eval_rouge1",),
            "ROUGE-1 (0–100)",
            "On validation documents, during training.",
        ),
    ):
        series = []
        for keys, what, colour in ((train, "training", 0), (held_out, "held out", 1)):
            x, y = next((found for found in map(stage.curve, keys) if found[1]), ([], []))
            if y:
                series.append(Series(what, x, y, smooth=what == "training", colour=colour))
        if series:
            alt = f"{title} of {stage.name} by optimizer step"
            svg = plots.lines(f"{key}-{name}", [Panel(series, label)], "optimizer step", alt)
            made.append(figure(svg, caption, title))
    return made
