"""Bit-flip diffusion of binary images as a stage (Sohl-Dickstein et al. 2015; Austin et al. 2021)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.training import run_method
from pipelines.images.unet import DiffusionTraining, UNetFields


@config
class BitFlipConfig(UNetFields, DiffusionTraining):
    """Train a bit-flip diffusion."""

    family: ClassVar[str] = "bitflip"

    output_dir: str = Field("runs/bitflip", description="folder the stage writes into", json_schema_extra=INERT)
    binarize: Literal["bernoulli", "threshold"] = Field(
        "bernoulli",
        description="bernoulli: each pixel is 1 with the probability that its grey level is, drawn afresh each time "
        "the image is seen; threshold: 1 from `threshold` on",
    )
    patch_size: int = Field(
        2, ge=1, description="side of the squares of pixels that the network sees as channels of one place"
    )
    timesteps: int = Field(50, ge=1, description="stages of the noise, T")
    delta_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="cosine: a pixel is untouched after t stages with probability cos(πt/2T); linear: its probability "
        "to flip goes from delta_start to delta_end; constant: it is delta_start at each stage",
    )
    delta_start: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="linear, constant: probability to flip at the first stage; null for what leaves 1 % untouched",
    )
    delta_end: float | None = Field(None, gt=0, lt=0.5, description="linear: probability to flip at the last stage")
    prediction: Literal["original", "previous"] = Field(
        "original",
        description="what the network predicts: the image (and mixes the two posteriors), or the stage before",
    )
    add_evidence: bool = Field(
        True, description="add to the network's log-odds of a pixel what its noisy value itself says of it"
    )
    loss: Literal["bound", "cross_entropy", "both"] = Field(
        "both",
        description="bound: KL(P(Y_{t-1}|Y_t,Y_0) || Q_t(Y_t)), t uniform; cross_entropy: of the image, t uniform; "
        "both: their sum",
    )
    cross_entropy_weight: float = Field(1.0, gt=0, description="loss=both: weight of the cross-entropy")
    bound_stages: int | None = Field(
        10,
        ge=1,
        description="stages drawn for a test image to estimate its bound without bias (bound_monte_carlo_error says "
        "what that costs); null sums over all",
    )
    inference_steps: int | None = Field(
        None, ge=1, description="steps of sampling, at most timesteps; null takes one a stage"
    )

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.inference_steps is not None and self.inference_steps > self.timesteps:
            mend = f"give at most timesteps={self.timesteps}"
            found.append(Problem("inference_steps", self.inference_steps, "there are not so many stages", mend))
        if self.prediction == "previous" and self.loss != "bound":
            mend = "give loss=bound, or prediction=original"
            found.append(Problem("loss", self.loss, "cross-entropy is the image's, which is not predicted", mend))
        return found + self._delta_problems()

    def _delta_problems(self) -> list[Problem]:
        given = {"delta_start": self.delta_start, "delta_end": self.delta_end}
        unused = {"cosine": ("delta_start", "delta_end"), "constant": ("delta_end",), "linear": ()}
        mend = "leave it out, or give another delta_schedule"
        found = [
            Problem(name, given[name], f"the {self.delta_schedule} schedule does not take it", mend)
            for name in unused[self.delta_schedule]
            if given[name] is not None
        ]
        missing = [name for name, value in given.items() if value is None]
        if self.delta_schedule == "linear" and len(missing) == 1:
            mend = "give both delta_start and delta_end, or neither"
            found.append(Problem(missing[0], None, "the linear schedule has two ends", mend))
        if not found and self.delta_start is not None:
            from pipelines.images.bitflip_math import flip_probabilities, keep_probabilities

            try:
                keep_probabilities(
                    flip_probabilities(self.delta_schedule, self.timesteps, self.delta_start, self.delta_end)
                )
            except ValueError as error:
                mend = "give fewer timesteps, or smaller flip probabilities"
                found.append(Problem("timesteps", self.timesteps, str(error), mend))
        return found


def bitflip(config: BitFlipConfig) -> dict[str, float]:
    """Train a bit-flip diffusion, measure its bound on the whole test set and save it as a ``BitFlipPipeline``.

    Beside the pipeline: ``samples.png`` (200 samples) and ``denoising.png`` (samples on their way from fair coins, and
    below each what the network expects of the image at that stage).

    Returns:
        ``bitflip/bound`` (nats an image; at least the negative log-likelihood), ``bitflip/bits_per_pixel``, its terms
        ``bitflip/prior_kl``, ``bitflip/transitions`` and ``bitflip/reconstruction``, each with standard error and
        interval over test images; ``bitflip/bound_monte_carlo_error``, the bound's standard error as an estimate for
        these images; and what ``run_method`` counts.

    Raises:
        UserError: see ``run_method``; images whose side the network cannot halve.
    """
    from pipelines.images.bitflip_method import BitFlipMethod

    return run_method(config, BitFlipMethod)
