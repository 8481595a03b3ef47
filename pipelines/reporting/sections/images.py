"""Image models side by side: their measures as a table and a figure, and what they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import ERROR, Estimate, estimate, measure_of
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

ALL = 200
"""Samples in a family's grid."""

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
        parts += [_table(stage, systems, seconds), _explained(run, stage, settings)]
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


def explained(settings: Mapping, held_out: float, stages: Mapping[str, Mapping]) -> list[str]:
    """What the numbers of a comparison are, a sentence each.

    Args:
        settings: the stage's ``settings.json``.
        held_out: how many held-out images it compared with.
        stages: name of a stage -> its fields, of those that trained the models; some may be missing.
    """
    return [
        f"{show(settings['samples'])} samples of each model against {show(int(held_out))} held-out images, "
        f"{_REPRESENTATIONS[settings['binarize']]}.",
        "Training images: real ones measured as though they were samples, what a perfect model would come near to.",
        "Distance to the nearest training image: the median over samples, for one of held-out images; well below 1, "
        "or copies (nearer than 99 % of held-out images are) well above 1 %, are signs of memorization.",
        f"Bounds: on the negative log-likelihood of an image{_of_vaes(settings['families'], stages)}; only models of "
        "the same binary images compare.",
    ]


def _of_vaes(families: Mapping[str, str], stages: Mapping[str, Mapping]) -> str:
    """Which bound a VAE's is, and with how many samples of its latent it was taken."""
    taken = {name: stages.get(name, {}).get("importance_samples") for name, kind in families.items() if kind == "vae"}
    if not taken:
        return ""
    if set(taken.values()) == {0}:
        return " (of a VAE the negative ELBO)"
    numbers = {name: k for name, k in taken.items() if k is not None}
    text = " (of a VAE the importance-weighted one"
    if len(set(numbers.values())) == 1 and len(numbers) == len(taken):
        text += f" with k = {next(iter(numbers.values()))} samples of z"
    elif numbers:
        text += ", with k = " + ", ".join(f"{k} samples of z ({system_label(name)})" for name, k in numbers.items())
    return text + ")"


def _explained(run: Run, stage: Stage, settings: Mapping) -> Markup:
    small = "Small print: 95 % bootstrap intervals over samples, or standard errors over seeds (±)."
    stages = {trained.name: trained.config for trained in run.stages}
    told = explained(settings, stage.metrics.get("measure/test_examples", 0), stages)
    return paragraph(" ".join([*told, small]), "note")


def figure_panels(
    metrics: Mapping[str, float], systems: Sequence[str], seconds: Mapping[str, float]
) -> list[tuple[str, dict[str, Estimate], bool]]:
    """What ``plots.dots`` draws of a comparison, a panel a measure; a measure that nobody has is left out.

    Args:
        metrics: with intervals or standard errors, where there are any.
        systems: the rows.
        seconds: that a sample takes, of the systems that were sampled.
    """
    panels = []
    for measure in _FIGURE:
        if measure == "seconds":
            values = {s: Estimate(seconds[s]) for s in systems if s in seconds}
        else:
            values = {s: found for s in systems if (found := _estimate(metrics, f"{s}/{measure}"))}
        if values:
            shown = measure_of(measure)
            label = "seconds a sample (log)" if measure == "seconds" else f"{shown.label} {shown.unit}".strip()
            panels.append((label, {s: _scaled(v, shown.scale) for s, v in values.items()}, measure == "seconds"))
    return panels


def _estimate(metrics: Mapping[str, float], key: str) -> Estimate | None:
    """The value with its interval, or with its standard error on both sides."""
    found = estimate(metrics, key)
    if found is None or found.low is not None or key + ERROR not in metrics:
        return found
    return Estimate(found.value, found.value - metrics[key + ERROR], found.value + metrics[key + ERROR])


def _scaled(found: Estimate, scale: float) -> Estimate:
    return Estimate(*(None if value is None else value * scale for value in (found.value, found.low, found.high)))


def figure_alt(panels: Sequence[tuple[str, Mapping[str, Estimate], bool]]) -> str:
    """The figure in words: every measure of every system."""
    return "; ".join(
        f"{label}: " + ", ".join(f"{system_label(s)} {found.value:.3g}" for s, found in values.items())
        for label, values, _ in panels
    )


def _figure(stage: Stage, systems: Sequence[str], seconds: Mapping[str, float]) -> list[Markup]:
    panels = figure_panels(stage.metrics, systems, seconds)
    if not panels:
        return []
    rows = [(s, system_label(s)) for s in systems]
    drawn = plots.svg(plots.dots(panels, rows, REAL), f"images-{anchor(stage.name)}", figure_alt(panels))
    caption = (
        "Fréchet distance and seconds: the further left the better; precision and recall: the further right. Bars: "
        "95 % intervals over samples, or standard errors over seeds, where there are any."
    )
    return [figure(drawn, caption, "The models beside one another")]


def _drawn(stage: Stage, system: str) -> Markup:
    label, parts = system_label(system), []
    for suffix, title, caption in (
        ("", f"{ALL} samples", f"Not chosen: the first {ALL} that were drawn."),
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
