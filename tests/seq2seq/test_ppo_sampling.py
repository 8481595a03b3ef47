"""Counter-based sampling: the right distribution, and nothing but its key decides a draw."""

import math

import pytest
import torch
from tiny_models import FAMILIES, SIDES, loud, tiny, tiny_sources
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin

from pipelines.seq2seq.sampling import (
    GumbelSampler,
    gumbel_noise,
    prompt_keys,
    sample_completions,
    stream_keys,
    uniforms,
)
from pipelines.seq2seq.view import as_view, decoder_start_id, encode

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


def batch(lengths: list[int], left: bool = False):
    """Ragged sources of text, padded on the left or right."""
    generator = torch.Generator().manual_seed(7)
    width = max(lengths)
    ids, mask = (torch.zeros(len(lengths), width, dtype=torch.int64) for _ in "ab")
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if left else slice(0, length)
        ids[row, real] = torch.randint(3, 50, (length,), generator=generator)
        mask[row, real] = 1
    return ids, mask


@torch.no_grad()
def draw(model, source, mask, prompts, samples, end=EOS):
    sampler = GumbelSampler(5, prompts.repeat_interleave(samples), torch.arange(samples).repeat(len(prompts)), step=2)
    options = {"samples": samples, "max_new_tokens": 24, "eos_token_id": end, "pad_token_id": PAD}
    return sampler, sample_completions(model, encode(model, source, mask), mask, sampler, **options)


@pytest.mark.parametrize(("family", "left"), SIDES)
def test_completions_are_those_of_generate(family, left):
    """Encode once, decode the first position once, drop ended rows: still what ``generate`` gives."""
    model = as_view(loud(tiny(family)))
    source, mask = batch([9, 4, 7], left) if family in FAMILIES else tiny_sources(family)
    given = (model, source, mask, torch.arange(len(source)), 4)
    endless = draw(*given, end=-1)[1][0]
    end = int(endless[endless != PAD].mode().values)  # what a random model says often enough for rows to end early
    sampler, (completions, completion_mask) = draw(*given, end=end)
    start = decoder_start_id(model)
    model.generation_config = GenerationConfig(decoder_start_token_id=start, eos_token_id=end, pad_token_id=PAD)
    # Whisper has a `generate` of its own on top, which cuts long recordings up and takes the end token off.
    expected = GenerationMixin.generate(
        model,
        source.repeat_interleave(4, 0),
        **({} if mask is None else {"attention_mask": mask.repeat_interleave(4, 0)}),
        logits_processor=[sampler],
        max_new_tokens=24,
        do_sample=False,
    )[:, 1:]
    assert completions.tolist() == expected.tolist()
    ends = (completions == end).int()
    assert ends.sum() > 3, "some rows must end early, or dropping them is not tested"
    before = ends.cumsum(1) - ends
    assert completion_mask.tolist() == (before == 0).long().tolist()
    assert len(set(map(tuple, completions.tolist()))) > len(completions) / 2


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma"])
def test_a_draw_depends_on_its_key_alone(family):
    model = as_view(loud(tiny(family)))
    ids, mask = batch([9, 4, 7, 6])
    _, (whole, _) = draw(model, ids, mask, torch.arange(4), samples=3)
    others = [tuple(pad(t, (0, 5)) for t in (ids, mask))]
    if family != "bart":  # whose absolute positions count what stands on the left: it is another source to the model
        others += [batch([9, 4, 7, 6], left=True), tuple(pad(t, (5, 0)) for t in (ids, mask))]
    for other in others:
        _, (padded, _) = draw(model, *other, torch.arange(4), samples=3)
        assert padded.tolist() == whole.tolist()
    chosen = torch.tensor([2, 0])
    _, (part, _part_mask) = draw(model, ids[chosen], mask[chosen], chosen, samples=2)
    expected = whole.view(4, 3, -1)[chosen, :2].reshape(4, -1)[:, : part.shape[1]]
    assert part.tolist() == expected.tolist()
    assert len({tuple(row) for row in whole.tolist()}) == len(whole), "completions of a source must differ"


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        GumbelSampler(0, torch.arange(2), temperature=0.0)
