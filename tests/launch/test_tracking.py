"""Curves have the same names whatever trains and whichever tracker shows them; what is missing is said before work."""

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from pipelines.errors import UserError
from pipelines.tracking import run_name, tracker_problems
from tests.chain.conftest import CHAIN
from tests.launch.conftest import ROOT

_SHORT = ["max_steps=4", "logging_steps=2", "save_steps=4"]
_VAE = ["architecture=mlp", "hidden=16", "latent_dim=4", "max_train=64", "max_test=16", "batch_size=16"]
_VAE += ["importance_samples=0", "eval_steps=2", "precision=fp32", *_SHORT]
_SFT = ["copy_steps=0", "batch_size=8", "eval_steps=2", *_SHORT]
ABSENT = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None]
PRESENT = [name for name in ("trackio", "wandb") if name not in ABSENT]


def trained(begun, tmp_path, run, *more: str) -> dict:
    """An autoencoder and an SFT model, trained by ``run(recipe, *words)``; the folders of both."""
    run_dir = tmp_path / "run"
    shutil.copytree(begun.folder, run_dir)
    code, printed = run("images/vae", *_VAE, *more, f"output_dir={run_dir / 'vae'}")
    assert code == 0, printed[-3000:]
    code, printed = run("summarization/sft", "--config", str(CHAIN), *_SFT, *more, f"output_dir={run_dir}")
    assert code == 0, printed[-3000:]
    return {"vae": run_dir / "vae", "sft": run_dir / "sft"}


def expected(folder) -> dict[str, list[float]]:
    """The curves that ``log_history.json`` holds, under the names that trackers show."""
    curves: dict[str, list[float]] = {}
    for entry in json.loads((folder / "log_history.json").read_text()):
        for key, value in entry.items():
            if key != "step":
                name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                curves.setdefault(name, []).append(value)
    return curves


def test_tensorboard_shows_the_same_names_of_every_loop(begun, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = {}
    for name, folder in trained(begun, tmp_path, partial(begun.server.run, "--recipe")).items():
        events = EventAccumulator(str(folder / "logs")).Reload()
        shown[name] = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag, values in expected(folder).items():
            if tag != "train/epoch":  # of every kind of entry
                assert shown[name][tag] == pytest.approx(values, rel=1e-5), tag
    common = set(shown["vae"]) & set(shown["sft"])
    assert {"train/loss", "train/learning_rate", "train/epoch"} <= common
    assert all(re.match("(train|eval)/", tag) for tags in shown.values() for tag in tags)
    assert all(any(tag.startswith("eval/") for tag in tags) for tags in shown.values())


@pytest.mark.skipif(not ABSENT, reason="every tracker is installed")
def test_a_tracker_that_is_not_installed_is_one_line_before_work(begun, tmp_path):
    tracker = ABSENT[0]
    words = [*_VAE, f"report_to={tracker}", f"output_dir={tmp_path / 'vae'}"]
    code, printed, errors = begun.server.answer("--recipe", "images/vae", *words)
    assert (code, printed) == (2, "")
    mend = f"pip install {tracker}, or give report_to=tensorboard"
    assert errors == f"error: report_to={tracker}: the package {tracker} is not installed; {mend}\n"
    assert not (tmp_path / "vae").exists()


def test_a_run_goes_by_the_names_of_its_folders(tmp_path):
    assert run_name(tmp_path / "demo" / ".sft.partial") == "demo-sft"
    assert run_name(tmp_path / "demo" / "sft") == "demo-sft"


@pytest.mark.skipif("wandb" in ABSENT, reason="wandb is not installed")
def test_wandb_without_a_login_is_one_line(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "WANDB_MODE=offline" in str(UserError.of(tracker_problems("wandb")))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert tracker_problems("wandb") == []
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker_problems("wandb") == []


def rows_of(tracker: str, folder, home) -> list[dict]:
    """What a tracker kept of a stage, a row for each time it was told something."""
    if tracker == "trackio":
        import os

        os.environ["TRACKIO_DIR"] = str(home)
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_logs("genalign", run_name(folder))
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which wandb writes offline: blocks of 32 KiB, the first after a head of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only part, or the last
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracker", PRESENT or [pytest.param("none", marks=pytest.mark.skip("no tracker is installed"))]
)
def test_a_tracker_keeps_the_same_curves_offline(begun, tmp_path, monkeypatch, tracker):
    home = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")

    def run(recipe: str, *words: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        return done.returncode, done.stdout + done.stderr

    folders = trained(begun, tmp_path, run, f"report_to={tracker}")
    for folder in folders.values():
        rows = rows_of(tracker, folder, home)
        for tag, values in expected(folder).items():
            kept = [row[tag] for row in rows if tag in row]
            if tag != "train/epoch":
                assert kept == pytest.approx(values, rel=1e-5), tag
        assert all("train/global_step" in row for row in rows)
