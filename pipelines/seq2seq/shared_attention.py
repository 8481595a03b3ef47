"""K completions of a source attend to one copy of its keys and values.

A decoder row needs its source's states, so K completions are usually decoded against K copies of them: each copy is
projected to keys and values in every layer, held for the backward pass, and read again at every step of generation.
Here the K rows of a source become K·T queries of one row instead. The numbers are the same; on a CPU, cross-attention
is what generation spends most of its time on, and with K = 4 this makes it several times cheaper.

It goes through transformers' attention interface (``ALL_ATTENTION_FUNCTIONS``), so the model's own code is untouched.
Whether a model can do it is *tried* once on a few tokens; one that cannot is decoded against copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipelines.seq2seq.attention import attention, biased_sdpa, recomputes
from pipelines.seq2seq.stacks import SHARED_ORDER, Order, projected, run_decoder, states_width, unwrap
from pipelines.seq2seq.view import decode, in_shards

_NAME = "genalign_shared_sources"


def _shared_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``sdpa_attention_forward``, but with fewer rows of keys than of queries each serves K rows of queries."""
    rows, sources = len(query), len(key)
    if rows == sources:
        return biased_sdpa(
            module, query, key, value, attention_mask, position_bias=position_bias, is_causal=is_causal, **options
        )
    source_major = SHARED_ORDER.get() == "source-major"
    samples, (_, heads, length, width) = rows // sources, query.shape
    folded = query.unflatten(0, (sources, samples) if source_major else (samples, sources))
    folded = folded if source_major else folded.transpose(0, 1)
    folded = folded.transpose(1, 2).reshape(sources, heads, samples * length, width)
    if attention_mask is not None:
        # The mask of cross-attention says which of the source's tokens are real: one line for all its queries.
        attention_mask = attention_mask[:, :, :1]
    if position_bias is not None:
        # T5 has no position bias across; it passes zeros.
        position_bias = None if not module.has_relative_attention_bias else position_bias.repeat(1, 1, samples, 1)
    result, _ = sdpa_attention_forward(
        module, folded, key, value, attention_mask, position_bias=position_bias, is_causal=False, **options
    )
    result = result.unflatten(1, (samples, length))
    result = result if source_major else result.transpose(0, 1)
    return result.reshape(rows, length, heads, -1), None


AttentionInterface.register(_NAME, _shared_sdpa)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def shared_sources(model: Any, order: Order = "source-major") -> Iterator[None]:
    """Within, the decoder may be called with R = K·B rows, and states, mask or cache of B sources."""
    token = SHARED_ORDER.set(order)
    try:
        with attention(unwrap(model).get_decoder(), _NAME):
            yield
    finally:
        SHARED_ORDER.reset(token)


def can_share(model: Any) -> bool:
    """Whether the decoder takes shared sources: it uses SDPA, recomputes no activations, and gives the same states."""
    inner = unwrap(model).base_model
    decoder = inner.get_decoder()
    if recomputes(decoder):
        return False  # the backward pass would run the forward again, outside `shared_sources`
    if "_shares_sources" not in inner.__dict__:
        if in_shards(inner):
            return False  # only the sharded model's own forward may touch its parameters
        inner.__dict__["_shares_sources"] = decoder.config._attn_implementation == "sdpa" and _agrees(inner)
    return inner.__dict__["_shares_sources"]


@torch.no_grad()
def _agrees(model: Any) -> bool:
    weight = model.get_input_embeddings().weight
    width = states_width(model.get_encoder())
    # Large enough, and unlike enough, for a row paired with the wrong source or mask to show.
    numbers = torch.arange(2 * 5 * width, device=weight.device, dtype=torch.float32)
    states = 10 * torch.sin(numbers**2).view(2, 5, width)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=weight.device)
    ids = torch.arange(18, device=weight.device).view(6, 3) % weight.shape[0]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        states = projected(model, states.to(weight.dtype))
        tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
        for order in ("source-major", "sample-major"):
            with torch.autocast(weight.device.type, enabled=False):
                copied = decode(model, states, mask, ids, order=order).float()
                with shared_sources(model, order):
                    shared = run_decoder(model, states, mask, ids, None).float()
            if not torch.allclose(shared, copied, rtol=0, atol=tolerance * float(copied.abs().max())):
                return False
    except (RuntimeError, AttributeError):
        return False
    finally:
        for module in training:
            module.training = True
    return True


def decode_shared(
    model: Any,
    encoder_states: Tensor,
    source_mask: Tensor | None,
    decoder_input_ids: Tensor,
    decoder_mask: Tensor | None = None,
    *,
    order: Order | Tensor | None,
) -> Tensor:
    """``view.decode`` without copies of the sources where the model can do it: same arguments, same states.

    Sources with unequal numbers of rows (``order`` a tensor) are copied.
    """
    rows, sources = len(decoder_input_ids), len(encoder_states)
    if rows == sources or rows % sources or not isinstance(order, str) or not can_share(model):
        return decode(model, encoder_states, source_mask, decoder_input_ids, decoder_mask, order=order)
    with shared_sources(model, order):
        return run_decoder(unwrap(model), encoder_states, source_mask, decoder_input_ids, decoder_mask)
