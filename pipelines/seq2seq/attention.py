"""Attention with a learned bias, trained on a CPU.

T5 and its kin add a learned bias of relative positions to their attention scores. PyTorch's fused CPU kernel has no
gradient for it, so training falls back to a path that holds several copies of the scores and goes over memory for each
step of the softmax. Here the same numbers are computed a few examples at a time, while their scores are in the cache,
and the probabilities are all that is kept: at 512 tokens this takes half the time and less than half the memory.

It goes through transformers' attention interface (``ALL_ATTENTION_FUNCTIONS``); the model's own code is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipelines.seq2seq.lean_math import attend, attend_backward

_NAME = "genalign_biased"


class BiasedAttention(torch.autograd.Function):
    """softmax(scale·QKᵀ + b)·V with a gradient for b, a few examples at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend.

        Args:
            ctx: of autograd.
            query: (B, H, L, D).
            key: (B, H, S, D).
            value: (B, H, S, D).
            bias: (1, H, L, S).
            mask: (B, 1, 1 or L, S), False where nothing is to be attended to; or None.
            scale: of the scores.

        Returns:
            (B, H, L, D).
        """
        rows, heads = query.shape[:2]
        by_head = [_by_head(tensor) for tensor in (query, key, value)]
        probabilities, found = attend(*by_head, bias, mask, scale, heads)
        ctx.save_for_backward(*by_head, probabilities)
        ctx.scale, ctx.heads = scale, heads
        return found.unflatten(0, (heads, rows)).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and bias."""
        *by_head, probabilities = ctx.saved_tensors
        of_each = tuple(torch.empty_like(tensor) for tensor in by_head)
        of_bias = attend_backward(
            _by_head(gradient), *by_head, probabilities, ctx.scale, ctx.heads, of_each, ctx.needs_input_grad[3]
        )
        return *(tensor.unflatten(0, (ctx.heads, -1)).transpose(0, 1) for tensor in of_each), of_bias, None, None


def _by_head(tensor: Tensor) -> Tensor:
    """(B, H, L, D) as (H·B, L, D), copied in this order."""
    return tensor.transpose(0, 1).contiguous().flatten(0, 1)


def biased_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``sdpa_attention_forward``: the same arguments, the same numbers."""
    ours = (
        position_bias is not None
        and position_bias.requires_grad
        and torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.dtype == key.dtype == value.dtype == position_bias.dtype
        and query.shape[:2] == key.shape[:2]
        and position_bias.shape == (1, query.shape[1], query.shape[2], key.shape[2])
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and dropout == 0.0
    )
    if not ours:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **options,
        )
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = is_causal and query.shape[2] > 1
        position_bias = create_position_bias_mask(position_bias, None, causal, query, key)
    else:
        attention_mask = attention_mask.expand(len(query), -1, -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = BiasedAttention.apply(query, key, value, position_bias, attention_mask, scale)
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, biased_sdpa)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def attention(module: nn.Module, name: str) -> Iterator[None]:
    """Within, a model attends by the attention function that is registered under ``name``."""
    configs = list({id(c): c for m in _walked(module) if (c := m.__dict__.get("config")) is not None}.values())
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


@contextmanager
def biased_attention(module: nn.Module) -> Iterator[None]:
    """Within, an encoder or a decoder with a learned bias and SDPA attends by ``biased_sdpa`` where that is worth it.

    Not where activations are recomputed: the backward pass would run the forward again outside of this.
    """
    wanted = (
        torch.is_grad_enabled()
        and getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"
        and _has_learned_bias(module)
        and next(module.parameters()).device.type == "cpu"
        and not recomputes(module)
    )
    if not wanted:
        yield
        return
    with attention(module, _NAME):
        yield


def _has_learned_bias(module: nn.Module) -> bool:
    if "_has_learned_bias" not in module.__dict__:
        found = any(getattr(m, "has_relative_attention_bias", False) for m in module.modules())
        module.__dict__["_has_learned_bias"] = found
    return module.__dict__["_has_learned_bias"]


def recomputes(module: nn.Module) -> bool:
    """Whether activations are recomputed in the backward pass (gradient checkpointing)."""
    return any(m.training and m.__dict__.get("gradient_checkpointing") for m in _walked(module))


def _walked(module: nn.Module) -> list[nn.Module]:
    """All parts of a module and itself, some perhaps twice.

    This is asked for several times a step, and ``modules()`` takes much longer. What is found is not kept: adapters put
    new parts in the place of old ones.
    """
    found = [module]
    for part in found:
        found.extend(child for child in part._modules.values() if child is not None)
    return found
