"""PPO, GRPO, RLOO: what they gain under the reward (proxy) and under the gold judge, at what divergence from SFT."""

from __future__ import annotations

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, heading, join, paragraph
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, is_number
from pipelines.reporting.tables import Table, html_table

KINDS = ("ppo", "grpo", "rloo")
PROXY, GOLD, KL = "objective/proxy_reward", "objective/gold", "objective/kl"


def ppo(run: Run) -> Section | None:
    """The rollouts of every stage that learns from its own samples; None when there are none."""
    stages = [stage for stage in run.of_kind(*KINDS) if any(KL in entry for entry in stage.history)]
    if not stages:
        return None
    parts = []
    for stage in stages:
        if len(stages) > 1:
            parts.append(heading(stage.name))
        parts.append(figures(_figures(stage)))
        table = samples_table(stage)
        if table:
            parts += [heading("Samples of the first and the last rollout"), html_table(table, "Samples")]
        verdict = over_optimisation(stage)
        if verdict:
            parts.append(paragraph(verdict, "note"))
    lead = (
        "The policy is trained on the reward model's score (proxy), less a price for moving away from SFT. The gold "
        "judge only watches: where the proxy goes on rising while gold falls, the policy exploits the reward model."
    )
    return Section("ppo", "Reward against KL", join(parts), lead, frozenset(s.name for s in stages))


def rollouts(stage: Stage, *keys: str) -> list[list[float]]:
    """The rollout numbers (from 1) and the values of ``keys``, for the rollouts that have them all."""
    entries = [entry for entry in stage.history if KL in entry]
    kept = [
        (n, *(entry[k] for k in keys))
        for n, entry in enumerate(entries, start=1)
        if all(is_number(entry.get(k)) for k in keys)
    ]
    return [list(column) for column in zip(*kept, strict=True)] if kept else [[] for _ in range(len(keys) + 1)]


def samples_table(stage: Stage) -> Table | None:
    """What the policy wrote in its first and in its last rollout, from ``samples.jsonl``; None where there is none."""
    rows = [row for row in stage.lines("samples.jsonl") if "rollout" in row and "kl" in row]
    if not rows:
        return None
    ends = {min(row["rollout"] for row in rows), max(row["rollout"] for row in rows)}
    gold = any("gold" in row for row in rows)
    found = [
        [
            str(row["rollout"] + 1),
            row["document"],
            row["text"] or "(nothing)",
            f"{row['reward']:.2f}",
            *([f"{row['gold']:.1f}" if "gold" in row else "–"] if gold else []),
            f"{row['kl']:.2f}",
        ]
        for row in rows
        if row["rollout"] in ends
    ]
    columns = ["Rollout", "Source", "Sample", "Proxy reward", *(["Gold score"] if gold else []), "KL, nats"]
    return Table(columns, found, numeric=False)


def over_optimisation(stage: Stage) -> str:
    """What the rollouts say about proxy and gold, from the means of their first and last fifths; empty if too few."""
    number, proxy, gold = rollouts(stage, PROXY, GOLD)
    if len(number) < 10:
        return ""
    fifth = max(2, len(number) // 5)

    def change(values: list[float]) -> float:
        return sum(values[-fifth:]) / fifth - sum(values[:fifth]) / fifth

    up, gained = change(proxy), change(gold)
    text = f"From the first to the last fifth of the rollouts the proxy moved by {up:+.2f} and gold by {gained:+.2f}"
    return text + (": the reward model is being over-optimised." if up > 0 > gained else ".")


def _figures(stage: Stage) -> list[Markup]:
    key = f"ppo-{stage.name}".replace("/", "-")
    made = []
    for x_key, name, xlabel, title, caption in (
        (KL, "kl", "KL to SFT (nats a sequence)", "Reward against KL", "Dots: rollouts; line: mean by KL."),
        (None, "time", "rollout", "Reward over time", "Faint: each rollout; strong: running mean."),
    ):
        panels = []
        for measure, label, colour in ((PROXY, "proxy reward", 0), (GOLD, "gold score", 1)):
            if x_key:
                _, x, y = rollouts(stage, x_key, measure)
                if len(y) < 2:
                    continue
                mean_x, mean_y = plots.binned(x, y)
                series = [Series("", x, y, points=True, colour=colour), Series("", mean_x, mean_y, colour=colour)]
            else:
                x, y = rollouts(stage, measure)
                if not y:
                    continue
                series = [Series("", x, y, smooth=True, colour=colour)]
            panels.append(Panel(series, label))
        if panels:
            alt = f"{stage.name}: proxy reward and gold score against {xlabel}"
            made.append(figure(plots.lines(f"{key}-{name}", panels, xlabel, alt), caption, title))
    for name, title, caption, wanted in (
        (
            "control",
            "Divergence and its price",
            "The coefficient rises when KL is above its target and falls when it is below.",
            ((KL, "KL (nats)", 2), ("objective/kl_coefficient", "coefficient", 3)),
        ),
        (
            "health",
            "Size of the updates",
            "Clipped ratios stay a small share; explained variance near 1 is a good value function.",
            (("policy/clip_fraction", "clip fraction", 0), ("value/explained_variance", "explained var.", 4)),
        ),
        (
            "shape",
            "Shape of the samples",
            "A length that drifts or an entropy that collapses are signs of a policy that gives up variety.",
            (("objective/length", "tokens", 2), ("objective/entropy", "entropy (nats)", 5)),
        ),
    ):
        panels = []
        for measure, label, colour in wanted:
            x, y = rollouts(stage, measure)
            if y:
                panels.append(Panel([Series("", x, y, smooth=True, colour=colour)], label, zero=True))
        if panels:
            alt = f"{stage.name}: " + ", ".join(p.ylabel for p in panels) + " by rollout"
            made.append(figure(plots.lines(f"{key}-{name}", panels, "rollout", alt), caption, title))
    return made
