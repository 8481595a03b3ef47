"""A trained variational autoencoder as a diffusers pipeline: ``VAEPipeline.from_pretrained(folder)``."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pipelines.images.vae_math import sample_gaussian
from pipelines.images.vae_networks import ImageVAE


class VAEPipeline(DiffusionPipeline):
    """Images from latents drawn from the prior, or given.

    Args:
        vae: encoder and decoder.
    """

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: ImageVAE):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        draw_pixels: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many, where no latents are given.
            generator: of latents and pixels; the same one gives the same images.
            latents: (n, D), to decode instead of draws from N(0, I).
            draw_pixels: draw each pixel from p(x|z) instead of showing its mean E[x|z].
            output_type: ``pil``; ``np``, (n, h, w, c); or ``pt``, (n, c, h, w); arrays are in [0, 1].
            return_dict: an ``ImagePipelineOutput``, or a tuple whose first element is the images.
        """
        network, device = self.vae.eval(), self._execution_device
        if latents is None:
            latents = randn_tensor((batch_size, network.config.latent_dim), generator=generator, device=device)
        images = network.expected(latents.to(device, network.dtype)).float()
        if draw_pixels and network.config.likelihood == "bernoulli":
            uniform = torch.rand(images.shape, generator=generator, device=(generator or images).device)
            images = (uniform.to(images.device) < images).float()
        elif draw_pixels:
            noise = randn_tensor(images.shape, generator=generator, device=images.device)
            images = (images + network.pixel_variance().sqrt() * noise).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of q(z|x), or its mean where no generator is given: (n, D), for images (n, C, H, W) in [0, 1]."""
        m, v = self.vae.eval().encode(images.to(self._execution_device, self.vae.dtype))
        if generator is None:
            return m
        return sample_gaussian(m, v, randn_tensor(m.shape, generator=generator, device=m.device))

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """E[x|z] for z ~ q(z|x) (or its mean): (n, C, H, W) in [0, 1]."""
        return self(latents=self.encode(images, generator), output_type="pt").images
