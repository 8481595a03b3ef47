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
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput

from pipelines.errors import UserError
from pipelines.seq2seq.lean import lean_layers
from pipelines.seq2seq.losses import token_log_probs
from pipelines.seq2seq.stacks import (
    Order,
    decoder_trunk,
    left_aligned,
    projected,
    run_decoder,
    run_encoder,
    source_name,
    spread_rows,
    states_width,
    unwrap,
)

_SIDE = "encoder_"


class _ScoringHead(NamedTuple):
    """The two tensors that TRL's fused head reads from ``get_output_embeddings()``."""

    weight: Tensor
    bias: Tensor


@dataclass
class _Encoded(BaseModelOutput):
    """An encoder's output that also answers where a speech model asks it for the mask of its shortened states."""

    attention_mask: Tensor | None = None


class EncoderDecoderView:
    """Mixin put in front of a plain class by ``as_view``; it is never instantiated by itself."""

    _plain_class: type[PreTrainedModel]

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The swapped class is made at run time and shares its plain class's name, so pickle and deepcopy could not
        # find it by that name: they rebuild it from the plain class.
        return _rebuild, (self._plain_class,), self.__dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # T5's base model is the model itself, so TRL's head calls the model from within its own forward. Accelerate has
        # put that forward into one autocast context, which, entered twice, forgets what was before it: autocast would
        # stay on for all that follows in the process, whatever precision it asks for.
        if self.__dict__.get("_view_running"):
            return type(self).forward(self, *args, **kwargs)
        self.__dict__["_view_running"] = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.__dict__.pop("_view_running", None)

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
    lean_layers(inner)
    return model


def _head_bias(model: PreTrainedModel, head: nn.Module) -> Tensor:
    bias = model.final_logits_bias.view(-1).to(head.weight.device)
    return bias if getattr(head, "bias", None) is None else bias + head.bias


@torch.no_grad()
def _measured_scale(model: PreTrainedModel) -> float:
    """The factor on decoder states that makes ``output_logits`` the model's logits, by trial on a few tokens.

    Tried are made-up encoder states and, where that can be, a whole source.

    Raises:
        UserError: no known factor does.
    """
    name = type(model).__name__
    mend = "use a T5, BART, Pegasus, Marian or like model, or write its path in pipelines/seq2seq/view.py"
    try:
        encoder, decoder = model.get_encoder(), decoder_trunk(model)
        head = model.get_output_embeddings()
        width = states_width(encoder)
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
    compared = []
    with _evaluating(model):
        try:
            encoded = _Encoded(last_hidden_state=states)
            wanted = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
            compared.append((wanted, run_decoder(model, projected(model, states), None, ids, None)))
            source = _probe(model, encoder, ids)
            if source:
                wanted = model(**source, decoder_input_ids=ids, use_cache=False).logits
                read = run_encoder(model, source)
                compared.append((wanted, run_decoder(model, read, source.get("attention_mask"), ids, None)))
        except Exception as error:  # whatever an architecture of another kind says
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problem = f"cannot be driven by a source and a completion alone ({reason})"
            raise UserError("model", name, problem, mend) from error
        for scale in (1.0, compared[0][1].shape[-1] ** -0.5):
            if all(_alike(output_logits(model, result * scale), wanted) for wanted, result in compared):
                return scale
    raise UserError("model", name, "its logits are not its output embedding on its decoder's states", mend)


def _probe(model: PreTrainedModel, encoder: nn.Module, ids: Tensor) -> dict[str, Tensor] | None:
    """A source to try a model on, where one can be made without its preprocessor: three tokens, or a grey image."""
    name = source_name(model)
    if name == "input_ids":
        return {name: ids, "attention_mask": torch.tensor([[1, 1, 0]], device=ids.device)}
    size = getattr(encoder.config, "image_size", None)
    if name != "pixel_values" or size is None:
        return None
    size = (size, size) if isinstance(size, int) else tuple(size)
    dtype = next(encoder.parameters()).dtype
    return {name: torch.full((1, encoder.config.num_channels, *size), 0.5, device=ids.device, dtype=dtype)}


def _alike(found: Tensor, wanted: Tensor) -> bool:
    found, wanted, exact = found.float(), wanted.float(), wanted.dtype == torch.float32
    tolerance = (1e-3 if exact else 5e-2) * wanted.abs().max().clamp(min=1e-6)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance)


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
        source_ids: (B, S) token ids, or whatever else its encoder reads (features, pixels; see ``source_name``).
        source_mask: (B, S), 1 where a token is real; None for encoders without a mask.

    Returns:
        (B, S, H) states.
    """
    inner = unwrap(model)
    return run_encoder(inner, {source_name(inner): source_ids, "attention_mask": source_mask})


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
    """Logits of decoder states: output embedding, ``final_logits_bias``, soft cap.

    Args:
        model: a view, or a PEFT model around one.
        states: (…, H) from ``decode``.

    Returns:
        (…, V), those of the model's own forward.
    """
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
    """What the decoder reads to predict completions.

    Args:
        model: whose start token it is.
        completion_ids: (R, T) without a start token.

    Returns:
        (R, T), ``[decoder_start; completion[:-1]]``.
    """
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
        (R, T) in fp32 and nats, 0 where the mask is 0. The head is applied to the real positions only.
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
# What speech encoders read from their configuration whenever they are in training mode.
_DROPS_OF_SPEECH = ("layerdrop", "speech_encoder_layerdrop", "apply_spec_augment")


def silence_dropout(model: nn.Module) -> nn.Module:
    """Switch off every dropout of a model in place, also those held as plain numbers.

    TRL's ``disable_dropout_in_model`` zeroes ``nn.Dropout`` modules but misses numbers such as ``T5Attention.dropout``,
    which attention reads in training mode: two passes then differ and the first PPO ratio is not 1. Layer drop counts
    too. An encoder of speech that also masks its features, normalizes over the batch or keeps such a number in its
    configuration stays in evaluation mode. The configuration keeps its values, so a saved checkpoint still says what
    the model was made with.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in _DROPS):
                setattr(module, name, 0.0)
    encoder = unwrap(model).get_encoder()
    settings = getattr(encoder, "config", None)
    if any(getattr(settings, name, False) for name in _DROPS_OF_SPEECH) or any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()
    ):
        encoder.eval()
        encoder.train = MethodType(_stay, encoder)
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of ``train``: leaves a module in evaluation mode."""
    return module
