"""What users meet at the command line: damaged MNIST files and impossible fields, and folders of colour images."""

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.images.saved import load_pipeline
from tests.images.conftest import write_idx


def missing(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    return folder, "there is no t10k-labels-idx1-ubyte"


def truncated(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes())[:-100])
    path.unlink()
    return path.with_suffix(""), "truncated: 5676 bytes where its header says 5776; "


def wrong_magic(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.unlink()
    return write_idx(path.with_suffix(""), np.zeros(40), 0x1234), "magic number 0x00001234 instead of 0x00000801 "


def one_line(answer, tmp_path, known) -> str:
    """The one line that a mistake ends with; nothing else may be left of it."""
    code, printed, errors = answer
    assert code == 2, printed + errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert {path.name for path in tmp_path.iterdir()} == known
    return lines[0]


@pytest.mark.parametrize(
    ("damage", "families"), [(missing, ("ddpm", "gan")), (truncated, ("bitflip",)), (wrong_magic, ("vae",))]
)
def test_damaged_idx_files_are_one_line(stages, idx_folder, tmp_path, damage, families):
    file, said = damage(idx_folder)
    out = tmp_path / "run"
    entries = [("--recipe", f"images/{family}", f"dataset={idx_folder}", f"output_dir={out}") for family in families]
    entries.append(("run", "mnist", f"dataset={idx_folder}", "--output_dir", str(out)))
    for words in entries:
        line = one_line(stages.answer(*words, cwd=tmp_path), tmp_path, {"idx"})
        assert line.startswith(f"error: dataset={file}: {said}"), line


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("bitflip", ["timesteps=0"], "timesteps=0: input should be greater than or equal to 1; "),
        ("ddpm", ["timesteps=0"], "timesteps=0: input should be greater than or equal to 1; "),
        ("ddpm", ["timesteps=-3"], "timesteps=-3: input should be greater than or equal to 1; "),
        ("bitflip", ["delta_schedule=constant", "delta_start=0.5"], "delta_start=0.5: input should be less than 0.5; "),
        ("bitflip", ["delta_schedule=constant", "delta_start=0"], "delta_start=0: input should be greater than 0; "),
        (
            "bitflip",
            ["delta_schedule=linear", "delta_start=0.1", "delta_end=0.6"],
            "delta_end=0.6: input should be less than 0.5; ",
        ),
        (
            "bitflip",
            ["timesteps=100", "delta_schedule=constant", "delta_start=0.49999"],
            "timesteps=100: with these flip probabilities nothing is left of the image",
        ),
    ],
)
def test_stages_and_flip_probabilities_out_of_range_are_one_line(stages, tmp_path, recipe, words, said):
    answer = stages.answer("--recipe", f"images/{recipe}", *words, f"output_dir={tmp_path / 'run'}")
    assert one_line(answer, tmp_path, set()).startswith(f"error: {said}")
    chain = tmp_path / "chain.yaml"
    fields = ", ".join(word.replace("=", ": ") for word in words)
    chain.write_text(f"stages: {{model: {{recipe: images/{recipe}, {fields}}}}}\n")
    answer = stages.answer("run", str(chain), "--output_dir", str(tmp_path / "run"))
    assert one_line(answer, tmp_path, {"chain.yaml"}).startswith(f"error: model.{said}")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of 40 pictures of 8×8 pixels: red with a green edge somewhere."""
    folder = tmp_path_factory.mktemp("colours")
    for number in range(40):
        picture = np.zeros((8, 8, 3), np.uint8)
        picture[..., 0] = 180 + number
        picture[: 1 + number % 5, : 2 + number % 6, 1] = 220
        Image.fromarray(picture).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("ddpm", ["channels=[8, 8]", "timesteps=10", "inference_steps=2"]),
        ("vae", ["architecture=conv", "hidden=8", "width=8", "binarize=none", "likelihood=gaussian"]),
        ("gan", ["hidden=8", "width=8", "r1=0.5"]),
    ],
)
def test_colour_images_from_the_folder_to_the_samples(stages, colours, tmp_path, family, words):
    words = [*words, f"dataset={colours}", "test_fraction=0.25", "batch_size=10", "max_steps=2", "logging_steps=1"]
    words += ["save_steps=2", "sample_steps=2", "report_to=none", "precision=fp32", f"output_dir={tmp_path / 'run'}"]
    code, printed, errors = stages.answer("--recipe", f"images/{family}", *words)
    assert code == 0, printed + errors
    metrics = json.loads((tmp_path / "run" / "stage.json").read_text())["metrics"]
    assert (metrics[f"{family}/train_examples"], metrics[f"{family}/test_examples"]) == (30, 10)
    for picture in ("samples.png", "samples/step-0000002.png"):
        with Image.open(tmp_path / "run" / picture) as sheet:
            assert sheet.mode == "RGB"
            pixels = np.asarray(sheet)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
        assert (pixels[..., 0] != pixels[..., 1]).any()
    further = {"num_inference_steps": 2} if family == "ddpm" else {}
    pipeline = load_pipeline(tmp_path / "run")
    images = pipeline(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt", **further).images
    assert tuple(images.shape) == (3, 3, 8, 8)
    assert pipeline(batch_size=2, **further).images[0].mode == "RGB"
