"""Generator and discriminator of a GAN as diffusers models: the course's networks, for any size that can be halved.

At width 64, hidden 512 and two stages on 28×28 images they are: generator 64 → 512 → 64×7×7, each with batch norm and
ReLU, then twice pixel shuffle and a 3×3 convolution (16 → 32 channels with batch norm and ReLU, 8 → 1); discriminator
two 4×4 convolutions of stride 2 with 32 and 64 channels, then 512 and one logit, with leaky ReLUs between them.
"""

from __future__ import annotations

import copy
import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as normalized

SLOPE = 0.2  # of the leaky ReLUs below 0


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes of a tensor; the gradient is that of the sum over the processes' losses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over axis 1 whose statistics are those of the whole batch, however many processes share it.

    ``torch.nn.SyncBatchNorm`` does the same on GPUs only. A batch that one process takes in parts (gradient
    accumulation) is normalized part by part, as everywhere.

    Attributes:
        alone: whether this process takes its own rows for the whole batch (false at first).
    """

    alone = False

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs an axis of channels, not an input of shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, …) to the same shape."""
        if not self.training or self.alone or processes() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = _SumOverProcesses.apply(x.new_tensor([x.numel() / x.shape[1]]))
        mean = _SumOverProcesses.apply(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        return (scaled * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


class GANGenerator(ModelMixin, ConfigMixin):
    """From standard normal noise to images in [−1, 1].

    Args:
        sample_size: side of the images, a multiple of ``2 ** stages``.
        channels: 1 for grey, 3 for colour.
        latent_dim: size of the noise.
        hidden: width of the first layer.
        width: channels before the first stage, a multiple of 8.
        stages: how often the side is doubled.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        channels: int = 1,
        latent_dim: int = 64,
        hidden: int = 512,
        width: int = 64,
        stages: int = 2,
    ):
        super().__init__()
        side = sample_size >> stages
        layers: list[nn.Module] = [
            # No biases before a batch norm, which takes them out again: their gradients would be nothing but rounding.
            nn.Linear(latent_dim, hidden, bias=False),
            BatchNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width * side * side, bias=False),
            BatchNorm(width * side * side),
            nn.ReLU(),
            nn.Unflatten(1, (width, side, side)),
        ]
        incoming = width
        for _ in range(stages - 1):
            layers += [nn.PixelShuffle(2), nn.Conv2d(incoming // 4, width // 2, 3, padding=1, bias=False)]
            layers += [BatchNorm(width // 2), nn.ReLU()]
            incoming = width // 2
        layers += [nn.PixelShuffle(2), nn.Conv2d(incoming // 4, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """(n, latent_dim) to (n, channels, sample_size, sample_size) in [−1, 1]."""
        return self.layers(noise)

    @torch.no_grad()
    def settled(self, batches: int = 16, size: int = 256) -> GANGenerator:
        """A copy whose batch norms have the running statistics of these very weights, on fixed noise; ready to sample.

        What training leaves belongs to the weights of its last steps, not to their moving average.

        Args:
            batches: over which the statistics are averaged.
            size: noise vectors of each.
        """
        copied = copy.deepcopy(self).requires_grad_(True).train()
        norms = [module for module in copied.modules() if isinstance(module, BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.alone = None, True  # a plain mean over what follows, whichever processes do this
        generator = torch.Generator().manual_seed(0)
        with torch.autocast(self.device.type, enabled=False):
            for _ in range(batches):
                copied(torch.randn(size, self.config.latent_dim, generator=generator).to(self.device, self.dtype))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.alone = momentum, False
        return copied.eval()


class GANDiscriminator(ModelMixin, ConfigMixin):
    """From images in [−1, 1] to the logit of their being real.

    Args:
        sample_size: side of the images, a multiple of ``2 ** stages``.
        channels: 1 for grey, 3 for colour.
        hidden: width of the layer before the logit.
        width: channels after the second and later stages; the first has half as many.
        stages: how often the side is halved.
        spectral_norm: divide every weight matrix by its largest singular value (Miyato et al. 2018).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        channels: int = 1,
        hidden: int = 512,
        width: int = 64,
        stages: int = 2,
        spectral_norm: bool = False,
    ):
        super().__init__()
        wrap = normalized if spectral_norm else (lambda layer: layer)
        layers: list[nn.Module] = []
        incoming = channels
        for stage in range(stages):
            outgoing = width // 2 if stage == 0 else width
            layers += [wrap(nn.Conv2d(incoming, outgoing, 4, stride=2, padding=1)), nn.LeakyReLU(SLOPE)]
            incoming = outgoing
        flat = incoming * math.prod([sample_size >> stages] * 2)
        layers += [nn.Flatten(), wrap(nn.Linear(flat, hidden)), nn.LeakyReLU(SLOPE), wrap(nn.Linear(hidden, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, sample_size, sample_size) to (n,) logits."""
        return self.layers(images).squeeze(1)
