"""The networks of the variational autoencoder as a diffusers model: ``ImageVAE.from_pretrained(folder)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pipelines.images.vae_math import bernoulli_nll, gaussian_nll

_LEAST_VARIANCE = 1e-8


class _Residual(nn.Module):
    """x + f(x), f being two convolutions or two dense layers; it starts as the identity."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second
        nn.init.zeros_(second.weight)
        nn.init.zeros_(second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def _dense(features: int) -> _Residual:
    return _Residual(nn.Linear(features, features), nn.Linear(features, features))


def _conv(channels: int) -> _Residual:
    return _Residual(nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1))


def halvings(size: int, least: int = 4) -> int:
    """How often (at most twice) the side can be halved without a rest and without going below ``least``."""
    count = 0
    while count < 2 and size % 2 == 0 and size // 2 >= least:
        size, count = size // 2, count + 1
    return count


def _mlp(pixels: int, latent_dim: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, hidden),
        nn.ELU(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, hidden),
        nn.ELU(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, pixels),
    )
    return encoder, decoder


def _convolutional(
    size: int, channels: int, latent_dim: int, hidden: int, width: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """Convolutions on squares of pixels, where their work is one large product of matrices, and dense layers."""
    patch = 1 << halvings(size)
    side, deep = size // patch, channels * patch**2
    encoder = nn.Sequential(
        nn.PixelUnshuffle(patch),
        nn.Conv2d(deep, width, 3, padding=1),
        _conv(width),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(width * side**2, hidden),
        _dense(hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, hidden),
        _dense(hidden),
        nn.SiLU(),
        nn.Linear(hidden, width * side**2),
        nn.Unflatten(1, (width, side, side)),
        _conv(width),
        _conv(width),
        nn.SiLU(),
        nn.Conv2d(width, deep, 3, padding=1),
        nn.PixelShuffle(patch),
    )
    return encoder, decoder


class ImageVAE(ModelMixin, ConfigMixin):
    """q(z|x) = N(m(x), diag v(x)), p(z) = N(0, I), p(x|z) Bernoulli or Gaussian in each pixel.

    Args:
        image_size: side in pixels.
        channels: of the images.
        latent_dim: dimensions of z.
        architecture: ``mlp``: two hidden layers of ELUs each way; ``conv``: convolutions and residual layers.
        hidden: features of the hidden layers (``conv``: of its dense layers).
        width: ``conv``: channels, where a square of 4×4 pixels (2×2 of small images) is one place.
        likelihood: ``bernoulli``: the decoder gives logits; ``gaussian``: means, and one variance for all pixels.
        variance: of the Gaussian likelihood, in squared grey levels (white − black = 1); learned where it is None.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 28,
        channels: int = 1,
        latent_dim: int = 64,
        architecture: str = "mlp",
        hidden: int = 300,
        width: int = 32,
        likelihood: str = "bernoulli",
        variance: float | None = None,
    ):
        super().__init__()
        if architecture == "mlp":
            self.encoder, self.decoder = _mlp(channels * image_size**2, latent_dim, hidden)
        elif architecture == "conv":
            self.encoder, self.decoder = _convolutional(image_size, channels, latent_dim, hidden, width)
        else:
            raise ValueError(f"architecture must be 'mlp' or 'conv', got {architecture!r}")
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}")
        if likelihood == "gaussian" and variance is None:
            self.log_variance = nn.Parameter(torch.zeros(()))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x), each (B, D), for images (B, C, H, W) in [0, 1]."""
        m, h = self.encoder(2 * images - 1 if self.config.architecture == "conv" else images).float().chunk(2, dim=1)
        return m, F.softplus(h) + _LEAST_VARIANCE

    def decode(self, z: Tensor) -> Tensor:
        """Logits (Bernoulli) or means (Gaussian), (..., C, H, W), for latents (..., D)."""
        shape = (*z.shape[:-1], self.config.channels, self.config.image_size, self.config.image_size)
        return self.decoder(z.reshape(-1, z.shape[-1])).float().reshape(shape)

    def expected(self, z: Tensor) -> Tensor:
        """E[x|z], (..., C, H, W) in [0, 1], for latents (..., D)."""
        out = self.decode(z)
        return out.sigmoid() if self.config.likelihood == "bernoulli" else out.clamp(0, 1)

    def pixel_variance(self) -> Tensor:
        """The variance of the Gaussian likelihood, a scalar."""
        if self.config.variance is not None:
            return torch.tensor(self.config.variance, device=self.device)
        return self.log_variance.exp()

    def reconstruction(self, images: Tensor, z: Tensor) -> Tensor:
        """−log p(x|z), (...,) in nats, for images (B, C, H, W) and latents (..., B, D)."""
        out = self.decode(z)
        if self.config.likelihood == "bernoulli":
            return bernoulli_nll(images, out)
        return gaussian_nll(images, out, self.pixel_variance())

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of training: −log p(x|z) (B,), mean and variance of q(z|x) (B, D).

        Args:
            images: (B, C, H, W) in [0, 1].
            noise: standard normal, (B, D).
        """
        m, v = self.encode(images)
        return self.reconstruction(images, m + v.sqrt() * noise), m, v
