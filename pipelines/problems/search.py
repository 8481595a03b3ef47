"""The least value of a smooth function, found without its formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def minimized(loss: Callable[[Tensor], Tensor], start: Tensor, rounds: int = 20) -> Tensor:
    """Where a smooth function of fp64 numbers is least, by L-BFGS from ``start``.

    Args:
        loss: a scalar of a tensor like ``start``, differentiable.
        start: where to begin, fp64.
        rounds: how often L-BFGS is started anew, at most; it ends when no derivative is above 1e-10.
    """
    x = start.detach().clone().requires_grad_()
    for _ in range(rounds):
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=200,
            history_size=50,
            tolerance_grad=1e-14,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            return value

        optimizer.step(closure)
        if x.grad.abs().max() < 1e-10:
            break
    return x.detach()
