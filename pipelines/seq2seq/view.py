"""The view: an encoder-decoder model that today's alignment trainers can drive, and the few calls ours are made of.

``as_view`` swaps the class of a model in place. Parameters, ``state_dict``, ``generate`` and the architecture that
``save_pretrained`` writes stay those of the plain class. New is that a forward with the source as *side inputs*,

    model(input_ids=[decoder_start; completion], encoder_input_ids=source, encoder_attention_mask=mask)

encodes each source once, decodes K completions of it, and answers with decoder states. That is the call which TRL's
trainers make of a causal language model's backbone (``trl.trainer.utils.add_fused_lm_head``): they train it as it is.
Rows are sample-major; where sources have unequal numbers of them, ``encoder_rows`` says each row's source (R,), or
``source-major``. A source that is not text goes in under its own name: ``encoder_input_features`` (speech),
``encoder_pixel_values``.

Nothing here goes by model names. Encoder and decoder come from transformers' ``get_encoder`` and ``get_decoder``, the
encoder's input goes in under the model's own ``main_input_name``, and the path from decoder states to logits (T5's
d_model^-1/2, BART's ``final_logits_bias``, Gemma's soft cap) is *measured* once against the model's own forward: an
architecture whose logits are made in another way is refused in one line instead of being trained wrongly.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput

from pipelines.errors import UserError
from pipelines.seq2seq.attention import biased_attention
from pipelines.seq2seq.losses import token_log_probs

Order = Literal["sample-major", "source-major"]
"""How R = K·B rows belong to B sources: ``sample-major`` puts sample k of source b into row k·B + b (TRL's
``[chosen; rejected]``), ``source-major`` into row b·K + k (``generate(num_return_sequences=K)``). Where sources have
unequal numbers of rows, an (R,) tensor of source numbers takes its place."""

_SIDE = "encoder_"


class _ScoringHead(NamedTuple):
    """The two tensors that TRL's fused head reads from ``get_output_embeddings()``."""

    weight: Tensor
    bias: Tensor


class EncoderDecoderView:
    """Mixin put in front of a plain class by ``as_view``; it is never instantiated by itself."""

    _plain_class: type[PreTrainedModel]

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The swapped class is made at run time and shares its plain class's name, so pickle and deepcopy could not
        # find it by that name: they rebuild it from the plain class.
        return _rebuild, (self._plain_class,), self.__dict__

    def get_decoder(self) -> nn.Module:
        """The module that makes the decoder's states; composite models hold a whole language model there."""
        return decoder_trunk(super())

    def get_output_embeddings(self) -> Any:
        """The model's own head; once after a scoring forward, the head with ``final_logits_bias`` as its bias."""
        head = super().get_output_embeddings()
        owner = self.base_model.__dict__
        if owner.pop("_view_scored", False) and getattr(self, "final_logits_bias", None) is not None:
            return _ScoringHead(head.weight, _head_bias(self, head))
        return head


def _scoring_forward(plain_class: type[PreTrainedModel]) -> Any:
    from pipelines.seq2seq.shared_attention import decode_shared  # it is made of what stands here

    plain_forward = plain_class.forward

    # The signature stays the plain one: `generate` and the Trainer validate their arguments against it.
    @functools.wraps(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not any(name.startswith(_SIDE) and name not in _PLAIN_SIDE for name in kwargs):
            return plain_forward(self, *args, **kwargs)
        if args:
            raise TypeError("a forward with encoder side inputs takes keyword arguments only")
        side = {name.removeprefix(_SIDE): value for name, value in kwargs.items() if name.startswith(_SIDE)}
        if kwargs.get("decoder_input_ids") is not None or kwargs.get("decoder_inputs_embeds") is not None:
            raise TypeError("with encoder side inputs the decoder reads input_ids, not decoder_input_ids")
        order = side.pop("rows", "sample-major")
        states = run_encoder(self, side)
        decoder_input_ids = kwargs["input_ids"]
        result = decode_shared(
            self, states, side.get("attention_mask"), decoder_input_ids, kwargs.get("attention_mask"), order=order
        )
        self.__dict__["_view_scored"] = True
        return Seq2SeqModelOutput(last_hidden_state=result, encoder_last_hidden_state=states)

    return forward


# Arguments of plain forwards that begin like a side input.
_PLAIN_SIDE = frozenset({"encoder_outputs", "encoder_hidden_states", "encoder_attention_mask"})


@functools.cache
def _view_class(plain_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(
        plain_class.__name__,
        (EncoderDecoderView, plain_class),
        {
            "__module__": plain_class.__module__,
            "__qualname__": plain_class.__qualname__,
            "__doc__": plain_class.__doc__,
            "_plain_class": plain_class,
            "forward": _scoring_forward(plain_class),
        },
    )


def _rebuild(plain_class: type[PreTrainedModel]) -> Any:
    view = _view_class(plain_class)
    return view.__new__(view)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside ``DistributedDataParallel`` and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def as_view(model: PreTrainedModel) -> PreTrainedModel:
    """Swap the class of an encoder-decoder model for its view, in place.

    Idempotent; adds no parameter and no buffer; a PEFT model is entered. ``type(model).__name__`` and what
    ``save_pretrained`` writes stay those of the plain class.

    Args:
        model: an encoder-decoder with a language-model head (``AutoModelForSeq2SeqLM``, speech, vision).

    Returns:
        The same object.

    Raises:
        UserError: not an encoder-decoder, or one whose logits are not a linear head on its decoder's states.
    """
    inner = unwrap(model)
    if isinstance(inner, EncoderDecoderView):
        return model
    name = type(inner).__name__
    if not getattr(inner.config, "is_encoder_decoder", False):
        mend = "give an encoder-decoder such as T5, BART or Pegasus"
        raise UserError("model", name, "not an encoder-decoder (it has no encoder to read the source)", mend)
    if inner.get_output_embeddings() is None:
        raise UserError("model", name, "has no language-model head", "give a …ForConditionalGeneration checkpoint")
    # Looked up before the swap: afterwards the base model's `get_encoder` must go on finding the same modules.
    scale = _measured_scale(inner)
    base = inner.base_model
    for module in {id(m): m for m in (base, inner)}.values():
        module.__class__ = _view_class(type(module))
        module.__dict__["_view_scale"] = scale
    return model


def _head_bias(model: PreTrainedModel, head: nn.Module) -> Tensor:
    bias = model.final_logits_bias.view(-1).to(head.weight.device)
    return bias if getattr(head, "bias", None) is None else bias + head.bias


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


def run_encoder(model: PreTrainedModel, inputs: dict[str, Tensor | None]) -> Tensor:
    """Encoder states (B, S, H) of any transformers encoder-decoder, with or without a language-model head.

    Args:
        model: with ``get_encoder()``.
        inputs: tensors under the encoder's own argument names; a mask it does not know is left out.

    Returns:
        (B, S, H), as the decoder reads them: projected to its width in composite models.
    """
    encoder = model.get_encoder()
    with biased_attention(encoder):
        return projected(model, encoder(**known_arguments(encoder, inputs)).last_hidden_state)


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
        ValueError: the lengths differ and the model has no rule for it.
    """
    if source_mask is None or source_mask.shape[1] == states.shape[1]:
        return source_mask
    for module in (model, model.base_model, model.get_encoder()):
        shortened = getattr(module, "_get_feature_vector_attention_mask", None)
        if shortened is not None:
            return shortened(states.shape[1], source_mask)
    raise ValueError(f"a mask of length {source_mask.shape[1]} for {states.shape[1]} encoder states: give None")


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
    with biased_attention(decoder):
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


@torch.no_grad()
def _measured_scale(model: PreTrainedModel) -> float:
    """The factor on decoder states that makes ``output_logits`` the model's logits, by trial on three tokens.

    Raises:
        UserError: no known factor does.
    """
    name = type(model).__name__
    mend = "use a T5, BART, Pegasus, Marian or like model, or write its path in pipelines/seq2seq/view.py"
    try:
        encoder, decoder = model.get_encoder(), decoder_trunk(model)
        head = model.get_output_embeddings()
        width = getattr(encoder.config, "hidden_size", None) or encoder.config.d_model
    except (AttributeError, NotImplementedError) as error:
        raise UserError("model", name, f"its encoder, decoder and head cannot be told apart ({error})", mend) from None
    if encoder is model or decoder is model:
        raise UserError("model", name, "its encoder and decoder cannot be told apart", mend)
    if head.weight.numel() == 0 or head.weight.is_meta:
        # Parameters that are elsewhere (ZeRO-3, meta device) cannot be measured: go by what the configuration says.
        return model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0
    device, dtype = head.weight.device, next(encoder.parameters()).dtype
    # Fixed numbers, not random ones: loading a model must not move any generator.
    states = torch.sin(torch.arange(4 * width, device=device, dtype=torch.float32)).view(1, 4, width).to(dtype)
    ids = torch.arange(3, device=device)[None] % head.weight.shape[0]
    with _evaluating(model):
        try:
            encoded = BaseModelOutput(last_hidden_state=states)
            wanted = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits.float()
            result = run_decoder(model, projected(model, states), None, ids, None)
        except Exception as error:  # whatever an architecture of another kind says to a plain encoder's output
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError("model", name, f"cannot be decoded from encoder states alone ({reason})", mend) from error
        tolerance = (1e-3 if head.weight.dtype == torch.float32 else 5e-2) * wanted.abs().max().clamp(min=1e-6)
        for scale in (1.0, result.shape[-1] ** -0.5):
            found = output_logits(model, result * scale).float()
            if found.shape == wanted.shape and (found - wanted).abs().max() <= tolerance:
                return scale
    raise UserError("model", name, "its logits are not its output embedding on its decoder's states", mend)


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def encode(model: Any, source_ids: Tensor, source_mask: Tensor | None) -> Tensor:
    """Encoder states of a batch of sources.

    Args:
        model: a view, or a PEFT model around one.
        source_ids: (B, S) token ids, or whatever the model's ``main_input_name`` takes (features, pixels).
        source_mask: (B, S), 1 where a token is real; None for encoders without a mask.

    Returns:
        (B, S, H) states.
    """
    inner = unwrap(model)
    return run_encoder(inner, {inner.main_input_name: source_ids, "attention_mask": source_mask})


def decode(
    model: Any,
    encoder_states: Tensor,
    source_mask: Tensor | None,
    decoder_input_ids: Tensor,
    decoder_mask: Tensor | None = None,
    *,
    order: Order | Tensor | None = None,
) -> Tensor:
    """Decoder states of R = K·B rows over B encoded sources, scaled so that ``output_logits`` gives the model's logits.

    Args:
        model: a view, or a PEFT model around one.
        encoder_states: (B, S, H) from ``encode``; each is used for K rows.
        source_mask: (B, S) or None.
        decoder_input_ids: (R, T), beginning with the decoder's start token.
        decoder_mask: (R, T), 1 where real; None is right for rows padded on the right, as a decoder looks back only.
        order: how rows belong to sources; needed where R is not B.

    Returns:
        (R, T, H) states.

    Raises:
        ValueError: R is not a multiple of B, or R > B without an order.
    """
    inner = unwrap(model)
    if not isinstance(inner, EncoderDecoderView):
        raise TypeError(f"{type(inner).__name__} is not a view: call as_view(model) first")
    rows = len(decoder_input_ids)
    states, mask = spread_rows(encoder_states, rows, order), spread_rows(source_mask, rows, order)
    return run_decoder(inner, states, mask, decoder_input_ids, decoder_mask)


def output_logits(model: Any, states: Tensor) -> Tensor:
    """Logits (…, V) of decoder states (…, H) from ``decode``: output embedding, ``final_logits_bias``, soft cap."""
    inner = unwrap(model)
    logits = inner.lm_head(states) if isinstance(getattr(inner, "lm_head", None), nn.Module) else None
    if logits is None:
        logits = inner.get_output_embeddings()(states)
    bias = getattr(inner, "final_logits_bias", None)
    if bias is not None:
        logits = logits + bias.view(-1).to(logits.device)
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def decoder_start_id(model: Any) -> int:
    """The token every decoder row begins with.

    Raises:
        UserError: the model's configuration names none.
    """
    inner = unwrap(model)
    for settings in (inner.config, getattr(inner, "generation_config", None), inner.config.get_text_config()):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(settings, name, None) if settings is not None else None
            if value is not None:
                return int(value)
    mend = "set decoder_start_token_id in its config.json"
    raise UserError("model", type(inner).__name__, "its configuration names no decoder_start_token_id", mend)


def decoder_inputs(model: Any, completion_ids: Tensor) -> Tensor:
    """``[decoder_start; completion[:-1]]`` (R, T): what the decoder reads to predict ``completion_ids`` (R, T)."""
    start = completion_ids.new_full((len(completion_ids), 1), decoder_start_id(model))
    return torch.cat([start, completion_ids[:, :-1]], dim=1)


def sequence_log_probs(
    model: Any,
    encoder_states: Tensor,
    source_mask: Tensor | None,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    order: Order | Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Per-token log-probabilities of completions, teacher-forced: log π(y_t | y_<t, x).

    Args:
        model: a view, or a PEFT model around one.
        encoder_states: (B, S, H) from ``encode``.
        source_mask: (B, S) or None.
        completion_ids: (R, T) padded on either side, without the decoder's start token, with the end token if it came.
        completion_mask: (R, T), 1 on the real tokens.
        order: how the R rows belong to the B sources; needed where R is not B.
        temperature: the logits are divided by it.

    Returns:
        (R, T) in fp32, 0 where the mask is 0. The head is applied to the real positions only.
    """
    ids, mask, back = left_aligned(completion_ids, completion_mask.bool())
    states = decode(model, encoder_states, source_mask, decoder_inputs(model, ids), order=order)
    found = token_log_probs(output_logits(model, states[mask]), ids[mask], temperature=temperature)
    found = found.new_zeros(mask.shape).masked_scatter(mask, found)
    return found if back is None else found.gather(1, back)


def in_shards(model: nn.Module) -> bool:
    """Whether the parameters are in shards (ZeRO-3, FSDP), which only the sharded model's own forward may touch."""
    return any(p.numel() == 0 or isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())


@torch.no_grad()
def check_log_probs(
    model: Any,
    sources: dict[str, Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    found: Tensor,
    *,
    temperature: float = 1.0,
) -> None:
    """Compare log-probabilities with the plain class's teacher-forced ones: the guard against silent failures.

    A completion scored without its source, against a shifted label or through half a head gives an entropy near ln V
    and a loss that falls all the same. The trainers therefore check their first batch.

    Args:
        model: a view, or a PEFT model around one.
        sources: (R, …) each under its name in the plain class's forward, one for every row.
        completion_ids: (R, T) padded on the right, without a start token.
        completion_mask: (R, T), 1 on the real tokens.
        found: (R, T) log-probabilities to check, made without dropout.
        temperature: what the logits were divided by.

    Raises:
        RuntimeError: they differ.
    """
    inner, mask = unwrap(model), completion_mask.bool()
    if in_shards(inner):
        return
    with _evaluating(inner):
        given = {"decoder_input_ids": decoder_inputs(inner, completion_ids), "use_cache": False}
        plain = inner._plain_class.forward(inner, **sources, **given).logits
    wanted = token_log_probs(plain, completion_ids, temperature=temperature)[mask]
    if not torch.isfinite(wanted).all():
        return  # a diverged model is another mistake, and named as such by the trainers
    exact = plain.dtype == torch.float32
    gap = (found.float()[mask] - wanted).abs()
    if not (gap <= (1e-3 if exact else 0.3) + (1e-3 if exact else 0.1) * wanted.abs()).all():
        name, gap = type(inner).__name__, gap.max().item()
        raise RuntimeError(f"log-probabilities differ from those of {name} itself by {gap:.3g}")


_DROPS = ("dropout", "layerdrop", "drop_prob", "drop_path")


def silence_dropout(model: nn.Module) -> nn.Module:
    """Switch off every dropout of a model in place, also those held as plain numbers.

    TRL's ``disable_dropout_in_model`` zeroes ``nn.Dropout`` modules but misses numbers such as ``T5Attention.dropout``,
    which attention reads in training mode: two passes then differ and the first PPO ratio is not 1. Layer drop counts
    too. The configuration keeps its values, so a saved checkpoint still says what the model was made with.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in _DROPS):
                setattr(module, name, 0.0)
    return model
