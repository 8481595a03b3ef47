"""Counter-based sampling: the right distribution, and nothing but its key decides a draw."""

import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from pipelines.seq2seq.sampling import (
    GumbelSampler,
    gumbel_noise,
    prompt_keys,
    sample_completions,
    stream_keys,
    uniforms,
)
from pipelines.seq2seq.view import as_view, encode

EOS, PAD = 1, 0


def keys(rows: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    return stream_keys(seed, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), step)


def chi_square_bound(degrees: int) -> float:
    """The 99.999 % quantile of chi-square, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5])
    rows = 40_000
    sampler = GumbelSampler(3, torch.arange(rows), temperature=temperature)
    drawn = sampler(torch.zeros(rows, 5, dtype=torch.int64), logits.expand(rows, -1)).argmax(-1)
    expected = torch.softmax(logits / temperature, -1) * rows
    kept = expected > 5
    observed = torch.bincount(drawn, minlength=len(logits)).float()
    assert float(((observed - expected) ** 2 / expected)[kept].sum()) < chi_square_bound(int(kept.sum()) - 1)


def test_rare_tokens_keep_their_probability():
    """A token of probability 1e-4 among 4,000: coarse uniform numbers would lose or double it."""
    vocabulary, rows = 4000, 2000
    logits = torch.zeros(vocabulary)
    winners = torch.cat(
        [(gumbel_noise(keys(rows), position, vocabulary) + logits).argmax(-1) for position in range(12)]
    )
    counts = torch.bincount(winners, minlength=vocabulary).float()
    expected = len(winners) / vocabulary
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_bound(vocabulary - 1)


def test_uniforms_are_uniform_and_uncorrelated():
    numbers = uniforms(keys(512), 0, 512)
    assert float(numbers.min()) > 0
    assert float(numbers.max()) <= 1
    counts = torch.histc(numbers, 256, 0, 1)
    expected = numbers.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_bound(255)
    other_position, other_seed = uniforms(keys(512), 1, 512), uniforms(keys(512, seed=1), 0, 512)
    other_step = uniforms(keys(512, step=1), 0, 512)
    pairs = [(numbers, other) for other in (other_position, other_seed, other_step)]
    pairs += [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])]
    for first, second in pairs:
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(first.numel())


def test_prompt_keys_are_fixed_by_the_id():
    # The published SHA-256 of "a" and "b": another machine or Python version must agree.
    heads = ["ca978112ca1bbdca", "3e23e8160039594a"]
    assert prompt_keys(["a", "b"]).tolist() == [int.from_bytes(bytes.fromhex(h), "little", signed=True) for h in heads]


def tiny(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return as_view(T5ForConditionalGeneration(T5Config(vocab_size=40, **shape))).eval()
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None}
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 2, "decoder_start_token_id": 2}
    return as_view(BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **shape, **heads, **special)))


@pytest.fixture(params=["t5", "bart"])
def model(request):
    return tiny(request.param).eval()


def batch(lengths: list[int], width: int):
    generator = torch.Generator().manual_seed(7)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 40, (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask


@torch.no_grad()
def draw(model, ids, mask, prompts, samples, length=24):
    sampler = GumbelSampler(5, prompts.repeat_interleave(samples), torch.arange(samples).repeat(len(prompts)), step=2)
    special = {"eos_token_id": EOS, "pad_token_id": PAD}
    states = encode(model, ids, mask)
    return sampler, sample_completions(model, states, mask, sampler, samples=samples, max_new_tokens=length, **special)


def test_completions_are_those_of_generate(model):
    """Encode once, decode the first position once, drop ended rows: still what ``generate`` gives."""
    model.get_output_embeddings().weight.data[EOS] += 0.5 * model.get_output_embeddings().weight.data[5]
    ids, mask = batch([9, 4, 7], 9)
    prompts = torch.arange(3)
    sampler, (completions, completion_mask) = draw(model, ids, mask, prompts, samples=4)
    start = model.config.decoder_start_token_id
    model.generation_config = GenerationConfig(decoder_start_token_id=start, eos_token_id=EOS, pad_token_id=PAD)
    with torch.no_grad():
        states = encode(model, ids, mask).repeat_interleave(4, 0)
        expected = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask.repeat_interleave(4, 0),
            logits_processor=[sampler],
            max_new_tokens=24,
            do_sample=False,
        )[:, 1:]
    assert completions.tolist() == expected.tolist()
    ends = (completions == EOS).int()
    assert ends.sum() > 3, "some rows must end early, or dropping them is not tested"
    before = ends.cumsum(1) - ends
    assert completion_mask.tolist() == (before == 0).long().tolist()


def test_a_draw_depends_on_its_key_alone(model):
    ids, mask = batch([9, 4, 7, 6], 9)
    _, (whole, _) = draw(model, ids, mask, torch.arange(4), samples=3)
    wider, wider_mask = (torch.nn.functional.pad(t, (0, 5)) for t in (ids, mask))
    _, (padded, _) = draw(model, wider, wider_mask, torch.arange(4), samples=3)
    assert padded.tolist() == whole.tolist()
    chosen = torch.tensor([2, 0])
    _, (part, _part_mask) = draw(model, ids[chosen], mask[chosen], chosen, samples=2)
    expected = whole.view(4, 3, -1)[chosen, :2].reshape(4, -1)[:, : part.shape[1]]
    assert part.tolist() == expected.tolist()
    assert len({tuple(row) for row in whole.tolist()}) == len(whole), "completions of a source must differ"


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        GumbelSampler(0, torch.arange(2), temperature=0.0)
