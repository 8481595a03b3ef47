"""Measuring generative models of images of any family on one footing: fields and stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config
from pipelines.errors import Problem, problems_of
from pipelines.images.data import ImageFields
from pipelines.stage import identity, read_stage

TRAINING = "training_images"
"""The row of real training images, measured as though they were samples: what a perfect model would reach."""

_SPLIT = ("image_size", "colour", "test_fraction", "split_seed", "max_train")  # what decides which images are held out


@config
class MeasureConfig(ImageFields, StageConfig):
    """Measure saved pipelines by their samples and draw the samples; one table for all of them."""

    output_dir: str = Field("runs/measure", description="folder the stage writes into", json_schema_extra=INERT)
    systems: dict[str, Source | list[Source]] = Field(
        description="name -> folder of a pipeline, or several of them that differ in the seed (then: means and "
        "standard errors)"
    )
    classifier: Source | None = Field(
        None, description="folder of a classifier of these images; null leaves out what is measured in its features"
    )
    binarize: Literal["auto", "none", "bernoulli", "threshold"] = Field(
        "auto",
        description="how samples and real images are made alike before they are compared; auto: as those systems were "
        "trained that know binary images only, grey where there are none",
    )
    samples: int = Field(1000, ge=200, description="samples of each pipeline")
    sampling_batch: int = Field(
        250, ge=1, description="samples drawn at a time (a killed run does one such block again); decides the noise"
    )
    neighbours: int = Field(3, ge=1, description="k of precision and recall")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of sampling; auto takes bf16 where it is measured to be faster on this device"
    )

    def folders(self) -> dict[str, list[str]]:
        """Name -> its folders."""
        return {name: [given] if isinstance(given, str) else given for name, given in self.systems.items()}

    def problems(self) -> list[Problem]:
        found = super().problems()
        if not self.systems:
            found.append(Problem("systems", "{}", "there is nothing to measure", "give systems.NAME=FOLDER"))
        for name, folders in self.folders().items():
            if name == TRAINING or "/" in name or not name.strip():
                found.append(Problem("systems", name, "cannot be the name of a system", "choose another"))
            if not folders:
                found.append(Problem(f"systems.{name}", "[]", "names no folder", "give systems.NAME=FOLDER"))
        return found if found else self._system_problems()

    def _system_problems(self) -> list[Problem]:
        from pipelines.images.saved import family_of

        found: list[Problem] = []
        if self.classifier is not None and not self.classifier.startswith("${"):
            found += problems_of(lambda: check_classifier(self.classifier, "classifier"))
        for name, folders in self.folders().items():
            for folder in folders:
                if folder.startswith("${"):
                    continue
                field = f"systems.{name}"
                found += problems_of(lambda folder=folder, field=field: family_of(folder, field))
                found += self._split_problems(folder, field)
        return found

    def _split_problems(self, folder: str, field: str) -> list[Problem]:
        """A model trained on what is held out here cannot be measured here."""
        record = read_stage(Path(folder).expanduser())
        if record is None or "dataset" not in record.get("inputs", {}):
            return []
        theirs, mend = record["config"], "give the data it was trained on"
        if record["inputs"]["dataset"] != identity(self.dataset):
            return [Problem("dataset", self.dataset, f"{field} was trained on {theirs.get('dataset')}", mend)]
        return [
            Problem(name, getattr(self, name), f"{field} was trained with {name}={theirs[name]}", "give the same")
            for name in _SPLIT
            if name in theirs and theirs[name] != getattr(self, name)
        ]


def check_classifier(folder: str, field: str) -> None:
    """Refuse a folder that does not hold a classifier.

    Raises:
        UserError: it does not.
    """
    from pipelines.errors import UserError

    file = Path(folder).expanduser() / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != "ImageClassifier":
        raise UserError(field, folder, "holds no classifier", "give the folder that recipes/images/classifier.py made")


def measure(config: MeasureConfig) -> dict[str, float]:
    """Draw samples of every pipeline, measure them and the training images, and draw pictures of them.

    Writes for each system ``NAME.png`` (10×20 samples), ``NAME_nearest.png`` (the 20 samples that lie nearest to a
    training image, above that image), for diffusion models ``NAME_denoising.png`` (an animation) and
    ``samples/NAME.safetensors`` (uint8); and ``settings.json`` and ``timing.json`` (seconds a sample).

    Returns:
        For each system and for ``training_images``: ``NAME/frechet_distance``, ``NAME/precision``, ``NAME/recall``,
        ``NAME/confidence``, ``NAME/class_coverage``, ``NAME/class_entropy`` (with a classifier); for each system
        ``NAME/nearest_distance``, ``NAME/nearest_ratio``, ``NAME/copies``, and ``NAME/bound`` where its stage measured
        one. Where the comparison is between binary images, ``NAME/grey_frechet_distance`` of systems that draw grey
        levels. Means over samples have intervals; of several folders the mean is given with ``_se``. And
        ``measure/samples``, ``measure/test_examples``, ``measure/held_out_distance``.

    Raises:
        UserError: unusable images, pipelines or classifier.
    """
    from pipelines.images.measure_systems import measure_all

    return measure_all(config)


def stage_config(folder: str) -> dict[str, Any]:
    """The configuration of the stage that made a folder; empty where none did."""
    record = read_stage(Path(folder).expanduser())
    return record["config"] if record else {}
