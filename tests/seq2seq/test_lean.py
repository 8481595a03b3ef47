"""Lean layers: the numbers and gradients of the model's own."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch.nn.functional import rms_norm
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5LayerNorm

from pipelines.seq2seq.lean import FeedForward, LeanFeedForward, LeanNorm, RootMeanSquareNorm, lean_layers
from pipelines.seq2seq.view import as_view


def test_the_norms_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquareNorm.apply(x, w, 1e-6), (states, weight))
    assert torch.allclose(RootMeanSquareNorm.apply(states, weight, 1e-6), rms_norm(states, (5,), weight, 1e-6))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_is_t5s_norm(scale):
    plain = T5LayerNorm(16)
    with torch.no_grad():
        plain.weight.copy_(torch.rand(16) + 0.5)
    lean = copy.deepcopy(plain)
    lean_layers(lean)
    assert isinstance(lean, LeanNorm)
    assert type(lean).__name__ == "T5LayerNorm"
    given = [(scale * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))).requires_grad_() for _ in "ab"]
    for module, states in zip((plain, lean), given, strict=True):
        module(states).sin().sum().backward()
    assert torch.allclose(plain(given[0]), lean(given[1]), rtol=1e-5)
    assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-5 / scale)
    assert torch.allclose(plain.weight.grad, lean.weight.grad, rtol=1e-4, atol=1e-5)


def feed_forward(dropout=0.0, act="relu"):
    config = T5Config(d_model=6, d_ff=10, dropout_rate=dropout, feed_forward_proj=act)
    return T5DenseActDense(config)


def test_the_feed_forward_layers_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (5, 4), (4, 5))
    ]
    assert torch.autograd.gradcheck(FeedForward.apply, given)
    assert torch.allclose(FeedForward.apply(*given), torch.relu(given[0] @ given[1].T) @ given[2].T)


def test_it_is_t5s_feed_forward_layer():
    plain = feed_forward()
    lean = copy.deepcopy(plain)
    lean_layers(lean)
    assert isinstance(lean, LeanFeedForward)
    given = [torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"]
    for module, states in zip((plain, lean), given, strict=True):
        module(states).sin().sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad)
    for first, second in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad)


def test_dropout_adapters_and_other_activations_take_the_models_own_way(monkeypatch):
    gated = feed_forward(act="gelu")
    lean_layers(gated)
    assert type(gated) is T5DenseActDense
    dropped, adapted = feed_forward(dropout=0.5).train(), feed_forward()
    for module in (dropped, adapted):
        lean_layers(module)
        assert isinstance(module, LeanFeedForward)

    class Adapter(torch.nn.Linear):
        pass

    adapted.wi.__class__ = Adapter
    monkeypatch.setattr(FeedForward, "apply", lambda *_: pytest.fail("the lean way"))
    states = torch.ones(1, 2, 6, requires_grad=True)
    for module in (dropped, adapted):
        module(states).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        feed = copy.deepcopy(dropped).eval()
        feed(states)


def test_half_precision_takes_the_models_own_way():
    plain = T5LayerNorm(8).bfloat16()
    states = torch.randn(2, 8).bfloat16()
    wanted = plain(states)
    lean = copy.deepcopy(plain).float()
    lean_layers(lean)
    lean.bfloat16()
    assert torch.equal(lean(states), wanted)


def test_a_view_has_them_and_other_models_keep_theirs():
    t5, bart = as_view(tiny("t5")), as_view(tiny("bart"))
    assert sum(isinstance(m, LeanNorm) for m in t5.modules()) == sum(isinstance(m, T5LayerNorm) for m in t5.modules())
    assert any(isinstance(m, LeanNorm) for m in copy.deepcopy(t5).modules())
    assert not any(isinstance(m, LeanNorm) for m in bart.modules())


def test_a_norm_that_only_looks_alike_is_left_alone():
    class Centred(T5LayerNorm):
        def forward(self, states):
            return super().forward(states - states.mean(-1, keepdim=True))

    module = Centred(4)
    lean_layers(module)
    assert type(module) is Centred
