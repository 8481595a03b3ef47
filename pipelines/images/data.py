"""Sets of images as whole tensors: the embedded digits, MNIST's IDX files, folders of images, sets on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.config import Source, config
from pipelines.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.images.method import Batch, Draws

EMBEDDED = "digits"


@config
class ImageFields:
    """Which images, and how they are prepared."""

    dataset: Source = Field(
        EMBEDDED,
        description="digits (embedded: 1,797 handwritten digits of 8×8 pixels), a folder with MNIST's four IDX files "
        "(.gz or not), a folder of images (train/ and test/, or one set; subfolders are classes), or a hub id",
    )
    dataset_config: str | None = Field(None, description="configuration of a hub dataset")
    image_column: str = Field("image", description="column of the images of a hub dataset")
    label_column: str = Field("label", description="column of the labels of a hub dataset, used where it exists")
    image_size: int | None = Field(
        None,
        ge=4,
        le=1024,
        description="side in pixels to which images are scaled (after cutting out the middle "
        "square); null takes them as they are",
    )
    colour: bool | None = Field(None, description="three channels or one; null takes the images as they are")
    binarize: Literal["none", "bernoulli", "threshold"] = Field(
        "none",
        description="none: grey levels; bernoulli: each pixel is 1 with the probability that its grey level is, drawn "
        "afresh each time the image is seen; threshold: 1 from `threshold` on",
    )
    threshold: float = Field(0.5, gt=0, le=1, description="binarize=threshold: least grey level that becomes 1")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="share held out where the data has no test set")
    split_seed: int = Field(0, ge=0, description="seed of that split and of the samples below (not the training seed)")
    max_train: int | None = Field(None, ge=1, description="use a random sample of at most so many training images")
    max_test: int | None = Field(None, ge=1, description="use a random sample of at most so many test images")

    def problems(self) -> list[Problem]:
        return list(super().problems())


@dataclass(frozen=True)
class Images:
    """One split.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64; all 0 where the data has no labels.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> Images:
        """The same on a device."""

    def batch(self, rows: Tensor | slice, draws: Draws, fields: ImageFields) -> Batch:
        """Rows as a method sees them: float32 in [0, 1], binarized as ``fields`` says (one call of ``draws`` if drawn)."""


@dataclass(frozen=True)
class ImageSet:
    """Training and test images of one size.

    Attributes:
        train: to be trained on.
        test: held out; nothing is chosen by it.
        classes: names of the labels; a single one where the data has none.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.images.shape[1:])


def load_images(fields: ImageFields) -> ImageSet:
    """The images that ``fields`` names, on the CPU.

    Raises:
        UserError: missing, truncated or foreign files; images of different sizes or not square; grey levels of more
            than 8 bits; too few images.
    """
    raise NotImplementedError
