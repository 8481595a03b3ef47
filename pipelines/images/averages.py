"""Exponential moving averages of weights, which are what is saved, sampled and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from diffusers.training_utils import EMAModel
from torch import nn


class Averages:
    """Averages of some parts of a method.

    Args:
        parts: name -> module.
        names: those that are averaged.
        decay: that the averages' rises to, as (1 + step)/(10 + step).

    Attributes:
        models: name -> diffusers' ``EMAModel``.
    """

    def __init__(self, parts: dict[str, nn.Module], names: Iterable[str], decay: float):
        self._parts = parts
        self.models = {name: EMAModel(parts[name].parameters(), decay=decay, foreach=True) for name in names}

    def step(self, name: str) -> None:
        """Take in a part's weights, after its optimizer's step; nothing where it is not averaged."""
        if name in self.models:
            self.models[name].step(self._parts[name].parameters())

    def copy_to_parts(self) -> None:
        """Leave the averages in the parts."""
        for name, model in self.models.items():
            model.copy_to(self._parts[name].parameters())

    @contextlib.contextmanager
    def in_parts(self) -> Iterator[None]:
        """The averages are in the parts meanwhile; then the parts have their own weights again."""
        for name, model in self.models.items():
            model.store(self._parts[name].parameters())
        self.copy_to_parts()
        try:
            yield
        finally:
            for name, model in self.models.items():
                model.restore(self._parts[name].parameters())
