"""Efficient decoding: cached steps equal teacher forcing, of the small transformer and of T5; work; the stage."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import decoding_transformer as transformer
from pipelines.problems.decoding_transformer import GENERATORS, Attention, EncoderDecoder, Sizes
from pipelines.problems.efficient_decoding import (
    EfficientDecodingConfig,
    efficient_decoding,
    small_t5,
    t5_one_by_one,
)
from tests.problems.pages import assert_page_is_filled


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EncoderDecoder(20, 16, 4, 24, 2).eval()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 20, (3, 7), generator=generator), torch.randint(0, 20, (3, 11), generator=generator)


@pytest.mark.parametrize("parts", [[1] * 11, [11], [4, 1, 6], [1, 10], [10, 1]])
def test_any_cut_of_the_target_gives_the_logits_of_teacher_forcing(model, texts, parts):
    source, target = texts
    with torch.no_grad():
        forced = model(source, target)
        cache = model.start(model.encode(source))
        found = torch.cat([model.decode(part, cache) for part in target.split(parts, 1)], dim=1)
    torch.testing.assert_close(found, forced, atol=1e-5, rtol=0)
    assert cache.length == 11
    assert cache.past[0].keys.shape == (3, 4, 11, 4)


def test_a_token_does_not_see_later_ones_and_does_see_earlier_ones_and_the_source(model, texts):
    source, target = texts
    with torch.no_grad():
        before = model(source, target)
        changed = target.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 20
        after = model(source, changed)
        other = source.clone()
        other[:, 3] = (other[:, 3] + 1) % 20
        elsewhere = model(other, target)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=2).all()
    assert (before != elsewhere).any(dim=2).all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal):
    torch.manual_seed(0)
    attention, x = Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    seen = attention.keys_values(x)
    query = attention.query(x).unflatten(2, (3, -1)).transpose(1, 2)
    wanted = scaled_dot_product_attention(query, seen.keys, seen.values, is_causal=causal)
    found = attention(x, seen, causal=causal)
    torch.testing.assert_close(found, attention.out(wanted.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


def test_all_ways_to_generate_give_the_same_tokens(model, texts):
    source, _ = texts
    found = [generate(model, source, 15) for generate in GENERATORS.values()]
    assert found[0].shape == (3, 16)
    assert len(found[0].unique()) > 2
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("how", list(GENERATORS))
@pytest.mark.parametrize(("s", "length"), [(3, 1), (5, 8), (12, 4)])
def test_counted_work_is_the_formulas(model, how, s, length):
    counter = FlopCounterMode(display=False)
    with counter:
        GENERATORS[how](model, torch.zeros(1, s, dtype=torch.int64), length)
    assert transformer.generation_macs(Sizes(20, 16, 24, 2), how, s, length) == counter.get_total_flops() / 2


def test_positions_are_the_sinusoids_of_the_paper():
    found = transformer.positions(3, 2, 8, torch.zeros(1, dtype=torch.float64))
    for row, place in enumerate((3, 4)):
        for i in range(4):
            angle = torch.tensor(place / 10_000 ** (2 * i / 8), dtype=torch.float64)
            assert float(found[row, i]) == pytest.approx(float(angle.sin()))
            assert float(found[row, 4 + i]) == pytest.approx(float(angle.cos()))


def small(folder, **fields):
    base = {"output_dir": str(folder), "vocabulary": 24, "width": 16, "inner": 32, "batch_size": 2, "repeats": 1}
    base |= {"source_length": 6, "target_length": 3, "source_lengths": [4, 8, 12], "target_lengths": [2, 4, 8]}
    return validate(EfficientDecodingConfig, base | fields)


def test_t5_one_token_at_a_time_equals_teacher_forcing(tmp_path):
    torch.manual_seed(0)
    t5 = small_t5(small(tmp_path))
    source, target = torch.randint(2, 24, (2, 6)), torch.randint(2, 24, (2, 9))
    with torch.no_grad():
        forced = t5(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(t5_one_by_one(t5, source, target), forced, atol=1e-5, rtol=0)


def test_the_stage_measures(tmp_path):
    metrics = efficient_decoding(small(tmp_path))
    assert metrics["efficient_decoding/checks_failed"] == 0
    assert metrics["efficient_decoding/speedup"] > 0
    assert_page_is_filled(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 30}, "does not split into 4 heads"),
        ({"target_lengths": [4, 2, 8]}, "do not rise"),
        ({"source_lengths": [4, 8]}, "source_lengths"),
    ],
)
def test_wrong_input_is_one_line(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(EfficientDecodingConfig, fields)
    assert str(error.value).count("\n") == 0
