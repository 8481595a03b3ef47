"""Encoder and decoder of any transformers model: run one, run the other, and say which rows belong to which source.

Nothing here goes by model names, and nothing needs a view: reward models and critics have no language-model head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.errors import UserError
from pipelines.seq2seq.attention import biased_attention

Order = Literal["sample-major", "source-major"]
"""How R = K·B rows belong to B sources: ``sample-major`` puts sample k of source b into row k·B + b (TRL's
``[chosen; rejected]``), ``source-major`` into row b·K + k (``generate(num_return_sequences=K)``). Where sources have
unequal numbers of rows, an (R,) tensor of source numbers takes its place."""

SHARED_ORDER: ContextVar[Order | None] = ContextVar("order", default=None)
"""The order in which attention is given K·B rows of queries for B of keys at the moment; None where it is not."""

OWN_PASS: ContextVar[bool] = ContextVar("own_pass", default=False)
"""Whether a stack is run by this file at the moment, and not by the model's own forward, as ``generate`` runs it."""


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside ``DistributedDataParallel`` and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def states_width(module: nn.Module) -> int:
    """H of an encoder's or a decoder's states."""
    config = module.config.get_text_config()
    return getattr(config, "hidden_size", None) or config.d_model


@functools.cache
def _parameters(module_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(module_class.forward).parameters)


def known_arguments(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those inputs that a module's forward names: Whisper's decoder, for one, has no mask of the source."""
    known = _parameters(type(module))
    return {name: value for name, value in inputs.items() if name in known}


def decoder_trunk(model: Any) -> nn.Module:
    """The decoder of a model without any head: what ``get_decoder`` gives, and what that gives, and so on."""
    decoder = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def source_name(model: Any) -> str:
    """What a model's encoder calls its sources: ``input_ids``, ``input_features``, ``pixel_values`` …"""
    inner = unwrap(model)
    # A composite model (SpeechEncoderDecoderModel) has a name of its own for whatever its encoder reads.
    own, encoder = inner.main_input_name, inner.get_encoder()
    return own if own in _parameters(type(encoder)) else encoder.main_input_name


def run_encoder(model: PreTrainedModel, inputs: dict[str, Tensor | None]) -> Tensor:
    """Encoder states (B, S, H) of any transformers encoder-decoder, with or without a language-model head.

    Args:
        model: with ``get_encoder()``.
        inputs: tensors under the encoder's own argument names; a mask it does not know is left out.

    Returns:
        (B, S, H), as the decoder reads them: projected to its width in composite models.

    Raises:
        UserError: an input other than the mask that the encoder does not know, such as an image beside the text.
    """
    encoder = model.get_encoder()
    known = known_arguments(encoder, inputs)
    unknown = sorted(inputs.keys() - known.keys() - {"attention_mask"})
    if unknown:
        problem = f"is nothing that the encoder of {type(model).__name__} reads"
        raise UserError("sources", unknown[0], problem, f"give {source_name(model)} alone")
    with biased_attention(encoder), _own_pass():
        return projected(model, encoder(**known).last_hidden_state)


@contextmanager
def _own_pass() -> Iterator[None]:
    token = OWN_PASS.set(True)
    try:
        yield
    finally:
        OWN_PASS.reset(token)


def projected(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Encoder states (B, S, H) at the decoder's width, in composite models of two parts of unlike widths."""
    projection = getattr(model, "enc_to_dec_proj", None)
    return states if projection is None else projection(states)


def states_mask(model: PreTrainedModel, states: Tensor, source_mask: Tensor | None) -> Tensor | None:
    """The mask (B, S') of encoder states (B, S', H), from that of the source (B, S), which a speech encoder shortens.

    Args:
        model: whose encoder made the states.
        states: (B, S', H).
        source_mask: (B, S), 1 where the source is real; or None.

    Raises:
        UserError: the lengths differ and the model has no rule for it.
    """
    if source_mask is None or source_mask.shape[1] == states.shape[1]:
        return source_mask
    for module in (model, model.base_model, model.get_encoder()):
        shortened = getattr(module, "_get_feature_vector_attention_mask", None)
        if shortened is not None:
            return shortened(states.shape[1], source_mask)
    what = f"{source_mask.shape[1]} long for {states.shape[1]} encoder states"
    problem = f"{type(model).__name__} says no way from the one to the other"
    raise UserError("attention_mask of the sources", what, problem, "leave the mask out, with sources of one length")


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows with their padding moved behind the real tokens, so that positions are those of the row by itself.

    A decoder with absolute positions (BART, Whisper, GPT-2 …) counts padding on the left as tokens even where a mask
    hides it.

    Args:
        ids: (R, T).
        mask: (R, T), 1 on the real tokens of each row; padding on either side.

    Returns:
        ids and mask (R, T), and the places (R, T) to ``gather`` results from to have them where the tokens were; None
        in its place where nothing was moved.
    """
    shift = mask.bool().int().argmax(dim=1, keepdim=True)
    if not shift.any():
        return ids, mask, None
    places = torch.arange(ids.shape[1], device=ids.device)
    order = (places + shift) % ids.shape[1]
    return ids.gather(1, order), mask.gather(1, order), (places - shift) % ids.shape[1]


def run_decoder(
    model: PreTrainedModel,
    states: Tensor,
    source_mask: Tensor | None,
    decoder_input_ids: Tensor,
    decoder_mask: Tensor | None,
) -> Tensor:
    """Decoder states (R, T, H) of any transformers encoder-decoder; those of a view come scaled for its head.

    Args:
        model: with ``get_decoder()``.
        states: (R, S, H) encoder states, a row for each row of the decoder.
        source_mask: (R, S) or None.
        decoder_input_ids: (R, T).
        decoder_mask: (R, T), or None where rows are padded on the right.

    Returns:
        (R, T, H); a row's states do not depend on which side its padding is.
    """
    decoder, back = decoder_trunk(model), None
    if decoder_mask is not None:
        decoder_input_ids, decoder_mask, back = left_aligned(decoder_input_ids, decoder_mask)
    inputs = {
        "input_ids": decoder_input_ids,
        "attention_mask": decoder_mask,
        "encoder_hidden_states": states,
        "encoder_attention_mask": states_mask(model, states, source_mask),
        "use_cache": False,
    }
    with biased_attention(decoder), _own_pass():
        result = decoder(**known_arguments(decoder, inputs)).last_hidden_state
    if back is not None:
        result = result.gather(1, back[..., None].expand_as(result))
    scale = model.__dict__.get("_view_scale", 1.0)
    return result if scale == 1.0 else result * scale


def spread_rows(tensor: Tensor | None, rows: int, order: Order | Tensor | None) -> Tensor | None:
    """(B, …) repeated to (rows, …): row r belongs to source r mod B (sample-major), r div K (source-major) or order[r].

    Args:
        tensor: (B, …) or None, which stays None.
        rows: R, how many are wanted.
        order: how they belong to the sources.

    Raises:
        ValueError: ``rows`` is not a multiple of B, or is above B without an order.
    """
    if tensor is None:
        return None
    if isinstance(order, Tensor):
        return tensor.index_select(0, order)
    sources = len(tensor)
    if sources == rows:
        return tensor
    if rows % sources:
        raise ValueError(f"{rows} rows cannot belong to {sources} sources in equal number")
    samples = rows // sources
    if order == "sample-major":
        return tensor.repeat(samples, *[1] * (tensor.dim() - 1))
    if order == "source-major":
        return tensor.repeat_interleave(samples, dim=0)
    raise ValueError(f"{rows} rows over {sources} sources: say order='sample-major' or 'source-major', not {order!r}")
