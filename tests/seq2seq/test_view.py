"""The view against the plain model of every family: log-probabilities, gradients, generation, checkpoints."""

import copy
import pickle

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCABULARY, tiny, tiny_batch
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from pipelines.errors import UserError
from pipelines.seq2seq.view import (
    EncoderDecoderView,
    as_view,
    decode,
    decoder_inputs,
    decoder_start_id,
    encode,
    output_logits,
    sequence_log_probs,
    silence_dropout,
)

ROWS = {"sample-major": [0, 1, 0, 1, 0, 1], "source-major": [0, 0, 0, 1, 1, 1]}


def plain_log_probs(model, source, source_mask, completion, mask, rows):
    """Teacher-forced log-probabilities by the model's own forward, the source repeated for each completion."""
    logits = model(
        input_ids=source[rows],
        attention_mask=source_mask[rows],
        decoder_input_ids=decoder_inputs(model, completion),
        use_cache=False,
    ).logits
    return logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0] * mask


@pytest.mark.parametrize("order", ROWS)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_the_plain_models(family, left, order):
    plain, view = tiny(family), as_view(tiny(family))
    source, source_mask, completion, mask = tiny_batch(left)
    with torch.no_grad():
        expected = plain_log_probs(plain, source, source_mask, completion, mask, ROWS[order])
        states = encode(view, source, source_mask)
        assert len(states) == 2  # each source once
        found = sequence_log_probs(view, states, source_mask, completion, mask, order=order)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[mask == 0].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_gets_the_plain_models_log_probs_and_entropy(family):
    plain, view = tiny(family), as_view(tiny(family))
    source, source_mask, completion, mask = tiny_batch()
    add_fused_lm_head(view, outputs=("log_probs", "entropy"))
    ids = torch.cat([torch.full((6, 1), decoder_start_id(view)), completion], dim=1)
    real = torch.cat([torch.ones(6, 1, dtype=torch.long), mask], dim=1)
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 0] = -100
    with torch.no_grad():
        result = view(
            input_ids=ids,
            attention_mask=real,
            encoder_input_ids=source,
            encoder_attention_mask=source_mask,
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
        expected = plain_log_probs(plain, source, source_mask, completion, mask, ROWS["sample-major"])
        # Without the switch the patched model is the plain one: generation and evaluation go this way.
        own = view(input_ids=source, attention_mask=source_mask, decoder_input_ids=completion[:2])
        theirs = plain(input_ids=source, attention_mask=source_mask, decoder_input_ids=completion[:2])
    torch.testing.assert_close(result.log_probs, expected, rtol=0, atol=1e-5)
    assert torch.equal(own.logits, theirs.logits)
    # The head the trainer reads is one with the bias; the head the model keeps is its own again.
    assert view.get_output_embeddings() is view.get_output_embeddings()
    assert isinstance(view.get_output_embeddings(), torch.nn.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_plain_models(family):
    plain, view = tiny(family), as_view(tiny(family))
    source, source_mask, completion, mask = tiny_batch()
    plain_log_probs(plain, source, source_mask, completion, mask, ROWS["source-major"]).sum().backward()
    states = encode(view, source, source_mask)
    sequence_log_probs(view, states, source_mask, completion, mask, order="source-major").sum().backward()
    compared = 0
    for (name, parameter), (other, expected) in zip(view.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        if expected.grad is not None:
            scale = expected.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(parameter.grad / scale, expected.grad / scale, rtol=0, atol=1e-5, msg=name)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_checkpoint_stay_those_of_the_plain_class(family, tmp_path):
    plain, view = tiny(family), as_view(tiny(family))
    source, source_mask, *_ = tiny_batch()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(source, attention_mask=source_mask, **options)
    assert torch.equal(view.generate(source, attention_mask=source_mask, **options), expected)
    assert type(view).__name__ == type(plain).__name__
    assert list(view.state_dict()) == list(plain.state_dict())
    view.save_pretrained(tmp_path)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(back) is type(plain)
    assert back.config.architectures == [type(plain).__name__]
    for name, value in plain.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_copies_and_pickles_are_views_too(family):
    view = as_view(tiny(family))
    source, source_mask, completion, mask = tiny_batch()
    expected = sequence_log_probs(
        view, encode(view, source, source_mask), source_mask, completion, mask, order="sample-major"
    )
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert isinstance(other, EncoderDecoderView)
        assert other is not view
        states = encode(other, source, source_mask)
        found = sequence_log_probs(other, states, source_mask, completion, mask, order="sample-major")
        assert torch.equal(found, expected)


def test_as_view_is_idempotent_and_moves_no_generator():
    model = tiny("t5")
    model.train()
    before = torch.get_rng_state()
    view = as_view(model)
    assert view is model
    cls = type(view)
    assert type(as_view(view)) is cls
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_decoder_states_make_the_models_logits():
    model = as_view(tiny("t5"))
    source, source_mask, completion, _ = tiny_batch()
    states = decode(model, encode(model, source, source_mask), source_mask, completion[:2])
    expected = model(input_ids=source, attention_mask=source_mask, decoder_input_ids=completion[:2]).logits
    torch.testing.assert_close(output_logits(model, states), expected)


def test_rows_may_belong_to_sources_in_unequal_number():
    model = as_view(tiny("t5"))
    source, source_mask, completion, mask = tiny_batch()
    owner = torch.tensor([0, 1, 1, 1, 0, 1])
    states = encode(model, source, source_mask)
    found = sequence_log_probs(model, states, source_mask, completion, mask, order=owner)
    expected = plain_log_probs(model, source, source_mask, completion, mask, owner)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_order_of_rows_is_never_guessed():
    model = as_view(tiny("t5"))
    source, source_mask, completion, mask = tiny_batch()
    states = encode(model, source, source_mask)
    with pytest.raises(ValueError, match="say order="):
        sequence_log_probs(model, states, source_mask, completion, mask)
    with pytest.raises(ValueError, match="5 rows cannot belong to 2 sources"):
        sequence_log_probs(model, states, source_mask, completion[:5], mask[:5], order="source-major")


@pytest.mark.parametrize("family", FAMILIES)
def test_silenced_dropout_makes_training_passes_equal(family):
    model = as_view(tiny(family)).train()
    source, source_mask, completion, _ = tiny_batch()
    silence_dropout(model)

    def once():
        return model(input_ids=source, attention_mask=source_mask, decoder_input_ids=completion[:2]).logits

    assert torch.equal(once(), once())
    assert model.config.to_dict() == tiny(family).config.to_dict()


def test_trls_own_switch_would_miss_t5s_attention_dropout():
    model = tiny("t5").train()
    source, source_mask, completion, _ = tiny_batch()
    disable_dropout_in_model(model)
    first, second = (
        model(input_ids=source, attention_mask=source_mask, decoder_input_ids=completion[:2]).logits for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_a_decoder_only_model_is_refused_in_one_line():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="GPT2LMHeadModel: not an encoder-decoder") as caught:
        as_view(model)
    assert "\n" not in str(caught.value)
    backbone = transformers.T5Model(tiny("t5").config)
    with pytest.raises(UserError, match="no language-model head"):
        as_view(backbone)


def test_an_unknown_path_to_the_logits_is_refused_not_guessed():
    class Doubled(transformers.T5ForConditionalGeneration):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 2
            return found

    with pytest.raises(UserError, match="its logits are not its output embedding"):
        as_view(Doubled(tiny("t5").config))


def test_lora_goes_through_the_view():
    from peft import LoraConfig, get_peft_model

    model = as_view(tiny("bart"))
    source, source_mask, completion, mask = tiny_batch()
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.eval()
    states = encode(adapted, source, source_mask)
    found = sequence_log_probs(adapted, states, source_mask, completion, mask, order="sample-major")
    expected = plain_log_probs(adapted.get_base_model(), source, source_mask, completion, mask, ROWS["sample-major"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        without = sequence_log_probs(
            adapted, encode(adapted, source, source_mask), source_mask, completion, mask, order="sample-major"
        )
    base = plain_log_probs(tiny("bart"), source, source_mask, completion, mask, ROWS["sample-major"])
    torch.testing.assert_close(without, base, rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 1e-3


def test_speech_goes_in_under_the_models_own_input_name():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20,
        max_target_positions=32, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, begin_suppress_tokens=[],
    )  # fmt: skip
    model = as_view(transformers.WhisperForConditionalGeneration(config).eval())
    features, completion = torch.randn(2, 8, 40), tiny_batch()[2]
    mask = torch.ones_like(completion)
    states = encode(model, features, None)
    found = sequence_log_probs(model, states, None, completion, mask, order="sample-major")
    logits = model(input_features=features.repeat(3, 1, 1), decoder_input_ids=decoder_inputs(model, completion)).logits
    expected = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
