"""The training loop: what each step sees, averages of weights, several optimizers, checkpoints, resume, processes."""

import json
from itertools import chain
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images.data import Images, load_images
from pipelines.images.evaluation import measure
from pipelines.images.loop import Loop, new_accelerator
from pipelines.images.pictures import grid, save_grid
from pipelines.images.seeds import seeded
from pipelines.images.vae import VAEConfig
from pipelines.images.vae_method import VAEMethod
from tests.images.conftest import check_resumes, check_two_processes

SMALL = ["architecture=mlp", "hidden=16", "latent_dim=4", "max_train=200", "max_test=40", "batch_size=20"]
SMALL += ["importance_samples=2", "logging_steps=2", "save_steps=4", "max_steps=14", "report_to=none"]


def config_of(tmp_path, **values) -> VAEConfig:
    plain = {"precision": "fp32", "report_to": "none", "binarize": "threshold", "lr_scheduler": "constant"}
    plain |= {"batch_size": 4, "logging_steps": 1, "save_steps": 1000, "output_dir": str(tmp_path / "out")}
    return validate(VAEConfig, plain | values)


class Recorder:
    """A method of one number a part, which notes what it is shown; the loss of a part is its number times the draw."""

    name = "recorder"
    averaged = ("a",)
    estimated = ()

    def __init__(self, phases=("a",), losses=None):
        self.phases, self.seen, self.losses = phases, [], losses
        self.parts = {name: nn.Linear(1, 1, bias=False) for name in ("a", "b")}
        for part in self.parts.values():
            nn.init.ones_(part.weight)

    def optimizers(self):
        return {name: torch.optim.SGD(self.parts[name].parameters(), lr=0.5) for name in self.phases}

    def loss(self, phase, batch, draws, step):
        noise = draws.uniform()
        weights = {name: part.weight.item() for name, part in self.parts.items()}
        self.seen.append((step, phase, batch.labels.tolist(), noise.tolist(), weights))
        value = self.parts["a"].weight * self.parts["b"].weight * noise.mean()
        if self.losses:
            value = value * self.losses[step]
        return value.sum(), {"noise": noise.mean()}

    def evaluate(self, batch, draws):
        return {"label": batch.labels.double(), "noise": draws.uniform()}


def numbered(count: int) -> Images:
    return Images(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), torch.arange(count))


def run(method, config, count=21, steps=10) -> list[dict]:
    return Loop(method, numbered(count), numbered(5), config, new_accelerator(config), steps).run()


def test_an_epoch_shows_each_image_once_in_a_new_order(tmp_path):
    method = Recorder()
    run(method, config_of(tmp_path), count=21, steps=10)
    labels = [seen[2] for seen in method.seen]
    epochs = [list(chain(*labels[:5])), list(chain(*labels[5:]))]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = Recorder()
    run(again, config_of(tmp_path, output_dir=str(tmp_path / "again")))
    assert again.seen == method.seen
    other = Recorder()
    run(other, config_of(tmp_path, output_dir=str(tmp_path / "other"), seed=1))
    assert other.seen != method.seen


class Watcher(Recorder):
    """Notes which pixels of each image are white, epoch by epoch; is stopped before a step where it is told to be."""

    def __init__(self, stopped_at=None):
        super().__init__()
        self.white, self.stopped_at = {}, stopped_at

    def loss(self, phase, batch, draws, step):
        if step == self.stopped_at:
            raise KeyboardInterrupt
        assert set(batch.images.unique().tolist()) == {0.0, 1.0}
        for label, image in zip(batch.labels.tolist(), batch.images, strict=True):
            self.white.setdefault(label, {})[step // 5] = image.flatten().tolist()
        return super().loss(phase, batch, draws, step)


def test_grey_pixels_are_drawn_afresh_each_epoch_and_alike_after_a_restart(tmp_path):
    grey = Images(torch.full((20, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(20))

    def shown(watcher, name, batch_size=4, **values):
        config = config_of(
            tmp_path, binarize="bernoulli", batch_size=batch_size, output_dir=str(tmp_path / name), **values
        )
        Loop(watcher, grey, grey, config, new_accelerator(config), 15).run()
        return watcher.white

    whole = shown(Watcher(), "whole")
    assert all(sorted(epochs) == [0, 1, 2] for epochs in whole.values())
    drawn = [tuple(pixels) for epochs in whole.values() for pixels in epochs.values()]
    assert len(set(drawn)) == 60  # no image twice the same, nor two images alike
    assert abs(np.mean(drawn) - 128 / 255) < 4.5 * 0.5 / np.sqrt(60 * 64)
    stopped = Watcher(stopped_at=7)  # in the middle of the second epoch
    with pytest.raises(KeyboardInterrupt):
        shown(stopped, "stopped", save_steps=3)
    again = Watcher()
    shown(again, "stopped", save_steps=3)
    assert [seen[0] for seen in again.seen] == list(range(6, 15))  # from the checkpoint on, not from the start
    for label, epochs in whole.items():
        assert all(pixels == epochs[epoch] for epoch, pixels in again.white[label].items())
        assert all(pixels == epochs[epoch] for epoch, pixels in stopped.white[label].items())
    parts = shown(Watcher(), "parts", batch_size=2, gradient_accumulation=2)
    assert parts == whole


def test_parts_of_a_batch_are_the_batch(tmp_path):
    whole, parts = Recorder(), Recorder()
    histories = [
        run(whole, config_of(tmp_path, batch_size=6)),
        run(parts, config_of(tmp_path, batch_size=2, gradient_accumulation=3, output_dir=str(tmp_path / "parts"))),
    ]
    assert len(parts.seen) == 3 * len(whole.seen)
    for number, (_, _, labels, noise, _) in enumerate(whole.seen):
        three = parts.seen[3 * number : 3 * number + 3]
        assert list(chain(*(seen[2] for seen in three))) == labels
        assert list(chain(*(seen[3] for seen in three))) == noise
    assert parts.parts["a"].weight.item() == pytest.approx(whole.parts["a"].weight.item(), rel=1e-6)
    for first, second in zip(*histories, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_vectors_are_logged_by_the_norm_of_their_mean_over_the_step(tmp_path):
    class Pointer(Recorder):
        def loss(self, phase, batch, draws, step):
            loss, _ = super().loss(phase, batch, draws, step)
            return loss, {"arrow": torch.stack([draws.uniform().mean(), -draws.uniform().mean()])}

    fields = {"gradient_accumulation": 3, "batch_size": 2, "logging_steps": 2}
    parts = run(Pointer(), config_of(tmp_path, **fields), steps=4)
    whole = run(Pointer(), config_of(tmp_path, batch_size=6, logging_steps=2, output_dir=str(tmp_path / "o")), steps=4)
    assert [entry["arrow"] for entry in parts] == pytest.approx([entry["arrow"] for entry in whole], rel=1e-6)


def test_each_phase_moves_its_own_part_and_sees_what_the_one_before_it_left(tmp_path):
    method = Recorder(phases=("b", "a"))
    run(method, config_of(tmp_path, max_grad_norm=0.0), steps=3)
    weights = {"a": 1.0, "b": 1.0}
    for _, phase, _, noise, seen in method.seen:
        assert seen == pytest.approx(weights)
        other = "a" if phase == "b" else "b"
        weights[phase] -= 0.5 * weights[other] * float(np.mean(noise))
    assert [(seen[0], seen[1]) for seen in method.seen] == [(s, p) for s in range(3) for p in ("b", "a")]
    draws = {(seen[0], seen[1]): seen[3] for seen in method.seen}
    assert draws[0, "a"] != draws[0, "b"]


def test_the_part_of_no_phase_stays(tmp_path):
    method = Recorder()
    run(method, config_of(tmp_path))
    assert method.parts["b"].weight.item() == 1.0
    assert method.parts["a"].weight.item() < 1.0


def test_gradients_are_clipped_and_rates_follow_the_schedule(tmp_path):
    method = Recorder()
    history = run(method, config_of(tmp_path, max_grad_norm=0.01, lr_scheduler="linear", warmup_ratio=0.5), steps=4)
    before = [seen[4]["a"] for seen in method.seen] + [method.parts["a"].weight.item()]
    # rates 0, 1/2, 1, 1/2 of 0.5, gradients of norm 0.01
    assert np.diff(before).tolist() == pytest.approx([0.0, -0.0025, -0.005, -0.0025], rel=1e-3)
    assert [entry["learning_rate"] for entry in history] == [0.25, 0.5, 0.25, 0.0]  # after each step


def test_the_average_is_what_is_left_in_the_end(tmp_path):
    method = Recorder()
    run(method, config_of(tmp_path, ema_decay=0.6), steps=9)
    plain = Recorder()
    run(plain, config_of(tmp_path, output_dir=str(tmp_path / "plain")), steps=9)
    assert [seen[4] for seen in method.seen] == [seen[4] for seen in plain.seen]  # training does not see it
    weights = [*(seen[4]["a"] for seen in plain.seen[1:]), plain.parts["a"].weight.item()]
    average = 1.0
    for number, weight in enumerate(weights):
        decay = 0.0 if number == 0 else min(0.6, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weight
    assert method.parts["a"].weight.item() == pytest.approx(average, rel=1e-5)


def test_the_log_holds_means_over_its_steps(tmp_path):
    method = Recorder()
    history = run(method, config_of(tmp_path, logging_steps=4), steps=10)
    means = [float(np.mean(seen[3])) for seen in method.seen]
    assert [entry["step"] for entry in history] == [4, 8, 10]
    expected = [np.mean(means[:4]), np.mean(means[4:8]), np.mean(means[8:])]
    assert [entry["noise"] for entry in history] == pytest.approx(expected, rel=1e-6)
    assert history[1]["epoch"] == 1.6
    assert set(history[0]) == {"step", "epoch", "loss", "noise", "learning_rate"}


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    method = Recorder(losses=[1, 1, float("nan"), 1])
    with pytest.raises(UserError, match=r"learning_rate=0.001: the loss became nan by step 3; lower it"):
        run(method, config_of(tmp_path), steps=4)


def test_measures_of_each_image_do_not_depend_on_where_the_set_ends(tmp_path):
    config = config_of(tmp_path, eval_batch_size=3)
    accelerator = new_accelerator(config)
    found = measure(Recorder(), numbered(8), config, accelerator)
    fewer = measure(Recorder(), numbered(6), config, accelerator)
    assert found["label"].tolist() == list(range(8))
    assert found["noise"].tolist()[:6] == fewer["noise"].tolist()


def test_seeds_and_keys_give_generators_of_their_own():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]
    firsts = [torch.rand(1, generator=seeded(*key)).item() for key in keys]
    assert len(set(firsts)) == len(keys)
    assert torch.rand(1, generator=seeded(0, 1)).item() == firsts[3]


def test_checkpoints_are_two_and_hold_no_pickle(tmp_path):
    config = config_of(tmp_path, save_steps=2, ema_decay=0.9, architecture="mlp", hidden=8, latent_dim=2)
    images = load_images(config)
    method = VAEMethod(config, images)
    Loop(method, images.train, images.test, config, new_accelerator(config), 7).run()
    folders = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-6", "checkpoint-7"]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["complete", "state.json", "state.safetensors"]
    # a finished run given again has nothing to train and ends with the same weights
    other = VAEMethod(config, images)
    history = Loop(other, images.train, images.test, config, new_accelerator(config), 7).run()
    assert history[-1]["step"] == 7
    for (name, mine), (_, again) in zip(
        method.parts["vae"].state_dict().items(), other.parts["vae"].state_dict().items(), strict=True
    ):
        assert torch.equal(mine, again), name


def test_grid(tmp_path):
    images = torch.zeros(2, 3, 1, 28, 28)
    images[1, 2] = 1.0
    images[0, 1, 0, 5, 6] = 0.5
    sheet = np.asarray(grid(images))
    assert sheet.shape == (2 * 29 + 1, 3 * 29 + 1)
    assert sheet[0].tolist() == [128] * 88
    assert (sheet[30:58, 59:87] == 255).all()
    assert sheet[1 + 5, 30 + 6] == 128
    assert (sheet[1:29, 1:29] == 0).all()
    save_grid(torch.rand(1, 2, 3, 8, 8), tmp_path / "new" / "x.png")
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (19 * 4, 10 * 4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


class TestRecipe:
    """The recipe's own script, in processes of its own."""

    words: ClassVar = [*SMALL, "ema_decay=0.9", "lr_scheduler=cosine", "warmup_ratio=0.2", "max_grad_norm=5.0"]

    def test_killed_and_resumed_it_ends_the_same(self, stages, tmp_path):
        words = [*self.words, "sample_steps=5", "eval_steps=7"]
        folder = check_resumes(stages, tmp_path, "images/vae", words)
        names = {path.name for path in folder.iterdir()}
        assert names >= {"model_index.json", "vae", "samples.png", "samples", "reconstructions.png", "timing.json"}
        assert not names & {"checkpoints", "logs"}
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000005.png", "step-0000010.png"]
        history = json.loads((folder / "log_history.json").read_text())
        assert [entry["step"] for entry in history if "eval_negative_elbo" in entry] == [7, 14]
        assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6, 8, 10, 12, 14]
        metrics = json.loads((folder / "stage.json").read_text())["metrics"]
        assert metrics["vae/train_loss"] == [entry["loss"] for entry in history if "loss" in entry][-1]
        timing = json.loads((folder / "timing.json").read_text())
        for clock in ("train_runtime", "train_cpu_runtime"):
            seconds = [entry[clock] for entry in timing]
            assert seconds == sorted(seconds)
            assert seconds[0] > 0

    @pytest.mark.slow
    def test_two_processes_do_what_one_does(self, stages, tmp_path):
        check_two_processes(stages, tmp_path, "images/vae", self.words, batch_size=20)

    def test_wrong_values_are_one_line_each(self, stages, tmp_path):
        cases = [
            (
                ["likelihood=bernoulli", "binarize=none"],
                "error: likelihood=bernoulli: grey levels are not binary;",
            ),
            (["batch_size=5000"], "error: dataset=1617 training images: one step takes 5000 images"),
            (["save_steps=3"], "error: save_steps=3: a resumed run would log other averages; give a multiple of"),
            (["latents=3"], "error: latents=3: unknown key; "),
        ]
        for words, message in cases:
            out = tmp_path / "runs" / "x"
            code, printed, errors = stages.answer("--recipe", "images/vae", *words, f"output_dir={out}")
            assert code == 2, printed + errors
            lines = [line for line in errors.splitlines() if line.startswith("error")]
            assert len(lines) == 1
            assert lines[0].startswith(message)
            assert "Traceback" not in errors
            assert not (tmp_path / "runs").exists()
