"""The least value of a smooth function, found without its formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FLAT = 1e-12  # curvature in units of the largest, below which a direction has none (a softmax's common shift)


def minimized(loss: Callable[[Tensor], Tensor], start: Tensor, *, descent: int = 200, newton: int = 30) -> Tensor:
    """Where a smooth function of a few hundred fp64 numbers is least: L-BFGS from ``start``, then Newton's method.

    L-BFGS alone creeps where some numbers hardly matter, as the logit of a completion of tiny probability.

    Args:
        loss: a scalar of a tensor like ``start``, differentiable twice.
        start: where to begin, fp64.
        descent: steps of L-BFGS at most.
        newton: steps of Newton's method at most, halved until they shorten the gradient.
    """
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=descent, tolerance_grad=1e-7, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0].flatten()

    x = x.detach()
    slope = gradient(x)
    for _ in range(newton):
        curvature = torch.autograd.functional.hessian(loss, x, vectorize=True).view(x.numel(), x.numel())
        step = -(torch.linalg.pinv(curvature, rtol=_FLAT, hermitian=True) @ slope).view_as(x)
        while (after := gradient(x + step)).norm() >= slope.norm():
            step = step / 2
            if step.abs().max() < 1e-12:
                return x
        x, slope = x + step, after
    return x
