"""Summaries do not depend on batches; sampling follows the model's own distribution; settings are all said outright."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq.generation import (
    GenerationConfig,
    check_lengths,
    generate_summaries,
    inference,
    length_sorted_batches,
    settings_of,
)
from pipelines.seq2seq.models import load_seq2seq, load_tokenizer

DOCUMENTS = ["read a small file", "sort", "write the sorted table of the remote server and close it", "merge", "count"]


def _settings(**changes) -> GenerationConfig:
    return GenerationConfig(**({"max_source_length": 32, "max_target_length": 8, "precision": "fp32"} | changes))


@pytest.fixture(scope="module")
def loaded(tiny_t5):
    model = load_seq2seq(str(tiny_t5))
    with torch.no_grad():
        # An untrained head is nearly flat, so that greedy decoding would hang on rounding; and the tied embedding of
        # the start token, which is <pad>, would answer itself.
        model.decoder.final_layer_norm.weight.mul_(8.0)
        model.shared.weight[0] = 0.0
    return model, load_tokenizer(str(tiny_t5))


def test_greedy_and_beam_equal_plain_generate_one_by_one(loaded):
    model, tokenizer = loaded
    for beams in (1, 3):
        found = generate_summaries(model, tokenizer, DOCUMENTS, _settings(num_beams=beams, generation_batch_size=2))
        for document, (text,) in zip(DOCUMENTS, found, strict=True):
            inputs = tokenizer(document, return_tensors="pt")
            rows = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=8, num_beams=beams
            )
            assert text == tokenizer.decode(rows[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("changes", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7}, {"no_repeat_ngram_size": 2}])
def test_samples_do_not_depend_on_batches_or_order(loaded, changes):
    model, tokenizer = loaded
    whole = generate_summaries(
        model, tokenizer, DOCUMENTS, _settings(do_sample=True, **changes), num_return_sequences=3, seed=5
    )
    small = _settings(do_sample=True, generation_batch_size=2, **changes)
    back = generate_summaries(model, tokenizer, DOCUMENTS[::-1], small, num_return_sequences=3, seed=5)
    assert whole == back[::-1]
    fewer = generate_summaries(model, tokenizer, DOCUMENTS[1:3], small, num_return_sequences=2, seed=5)
    assert fewer == [several[:2] for several in whole[1:3]]
    assert whole != generate_summaries(model, tokenizer, DOCUMENTS, small, num_return_sequences=3, seed=6)
    assert len({text for several in whole for text in several}) > 2


def test_no_repeated_ngram_holds_while_sampling(loaded):
    from pipelines.seq2seq.generation import sample_ids
    from pipelines.seq2seq.sampling import prompt_keys

    model, tokenizer = loaded
    inputs = tokenizer(DOCUMENTS[:1], return_tensors="pt")
    keys, numbers = prompt_keys(["x"]).repeat(40), torch.arange(40)
    repeats = {}
    for size in (0, 1, 2):
        settings = _settings(do_sample=True, no_repeat_ngram_size=size, max_target_length=12, temperature=0.3)
        with inference(model):
            rows, mask = sample_ids(
                model,
                inputs.input_ids,
                inputs.attention_mask,
                settings,
                keys,
                numbers,
                seed=0,
                eos_token_id=1,
                pad_token_id=0,
            )
        for width in (1, 2):
            ids = [row[kept.bool()].tolist() for row, kept in zip(rows, mask, strict=True)]
            grams = [[tuple(r[i : i + width]) for i in range(len(r) - width + 1)] for r in ids]
            repeats[size, width] = sum(len(g) - len(set(g)) for g in grams)
    assert repeats[0, 1] > 0
    assert repeats[0, 2] > 0
    assert repeats[1, 1] == 0
    assert repeats[2, 2] == 0
    assert repeats[2, 1] > 0


def test_first_token_follows_temperature_top_k_and_top_p(loaded):
    """Frequencies of the first sampled token against the distribution computed here."""
    from pipelines.seq2seq.generation import sample_ids
    from pipelines.seq2seq.sampling import prompt_keys

    model, tokenizer = loaded
    settings = _settings(do_sample=True, temperature=1.5, top_k=6, top_p=0.8, max_target_length=2)
    inputs = tokenizer(DOCUMENTS[:1], return_tensors="pt")
    draws = 4000
    with inference(model):
        rows, mask = sample_ids(
            model,
            inputs.input_ids,
            inputs.attention_mask,
            settings,
            prompt_keys(["x"]).repeat(draws),
            torch.arange(draws),
            seed=0,
            eos_token_id=1,
            pad_token_id=0,
        )
        logits = model(**inputs, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0] / 1.5
    assert mask[:, 0].all()
    top = logits.topk(6)
    shares = top.values.softmax(0)
    before = shares.cumsum(0) - shares
    kept = shares * (before < 0.8)
    expected = dict(zip(top.indices.tolist(), (kept / kept.sum()).tolist(), strict=True))
    counts = Counter(rows[:, 0].tolist())
    assert set(counts) <= {token for token, share in expected.items() if share > 0}
    for token, share in expected.items():
        assert counts[token] / draws == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5 + 1e-9)


def test_a_checkpoints_own_settings_do_not_leak_in(loaded):
    model, tokenizer = loaded
    plain = generate_summaries(model, tokenizer, DOCUMENTS, _settings())
    own = model.generation_config
    kept = own.to_dict()
    try:
        own.update(num_beams=4, min_length=7, no_repeat_ngram_size=1, max_length=3, repetition_penalty=9.0)
        assert generate_summaries(model, tokenizer, DOCUMENTS, _settings()) == plain
    finally:
        own.update(**{name: kept[name] for name in kept})


def test_mode_is_restored_and_no_document_is_no_summary(loaded):
    model, tokenizer = loaded
    model.train()
    assert generate_summaries(model, tokenizer, [], _settings()) == []
    generate_summaries(model, tokenizer, DOCUMENTS[:1], _settings())
    assert model.training
    model.eval()


def test_length_sorted_batches():
    assert length_sorted_batches([3, 9, 3, 5], 3) == [[1, 3, 0], [2]]
    assert length_sorted_batches([], 3) == []


def test_shown_settings_hold_what_acts():
    assert settings_of(_settings()) == {
        "num_beams": 1,
        "do_sample": False,
        "no_repeat_ngram_size": 0,
        "max_source_length": 32,
        "max_target_length": 8,
        "prefix": "",
    }
    assert "length_penalty" in settings_of(_settings(num_beams=2))
    assert {"temperature", "top_k", "top_p"} <= set(settings_of(_settings(do_sample=True)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"do_sample": True, "num_beams": 2}, "num_beams"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_combinations_that_cannot_be(changes, field):
    with pytest.raises(UserError, match=f"^{field}="):
        validate(GenerationConfig, changes)


def test_what_the_model_cannot_do_is_one_line(loaded):
    model, tokenizer = loaded
    with pytest.raises(UserError, match="cannot give 2 summaries"):
        generate_summaries(model, tokenizer, DOCUMENTS, _settings(), num_return_sequences=2)
    model.config.max_position_embeddings = 16
    try:
        with pytest.raises(UserError, match=r"max_source_length=32: .* reads at most 16 tokens"):
            check_lengths(model, _settings())
    finally:
        del model.config.max_position_embeddings
