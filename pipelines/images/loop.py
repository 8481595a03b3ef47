"""The training loop of all image models, on Accelerate.

Everything random is a function of (seed, step, row), so there is no generator state to keep: a resumed run draws what
one never stopped would have drawn, and processes that share a batch draw what one process would have drawn for it.
Gradients are averaged by hand instead of by ``DistributedDataParallel``: a method may then use its parts as it likes
(two networks in one loss, one network twice, gradients of gradients).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from pipelines.images.checkpoints import Trained, read_state, write_state
from pipelines.images.data import Images
from pipelines.images.method import Batch, Draws, Method
from pipelines.images.pictures import save_grid
from pipelines.precision import choose_precision
from pipelines.stage import CHECKPOINTS
from pipelines.tracking import LOGS, PROJECT, named, run_name
from pipelines.training import check_finite, checkpoint_folder, clean_history, last_checkpoint, mark_whole

if TYPE_CHECKING:
    from pipelines.images.training import ImageTrainingConfig

ORDER, PIXELS, NOISE, DROPOUT, SAMPLES, TEST_PIXELS, TEST_NOISE = range(7)
"""What random numbers are for: the second of the keys of ``seeded``."""
CLOCKS = ("train_runtime", "train_cpu_runtime")
"""Entries of the log: seconds of training by the clock and by the processor."""


def seeded(seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a function of the seed and the keys (any number of non-negative integers)."""
    return torch.Generator(device).manual_seed(_mixed(seed, *keys))


def _mixed(seed: int, *keys: int) -> int:
    # numpy takes trailing zeros for nothing: the number of keys tells (1,) from (1, 0)
    return int(np.random.SeedSequence([seed, len(keys), *keys]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def new_accelerator(config: ImageTrainingConfig) -> Accelerator:
    """An ``Accelerator`` of the configured precision, also where an earlier stage of this process used another."""
    AcceleratorState._reset_state()
    precision = choose_precision(config.precision)
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )


class Clock:
    """Time that training took, from ``start`` to ``stop``, by the clock and by the processor (of all threads).

    Args:
        train_runtime: seconds by the clock, so far.
        train_cpu_runtime: seconds of processor time of this process, so far.
    """

    def __init__(self, train_runtime: float = 0.0, train_cpu_runtime: float = 0.0):
        self._sums = [train_runtime, train_cpu_runtime]

    def start(self) -> None:
        self._since = [time.monotonic(), time.process_time()]

    def stop(self) -> None:
        now = [time.monotonic(), time.process_time()]
        self._sums = [total + end - begin for total, end, begin in zip(self._sums, now, self._since, strict=True)]

    def read(self) -> dict[str, float]:
        """The two sums by name; what ran since the last ``start`` is not in them."""
        return {name: round(value, 3) for name, value in zip(CLOCKS, self._sums, strict=True)}


class Loop:
    """Trains a method; ``run`` goes on from the newest whole checkpoint below ``config.output_dir``.

    Args:
        method: what is trained. Its parts are moved to the accelerator's device.
        train: training images.
        test: images on which the bounds are watched while it trains (nothing is chosen by them).
        config: of the stage.
        accelerator: see ``new_accelerator``.
        steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        method: Method,
        train: Images,
        test: Images,
        config: ImageTrainingConfig,
        accelerator: Accelerator,
        steps: int,
    ):
        self.method, self.config, self.accelerator, self.steps = method, config, accelerator, steps
        self.device = accelerator.device
        self.images, self.test = train.to(self.device), test.to(self.device)
        for part in method.parts.values():
            part.to(self.device)
        self.rows = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        self.steps_per_epoch = len(train) // self.rows
        self.optimizers = method.optimizers()
        if accelerator.scaler is not None:  # Accelerate's wrapper scales; without a scaler it would only cost time
            self.optimizers = {name: accelerator.prepare_optimizer(own) for name, own in self.optimizers.items()}
        warmup = round(config.warmup_ratio * steps)
        self.schedulers = {
            phase: get_scheduler(config.lr_scheduler, getattr(optimizer, "optimizer", optimizer), warmup, steps)
            for phase, optimizer in self.optimizers.items()
        }
        self.averages = {
            name: EMAModel(method.parts[name].parameters(), decay=config.ema_decay, foreach=True)
            for name in (method.averaged if config.ema_decay else ())
        }
        self._trained = Trained(method.parts, self.optimizers, self.schedulers, self.averages, accelerator.scaler)
        self.step, self.log, self._clock = 0, [], Clock()
        self._order: tuple[int, Tensor] | None = None

    # ---------------------------------------------------------------------------------------------------------- batches

    def _batches(self) -> list[tuple[slice, Batch]]:
        """This process's parts of the step's batch, with their places in it."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.images), generator=seeded(self.config.seed, ORDER, epoch))
            self._order = epoch, order.to(self.device)
        rows = self._order[1][place * self.rows : (place + 1) * self.rows]
        size, world = self.config.batch_size, self.accelerator.num_processes
        starts = [(part * world + self.accelerator.process_index) * size for part in range(self.rows // size // world)]
        parts = [slice(start, start + size) for start in starts]
        return [(part, self.images.batch(rows[part], self._draws(part, PIXELS), self.config)) for part in parts]

    def _draws(self, part: slice, *keys: int) -> Draws:
        return Draws(
            seeded(self.config.seed, *keys, self.step, device=self.device), self.rows, start=part.start, stop=part.stop
        )

    # ------------------------------------------------------------------------------------------------------------ steps

    def _phase(self, number: int, batches: list[tuple[slice, Batch]]) -> dict[str, Tensor]:
        """One optimizer step of one part; returns what is to be logged."""
        phase = self.method.phases[number]
        optimizer, sums = self.optimizers[phase], {}
        if len(self.method.parts) > 1:
            for name, part in self.method.parts.items():
                part.requires_grad_(name == phase)
        optimizer.zero_grad()
        for part, batch in batches:
            with self.accelerator.autocast():
                loss, logs = self.method.loss(phase, batch, self._draws(part, NOISE, number), self.step)
            self.accelerator.backward(loss / len(batches))
            name = "loss" if len(self.method.phases) == 1 else f"{phase}_loss"
            for key, value in ({name: loss.detach()} | logs).items():
                sums[key] = sums.get(key, 0.0) + value.float() / len(batches)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._share_gradients(parameters)
        if self.config.max_grad_norm:
            self.accelerator.unscale_gradients(optimizer)
            nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        self.schedulers[phase].step()
        if phase in self.averages:
            self.averages[phase].step(self.method.parts[phase].parameters())
        return sums

    def _share_gradients(self, parameters: list[Tensor]) -> None:
        if self.accelerator.num_processes == 1:
            return
        flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter.grad))

    def run(self) -> list[dict[str, Any]]:
        """Train to the end and leave the averaged weights, where there are any, in the parts.

        Returns:
            The log without what depends on the clock: entries with ``step``, ``epoch``, ``learning_rate``, ``loss`` (of
            several phases ``PHASE_loss``), the method's own figures, each a mean over ``logging_steps`` steps; and
            entries with ``eval_NAME``.

        Raises:
            UserError: a loss that is not finite; a checkpoint that cannot be gone on from.
        """
        self._resume()
        main = self.accelerator.is_main_process
        if self.config.report_to != "none":
            name = LOGS if self.config.report_to == "tensorboard" else PROJECT
            given = {self.config.report_to: {"name": run_name(self.config.output_dir)}}
            self.accelerator.init_trackers(name, init_kwargs={} if name == LOGS else given)
        sums: dict[str, Tensor] = {}
        self._train_mode(True)
        self._clock.start()
        for _ in tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, disable=not main):
            self._seed_dropout()
            batches = self._batches()
            for number in range(len(self.method.phases)):
                for key, value in self._phase(number, batches).items():
                    sums[key] = sums.get(key, 0.0) + value
            self.step += 1
            last = self.step == self.steps
            if self.step % self.config.logging_steps == 0 or last:
                self._clock.stop()
                self._write_log(sums)
                sums = {}
                self._clock.start()
            watch = [every and self.step % every == 0 for every in (self.config.sample_steps, self.config.eval_steps)]
            save = self.step % self.config.save_steps == 0 or last
            if save or any(watch):
                self._clock.stop()
                self._watch(*watch)
                if save:
                    self._save()
                self._clock.start()
        if self.config.report_to != "none":
            self.accelerator.end_training()
        for name, average in self.averages.items():
            average.copy_to(self.method.parts[name].parameters())
        self._train_mode(False)
        for part in self.method.parts.values():
            part.requires_grad_(True)
        return clean_history(self.log)

    def _seed_dropout(self) -> None:
        """Seed torch's global generators (``torch.manual_seed`` takes a millisecond for devices there are not)."""
        seed = _mixed(self.config.seed, DROPOUT, self.step, self.accelerator.process_index)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _train_mode(self, on: bool) -> None:
        for part in self.method.parts.values():
            part.train(on)

    def _write_log(self, sums: dict[str, Tensor]) -> None:
        count = (self.step - 1) % self.config.logging_steps + 1
        values = torch.stack([torch.as_tensor(value, device=self.device) for value in sums.values()]) / count
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        entry = dict(zip(sums, values.tolist(), strict=True))
        for name, value in entry.items():
            if name.endswith("loss"):
                check_finite(value, name, self.step, self.config.learning_rate)
        rates = {
            "learning_rate" if len(self.schedulers) == 1 else f"{phase}_learning_rate": scheduler.get_last_lr()[0]
            for phase, scheduler in self.schedulers.items()
        }
        self._note(entry | rates)

    def _note(self, entry: dict[str, float]) -> None:
        place = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        self.log.append(entry | place | self._clock.read())
        if self.config.report_to != "none":
            counted = {"epoch": place["epoch"]} | (
                {} if self.config.report_to == "tensorboard" else {"global_step": self.step}
            )
            self.accelerator.log(named(entry | counted), step=self.step)

    # -------------------------------------------------------------------------------------------- pictures and measures

    @contextlib.contextmanager
    def _as_sampled(self) -> Iterator[None]:
        """The parts as they are sampled from: averaged weights, evaluation mode."""
        for name, average in self.averages.items():
            average.store(self.method.parts[name].parameters())
            average.copy_to(self.method.parts[name].parameters())
        self._train_mode(False)
        try:
            yield
        finally:
            for name, average in self.averages.items():
                average.restore(self.method.parts[name].parameters())
            self._train_mode(True)

    def _watch(self, sample: bool, evaluate: bool) -> None:
        if not (sample or evaluate):
            return
        with self._as_sampled():
            if evaluate:
                found = measure(self.method, self.test, self.config, self.accelerator)
                self._note({f"eval_{name}": float(values.mean()) for name, values in found.items()})
            if sample and self.accelerator.is_main_process:
                # The same noise every time: the pictures show one set of samples as it takes shape.
                generator = seeded(self.config.seed, SAMPLES, device=self.device)
                images = self.method.sample(50, generator).reshape(5, 10, *self.images.images.shape[1:])
                save_grid(images, Path(self.config.output_dir) / "samples" / f"step-{self.step:07d}.png")
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        folder = checkpoint_folder(Path(self.config.output_dir) / CHECKPOINTS, self.step)
        if self.accelerator.is_main_process:
            plain = {"step": self.step, "clock": self._clock.read(), "log": self.log}
            write_state(folder, self._trained, plain)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            mark_whole(folder)
            whole = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in whole[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        checkpoint = last_checkpoint(self.config)
        if checkpoint is not None:
            plain = read_state(Path(checkpoint), self._trained)
            self.step, self.log, self._clock = plain["step"], plain["log"], Clock(**plain["clock"])


@torch.no_grad()
def measure(
    method: Method, images: Images, config: ImageTrainingConfig, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """What ``method.evaluate`` says of each image, the work shared out over the processes.

    Pixels and noise of an image are functions of the seed, its place and ``eval_batch_size``, not of the processes.

    Args:
        method: its parts in evaluation mode.
        images: on the accelerator's device.
        config: binarization, ``eval_batch_size``, precision.
        accelerator: of the stage.

    Returns:
        measure -> (N,), float64. Empty where the method has no such measures.
    """
    size, found = config.eval_batch_size, {}
    world, rank = accelerator.num_processes, accelerator.process_index
    starts = range(0, len(images), size)
    # A process without a block of its own still has to know the measures' names: it does the first once more.
    for number in list(range(len(starts)))[rank::world] or [0]:
        rows = slice(starts[number], min(starts[number] + size, len(images)))
        pixels = Draws(seeded(config.seed, TEST_PIXELS, number, device=accelerator.device), rows.stop - rows.start)
        noise = Draws(seeded(config.seed, TEST_NOISE, number, device=accelerator.device), rows.stop - rows.start)
        with accelerator.autocast():
            values = method.evaluate(images.batch(rows, pixels, config), noise)
        for name, value in values.items():
            whole = found.setdefault(name, torch.zeros(len(images), dtype=torch.float64, device=accelerator.device))
            if number % world == rank:
                whole[rows] = value.double()
    if world > 1:
        found = {name: accelerator.reduce(values, "sum") for name, values in found.items()}
    return {name: values.cpu().numpy() for name, values in found.items()}
