"""Small PNG files that stand in documents: few colours, so that a repository bears them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import UserError
from pipelines.reporting import plots
from pipelines.reporting.kept import SWEEP
from pipelines.reporting.kept_images import FIGURE, figure_of
from pipelines.reporting.run import Run
from pipelines.reporting.sections.images import REAL
from pipelines.reporting.sections.vae_blur import SHARPNESS, drawing
from pipelines.reporting.tables import system_label

LARGEST = 60_000
"""Bytes that a kept picture may take."""

_COLOURS = (32, 16, 8, 4, 2)


def small(picture: Image.Image) -> bytes:
    """A picture as a PNG file of at most ``LARGEST`` bytes, where few colours make it so: the most of 32 that fit.

    A picture of so few colours is kept as it is. Greys become evenly spaced ones, so that faint noise on a dark ground
    is gone instead of taking most of the colours.

    Args:
        picture: of any mode.
    """
    plain = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    for colours in _COLOURS:
        few = plain
        if plain.mode == "L" and plain.getcolors(colours) is None:
            few = plain.point([round(round(level * (colours - 1) / 255) * 255 / (colours - 1)) for level in range(256)])
        buffer = io.BytesIO()
        few.quantize(colours, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def picture_names(content: Mapping[str, Any]) -> list[str]:
    """The files of the pictures that belong to what is kept."""
    kept = content.get("pictures")
    if not kept:
        return []
    if SWEEP in content:
        return list(kept["files"])
    return [FIGURE] * bool(figure_of(content)[0]) + [f"{system}.png" for system in kept["systems"]]


def pictures_of(content: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, bytes]:
    """The pictures to be written of what is kept: a figure, drawn from the content alone, and those that a run drew.

    Args:
        content: what is kept.
        runs: those that it was taken from, or that were added to it. Of image models the first one's samples are taken,
            unless the content has those of another run already.

    Returns:
        File name -> its content.

    Raises:
        UserError: if a picture of the run cannot be read.
    """
    kept, names = content.get("pictures"), picture_names(content)
    if not kept:
        return {}
    if SWEEP in content:
        figure, (drawn,) = drawing(content[SWEEP]), runs[0].of_kind("vae_blur")
    else:
        panels, systems = figure_of(content)
        figure = plots.dots(panels, [(s, system_label(s)) for s in systems], REAL) if panels else None
        (drawn,) = [stage for stage in runs[0].of_kind("measure") if stage.finished]
    taken = SWEEP in content or drawn.record.get("seed") == kept["seed"]
    found = {}
    for name in names:
        if name in (FIGURE, SHARPNESS):
            found[name] = small(Image.open(io.BytesIO(plots.png(figure))))
        elif taken:
            found[name] = small(_read(drawn.folder / name))
    return found


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except OSError as error:
        raise UserError("picture", str(path), f"cannot be read ({error})", "run its stage again") from None
