"""Denoising diffusion (DDPM, DDIM) as a stage: Ho et al. (2020), Song et al. (2021)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.images.training import run_method
from pipelines.images.unet import DiffusionTraining, UNetFields


@config
class DDPMConfig(UNetFields, DiffusionTraining):
    """Train a denoising diffusion."""

    family: ClassVar[str] = "ddpm"

    output_dir: str = Field("runs/ddpm", description="folder the stage writes into", json_schema_extra=INERT)
    channels: list[int] = Field(
        [32, 64], min_length=1, description="channels at each resolution, each half of the one before"
    )
    timesteps: int = Field(1000, ge=1, description="stages of the noise, T")
    beta_schedule: Literal["linear", "cosine"] = Field(
        "linear",
        description="linear: variances from 1e-4 to 0.02 at 1000 stages, in proportion more at fewer (Ho et al. 2020); "
        "cosine: Nichol and Dhariwal 2021",
    )
    target: Literal["epsilon", "x0", "v"] = Field(
        "epsilon", description="what the network predicts: the noise, the image, or the velocity (Salimans and Ho 2022)"
    )
    class_conditional: bool = Field(False, description="give the network the labels")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="class_conditional: share of the images whose label it does not see"
    )
    guidance_scale: float = Field(
        1.0, ge=0, description="class_conditional: samples are guided away from the unconditional model; 1: not"
    )
    sampler: Literal["ddpm", "ddim", "dpm_solver"] = Field("ddim", description="how samples are drawn")
    eta: float = Field(
        0.0, ge=0, le=1, description="sampler=ddim: noise on the way, from none to as much as ddpm draws"
    )
    inference_steps: int = Field(50, ge=1, description="steps of sampling, at most timesteps")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.inference_steps > self.timesteps:
            mend = f"give at most timesteps={self.timesteps}"
            found.append(Problem("inference_steps", self.inference_steps, "there are not so many stages", mend))
        if self.eta and self.sampler != "ddim":
            mend = "give sampler=ddim, or leave eta out"
            found.append(Problem("eta", self.eta, f"the sampler {self.sampler} has no eta", mend))
        if self.guidance_scale != 1 and not self.class_conditional:
            mend = "give class_conditional=true, or leave guidance_scale out"
            found.append(Problem("guidance_scale", self.guidance_scale, "guidance goes by labels", mend))
        elif self.guidance_scale != 1 and not self.label_dropout:
            mend = "give label_dropout=0.1"
            problem = "guidance needs the unconditional model, which is not trained"
            found.append(Problem("guidance_scale", self.guidance_scale, problem, mend))
        return found


def ddpm(config: DDPMConfig) -> dict[str, float]:
    """Train a denoising diffusion and save it as diffusers' ``DDPMPipeline`` (or, with labels, as a
    ``ClassConditionalDDPMPipeline``).

    Beside the pipeline: ``samples.png`` (200 samples; a class a row, with labels) and ``denoising.png`` (samples on
    their way from noise, and below each the image that the network sees in it).

    Returns:
        ``ddpm/denoising_error`` (held-out mean squared error of the target, a pixel, over stages drawn evenly), with
        standard error and interval; and what ``run_method`` counts.

    Raises:
        UserError: see ``run_method``; images whose side the network cannot halve, or without labels that are to be
            used.
    """
    from pipelines.images.ddpm_method import DDPMMethod

    return run_method(config, DDPMMethod)
