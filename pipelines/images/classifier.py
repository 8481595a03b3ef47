"""A small classifier of the images, trained on the same training set as the generative models that it judges.

It stands in the chain before them: the runner keeps it as long as its fingerprint (data, fields, versions) is the same.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.training import ImageTrainingConfig, run_method


@config
class ClassifierConfig(ImageTrainingConfig):
    """Train the classifier whose features and probabilities the measures are taken in."""

    family: ClassVar[str] = "classifier"

    output_dir: str = Field("runs/classifier", description="folder the stage writes into", json_schema_extra=INERT)
    binarize: Literal["none"] = Field("none", description="it is given grey levels; see binarized_share")
    task: Literal["auto", "labels", "rotations"] = Field(
        "auto",
        description="what it learns: the data's labels; by how many quarter turns an image was turned; auto: labels "
        "where there are any",
    )
    binarized_share: float = Field(
        0.5, ge=0, le=1, description="share of the images drawn in black and white, so that it knows binary samples too"
    )
    binarized_as: Literal["bernoulli", "threshold"] = Field(
        "bernoulli",
        description="how those are drawn: each pixel white with the probability that its grey level is, or"
        " from `threshold` on",
    )
    width: int = Field(32, ge=1, description="channels of its first convolution")
    features: int = Field(64, ge=2, description="values before the last layer, which images are compared by")
    dropout: float = Field(0.25, ge=0, lt=1, description="share of values dropped before its last two layers")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="exponential moving average of the weights; 0: none")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="how the learning rate falls after the warm-up"
    )

    def problems(self) -> list[Problem]:
        found = super().problems()
        for name in ("model", "sample_steps"):
            value = getattr(self, name)
            if value is not None:
                found.append(Problem(name, value, "a classifier is no pipeline that samples", "leave it out"))
        return found


def classifier(config: ClassifierConfig) -> dict[str, float]:
    """Train the classifier and save it as an ``ImageClassifier`` (a diffusers model).

    Returns:
        ``classifier/accuracy``, ``classifier/binary_accuracy`` and ``classifier/loss`` on the test set, and what
        ``run_method`` counts.

    Raises:
        UserError: task=labels and images without any; see ``run_method``.
    """
    from pipelines.images.classifier_network import ClassifierMethod, save_classifier

    return run_method(config, ClassifierMethod, save_classifier)
