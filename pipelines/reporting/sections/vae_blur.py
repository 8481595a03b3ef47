"""Why reconstructions blur: how sharp autoencoders of several β and likelihoods are, and what their latents carry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import Markup

from pipelines.reporting import plots
from pipelines.reporting.page import Section, figure, figures, heading, join, paragraph, picture
from pipelines.reporting.run import Run, Stage, anchor
from pipelines.reporting.tables import Table, html_table, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("vae_blur",)
SWEEP, SHARPNESS, PICTURE = "sweep.json", "sharpness.png", "reconstructions.png"
LIKELIHOODS = {"bernoulli": "Bernoulli", "gaussian": "Gaussian"}
DRAWN = "On top: held-out images; below them a row for each autoencoder of the table, in its order."
ALT = "Sharpness of reconstructions against β (above) and against the nats that the latent carries (below)"


def vae_blur(run: Run) -> Section | None:
    """The sweep of every stage that made one; None where there is none."""
    parts, shown = [], set()
    for stage in run.of_kind(*KINDS):
        rows = stage.json(SWEEP)
        if not isinstance(rows, Sequence) or not rows:
            continue
        parts += [heading(stage.name)] if len(run.of_kind(*KINDS)) > 1 else []
        parts += [html_table(sweep_table(rows), "Sharpness by β and likelihood")]
        parts.append(paragraph(" ".join(explained(stage.config, rows)), "note"))
        parts.append(figures(_drawn(stage, rows)))
        shown.add(stage.name)
    if not parts:
        return None
    lead = (
        "A decoder is asked for the mean of all images that may stand behind a latent. The fewer nats the latent "
        "carries, the more images those are, and their mean is a blur: sharpness should follow the nats carried."
    )
    return Section("vae-blur", "Why reconstructions blur", join(parts), lead, frozenset(shown))


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """An autoencoder a row, in the order of the sweep."""
    heads = ["Likelihood, β", "KL, nats", "Sharpness, images = 1", "Squared error a pixel"]
    cells = [[named(row), f"{row['kl']:.2f}", f"{row['sharpness']:.3f}", f"{row['error']:.4f}"] for row in rows]
    return Table(heads, cells)


def named(row: Mapping[str, Any]) -> str:
    """``Bernoulli, 0.3``: which autoencoder of the sweep."""
    return f"{LIKELIHOODS.get(row['likelihood'], row['likelihood'])}, {row['beta']:g}"


def explained(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers are, and what was found, a sentence each; every number is the sweep's.

    Args:
        config: the stage's fields.
        rows: the sweep.
    """
    texts = []
    if {"max_steps", "dataset", "seed"} <= set(config):
        steps = config["max_steps"]
        length = f"{show(steps)} steps" if steps > 0 else f"{show(config.get('epochs'))} epochs"
        texts.append(f"{len(rows)} autoencoders, {length} each, seed {config['seed']}, on {config['dataset']}.")
    texts.append(
        "Sharpness: the mean squared difference of neighbouring pixels in E[x|z], z drawn from q(z|x), over that in "
        "the held-out images. KL: what z carries of an image."
    )
    groups = {name: [row for row in rows if row["likelihood"] == name] for name in {r["likelihood"]: 0 for r in rows}}
    for name, mine in groups.items():
        most, least = (choose(mine, key=lambda row: row["kl"]) for choose in (max, min))
        texts.append(
            f"{LIKELIHOODS.get(name, name)}: {100 * most['sharpness']:.0f} % of the images' sharpness at "
            f"{most['kl']:.1f} nats, {100 * least['sharpness']:.0f} % at {least['kl']:.1f}."
        )
    if len(rows) > 2:
        texts.append(_ranked(rows))
    if len(groups) == 2 and (gaps := gaps_at_equal_nats(*groups.values())):
        shown = ", ".join(f"{gap:+.2f} at {nats:.1f} nats" for nats, gap in gaps).replace("-", "−")
        first, second = (LIKELIHOODS.get(name, name) for name in groups)
        texts.append(f"{first} less {second} where z carries the same (interpolated): {shown}.")
    return texts


def _ranked(rows: Sequence[Mapping[str, Any]]) -> str:
    """How sharpness ranks with what is carried, and with β."""
    by_nats, by_beta = (rank_correlation([(row[key], row["sharpness"]) for row in rows]) for key in ("kl", "beta"))
    text = f"Spearman's correlation of sharpness over all of them: {by_nats:.2f} with the nats carried, {by_beta:.2f} "
    return f"{text}with β.".replace("-", "−")


def gaps_at_equal_nats(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """How much sharper the autoencoders of one likelihood are than those of the other that carry as many nats.

    Args:
        one, other: the rows of each. Between its rows the sharpness of the other is linear in the nats' logarithm.

    Returns:
        (nats, difference) for each row of the first that lies between two of the other, the fewest nats first.
    """
    carried = sorted((row["kl"], row["sharpness"]) for row in other if row["kl"] > 0)
    found = []
    for row in sorted(one, key=lambda row: row["kl"]):
        for (low, start), (high, end) in itertools.pairwise(carried):
            if low <= row["kl"] < high:
                share = math.log(row["kl"] / low) / math.log(high / low)
                found.append((row["kl"], row["sharpness"] - start - share * (end - start)))
    return found


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation of two variables; equal values share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True))[0])


def drawing(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Sharpness against β (above) and against the nats that z carries (below), a colour for each likelihood."""
    with matplotlib.rc_context(plots.STYLE):
        made, axes = plots.new_figure(2, height=4.6)
        for axis, key, label in (
            (axes[0], "beta", "weight of the divergence, β"),
            (axes[1], "kl", "KL, nats an image"),
        ):
            for number, likelihood in enumerate(dict.fromkeys(row["likelihood"] for row in rows)):
                mine = sorted((row[key], row["sharpness"]) for row in rows if row["likelihood"] == likelihood)
                name = LIKELIHOODS.get(likelihood, likelihood)
                axis.plot(*zip(*mine, strict=True), marker="o", markersize=3, color=plots.SERIES[number], label=name)
            axis.set_xlabel(label)
            axis.set_ylabel("sharpness, images = 1")
            axis.set_ylim(bottom=0)
        if min(row["beta"] for row in rows) > 0:
            axes[0].set_xscale("log")
        axes[0].legend()
        return made


def _drawn(stage: Stage, rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    svg = plots.svg(drawing(rows), f"vae-blur-{anchor(stage.name)}", ALT)
    caption = "If what is carried decided alone, below one curve would go through all likelihoods."
    found = [figure(svg, caption, "Sharpness against β and against what is carried")]
    if (path := stage.folder / PICTURE).is_file():
        found.append(figure(picture(path, f"Reconstructions of {stage.name}"), DRAWN, "Reconstructions"))
    return found
