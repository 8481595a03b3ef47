"""Attention with a learned bias: the numbers and gradients of PyTorch's own."""

import pytest
import torch
from tiny_models import tiny
from torch.nn.functional import scaled_dot_product_attention
from transformers import UMT5Config, UMT5ForConditionalGeneration

from pipelines.seq2seq import attention as rooms
from pipelines.seq2seq import lean_math
from pipelines.seq2seq.attention import BiasedAttention, biased_attention, biased_sdpa
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs, silence_dropout


def inputs(rows=3, heads=2, length=4, width=5, size=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, length, size), (rows, heads, width, size), (rows, heads, width, size))
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in (*shapes, (1, heads, length, width))]
    mask = torch.arange(width) < torch.tensor([width, 1, 3])[:, None, None, None]
    return [t.requires_grad_() for t in tensors], mask


@pytest.mark.parametrize("part", [1, 2**20], ids=["row-by-row", "at-once"])
@pytest.mark.parametrize("masked", [False, True])
def test_its_gradients_are_right(monkeypatch, part, masked):
    monkeypatch.setattr(lean_math, "_PART", part)
    tensors, mask = inputs()
    mask = mask if masked else None
    assert torch.autograd.gradcheck(lambda *given: BiasedAttention.apply(*given, mask, 0.7), tensors)
    query, key, value, bias = tensors
    allowed = bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=0.7)
    assert torch.allclose(BiasedAttention.apply(*tensors, mask, 0.7), wanted)


def used(monkeypatch):
    """How often a model attended this way."""
    calls = []
    apply = BiasedAttention.apply
    monkeypatch.setattr(BiasedAttention, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def loss_and_gradients(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
    completions = torch.randint(3, 50, (6, 5), generator=generator)
    ends = (torch.arange(5) < torch.tensor([[5], [3], [1], [2], [4], [5]])).long()
    model.zero_grad()
    loss = sequence_log_probs(model, encode(model, ids, mask), mask, completions, ends, order="sample-major").sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def umt5():
    """Each of its layers has a bias of its own, so that none of them is lean."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, decoder_start_token_id=0))


def test_a_model_trains_as_by_sdpa(monkeypatch):
    model = silence_dropout(as_view(umt5())).train()
    calls = used(monkeypatch)
    loss, gradients = loss_and_gradients(model)
    assert len(calls) == 4  # two layers each of encoder and decoder attend to themselves
    assert model.config._attn_implementation == model.get_encoder().config._attn_implementation == "sdpa"
    monkeypatch.setattr(rooms, "_has_learned_bias", lambda module: False)
    wanted, wanted_gradients = loss_and_gradients(model)
    assert len(calls) == 4
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], atol=1e-5, rtol=1e-4), name


def test_it_is_left_alone_where_it_cannot_help(monkeypatch):
    calls = used(monkeypatch)
    model = silence_dropout(as_view(umt5())).train()
    with torch.no_grad():
        encode(model, torch.ones(2, 3, dtype=torch.long), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encode(model, torch.ones(2, 3, dtype=torch.long), None)
    model.activation_checkpointing_enable()
    loss_and_gradients(model)
    loss_and_gradients(silence_dropout(as_view(tiny("bart"))).train())
    loss_and_gradients(as_view(umt5()).train())  # with dropout
    assert not calls


def test_the_models_own_attention_is_restored():
    encoder = as_view(tiny("t5")).get_encoder()
    with biased_attention(encoder):
        assert encoder.config._attn_implementation == rooms._NAME
    with pytest.raises(IndexError), biased_attention(encoder):
        encoder(input_ids=torch.full((1, 2), 99))
    assert encoder.config._attn_implementation == "sdpa"


def test_a_causal_mask_is_made_where_none_is_given():
    (query, key, value, bias), _ = inputs(width=4)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = biased_sdpa(module, query, key, value, None, scaling=1.0, position_bias=bias)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    allowed = torch.where(causal, bias, torch.finfo(bias.dtype).min)
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=1.0)
    assert torch.allclose(found, wanted.transpose(1, 2))
