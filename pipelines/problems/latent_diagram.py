"""The block diagram of a latent variable model, drawn as SVG in the colours of the other figures."""

from __future__ import annotations

from dataclasses import dataclass

_INK, _MUTED = "var(--ink, #22262b)", "var(--muted, #6a727c)"
_BLUE, _ORANGE, _GREEN = "var(--series-1, #2b6cb0)", "var(--series-2, #c05621)", "var(--series-3, #2f855a)"
_WIDTH, _HEIGHT = 324, 346  # points: as wide as the other figures
_MIDDLE, _BOX = 118, 30


@dataclass(frozen=True)
class Numbers:
    """What one image's forward pass put into the diagram.

    Attributes:
        shape: of the image, as text (``1×8×8``).
        latent: dimensions of z.
        encoder: weights of the encoder.
        decoder: weights of the decoder.
        kl: KL(q(z|x) ‖ p(z)), nats.
        reconstruction: −log p(x|z), nats.
    """

    shape: str
    latent: int
    encoder: int
    decoder: int
    kl: float
    reconstruction: float


def _text(x: float, y: float, words: str, colour: str = _INK, anchor: str = "middle", size: float = 10) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" font-size="{size:g}">{words}</text>'


def _box(x: float, y: float, width: float, name: str, note: str, colour: str) -> str:
    """A box centred at x with its top at y: a name, and a smaller note below it."""
    frame = (
        f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{_BOX}" rx="5" '
        f'fill="none" stroke="{colour}" stroke-width="1.4"/>'
    )
    return frame + _text(x, y + 13, name) + _text(x, y + 25, note, _MUTED, size=9)


def _arrow(x1: float, y1: float, x2: float, y2: float, colour: str = _MUTED, dashed: bool = False) -> str:
    """A line with its head drawn as two strokes, so that no marker needs an id."""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    ux, uy = (x2 - x1) / length * 5, (y2 - y1) / length * 5
    head = f"M{x2 - ux - uy * 0.6:g} {y2 - uy + ux * 0.6:g}L{x2:g} {y2:g}L{x2 - ux + uy * 0.6:g} {y2 - uy - ux * 0.6:g}"
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    line = f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" fill="none" stroke="{colour}" stroke-width="1.2"{dash}/>'
    return line + f'<path d="{head}" fill="none" stroke="{colour}" stroke-width="1.2"/>'


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{_MUTED}" stroke-width="1.2"/>'


def diagram(numbers: Numbers) -> str:
    """The diagram as an SVG element: an image on its way down to z and back, beside it the two terms of the loss."""
    n, side = numbers, 262
    down = [
        _box(_MIDDLE, 6, 130, "image x", n.shape, _INK),
        _arrow(_MIDDLE, 36, _MIDDLE, 56),
        _box(_MIDDLE, 56, 130, "encoder", f"{n.encoder:,} weights", _BLUE),
        _arrow(_MIDDLE - 30, 86, _MIDDLE - 36, 106),
        _arrow(_MIDDLE + 30, 86, _MIDDLE + 36, 106),
        _box(_MIDDLE - 38, 106, 68, "mean m", f"{n.latent} numbers", _BLUE),
        _box(_MIDDLE + 38, 106, 68, "variance v", f"{n.latent} numbers", _BLUE),
        _arrow(_MIDDLE - 36, 136, _MIDDLE - 14, 162),
        _arrow(_MIDDLE + 36, 136, _MIDDLE + 14, 162),
        _box(_MIDDLE, 162, 130, "z = m + √v · ε", f"{n.latent} numbers: the bottleneck", _ORANGE),
        _arrow(_MIDDLE, 192, _MIDDLE, 216),
        _box(_MIDDLE, 216, 130, "decoder", f"{n.decoder:,} weights", _GREEN),
        _arrow(_MIDDLE, 246, _MIDDLE, 266),
        _box(_MIDDLE, 266, 130, "E[x|z]", n.shape, _GREEN),
    ]
    beside = [
        _box(side, 162, 84, "noise ε", "N(0, I)", _MUTED),
        _arrow(side - 42, 177, _MIDDLE + 65, 177),
        _arrow(_MIDDLE + 72, 121, side - 42, 121, _ORANGE, dashed=True),
        _box(side, 106, 84, "KL(q‖p)", f"{n.kl:.1f} nats", _ORANGE),
        _arrow(_MIDDLE + 65, 281, side - 42, 281, _GREEN, dashed=True),
        _box(side, 266, 84, "−log p(x|z)", f"{n.reconstruction:.1f} nats", _GREEN),
        _line(f"M{_MIDDLE + 65:g} 21L{_WIDTH - 8} 21L{_WIDTH - 8} 281"),
        _arrow(_WIDTH - 8, 281, side + 42, 281),
        _text(_MIDDLE, 322, "to draw a new image:", _MUTED),
        _text(_MIDDLE, 336, "z ~ N(0, I), then the decoder alone", _MUTED),
        _text(side, 322, "sum: −ELBO", _INK),
        _text(side, 336, f"{n.kl + n.reconstruction:.1f} nats", _INK),
    ]
    alt = "An image goes through the encoder to a mean and a variance, through a noisy z, and through the decoder back."
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{alt}" '
        f'style="font-family: var(--font, sans-serif)">'
    )
    return opening + "".join([*down, *beside]) + "</svg>"
