"""The faster layers and the faster loss of pretraining: the same numbers as the plain ones, and their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration

from pipelines.seq2seq import pretrain_speed
from pipelines.seq2seq.pretrain_speed import SummedCrossEntropy, train_fast_on_cpu


@pytest.mark.parametrize("part", [7, 2**20])
def test_the_loss_and_its_gradient_are_cross_entropy(monkeypatch, part):
    monkeypatch.setattr(pretrain_speed, "_PART", {"cpu": part * 11})
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 11, generator=generator) * 20).requires_grad_()
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[1, 2:] = -100
    expected = F.cross_entropy(logits.view(-1, 11), labels.view(-1), reduction="sum")
    (of_logits,) = torch.autograd.grad(0.3 * expected, logits)
    found = SummedCrossEntropy.apply(logits.detach().clone().requires_grad_(), labels)
    torch.testing.assert_close(found, expected)
    leaf = logits.detach().clone().requires_grad_()
    (mine,) = torch.autograd.grad(0.3 * SummedCrossEntropy.apply(leaf * 1.0, labels), leaf)
    torch.testing.assert_close(mine, of_logits)
    assert not mine[1, 2:].any()


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.arange(40)
    expected = F.cross_entropy(logits.float(), labels, reduction="sum")
    leaf = logits.clone().requires_grad_()
    found = SummedCrossEntropy.apply(leaf * 1.0, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (mine,) = torch.autograd.grad(found, leaf)
    exact = logits.float().softmax(-1) - F.one_hot(labels, 300)
    torch.testing.assert_close(mine.float(), exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fast_model_is_the_same_model(kind, precision):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, dropout_rate=0.0, feed_forward_proj=kind, decoder_start_token_id=0)
    plain = T5ForConditionalGeneration(config).train()
    fast = copy.deepcopy(plain)
    train_fast_on_cpu(fast, precision)
    assert list(fast.state_dict()) == list(plain.state_dict())
    source, target = torch.randint(3, 60, (4, 9)), torch.randint(3, 60, (4, 6))
    mask = torch.ones_like(source)
    mask[2, 5:] = 0
    losses, dtypes = [], set()
    for module in fast.modules():
        if type(module).__name__ in ("T5LayerNorm", "T5DenseActDense", "T5DenseGatedActDense"):
            module.register_forward_hook(lambda m, given, out: dtypes.add(out.dtype))
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        losses.append(F.cross_entropy(logits.float().view(-1, 60), target.view(-1)))
        losses[-1].backward()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    exact = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 3e-2, "atol": 3e-3}
    torch.testing.assert_close(losses[0], losses[1], **exact)
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (plain, fast)]
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < (1e-5 if precision == "fp32" else 0.03)
