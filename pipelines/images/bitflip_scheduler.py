"""The noise of bit-flip diffusion as a diffusers scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from pipelines.images.bitflip_math import (
    DeltaSchedule,
    Prediction,
    StagePosterior,
    corrupt,
    flip_probabilities,
    keep_probabilities,
    mixed_log_probabilities,
    original_logits,
    posterior_probability,
)


@dataclass
class BitFlipSchedulerOutput(BaseOutput):
    """What a step of ``BitFlipScheduler`` gives.

    Attributes:
        prev_sample: ±1, (B, C, H, W): the image at the stage before.
        pred_original_sample: in [−1, 1], (B, C, H, W): what is expected of the clean image, E[Y_0 | Y_t].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class BitFlipScheduler(SchedulerMixin, ConfigMixin):
    """Forward noise and reverse steps of binary images, x ∈ {−1, +1}: at stage t = 1 … T each pixel flips with δ_t.

    Stages count from 1; stage 0 is the image itself. All is computed from ρ_t = Π_{s≤t}(1 − 2δ_s), the probability that
    a pixel is untouched; see ``bitflip_math``.

    Args:
        num_train_timesteps: T.
        delta_schedule: ``cosine`` (ρ_t = cos(πt/2T)), ``linear`` or ``constant``.
        delta_start: δ_1 of the linear schedule, δ of the constant one; None for what leaves ρ_T = 0.01.
        delta_end: δ_T of the linear schedule.
        trained_deltas: δ_1 … δ_T themselves; the three arguments before are then not looked at.
        prediction_type: whether the network's logits are of the clean image (``original``: the two posteriors are mixed
            by them) or of the stage before (``previous``).
        add_evidence: the network gives what the pixels around say; what Y_t itself says of its pixel, 2 artanh(ρ) Y_t,
            is added to its logits. By Bayes the two are all there is: log-odds of independent evidence add up.

    Raises:
        ValueError: T below 1, a δ outside (0, ½), δs that are not T many, or an unknown name.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 50,
        delta_schedule: DeltaSchedule = "cosine",
        delta_start: float | None = None,
        delta_end: float | None = None,
        trained_deltas: list[float] | None = None,
        prediction_type: Prediction = "original",
        add_evidence: bool = True,
    ):
        if prediction_type not in ("original", "previous"):
            raise ValueError(f"no prediction is called {prediction_type!r}")
        if trained_deltas is None:
            self.deltas = flip_probabilities(delta_schedule, num_train_timesteps, delta_start, delta_end)
        else:
            self.deltas = torch.tensor(trained_deltas, dtype=torch.float64)
            if self.deltas.shape != (num_train_timesteps,):
                raise ValueError(f"{num_train_timesteps} stages need as many flip probabilities")
            if not ((self.deltas > 0) & (self.deltas < 0.5)).all():
                raise ValueError("a flip probability lies in (0, 1/2)")
        self.keeps = keep_probabilities(self.deltas)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is: nothing is scaled here."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the stages to sample with: so many of 1 … T, evenly spaced, T the first of them.

        Raises:
            ValueError: fewer than 1 step or more than T.
        """
        stages = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= stages:
            raise ValueError(f"the number of steps lies in 1..{stages}, not at {num_inference_steps}")
        chosen = [round(stages * left / num_inference_steps) for left in range(num_inference_steps, 0, -1)]
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(chosen, device=device)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The stage that a step from ``timestep`` leads to; 0 is the image."""
        later = [int(t) for t in self.timesteps if int(t) < int(timestep)]
        return max(later, default=0)

    def _keep(self, timesteps: int | Tensor, like: Tensor) -> Tensor:
        """ρ at the stages, float64, shaped to go with images (B, …) like ``like``."""
        keep = self.keeps.to(like.device)[torch.as_tensor(timesteps, device=like.device)]
        return keep.reshape(-1, *[1] * (like.ndim - 1))

    def _before(self, timesteps: int | Tensor, previous: int | Tensor | None) -> int | Tensor:
        return timesteps - 1 if previous is None else previous

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Y_t drawn from Y_0 at once, without the stages between.

        Args:
            original_samples: Y_0, ±1, (B, …).
            noise: uniform on [0, 1), of the same shape.
            timesteps: stages, (B,) or one for all.
        """
        return corrupt(original_samples, self._keep(timesteps, original_samples).to(noise.dtype), noise)

    def posterior(
        self, sample: Tensor, original: Tensor, timesteps: int | Tensor, previous: int | Tensor | None = None
    ) -> Tensor:
        """P(Y_s = +1 | Y_t, Y_0), float64.

        Args:
            sample: Y_t, ±1, (B, …).
            original: Y_0, ±1, of the same shape.
            timesteps: t, (B,) or one for all.
            previous: s < t, likewise; None for t − 1.
        """
        before = self._keep(self._before(timesteps, previous), sample)
        return posterior_probability(sample.double(), original.double(), before, self._keep(timesteps, sample))

    def stage_posterior(
        self, timesteps: int | Tensor, like: Tensor, previous: int | Tensor | None = None
    ) -> StagePosterior:
        """The posteriors from stage t to s (default t − 1), shaped to go with images like ``like`` and of its type."""
        before = self._keep(self._before(timesteps, previous), like)
        return StagePosterior(*(p.to(like.dtype) for p in StagePosterior.between(before, self._keep(timesteps, like))))

    def logits(self, model_output: Tensor, sample: Tensor, timesteps: int | Tensor) -> Tensor:
        """Log-odds of each pixel's being +1, at stage 0 or t − 1 as ``prediction_type`` says.

        Args:
            model_output: (B, …).
            sample: Y_t, ±1, of the same shape.
            timesteps: t, (B,) or one for all.

        Returns:
            At least float32, whatever the network computed in.
        """
        output = model_output if model_output.dtype == torch.float64 else model_output.float()
        if not self.config.add_evidence:
            return output
        correlation = self._keep(timesteps, sample)
        if self.config.prediction_type == "previous":
            correlation = correlation / self._keep(timesteps - 1, sample)
        return output + 2 * torch.atanh(correlation).to(output.dtype) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> BitFlipSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step, from stage ``timestep`` to the next smaller one of ``timesteps``, or to the image.

        A network that predicts the stage before is asked what it thereby says of the image, where the step is larger
        than one stage.

        Args:
            model_output: what the network gave for ``sample``, (B, C, H, W).
            timestep: t, one for all.
            sample: Y_t, ±1.
            generator: of the draw.
            return_dict: a ``BitFlipSchedulerOutput``, or a tuple of its fields.
        """
        t = int(timestep)
        previous = self.previous_timestep(t)
        logits = self.logits(model_output, sample, t)
        original = logits
        if self.config.prediction_type == "previous":
            original = original_logits(logits, sample, self.stage_posterior(t, logits))
        if self.config.prediction_type == "previous" and previous == t - 1:
            stay = torch.sigmoid(logits * sample)
        else:
            stage = self.stage_posterior(t, logits, previous)
            stay = mixed_log_probabilities(original, sample, stage)[0].exp()
        device = sample.device if generator is None else generator.device
        uniform = torch.rand(sample.shape, generator=generator, device=device, dtype=stay.dtype).to(sample.device)
        drawn = torch.where(uniform < stay, sample, -sample)
        expected = torch.tanh(original / 2)
        return BitFlipSchedulerOutput(drawn, expected) if return_dict else (drawn, expected)
