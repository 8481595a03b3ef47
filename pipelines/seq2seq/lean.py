"""T5's layers, on a CPU with half the passes over memory.

transformers writes a layer as a chain of small operations: a root-mean-square norm alone is about twenty passes over
the states, forward and backward, and attention copies queries, keys, values and each of their gradients into another
order; a small model's step is as much of this as of matrix products. Here the same numbers come from one function a
layer with a gradient of its own: the norm's weights go into the matrices behind it, heads are computed in the order in
which attention reads them, the residual is added where the last product is written, and what nobody else sees is worked
on in place.

Like the view this swaps classes in place: parameters and checkpoints stay what they are, and whatever a function does
not serve (half precision, other devices, dropout, adapters, hooks, caches) goes the model's own way. So does what the
model's own forward runs without gradients: generation and evaluation give the plain class's numbers to the bit. Which
layers are of the kind is found by trial on a few numbers, not by name.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.seq2seq.lean_math import (
    AttentionLayer,
    FeedForwardLayer,
    Layout,
    RootMeanSquareNorm,
    attention_without_gradient,
)
from pipelines.seq2seq.stacks import OWN_PASS, SHARED_ORDER


class _Lean(nn.Module):
    """Mixin put in front of a layer's own class; it is never instantiated by itself."""

    _plain_class: type[nn.Module]

    @staticmethod
    def alike(module: nn.Module) -> bool:
        """Whether a module has the parts of such a layer."""
        raise NotImplementedError

    @staticmethod
    def agrees(module: nn.Module) -> bool:
        """Whether a module with these parts gives the same numbers, by trial."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Pickle could not find a class that is made at run time: it is made again from the plain one.
        return _rebuild, (type(self).__mro__[1], self._plain_class), self.__dict__


class LeanNorm(_Lean):
    """A T5-style norm by ``RootMeanSquareNorm``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm's own forward; by ``RootMeanSquareNorm`` in training on a CPU in full precision."""
        if not (torch.is_grad_enabled() and _serves(hidden_states, self.weight)):
            return super().forward(hidden_states)
        return RootMeanSquareNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    @staticmethod
    def alike(module: nn.Module) -> bool:
        """One vector of weights and an epsilon."""
        return (
            isinstance(getattr(module, "variance_epsilon", None), float)
            and isinstance(getattr(module, "weight", None), nn.Parameter)
            and len(list(module.parameters())) == 1
        )

    @staticmethod
    def agrees(module: nn.Module) -> bool:
        """The module's own numbers against ``RootMeanSquareNorm``."""
        states = _numbers(1, 2, len(module.weight))
        found = RootMeanSquareNorm.apply(states, module.weight, module.variance_epsilon)
        return torch.allclose(module(states), found, rtol=1e-5)


class LeanFeedForward(_Lean):
    """A T5-style layer of norm, two matrices and residual by ``FeedForwardLayer``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The layer's own forward; by ``FeedForwardLayer`` on a CPU in full precision, without dropout."""
        if not _is_plain(self, self.DenseReluDense, "wi", "wo", states=hidden_states):
            return super().forward(hidden_states)
        return _feed_forward(self, hidden_states)

    @staticmethod
    def alike(module: nn.Module) -> bool:
        """A norm, two matrices without biases, and dropout."""
        return _consists_of(module, "DenseReluDense", "wi", "wo")

    @staticmethod
    def agrees(module: nn.Module) -> bool:
        """The module's own numbers against ``FeedForwardLayer``."""
        states = _numbers(1, 2, len(module.layer_norm.weight))
        return _close(_feed_forward(module, states), module(states))


def _feed_forward(layer: nn.Module, states: Tensor) -> Tensor:
    norm, dense = layer.layer_norm, layer.DenseReluDense
    return FeedForwardLayer.apply(states, norm.weight, dense.wi.weight, dense.wo.weight, norm.variance_epsilon)


def _attend(
    layer: nn.Module,
    attention: nn.Module,
    states: Tensor,
    others: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sample_major: bool = False,
) -> Tensor:
    layout = Layout(attention.n_heads, attention.scaling, layer.layer_norm.variance_epsilon, sample_major)
    weights = (getattr(attention, name).weight for name in "qkvo")
    function = AttentionLayer.apply if torch.is_grad_enabled() else attention_without_gradient
    return function(states, others, layer.layer_norm.weight, *weights, bias, mask, layout)


def _attends_like(layer: nn.Module, wanted: Tensor, *given: Any) -> bool:
    """Whether ``_attend`` finds these numbers, with gradients and without."""
    with torch.enable_grad():
        found = _attend(layer, *given).detach()
    return _close(found, wanted) and _close(_attend(layer, *given), wanted)


def _attends_plainly(
    layer: nn.Module, attention: nn.Module, states: Tensor, mask: Tensor | None, bias: Tensor | None
) -> bool:
    return (
        _is_plain(layer, attention, *"qkvo", states=states)
        and attention.config._attn_implementation != "eager"
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4))
        and (bias is None or bias.shape == (1, attention.n_heads, states.shape[1], states.shape[1]))
    )


class LeanSelfAttention(_Lean):
    """A T5-style layer of norm, self-attention and residual by ``AttentionLayer``."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """The layer's own forward; by ``AttentionLayer`` on a CPU in full precision, without dropout."""
        attention, length = self.SelfAttention, hidden_states.shape[1]
        lean = (
            past_key_values is None
            and (position_bias is not None or attention.has_relative_attention_bias)
            and _attends_plainly(self, attention, hidden_states, attention_mask, position_bias)
        )
        if not lean:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_bias=position_bias,
                past_key_values=past_key_values,
                **options,
            )
        if position_bias is None:
            position_bias = attention.compute_bias(length, length, device=hidden_states.device)
        bias = position_bias
        if attention_mask is None and attention.is_causal and length > 1:
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            bias = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        return _attend(self, attention, hidden_states, None, bias, attention_mask), position_bias, None

    @staticmethod
    def alike(module: nn.Module) -> bool:
        """A norm, attention with four matrices without biases and a learned bias for all layers, and dropout."""
        return _is_attention(module, "SelfAttention") and hasattr(module.SelfAttention, "compute_bias")

    @staticmethod
    def agrees(module: nn.Module) -> bool:
        """The module's own numbers against ``AttentionLayer``."""
        attention, states = module.SelfAttention, _numbers(2, 3, len(module.layer_norm.weight))
        bias, mask = _numbers(1, attention.n_heads, 3, 3), torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
        mask[1, :, :, 0] = False
        wanted = module(states, attention_mask=mask, position_bias=bias)[0]
        return _attends_like(module, wanted, attention, states, None, bias, mask)


class LeanCrossAttention(_Lean):
    """A T5-style layer of norm, attention to the source and residual by ``AttentionLayer``."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """The layer's own forward; by ``AttentionLayer`` on a CPU in full precision, without dropout.

        Within ``shared_sources`` the states may be of fewer rows than are decoded.
        """
        order, shared = SHARED_ORDER.get(), len(hidden_states) != len(key_value_states)
        lean = (
            past_key_values is None
            and position_bias is None
            and not (shared and order is None)
            and not self.EncDecAttention.has_relative_attention_bias
            and key_value_states.dtype == hidden_states.dtype
            and _attends_plainly(self, self.EncDecAttention, hidden_states, attention_mask, None)
        )
        if not lean:
            return super().forward(
                hidden_states,
                key_value_states=key_value_states,
                attention_mask=attention_mask,
                position_bias=position_bias,
                past_key_values=past_key_values,
                **options,
            )
        if shared and attention_mask is not None:
            # It says which of the source's tokens are real: one line for all queries of a source.
            attention_mask = attention_mask[:, :, :1]
        sample_major = order == "sample-major"
        result = _attend(
            self, self.EncDecAttention, hidden_states, key_value_states, None, attention_mask, sample_major
        )
        return result, None, None

    @staticmethod
    def alike(module: nn.Module) -> bool:
        """A norm, attention with four matrices without biases, and dropout."""
        return _is_attention(module, "EncDecAttention")

    @staticmethod
    def agrees(module: nn.Module) -> bool:
        """The module's own numbers against ``AttentionLayer``."""
        width, read = len(module.layer_norm.weight), module.EncDecAttention.k.in_features
        states, others = _numbers(2, 3, width), _numbers(2, 4, read)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)[:, None, None].expand(-1, -1, 3, -1)
        wanted = module(states, others, attention_mask=mask)[0]
        return _attends_like(module, wanted, module.EncDecAttention, states, others, None, mask)


LEAN: tuple[type[_Lean], ...] = (LeanNorm, LeanFeedForward, LeanSelfAttention, LeanCrossAttention)


def _serves(states: Tensor, weight: Tensor) -> bool:
    return (
        states.device.type == "cpu" and states.dtype == weight.dtype and states.dtype in (torch.float32, torch.float64)
    )


def _is_plain(layer: nn.Module, inner: nn.Module, *names: str, states: Tensor) -> bool:
    """Whether nothing but a layer's own weights has a say: no adapter, dropout, hook or autocast."""
    norm, matrices = layer._modules["layer_norm"], [inner._modules.get(name) for name in names]
    return (
        (torch.is_grad_enabled() or OWN_PASS.get())
        and not torch.is_autocast_enabled("cpu")
        # An adapter may stand in the place of any part, or of all of `inner`.
        and isinstance(norm, LeanNorm)
        and all(type(matrix) is nn.Linear and _serves(states, matrix.weight) for matrix in matrices)
        and _serves(states, norm.weight)
        and not (layer.training and (layer.dropout.p or getattr(inner.dropout, "p", inner.dropout)))
        and not any(map(_is_watched, (inner, norm, *matrices)))
    )


def _is_watched(part: nn.Module) -> bool:
    """Whether calling a module does more than its class says, so that it has to be called."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return bool(hooks) or "forward" in part.__dict__


def _consists_of(module: nn.Module, inner: str, *names: str) -> bool:
    """Whether a layer's parts are a norm, dropout and ``inner``, which has matrices of these names without biases."""
    parts = dict(module.named_children())
    if parts.keys() != {inner, "layer_norm", "dropout"} or not isinstance(parts["dropout"], nn.Dropout):
        return False
    matrices = [getattr(parts[inner], name, None) for name in names]
    return LeanNorm.alike(parts["layer_norm"]) and all(type(m) is nn.Linear and m.bias is None for m in matrices)


def _is_attention(module: nn.Module, inner: str) -> bool:
    attention = getattr(module, inner, None)
    return (
        _consists_of(module, inner, *"qkvo")
        and "position_bias" in inspect.signature(module.forward).parameters
        and all(hasattr(attention, name) for name in ("n_heads", "scaling", "has_relative_attention_bias", "config"))
        and attention.config._attn_implementation == "sdpa"
    )


@functools.cache
def lean_class(mixin: type[_Lean], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with a mixin in front of it; its name stays that of the plain class."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain_class": plain}
    return type(plain.__name__, (mixin, plain), names)


def _rebuild(mixin: type[_Lean], plain: type[nn.Module]) -> nn.Module:
    lean = lean_class(mixin, plain)
    return lean.__new__(lean)


def mixin_for(module: nn.Module) -> type[_Lean] | None:
    """The mixin that gives a layer's numbers, by trial; None where none does, or where it cannot be tried."""
    mixin = candidate(module)
    if mixin is None or not all(map(_can_be_tried, module.parameters())):
        return None
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            return mixin if mixin.agrees(module) else None
    finally:
        for part in training:
            part.training = True


def candidate(module: nn.Module) -> type[_Lean] | None:
    """The mixin for layers of a module's parts, still to be tried on its numbers; None where there is none."""
    if isinstance(module, _Lean):
        return None
    return next((mixin for mixin in LEAN if mixin.alike(module)), None)


def lean_layers(model: nn.Module) -> None:
    """Swap the classes of a model's T5-style norms, feed-forward and attention layers, in place."""
    for module in model.modules():
        if (mixin := mixin_for(module)) is not None:
            module.__class__ = lean_class(mixin, type(module))


def _can_be_tried(weight: nn.Parameter) -> bool:
    """Whether a weight is there to be tried: not in shards, not on another device."""
    return weight.numel() > 0 and weight.device.type == "cpu" and weight.dtype == torch.float32


def _close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def _numbers(*shape: int) -> Tensor:
    """Fixed numbers of either sign: loading a model must not move any generator."""
    return torch.sin(torch.arange(float(torch.Size(shape).numel()))).view(shape)
