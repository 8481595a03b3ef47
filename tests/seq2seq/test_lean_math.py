"""Layers as functions: their gradients by finite differences, their numbers by the plain formulas."""

import functools
import itertools

import pytest
import torch
from torch.nn.functional import rms_norm

from pipelines.seq2seq import lean_math
from pipelines.seq2seq.lean_math import (
    AttentionLayer,
    FeedForwardLayer,
    Layout,
    RootMeanSquareNorm,
    attention_without_gradient,
)

EPSILON = 1e-6


def numbers():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_the_norm():
    made = numbers()
    states, weight = made(2, 3, 5), made(5)
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquareNorm.apply(x, w, EPSILON), (states, weight))
    found = RootMeanSquareNorm.apply(states, weight, EPSILON)
    torch.testing.assert_close(found, rms_norm(states, (5,), weight, EPSILON))


def test_the_feed_forward_layer():
    made = numbers()
    states, norm, inner, outer = given = made(2, 3, 4), made(4), made(5, 4), made(4, 5)
    assert torch.autograd.gradcheck(lambda *tensors: FeedForwardLayer.apply(*tensors, EPSILON), given)
    wanted = states + torch.relu(rms_norm(states, (4,), norm, EPSILON) @ inner.T) @ outer.T
    torch.testing.assert_close(FeedForwardLayer.apply(*given, EPSILON), wanted)


def by_formula(states, others, norm, query, key, value, outer, bias, mask, layout):
    """Attention against a copy of the other states for each row that reads them."""
    normed = rms_norm(states, norm.shape, norm, layout.epsilon)
    read = normed if others is None else others
    copies = len(states) // len(read)

    def repeated(tensor):
        if layout.sample_major:
            return tensor.repeat(copies, *[1] * (tensor.dim() - 1))
        return tensor.repeat_interleave(copies, dim=0)

    def heads(tensor):
        return tensor.unflatten(-1, (layout.heads, -1)).transpose(1, 2)

    queries, keys, values = heads(normed @ query.T), *(heads(repeated(read) @ matrix.T) for matrix in (key, value))
    scores = layout.scale * queries @ keys.transpose(2, 3) + (0 if bias is None else bias)
    if mask is not None:
        scores = scores.masked_fill(~(repeated(mask) if copies > 1 else mask), torch.finfo(scores.dtype).min)
    return states + (scores.softmax(-1) @ values).transpose(1, 2).flatten(2) @ outer.T


def attended(mask, layout, *tensors):
    return AttentionLayer.apply(*tensors, mask, layout)


@pytest.mark.parametrize("part", [1, 30, 2**20], ids=["row-by-row", "head-by-head", "at-once"])
@pytest.mark.parametrize(
    ("cross", "copies", "order"),
    [(False, 1, None), (True, 1, None), (True, 3, "sample-major"), (True, 3, "source-major")],
)
def test_the_attention_layer(monkeypatch, part, cross, copies, order):
    monkeypatch.setattr(lean_math, "_PART", part)
    sources, length, width, heads, size = 2, 3, 6, 2, 4
    wide = length + 1 if cross else length
    layout = Layout(heads, 0.7, EPSILON, order == "sample-major")
    for biased, masked in itertools.product([False, True], [None, 1, length]):
        if copies > 1 and (biased or masked == length):
            continue
        made = numbers()
        matrices = [made(heads * size, width) for _ in range(3)]
        given = [
            made(sources * copies, length, width),
            made(sources, wide, width) if cross else None,
            made(width),
            *matrices,
            made(width, heads * size),
            made(1, heads, length, wide) if biased else None,
        ]
        mask = None
        if masked is not None:
            mask = torch.rand(sources, 1, masked, wide, generator=torch.Generator().manual_seed(1)) > 0.4
            mask[..., 0] = True
            assert not mask.all()
        function = functools.partial(attended, mask, layout)
        assert torch.autograd.gradcheck(function, given, fast_mode=True)
        found, wanted = AttentionLayer.apply(*given, mask, layout), by_formula(*given, mask, layout)
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            torch.testing.assert_close(attention_without_gradient(*given, mask, layout), wanted)


@pytest.mark.parametrize("wanted", range(8))
def test_one_gradient_by_itself_is_what_it_is_among_all(wanted):
    made = numbers()
    given = [made(2, 3, 6), made(2, 4, 6), made(6), *(made(4, 6) for _ in range(3)), made(6, 4), made(1, 2, 3, 4)]
    among_all = torch.autograd.grad(AttentionLayer.apply(*given, None, Layout(2, 1.0, EPSILON)).sin().sum(), given)
    alone = [tensor.detach().requires_grad_(place == wanted) for place, tensor in enumerate(given)]
    AttentionLayer.apply(*alone, None, Layout(2, 1.0, EPSILON)).sin().sum().backward()
    for place, (tensor, gradient) in enumerate(zip(alone, among_all, strict=True)):
        assert (tensor.grad is None) == (place != wanted)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient)
