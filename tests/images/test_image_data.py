"""Images from every kind of source, how they are made binary, and what is said of sources that are wrong."""

import gzip

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.data import ImageFields, load_images
from pipelines.images.method import Draws
from tests.images.conftest import write_idx


def fields(**values) -> ImageFields:
    return validate(ImageFields, values)


def load(**values):
    return load_images(fields(**values))


def draws(seed: int, rows: int, start: int = 0, stop: int | None = None) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), rows, start, stop)


def picture(path, size=(6, 6), mode="L", value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


# -------------------------------------------------------------------------------------------------------------- sources


def test_digits():
    images = load()
    assert images.shape == (1, 8, 8)
    assert (len(images.train), len(images.test)) == (1617, 180)
    assert images.train.images.dtype == torch.uint8
    assert images.train.images.max() == 255
    assert images.classes == tuple("0123456789")
    together = torch.cat([images.train.labels, images.test.labels])
    assert torch.bincount(together).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    again = load()
    assert torch.equal(again.train.images, images.train.images)
    assert not torch.equal(load(split_seed=1).test.images, images.test.images)


@pytest.mark.parametrize("plain", [False, True])
def test_idx_files(idx_folder, plain):
    whole = {path.name: gzip.decompress(path.read_bytes()) for path in idx_folder.iterdir()}
    if plain:
        for path in list(idx_folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    images = load(dataset=str(idx_folder))
    assert images.train.images.shape == (40, 1, 12, 12)
    expected = np.frombuffer(whole["train-images-idx3-ubyte.gz"][16:], np.uint8).reshape(40, 1, 12, 12)
    assert np.array_equal(images.train.images.numpy(), expected)
    assert images.test.labels.tolist() == [i % 4 for i in range(20)]
    assert images.classes == ("0", "1", "2", "3")


def test_subsets_are_samples_in_order(idx_folder):
    images, some = load(dataset=str(idx_folder)), load(dataset=str(idx_folder), max_train=7, max_test=3)
    places = [next(i for i, x in enumerate(images.train.images) if torch.equal(x, y)) for y in some.train.images]
    assert len(places) == 7
    assert places == sorted(places) != list(range(7))
    assert len(some.test) == 3


def test_folder_with_classes_and_splits(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for label, value in (("cat", 10), ("dog", 200)):
            for number in range(count):
                picture(tmp_path / split / label / f"{number}.png", value=value)
    images = load(dataset=str(tmp_path))
    assert images.classes == ("cat", "dog")
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.train.images[:, 0, 0, 0].tolist() == [10, 10, 10, 200, 200, 200]
    assert images.test.images.shape == (4, 1, 6, 6)


def test_one_folder_is_split_and_colour_is_kept(tmp_path):
    for number in range(10):
        picture(tmp_path / f"{number:02}.png", mode="RGB" if number else "L", value=(number, 50, 90) if number else 5)
    images = load(dataset=str(tmp_path), test_fraction=0.3)
    assert images.shape == (3, 6, 6)
    assert (len(images.train), len(images.test)) == (7, 3)
    assert images.classes == ("image",)
    assert load(dataset=str(tmp_path), colour=False, test_fraction=0.3).shape == (1, 6, 6)


def test_sizes_are_made_one(tmp_path):
    for number, size in enumerate([(6, 6), (8, 5), (12, 20)] * 2):
        picture(tmp_path / f"{number}.png", size)
    assert load(dataset=str(tmp_path), image_size=5, test_fraction=0.4).shape == (1, 5, 5)


def test_image_size_scales_the_digits():
    images = load(image_size=16, max_train=20)
    assert images.shape == (1, 16, 16)
    small = load(max_train=20)
    means = [x.train.images.float().mean((1, 2, 3)) for x in (images, small)]
    assert torch.allclose(means[0], means[1], rtol=0.1)


def test_saved_dataset(tmp_path):
    columns = Features({"image": ImageColumn(), "label": ClassLabel(names=["no", "yes"]), "note": Value("string")})
    rows = [Image.new("L", (4, 4), value) for value in (0, 80, 160, 240)]
    table = Dataset.from_dict({"image": rows, "label": [0, 1, 1, 0], "note": ["a"] * 4}, features=columns)
    DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    images = load(dataset=str(tmp_path / "saved"))
    assert images.train.images[:, 0, 0, 0].tolist() == [0, 80, 160, 240]
    assert images.train.labels.tolist() == [0, 1, 1, 0]
    assert images.classes == ("no", "yes")
    with pytest.raises(UserError, match=r"image_column=picture: no such column in .* columns are image, label, note"):
        load(dataset=str(tmp_path / "saved"), image_column="picture")
    with pytest.raises(UserError, match="row 0: the column note holds str, not images"):
        load(dataset=str(tmp_path / "saved"), image_column="note")


# --------------------------------------------------------------------------------------------------------- black, white


def test_bernoulli_pixels_have_their_grey_levels_as_means():
    train = load().train
    levels = train.images[:4].float() / 255
    mean, count = torch.zeros_like(levels), 2000
    for seed in range(count):
        images = train.batch(slice(0, 4), draws(seed, 4), fields(binarize="bernoulli")).images
        assert ((images == 0) | (images == 1)).all()
        mean += images
    mean /= count
    assert ((mean - levels).abs() <= 4.5 * (levels * (1 - levels) / count).sqrt()).all()  # black and white: exactly


def test_a_part_of_a_batch_sees_what_the_whole_sees():
    train, rows = load().train, torch.tensor([5, 3, 900, 7, 12, 0])
    config = fields(binarize="bernoulli")
    whole = train.batch(rows, draws(3, 6), config)
    parts = [train.batch(rows[i : i + 2], draws(3, 6, i, i + 2), config) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    one, another = draws(1, 6), draws(1, 6, 2, 5)
    for call in (lambda d: d.normal(3), lambda d: d.integers(0, 9), lambda d: d.uniform(2, 2)):
        assert torch.equal(call(one)[2:5], call(another))


def test_threshold():
    train = load().train
    images = train.batch(slice(0, 50), draws(0, 50), fields(binarize="threshold", threshold=0.25)).images
    assert torch.equal(images, (train.images[:50] >= 64).float())  # 0.25 · 255 = 63.75


# ---------------------------------------------------------------------------------------------------------- wrong input


def _cut(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes())[:-100])


def _cut_gz(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])


def _longer(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()) + b"\0")


def _wrong_pixels(folder):
    for path in folder.iterdir():
        path.unlink()
    Image.fromarray(np.full((6, 6), 4095, np.uint16)).save(folder / "deep.png")


def _mixed_sizes(folder):
    for path in folder.iterdir():
        path.unlink()
    for number in range(3):
        picture(folder / f"{number}.png", (6, 6) if number < 2 else (7, 7))


def _text(folder):
    for path in folder.iterdir():
        path.unlink()
    picture(folder / "0.png")
    (folder / "1.png").write_text("not a picture")


def _loose(folder):
    for path in folder.iterdir():
        path.unlink()
    picture(folder / "0.png")
    picture(folder / "cat" / "1.png")


def _new_class(folder):
    for path in folder.iterdir():
        path.unlink()
    picture(folder / "train" / "cat" / "0.png")
    picture(folder / "test" / "dog" / "1.png")


WRONG = {
    "missing": (lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(), {}, "there is no t10k-labels-idx1-ubyte"),
    "truncated": (_cut, {}, r"train-images-idx3-ubyte: truncated: 5676 bytes where its header says 5776"),
    "truncated gzip": (_cut_gz, {}, r"train-images-idx3-ubyte.gz: truncated or not gzip"),
    "too long": (_longer, {}, "too long: 29 bytes where its header says 28"),
    "magic": (
        lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((4, 5, 5)), 0x1234),
        {},
        r"magic number 0x00001234 instead of 0x00000803 \(not an IDX file\)",
    ),
    "labels for images": (
        lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros(8)),
        {},
        r"magic number 0x00000801 instead of 0x00000803 \(labels\?\)",
    ),
    "floats": (
        lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((4, 5, 5)), 0xD03),
        {},
        "float values; convert it to unsigned bytes, 0 to 255",
    ),
    "counts": (
        lambda f: write_idx(f / "train-labels-idx1-ubyte", np.zeros(39)),
        {},
        "39 labels for the 40 images of train-images-idx3-ubyte.gz",
    ),
    "no images": (
        lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((0, 5, 5))),
        {},
        "train-images-idx3-ubyte: holds no images",
    ),
    "not square": (
        lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((40, 5, 7))),
        {},
        "7×5 pixels: not a square; give image_size=",
    ),
    "test of another size": (
        lambda f: write_idx(f / "t10k-images-idx3-ubyte", np.zeros((20, 5, 5))),
        {},
        r"training images are \(1, 12, 12\), test images \(1, 5, 5\)",
    ),
    "sixteen bits": (_wrong_pixels, {}, "deep.png: grey levels from 4095 to 4095, not whole numbers from 0 to 255"),
    "sizes": (_mixed_sizes, {}, r"2.png: 7×7 pixels where .*0.png has 6×6; give image_size="),
    "no picture": (_text, {}, "1.png: not an image; mend or remove the file"),
    "loose": (_loose, {}, r"images \(0.png\) beside folders of images \(cat\)"),
    "new class": (_new_class, {}, "dog: the training set has no class 'dog'"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], {}, "holds no images; give a folder with images"),
    "nothing held out": (_loose, {"dataset": "digits", "test_fraction": 0.0001}, "leaves 1797 to train on and 0 to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_images_are_one_line(idx_folder, case):
    damage, values, message = WRONG[case]
    damage(idx_folder)
    with pytest.raises(UserError, match=message) as caught:
        load(**{"dataset": str(idx_folder)} | values)
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_fields_are_found_before_anything_is_read(tmp_path):
    cases = [
        ({"dataset": str(tmp_path / "none")}, "dataset=.*no such file or folder"),
        ({"binarize": "bernoulli", "colour": True}, "binarize=bernoulli: colours cannot be made black and white"),
        ({"image_size": 2}, "image_size=2: input should be greater than or equal to 4"),
        ({"threshold": 1.5}, "threshold=1.5: input should be less than or equal to 1"),
    ]
    for values, message in cases:
        with pytest.raises(UserError, match=message):
            fields(**values)


def test_a_file_is_not_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"x.png: is a file; give the folder it lies in"):
        load(dataset=str(picture(tmp_path / "x.png")))


def test_colours_are_not_binarized(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", mode="RGB", value=(1, 2, 3))
    with pytest.raises(UserError, match="binarize=threshold: the images have colours; give colour=false"):
        load(dataset=str(tmp_path), binarize="threshold", test_fraction=0.5)
