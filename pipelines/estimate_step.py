"""What a training step needs: the step itself is run, on tensors that have shapes and no values.

No formula of an architecture stands here. The model, the attention and the losses that training uses go through their
forward and backward pass under PyTorch's ``FakeTensorMode``; counted are the bytes of all tensors that live at a time
and the floating-point operations of the matrix products. So it works for every encoder-decoder, within seconds, without
weights, and whatever its size without the memory.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.estimate_count import Kernels, TensorMemory, as_on, little_garbage

Kind = Literal["sft", "pretrain", "reward", "dpo", "listwise", "ppo", "grpo", "rloo"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a step on one device.

    Attributes:
        kind: which stage's step.
        sources: documents of one forward pass.
        rows: decoder rows of one forward pass (summaries).
        source_length: tokens of a document.
        target_length: tokens of a summary, its end mark included.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        accumulation: forward passes for one optimizer step.
        checkpointing: activations are recomputed in the backward pass.
        lora_r: rank of the adapters; 0 trains all parameters.
        online_reference: the reference scores each batch.
        train_encoder: False leaves the policy's encoder out of the training.
        separate_critic: the critic has a trunk of its own.
        device: whose attention, dropout and losses are taken: ``cpu`` or ``cuda``.
    """

    kind: Kind
    sources: int
    rows: int
    source_length: int
    target_length: int
    precision: str = "fp32"
    accumulation: int = 1
    checkpointing: bool = False
    lora_r: int = 0
    online_reference: bool = False
    train_encoder: bool = True
    separate_critic: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Cost:
    """What one step takes on one device.

    Attributes:
        parameters: of the trained model, the critic's among them.
        trained: those that are trained.
        frozen_bytes: of a second copy that serves as reference.
        largest_block: parameters of the largest layer that FSDP gathers at a time.
        outside_blocks: parameters outside such layers (embeddings, head), which it gathers for the whole step.
        forward_bytes: activations held at the end of the forward pass.
        peak_bytes: most bytes of activations, gradients and what operations make in passing, at once.
        flops: of forward and backward pass, all ``accumulation`` of them, and the reference's.
        factored: numbers of Adafactor's state.
    """

    parameters: int
    trained: int
    frozen_bytes: int
    largest_block: int
    outside_blocks: int
    forward_bytes: int
    peak_bytes: int
    flops: int
    factored: int


def _autocast(shape: Shape) -> Any:
    if shape.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if shape.precision == "bf16" else torch.float16)


def _ids(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.ones((rows, length), dtype=torch.long)
    return ids, torch.ones_like(ids)


def _materialized(module: nn.Module) -> nn.Module:
    """Put tensors of the fake mode that is active in the place of parameters and buffers without values."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    wanted = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(fresh, wanted) if isinstance(tensor, nn.Parameter) else fresh
                table[name] = made[id(tensor)]
    return module


def _lean(model: nn.Module) -> None:
    """``lean_layers`` for a model without values: what it tries on every layer is tried on one of each kind."""
    from pipelines.seq2seq.lean import candidate, lean_class, mixin_for

    tried: dict[Any, type | None] = {}
    for module in model.modules():
        if candidate(module) is None:
            continue
        kind = type(module), tuple(p.shape for p in module.parameters())
        if kind not in tried:
            real = copy.deepcopy(module).to_empty(device="cpu")
            for parameter in real.parameters():
                nn.init.constant_(parameter, 0.01)
            tried[kind] = mixin_for(real)
        if tried[kind] is not None:
            module.__class__ = lean_class(tried[kind], type(module))


def _build(config: Any, shape: Shape) -> nn.Module:
    """The module that the stage trains, in the state that training has it in."""
    from pipelines.estimate_models import empty_model

    if shape.kind == "reward":
        from pipelines.seq2seq.reward_model import EncoderDecoderRewardConfig, EncoderDecoderRewardModel

        with torch.device("meta"):
            model = EncoderDecoderRewardModel(EncoderDecoderRewardConfig(backbone=config, decoder_start_token_id=0))
        if shape.device == "cpu":
            _lean(model)
        return model
    model = empty_model(config)
    if shape.kind == "pretrain" and shape.device == "cpu":
        from pipelines.seq2seq.pretrain_speed import train_fast_on_cpu

        train_fast_on_cpu(model, shape.precision)
    if shape.kind in ("sft", "pretrain"):
        return model
    from pipelines.seq2seq.view import as_view, silence_dropout

    as_view(model)
    silence_dropout(model)
    if shape.device == "cpu":
        _lean(model)
    if shape.lora_r:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            adapters = LoraConfig(task_type="SEQ_2_SEQ_LM", r=shape.lora_r, target_modules="all-linear")
            model = get_peft_model(model, adapters, low_cpu_mem_usage=True)
    if shape.kind == "ppo":
        from pipelines.seq2seq.actor_critic import ActorCritic

        with torch.device("meta"):
            model = ActorCritic(model, separate_critic=shape.separate_critic, train_encoder=shape.train_encoder)
    return model


def _views(module: nn.Module) -> Iterator[Any]:
    from pipelines.seq2seq.stacks import unwrap
    from pipelines.seq2seq.view import EncoderDecoderView

    for part in module.modules():
        if isinstance(part, EncoderDecoderView):
            yield unwrap(part)


def _share_sources(module: nn.Module, shape: Shape) -> None:
    """Answer what is otherwise tried on values: whether completions attend to one copy of their source."""
    for view in _views(module):
        base = view.base_model
        base.__dict__["_shares_sources"] = base.get_decoder().config._attn_implementation == "sdpa"


def _checkpoint(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "gradient_checkpointing_enable") and hasattr(part, "config"):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return


def _scored(model: Any, shape: Shape) -> Tensor:
    """Log-probabilities (R, T) of R summaries, as the trainer of pairs or lists has them."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    from pipelines.seq2seq.scoring import _LARGEST, TokenScores
    from pipelines.seq2seq.stacks import unwrap

    inner = unwrap(model)
    source, mask = _ids(shape.sources, shape.source_length)
    ids, _ = _ids(shape.rows, shape.target_length)
    inputs = {"input_ids": ids, "encoder_input_ids": source, "encoder_attention_mask": mask, "use_cache": False}
    states = inner.base_model(**inputs).last_hidden_state
    head = inner.get_output_embeddings()
    flat, tokens = states.reshape(-1, states.shape[-1]), ids.reshape(-1)
    whole = shape.device == "cpu" and shape.precision == "fp32" and tokens.numel() <= _LARGEST // len(head.weight)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    if whole:
        found = TokenScores.apply(flat, head.weight, head.bias, tokens, outputs[1:])
    else:
        size = _CHUNKED_LOGPROB_CHUNK_SIZE
        found = _ChunkedLogProbFunction.apply(flat, head.weight, head.bias, tokens, 1.0, size, None, 1.0, outputs)
    return found[0].view(ids.shape)


def _policy(model: Any, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (R, T) of R summaries and their values, as the trainers that sample have them."""
    from pipelines.seq2seq.actor_critic import ActorCritic
    from pipelines.seq2seq.losses import token_log_probs
    from pipelines.seq2seq.shared_attention import decode_shared
    from pipelines.seq2seq.view import encode, output_logits

    source, mask = _ids(shape.sources, shape.source_length)
    ids, _ = _ids(shape.rows, shape.target_length)
    whole = isinstance(model, ActorCritic)
    policy = model.policy if whole else model
    with contextlib.nullcontext() if not whole or model.train_encoder else torch.no_grad():
        encoded = encode(policy, source, mask)
    states = decode_shared(policy, encoded, mask, ids, order="source-major").flatten(0, 1)
    log_probs = token_log_probs(output_logits(policy, states), ids.flatten()).view(ids.shape)
    if not whole:
        return log_probs, None
    if model.critic is not None:
        own = encode(model.critic, source, mask)
        states = decode_shared(model.critic, own, mask, ids, order="source-major").flatten(0, 1)
    return log_probs, model.value_head(states).view(ids.shape)


def _loss(model: Any, shape: Shape) -> Tensor:
    """The loss of one forward pass."""
    import torch.nn.functional as F

    if shape.kind in ("sft", "pretrain"):
        source, mask = _ids(shape.sources, shape.source_length)
        ids, _ = _ids(shape.rows, shape.target_length)
        outputs = model(input_ids=source, attention_mask=mask, decoder_input_ids=ids)
        if shape.kind == "pretrain":
            from pipelines.seq2seq.pretrain_speed import SummedCrossEntropy

            return SummedCrossEntropy.apply(outputs.logits, ids) / ids.numel()
        # As accelerate gives it: in fp32, beside what the model made.
        logits = outputs.logits.float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), ids.reshape(-1), reduction="sum") / ids.numel()
    if shape.kind == "reward":
        from pipelines.seq2seq.losses import bradley_terry_loss

        source, mask = _ids(shape.sources, shape.source_length)
        ids, mask_ids = _ids(shape.rows, shape.target_length)
        states = model.encode(source, mask)
        chosen, rejected = model._scores(states, mask, ids, mask_ids, "sample-major").chunk(2)
        return bradley_terry_loss(chosen, rejected).mean()
    if shape.kind in ("dpo", "listwise"):
        sums = _scored(model, shape).sum(1)
        return -F.logsigmoid(sums[: shape.sources] - sums[-shape.sources :]).mean()
    log_probs, values = _policy(model, shape)
    loss = -torch.min(log_probs.exp(), log_probs.exp().clamp(0.8, 1.2)).mean()
    return loss if values is None else loss + 0.1 * values.square().mean()


def _blocks(module: nn.Module) -> tuple[int, int]:
    """Parameters of the largest repeated layer, and of all that lies outside such layers."""
    layers = [layer for part in module.modules() if isinstance(part, nn.ModuleList) for layer in part]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    return largest, sum(p.numel() for p in module.parameters() if id(p) not in inside)


def _factored(parameters: Iterator[Tensor]) -> int:
    """Numbers that Adafactor keeps: a row and a column for a matrix (Shazeer and Stern 2018, §3)."""
    return sum(
        p.numel() if p.dim() < 2 else p.shape[:-1].numel() + (p.shape[:-2] + p.shape[-1:]).numel() for p in parameters
    )


# A model of more layers is run at these two depths; what its other layers take follows.
_SHALLOW, _DEEPER = 1, 2
_DEPTHS = (("num_layers", "num_decoder_layers"), ("encoder_layers", "decoder_layers"))


def _depths(config: Any) -> tuple[int, int] | None:
    """Layers of encoder and decoder, where they can be changed."""
    for names in _DEPTHS:
        found = [getattr(config, name, None) for name in names]
        if all(isinstance(value, int) for value in found):
            return found[0], found[1]
    if config.model_type.startswith("t5gemma") and hasattr(config.encoder, "num_hidden_layers"):
        return config.encoder.num_hidden_layers, config.decoder.num_hidden_layers
    return None


def _of_depths(config: Any, encoder: int, decoder: int) -> Any:
    """The configuration of the same model with other numbers of layers."""
    plain = config.to_dict()
    if "scale_decoder_outputs" in plain:
        plain["tie_word_embeddings"] = plain.pop("scale_decoder_outputs")  # by which T5 tells v1.1 from itself
    if config.model_type.startswith("t5gemma"):
        for side, layers in (("encoder", encoder), ("decoder", decoder)):
            plain[side] = {**plain[side], "num_hidden_layers": layers, "layer_types": None}
        return type(config)(**plain)
    for names in _DEPTHS:
        if all(isinstance(plain.get(name), int) for name in names):
            plain |= dict(zip(names, (encoder, decoder), strict=True))
    return type(config)(**plain)


def _extended(config: Any, run: Callable[[Any], Any], combine: Callable[[list[Any], list[float]], Any]) -> Any:
    """``run`` on a model, or what follows for it from runs on shallower ones: every layer takes what its like takes.

    Args:
        config: of the model.
        run: gives what a model takes.
        combine: (what was found, weights that sum to 1) -> the same for the whole model.
    """
    depths = _depths(config)
    if depths is None or max(depths) <= 2 * _DEEPER:
        return run(config)
    if depths[0] == depths[1]:
        found = [run(_of_depths(config, layers, layers)) for layers in (_SHALLOW, _DEEPER)]
        more = (depths[0] - _SHALLOW) / (_DEEPER - _SHALLOW)
        return combine(found, [1 - more, more])
    pairs = ((_SHALLOW, _SHALLOW), (_DEEPER, _SHALLOW), (_SHALLOW, _DEEPER))
    found = [run(_of_depths(config, *pair)) for pair in pairs]
    more = [(layers - _SHALLOW) / (_DEEPER - _SHALLOW) for layers in depths]
    return combine(found, [1 - sum(more), *more])


def _combined(found: list[Cost], weights: list[float]) -> Cost:
    def sum_of(name: str) -> int:
        return round(sum(getattr(cost, name) * weight for cost, weight in zip(found, weights, strict=True)))

    whole = {field.name: sum_of(field.name) for field in fields(Cost)}
    whole["largest_block"], whole["outside_blocks"] = found[-1].largest_block, found[-1].outside_blocks
    # In a deep model the gradients may outgrow what is largest in a shallow one, the activations at the loss.
    left = min(cost.peak_bytes - 4 * cost.trained for cost in found)
    whole["peak_bytes"] = max(whole["peak_bytes"], whole["forward_bytes"], 4 * whole["trained"] + max(left, 0))
    return Cost(**whole)


_FOUND: dict[tuple[str, Shape], Cost] = {}


def measure(config: Any, shape: Shape) -> Cost:
    """Run a step without values and say what it takes.

    Args:
        config: of the encoder-decoder.
        shape: of the step.
    """
    key = config.to_json_string(use_diff=False), shape
    if key not in _FOUND:
        _FOUND[key] = _extended(config, lambda each: measure_whole(each, shape), _combined)
    return _FOUND[key]


def measure_whole(config: Any, shape: Shape) -> Cost:
    """``measure`` with every layer run."""
    module = _build(config, shape)
    with FakeTensorMode(), as_on(shape.device) as kernels, little_garbage():
        return _measured(_materialized(module), shape, kernels)


def _measured(module: nn.Module, shape: Shape, kernels: Kernels | None) -> Cost:
    _share_sources(module, shape)
    module.train()
    if shape.checkpointing:
        _checkpoint(module)
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    reference = _forward(module, shape)
    memory = TensorMemory()
    memory.know(iter([*parameters, *module.buffers()]))
    held = 0
    if kernels:
        kernels.taken()
    with memory:
        for _ in range(min(shape.accumulation, 2)):
            if shape.online_reference:
                reference()
            with _autocast(shape):
                loss = _loss(module, shape)
            gc.collect()
            held = max(held, memory.now)
            loss.backward()
            del loss
            gc.collect()
    done, beside = min(shape.accumulation, 2), kernels.taken() if kernels else 0
    frozen = sum(p.numel() for p in parameters if not _is_value_head(module, p))
    largest, outside = _blocks(module)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        frozen_bytes=4 * frozen,
        largest_block=largest,
        outside_blocks=outside,
        forward_bytes=held,
        peak_bytes=memory.peak,
        flops=(memory.flops + beside) * shape.accumulation // done,
        factored=_factored(iter(trained)),
    )


def _is_value_head(module: nn.Module, parameter: nn.Parameter) -> bool:
    own = [*getattr(module, "value_parameters", list)(), *getattr(module, "score_head", nn.Module()).parameters()]
    return any(parameter is p for p in own)


def _forward(module: Any, shape: Shape) -> Callable[[], None]:
    """A forward pass without gradients, as the reference makes it."""

    def run() -> None:
        with torch.no_grad(), _autocast(shape):
            if shape.kind in ("ppo", "grpo", "rloo"):
                _policy(module, shape)
            elif shape.kind in ("dpo", "listwise"):
                _scored(module, shape)
            else:
                _loss(module, shape)

    return run


def forward_peak(config: Any, shape: Shape) -> tuple[int, int]:
    """Most bytes that a forward pass without gradients holds at once, and its floating-point operations.

    Args:
        config: of the encoder-decoder.
        shape: of the pass.
    """

    def run(config: Any) -> tuple[int, int]:
        module = _build(config, shape)
        with FakeTensorMode(), as_on(shape.device) as kernels, little_garbage():
            _materialized(module)
            _share_sources(module, shape)
            module.eval()
            memory = TensorMemory()
            memory.know(iter([*module.parameters(), *module.buffers()]))
            with memory:
                _forward(module, shape)()
            return memory.peak, memory.flops + (kernels.flops if kernels else 0)

    def combine(found: list[tuple[int, int]], weights: list[float]) -> tuple[int, int]:
        peak, flops = (sum(pair[i] * w for pair, w in zip(found, weights, strict=True)) for i in (0, 1))
        # Without gradients little is kept from layer to layer.
        return max(round(peak), *(pair[0] for pair in found)), round(flops)

    return _extended(config, run, combine)


def cache_bytes(config: Any, sources: int, rows: int, source_length: int, target_length: int, width: int) -> int:
    """Keys and values that generation holds: of the summaries' own tokens, and of their sources once for each source.

    Args:
        config: of the encoder-decoder.
        sources: documents.
        rows: summaries.
        source_length: tokens of a document.
        target_length: tokens of a summary.
        width: bytes of a number.
    """
    decoder = config.decoder if hasattr(config, "decoder") and not isinstance(config.decoder, dict) else config
    layers = next(
        getattr(decoder, name)
        for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        if getattr(decoder, name, None)
    )
    heads = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_heads", None)
    heads = heads or decoder.decoder_attention_heads
    size = getattr(decoder, "d_kv", None) or getattr(decoder, "head_dim", None) or decoder.d_model // heads
    return 2 * layers * heads * size * width * (rows * target_length + sources * source_length)
