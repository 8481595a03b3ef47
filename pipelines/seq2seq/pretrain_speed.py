"""Training in bfloat16 on a CPU with fewer passes over memory: the same arithmetic in two thirds of the time.

Autocast casts the input of every matrix product by itself, so the states that a norm gives are cast for queries, keys
and values each, and T5's feed-forward layer casts its wide inner states to float32 and back; here both stay in
bfloat16. PyTorch's fused attention has no gradient for T5's bias on a CPU, and what it falls back to is slower than the
plain one. The loss writes its gradient over the logits while a few rows of them are in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from pipelines.memory import keep_freed_memory
from pipelines.seq2seq.lean import LeanNorm, lean_layers

# Logits gone over at a time: 4 MiB of fp32 stay in the cache of today's processors; a GPU wants few, large parts.
_PART = {"cpu": 2**20}
_LARGE_PART = 2**26


class SummedCrossEntropy(torch.autograd.Function):
    """−Σ log softmax(logits)[label], nats, over the labels that are not −100; it uses the logits up."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross-entropy and leave its gradient, softmax(logits) − 1[label], where the logits were.

        Args:
            ctx: of autograd.
            logits: (…, V), of any precision; they hold something else afterwards.
            labels: (…), ids or −100.

        Returns:
            () fp32.
        """
        flat, chosen = logits.view(-1, logits.shape[-1]), labels.reshape(-1, 1)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, _PART.get(logits.device.type, _LARGE_PART) // flat.shape[1])
        for start in range(0, len(flat), rows):
            part, label = flat[start : start + rows].float(), chosen[start : start + rows]
            kept, label = label != -100, label.clamp_min(0)
            part.sub_(part.amax(1, keepdim=True))
            logit = part.gather(1, label)
            size = part.exp_().sum(1, keepdim=True)
            total += ((size.log() - logit) * kept).sum()
            part.mul_(kept / size).scatter_add_(1, label, -kept.float())
            flat[start : start + rows] = part
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits."""
        (of_logits,) = ctx.saved_tensors
        return of_logits.mul_(gradient), None


class _Bfloat16Norm:
    """Mixin in front of a norm's class: what it gives is cast once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = super().forward(hidden_states)
        return given.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else given


class _Bfloat16FeedForward:
    """Mixin in front of T5's feed-forward layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_states)
        return self.wo(self.dropout(torch.relu_(self.wi(hidden_states))))


class _Bfloat16GatedFeedForward:
    """Mixin in front of T5 v1.1's feed-forward layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_states)
        return self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))


def _is_feed_forward(module: nn.Module, *inner: str) -> bool:
    parts = {name for name, _ in module.named_children()}
    return parts == {*inner, "wo", "dropout", "act"} and all(
        type(getattr(module, name)) is nn.Linear for name in (*inner, "wo")
    )


def train_fast_on_cpu(model: PreTrainedModel, precision: str) -> None:
    """Swap classes of a model's layers, in place, for ones that train faster on a CPU; parameters stay what they are.

    Args:
        model: an encoder-decoder; layers that are not T5's kind stay as they are.
        precision: ``bf16`` or ``fp32``.
    """
    keep_freed_memory()
    lean_layers(model)
    if precision != "bf16":
        return
    if model.config.model_type in ("t5", "mt5", "umt5"):
        model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, LeanNorm):
            mixin = _Bfloat16Norm
        elif _is_feed_forward(module, "wi") and isinstance(module.act, nn.ReLU):
            mixin = _Bfloat16FeedForward
        elif _is_feed_forward(module, "wi_0", "wi_1"):
            mixin = _Bfloat16GatedFeedForward
        else:
            continue
        plain = type(module)
        module.__class__ = type(plain.__name__, (mixin, plain), {"__module__": plain.__module__})
