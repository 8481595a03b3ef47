"""The mathematics of Gaussian diffusion, as pure functions.

At stage t an image is x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, ε ~ N(0, I), with ᾱ_t = Π_{s≤t}(1−β_s); ᾱ = 1 is the image itself.
All functions take any shapes that broadcast, of any floating type.

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; the velocity from Salimans and Ho 2022, "Progressive
Distillation", section 4; guidance from Ho and Salimans 2022, "Classifier-Free Diffusion Guidance".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["epsilon", "x0", "v"]


def marginal(original: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_t given x_0 (Ho et al. 2020, equation 4)."""
    return alpha_bar.sqrt() * original, 1 - alpha_bar


def posterior(
    original: Tensor, noisy: Tensor, alpha_bar_before: Tensor, alpha_bar_now: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_s given x_t and x_0, for a stage s before t (Ho et al. 2020, equations 6 and 7).

    Args:
        original: x_0.
        noisy: x_t.
        alpha_bar_before: ᾱ_s.
        alpha_bar_now: ᾱ_t, less than ᾱ_s.
    """
    alpha = alpha_bar_now / alpha_bar_before
    of_original = alpha_bar_before.sqrt() * (1 - alpha) / (1 - alpha_bar_now)
    of_noisy = alpha.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar_now)
    variance = (1 - alpha_bar_before) * (1 - alpha) / (1 - alpha_bar_now)
    return of_original * original + of_noisy * noisy, variance


def target_of(target: Target, original: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network is to say of x_t: the noise ε, the image x_0, or the velocity v = √ᾱ ε − √(1−ᾱ) x_0."""
    if target == "epsilon":
        return noise
    if target == "x0":
        return original
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * original


def original_of(target: Target, output: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The image x_0 that a network's output for x_t means; the inverse of ``target_of``."""
    if target == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    if target == "x0":
        return output
    return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * output


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from what is said without a label; scale 1 is the conditional model itself."""
    return unconditional + scale * (conditional - unconditional)
