"""Grids of images as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

_LEAST_SIDE = 28


def grid(images: Tensor, gap: int = 1) -> Image.Image:
    """One picture of many, (rows, columns, C, H, W), C = 1 or 3; small images are enlarged, each pixel to a block.

    Args:
        images: values outside [0, 1] are cut.
        gap: grey pixels between images, before they are enlarged.
    """
    rows, columns, channels, height, width = images.shape
    levels = images.detach().float().clamp(0, 1).mul(255).round().byte().cpu().numpy()
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * (height + gap), gap + column * (width + gap)
            sheet[top : top + height, left : left + width] = levels[row, column].transpose(1, 2, 0)
    scale = max(1, -(-_LEAST_SIDE // min(height, width)))
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: Path) -> None:
    """Write ``grid(images)`` as PNG; the folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    grid(images).save(temporary, format="PNG")
    temporary.replace(path)
