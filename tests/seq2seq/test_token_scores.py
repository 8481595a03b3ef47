"""Scoring in one pass: TRL's own numbers."""

import copy

import pytest
import torch
from tiny_models import tiny
from trl.trainer.utils import add_fused_lm_head

from pipelines.seq2seq import scoring
from pipelines.seq2seq.scoring import TokenScores, score_in_one_pass
from pipelines.seq2seq.view import as_view, silence_dropout

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def test_its_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 3), (6, 3), (6,))
    ]
    tokens = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda *tensors: TokenScores.apply(*tensors, tokens, OUTPUTS)[0], given)
    log_probs, entropy, squares, mean, top = TokenScores.apply(*given, tokens, OUTPUTS)
    logits = given[0] @ given[1].T + given[2]
    wanted = torch.log_softmax(logits, -1)
    assert torch.allclose(log_probs, wanted[range(4), tokens])
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.allclose(squares, wanted.exp().square().sum(-1).log())
    assert torch.allclose(mean, logits.mean(-1))
    assert top.tolist() == [row.argmax().item() == token for row, token in zip(logits, tokens, strict=True)]


def batch(full=False):
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 50, (2, 6), generator=generator)
    ids = torch.randint(3, 50, (4, 5), generator=generator)
    mask = (torch.arange(5) < torch.tensor([[5]] * 4 if full else [[5], [3], [2], [4]])).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    source_mask = torch.ones_like(source)
    source_mask[1, 4:] = 0
    sources = {"encoder_input_ids": source, "encoder_attention_mask": source_mask}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **sources}


@pytest.mark.parametrize("full", [False, True], ids=["ragged", "of-one-length"])
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_trls_head_gives_the_same(monkeypatch, family, full):
    theirs = silence_dropout(as_view(tiny(family))).train()
    ours = copy.deepcopy(theirs)
    used = []
    apply = TokenScores.apply
    monkeypatch.setattr(TokenScores, "apply", lambda *given: used.append(1) or apply(*given))
    for model in (theirs, ours):
        add_fused_lm_head(model, outputs=("log_probs", *OUTPUTS))
    score_in_one_pass(ours, OUTPUTS)
    found = [model(**batch(full), fused_lm_head=True, use_cache=False) for model in (theirs, ours)]
    assert len(used) == 1
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        first, second = (getattr(result, name) for result in found)
        torch.testing.assert_close(second, first, rtol=0, atol=2e-6, msg=name)
    assert torch.equal(found[0].is_top1, found[1].is_top1)
    for result in found:
        result.log_probs.square().sum().backward()
    for (name, first), second in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_where_it_does_not_serve_trls_head_does(monkeypatch):
    model = as_view(tiny("t5")).eval()
    add_fused_lm_head(model)
    score_in_one_pass(model)
    monkeypatch.setattr(TokenScores, "apply", None)  # it would fail
    plain = {"input_ids": batch()["encoder_input_ids"], "decoder_input_ids": batch()["input_ids"][:2]}
    assert model(**plain).logits.shape == (2, 5, model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch(), fused_lm_head=True).log_probs.shape == (4, 4)
    monkeypatch.setattr(scoring, "_LARGEST", 100)
    large = as_view(tiny("t5")).eval()
    add_fused_lm_head(large)
    score_in_one_pass(large)
    assert large(**batch(), fused_lm_head=True).log_probs.shape == (4, 4)
