"""Lean layers: the numbers and gradients of the model's own, and the model's own way where they do not serve."""

import copy
from collections import Counter

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from tiny_models import tiny
from transformers import DynamicCache, T5Config
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5LayerNorm, T5LayerSelfAttention

from pipelines.seq2seq import lean, stacks
from pipelines.seq2seq.lean import (
    LeanCrossAttention,
    LeanFeedForward,
    LeanNorm,
    LeanSelfAttention,
    candidate,
    lean_layers,
    mixin_for,
)
from pipelines.seq2seq.lean_math import AttentionLayer, FeedForwardLayer
from pipelines.seq2seq.shared_attention import can_share
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs, silence_dropout

WIDTH, LENGTH, WIDE = 6, 4, 5


def layer(kind, dropout=0.0, act="relu", causal=False, implementation="sdpa"):
    torch.manual_seed(0)
    config = T5Config(
        d_model=WIDTH, d_ff=10, d_kv=4, num_heads=2, dropout_rate=dropout, feed_forward_proj=act, is_decoder=causal
    )
    config._attn_implementation = implementation
    made = {
        LeanNorm: lambda: T5LayerNorm(WIDTH),
        LeanFeedForward: lambda: T5LayerFF(config),
        LeanSelfAttention: lambda: T5LayerSelfAttention(config, has_relative_attention_bias=True, layer_idx=0),
        LeanCrossAttention: lambda: T5LayerCrossAttention(config, layer_idx=0),
    }[kind]()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, T5LayerNorm):
                module.weight.uniform_(0.5, 1.5)
    return made


def arguments(kind, scale=1.0, masked=False):
    generator = torch.Generator().manual_seed(1)
    given = {"hidden_states": scale * torch.randn(3, LENGTH, WIDTH, generator=generator)}
    if kind is LeanCrossAttention:
        given["key_value_states"] = torch.randn(3, WIDE, WIDTH, generator=generator)
    wide = WIDE if kind is LeanCrossAttention else LENGTH
    if masked:
        real = torch.arange(wide) < torch.tensor([wide, 1, 3])[:, None, None, None]
        given["attention_mask"] = real.expand(-1, -1, LENGTH, -1)
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}


def result_and_gradients(module, given):
    result = module(**given)
    result = result[0] if isinstance(result, tuple) else result
    wanted = [t for t in (*given.values(), *module.parameters()) if t.requires_grad]
    return result, torch.autograd.grad(result.sin().sum(), wanted)


KINDS = [
    (LeanNorm, {}, False),
    (LeanFeedForward, {}, False),
    (LeanSelfAttention, {}, False),
    (LeanSelfAttention, {}, True),
    (LeanSelfAttention, {"causal": True}, False),
    (LeanCrossAttention, {}, False),
    (LeanCrossAttention, {}, True),
]


def counted(monkeypatch):
    """How often the functions are called."""
    calls = Counter()
    for function in (lean.RootMeanSquareNorm, FeedForwardLayer, AttentionLayer):

        def counting(*given, apply=function.apply, name=function.__name__):
            calls[name] += 1
            return apply(*given)

        monkeypatch.setattr(function, "apply", counting)
    return calls


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("kind", "options", "masked"), KINDS)
def test_it_is_t5s_layer(monkeypatch, kind, options, masked, scale):
    plain = layer(kind, **options)
    swapped = copy.deepcopy(plain)
    lean_layers(swapped)
    assert isinstance(swapped, kind)
    assert type(swapped).__name__ == type(plain).__name__
    given = arguments(kind, scale, masked)
    wanted, wanted_gradients = result_and_gradients(plain, given)
    calls = counted(monkeypatch)
    found, gradients = result_and_gradients(swapped, given)
    assert calls.total() == 1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for gradient, one in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize(("kind", "options", "masked"), KINDS)
def test_it_is_t5s_layer_without_gradients(monkeypatch, kind, options, masked):
    """In our own passes to rounding, by the function for it; in the model's own forward to the bit."""
    plain, given = layer(kind, **options), arguments(kind, masked=masked)
    swapped, calls = copy.deepcopy(plain), []
    lean_layers(swapped)
    for function in ("attention_without_gradient", "_feed_forward"):
        own = getattr(lean, function)
        monkeypatch.setattr(lean, function, lambda *inputs, own=own: calls.append(1) or own(*inputs))

    def result(module):
        with torch.no_grad():
            found = module(**given)
        return found[0] if isinstance(found, tuple) else found

    wanted = result(plain)
    assert torch.equal(result(swapped), wanted)
    assert not calls
    with stacks._own_pass():
        torch.testing.assert_close(result(swapped), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == (kind is not LeanNorm)


@pytest.mark.parametrize("kind", [LeanFeedForward, LeanSelfAttention, LeanCrossAttention])
def test_what_it_does_not_serve_goes_the_models_own_way(monkeypatch, kind):
    calls, given = counted(monkeypatch), arguments(kind)

    def its_own_way(module, **more):
        calls.clear()
        result = module(**given | more)
        assert not calls.keys() & {"FeedForwardLayer", "AttentionLayer"}
        return result

    swapped = layer(kind)
    lean_layers(swapped)
    with torch.no_grad():
        its_own_way(swapped)
    with torch.autocast("cpu", torch.bfloat16):
        its_own_way(swapped)
    dropped = layer(kind, dropout=0.5).train()
    lean_layers(dropped)
    its_own_way(dropped)
    name = "wi" if kind is LeanFeedForward else "q"
    inner = next(module for module in swapped.children() if hasattr(module, name))

    class Adapter(torch.nn.Linear):
        pass

    getattr(inner, name).__class__ = Adapter
    its_own_way(swapped)
    getattr(inner, name).__class__ = torch.nn.Linear
    seen = []
    for watch in ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"):
        handle = getattr(getattr(inner, name), watch)(lambda *_: seen.append(1))
        result = its_own_way(swapped)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        assert seen
        handle.remove()
        seen.clear()
    matrix = getattr(inner, name)
    own = matrix.forward
    matrix.forward = lambda states: seen.append(1) or own(states)
    its_own_way(swapped)
    assert seen
    del matrix.forward
    if kind is not LeanFeedForward:
        its_own_way(swapped, past_key_values=DynamicCache())
    swapped(**given)
    assert calls.keys() & {"FeedForwardLayer", "AttentionLayer"}


ADAPTERS = {
    **{
        f"lora-beside-{name}": LoraConfig(
            r=2, target_modules=["q", "v"], modules_to_save=[name], task_type="SEQ_2_SEQ_LM"
        )
        for name in ("SelfAttention", "EncDecAttention", "DenseReluDense", "layer_norm", "wo")
    },
    "norms": LNTuningConfig(target_modules=["layer_norm"], task_type="SEQ_2_SEQ_LM"),
    "ia3": IA3Config(task_type="SEQ_2_SEQ_LM"),
}


def adapted_loss_and_gradients(adapter):
    torch.manual_seed(0)
    view = silence_dropout(as_view(tiny("t5"))).train()
    can_share(view)  # as trainers do, before there is an adapter
    model = get_peft_model(view, copy.deepcopy(adapter))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids, completions = (torch.randint(3, 50, shape, generator=generator) for shape in ((3, 7), (6, 5)))
    real = torch.ones_like
    states = encode(model, ids, real(ids))
    found = sequence_log_probs(model, states, real(ids), completions, real(completions), order="sample-major")
    found.sum().backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_may_stand_in_the_place_of_any_part(monkeypatch, adapter):
    found, gradients = adapted_loss_and_gradients(adapter)
    monkeypatch.setattr(lean, "LEAN", ())
    wanted, wanted_gradients = adapted_loss_and_gradients(adapter)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_layers_that_only_look_alike_are_left_alone():
    class Centred(T5LayerNorm):
        def forward(self, states):
            return super().forward(states - states.mean(-1, keepdim=True))

    class Louder(T5LayerFF):
        def forward(self, states):
            return 2 * super().forward(states)

    module = Centred(4)
    lean_layers(module)
    assert type(module) is Centred
    louder = layer(LeanFeedForward)
    louder.__class__ = Louder
    assert candidate(louder) is LeanFeedForward
    assert mixin_for(louder) is None
    gated, eager = layer(LeanFeedForward, act="gated-gelu"), layer(LeanSelfAttention, implementation="eager")
    assert mixin_for(gated) is mixin_for(eager) is None
    assert mixin_for(layer(LeanFeedForward, act="gelu")) is None


def test_trying_a_layer_changes_nothing_of_it():
    module = layer(LeanSelfAttention, dropout=0.1).train()
    before = torch.get_rng_state()
    assert mixin_for(module) is LeanSelfAttention
    assert all(part.training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_takes_the_models_own_way():
    plain = T5LayerNorm(8).bfloat16()
    states = torch.randn(2, 8).bfloat16()
    wanted = plain(states)
    swapped = copy.deepcopy(plain).float()
    lean_layers(swapped)
    swapped.bfloat16()
    assert torch.equal(swapped(states), wanted)


def test_a_view_has_them_and_other_models_keep_theirs():
    t5, bart = as_view(tiny("t5")), as_view(tiny("bart"))
    layers = Counter(type(m).__mro__[1] for m in t5.modules() if isinstance(m, lean._Lean))
    assert layers == {LeanNorm: 12, LeanFeedForward: 4, LeanSelfAttention: 4, LeanCrossAttention: 2}
    assert sum(isinstance(m, lean._Lean) for m in copy.deepcopy(t5).modules()) == layers.total()
    assert not any(isinstance(m, lean._Lean) for m in bart.modules())
