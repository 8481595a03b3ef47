"""What both diffusions share: their network, diffusers' ``UNet2DModel``, how it is trained, how stages are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.config import StageConfig, config
from pipelines.errors import Problem, UserError
from pipelines.images.training import ImageTrainingConfig

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from torch import Tensor

    from pipelines.images.method import Draws


STRIP = (5, 11)
"""Samples, and stages of each, of a picture of how they come about."""


@config
class DiffusionTraining(ImageTrainingConfig):
    """Defaults of both diffusions: what counts is the number of steps, however large the set."""

    max_steps: int = Field(2000, ge=-1, description="optimizer steps; -1 leaves it to epochs")
    batch_size: int = Field(64, ge=1, description="images a device takes in one forward pass")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    ema_decay: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="exponential moving average of the weights, which is what is saved, sampled and measured; it "
        "rises to this decay as (1 + step)/(10 + step); 0: none",
    )


@config
class UNetFields(StageConfig):
    """The size of the network."""

    channels: list[int] = Field(
        [64, 128], min_length=1, description="channels at each resolution, each half of the one before"
    )
    layers_per_block: int = Field(1, ge=1, description="residual layers at each resolution, each way")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if any(width < 4 or width % 4 for width in self.channels):
            mend = "give multiples of 4, better of 32"
            found.append(Problem("channels", self.channels, "normalization goes by groups of channels", mend))
        return found


def new_unet(
    fields: UNetFields, side: int, channels: int, patch_size: int = 1, classes: int | None = None
) -> UNet2DModel:
    """A network with random weights that says 0 everywhere at first.

    Args:
        fields: its size.
        side: of the images, in pixels.
        channels: of the images.
        patch_size: side of the squares of pixels that it sees as channels of one place.
        classes: rows of the embedding of labels; None for a network without labels.

    Raises:
        UserError: the side cannot be cut into patches and then halved as often as needed.
    """
    import torch
    from diffusers import UNet2DModel

    levels = len(fields.channels)
    unit = patch_size * 2 ** (levels - 1)
    if side % unit:
        by = f"patch_size={patch_size} and " * (patch_size > 1) + f"{levels} resolutions of channels="
        mend = f"give fewer channels (each further one halves the side), or image_size={math.ceil(side / unit) * unit}"
        problem = f"images of {side}×{side} pixels cannot be halved so often: {by} need a multiple of {unit}"
        raise UserError("channels", fields.channels, problem, mend)
    network = UNet2DModel(
        sample_size=side // patch_size,
        in_channels=channels * patch_size**2,
        out_channels=channels * patch_size**2,
        block_out_channels=tuple(fields.channels),
        layers_per_block=fields.layers_per_block,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=fields.attention,
        # One head: the kernels for many small ones take several times as long on a CPU.
        attention_head_dim=fields.channels[-1],
        norm_num_groups=math.gcd(8, *fields.channels),
        dropout=fields.dropout,
        num_class_embeds=classes,
    )
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    return network


def spread_timesteps(draws: Draws, count: int) -> Tensor:
    """A stage of 0 … count−1 for each row, uniform, but spread over a step's rows more evenly than chance would.

    The rows' places in the step are shifted by one draw for all of them: each row's stage is uniform, and the loss of
    the step has less variance (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).

    Returns:
        (B,), int64.
    """
    import torch

    shift = torch.rand((), generator=draws.generator, device=draws.device, dtype=torch.float64)
    rows = torch.arange(draws.wanted.start, draws.wanted.stop, device=draws.device, dtype=torch.float64)
    return ((shift + rows / draws.rows) % 1 * count).long().clamp(max=count - 1)


def strip(stages: Callable[[int], Iterable[tuple[Tensor, Tensor]]], steps: int) -> Tensor:
    """A picture of samples on their way.

    Args:
        stages: number of samples -> for each of ``steps``, the samples then, and what the network expects of the images
            then, both (n, C, H, W) in [−1, 1].
        steps: how many.

    Returns:
        (rows, columns, C, H, W) in [0, 1]: two rows a sample, a column for each of some stages.
    """
    import torch

    count, columns = STRIP
    shown = {round(place * (steps - 1) / (columns - 1)) for place in range(columns)}
    kept = [torch.stack(pair, 1).float() for number, pair in enumerate(stages(count)) if number in shown]
    return (torch.stack(kept, 2).flatten(0, 1) + 1) / 2
