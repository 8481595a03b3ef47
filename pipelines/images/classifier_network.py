"""The small classifier whose features and probabilities the measures are taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.errors import UserError
from pipelines.images.training import adam
from pipelines.training import write_history

if TYPE_CHECKING:
    from pipelines.images.classifier import ClassifierConfig
    from pipelines.images.data import ImageSet
    from pipelines.images.loop import Loop
    from pipelines.images.method import Batch, Draws

_ROWS = 1000  # images that go through the network at a time, where only the result is wanted


class ImageClassifier(ModelMixin, ConfigMixin):
    """Three 3×3 convolutions, two of them of stride 2, then ``features`` values and the classes' logits.

    Args:
        sample_size: side of the images.
        channels: 1 for grey, 3 for colour.
        classes: how many.
        width: channels of the first convolution; the others have twice as many.
        features: values before the last layer: what images are compared by.
        dropout: share of the values before each of the last two layers that is dropped while it learns.
        task: what the classes are: the data's ``labels``, or ``rotations`` by quarter turns.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        channels: int = 1,
        classes: int = 10,
        width: int = 32,
        features: int = 64,
        dropout: float = 0.25,
        task: str = "labels",
    ):
        super().__init__()
        side = -(-sample_size // 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * side * side, features),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(features, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, h, w) in [0, 1] to (n, classes) logits."""
        return self.head(self.body(2 * images - 1))

    @torch.no_grad()
    def features_and_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the measures are taken in: (n, features) and (n, classes), float32, for images in [0, 1]."""
        self.eval()
        features = torch.cat([self.body(2 * part.to(self.device) - 1) for part in images.split(_ROWS)])
        return features, self.head(features).softmax(1)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Each image (n, c, h, h) turned by its own number of quarter turns, (n,) in 0..3."""
    every = torch.stack([images.rot90(number, (2, 3)) for number in range(4)])
    return every[turns, torch.arange(len(images), device=images.device)]


class ClassifierMethod:
    """The classifier as the training loop sees it: the part of ``Method`` that trains and measures, nothing to sample.

    Some of the images it learns from are drawn in black and white: it is to judge samples of binary and of grey models
    alike, so it has to know both. Without labels it learns to tell by how many quarter turns an image was turned, which
    takes features of what the images show (Gidaris, Singh and Komodakis 2018).

    Args:
        config: the stage's configuration.
        images: what it learns from.

    Raises:
        UserError: if it is to learn labels and there are none.
    """

    name = "classifier"
    phases = ("classifier",)
    averaged = ("classifier",)
    estimated = ()

    def __init__(self, config: ClassifierConfig, images: ImageSet):
        labelled = len(images.classes) > 1
        if config.task == "labels" and not labelled:
            mend = "give a folder with a subfolder a class, or task=rotations"
            raise UserError("dataset", config.dataset, "has no labels that a classifier could learn", mend)
        self.rotations = config.task == "rotations" or not labelled
        channels, side, _ = images.shape
        network = ImageClassifier(
            sample_size=side,
            channels=channels,
            classes=4 if self.rotations else len(images.classes),
            width=config.width,
            features=config.features,
            dropout=config.dropout,
            task="rotations" if self.rotations else "labels",
        )
        self.config, self.parts = config, {"classifier": network}

    def _task(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images and what they are to be told as."""
        if not self.rotations:
            return batch.images, batch.labels
        turns = draws.integers(0, 4)
        return quarter_turns(batch.images, turns), turns

    def _binary(self, images: Tensor, draws: Draws) -> Tensor:
        """The images in black and white, as samples of binary models will be."""
        if self.config.binarized_as == "threshold":
            return (images >= self.config.threshold).float()
        return (draws.uniform(*images.shape[1:]) < images).float()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See ``Method.optimizers``."""
        return {"classifier": adam(self.parts["classifier"].parameters(), self.config)}

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, in nats an image."""
        images, labels = self._task(batch, draws)
        binary = self._binary(images, draws)
        drawn = draws.uniform(1, 1, 1) < self.config.binarized_share
        logits = self.parts["classifier"](torch.where(drawn, binary, images)).float()
        return cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Whether each image is told rightly, as it is and drawn in black and white, and its cross-entropy."""
        network, (images, labels) = self.parts["classifier"], self._task(batch, draws)
        logits = network(images).float()
        found = {"loss": cross_entropy(logits, labels, reduction="none")}
        found["accuracy"] = (logits.argmax(1) == labels).float()
        if self.config.binarized_share:
            told = network(self._binary(images, draws)).argmax(1)
            found["binary_accuracy"] = (told == labels).float()
        return found


def save_classifier(loop: Loop, history: list[dict[str, Any]], shown: Batch, classes: int) -> None:
    """Write the trained network and its log into the stage's folder."""
    write_history(history, loop.config.output_dir)
    loop.method.parts["classifier"].save_pretrained(loop.config.output_dir)
