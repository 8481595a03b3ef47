"""How each image model was trained: curves, the bound against time, and the method's own pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.metrics import format_mean, is_interval_key, measure_of
from pipelines.reporting.page import Section, figure, figures, folded, heading, join, picture
from pipelines.reporting.plots import Panel, Series
from pipelines.reporting.run import Run, Stage, anchor, is_number
from pipelines.reporting.tables import Table, html_table, show, system_label

KINDS = ("ddpm", "bitflip", "vae", "gan", "classifier")

_PICTURES = {
    "reconstructions": ("Reconstructions", "Above: held-out images; below: what the model makes of them."),
    "traversals": ("Latent dimensions", "A row for each of the dimensions that carry most, from one end to the other."),
    "interpolations": ("Interpolations", "From left to right: on the way from one image to another."),
    "denoising": (
        "Out of the noise",
        "Above: samples from noise to image; below: what the network expects meanwhile.",
    ),
    "samples": ("200 samples", "Not chosen: the first 200 that were drawn when training had ended."),
}
_SHOWN_STEPS = 6
BOUNDS = ("negative_elbo", "bound", "importance_weighted")


def images_training(run: Run) -> Section | None:
    """Curves and pictures of every stage that trains an image model; None when there are none."""
    measured = any(stage.finished for stage in run.of_kind("measure"))
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        drawn = [*_curves(stage), *_pictures(stage, samples=not measured)]
        if not drawn and not stage.metrics:
            continue
        parts.append(heading(system_label(stage.name)))
        if stage.metrics:
            keys = [k for k in sorted(stage.metrics) if not is_interval_key(k)]
            rows = [[_name(stage, k), format_mean(stage.metrics, k)] for k in keys]
            parts.append(html_table(Table(["On held-out images, and counts", "Value"], rows), stage.name))
        parts.append(figures(drawn))
        if shapes := list(_on_the_way(stage)):
            parts.append(folded("Samples while it trained", figures(shapes), f"{len(shapes)} of the times"))
        shown.add(stage.name)
    if not parts:
        return None
    lead = "Means over the steps between two entries; nothing was chosen by what was measured on held-out images."
    return Section("image-training", "Image models in training", join(parts), lead, frozenset(shown))


def _name(stage: Stage, key: str) -> str:
    # by what the stage makes, whatever it is called: of a VAE some measures are another thing
    measure = measure_of(f"{stage.kind}/{key.rpartition('/')[2]}")
    return f"{measure.label}, {measure.unit}" if measure.unit not in ("", "%") else measure.label


def _curves(stage: Stage) -> Iterable[Markup]:
    key = f"image-curve-{anchor(stage.name)}"
    logged = dict.fromkeys(k for entry in stage.history for k, v in entry.items() if is_number(v))
    losses = [k for k in logged if k.endswith("loss") and not k.startswith("eval_")]
    if losses:
        series = [
            Series(_words(k) if len(losses) > 1 else "", *stage.curve(k), smooth=True, colour=i)
            for i, k in enumerate(losses)
        ]
        svg = plots.lines(f"{key}-loss", [Panel(series, "loss")], "optimizer step", f"losses of {stage.name}")
        yield figure(svg, "Faint: each entry; strong: running mean.", "Loss")
    yield from _bound(stage, key, logged)
    if "probability_fake" in logged:
        yield from _game(stage, key)


def _words(key: str) -> str:
    return key.removesuffix("_loss").replace("_", " ")


def _bound(stage: Stage, key: str, logged: Iterable[str]) -> Iterable[Markup]:
    """The bound in nats against the minutes of training, where the stage measured one on the way.

    The minutes are the processor's, which do not depend on what else the machine does, with one curve by the clock
    beside them (on a GPU that is the one to look at); of runs that kept the clock's alone, the clock's.
    """
    timing = stage.json("timing.json") or []
    clock, processor = (
        {entry["step"]: entry[name] / 60 for entry in timing if name in entry}
        for name in ("train_runtime", "train_cpu_runtime")
    )
    curves = [("", "training", processor or clock, 0), ("eval_", "held out", processor or clock, 1)]
    curves += [("eval_", "held out, by the clock", clock, 2)] if processor else []
    for name in BOUNDS:
        series = []
        for prefix, label, minutes, colour in curves:
            x, y = stage.curve(prefix + name)
            if y and all(step in minutes for step in x):
                series.append(Series(label, [minutes[s] for s in x], y, smooth=not prefix, colour=colour))
        if series:
            panel = Panel(series, f"{measure_of(name).label.lower()} (nats)")
            xlabel = "CPU minutes of training, where not said otherwise" if processor else "minutes of training"
            svg = plots.lines(f"{key}-bound", [panel], xlabel, f"{name} of {stage.name} against time")
            caption = "Measuring and drawing are left out of the time."
            caption += " CPU minutes are those of all threads." if processor else ""
            yield figure(svg, caption, "The bound against time")
            return


def _game(stage: Stage, key: str) -> Iterable[Markup]:
    """A GAN's two players: how sure the discriminator is, and what is left of the generator's gradient."""
    series = [
        Series(label, *stage.curve(f"probability_{name}"), colour=colour)
        for name, label, colour in (("real", "training images", 0), ("fake", "samples", 1))
    ]
    svg = plots.lines(f"{key}-probability", [Panel(series, "D(x)")], "optimizer step", "discriminator's probabilities")
    yield figure(svg, "Mean probability of being real. At ½ for both the discriminator is guessing.", "Discriminator")
    series = []
    for name, colour in (("minimax", 0), ("nonsaturating", 1)):
        x, y = stage.curve(f"gradient_norm_{name}")
        if y:
            series.append(Series(name, x, [math.log10(max(value, 1e-12)) for value in y], colour=colour))
    if series:
        panel = Panel(series, "log₁₀ of the gradient's norm")
        svg = plots.lines(f"{key}-gradient", [panel], "optimizer step", "norms of the generator's gradient")
        caption = "On the same samples. Where D(G(z)) nears 0, the minimax loss loses its gradient."
        yield figure(svg, caption, "The generator's gradient under both losses")


def _pictures(stage: Stage, samples: bool) -> Iterable[Markup]:
    """The pictures that the stage left; its samples only where no later stage shows them."""
    for path in sorted(stage.folder.glob("*.png")):
        if path.stem == "samples" and not samples:
            continue
        title, caption = _PICTURES.get(path.stem, (path.stem.replace("_", " ").capitalize(), "From held-out images."))
        yield figure(picture(path, f"{title} of {stage.name}"), caption, title)


def _on_the_way(stage: Stage) -> Iterable[Markup]:
    """Samples as they took shape, at some of the steps where they were drawn; the noise is the same each time."""
    found = sorted((int(path.stem.rpartition("-")[2]), path) for path in stage.folder.glob("samples/step-*.png"))
    last = max(0, len(found) - 1)
    places = {round(place * last / (_SHOWN_STEPS - 1)) for place in range(_SHOWN_STEPS)} if found else set()
    for step, path in (found[place] for place in sorted(places)):
        title = f"After {show(step)} steps"
        yield figure(picture(path, f"Samples of {stage.name} after {step} steps"), "From the same noise.", title)
