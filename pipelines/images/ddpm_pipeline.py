"""A class-conditional diffusion as a diffusers pipeline: ``ClassConditionalDDPMPipeline.from_pretrained(folder)``.

Without labels, diffusers' own ``DDPMPipeline`` is what is saved.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from torch import Tensor

from pipelines.images.ddpm_sampling import denoise


class ClassConditionalDDPMPipeline(DiffusionPipeline):
    """Images of wanted classes, with classifier-free guidance.

    Args:
        unet: the network, of one label more than there are classes: the last stands for none.
        scheduler: of the noise it was trained with; another way of sampling is another scheduler, see ``with_sampler``.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.unet.config.num_class_embeds - 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 1000,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many, where no labels are given: the classes in turn.
            class_labels: wanted class of each image, from 0.
            guidance_scale: 1: the conditional model; above 1: clearer members of the class, less varied.
            generator: the same one gives the same images.
            num_inference_steps: steps of sampling.
            eta: noise on the way, where the scheduler is a ``DDIMScheduler``.
            output_type: ``pil``; ``np``, (n, h, w, c); or ``pt``, (n, c, h, w); arrays are in [0, 1].
            return_dict: an ``ImagePipelineOutput``, or a tuple whose first element is the images.

        Raises:
            ValueError: a label that is no class.
        """
        device, unet = self._execution_device, self.unet.eval()
        wanted = torch.arange(batch_size) % self.classes if class_labels is None else class_labels
        labels = torch.as_tensor(wanted, device=device)
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"a label lies in 0..{self.classes - 1}")
        stages = denoise(
            unet, self.scheduler, len(labels), num_inference_steps, generator, labels, guidance_scale, eta, device
        )
        for stage in self.progress_bar(stages):
            images = stage.sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
