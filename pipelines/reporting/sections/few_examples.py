"""Quality against the examples that a model was fine-tuned on: pretrained and from random weights side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import estimate, format_mean
from pipelines.reporting.page import Section, figure, figures, join
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage
from pipelines.reporting.tables import BASELINES, Table, html_table, system_label

KINDS = ("sft",)
PRETRAINED, SCRATCH = "pretrained", "from scratch"


def few_examples(run: Run) -> Section | None:
    """Curve and table of ROUGE-1 by examples; None unless models of several sizes of training set were measured."""
    found = sorted(_measured(run), key=lambda one: one[2])
    kinds = {
        kind: [(system, stage, examples) for system, stage, examples in found if _kind(stage) == kind]
        for kind in (PRETRAINED, SCRATCH)
    }
    if not any(len({examples for *_, examples in several}) > 1 for several in kinds.values()):
        return None
    lead = (
        "The same held-out documents, summarized by models that were fine-tuned on few examples and on many. Where "
        "both curves have a point, the network, the tokenizer and the optimizer steps are the same; only the weights "
        "that training began with differ."
    )
    parts = [figures([_figure(run, kinds)]), html_table(_table(run, found), "Quality by examples")]
    return Section("few-examples", "Pretrained or from scratch", join(parts), lead)


def _measured(run: Run) -> Iterator[tuple[str, Stage, int]]:
    """System, the stage that trained it, and how many examples it was trained on."""
    trained = {os.path.abspath(stage.folder): stage for stage in run.of_kind(*KINDS)}
    for stage in run.of_kind("evaluate"):
        for system, path in (stage.config.get("systems") or {}).items():
            made = trained.get(os.path.abspath(path))
            if made is not None and "sft/train_examples" in made.metrics and f"{system}/rouge1" in run.metrics:
                yield system, made, int(made.metrics["sft/train_examples"])


def _kind(stage: Stage) -> str:
    return SCRATCH if stage.config.get("model") is None else PRETRAINED


def _figure(run: Run, kinds: dict[str, list[tuple[str, Stage, int]]]) -> Markup:
    series, texts = [], []
    for kind, several in kinds.items():
        if not several:
            continue
        scores = [estimate(run.metrics, f"{system}/rouge1") for system, *_ in several]
        ends = [(s.value if s.low is None else s.low, s.value if s.high is None else s.high) for s in scores]
        series.append(Series(kind, [n for *_, n in several], [s.value for s in scores], bars=ends))
        texts.append(
            f"{kind}: " + ", ".join(f"{s.value:.1f} at {n:,}" for s, (*_, n) in zip(scores, several, strict=True))
        )
    sizes = [n for several in kinds.values() for *_, n in several]
    baselines = [(name, run.metrics[f"{name}/rouge1"]) for name in BASELINES if f"{name}/rouge1" in run.metrics]
    if baselines:
        name, best = max(baselines, key=lambda one: one[1])
        series.append(Series(system_label(name).lower(), [min(sizes), max(sizes)], [best, best]))
        texts.append(f"{system_label(name)}: {best:.1f}")
    svg = plots.lines("few-examples", [Panel(series, "ROUGE-1")], "training examples", "; ".join(texts), logx=True)
    caption = "Bars: 95 % intervals over held-out documents. The flat line needs no training at all."
    return figure(svg, caption, "ROUGE-1 by training examples")


def _table(run: Run, found: list[tuple[str, Stage, int]]) -> Table:
    rows = [
        [
            system_label(system),
            _kind(stage),
            f"{examples:,}",
            f"{stage.metrics.get('sft/steps', 0):,.0f}",
            format_mean(run.metrics, f"{system}/rouge1"),
        ]
        for system, stage, examples in found
    ]
    return Table(["System", "Begins", "Examples", "Steps", "ROUGE-1 (95 % interval)"], rows)
