"""Image models side by side: their measures as a table and a figure, and what they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import estimate, measure_of
from pipelines.reporting.page import Section, figure, figures, heading, join, paragraph, picture
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Cell, Table, html_table, show, system_label, systems_table

KINDS = ("measure",)
REAL = "training_images"
MEASURES = (
    "frechet_distance",
    "grey_frechet_distance",
    "precision",
    "recall",
    "confidence",
    "class_coverage",
    "class_entropy",
    "nearest_ratio",
    "copies",
    "bound",
)
"""Columns of the comparison, in order; those that no system has are left out."""

_FIGURE = ("frechet_distance", "precision", "recall", "seconds")
_REPRESENTATIONS = {
    "none": "grey levels as they are",
    "bernoulli": "in black and white, each pixel white with the probability that its grey level is",
    "threshold": "in black and white, cut at the threshold",
}


def images(run: Run) -> Section | None:
    """The comparison of every stage that measured image models; None when there are none."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        settings = stage.json("settings.json")
        if not isinstance(settings, Mapping):
            continue
        systems = [*settings["families"], *([REAL] if f"{REAL}/precision" in stage.metrics else [])]
        seconds = (stage.json("timing.json") or {}).get("seconds_a_sample", {})
        parts += [heading(stage.name)] if len(run.of_kind(*KINDS)) > 1 else []
        parts += [_table(stage, systems, seconds), _explained(stage, settings)]
        parts.append(figures(_figure(stage, systems, seconds)))
        parts += [_drawn(stage, system) for system in settings["families"]]
        shown.add(stage.name)
    if not parts:
        return None
    lead = (
        "Samples of every model beside real images that none of them was trained on. Fréchet distance, precision and "
        "recall are taken in the features of a small classifier of these very images; they compare the models here "
        "with one another, not with an FID."
    )
    return Section("images", "Image models compared", join(parts), lead, frozenset(shown))


def _table(stage: Stage, systems: Sequence[str], seconds: Mapping[str, float]) -> Markup:
    table = systems_table(stage.metrics, systems, MEASURES) or Table(["System"], [[s] for s in systems])
    cells = [Cell(f"{seconds[s]:.2g}" if s in seconds else "–") for s in systems]
    rows = [[*row, cell] for row, cell in zip(table.rows, cells, strict=True)]
    return html_table(Table([*table.columns, "Seconds a sample"], rows), "Image models compared")


def explained(settings: Mapping, held_out: float) -> list[str]:
    """What the numbers of a comparison are, a sentence each.

    Args:
        settings: the stage's ``settings.json``.
        held_out: how many held-out images it compared with.
    """
    return [
        f"{show(settings['samples'])} samples of each model against {show(int(held_out))} held-out images, "
        f"{_REPRESENTATIONS[settings['binarize']]}.",
        "Training images: real ones measured as though they were samples, what a perfect model would come near to.",
        "Distance to the nearest training image: the median over samples, for one of held-out images; well below 1, "
        "or copies (nearer than 99 % of held-out images are) well above 1 %, are signs of memorization.",
        "Bounds: on the negative log-likelihood of an image (of a VAE the importance-weighted one); only models of the "
        "same binary images compare.",
    ]


def _explained(stage: Stage, settings: Mapping) -> Markup:
    small = "Small print: 95 % bootstrap intervals over samples, or standard errors over seeds (±)."
    return paragraph(" ".join([*explained(settings, stage.metrics.get("measure/test_examples", 0)), small]), "note")


def _figure(stage: Stage, systems: Sequence[str], seconds: Mapping[str, float]) -> list[Markup]:
    """Every measure of the figure in a panel of dots; a measure that nobody has is left out."""
    panels = []
    for measure in _FIGURE:
        values = {}
        for system in systems:
            found = estimate(stage.metrics, f"{system}/{measure}")
            value = seconds.get(system) if measure == "seconds" else found and found.value
            if value is not None:
                values[system] = value
        if values:
            shown = measure_of(measure)
            label = "seconds a sample (log)" if measure == "seconds" else f"{shown.label} {shown.unit}".strip()
            panels.append((label, {s: v * shown.scale for s, v in values.items()}, measure == "seconds"))
    if not panels:
        return []
    alt = "; ".join(
        f"{label}: " + ", ".join(f"{system_label(s)} {value:.3g}" for s, value in values.items())
        for label, values, _ in panels
    )
    drawn = plots.dots(f"images-{anchor(stage.name)}", panels, [(s, system_label(s)) for s in systems], REAL, alt)
    caption = "Fréchet distance and seconds: the further left the better; precision and recall: the further right."
    return [figure(drawn, caption, "The models beside one another")]


def _drawn(stage: Stage, system: str) -> Markup:
    label, parts = system_label(system), []
    for suffix, title, caption in (
        ("", "200 samples", "Not chosen: the first 200 that were drawn."),
        ("_denoising", "Out of the noise", "Forty samples on their way, over and over again."),
        (
            "_nearest",
            "The samples nearest to a training image",
            "Above: of all samples the twenty that lie nearest to a training image; below: that image.",
        ),
    ):
        path = stage.folder / f"{system}{suffix}.png"
        if path.is_file():
            parts.append(figure(picture(path, f"{title} of {label}"), caption, title))
    return join([heading(label), figures(parts)]) if parts else Markup("")
