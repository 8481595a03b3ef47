"""Sampling saved pipelines in blocks, and measuring the samples beside real images."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.errors import UserError
from pipelines.images.classifier_network import ImageClassifier
from pipelines.images.data import Images, ImageSet, load_images
from pipelines.images.measure import TRAINING, MeasureConfig, stage_config
from pipelines.images.measure_math import (
    class_coverage,
    class_entropy,
    copies,
    frechet_distance,
    nearest,
    precision_and_recall,
)
from pipelines.images.measure_pictures import IN_STEPS, draw, save_animation
from pipelines.images.method import Draws
from pipelines.images.pictures import save_grid
from pipelines.images.saved import family_of, load_pipeline
from pipelines.images.seeds import SAMPLES, TEST_PIXELS, seeded
from pipelines.images.training import SAMPLE_GRID
from pipelines.precision import choose_precision
from pipelines.seq2seq.metrics import with_interval
from pipelines.stage import CHECKPOINTS, read_stage, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BOUNDS = {"vae": ("importance_weighted", "negative_elbo"), "bitflip": ("bound",)}
"""Family -> the metrics of its stage that bound the negative log-likelihood from above, in nats, the tightest first."""

_NEAREST = 20  # shown beside their training image
_KEY = 2  # of the random numbers of SAMPLES that are drawn here; training draws with other keys


class Sampler:
    """Draws a pipeline's samples in blocks; a finished block is kept until the stage is finished.

    Args:
        config: of the stage.
        name: of the system.
        folders: its pipelines.
    """

    def __init__(self, config: MeasureConfig, name: str, folders: list[str]):
        self.config, self.name, self.folders = config, name, folders
        self.state = PartialState()
        precision = choose_precision(config.precision)
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.autocast = torch.autocast(
            self.state.device.type, dtype=kinds.get(precision, torch.bfloat16), enabled=precision in kinds
        )

    def pipeline(self, number: int) -> DiffusionPipeline:
        """The system's ``number``-th pipeline, on this process's device."""
        made = load_pipeline(self.folders[number], f"systems.{self.name}").to(self.state.device)
        made.set_progress_bar_config(disable=True)
        return made

    def samples(self, number: int) -> tuple[Tensor, float]:
        """The samples of the ``number``-th pipeline, (n, C, H, W) uint8, and the seconds that each took."""
        folder = Path(self.config.output_dir) / CHECKPOINTS / f"{self.name}-{number}"
        size, count = self.config.sampling_batch, self.config.samples
        blocks = [(block, min(size, count - start)) for block, start in enumerate(range(0, count, size))]
        mine = blocks[self.state.process_index :: self.state.num_processes]
        open_blocks = [(block, rows) for block, rows in mine if not (folder / f"{block:06d}.safetensors").exists()]
        pipeline = self.pipeline(number) if open_blocks else None
        folder.mkdir(parents=True, exist_ok=True)
        shown = f"samples of {self.name}" + f" {number + 1}" * (len(self.folders) > 1)
        for block, rows in tqdm(open_blocks, shown, unit="block", disable=not self.state.is_main_process):
            self._block(pipeline, number, block, rows, folder / f"{block:06d}.safetensors")
        self.state.wait_for_everyone()
        parts, seconds = [], 0.0
        for block, _ in blocks:
            with safe_open(folder / f"{block:06d}.safetensors", "pt") as file:
                parts.append(file.get_tensor("images"))
                seconds += float(file.metadata()["seconds"])
        return torch.cat(parts), seconds / count

    def _block(self, pipeline: DiffusionPipeline, number: int, block: int, rows: int, file: Path) -> None:
        generator = seeded(self.config.seed, SAMPLES, _KEY, number, block, device=self.state.device)
        start = time.perf_counter()
        with torch.no_grad(), self.autocast:
            images = draw(pipeline, stage_config(self.folders[number]), rows, generator)
        levels = images.float().clamp(0, 1).mul(255).round().byte().cpu()
        seconds = time.perf_counter() - start
        temporary = file.with_name(f".{file.name}")
        save_file({"images": levels.contiguous()}, temporary, {"seconds": repr(seconds)})
        temporary.replace(file)


@dataclasses.dataclass
class Judge:
    """Real images in one representation, and what samples are measured against.

    Args:
        config: of the stage.
        images: training and held-out images.
        binarize: how everything is represented (``none``: grey levels).
        classifier: whose features are taken; None for no features.
    """

    config: MeasureConfig
    images: ImageSet
    binarize: str
    classifier: ImageClassifier | None

    def __post_init__(self) -> None:
        self.device = PartialState().device
        self.training = self.images.train.images.float() / 255
        self.held_out = self.represented(self.images.test, 0)
        if self.classifier is not None:
            self.features, _ = self.classifier.features_and_probabilities(self.held_out)

    @functools.cached_property
    def held_out_distances(self) -> Tensor:
        """(m,) distance of each held-out image to its nearest training image."""
        return nearest(self.held_out, self.training)[0]

    def represented(self, images: Images, key: int) -> Tensor:
        """Images as they are compared, (n, C, H, W) float32 in [0, 1]; ``key`` tells their random numbers apart."""
        draws = Draws(seeded(self.config.seed, TEST_PIXELS, _KEY, key), len(images))
        fields = dataclasses.replace(self.config, binarize=self.binarize)
        return images.batch(slice(0, len(images)), draws, fields).images

    def features_of(self, images: Tensor) -> dict[str, Any]:
        """What the classifier's features and probabilities say: arrays of a value for each image, or numbers."""
        if self.classifier is None:
            return {}
        features, probabilities = self.classifier.features_and_probabilities(images)
        # equally many on both sides: the balls grow as vectors get fewer
        count = min(len(features), len(self.features))
        precision, recall = precision_and_recall(
            self.features[:count], features[:count], neighbours=self.config.neighbours
        )
        found: dict[str, Any] = {
            "frechet_distance": frechet_distance(features, self.features),
            "precision": precision.cpu().numpy(),
            "recall": recall.cpu().numpy(),
        }
        if self.classifier.config.task != "labels":
            return found
        return found | {
            "confidence": probabilities.max(1).values.double().cpu().numpy(),
            "class_coverage": class_coverage(probabilities),
            "class_entropy": class_entropy(probabilities),
        }

    def memory_of(self, images: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Measures of memorization, and the distances and places that they come from (see ``nearest``)."""
        found, places = nearest(images, self.training)
        reference = float(self.held_out_distances.median())
        measures = {
            "nearest_distance": found.double().numpy(),
            "nearest_ratio": float(found.median()) / reference if reference else 0.0,
            "copies": copies(found, self.held_out_distances).numpy(),
        }
        return measures, found, places


def representation(config: MeasureConfig, colours: int) -> str:
    """How images are made alike before they are compared.

    Args:
        config: of the stage.
        colours: channels of the images.

    Raises:
        UserError: the systems were trained on different kinds of binary images and the configuration does not choose.
    """
    if config.binarize != "auto":
        return config.binarize
    kinds = {stage_config(f).get("binarize", "none") for folders in config.folders().values() for f in folders}
    kinds -= {"none"}
    if len(kinds) > 1:
        problem = f"systems were trained on images binarized in different ways ({', '.join(sorted(kinds))})"
        raise UserError("binarize", "auto", problem, "give the one to compare them by")
    return kinds.pop() if kinds and colours == 1 else "none"


def bound_of(folder: str) -> float | None:
    """The tightest bound on the negative log-likelihood that a pipeline's stage measured, in nats an image."""
    record = read_stage(Path(folder).expanduser())
    family = family_of(folder)
    for name in BOUNDS.get(family, ()) if record else ():
        if f"{family}/{name}" in record["metrics"]:
            return record["metrics"][f"{family}/{name}"]
    return None


def merged(name: str, several: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of a system from what was measured of each of its pipelines.

    Args:
        name: of the system.
        several: measure -> array of a value for each image, or a number.

    Returns:
        Of one pipeline the numbers, and means with their intervals; of several the means over the pipelines with their
        standard errors (``_se``).
    """
    found: dict[str, float] = {}
    for measure in several[0]:
        values = [one[measure] for one in several if measure in one]
        if len(several) == 1 and isinstance(values[0], np.ndarray):
            found |= with_interval(f"{name}/{measure}", values[0])
            continue
        means = np.array([float(np.mean(value)) for value in values])
        found[f"{name}/{measure}"] = float(means.mean())
        if len(means) > 1:
            found[f"{name}/{measure}_se"] = float(means.std(ddof=1) / len(means) ** 0.5)
    return found


def measure_all(config: MeasureConfig) -> dict[str, float]:
    """See ``measure.measure``."""
    state, folder = PartialState(), Path(config.output_dir)
    images = load_images(config)
    classifier = None
    if config.classifier is not None:
        classifier = _classifier(config, images).to(state.device)
    binarize = representation(config, images.shape[0])
    judge = Judge(config, images, binarize, classifier)
    grey = Judge(config, images, "none", classifier) if binarize != "none" and classifier is not None else None
    metrics: dict[str, float] = {
        "measure/samples": float(config.samples),
        "measure/test_examples": float(len(images.test)),
        "measure/held_out_distance": float(judge.held_out_distances.median()),
    }
    count = min(config.samples, len(images.train))
    metrics |= merged(TRAINING, [judge.features_of(judge.represented(images.train.subset(count, config.seed), 1))])
    seconds: dict[str, float] = {}
    for place, (name, folders) in enumerate(config.folders().items()):
        sampler, several, times = Sampler(config, name, folders), [], []
        for number, one in enumerate(folders):
            levels, took = sampler.samples(number)
            _check_shape(levels, images, f"systems.{name}", one)
            drawn = Images(levels, torch.zeros(len(levels), dtype=torch.int64))
            found = judge.represented(drawn, 2 + place)
            measures, distances, places = judge.memory_of(found)
            measures = judge.features_of(found) | measures
            if grey is not None and _knows_grey(one, levels):
                features = grey.features_of(grey.represented(drawn, 0))
                measures["grey_frechet_distance"] = features["frechet_distance"]
            bound = bound_of(one)
            several.append(measures | ({} if bound is None else {"bound": bound}))
            times.append(took)
            if number == 0 and state.is_main_process:
                _draw(config, sampler, drawn, distances, places, judge)
        metrics |= merged(name, several)
        seconds[name] = float(np.mean(times))
    if state.is_main_process:
        settings = {"binarize": binarize, "samples": config.samples, "neighbours": config.neighbours}
        settings |= {"families": {name: family_of(given[0]) for name, given in config.folders().items()}}
        write_json(folder / "settings.json", settings)
        write_json(folder / "timing.json", {"seconds_a_sample": seconds})
    state.wait_for_everyone()
    return metrics


def _knows_grey(folder: str, levels: Tensor) -> bool:
    """Whether a pipeline draws grey levels that are meant to be those of the data (or their expectation)."""
    return stage_config(folder).get("binarize") != "threshold" and bool(((levels > 0) & (levels < 255)).any())


def _classifier(config: MeasureConfig, images: ImageSet) -> ImageClassifier:
    found = ImageClassifier.from_pretrained(str(Path(config.classifier).expanduser())).eval()
    channels, side, _ = images.shape
    theirs = (found.config.channels, found.config.sample_size)
    if theirs != (channels, side):
        problem = f"knows images of {theirs[1]} pixels and {theirs[0]} channels, not {side} and {channels}"
        raise UserError("classifier", config.classifier, problem, "give one of these images")
    return found


def _check_shape(levels: Tensor, images: ImageSet, field: str, folder: str) -> None:
    if tuple(levels.shape[1:]) != images.shape:
        problem = f"draws images of the shape {tuple(levels.shape[1:])}, the data's is {images.shape}"
        raise UserError(field, folder, problem, "give the data it was trained on")


def _draw(
    config: MeasureConfig, sampler: Sampler, drawn: Images, distances: Tensor, places: Tensor, judge: Judge
) -> None:
    folder, name = Path(config.output_dir), sampler.name
    rows, columns = SAMPLE_GRID
    shown = drawn.images[: rows * columns].float() / 255
    save_grid(shown.unflatten(0, (rows, columns)), folder / f"{name}.png")
    closest = distances.topk(min(_NEAREST, len(distances)), largest=False).indices
    pairs = torch.stack([drawn.images[closest].float() / 255, judge.training[places[closest]]])
    save_grid(pairs, folder / f"{name}_nearest.png")
    (folder / "samples").mkdir(exist_ok=True)
    save_file({"images": drawn.images}, folder / "samples" / f"{name}.safetensors")
    pipeline = sampler.pipeline(0)
    if isinstance(pipeline, IN_STEPS):
        generator = seeded(config.seed, SAMPLES, _KEY + 1, device=sampler.state.device)
        with torch.no_grad(), sampler.autocast:
            settings = stage_config(sampler.folders[0])
            save_animation(pipeline, settings, generator, folder / f"{name}_denoising.png")
