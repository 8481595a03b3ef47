"""The chain of the image stages, tiny: what it leaves, what it measures, killed and gone on with, loaded elsewhere."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.classifier_network import ImageClassifier, quarter_turns
from pipelines.images.measure import MeasureConfig
from pipelines.reporting.kept import kept, results_block
from pipelines.reporting.metrics import is_interval_key
from pipelines.reporting.run import opened
from tests.chain.test_whole import documented
from tests.images.conftest import HERE, ROOT, content

CHAIN = HERE / "tiny_images.yaml"
SYSTEMS = ("ddpm", "bitflip", "vae", "gan")
NAMED = dict(zip(("DDPM", "Bit-flip diffusion", "VAE", "GAN"), SYSTEMS, strict=True)) | {
    "Training images": "training_images"
}
pytestmark = pytest.mark.xdist_group("image_chain")


@pytest.fixture(scope="module")
def whole(stages, tmp_path_factory):
    """The folder of a run that nothing disturbed. Tests must not change it: they copy it."""
    run_dir = tmp_path_factory.mktemp("images") / "run"
    code, printed = stages.run("run", str(CHAIN), "--output_dir", str(run_dir))
    assert code == 0, printed[-3000:]
    return run_dir


@pytest.fixture(scope="module")
def metrics(whole):
    return json.loads((whole / "metrics.json").read_text())


def test_every_metric_is_documented(metrics):
    patterns = documented(ROOT)
    for key in metrics:
        plain = re.sub("_(ci_low|ci_high|se)$", "", key)
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"


def test_every_system_is_measured_in_its_range(metrics):
    for system in (*SYSTEMS, "training_images"):
        assert metrics[f"{system}/frechet_distance"] >= 0
        for rate in ("precision", "recall", "confidence", "class_coverage"):
            assert 0 <= metrics[f"{system}/{rate}"] <= 1, (system, rate)
        assert 0 <= metrics[f"{system}/class_entropy"] <= 2.31
    for system in SYSTEMS:
        assert metrics[f"{system}/nearest_distance"] > 0
        assert 0 <= metrics[f"{system}/copies"] <= 1
    # one standard error is of which images were measured, the other of the draws that estimate their bound
    assert 0 < metrics["bitflip/bound_monte_carlo_error"] < metrics["bitflip/bound_se"]
    # what draws binary images only has no distance of grey levels; who gives no likelihood has no bound
    assert {s for s in SYSTEMS if f"{s}/grey_frechet_distance" in metrics} == {"ddpm", "vae", "gan"}
    assert {s for s in SYSTEMS if f"{s}/bound" in metrics} == {"bitflip", "vae"}


def test_real_images_are_the_better_samples(metrics):
    real = metrics["training_images/frechet_distance"]
    assert all(real < metrics[f"{system}/frechet_distance"] for system in SYSTEMS)
    assert metrics["training_images/precision"] > 0.7


def test_means_have_intervals_and_several_seeds_standard_errors(metrics):
    for measure in ("precision", "recall", "confidence", "nearest_distance", "copies"):
        low, high = metrics[f"gan/{measure}_ci_low"], metrics[f"gan/{measure}_ci_high"]
        assert low <= metrics[f"gan/{measure}"] <= high
        assert f"vae/{measure}_ci_low" not in metrics
        assert metrics[f"vae/{measure}_se"] >= 0
    mean = (metrics["vae/importance_weighted"] + metrics["vae_again/importance_weighted"]) / 2
    assert metrics["vae/bound"] == pytest.approx(mean)
    spread = abs(metrics["vae/importance_weighted"] - metrics["vae_again/importance_weighted"]) / 2
    assert metrics["vae/bound_se"] == pytest.approx(spread)


def test_samples_and_pictures_are_there(whole):
    folder = whole / "measure"
    for system in SYSTEMS:
        images = load_file(folder / "samples" / f"{system}.safetensors")["images"]
        assert images.shape == (200, 1, 8, 8)
        sheet = Image.open(folder / f"{system}.png")
        cell = (sheet.width // 4 - 1) // 20  # 8×8 pixels are enlarged four times
        assert cell == 9
        assert (sheet.height // 4 - 1) // 10 == 9
        assert (folder / f"{system}_nearest.png").is_file()
    assert set(load_file(folder / "samples" / "bitflip.safetensors")["images"].ravel()) == {0, 255}
    assert Image.open(folder / "ddpm_denoising.png").n_frames == 5
    assert Image.open(folder / "bitflip_denoising.png").n_frames == 5
    assert not (folder / "gan_denoising.png").exists()
    assert set(json.loads((folder / "timing.json").read_text())["seconds_a_sample"]) == set(SYSTEMS)


def test_the_report_shows_them_and_needs_nothing_else(whole):
    text = (whole / "report.html").read_text()
    for wanted in ("Image models compared", "Bit-flip diffusion", "Training images", "200 samples", "Out of the noise"):
        assert wanted in text, wanted
    assert len(re.findall('src="data:image/png;base64,', text)) >= 4 * 2 + 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert len(text) < 5_000_000


def test_a_document_shows_what_a_run_measured(whole, metrics):
    content = kept([opened(whole)])
    assert content["runs"][0]["metrics"].items() >= {k: v for k, v in metrics.items() if not is_interval_key(k)}.items()
    text = results_block(content)
    for system in ("DDPM", "Bit-flip diffusion", "VAE", "GAN", "Training images"):
        assert f"| {system} | {metrics[NAMED[system] + '/frechet_distance']:,.2f} |" in text
    # VAE of two seeds: what the measuring stage has is their mean, what the training stage has is its own
    row = next(line for line in text.split("| System | Bound")[1].splitlines() if line.startswith("| VAE |"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == [
        f"{metrics[f'vae/{measure}']:,.2f}" for measure in ("bound", "negative_elbo", "kl", "reconstruction")
    ]


def test_killed_while_measuring_it_goes_on_and_ends_alike(stages, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "measure")
    argv = ["run", str(CHAIN), "--output_dir", str(run_dir)]
    code, _ = stages.run(*argv, kill=(r"/\.bitflip\.png", 1))
    assert code == -signal.SIGKILL
    blocks = sorted((run_dir / ".measure.partial" / "checkpoints").rglob("*.safetensors"))
    assert [(p.parent.name, p.stem) for p in blocks] == [
        (name, f"00000{number}") for name in ("bitflip-0", "ddpm-0") for number in range(3)
    ]
    code, printed = stages.run(*argv)
    assert code == 0, printed[-3000:]
    assert content(run_dir / "measure") == content(whole / "measure")
    assert (run_dir / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def test_a_finished_chain_has_nothing_to_do(stages, whole):
    code, printed = stages.run("run", str(CHAIN), "--output_dir", str(whole))
    assert code == 0
    assert "nothing to do" in printed


def measured(whole, **values):
    fields = {"systems": {"gan": str(whole / "gan")}, "test_fraction": 0.25, "max_train": 128, "max_test": 60}
    return validate(MeasureConfig, fields | values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"test_fraction": 0.5}, "test_fraction=0.5: systems.gan was trained with test_fraction=0.25"),
        ({"dataset": str(HERE)}, "systems.gan was trained on digits"),
        ({"systems": {}}, "systems={}: there is nothing to measure"),
        ({"systems": {"training_images": "."}}, "systems=training_images: cannot be the name"),
        ({"classifier": "GAN"}, "holds no classifier"),
        ({"samples": 10}, "samples=10: input should be greater than or equal to 200"),
    ],
)
def test_a_mistake_is_found_before_work_starts(whole, values, said):
    if values.get("classifier"):
        values = {"classifier": str(whole / "gan")}
    with pytest.raises(UserError) as error:
        measured(whole, **values)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_pipeline_is_refused(whole):
    with pytest.raises(UserError, match="no saved pipeline"):
        measured(whole, systems={"mine": str(whole / "classifier")})


def unlabelled(folder):
    """Forty pictures of an edge, each somewhere else."""
    folder.mkdir()
    for number in range(40):
        picture = np.zeros((8, 8), np.uint8)
        picture[: 1 + number % 5, : 2 + number % 6] = 200
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def test_images_without_labels_are_told_by_their_rotation(stages, tmp_path):
    folder = unlabelled(tmp_path / "pictures")
    words = [f"dataset={folder}", "test_fraction=0.25", "batch_size=10", "max_steps=60", "report_to=none"]
    words += ["precision=fp32", f"output_dir={tmp_path / 'run'}"]
    code, _, errors = stages.answer("--recipe", "images/classifier", *words, "task=labels")
    assert code == 2, errors
    assert errors.strip().splitlines()[-1].startswith(f"error: dataset={folder}: has no labels")
    code, _, errors = stages.answer("--recipe", "images/classifier", *words)
    assert code == 0, errors
    classifier = ImageClassifier.from_pretrained(tmp_path / "run")
    assert (classifier.config.task, classifier.config.classes) == ("rotations", 4)
    metrics = json.loads((tmp_path / "run" / "stage.json").read_text())["metrics"]
    assert metrics["classifier/accuracy"] > 0.5  # a quarter is guessing


def test_quarter_turns_are_each_images_own():
    images = torch.rand(5, 2, 6, 6)
    found = quarter_turns(images, torch.tensor([0, 1, 2, 3, 1]))
    for image, turned, times in zip(images, found, (0, 1, 2, 3, 1), strict=True):
        assert torch.equal(turned, torch.rot90(image, times, (1, 2)))


LOADING = """
import sys, torch
from {module} import {name}
pipeline = {name}.from_pretrained({folder!r})
first, second = (
    pipeline(batch_size=3, generator=torch.Generator().manual_seed(5), output_type="pt", **{further}).images
    for _ in range(2)
)
assert torch.equal(first, second) and first.shape == (3, 1, 8, 8), first.shape
print("pipelines" in sys.modules, first.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "module", "name", "further"),
    [
        ("ddpm", "diffusers", "DDPMPipeline", {"num_inference_steps": 5}),
        ("bitflip", "pipelines.images.bitflip_pipeline", "BitFlipPipeline", {}),
        ("vae", "pipelines.images.vae_pipeline", "VAEPipeline", {}),
        ("gan", "pipelines.images.gan_pipeline", "GANPipeline", {}),
    ],
)
def test_a_process_of_its_own_loads_it_and_draws_the_same(whole, system, module, name, further):
    code = LOADING.format(module=module, name=name, folder=str(whole / system), further=further)
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
        for _ in range(2)
    ]
    assert done[0].returncode == 0, done[0].stderr[-2000:]
    assert done[0].stdout == done[1].stdout
    assert done[0].stdout.split()[0] == str(system != "ddpm")
