"""The training loop of all image models, on Accelerate.

Everything random is a function of (seed, step, row), so there is no generator state to keep: a resumed run draws what
one never stopped would have drawn, and processes that share a batch draw what one process would have drawn for it.
Gradients are averaged by hand instead of by ``DistributedDataParallel``: a method may then use its parts as it likes
(two networks in one loss, one network twice, gradients of gradients).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from pipelines.images.averages import Averages
from pipelines.images.checkpoints import Trained, read_state, save_state
from pipelines.images.data import Images
from pipelines.images.evaluation import measure
from pipelines.images.method import Batch, Draws, Method
from pipelines.images.pictures import save_grid
from pipelines.images.seeds import NOISE, ORDER, PIXELS, SAMPLES, seed_dropout, seeded
from pipelines.images.training_log import Clock, TrainingLog
from pipelines.precision import choose_precision
from pipelines.stage import CHECKPOINTS
from pipelines.training import clean_history, last_checkpoint

if TYPE_CHECKING:
    from pipelines.images.training import ImageTrainingConfig


def new_accelerator(config: ImageTrainingConfig) -> Accelerator:
    """An ``Accelerator`` of the configured precision, also where an earlier stage of this process used another."""
    AcceleratorState._reset_state()
    precision = choose_precision(config.precision)
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )


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
        self.averages = Averages(method.parts, method.averaged if config.ema_decay else (), config.ema_decay)
        self._trained = Trained(
            method.parts, self.optimizers, self.schedulers, self.averages.models, accelerator.scaler
        )
        self.step, self.log = 0, TrainingLog(config, accelerator, self.steps_per_epoch)
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
        self.averages.step(phase)
        return {key: self._norm(value) if value.ndim else value for key, value in sums.items()}

    def _share_gradients(self, parameters: list[Tensor]) -> None:
        if self.accelerator.num_processes == 1:
            return
        flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter.grad))

    def _norm(self, vector: Tensor) -> Tensor:
        """The norm of a vector of the whole step: the mean comes first, over parts of a batch and over processes."""
        return (self.accelerator.reduce(vector, "mean") if self.accelerator.num_processes > 1 else vector).norm()

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
        self.log.open()
        self._train_mode(True)
        self.log.clock.start()
        shown = self.accelerator.is_main_process
        for _ in tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, disable=not shown):
            seed_dropout(self.config.seed, self.step, self.accelerator.process_index, device=self.device)
            batches = self._batches()
            for number in range(len(self.method.phases)):
                self.log.add(self._phase(number, batches))
            self.step += 1
            last = self.step == self.steps
            if self.step % self.config.logging_steps == 0 or last:
                self.log.clock.stop()
                self._write_log()
                self.log.clock.start()
            watch = [every and self.step % every == 0 for every in (self.config.sample_steps, self.config.eval_steps)]
            save = self.step % self.config.save_steps == 0 or last
            if save or any(watch):
                self.log.clock.stop()
                self._watch(*watch)
                if save:
                    self._save()
                self.log.clock.start()
        self.log.close()
        self.averages.copy_to_parts()
        self._train_mode(False)
        for part in self.method.parts.values():
            part.requires_grad_(True)
        return clean_history(self.log.entries)

    def _train_mode(self, on: bool) -> None:
        for part in self.method.parts.values():
            part.train(on)

    def _write_log(self) -> None:
        rates = {phase: scheduler.get_last_lr()[0] for phase, scheduler in self.schedulers.items()}
        names = ["learning_rate"] if len(rates) == 1 else [f"{phase}_learning_rate" for phase in rates]
        self.log.write(self.step, dict(zip(names, rates.values(), strict=True)))

    # -------------------------------------------------------------------------------------------- pictures and measures

    def _watch(self, sample: bool, evaluate: bool) -> None:
        if not (sample or evaluate):
            return
        self._train_mode(False)
        with self.averages.in_parts():
            if evaluate:
                found = measure(self.method, self.test, self.config, self.accelerator)
                self.log.note(self.step, {f"eval_{name}": float(values.mean()) for name, values in found.items()})
            if sample and self.accelerator.is_main_process:
                # The same noise every time: the pictures show one set of samples as it takes shape.
                generator = seeded(self.config.seed, SAMPLES, device=self.device)
                images = self.method.sample(50, generator).reshape(5, 10, *self.images.images.shape[1:])
                save_grid(images, Path(self.config.output_dir) / "samples" / f"step-{self.step:07d}.png")
        self._train_mode(True)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        plain = {"step": self.step, "clock": self.log.clock.read(), "log": self.log.entries}
        save_state(Path(self.config.output_dir) / CHECKPOINTS, self._trained, plain, self.accelerator)

    def _resume(self) -> None:
        checkpoint = last_checkpoint(self.config)
        if checkpoint is not None:
            plain = read_state(Path(checkpoint), self._trained)
            self.step, self.log.entries, self.log.clock = plain["step"], plain["log"], Clock(**plain["clock"])
