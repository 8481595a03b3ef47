"""Log-probabilities of given tokens and what is logged beside them, from one pass over the logits, on a CPU.

TRL's fused head goes over the logits tile by tile and computes them again in the backward pass, which spares a GPU's
memory. Where all logits of a batch are small that is the slower way: on a CPU it takes 25 passes over them, this 8.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from trl.trainer.utils import FusedCausalLMOutput

from pipelines.seq2seq.view import in_shards

# Logits of one batch, in numbers: above this TRL's tiles are the better way. 64 MiB of fp32.
_LARGEST = 2**24
_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class TokenScores(torch.autograd.Function):
    """log softmax(sWᵀ + b) at given tokens; its gradient is (1[j = token] − p_j) times what comes in."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor | None, ...]:
        """Score.

        Args:
            ctx: of autograd.
            states: (N, H).
            weight: (V, H).
            bias: (V,) or None.
            tokens: (N,) ids.
            outputs: those wanted of ``entropy`` (nats), ``log_sum_sq_probs`` (log Σ p²), ``mean_logits``, ``is_top1``.

        Returns:
            Log-probabilities and the four in this order, (N,) each; None for what is not wanted. All but the first are
            for logging: they have no gradient.
        """
        ctx.set_materialize_grads(False)
        logits = torch.mm(states, weight.t()) if bias is None else torch.addmm(bias, states, weight.t())
        mean = logits.mean(-1) if "mean_logits" in outputs else None
        log_probs = torch.log_softmax(logits, -1)
        chosen = log_probs.gather(1, tokens[:, None])[:, 0]
        entropy = squares = top = None
        if "is_top1" in outputs:
            # Not by argmax, which is slow; several that are the largest all count.
            top = logits.gather(1, tokens[:, None])[:, 0] == logits.amax(-1)
        if "log_sum_sq_probs" in outputs:
            squares = torch.logsumexp(2 * log_probs, -1)
        del logits
        probabilities = log_probs.exp() if "entropy" in outputs or any(ctx.needs_input_grad) else None
        if "entropy" in outputs:
            entropy = torch.linalg.vecdot(probabilities, log_probs).neg_()
        ctx.save_for_backward(states, weight, probabilities, tokens)
        ctx.mark_non_differentiable(*(found for found in (entropy, squares, mean, top) if found is not None))
        return chosen, entropy, squares, mean, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of states, weight and bias."""
        if gradient is None:
            return None, None, None, None, None
        states, weight, probabilities, tokens = ctx.saved_tensors
        of_logits = probabilities * -gradient[:, None]
        of_logits.scatter_add_(1, tokens[:, None], gradient[:, None])
        wanted = ctx.needs_input_grad
        return (
            torch.mm(of_logits, weight) if wanted[0] else None,
            torch.mm(of_logits.t(), states) if wanted[1] else None,
            of_logits.sum(0) if wanted[2] else None,
            None,
            None,
        )


def score_in_one_pass(model: nn.Module, outputs: tuple[str, ...] = ()) -> None:
    """Let a view on which TRL put its fused head score by ``TokenScores`` where that is the better way.

    Args:
        model: a view after ``add_fused_lm_head``, not in a PEFT wrapper.
        outputs: as TRL's head was given them.
    """
    fused, config = model.forward, model.config.get_text_config()
    plain_logits = all(getattr(config, name, None) is None for name in _SCALED)
    largest = _LARGEST // len(model.get_output_embeddings().weight)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any) -> Any:
        better = (
            fused_lm_head
            and plain_logits
            and not args
            and labels is not None
            and inputs.get("shift_labels") is None
            and labels.device.type == "cpu"
            and labels.numel() <= largest
            and self.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not in_shards(self)
        )
        if not better:
            extra = {} if labels is None else {"labels": labels}
            extra |= {"fused_lm_head": True} if fused_lm_head else {}
            return fused(*args, **inputs, **extra)
        count = inputs.pop("num_items_in_batch", None)
        # What follows the last token is not scored, so the decoder need not read that token.
        for name in ("input_ids", "attention_mask"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][:, :-1]
        states = self.base_model(**inputs | {"use_cache": False}).last_hidden_state
        head, labels = self.get_output_embeddings(), labels[:, 1:]
        mask = labels != -100
        if mask.all():
            scores = TokenScores.apply(states.flatten(0, 1), head.weight, head.bias, labels.flatten(), outputs)
            spread = [None if s is None else s.view(mask.shape) for s in scores]
        else:
            scores = TokenScores.apply(states[mask], head.weight, head.bias, labels[mask], outputs)
            spread = [None if s is None else s.new_zeros(mask.shape).masked_scatter(mask, s) for s in scores]
        log_probs, entropy, squares, mean, top = spread
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count),
            log_probs=log_probs,
            entropy=entropy,
            log_sum_sq_probs=squares,
            mean_logits=mean,
            is_top1=top,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)
