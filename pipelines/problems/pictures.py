"""Grids of images for an exercise's page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def grid_png(images: Tensor) -> bytes:
    """A grid of images as the bytes of a PNG; see ``pipelines.images.pictures.grid``.

    Args:
        images: (rows, columns, C, H, W), in [0, 1].
    """
    from pipelines.images.pictures import grid

    buffer = io.BytesIO()
    grid(images).save(buffer, format="PNG")
    return buffer.getvalue()
