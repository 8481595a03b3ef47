"""The call the trainers make (side inputs, shared sources, one-pass scoring): the plain model's numbers, gradients."""

import copy

import pytest
import torch
from tiny_models import ALL_FAMILIES, SIDES, loud, plain_log_probs, tiny, tiny_batch, tiny_sources
from trl.trainer.utils import add_fused_lm_head

from pipelines.seq2seq import shared_attention
from pipelines.seq2seq.scoring import TokenScores, score_in_one_pass
from pipelines.seq2seq.shared_attention import can_share
from pipelines.seq2seq.view import as_view, decoder_start_id

ROWS = {"sample-major": [0, 1, 0, 1], "source-major": [0, 0, 1, 1]}
# The others decode against copies: T5Gemma's attention caps its scores, which SDPA cannot; Whisper's takes the number
# of sources from the number of rows.
SHARING = {"t5", "t5-untied", "mt5", "bart", "pegasus", "marian", "vision"}
# T5Gemma's logits are capped too: TRL's head scores them.
IN_ONE_PASS = set(ALL_FAMILIES) - {"t5gemma"}
# In double precision, but T5's norm takes its variance in single, and T5Gemma's masks overflow there.
TOLERANCE = dict.fromkeys(ALL_FAMILIES, 1e-12) | dict.fromkeys(("t5", "t5-untied", "mt5"), 5e-6) | {"t5gemma": 1e-5}


def built(family):
    model = loud(tiny(family))
    return model if family == "t5gemma" else model.double()


def completions():
    """Four ragged completions, and a weight of either sign for each token, as a preference loss has them."""
    ids, mask = (tensor[:4] for tensor in tiny_batch()[2:])
    return ids, mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * mask


@pytest.mark.parametrize(("family", "left"), SIDES)
def test_log_probs_and_gradients_are_the_plain_models(family, left, monkeypatch):
    plain = built(family)
    view = as_view(loud(tiny(family))).to(plain.dtype)
    (source, source_mask), (ids, mask, weights) = tiny_sources(family, left), completions()
    source = source.to(view.dtype) if source.is_floating_point() else source
    assert can_share(view) == (family in SHARING)
    add_fused_lm_head(view, outputs=("log_probs", "entropy"))
    score_in_one_pass(view, ("entropy",))
    scored, copied = [], []
    apply, decode = TokenScores.apply, shared_attention.decode
    monkeypatch.setattr(TokenScores, "apply", lambda *given: scored.append(1) or apply(*given))
    monkeypatch.setattr(shared_attention, "decode", lambda *given, **more: copied.append(1) or decode(*given, **more))
    labels = torch.cat([torch.full((4, 1), -100), ids.masked_fill(mask == 0, -100)], 1)
    inputs = {
        "input_ids": torch.cat([torch.full((4, 1), decoder_start_id(view)), ids], 1),
        "attention_mask": torch.cat([torch.ones_like(mask[:, :1]), mask], 1),
        f"encoder_{view.main_input_name}": source,
        **({} if source_mask is None else {"encoder_attention_mask": source_mask}),
    }
    for order, rows in ROWS.items():
        expected = plain_log_probs(plain, source, source_mask, ids, mask, rows)
        result = view(**inputs, encoder_rows=order, labels=labels, fused_lm_head=True, use_cache=False)
        torch.testing.assert_close(result.log_probs, expected, rtol=0, atol=TOLERANCE[family])
        for model, value in ((plain, expected), (view, result.log_probs)):
            model.zero_grad()
            (value * weights).sum().backward()
        compared = 0
        for (name, one), (_, other) in zip(view.named_parameters(), plain.named_parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if other.grad is not None:
                scale = other.grad.abs().max().clamp(min=1.0)
                gap = ((one.grad - other.grad).abs().max() / scale).item()
                assert gap < TOLERANCE[family], f"{order} {name}: {gap}"
                compared += 1
        assert compared > 40
    assert bool(copied) != (family in SHARING)
    assert bool(scored) == (family in IN_ONE_PASS)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("t5gemma", "sliding_window", 64), ("pegasus", "scale_embedding", False), ("marian", "scale_embedding", False)],
)
def test_what_a_family_is_a_trap_for_shows_in_its_log_probs(family, name, value):
    """A window shorter than the texts, embeddings times √d_model: without them the numbers would be others."""
    model = loud(tiny(family))
    config = copy.deepcopy(model.config)
    for part in (config.encoder, config.decoder) if family == "t5gemma" else (config,):
        setattr(part, name, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    (source, source_mask), (ids, mask, _) = tiny_sources(family), completions()
    with torch.no_grad():
        found = [plain_log_probs(each, source, source_mask, ids, mask, ROWS["sample-major"]) for each in (model, other)]
    assert (found[0] - found[1]).abs().max() > 1e-2
