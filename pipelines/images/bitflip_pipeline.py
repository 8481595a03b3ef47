"""A trained bit-flip diffusion as a diffusers pipeline: ``BitFlipPipeline.from_pretrained(folder)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pipelines.images.bitflip_scheduler import BitFlipScheduler, BitFlipSchedulerOutput


def network_output(unet: UNet2DModel, sample: Tensor, timesteps: int | Tensor, patch_size: int) -> Tensor:
    """One number a pixel from the network, which sees squares of ``patch_size`` pixels as the channels of one place.

    Args:
        unet: of ``C·patch_size²`` channels.
        sample: Y_t, ±1, (B, C, H, W).
        timesteps: stages, (B,) or one for all.
        patch_size: side of the squares; 1 for none.
    """
    return pixel_shuffle(unet(pixel_unshuffle(sample, patch_size), timesteps).sample, patch_size)


class BitFlipPipeline(DiffusionPipeline):
    """Binary images from fair coins.

    Args:
        unet: the network.
        scheduler: of the noise it was trained with.
        patch_size: side of the squares of pixels that the network sees as channels.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: BitFlipScheduler, patch_size: int = 1):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(patch_size=patch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        patch, network = self.config.patch_size, self.unet.config
        return network.in_channels // patch**2, network.sample_size * patch, network.sample_size * patch

    @torch.no_grad()
    def denoise(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> Iterator[BitFlipSchedulerOutput]:
        """The stages of sampling, one after another; the last one's ``prev_sample`` are the images, ±1.

        Args:
            batch_size: how many images.
            generator: of the coins and of every draw.
            num_inference_steps: steps; None for one a stage.
        """
        device, unet = self._execution_device, self.unet.eval()
        self.scheduler.set_timesteps(num_inference_steps or len(self.scheduler))
        shape = (batch_size, *self.image_shape)
        coins = torch.rand(shape, generator=generator, device=device if generator is None else generator.device)
        sample = torch.where(coins < 0.5, 1.0, -1.0).to(device, unet.dtype)
        for t in self.progress_bar(self.scheduler.timesteps.tolist()):
            output = network_output(unet, sample, t, self.config.patch_size)
            found = self.scheduler.step(output, t, sample, generator=generator)
            sample = found.prev_sample
            yield found

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many.
            generator: the same one gives the same images.
            num_inference_steps: steps, at most T, each over as many stages as that takes; None for one a stage.
            output_type: ``pil``; ``np``, (n, h, w, c); or ``pt``, (n, c, h, w); arrays hold 0 and 1.
            return_dict: an ``ImagePipelineOutput``, or a tuple whose first element is the images.

        Raises:
            ValueError: fewer than 1 step or more than T.
        """
        for found in self.denoise(batch_size, generator, num_inference_steps):
            images = found.prev_sample
        images = (images.float() + 1) / 2
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
