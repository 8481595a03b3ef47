"""Decoding against shared sources: the numbers and gradients of copies, at a copy's cost."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from pipelines.seq2seq import shared_attention
from pipelines.seq2seq.shared_attention import can_share, decode_shared, shared_sources
from pipelines.seq2seq.view import as_view, decode, encode

_SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_BART = _SPECIAL | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
}
_T5 = _SPECIAL | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
FAMILIES = {
    "t5": lambda **more: T5ForConditionalGeneration(T5Config(**_T5, **more)),
    "bart": lambda **more: BartForConditionalGeneration(BartConfig(**_BART, **more)),
    "pegasus": lambda **more: PegasusForConditionalGeneration(PegasusConfig(**_BART, **more)),
    "marian": lambda **more: MarianMTModel(MarianConfig(**_BART, **more)),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (3, 7), generator=generator)
    mask = (torch.arange(7)[None] < torch.tensor([7, 4, 2])[:, None]).long()
    return ids * mask, mask, torch.randint(3, 40, (12, 5), generator=generator)


def states_and_gradients(function, model, order):
    ids, mask, decoder_ids = batch()
    model.zero_grad()
    states = function(model, encode(model, ids, mask), mask, decoder_ids, order=order)
    (states * torch.sin(torch.arange(states.numel())).view_as(states)).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["source-major", "sample-major"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_copies(family, order):
    torch.manual_seed(0)
    model = as_view(FAMILIES[family]()).train()
    assert can_share(model)
    assert model.training
    copied, gradients = states_and_gradients(decode, model, order)
    shared, gradients_shared = states_and_gradients(decode_shared, model, order)
    assert torch.allclose(shared, copied, atol=1e-5)
    assert gradients.keys() == gradients_shared.keys()
    for name in gradients:
        assert torch.allclose(gradients_shared[name], gradients[name], atol=1e-4, rtol=1e-4), name


def test_a_sources_keys_are_computed_once():
    model = as_view(FAMILIES["t5"]())
    seen = []
    key = model.get_decoder().block[0].layer[1].EncDecAttention.k
    key.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ids, mask, decoder_ids = batch()
    states = encode(model, ids, mask)
    can_share(model)
    seen.clear()
    decode_shared(model, states, mask, decoder_ids, order="source-major")
    assert seen == [3]
    decode(model, states, mask, decoder_ids, order="source-major")
    assert seen == [3, 12]


def test_a_model_that_cannot_is_decoded_against_copies():
    torch.manual_seed(0)
    eager = as_view(FAMILIES["t5"](attn_implementation="eager"))
    assert not can_share(eager)
    copied, _ = states_and_gradients(decode, eager, "source-major")
    shared, _ = states_and_gradients(decode_shared, eager, "source-major")
    assert torch.equal(shared, copied)


def test_recomputed_activations_are_not_shared():
    model = as_view(FAMILIES["t5"]()).train()
    assert can_share(model)
    model.gradient_checkpointing_enable()
    assert not can_share(model)
    states_and_gradients(decode_shared, model, "source-major")


def test_a_wrong_pairing_is_noticed(monkeypatch):
    model = as_view(FAMILIES["bart"]())
    plain = shared_attention._shared_sdpa
    monkeypatch.setitem(
        shared_attention.AttentionInterface._global_mapping,
        shared_attention._NAME,
        lambda module, query, key, *rest, **options: plain(
            module, query, key.flip(0) if len(key) != len(query) else key, *rest, **options
        ),
    )
    assert not can_share(model)


def test_the_models_own_attention_is_restored():
    model = as_view(FAMILIES["t5"]())
    ids, mask, _ = batch()
    states = encode(model, ids, mask)
    with pytest.raises(IndexError), shared_sources(model):
        model.get_decoder()(input_ids=torch.full((6, 2), 99), encoder_hidden_states=states)
    for config in (model.config, model.get_decoder().config, model.get_encoder().config):
        assert config._attn_implementation == "sdpa"
