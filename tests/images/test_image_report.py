"""The report of image models, from files with invented numbers in the forms that the stages write."""

import json
import re

import pytest
import torch

from pipelines.images.pictures import save_grid
from pipelines.reporting.report import write_report

SYSTEMS = ("ddpm", "vae", "gan")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def stage(folder, name, metrics, state="finished", recipe=None):
    record = {"stage": name, "recipe": recipe or f"images/{name}", "state": state, "config": {"seed": 0}, "seed": 0}
    record |= {"fingerprint": "f" * 64, "inputs": {}, "versions": {"torch": "2"}, "duration_seconds": 3.0}
    write(folder / name / "stage.json", record | {"metrics": metrics})


@pytest.fixture
def run(tmp_path):
    """Three models, trained, measured and drawn."""
    folder, images = tmp_path / "run", torch.rand(10, 20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = range(10, 210, 10)
    for name in SYSTEMS:
        stage(folder, name, {f"{name}/steps": 200.0})
        save_grid(images, folder / name / "samples.png")
        write(folder / name / "timing.json", [{"step": s, "train_runtime": 0.3 * s} for s in steps])
    write(folder / "ddpm" / "log_history.json", [{"step": s, "loss": 1 / s} for s in steps])
    bounds = [{"step": s, "loss": 100.0 - s / 10, "negative_elbo": 100.0 - s / 10} for s in steps]
    bounds += [{"step": s, "eval_negative_elbo": 101.0 - s / 10} for s in steps[::5]]
    write(folder / "vae" / "log_history.json", bounds)
    save_grid(images[:2], folder / "vae" / "reconstructions.png")
    game = {"discriminator_loss": 1.0, "generator_loss": 0.7, "probability_real": 0.9, "probability_fake": 0.01}
    norms = {"gradient_norm_minimax": 1e-6, "gradient_norm_nonsaturating": 1.0}
    write(folder / "gan" / "log_history.json", [{"step": s} | game | norms for s in steps])
    metrics = {"measure/samples": 1000.0, "measure/test_examples": 449.0, "measure/held_out_distance": 1.2}
    for place, name in enumerate((*SYSTEMS, "training_images")):
        metrics |= {f"{name}/frechet_distance": 1.5 + place, f"{name}/precision": 0.7, f"{name}/recall": 0.5}
        metrics |= {f"{name}/precision_ci_low": 0.65, f"{name}/precision_ci_high": 0.75}
    metrics |= {"vae/bound": 91.25, "vae/bound_se": 0.31, "gan/copies": 0.012}
    stage(folder, "measure", metrics)
    settings = {"binarize": "bernoulli", "samples": 1000, "neighbours": 3, "families": {s: s for s in SYSTEMS}}
    write(folder / "measure" / "settings.json", settings)
    write(folder / "measure" / "timing.json", {"seconds_a_sample": {"ddpm": 0.0123, "vae": 1e-5, "gan": 2e-5}})
    for name in SYSTEMS:
        save_grid(images, folder / "measure" / f"{name}.png")
    stages = [*SYSTEMS, "measure"]
    write(folder / "run.json", {"name": "images", "about": "", "command": "", "stages": stages})
    write(folder / "metrics.json", metrics)
    return folder


def section(text, key):
    return re.search(rf'<section id="{key}">(.*?)</section>', text, flags=re.DOTALL).group(1)


def test_the_table_has_every_model_and_measure(run):
    text = section(write_report(run).read_text(), "images")
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    header = [re.sub("<[^>]+>", "", cell) for cell in cells[0]]
    columns = ["System", "Fréchet distance", "Precision, %", "Recall, %", "Copies, %", "Bound, nats"]
    assert header == [*columns, "Seconds a sample"]
    assert [row[0] for row in cells[1:]] == ["DDPM", "VAE", "GAN", "Training images"]
    assert cells[1] == ["DDPM", "1.50", "70.0<small>65.0–75.0</small>", "50.0", "–", "–", "0.012"]
    assert cells[2][5:] == ["91.25<small>± 0.31</small>", "1e-05"]
    assert cells[4][-1] == "–"
    assert "<dt>VAE, Fréchet distance</dt><dd>2.50</dd>" in write_report(run).read_text()
    assert "1000 samples of each model against 449 held-out images, in black and white" in text


def test_pictures_are_in_the_page(run):
    text = write_report(run).read_text()
    assert section(text, "images").count('<img src="data:image/png;base64,') == 3
    training = section(text, "image-training")
    assert "Reconstructions" in training
    assert training.count("<img") == 1  # samples stand in the comparison
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    for name in SYSTEMS:
        (run / "measure" / f"{name}.png").unlink()
    (run / "measure" / "stage.json").unlink()
    training = section(write_report(run).read_text(), "image-training")
    assert training.count("<img") == 4  # without it, where they were trained


def test_curves_of_each_family(run):
    text = section(write_report(run).read_text(), "image-training")
    for title in (
        "The bound against time",
        "minutes of training",
        "The generator’s gradient under both losses".replace("’", "&#39;"),
        "Discriminator",
        "nonsaturating",
    ):
        assert title in text, title
    assert "Learning curves" not in write_report(run).read_text()


def test_the_figure_names_what_it_shows(run):
    text = section(write_report(run).read_text(), "images")
    alt = re.search(r'aria-label="(Fréchet distance: [^"]+)"', text).group(1)
    assert "DDPM 1.5, VAE 2.5, GAN 3.5, Training images 4.5" in alt
    assert "seconds a sample (log): DDPM 0.0123" in alt
    assert "Precision %: DDPM 70" in alt


def test_a_measure_without_a_classifier_is_still_a_table(run):
    metrics = {"vae/nearest_ratio": 0.98, "vae/copies": 0.01, "measure/samples": 200.0, "measure/test_examples": 40.0}
    stage(run, "measure", metrics)
    write(run / "measure" / "timing.json", {})
    text = section(write_report(run).read_text(), "images")
    assert "Training images</th>" not in text
    assert re.search(r'<th scope="row">VAE</th><td>0.98</td><td>1.0</td><td>–</td>', text)


def test_an_unfinished_run_has_a_page(run):
    (run / "measure" / "settings.json").unlink()
    (run / "gan" / "log_history.json").unlink()
    stage(run, "gan", {}, state="running")
    text = write_report(run).read_text()
    assert 'id="images"' not in text
    assert "gan (running)" in text
