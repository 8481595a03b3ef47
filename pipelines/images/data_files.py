"""Readers of images: IDX files, folders of image files, columns of a ``datasets`` table. All give uint8 tensors.

Each says in one line what is wrong with its source: which file, what it holds, how to mend it.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipelines.corpus.readers import SPLIT_NAMES
from pipelines.errors import UserError
from pipelines.images.data import ImageFields, Images

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(\.gz)?$")
_IDX_TYPES = {8: "unsigned bytes", 9: "signed bytes", 11: "16-bit", 12: "32-bit", 13: "float", 14: "double"}
_COLOURS = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa")


@dataclass(frozen=True)
class Wanted:
    """What images are to be brought to: side in pixels and colour, each None to take them as they are."""

    size: int | None = None
    colour: bool | None = None


# ------------------------------------------------------------------------------------------------------------ IDX files


def idx_files(folder: Path) -> dict[str, Path]:
    """``train-images``, ``train-labels``, ``test-images``, ``test-labels`` -> file, of those that are there."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # the plain file wins over its .gz
        match = _IDX_NAME.search(path.name)
        if match:
            found[f"{'train' if match.group(1) == 'train' else 'test'}-{match.group(2)}"] = path
    return found


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes (LeCun's format: magic number, sizes, values in C order).

    Args:
        path: of the file; compressed if it ends in ``.gz``.
        dimensions: how many the array must have: 3 for images, 1 for labels.

    Raises:
        UserError: unreadable, another magic number, fewer or more bytes than its header says.
    """
    mend = "fetch the file again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError("dataset", path, f"truncated or not gzip ({error})", mend) from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise UserError("dataset", path, problem, "give a readable file") from None
    if len(data) < 4:
        raise UserError("dataset", path, f"truncated: {len(data)} bytes", mend)
    magic = struct.unpack(">I", data[:4])[0]
    if magic != 0x800 + dimensions:
        what = f"magic number 0x{magic:08x} instead of 0x{0x800 + dimensions:08x}"
        kind = _IDX_TYPES.get(data[2]) if data[:2] == b"\0\0" else None
        if kind is not None and data[2] != 8:
            raise UserError("dataset", path, f"{what}: {kind} values", "convert it to unsigned bytes, 0 to 255")
        swapped = "images" if dimensions == 1 else "labels"
        kind = f" ({swapped}?)" if magic == 0x800 + (4 - dimensions) else " (not an IDX file)"
        raise UserError("dataset", path, what + kind, "give MNIST's four files under their own names")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise UserError("dataset", path, f"truncated: {len(data)} bytes, its header has {start}", mend)
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    size = start + math.prod(shape)
    if len(data) != size:
        what = "truncated" if len(data) < size else "too long"
        raise UserError("dataset", path, f"{what}: {len(data)} bytes where its header says {size}", mend)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_idx_folder(folder: Path, wanted: Wanted) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The training and test set of a folder with MNIST's four files.

    Raises:
        UserError: a file is missing, damaged, empty, or its labels are not as many as its images.
    """
    files = idx_files(folder)
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        for kind, number in (("images", 3), ("labels", 1)):
            if f"{split}-{kind}" not in files:
                name = f"{stem}-{kind}-idx{number}-ubyte"
                raise UserError("dataset", folder, f"there is no {name}(.gz)", "put MNIST's four files into the folder")
        images = read_idx(files[f"{split}-images"], 3)
        labels = read_idx(files[f"{split}-labels"], 1)
        if not images.size:
            raise UserError("dataset", files[f"{split}-images"], "holds no images", "give the file with the images")
        if len(images) != len(labels):
            problem = f"{len(labels)} labels for the {len(images)} images of {files[f'{split}-images'].name}"
            raise UserError("dataset", files[f"{split}-labels"], problem, "give the two files of one set")
        _check_square(images.shape[1:], str(files[f"{split}-images"]), wanted)
        whole = Images(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)))
        parts[split] = fitted(whole, wanted)
    count = int(max(part.labels.max() for part in parts.values())) + 1
    return parts, tuple(str(label) for label in range(count))


def _check_square(shape: Sequence[int], place: str, wanted: Wanted) -> None:
    if shape[0] != shape[1] and wanted.size is None:
        problem = f"{shape[1]}×{shape[0]} pixels: not a square"
        raise UserError("dataset", place, problem, "give image_size=, and the middle square is scaled to it")


# ------------------------------------------------------------------------------------------------------- sizes, colours


def fitted(images: Images, wanted: Wanted) -> Images:
    """Images brought to the wanted size and colour (as ``_pixels`` does it with one read from a file)."""
    if wanted.size in (None, images.images.shape[-1]) and images.images.shape[-1] == images.images.shape[-2]:
        pixels = images.images.expand(-1, 3, -1, -1).contiguous() if wanted.colour else images.images
        return Images(pixels, images.labels)
    pixels = _stacked(
        (f"image {i}", _pixels(Image.fromarray(level.numpy()), f"image {i}", wanted))
        for i, level in enumerate(images.images[:, 0])
    )
    return Images(pixels, images.labels)


def _pixels(image: Image.Image, place: str, wanted: Wanted) -> np.ndarray:
    """(H, W, C), uint8, of one image.

    Raises:
        UserError: grey levels outside 0..255, or not a square where no size is wanted.
    """
    if image.mode[0] in "IF":  # 16-bit and 32-bit integers, floating point
        levels = np.asarray(image, dtype=np.float64)
        low, high = float(levels.min()), float(levels.max())
        if low < 0 or high > 255 or not np.array_equal(levels, levels.round()):
            problem = f"grey levels from {low:g} to {high:g}, not whole numbers from 0 to 255"
            raise UserError("dataset", place, problem, "convert the images to 8 bits")
        image = Image.fromarray(levels.astype(np.uint8))
    colour = image.mode in _COLOURS if wanted.colour is None else wanted.colour
    image = image.convert("RGB" if colour else "L")
    _check_square((image.height, image.width), place, wanted)
    if wanted.size is not None and image.size != (wanted.size, wanted.size):
        image = ImageOps.fit(image, (wanted.size, wanted.size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _stacked(pixels: Iterable[tuple[str, np.ndarray]]) -> Tensor:
    """(N, C, H, W) of (H, W, C) arrays of one size; grey ones among coloured ones become coloured.

    Raises:
        UserError: images of different sizes (both named).
    """
    first, rows, channels = None, [], 1
    for place, row in pixels:
        if first is None:
            first = (place, row.shape[:2])
        elif row.shape[:2] != first[1]:
            sizes = [f"{width}×{height}" for height, width in (row.shape[:2], first[1])]
            problem = f"{sizes[0]} pixels where {first[0]} has {sizes[1]}"
            raise UserError("dataset", place, problem, "give image_size=, and all are scaled to it")
        channels = max(channels, row.shape[2])
        rows.append(row)
    whole = np.stack([np.broadcast_to(row, (*row.shape[:2], channels)) for row in rows])
    return torch.from_numpy(np.ascontiguousarray(whole.transpose(0, 3, 1, 2)))


# ---------------------------------------------------------------------------------------------------- folders of images


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _split_folders(folder: Path) -> dict[str, Path]:
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if (folder / name).is_dir():
                found.setdefault("test" if split == "validation" else split, folder / name)
                if split == "test":
                    found["test"] = folder / name  # a test set is held out rather than a validation set
    return found if "train" in found else {}


def read_image_folder(folder: Path, wanted: Wanted) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The images below a folder: ``train`` and ``test`` (or ``validation``) in it, or one set; subfolders are classes.

    Raises:
        UserError: no images, images beside classes, classes of the test set that the training set does not have, files
            that are no images, images of different sizes.
    """
    splits = _split_folders(folder) or {"train": folder}
    classes: tuple[str, ...] | None = None
    parts = {}
    for split in sorted(splits, reverse=True):  # the training set says which classes there are
        place = splits[split]
        by_class = {p.name: _image_files(p) for p in sorted(place.iterdir()) if p.is_dir()}
        by_class = {name: files for name, files in by_class.items() if files}
        loose = _image_files(place)
        if loose and by_class:
            problem = f"images ({loose[0].name}) beside folders of images ({next(iter(by_class))})"
            raise UserError("dataset", place, problem, "put every image into its class's folder, or none")
        if not loose and not by_class:
            mend = f"give a folder with images ({', '.join(IMAGE_SUFFIXES[:3])} …) or with MNIST's IDX files"
            raise UserError("dataset", place, "holds no images", mend)
        by_class = by_class or {"image": loose}
        if classes is None:
            classes = tuple(by_class)
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            problem = f"the training set has no class {unknown[0]!r}"
            raise UserError("dataset", place / unknown[0], problem, f"its classes are {', '.join(classes)[:80]}")
        labels = [classes.index(name) for name, files in by_class.items() for _ in files]
        pixels = _stacked((str(path), _read_image(path, wanted)) for files in by_class.values() for path in files)
        parts[split] = Images(pixels, torch.tensor(labels))
    return _in_one_colour(parts), classes


def _in_one_colour(parts: dict[str, Images]) -> dict[str, Images]:
    channels = max(part.images.shape[1] for part in parts.values())
    return {
        split: Images(part.images.expand(-1, channels, -1, -1).contiguous(), part.labels)
        for split, part in parts.items()
    }


def _read_image(path: Path, wanted: Wanted) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.load()
            return _pixels(image, str(path), wanted)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        problem = "not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
        raise UserError("dataset", path, problem, "mend or remove the file") from None


# ------------------------------------------------------------------------------------------------ tables with a column


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` wrote the folder by ``save_to_disk``."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def read_columns(fields: ImageFields, wanted: Wanted) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The splits of a hub dataset or of one that ``datasets`` saved, by its column of images.

    Raises:
        UserError: it cannot be loaded, has no training split or no such column, or its images cannot be used.
    """
    from datasets import ClassLabel, DatasetDict

    loaded = _loaded(fields)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    named = {}
    for split in ("train", "test", "validation"):
        for name in SPLIT_NAMES[split]:
            if name in splits and splits[name].num_rows:
                named.setdefault("train" if split == "train" else "test", splits[name])
    if "train" not in named:
        problem = f"no training split (it has {', '.join(splits) or 'none'})"
        raise UserError("dataset", fields.dataset, problem, "give a dataset with a split named train")
    parts = {split: _table(table, f"{fields.dataset} {split}", fields, wanted) for split, table in named.items()}
    feature = named["train"].features.get(fields.label_column)
    if isinstance(feature, ClassLabel):
        return _in_one_colour(parts), tuple(feature.names)
    count = int(max(part.labels.max() for part in parts.values())) + 1
    return _in_one_colour(parts), tuple(str(label) for label in range(count)) if count > 1 else ("image",)


def _loaded(fields: ImageFields) -> Dataset:
    from datasets import load_dataset, load_from_disk

    try:
        if Path(fields.dataset).expanduser().is_dir():
            return load_from_disk(str(Path(fields.dataset).expanduser()))
        return load_dataset(fields.dataset, fields.dataset_config)
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        problem = f"no such folder, and the hub does not give it ({type(error).__name__}: {what})"
        raise UserError("dataset", fields.dataset, problem, "mend the path or the id") from None


def _table(table: Dataset, place: str, fields: ImageFields, wanted: Wanted) -> Images:
    if fields.image_column not in table.column_names:
        problem = f"no such column in {place}; its columns are {', '.join(table.column_names)}"
        raise UserError("image_column", fields.image_column, problem, "give image_column=NAME")

    def rows() -> Iterable[tuple[str, np.ndarray]]:
        for number, value in enumerate(table[fields.image_column]):
            row = f"{place} row {number}"
            if not isinstance(value, Image.Image):
                problem = f"the column {fields.image_column} holds {type(value).__name__}, not images"
                raise UserError("dataset", row, problem, "give image_column=NAME of a column of images")
            yield row, _pixels(value, row, wanted)

    labels = torch.zeros(table.num_rows, dtype=torch.int64)
    if fields.label_column in table.column_names:
        values = table[fields.label_column][:]
        bad = next((value for value in values if not isinstance(value, int) or value < 0), None)
        if bad is not None:
            problem = f"{place} has the label {bad!r}, not a number from 0"
            raise UserError("label_column", fields.label_column, problem, "give a column of class numbers")
        labels = torch.tensor(values)
    return Images(_stacked(rows()), labels)
