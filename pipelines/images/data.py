"""Sets of images as whole tensors: the embedded digits, MNIST's IDX files, folders of images, sets on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.config import Source, StageConfig, config
from pipelines.errors import Problem, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipelines.images.method import Batch, Draws

EMBEDDED = "digits"


@config
class ImageFields(StageConfig):
    """Which images, and how they are prepared."""

    dataset: Source = Field(
        EMBEDDED,
        description="digits (embedded: 1,797 handwritten digits of 8×8 pixels), a folder with MNIST's four IDX files "
        "(.gz or not), a folder of images (train/ and test/, or one set; subfolders are classes), a dataset saved by "
        "`datasets`, or a hub id",
    )
    dataset_config: str | None = Field(None, description="configuration of a hub dataset")
    image_column: str = Field("image", description="column of the images of a hub dataset")
    label_column: str = Field("label", description="column of the labels of a hub dataset, used where it exists")
    image_size: int | None = Field(
        None,
        ge=4,
        le=1024,
        description="side in pixels to which the middle square of each image is scaled; null takes them as they are",
    )
    colour: bool | None = Field(None, description="true: three channels; false: one; null: as the images are")
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
        found = super().problems()
        if self.binarize != "none" and self.colour:
            mend = "give colour=false, or binarize=none"
            found.append(Problem("binarize", self.binarize, "colours cannot be made black and white", mend))
        return found


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

    def to(self, device: torch.device | str) -> Images:
        """The same on a device."""
        return Images(self.images.to(device), self.labels.to(device))

    def subset(self, count: int | None, seed: int) -> Images:
        """At most ``count`` of them, drawn without replacement and kept in order; all where it is None."""
        if count is None or count >= len(self):
            return self
        chosen = _permutation(len(self), seed)[:count].sort().values
        return Images(self.images[chosen], self.labels[chosen])

    def batch(self, rows: Tensor | slice, draws: Draws, fields: ImageFields) -> Batch:
        """Rows as a method sees them.

        Args:
            rows: indices, (B,), or a slice.
            draws: random numbers of those rows; called once for ``binarize=bernoulli``, else not at all.
            fields: how to binarize.

        Returns:
            Images in [0, 1], float32, (B, C, H, W): x/255; or 1 with probability x/255; or 1 where x/255 reaches the
            threshold.
        """
        from pipelines.images.method import Batch

        levels = self.images[rows]
        if fields.binarize == "bernoulli":
            values = (draws.uniform(*levels.shape[1:]) * 255 < levels).float()
        elif fields.binarize == "threshold":
            values = (levels.float() / 255 >= fields.threshold).float()
        else:
            values = levels.float() / 255
        return Batch(values, self.labels[rows])


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


def _permutation(count: int, seed: int) -> Tensor:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _digits() -> tuple[Images, tuple[str, ...]]:
    """scikit-learn's digits (the test part of Alpaydin and Kaynak's optical digits, UCI): grey levels 0..16."""
    import torch
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(levels).mul(255 / 16).round().to(torch.uint8)
    return Images(images.reshape(-1, 1, 8, 8), torch.from_numpy(labels).long()), tuple("0123456789")


def load_images(fields: ImageFields) -> ImageSet:
    """The images that ``fields`` names, on the CPU.

    The same fields give the same images in the same order. Where the data has no test set, ``test_fraction`` of it is
    held out at random.

    Raises:
        UserError: missing, truncated or foreign files; images of different sizes or not square; grey levels of more
            than 8 bits; no images; colours that are to be binarized.
    """
    from pipelines.images import data_files

    wanted = data_files.Wanted(fields.image_size, fields.colour)
    if fields.dataset == EMBEDDED:
        whole, classes = _digits()
        parts = {"train": data_files.fitted(whole, wanted)}
    else:
        folder = Path(fields.dataset).expanduser()
        if folder.is_file():
            raise UserError("dataset", fields.dataset, "is a file", "give the folder it lies in")
        if folder.is_dir() and data_files.is_saved_dataset(folder):
            parts, classes = data_files.read_columns(fields, wanted)
        elif folder.is_dir() and data_files.idx_files(folder):
            parts, classes = data_files.read_idx_folder(folder, wanted)
        elif folder.is_dir():
            parts, classes = data_files.read_image_folder(folder, wanted)
        else:
            parts, classes = data_files.read_columns(fields, wanted)
    train, test = parts["train"], parts.get("test")
    if test is None:
        train, test = _held_out(train, fields)
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [tuple(part.images.shape[1:]) for part in (train, test)]
        problem = f"training images are {shapes[0]}, test images {shapes[1]} (channels, height, width)"
        raise UserError("dataset", fields.dataset, problem, "give image_size= and colour=")
    if fields.binarize != "none" and train.images.shape[1] != 1:
        raise UserError("binarize", fields.binarize, "the images have colours", "give colour=false, or binarize=none")
    seed = fields.split_seed
    return ImageSet(train.subset(fields.max_train, seed), test.subset(fields.max_test, seed), classes)


def _held_out(whole: Images, fields: ImageFields) -> tuple[Images, Images]:
    """Training and test part of a set that has no test part of its own."""
    count = round(len(whole) * fields.test_fraction)
    if not 0 < count < len(whole):
        problem = f"of {len(whole)} images that leaves {len(whole) - count} to train on and {count} to test on"
        raise UserError("test_fraction", fields.test_fraction, problem, "give more images, or another share")
    order = _permutation(len(whole), fields.split_seed)
    parts = order[count:].sort().values, order[:count].sort().values
    train, test = (Images(whole.images[part], whole.labels[part]) for part in parts)
    return train, test
