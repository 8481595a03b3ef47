"""Counting what operations take when they run on tensors without values: bytes alive, operations, a GPU's kernels."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as anything refers to them; and what the operations cost.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once.
        flops: floating-point operations of the matrix products, as PyTorch's ``FlopCounterMode`` counts them. (That one
            also follows modules, by hooks that keep what is recomputed alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = self._looked = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func._overloadpacket)
        if cost is not None:
            self.flops += cost(*args, **(kwargs or {}), out_val=made)
        tree_map_only(Tensor, self.count, made)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._gone, size)
        if self.now > 1.02 * self._looked:
            # Fake tensors stand in circles of references that are taken down late; real ones are gone at once.
            gc.collect()
            self._looked = max(self._looked, self.now)
        if self.now <= 1.02 * self._looked:
            self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Leave tensors out of the count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())


class _FusedAttention(torch.autograd.Function):
    """What a GPU's fused attention keeps and makes: no scores (Dao et al. 2022, §3.1)."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.kernels = kernels
        kernels.flops += _attention_flops(query, key, value)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *_ = ctx.saved_tensors
        # Scores are computed again, then four products with them.
        ctx.kernels.flops += 5 * _attention_flops(query, key, value) // 2
        wanted = ctx.needs_input_grad[1:]
        found = [
            torch.empty_like(t) if wants else None for t, wants in zip((query, key, value, mask), wanted, strict=True)
        ]
        return None, *found


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    rows, heads, length, width = query.shape
    return 2 * rows * heads * length * key.shape[-2] * (width + value.shape[-1])


class _Dropout(torch.autograd.Function):
    """What a GPU's dropout keeps: a byte for each number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states.new_empty(states.shape, dtype=torch.bool))
        return torch.empty_like(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient)


class Kernels:
    """Attention and dropout as a GPU has them: they keep less for the backward pass than a CPU's.

    Attributes:
        flops: of the attention.
    """

    def __init__(self) -> None:
        self.flops = 0

    def taken(self) -> int:
        """The operations since the last call."""
        found, self.flops = self.flops, 0
        return found

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """In the place of ``scaled_dot_product_attention``."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return _FusedAttention.apply(self, query, key, value, attn_mask)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """In the place of ``dropout``."""
        return _Dropout.apply(input) if p and training else input


@contextlib.contextmanager
def as_on(device: str) -> Iterator[Kernels | None]:
    """Within, operations cost what they cost on a device.

    Fake tensors of a GPU would need a PyTorch that is built for one, and a mode that takes the functions' place would
    not reach what is recomputed in the backward pass; so they are replaced by name.
    """
    if device == "cpu":
        yield None
        return
    kernels, functions = Kernels(), torch.nn.functional
    plain = functions.scaled_dot_product_attention, functions.dropout
    functions.scaled_dot_product_attention, functions.dropout = kernels.attention, kernels.dropout
    try:
        yield kernels
    finally:
        functions.scaled_dot_product_attention, functions.dropout = plain


@contextlib.contextmanager
def little_garbage() -> Iterator[None]:
    """Within, collecting garbage looks at what was made within only, which is quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
