"""Runs of image models, one a seed: what is kept of them, what may be added to it, and the block made of it."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
from kept_blocks import block, cells, document
from PIL import Image, ImageChops

from pipelines.reporting import readme
from pipelines.reporting.kept_images import over_seeds
from pipelines.reporting.metrics import is_interval_key
from pipelines.reporting.pictures import LARGEST, small


def taken(folder: Path, *runs: Path, flags: tuple[str, ...] = ()) -> tuple[int, Path, Path]:
    """The exit code of taking runs into a folder's ``mnist.json`` and page, and the two files."""
    folder.mkdir(exist_ok=True)
    file, page = folder / "mnist.json", folder / "page.md"
    if not page.is_file():
        document(folder, "mnist")
    words = [word for run in runs for word in ("--run", str(run))]
    return readme.main([str(file), str(page), *flags, *words]), file, page


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_means_and_standard_errors_over_seeds() -> None:
    runs = [{"a/x": 1.0, "b/x": 5.0}, {"a/x": 2.0, "b/x": 5.0}, {"a/x": 6.0, "b/x": 5.0, "c/x": 1.0}]
    found = over_seeds(runs)
    assert found == pytest.approx(
        {"a/x": 3.0, "a/x_se": statistics.stdev([1, 2, 6]) / 3**0.5, "b/x": 5.0, "b/x_se": 0.0}
    )
    assert over_seeds(runs[:1]) == runs[0]


def test_runs_of_image_models_one_a_seed(tmp_path: Path) -> None:
    runs = [synthetic.write_images(tmp_path / f"s{seed}", seed) for seed in range(3)]
    code, file, page = taken(tmp_path, *runs)
    assert code == 0
    kept = json.loads(file.read_text())["runs"]
    assert [entry["seed"] for entry in kept] == [0, 1, 2]
    for run, entry in zip(runs, kept, strict=True):
        measured = json.loads((run / "metrics.json").read_text())
        assert {k: entry["metrics"][k] for k in measured if not is_interval_key(k)} == {
            k: v for k, v in measured.items() if not is_interval_key(k)
        }
    text = block(page, "mnist")
    samples, bounds = text.split("| System | While training")[0].split("| System | Bound")
    for key, places, shown in (
        ("vae/frechet_distance", 2, cells(samples, "VAE")[1]),
        ("vae/negative_elbo", 2, cells(bounds, "VAE")[2]),
        ("vae/kl", 2, cells(bounds, "VAE")[3]),
    ):
        values = [entry["metrics"][key] for entry in kept]
        error = statistics.stdev(values) / 3**0.5
        assert shown == f"{statistics.mean(values):.{places}f} (± {error:.{places}f})"
    assert cells(bounds, "VAE")[6:] == ["1,182,096", "2,000", "1.5 (± 0.0)", "2.0 (± 0.0)", "0.02 (± 0.00)"]
    on_the_way = text.split("| System | While training")[1].split("![")[0]
    error = f"± {statistics.stdev([20.0, 0.0, -20.0]) / 3**0.5:.1f}"  # the seeds differ by 20 nats at each place
    for system in ("VAE", "Bit-flip diffusion"):
        assert cells(on_the_way, system)[1] == f"110.0 {error} after 1.0; 80.0 {error} after 2.0"
    # the reconstruction of bit-flip diffusion is another thing than a VAE's
    assert cells(bounds, "Bit-flip diffusion")[1:5] == ["78.50 (± 0.00)", "–", "–", "–"]
    assert "Training images" in samples
    assert "Means over 3 seeds (0, 1, 2), ± standard error over the seeds." in text
    assert "What a run took, in minutes (mean of 3)" in text
    assert "vae 2.0, bitflip 2.0" in text
    assert readme.main([str(file), str(page), "--check"]) == 0


def test_one_seed_is_told_and_has_no_error(tmp_path: Path) -> None:
    code, _, page = taken(tmp_path, synthetic.write_images(tmp_path / "run", 4))
    assert code == 0
    text = block(page, "mnist")
    assert "±" not in text
    assert "One seed (4)" in text
    assert "after 2.0" in text


def test_a_block_says_what_its_bounds_are(tmp_path: Path) -> None:
    _, file, page = taken(tmp_path, synthetic.write_images(tmp_path / "run", 1))
    text = block(page, "mnist")
    assert "of a VAE the importance-weighted one with k = 50 samples of z" in text
    assert "While training: on 1000 of the held-out images, of a VAE the negative ELBO, not the bound of the" in text
    assert "Distance to the nearest training image (held-out images: 1)" in text
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    bounds = text.split("| System | Bound")[1].split("| System | While")[0]
    for system, name in (("VAE", "vae"), ("Bit-flip diffusion", "bitflip")):
        # bits of the bound in the same row, although a VAE's stage gives those of its negative ELBO
        assert cells(bounds, system)[5] == f"{measured[f'{name}/bound'] / 784 / math.log(2):.4f}"
    edit(file, lambda content: content["stages"]["vae"].update(importance_samples=0))
    edit(file, lambda content: content["stages"]["bitflip"].update(eval_images=100_000))
    assert readme.main([str(file), str(page)]) == 0
    text = block(page, "mnist")
    assert "(of a VAE the negative ELBO)" in text
    assert "on some of the held-out images" in text  # not equally many for both
    edit(file, lambda content: content["stages"]["vae"].update(eval_images=10_000))
    assert readme.main([str(file), str(page)]) == 0
    assert "on all held-out images" in block(page, "mnist")


def test_seeds_added_one_by_one_are_as_those_given_together(tmp_path: Path) -> None:
    runs = [synthetic.write_images(tmp_path / f"s{seed}", seed) for seed in range(3)]
    assert taken(tmp_path / "together", *runs)[0] == 0
    assert taken(tmp_path / "added", runs[0])[0] == 0
    shutil.rmtree(runs[0])
    for run in runs[1:]:
        assert taken(tmp_path / "added", run, flags=("--add",))[0] == 0
    for name in ("mnist.json", "mnist_run.json", "page.md", "mnist/vae.png", "mnist/comparison.png"):
        assert (tmp_path / "added" / name).read_bytes() == (tmp_path / "together" / name).read_bytes(), name
    facts = json.loads((tmp_path / "added" / "mnist_run.json").read_text())
    assert (facts["runs"], facts["seconds"]["vae"]) == (3, 120.0)  # of 60, 120 and 180


def measured_by_another(run: Path) -> None:
    edit(run / "metrics.json", lambda metrics: metrics.update({"classifier/loss": 0.5}))


def of_another_size(run: Path) -> None:
    edit(run / "metrics.json", lambda metrics: metrics.update({"vae/parameters": 7}))


def on_other_data(run: Path) -> None:
    edit(run / "vae" / "stage.json", lambda record: record["inputs"].update(dataset="another digest"))


def with_more_samples(run: Path) -> None:
    edit(run / "measure" / "settings.json", lambda settings: settings.update(samples=500))


def without_a_stage(run: Path) -> None:
    edit(run / "run.json", lambda about: about.update(stages=["classifier", "bitflip", "measure"]))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda at: synthetic.write_images(at, 0), "is another run of the seed 0, which"),
        (lambda at: synthetic.write_images(at, 1, steps=500), "vae.max_steps is 500 in it, not 2000"),
        (lambda at: synthetic.write_images(at, 1, classifier_seed=1), "classifier.seed is 1 in it, not 0; give class"),
        (measured_by_another, "classifier/loss is 0.5 in it, not 0."),
        (of_another_size, "vae/parameters is 7 in it, not 1182096"),
        (on_other_data, 'vae.dataset is "another digest" in it, not "digest of the images"'),
        (with_more_samples, "samples is 500 in it, not 1000"),
        (without_a_stage, "has the stages classifier, bitflip, measure, not classifier, vae, bitflip, measure"),
        (lambda at: synthetic.write_comparison(at), "has measured no summaries"),
        (lambda at: synthetic.write_run(at, examples=4), "has not what"),
    ],
)
def test_what_cannot_be_added_is_one_line(made, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, file, page = taken(tmp_path, synthetic.write_images(tmp_path / "s0", 0))
    before = file.read_bytes(), page.read_bytes()
    run = tmp_path / "other"
    if made.__name__ == "<lambda>":
        made(run)
    else:
        made(synthetic.write_images(run, 1))
    assert taken(tmp_path, run, flags=("--add",))[0] == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith(f"--run={run}: ")
    assert error.count("\n") == 1
    assert (file.read_bytes(), page.read_bytes()) == before


def test_a_classifier_from_elsewhere_counts_by_its_content(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [synthetic.write_images(tmp_path / f"s{seed}", seed, classifier_seed=seed) for seed in range(3)]
    for run, content in zip(runs, ("one", "one", "another"), strict=True):
        shutil.rmtree(run / "classifier")
        edit(run / "run.json", lambda about: about["stages"].remove("classifier"))
        edit(run / "measure" / "stage.json", lambda record, c=content: record["inputs"].update(classifier=c))
        edit(run / "measure" / "stage.json", lambda record, r=run: record["config"].update(classifier=f"../{r.name}"))
        edit(run / "metrics.json", lambda metrics: [metrics.pop(f"classifier/{name}") for name in ("accuracy", "loss")])
    assert taken(tmp_path, *runs[:2])[0] == 0
    assert taken(tmp_path, runs[2], flags=("--add",))[0] == 2
    assert 'measure.classifier is "another" in it, not "one"' in capsys.readouterr().err


def old_form(file: Path) -> None:
    """A file as it was written before the stages' fields and pictures were kept."""
    edit(file, lambda content: [content.pop(name) for name in ("stages", "pictures")])
    shutil.rmtree(file.with_suffix(""))


def test_an_older_file_is_compared_by_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, file, page = taken(tmp_path, synthetic.write_images(tmp_path / "s0", 0))
    old_form(file)
    assert readme.main([str(file), str(page)]) == 0
    assert "![" not in block(page, "mnist")
    before = file.read_bytes()
    for change, said in (
        (measured_by_another, "classifier/loss is 0.5 in it"),
        (of_another_size, "vae/parameters is 7"),
    ):
        run = synthetic.write_images(tmp_path / change.__name__, 1)
        change(run)
        assert taken(tmp_path, run, flags=("--add",))[0] == 2
        assert said in capsys.readouterr().err
        assert file.read_bytes() == before
    assert taken(tmp_path, synthetic.write_images(tmp_path / "s1", 1), flags=("--add",))[0] == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "keeps no fields of the stages of seed 0;" in said
    assert "the classifier's measures are the same, other fields could not be compared" in said
    content = json.loads(file.read_text())
    assert content["without_stages"] == [0]
    assert content["pictures"]["seed"] == 1
    assert "samples of seed 1, not chosen" in block(page, "mnist")
    # from now on the stages of the first whose fields are known are what others are compared with
    run = synthetic.write_images(tmp_path / "s2", 2)
    edit(run / "vae" / "stage.json", lambda record: record["config"].update(importance_samples=5))
    assert taken(tmp_path, run, flags=("--add",))[0] == 2
    assert "vae.importance_samples is 5 in it, not 50" in capsys.readouterr().err


def test_minutes_of_another_machine_have_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, page = taken(tmp_path, synthetic.write_images(tmp_path / "s0", 0))
    facts = (tmp_path / "mnist_run.json").read_bytes()
    run = synthetic.write_images(tmp_path / "s1", 1)
    monkeypatch.setattr(readme, "processor", lambda: "a quicker one")
    times = json.loads((run / "vae" / "timing.json").read_text())
    (run / "vae" / "timing.json").write_text(json.dumps([t | {"train_runtime": 9000.0} for t in times]))
    assert taken(tmp_path, run, flags=("--add",))[0] == 2
    error = capsys.readouterr().err
    assert "a quicker one" in error
    assert error.endswith("give --leave-minutes\n")
    assert len(json.loads(file.read_text())["runs"]) == 1
    assert taken(tmp_path, run, flags=("--add", "--leave-minutes"))[0] == 0
    assert (tmp_path / "mnist_run.json").read_bytes() == facts
    assert "What it took, in minutes, on" in block(page, "mnist")
    text = block(page, "mnist")
    assert "Means over 2 seeds (0, 1)" in text
    assert "By the clock: without seed 1, whose machine was shared." in text
    bounds = text.split("| System | Bound")[1].split("| System | While")[0]
    assert cells(bounds, "VAE")[8:] == ["1.5", "2.0 (± 0.0)", "0.02"]
    assert taken(tmp_path, synthetic.write_images(tmp_path / "s2", 2), flags=("--add", "--leave-minutes"))[0] == 0
    assert json.loads(file.read_text())["without_clock"] == [1, 2]
    assert taken(tmp_path, flags=("--check",))[0] == 0


@pytest.mark.parametrize("flags", [("--add",), ("--leave-minutes",), ("--check", "--run", "x")])
def test_flags_that_do_not_go_together(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        taken(tmp_path, flags=flags)
    assert raised.value.code == 2


def test_what_keeps_one_run_cannot_be_added_to(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert taken(tmp_path, synthetic.write_comparison(tmp_path / "a"))[0] == 0
    assert taken(tmp_path, synthetic.write_comparison(tmp_path / "b"), flags=("--add",))[0] == 2
    assert "keeps one run, not one a seed" in capsys.readouterr().err


def test_pictures_of_the_first_run_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [synthetic.write_images(tmp_path / f"s{seed}", seed) for seed in (3, 4)]
    _, file, page = taken(tmp_path, *runs)
    text = block(page, "mnist")
    shown = dict(re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text))
    assert list(shown.values()) == ["mnist/comparison.png", "mnist/vae.png", "mnist/bitflip.png"]
    assert "200 samples of VAE in ten rows" in shown
    assert re.search(r"!\[Fréchet distance: VAE [\d.]+, Bit-flip diffusion [\d.]+, Training images [\d.]+; ", text)
    assert "samples of seed 3, not chosen" in text
    for target in shown.values():
        assert (tmp_path / target).stat().st_size <= LARGEST
    with Image.open(tmp_path / "mnist" / "vae.png") as kept, Image.open(runs[0] / "measure" / "vae.png") as drawn:
        assert kept.size == drawn.size
        difference = ImageChops.difference(kept.convert("L"), drawn)
        assert statistics.mean(difference.tobytes()) < 64  # noise in few levels
    assert readme.main([str(file), str(page), "--check"]) == 0
    (tmp_path / "mnist" / "bitflip.png").unlink()
    assert readme.main([str(file), str(page), "--check"]) == 2
    assert "bitflip.png: no such file; give the run once more by --run" in capsys.readouterr().err


def test_a_damaged_picture_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = synthetic.write_images(tmp_path / "s0", 0)
    (run / "measure" / "vae.png").write_bytes(b"not a picture")
    code, file, _ = taken(tmp_path, run)
    assert code == 2
    assert "vae.png: cannot be read" in capsys.readouterr().err
    assert not file.exists()
    assert not file.with_suffix("").exists()


def test_few_colours_are_kept_as_they_are() -> None:
    rng = random.Random(0)
    levels = bytes(rng.choice(range(7, 256, 8)) for _ in range(100 * 60))  # 32 of them
    plain = Image.frombytes("L", (100, 60), levels)
    with Image.open(io.BytesIO(small(plain))) as kept:
        assert kept.convert("L").tobytes() == levels


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_many_colours_are_made_so_few_that_the_file_is_small(mode: str) -> None:
    rng = random.Random(0)
    noise = Image.frombytes(mode, (600, 300), rng.randbytes(len(mode) * 600 * 300))
    found = small(noise)
    assert len(found) <= LARGEST
    with Image.open(io.BytesIO(found)) as kept:
        assert kept.size == noise.size
        assert len(kept.convert("RGB").getcolors()) >= 2


def test_faint_noise_on_a_dark_ground_costs_no_levels() -> None:
    rng = random.Random(0)
    ground = [abs(rng.gauss(0, 3)) for _ in range(600 * 300)]
    shape = [level + 200 * (place % 600 < 60) * (place % 600) / 60 for place, level in enumerate(ground)]
    plain = Image.frombytes("L", (600, 300), bytes(min(255, round(level)) for level in shape))
    with Image.open(io.BytesIO(small(plain))) as kept:
        assert len(kept.getcolors()) >= 12
        assert statistics.mean(ImageChops.difference(kept.convert("L"), plain).tobytes()) < 4
