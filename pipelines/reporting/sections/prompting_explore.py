"""What models write: quality and diversity by temperature, digits against chance, answers token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, folded, heading, join, paragraph
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Cell, Table, html_table

KINDS = ("explore",)
MEASURES = {"accuracy": "right, %", "valid_rate": "valid, %", "diversity": "different, %"}
SHOWN_ANSWERS = 8


def prompting_explore(run: Run) -> Section | None:
    """Every stage that explored; None when there are none."""
    stages = [stage for stage in run.of_kind(*KINDS) if stage.json("sweep.json")]
    if not stages:
        return None
    parts = []
    for stage in stages:
        parts += [heading(stage.name)] if len(stages) > 1 else []
        parts += _sweep(stage, stage.json("sweep.json"))
        parts += _digits(stage.json("digits.json") or {"models": []})
        parts += _views(stage.json("views.json") or [])
    lead = "At temperature 0 every answer is the likeliest one, so nothing differs; chance is numpy's generator."
    return Section("explore", "What the models write", join(parts), lead, frozenset(s.name for s in stages))


def _sweep(stage: Stage, sweep: Mapping[str, Any]) -> list[Markup]:
    points = sweep["points"]
    models = list(dict.fromkeys(point["model"] for point in points))
    panels = []
    for measure, label in MEASURES.items():
        series = []
        for number, model in enumerate(models):
            mine = [p for p in points if p["model"] == model and measure in p]
            x = [p["temperature"] for p in mine]
            name = model if not panels else ""
            bars = [(100 * p[f"{measure}_low"], 100 * p[f"{measure}_high"]) for p in mine]
            series.append(Series(name, x, [100 * p[measure] for p in mine], colour=number, bars=bars))
        if any(s.x for s in series):
            panels.append(Panel(series, label, zero=True))
    alt = f"{stage.name}: by temperature, for {', '.join(models)}: {', '.join(MEASURES.values())}"
    svg = plots.lines(f"sweep-{anchor(stage.name)}", panels, "temperature", alt)
    caption = "Means over prompts of all answers to each; bars: 95 %. Different: 0 where all answers to a prompt agree."
    rows = [
        [
            f"{p['model']}, {p['temperature']:g}",
            " · ".join(text.strip() or "(empty)" for text in p["answers"][:SHOWN_ANSWERS]),
        ]
        for p in points
    ]
    table = html_table(Table(["Temperature", "Answers to one prompt"], rows, numeric=False), "Answers by temperature")
    prompt = Markup("<pre>{}</pre>").format(sweep["prompt"])
    return [figures([figure(svg, caption, "Temperature")]), folded("Answers to one prompt", join([prompt, table]))]


def _digits(found: Mapping[str, Any]) -> list[Markup]:
    if not found["models"]:
        return []
    rows = []
    for entry in found["models"]:
        tested = "chi_square" in entry
        repeats = f"{100 * entry['repeats'] / entry['pairs']:.1f}" if entry["pairs"] else "–"
        rows.append(
            [
                Cell("chance" if entry["model"] == "generator" else entry["model"], f"{entry['lists']} lists"),
                *[str(count) for count in entry["counts"]],
                str(entry["digits"]),
                f"{entry['chi_square']:.1f}" if tested else "–",
                f"{entry['p_value']:.2g}" if tested else "–",
                repeats,
            ]
        )
    columns = ["Digit", *map(str, range(10)), "Digits", "χ²(9)", "p", "Repeat, %"]
    note = (
        "χ² of the counts against equal shares; p: how often chance is as uneven. Repeat: how often a digit is the one "
        "before it (10 % by chance)."
    )
    parts = [heading("Random digits"), html_table(Table(columns, rows), "Digits"), paragraph(note, "note")]
    for entry in found["models"]:
        if entry["model"] != "generator":
            text = Markup("<pre>{}<b>{}</b></pre>").format(found["prompt"], " ".join(entry["first"].split()))
            parts.append(folded(f"{entry['model']}: a list", text))
    return parts


def _views(views: Sequence[Mapping[str, Any]]) -> list[Markup]:
    if not views:
        return []
    note = (
        "The darker a token, the likelier it was. Point at one, or step to it by the Tab key, for what else was likely."
    )
    parts = [heading("Token by token"), paragraph(note, "note")]
    for view in views:
        tokens = Markup("").join(_token(token) for token in view["tokens"])
        parts.append(
            Markup('<div class="tokens"><p class="note">{}</p><pre>{}</pre><div>{}</div></div>').format(
                view["model"], view["prompt"], tokens
            )
        )
    return parts


def _token(token: Mapping[str, Any]) -> Markup:
    probability = token["probability"]
    others = Markup("").join(
        Markup("<span{}>{} <b>{}</b></span>").format(
            Markup(' class="taken"') if text == token["token"] else "", visible(text), _per_cent(share)
        )
        for text, share in token["alternatives"]
    )
    tip = Markup('<span role="tooltip">{}</span>').format(others)
    return Markup('<span class="token" tabindex="0" style="--p:{:.2f}">{}<small>{}</small>{}</span>').format(
        probability, visible(token["token"]), _per_cent(probability), tip
    )


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %" if share >= 0.001 else "<0.1 %"


def visible(token: str) -> str:
    """A token with its white space and control characters made visible."""
    shown = token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(c if c.isprintable() else "�" for c in shown) or "∅"
