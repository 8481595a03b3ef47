"""The images that exercises learn from: the embedded digits, MNIST's files, or any set that the image recipes read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import Source, config
from pipelines.errors import UserError
from pipelines.images.data import EMBEDDED, ImageFields, load_images
from pipelines.problems.exercise import ExerciseConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@config
class ImageExerciseConfig(ExerciseConfig):
    """Which images an exercise learns from."""

    dataset: Source = Field(
        EMBEDDED,
        description="digits (embedded: 1,797 handwritten digits of 8×8 pixels), a folder with MNIST's four IDX files "
        "(.gz or not), or any other set of images with labels that the image recipes take",
    )
    test_fraction: float = Field(0.3, gt=0, lt=1, description="share held out where the data has no test set")
    split_seed: int = Field(0, ge=0, description="seed of that split and of the samples below (not the training seed)")
    max_train: int | None = Field(None, ge=1, description="use a random sample of at most so many training images")
    max_test: int | None = Field(None, ge=1, description="use a random sample of at most so many test images")

    @property
    def embedded(self) -> bool:
        """Whether the images are the embedded digits, which are few and small."""
        return self.dataset == EMBEDDED


@dataclass(frozen=True)
class Labelled:
    """One split.

    Attributes:
        images: (N, C, H, W), float32; grey levels less the training images' mean, over their standard deviation.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Labelled:
        return Labelled(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class LabelledSet:
    """Training and test images, and how many classes they have."""

    train: Labelled
    test: Labelled
    classes: int


def load_labelled(config: ImageExerciseConfig, device: torch.device | str = "cpu") -> LabelledSet:
    """The images that ``config`` names, on a device.

    Raises:
        UserError: as ``load_images``; or images without labels.
    """
    names = ("dataset", "test_fraction", "split_seed", "max_train", "max_test")
    found = load_images(ImageFields(**{name: getattr(config, name) for name in names}))
    if len(found.classes) < 2:
        mend = "give MNIST's four files, or a folder with a subfolder a class"
        raise UserError("dataset", config.dataset, "has no labels to learn", mend)
    levels = found.train.images.float()
    mean, spread = levels.mean(), levels.std().clamp_min(1e-6)
    train, test = (
        Labelled(((part.images.float() - mean) / spread).to(device), part.labels.to(device))
        for part in (found.train, found.test)
    )
    return LabelledSet(train, test, len(found.classes))
