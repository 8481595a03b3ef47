"""What the four image stages share: their fields, and the way from images to a saved and measured pipeline.

A stage is one line, ``return run_method(config, build)``, with ``build(config, images) -> Method``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipelines.config import Source, config
from pipelines.errors import Problem, problems_of
from pipelines.images.data import ImageFields
from pipelines.training import LoopConfig, global_batch, write_history

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipelines.images.data import Images, ImageSet
    from pipelines.images.loop import Loop
    from pipelines.images.method import Batch, Method

SAMPLE_GRID = (10, 20)
"""Rows and columns of ``samples.png``."""


@config
class ImageTrainingConfig(ImageFields, LoopConfig):
    """Images, optimization, averages of weights, samples and checkpoints of a generative model of images."""

    family: ClassVar[str]
    """Which family (see ``saved.PIPELINES``) the stage makes; each stage's configuration says it."""

    model: Source | None = Field(
        None, description="folder of a saved pipeline of this family whose weights training starts from; null: random"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "constant", description="how the learning rate falls after the warm-up"
    )
    epochs: float = Field(20.0, gt=0, description="passes over the training set")
    batch_size: int = Field(100, ge=1, description="images a device takes in one forward pass")
    eval_batch_size: int = Field(
        500, ge=1, description="test images a device takes in one pass; what is drawn for an image depends on it"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="exponential moving average of the weights, which is what is saved, sampled and measured; it "
        "rises to this decay as (1 + step)/(10 + step); 0: none",
    )
    save_steps: int = Field(500, ge=1, description="steps between two checkpoints (a multiple of logging_steps)")
    sample_steps: int | None = Field(None, ge=1, description="steps between two pictures of samples; null: none")
    eval_steps: int | None = Field(
        None, ge=1, description="steps between two measurements on test images while it trains; null: none"
    )
    eval_images: int = Field(1000, ge=1, description="how many test images those measurements take")

    def problems(self) -> list[Problem]:
        from pipelines.images.saved import check_family

        found = super().problems()
        # ${stage} is looked at when that stage has made it
        if self.model is not None and not self.model.startswith("${") and not found:
            found += problems_of(partial(check_family, self.model, "model", self.family))
        return found


def adam(
    parameters: Any, config: ImageTrainingConfig, *, learning_rate: float | None = None, betas=(0.9, 0.999)
) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay where the configuration has some (Loshchilov and Hutter 2019).

    Args:
        parameters: of one part.
        config: learning rate and weight decay.
        learning_rate: another peak than the configured one.
        betas: decay of the two moments.
    """
    import torch

    rate = config.learning_rate if learning_rate is None else learning_rate
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=config.weight_decay, fused=True)


def run_method(
    config: ImageTrainingConfig,
    build: Callable[[Any, ImageSet], Method],
    save: Callable[[Loop, list[dict[str, Any]], Batch, int], None] | None = None,
) -> dict[str, float]:
    """Load images, build a method, train it, measure it, draw it and save its pipeline into ``output_dir``.

    The folder is then that of a diffusers pipeline, with ``log_history.json``, ``timing.json`` (seconds of training by
    step, by the clock and by the processor, measuring and drawing left out), ``samples.png`` (10×20; a class a row,
    where the model is conditional), the method's own pictures and ``samples/`` (while it trained) beside it.

    Args:
        config: of the stage.
        build: makes the method, its parts initialized from torch's global generator, which is seeded before.
        save: writes another folder than that: of the trained loop, its log, some test images and how many classes.

    Returns:
        ``NAME/MEASURE`` for each measure of ``method.evaluate``: mean over the test set, with ``_se`` (standard error)
        over the images) and a bootstrap interval; ``NAME/MEASURE_monte_carlo_error`` for those that are estimates (the
        standard error of the mean over these very images); ``NAME/train_loss`` (mean over the last logged steps; of
        several phases ``NAME/train_PHASE_loss``), ``NAME/steps``, ``NAME/train_examples``, ``NAME/test_examples`` and
        ``NAME/parameters``.

    Raises:
        UserError: unusable images or settings; a loss that is not finite.
    """
    import torch

    from pipelines.images.data import load_images
    from pipelines.images.evaluation import measure, monte_carlo_errors
    from pipelines.images.loop import Loop, new_accelerator
    from pipelines.images.saved import load_parts

    accelerator = new_accelerator(config)
    with accelerator.main_process_first():
        images = load_images(config)
    steps = steps_of(config, len(images.train))
    torch.manual_seed(config.seed)
    method = build(config, images)
    if config.model is not None:
        load_parts(method.parts, config.model)
    watched = images.test.subset(config.eval_images, config.split_seed)
    loop = Loop(method, images.train, watched, config, accelerator, steps)
    history = loop.run()
    test = images.test.to(accelerator.device)
    measures = measure(method, test, config, accelerator)
    errors = monte_carlo_errors(method, test, config, accelerator, measures)
    if accelerator.is_main_process:
        with torch.no_grad(), accelerator.autocast():
            (save or _save)(loop, history, shown_images(test, config), len(images.classes))
    accelerator.wait_for_everyone()
    counts = {"steps": steps, "train_examples": len(images.train), "test_examples": len(images.test)}
    counts["parameters"] = sum(p.numel() for part in method.parts.values() for p in part.parameters())
    trained = [
        {k: v for k, v in entry.items() if k.endswith("loss") and not k.startswith("eval_")} for entry in history
    ]
    losses = [entry for entry in trained if entry][-1]
    found = {f"train_{name}": value for name, value in losses.items()} | {k: float(v) for k, v in counts.items()}
    found |= {f"{name}_monte_carlo_error": value for name, value in errors.items()}
    return {f"{method.name}/{name}": value for name, value in found.items()} | _means(method.name, measures)


def steps_of(config: ImageTrainingConfig, examples: int) -> int:
    """Optimizer steps of a run on so many images.

    Raises:
        UserError: fewer images than one step takes.
    """
    rows = global_batch(config, examples, noun="images")
    return config.max_steps if config.max_steps > 0 else max(1, math.ceil(config.epochs * (examples // rows)))


def shown_images(test: Images, config: ImageTrainingConfig) -> Batch:
    """The held-out images that pictures are made of, on the device of ``test``."""
    from pipelines.images.method import Draws
    from pipelines.images.seeds import TEST_PIXELS, seeded

    count = min(len(test), SAMPLE_GRID[1])
    draws = Draws(seeded(config.seed, TEST_PIXELS, device=test.images.device), count)
    return test.batch(slice(0, count), draws, config)


def _save(loop: Loop, history: list[dict[str, Any]], shown: Batch, classes: int) -> None:
    import torch

    from pipelines.images.pictures import save_grid
    from pipelines.images.seeds import SAMPLES, seeded
    from pipelines.images.training_log import CLOCKS
    from pipelines.stage import write_json

    method, folder = loop.method, Path(loop.config.output_dir)
    write_history(history, folder)
    write_json(folder / "timing.json", [{key: entry[key] for key in ("step", *CLOCKS)} for entry in loop.log.entries])
    rows, columns = SAMPLE_GRID
    labels = torch.arange(rows, device=loop.device).repeat_interleave(columns) % classes  # a class a row
    generator = seeded(loop.config.seed, SAMPLES, 1, device=loop.device)
    save_grid(method.sample(len(labels), generator, labels).unflatten(0, SAMPLE_GRID), folder / "samples.png")
    for name, picture in method.pictures(shown, generator):
        save_grid(picture, folder / f"{name}.png")
    method.pipeline().save_pretrained(folder)


def _means(name: str, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean, standard error and interval of each measure."""
    from pipelines.seq2seq.metrics import with_interval

    found: dict[str, float] = {}
    for measure, values in measures.items():
        found |= with_interval(f"{name}/{measure}", values)
        found[f"{name}/{measure}_se"] = float(values.std(ddof=1) / len(values) ** 0.5)
    return found
