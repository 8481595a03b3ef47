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
    """

    @register_to_config
    def __init__(
        self, sample_size: int = 28, channels: int = 1, classes: int = 10, width: int = 32, features: int = 64
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
            nn.Dropout(0.25),
            nn.Linear(2 * width * side * side, features),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(0.25), nn.Linear(features, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, h, w) in [0, 1] to (n, classes) logits."""
        return self.head(self.body(2 * images - 1))

    @torch.no_grad()
    def features_and_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the measures are taken in: (n, features) and (n, classes), float32, for images in [0, 1]."""
        self.eval()
        features = torch.cat([self.body(2 * part.to(self.device) - 1) for part in images.split(_ROWS)])
        return features, self.head(features).softmax(1)


class ClassifierMethod:
    """The classifier as the training loop sees it: the part of ``Method`` that trains and measures, nothing to sample.

    Some of the images it learns from are drawn in black and white: it is to judge samples of binary and of grey models
    alike, so it has to know both.

    Args:
        config: the stage's configuration.
        images: what it learns to tell apart.

    Raises:
        UserError: if they have no labels.
    """

    name = "classifier"
    phases = ("classifier",)
    averaged = ("classifier",)

    def __init__(self, config: ClassifierConfig, images: ImageSet):
        if len(images.classes) < 2:
            mend = "give a folder with a subfolder a class, or measure without a classifier (measure.classifier=null)"
            raise UserError("dataset", config.dataset, "has no labels that a classifier could learn", mend)
        channels, side, _ = images.shape
        sizes = {"width": config.width, "features": config.features}
        network = ImageClassifier(sample_size=side, channels=channels, classes=len(images.classes), **sizes)
        self.config, self.parts = config, {"classifier": network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See ``Method.optimizers``."""
        return {"classifier": adam(self.parts["classifier"].parameters(), self.config)}

    def loss(self, phase: str, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, in nats an image."""
        binary = draws.uniform(*batch.images.shape[1:]) < batch.images
        drawn = draws.uniform(1, 1, 1) < self.config.binarized_share
        logits = self.parts["classifier"](torch.where(drawn, binary.float(), batch.images)).float()
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return cross_entropy(logits, batch.labels), {"accuracy": accuracy}

    def evaluate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Whether each image is told rightly, as it is and drawn in black and white, and its cross-entropy."""
        network, found = self.parts["classifier"], {}
        logits = network(batch.images).float()
        found["loss"] = cross_entropy(logits, batch.labels, reduction="none")
        found["accuracy"] = (logits.argmax(1) == batch.labels).float()
        if self.config.binarized_share:
            binary = (draws.uniform(*batch.images.shape[1:]) < batch.images).float()
            found["binary_accuracy"] = (network(binary).argmax(1) == batch.labels).float()
        return found


def save_classifier(loop: Loop, history: list[dict[str, Any]], shown: Batch, classes: int) -> None:
    """Write the trained network and its log into the stage's folder."""
    write_history(history, loop.config.output_dir)
    loop.method.parts["classifier"].save_pretrained(loop.config.output_dir)
