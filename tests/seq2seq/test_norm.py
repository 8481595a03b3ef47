"""The lean norm: the numbers and gradients of the model's own."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch.nn.functional import rms_norm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pipelines.seq2seq.norm import LeanNorm, RootMeanSquareNorm, lean_norms
from pipelines.seq2seq.view import as_view


def test_its_gradients_are_right():
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
    lean_norms(lean)
    assert isinstance(lean, LeanNorm)
    assert type(lean).__name__ == "T5LayerNorm"
    given = [(scale * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))).requires_grad_() for _ in "ab"]
    for module, states in zip((plain, lean), given, strict=True):
        module(states).sin().sum().backward()
    assert torch.allclose(plain(given[0]), lean(given[1]), rtol=1e-5)
    assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-5 / scale)
    assert torch.allclose(plain.weight.grad, lean.weight.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_takes_the_models_own_way():
    plain = T5LayerNorm(8).bfloat16()
    states = torch.randn(2, 8).bfloat16()
    wanted = plain(states)
    lean = copy.deepcopy(plain).float()
    lean_norms(lean)
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
    lean_norms(module)
    assert type(module) is Centred
