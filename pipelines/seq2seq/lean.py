"""T5's layers, trained on a CPU with half the passes over memory.

transformers writes a root-mean-square norm as a chain of elementwise operations, about twenty passes over the states,
forward and backward, and a feed-forward layer as four operations that each make a new tensor four times as wide as the
states. Small models spend a fifth of a step there. Here the same numbers come from functions with a gradient of their
own, which work in place on what nobody else sees.

Like the view this swaps classes in place: parameters and checkpoints stay what they are, and whatever a function does
not serve (no gradient wanted, half precision, other devices, dropout, adapters) goes the model's own way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RootMeanSquareNorm(torch.autograd.Function):
    """y = x·r·w with r = (mean(x²) + ε)^(−1/2) (Zhang and Sennrich 2019, eq. 4).

    dx = r·(g·w − x̂·mean(g·w·x̂)) with x̂ = x·r, dw = Σ g·x̂.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalize.

        Args:
            ctx: of autograd.
            states: (…, H).
            weight: (H,), of the same type.
            epsilon: ε > 0.

        Returns:
            (…, H).
        """
        flat = states.reshape(-1, states.shape[-1])
        rate = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
        rate.square_().div_(flat.shape[-1]).add_(epsilon).rsqrt_()
        normal = flat * rate
        ctx.save_for_backward(normal, rate, weight)
        return (normal * weight).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of states and weight."""
        normal, rate, weight = ctx.saved_tensors
        given = gradient.reshape(normal.shape)
        product = given * normal
        of_weight = product.sum(0)
        mean = torch.mv(product, weight).div_(normal.shape[-1])[:, None]
        of_states = torch.mul(given, weight, out=product).addcmul_(normal, mean, value=-1).mul_(rate)
        return of_states.view(gradient.shape), of_weight, None


class FeedForward(torch.autograd.Function):
    """y = max(0, x·Wᵢᵀ)·Wₒᵀ (Vaswani et al. 2017, eq. 2, without biases)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        """Two matrices with a rectifier between them.

        Args:
            ctx: of autograd.
            states: (…, H).
            inner: Wᵢ (F, H).
            outer: Wₒ (H, F).

        Returns:
            (…, H).
        """
        flat = states.reshape(-1, states.shape[-1])
        hidden = torch.mm(flat, inner.t()).relu_()
        ctx.save_for_backward(flat, hidden, inner, outer)
        return torch.mm(hidden, outer.t()).view(*states.shape[:-1], len(outer))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states and both matrices."""
        flat, hidden, inner, outer = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = gradient.reshape(-1, gradient.shape[-1])
        of_outer = torch.mm(given.t(), hidden) if wanted[2] else None
        of_hidden = torch.mm(given, outer)
        torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
        of_inner = torch.mm(of_hidden.t(), flat) if wanted[1] else None
        of_states = torch.mm(of_hidden, inner).view(*gradient.shape[:-1], flat.shape[-1]) if wanted[0] else None
        return of_states, of_inner, of_outer


class _Lean(nn.Module):
    """Mixin put in front of a layer's own class; it is never instantiated by itself."""

    _plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Pickle could not find a class that is made at run time: it is made again from the plain one.
        return _rebuild, (type(self).__mro__[1], self._plain_class), self.__dict__


class LeanNorm(_Lean):
    """A T5-style norm by ``RootMeanSquareNorm``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm's own forward; by ``RootMeanSquareNorm`` in training on a CPU in full precision."""
        if not _serves(hidden_states, self.weight):
            return super().forward(hidden_states)
        return RootMeanSquareNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanFeedForward(_Lean):
    """A T5-style feed-forward layer by ``FeedForward``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The layer's own forward; by ``FeedForward`` in training on a CPU in full precision, without dropout."""
        inner, outer = self.wi, self.wo
        serves = (
            # Not where an adapter stands in its place.
            type(inner) is type(outer) is nn.Linear
            and not (self.training and self.dropout.p)
            and inner.weight.dtype == outer.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and _serves(hidden_states, inner.weight)
        )
        if not serves:
            return super().forward(hidden_states)
        return FeedForward.apply(hidden_states, inner.weight, outer.weight)


def _serves(states: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and states.device.type == "cpu"
        and states.dtype == weight.dtype
        and states.dtype in (torch.float32, torch.float64)
    )


@functools.cache
def _lean_class(mixin: type[_Lean], plain: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain_class": plain}
    return type(plain.__name__, (mixin, plain), names)


def _rebuild(mixin: type[_Lean], plain: type[nn.Module]) -> nn.Module:
    lean = _lean_class(mixin, plain)
    return lean.__new__(lean)


def lean_layers(model: nn.Module) -> None:
    """Swap the classes of a model's T5-style norms and feed-forward layers, in place.

    Which ones those are is found by trial on a few numbers, not by name.
    """
    for module in model.modules():
        if isinstance(module, _Lean):
            continue
        mixin = LeanNorm if _is_norm(module) else LeanFeedForward if _is_feed_forward(module) else None
        if mixin is not None:
            module.__class__ = _lean_class(mixin, type(module))


def _can_be_tried(weight: Any, dimensions: int) -> bool:
    """Whether a weight is there to be tried: not in shards, not on another device."""
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == dimensions
        and weight.numel() > 0
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


@torch.no_grad()
def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    alike = isinstance(getattr(module, "variance_epsilon", None), float) and len(list(module.parameters())) == 1
    if not alike or not _can_be_tried(weight, 1):
        return False
    states = _numbers(len(weight))
    return torch.allclose(module(states), RootMeanSquareNorm.apply(states, weight, module.variance_epsilon), rtol=1e-5)


@torch.no_grad()
def _is_feed_forward(module: nn.Module) -> bool:
    inner, outer = getattr(module, "wi", None), getattr(module, "wo", None)
    alike = (
        type(inner) is type(outer) is nn.Linear
        and inner.bias is None
        and outer.bias is None
        and isinstance(getattr(module, "dropout", None), nn.Dropout)
        and len(list(module.parameters())) == 2
    )
    if not alike or not all(_can_be_tried(matrix.weight, 2) for matrix in (inner, outer)):
        return False
    states, training = _numbers(inner.in_features), module.training
    module.eval()
    try:
        found = module(states)
    finally:
        module.train(training)
    return torch.allclose(found, FeedForward.apply(states, inner.weight, outer.weight), rtol=1e-4, atol=1e-6)


def _numbers(width: int) -> Tensor:
    """(1, 2, width) fixed numbers of either sign: loading a model must not move any generator."""
    return torch.sin(torch.arange(2.0 * width)).view(1, 2, width)
