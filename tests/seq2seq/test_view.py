"""The view against the plain model of every family: log-probabilities, gradients, generation, checkpoints."""

import copy
import pickle

import pytest
import torch
import transformers
from architectures import build
from tiny_models import ALL_FAMILIES, FAMILIES, SIDES, loud, plain_log_probs, tiny, tiny_batch, tiny_sources
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


@pytest.mark.parametrize("order", ROWS)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_log_probs_equal_the_plain_models(family, left, order):
    plain, view = tiny(family), as_view(tiny(family))
    completion, mask = tiny_batch()[2:]
    source, source_mask = tiny_sources(family, left)
    with torch.no_grad():
        expected = plain_log_probs(plain, source, source_mask, completion, mask, ROWS[order])
        states = encode(view, source, source_mask)
        assert len(states) == 2  # each source once
        found = sequence_log_probs(view, states, source_mask, completion, mask, order=order)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[mask == 0].abs().max() == 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padding_of_a_completion_may_stand_on_either_side(family):
    """Absolute positions (BART, Whisper, GPT-2) would count it; the truth is each row by itself, without any."""
    plain, view = tiny(family), as_view(tiny(family))
    completion, mask = tiny_batch()[2:]
    source, source_mask = tiny_sources(family)
    roll = (torch.arange(5) + mask.sum(1, keepdim=True)) % 5
    left, left_mask = completion.gather(1, roll), mask.gather(1, roll)
    assert left_mask[:, -1].all()
    assert not left_mask[:, 0].all()
    with torch.no_grad():
        states = encode(view, source, source_mask)
        found = sequence_log_probs(view, states, source_mask, left, left_mask, order="sample-major")
        # The call that TRL makes, with the start token before the first real one.
        start = left_mask.new_full((6, 1), decoder_start_id(view))
        ids = torch.cat([torch.zeros_like(start), left], 1)
        real = torch.cat([torch.zeros_like(start), left_mask], 1)
        ids.scatter_(1, 5 - mask.sum(1, keepdim=True), start)
        real.scatter_(1, 5 - mask.sum(1, keepdim=True), torch.ones_like(start))
        side = {f"encoder_{view.main_input_name}": source, "encoder_attention_mask": source_mask}
        scored = view(input_ids=ids, attention_mask=real, **side).last_hidden_state
        logits = output_logits(view, scored)[:, :-1]
        for row, document in enumerate(ROWS["sample-major"]):
            alone = completion[row : row + 1, : int(mask[row].sum())]
            one = [document]
            expected = plain_log_probs(plain, source, source_mask, alone, torch.ones_like(alone), one)[0]
            length = len(expected)
            torch.testing.assert_close(found[row, 5 - length :], expected, rtol=0, atol=1e-5)
            by_forward = logits[row, 5 - length :].log_softmax(-1).gather(-1, alone[0][:, None])[:, 0]
            torch.testing.assert_close(by_forward, expected, rtol=0, atol=1e-5)
    assert found[left_mask == 0].abs().max() == 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_trl_gets_the_plain_models_log_probs_and_entropy(family):
    plain, view = tiny(family), as_view(tiny(family))
    completion, mask = tiny_batch()[2:]
    source, source_mask = tiny_sources(family)
    add_fused_lm_head(view, outputs=("log_probs", "entropy"))
    ids = torch.cat([torch.full((6, 1), decoder_start_id(view)), completion], dim=1)
    real = torch.cat([torch.ones(6, 1, dtype=torch.long), mask], dim=1)
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 0] = -100
    given = {} if source_mask is None else {"attention_mask": source_mask}
    with torch.no_grad():
        result = view(
            input_ids=ids,
            attention_mask=real,
            **{f"encoder_{view.main_input_name}": source},
            **{f"encoder_{name}": value for name, value in given.items()},
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
        expected = plain_log_probs(plain, source, source_mask, completion, mask, ROWS["sample-major"])
        # Without the switch the patched model is the plain one: generation and evaluation go this way.
        given |= {view.main_input_name: source, "decoder_input_ids": completion[:2]}
        own, theirs = view(**given), plain(**given)
        logits = plain(
            **{name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in given.items()}
            | {"decoder_input_ids": decoder_inputs(plain, completion)}
        ).logits
    torch.testing.assert_close(result.log_probs, expected, rtol=0, atol=1e-5)
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(result.entropy, -(log_probs.exp() * log_probs).sum(-1) * mask, rtol=0, atol=1e-4)
    assert torch.equal(own.logits, theirs.logits)
    # The head the trainer reads is one with the bias; the head the model keeps is its own again.
    assert view.get_output_embeddings() is view.get_output_embeddings()
    assert isinstance(view.get_output_embeddings(), torch.nn.Linear)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradients_equal_the_plain_models(family):
    plain, view = tiny(family), as_view(tiny(family))
    completion, mask = tiny_batch()[2:]
    source, source_mask = tiny_sources(family)
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


@pytest.mark.parametrize(("family", "left"), SIDES)
def test_greedy_generation_is_the_plain_models(family, left):
    plain, view = loud(tiny(family), 0.3), as_view(loud(tiny(family), 0.3))
    source, source_mask = tiny_sources(family, left)
    for model in (plain, view):
        model.generation_config.eos_token_id = None  # all tokens that are asked for
    # No pair of tokens twice: a random model would say the same one for ever, whatever it is given.
    options = {"max_new_tokens": 14, "do_sample": False, "attention_mask": source_mask, "no_repeat_ngram_size": 2}
    expected = plain.generate(source, **options)
    assert torch.equal(view.generate(source, **options), expected)
    first, second = expected[:, -12:].tolist()
    assert first != second
    assert min(len(set(first)), len(set(second))) > 3


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_checkpoint_stays_that_of_the_plain_class(family, tmp_path):
    plain, view = tiny(family), as_view(tiny(family))
    assert type(view).__name__ == type(plain).__name__
    assert list(view.state_dict()) == list(plain.state_dict())
    view.save_pretrained(tmp_path)
    back = type(plain).from_pretrained(tmp_path)
    assert type(back) is type(plain)
    if family in FAMILIES:
        assert type(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is type(plain)
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


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_silenced_dropout_makes_training_passes_equal(family):
    model = as_view(tiny(family)).train()
    source, source_mask = tiny_sources(family)
    completion, mask = tiny_batch()[2:]
    silence_dropout(model)

    def once():
        states = encode(model, source, source_mask)
        return sequence_log_probs(model, states, source_mask, completion, mask, order="sample-major")

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


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("EncoderDecoderModel", "its logits are not its output embedding"),  # BERT has a transform before it
        ("ProphetNetForConditionalGeneration", "its logits are not its output embedding"),  # n-gram streams
        ("SwitchTransformersForConditionalGeneration", "cannot be driven by a source and a completion alone"),
    ],
)
def test_another_architecture_is_refused_in_one_line(name, problem):
    """Some of them; all stand in test_architectures.py."""
    with pytest.raises(UserError, match=problem) as caught:
        as_view(build(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["UMT5", "Blenderbot", "M2M100", "LED"])
def test_another_architecture_of_the_same_make_works(name):
    model = as_view(build(f"{name}ForConditionalGeneration"))
    source, source_mask, completion, mask = tiny_batch()
    with torch.no_grad():
        states = encode(model, source, source_mask)
        found = sequence_log_probs(model, states, source_mask, completion, mask, order="sample-major")
        expected = plain_log_probs(model, source, source_mask, completion, mask, ROWS["sample-major"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_mask_of_another_length_than_the_states_is_shortened_as_the_model_does():
    model = as_view(build("Speech2TextForConditionalGeneration"))
    features, completion = torch.randn(2, 24, 80), tiny_batch()[2]
    frame_mask = (torch.arange(24) < torch.tensor([[24], [13]])).long()
    mask = torch.ones_like(completion)
    with torch.no_grad():
        states = encode(model, features, frame_mask)
        assert states.shape[1] == 6
        found = sequence_log_probs(model, states, frame_mask, completion, mask, order="sample-major")
        expected = plain_log_probs(model, features, frame_mask, completion, mask, ROWS["sample-major"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    t5 = as_view(tiny("t5"))
    with pytest.raises(UserError, match="9 long for 6 encoder states: T5ForConditionalGeneration says no way"):
        sequence_log_probs(t5, states, tiny_batch()[1], completion, mask, order="sample-major")


def test_an_input_that_the_encoder_does_not_read_is_refused():
    """A Florence-2's image, say: nobody would see that only the text beside it was read."""
    model = as_view(build("Florence2ForConditionalGeneration"))
    ids, mask = tiny_batch()[:2]
    given = {"encoder_input_ids": ids, "encoder_attention_mask": mask, "encoder_pixel_values": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(UserError, match="pixel_values: is nothing that the encoder of Florence2"):
        model(input_ids=torch.full((2, 3), 4), **given)


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
