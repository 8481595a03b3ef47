"""The report's sections on image models: what their files become on the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import synthetic
from kept_blocks import block, cells, document
from PIL import Image
from scipy.stats import spearmanr

from pipelines import cli
from pipelines.reporting import plots, readme
from pipelines.reporting.report import write_report
from pipelines.reporting.run import read_run
from pipelines.reporting.sections.images_training import images_training
from pipelines.reporting.sections.vae_blur import gaps_at_equal_nats, vae_blur


def section(text: str, key: str) -> str:
    return re.search(rf'<section id="{key}">(.*?)</section>', text, flags=re.DOTALL).group(1)


def test_the_bound_stands_against_the_processors_minutes_and_the_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drawn = synthetic.write_images(tmp_path / "run", 0), []
    lines = plots.lines
    monkeypatch.setattr(plots, "lines", lambda name, panels, *rest: drawn.append(panels) or lines(name, panels, *rest))
    text = section(write_report(run).read_text(), "image-training")
    assert text.count("The bound against time") == 2
    assert text.count("CPU minutes of training, where not said otherwise") == 2
    assert text.count("held out, by the clock") == 2
    for (panel,) in drawn:
        assert {series.label: series.x for series in panel.series} == {
            "held out": [1.0, 2.0],
            "held out, by the clock": [pytest.approx(50 / 60), 1.5],
        }
    for name in ("vae", "bitflip"):  # older runs have the clock alone
        path = run / name / "timing.json"
        entries = json.loads(path.read_text())
        path.write_text(json.dumps([{k: v for k, v in e.items() if k != "train_cpu_runtime"} for e in entries]))
    text = section(write_report(run).read_text(), "image-training")
    assert text.count("The bound against time") == 2
    assert "CPU" not in text
    assert "by the clock" not in text


def test_samples_drawn_on_the_way_are_shown_in_their_order(tmp_path: Path) -> None:
    run = synthetic.write_images(tmp_path / "run", 0)
    assert "Samples while it trained" not in images_training(read_run(run)).body
    folder = run / "vae" / "samples"
    folder.mkdir()
    for step in range(100, 1100, 100):
        Image.new("L", (8, 8), step // 5).save(folder / f"step-{step:07d}.png")
    body = images_training(read_run(run)).body
    assert re.findall(r"<h4>After (\d+) steps</h4>", body) == ["100", "300", "500", "600", "800", "1000"]
    assert re.findall(r'alt="Samples of vae after (\d+) steps"', body) == ["100", "300", "500", "600", "800", "1000"]
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert re.findall(r"<h4>After (\d+) steps</h4>", images_training(read_run(run)).body) == ["100"]


def test_the_comparison_says_which_bound_a_vaes_is(tmp_path: Path) -> None:
    run = synthetic.write_images(tmp_path / "run", 0)
    text = section(write_report(run).read_text(), "images")
    assert "importance-weighted one with k = 50 samples of z" in text
    path = run / "vae" / "stage.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": {"seed": 0}}))  # of an older run
    text = section(write_report(run).read_text(), "images")
    assert "(of a VAE the importance-weighted one);" in text


def test_bits_of_a_vaes_stage_go_by_their_own_name(tmp_path: Path) -> None:
    run = synthetic.write_images(tmp_path / "run", 0)
    for name in ("vae", "bitflip"):
        path = run / name / "stage.json"
        record = json.loads(path.read_text()) | {"metrics": {f"{name}/bits_per_pixel": 0.1578}}
        path.write_text(json.dumps(record))
    text = section(write_report(run).read_text(), "image-training")
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th><td>([\d.]+)</td>', text))
    assert rows == {"Negative ELBO, bits a pixel": "0.1578", "Bound, bits a pixel": "0.1578"}


def sweep_run(folder: Path) -> Path:
    """A chain of one stage, the sweep."""
    synthetic.write_sweep(folder / "vae_blur")
    synthetic.write(folder / "run.json", {"name": "blur", "stages": ["vae_blur"]})
    synthetic.write(folder / "metrics.json", {"vae_blur/rank_correlation": 0.9})
    return folder


def test_the_sweep_of_autoencoders_has_a_section(tmp_path: Path) -> None:
    run = sweep_run(tmp_path / "run")
    page = write_report(run).read_text()
    text = section(page, "vae-blur")
    assert re.findall(r'<th scope="row">([^<]+)</th><td>([^<]+)</td><td>([^<]+)</td>', text) == [
        ("Bernoulli, 0.1", "30.00", "0.900"),
        ("Bernoulli, 1", "4.00", "0.500"),
        ("Gaussian, 0.1", "64.00", "0.800"),
        ("Gaussian, 1", "16.00", "0.600"),
        ("Gaussian, 10", "1.00", "0.200"),
    ]
    assert "5 autoencoders, 1000 steps each, seed 3, on digits." in text
    assert text.count("<img") == 1
    assert text.count("<svg") == 1
    assert 'id="stage-vae-blur"' not in page  # it needs no plain section
    (run / "vae_blur" / "sweep.json").unlink()
    assert vae_blur(read_run(run)) is None


def test_a_recipe_that_was_run_by_itself_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = synthetic.write_sweep(tmp_path / "blur")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(folder)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "Gaussian, 0.1" in section(text, "vae-blur")
    assert "<title>vae_blur" in text


def test_a_sweep_that_was_run_by_itself_is_kept(tmp_path: Path) -> None:
    folder, page = synthetic.write_sweep(tmp_path / "out" / "blur"), document(tmp_path, "vae_blur")
    file = tmp_path / "vae_blur.json"
    assert readme.main([str(file), str(page), "--run", str(folder)]) == 0
    assert json.loads(file.read_text())["sweep"] == json.loads((folder / "sweep.json").read_text())
    text = block(page, "vae_blur")
    assert cells(text, "Gaussian, 1") == ["Gaussian, 1", "16.00", "0.600", "0.0840"]
    rows = json.loads((folder / "sweep.json").read_text())
    for key in ("kl", "beta"):
        value = spearmanr([row[key] for row in rows], [row["sharpness"] for row in rows])[0]
        assert f"{value:.2f} with".replace("-", "−") in text
    assert "Bernoulli: 90 % of the images' sharpness at 30.0 nats, 50 % at 4.0." in text
    assert "Gaussian: 80 % of the images' sharpness at 64.0 nats, 20 % at 1.0." in text
    assert re.findall(r"\]\((vae_blur/[^)]+)\)", text) == ["vae_blur/sharpness.png", "vae_blur/reconstructions.png"]
    for name in ("sharpness.png", "reconstructions.png"):
        with Image.open(tmp_path / "vae_blur" / name) as picture:
            assert picture.width >= 60
    assert text.rstrip().endswith(": 2.0.")  # minutes
    assert readme.main([str(file), str(page), "--check"]) == 0


def test_gaps_at_equal_nats_by_hand() -> None:
    rows = json.loads(json.dumps([{"kl": k, "sharpness": s} for k, s in ((30.0, 0.9), (4.0, 0.5), (0.5, 0.1))]))
    other = [{"kl": k, "sharpness": s} for k, s in ((64.0, 0.8), (16.0, 0.6), (1.0, 0.2), (0.0, 0.1))]
    found = gaps_at_equal_nats(rows, other)
    wanted = [
        (nats, sharp - np.interp(math.log(nats), np.log([1.0, 16.0, 64.0]), [0.2, 0.6, 0.8]))
        for nats, sharp in ((4.0, 0.5), (30.0, 0.9))
    ]
    assert found == [pytest.approx(pair) for pair in wanted]
    assert found[0][1] == pytest.approx(0.1)  # halfway between 1 and 16 on a logarithmic scale
