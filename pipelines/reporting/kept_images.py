"""What is kept of runs of image models, one a seed, and the Markdown that a document shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.reporting.metrics import ERROR, is_interval_key
from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.images import ALL, MEASURES, REAL, explained, figure_alt, figure_panels
from pipelines.reporting.sections.images_training import BOUNDS
from pipelines.reporting.sections.images_training import KINDS as IMAGE_STAGES
from pipelines.reporting.tables import Cell, Table, markdown_table, show, system_label, systems_table

FIGURE = "comparison.png"
"""The figure of all families beside one another; a family's samples stand in ``NAME.png``."""

WITHOUT_CLOCK = "without_clock"
"""The seeds whose times by the clock count for nothing, for the machine was not theirs alone."""

_SAMPLES = tuple(measure for measure in MEASURES if measure != "bound")
_OF_VAES = ("negative_elbo", "kl", "reconstruction")
_COUNTED = ("parameters", "steps")
_PLACES = 6
_CLOCKS = ("train_runtime", "train_cpu_runtime", "seconds_a_sample")
_BOUNDS_AND_TIME = ("bound", *_OF_VAES, "bits_per_pixel", *_COUNTED, *_CLOCKS)


def image_metrics(run: Run, stage: Stage) -> dict[str, float]:
    """The means of a run, without their intervals over images, and its times.

    Args:
        run: the run.
        stage: the one that measured its models.
    """
    metrics = {key: value for key, value in run.metrics.items() if not is_interval_key(key)}
    for trained in run.of_kind(*IMAGE_STAGES):
        if timing := trained.json("timing.json"):
            metrics |= {f"{trained.name}/{name}": value for name, value in timing[-1].items() if name != "step"}
            metrics |= _while_training(trained, timing)
    seconds = (stage.json("timing.json") or {}).get("seconds_a_sample", {})
    return metrics | {f"{name}/seconds_a_sample": value for name, value in seconds.items()}


def _while_training(trained: Stage, timing: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The bound as it was measured on the way, and the processor's seconds until then: ``NAME/MEASURE@STEP``."""
    seconds = {entry["step"]: entry["train_cpu_runtime"] for entry in timing if "train_cpu_runtime" in entry}
    found = {}
    for name in BOUNDS:
        for step, value in zip(*trained.curve(f"eval_{name}"), strict=True):
            if step in seconds:
                found[f"{trained.name}/eval_{name}@{step:.0f}"] = value
                found[f"{trained.name}/train_cpu_runtime@{step:.0f}"] = seconds[step]
    return found


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what all runs measured, each with its standard error under ``KEY_se`` where there are several runs.

    Args:
        runs: the flat metrics of each.

    Returns:
        The standard error is s/√n, with s² the unbiased variance over the n runs.
    """
    count, found = len(runs), {}
    for key in sorted(set.intersection(*(set(run) for run in runs))):
        values = [run[key] for run in runs]
        found[key] = mean = sum(values) / count
        if count > 1:
            found[key + ERROR] = (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return found


def _with_bits(metrics: Mapping[str, float], families: Mapping[str, str]) -> dict[str, float]:
    """A run's metrics with ``bits_per_pixel`` those of ``bound``.

    A VAE's stage gives them of its negative ELBO. How many nats a bit a pixel is, is the same for both.
    """
    found = dict(metrics)
    for name, family in families.items():
        keys = f"{name}/bits_per_pixel", f"{name}/bound", f"{name}/{'negative_elbo' if family == 'vae' else 'bound'}"
        if all(key in metrics for key in keys):
            bits, bound, of = (metrics[key] for key in keys)
            found[keys[0]] = bits * bound / of
    return found


def _means(content: Mapping[str, Any]) -> dict[str, float]:
    """Means over the seeds with their errors; what the clock measured, over the seeds that had the machine alone."""
    families, runs, shared = content["settings"]["families"], content["runs"], content.get(WITHOUT_CLOCK, [])
    metrics = over_seeds([_with_bits(run["metrics"], families) for run in runs])
    alone = [run["metrics"] for run in runs if run["seed"] not in shared] or [run["metrics"] for run in runs]
    by_clock = {key: value for key, value in over_seeds(alone).items() if _of_clock(key)}
    return {key: value for key, value in metrics.items() if not _of_clock(key)} | by_clock


def _of_clock(key: str) -> bool:
    return key.removesuffix(ERROR).endswith(("/train_runtime", "/seconds_a_sample"))


def figure_of(content: Mapping[str, Any]) -> tuple[list, list[str]]:
    """The panels of the figure of all families, means over the seeds with their errors, and its rows.

    Args:
        content: what is kept of the runs.
    """
    families, metrics = content["settings"]["families"], _means(content)
    systems = [*families, *([REAL] if f"{REAL}/precision" in metrics else [])]
    keys = {s: f"{s}/seconds_a_sample" for s in families}
    seconds = {s: metrics[key] for s, key in keys.items() if key in metrics}
    return figure_panels(metrics, systems, seconds), systems


def images_block(content: Mapping[str, Any], folder: str = "") -> str:
    """The tables of the runs, what their numbers are, and their pictures.

    Args:
        content: what is kept of the runs.
        folder: where the pictures lie, as seen from the document.
    """
    families, runs, stages = content["settings"]["families"], content["runs"], content.get("stages", {})
    metrics = _means(content)
    systems = [*families, *([REAL] if f"{REAL}/precision" in metrics else [])]
    drawn = systems_table(metrics, systems, _SAMPLES)
    # Bit-flip diffusion has a reconstruction term too: that of its first stage alone, which is no VAE's.
    others = {f"{name}/{measure}" for name, family in families.items() if family != "vae" for measure in _OF_VAES}
    others |= {f"{name}/{measure}{ERROR}" for name in families for measure in _COUNTED}
    rest = {key: value for key, value in metrics.items() if key not in others}
    told = systems_table(rest, list(families), _BOUNDS_AND_TIME)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    several = f"Means over {len(runs)} seeds ({seeds}), ± standard error over the seeds."
    on_the_way, shared = _curves(metrics, list(families)), content.get(WITHOUT_CLOCK, [])
    texts = [
        several if len(runs) > 1 else f"One seed ({seeds}): how much another would change is not known.",
        *explained(content["settings"], metrics.get("measure/test_examples", 0), stages),
        "Training: without measuring and drawing; by the clock on the wall, and the processor's time of all threads.",
        *([f"By the clock: without seed {', '.join(map(str, shared))}, whose machine was shared."] if shared else []),
        *([_watched(metrics, families, stages)] if on_the_way else []),
    ]
    tables = [table for table in (drawn, told, on_the_way) if table]
    return "\n".join([*map(markdown_table, tables), " ".join(texts) + "\n", *_pictures(content, folder)])


def _watched(metrics: Mapping[str, float], families: Mapping[str, str], stages: Mapping[str, Mapping]) -> str:
    """What the bounds are that were measured while the models trained."""
    watched = [name for name in families if any(_steps(metrics, f"{name}/eval_{bound}@") for bound in BOUNDS)]
    counts = set()
    for name in watched:
        asked, whole = stages.get(name, {}).get("eval_images"), metrics.get(f"{name}/test_examples")
        counts.add(asked and (f"{show(asked)} of the" if whole is None or asked < whole else "all"))
    number = counts.pop() if len(counts) == 1 and None not in counts else "some of the"
    text = f"While training: on {number} held-out images"
    if any(families[name] == "vae" for name in watched):
        text += ", of a VAE the negative ELBO, not the bound of the table above"
    return text + "."


def _curves(metrics: Mapping[str, float], systems: Sequence[str]) -> Table | None:
    """Bounds against the processor's minutes, at some of the places where they were measured; None without any."""
    rows = []
    for system in systems:
        found = {bound: _steps(metrics, f"{system}/eval_{bound}@") for bound in BOUNDS}
        bound = next((bound for bound, steps in found.items() if steps), None)
        if bound is None:
            continue
        steps = found[bound]
        places = sorted({round(place * (len(steps) - 1) / (_PLACES - 1)) for place in range(_PLACES)})
        shown = []
        for step in (steps[place] for place in places):
            key = f"{system}/eval_{bound}@{step}"
            error = f" ± {metrics[key + ERROR]:.1f}" if key + ERROR in metrics else ""
            minutes = metrics[f"{system}/train_cpu_runtime@{step}"] / 60
            shown.append(f"{metrics[key]:.1f}{error} after {minutes:.1f}")
        rows.append([Cell(system_label(system)), Cell("; ".join(shown))])
    heads = ["System", "While training: bound in nats on held-out images, after minutes of a CPU"]
    return Table(heads, rows, numeric=False) if rows else None


def _steps(metrics: Mapping[str, float], prefix: str) -> list[int]:
    return sorted(int(key.removeprefix(prefix)) for key in metrics if key.startswith(prefix) and key[-1].isdigit())


def _pictures(content: Mapping[str, Any], folder: str) -> list[str]:
    """The figure and the grids of samples, as far as they were kept, in Markdown."""
    kept = content.get("pictures")
    if not kept:
        return []
    panels, _ = figure_of(content)
    errors = f"; bars: ± standard error over {len(content['runs'])} seeds" if len(content["runs"]) > 1 else ""
    lines = [f"![{figure_alt(panels)}]({folder}/{FIGURE})\n"]
    lines.append(f"Fréchet distance and seconds: the further left the better; precision and recall: right{errors}.\n")
    rows = []
    for system in kept["systems"]:
        label = system_label(system)
        alt = f"{ALL} samples of {label} in ten rows"
        rows.append([Cell(label), Cell(f"![{alt}]({folder}/{system}.png)")])
    heads = ["System", f"{ALL} samples of seed {kept['seed']}, not chosen: the first that were drawn"]
    return [*lines, markdown_table(Table(heads, rows, numeric=False))] if rows else lines
