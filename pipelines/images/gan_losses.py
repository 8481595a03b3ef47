"""The two players' losses of a GAN from the discriminator's logits, and what they do to the generator's gradient.

The discriminator's logit is ℓ(x), its probability that x is real D(x) = σ(ℓ(x)). All losses are means over the batch,
in nats. They are written with log σ(ℓ) = min(0, ℓ) − log(1 + e^−|ℓ|), which neither overflows nor loses digits for any
logit; log(1 − D) is log σ(−ℓ). (torch's softplus would do, were it not cut off beyond 20.)

Sources: Goodfellow et al. 2014, "Generative Adversarial Nets", equation 1 and section 3 (both generator losses);
Mescheder, Geiger and Nowozin 2018, "Which Training Methods for GANs do actually Converge?", equation 9 (R1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch.nn.functional import logsigmoid

GeneratorLoss = Literal["nonsaturating", "minimax"]


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """−E log D(x) − E log(1 − D(G(z))): what the discriminator minimizes in both games.

    Args:
        real_logits: (n,) logits of training images.
        fake_logits: (m,) logits of generated images.
    """
    return -logsigmoid(real_logits).mean() - logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits: torch.Tensor, kind: GeneratorLoss) -> torch.Tensor:
    """What the generator minimizes.

    ``minimax``: E log(1 − D(G(z))), the generator's side of the game's value. Its derivative by the logit is −σ(ℓ),
    which vanishes where the discriminator is sure that a sample is false (it *saturates*).
    ``nonsaturating``: −E log D(G(z)), with the derivative −(1 − σ(ℓ)), which is then near −1.

    Args:
        fake_logits: (n,) logits of generated images.
        kind: which of the two.
    """
    if kind == "minimax":
        return logsigmoid(-fake_logits).mean()
    return -logsigmoid(fake_logits).mean()


def generator_gradients(fake_logits: torch.Tensor, parameters: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient that each of the two losses gives the generator, on the same samples.

    The graph of ``fake_logits`` is kept. Each loss costs one backward pass.

    Args:
        fake_logits: (n,) logits of generated images, still joined to the generator.
        parameters: the generator's.

    Returns:
        ``{"minimax": (p,), "nonsaturating": (p,)}``, the gradients of all p weights one after the other.
    """
    parameters, found = list(parameters), {}
    for kind in get_args(GeneratorLoss):
        gradients = torch.autograd.grad(generator_loss(fake_logits, kind), parameters, retain_graph=True)
        found[kind] = torch.cat([gradient.flatten() for gradient in gradients])
    return found


def r1_penalty(real_logits: torch.Tensor, real_images: torch.Tensor) -> torch.Tensor:
    """E ½‖∇ₓ ℓ(x)‖² at training images, differentiable in the discriminator's parameters.

    Args:
        real_logits: (n,) logits, still joined to ``real_images``.
        real_images: (n, …) the images, requiring gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return 0.5 * gradient.float().flatten(1).square().sum(1).mean()
