"""A trained GAN as a diffusers pipeline: ``GANPipeline.from_pretrained(folder)``."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from pipelines.images.gan_networks import GANDiscriminator, GANGenerator


class GANPipeline(DiffusionPipeline):
    """One pass of the generator from standard normal noise.

    Args:
        generator: draws the images.
        discriminator: what it was trained against; sampling does not need it.
    """

    model_cpu_offload_seq = "generator"
    _optional_components = ["discriminator"]  # noqa: RUF012 - read by diffusers from the class

    def __init__(self, generator: GANGenerator, discriminator: GANDiscriminator | None = None):
        super().__init__()
        self.register_modules(generator=generator, discriminator=discriminator)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many.
            generator: of the noise; the same one gives the same images.
            output_type: ``pil``; ``np``, (n, h, w, c); or ``pt``, (n, c, h, w); arrays are in [0, 1].
            return_dict: an ``ImagePipelineOutput``, or a tuple whose first element is the images.
        """
        network = self.generator.eval()
        shape = (batch_size, network.config.latent_dim)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=network.dtype)
        images = (network(noise) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
