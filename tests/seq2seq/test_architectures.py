"""Every encoder-decoder class that transformers registers either fits the view or is refused in one clear line."""

import math

import pytest
import torch
from architectures import build, encoder_decoders, registered, sources_of
from datasets import Dataset
from ppo_environment import make_sources, make_tokenizer, make_trainer
from tiny_models import VOCABULARY, loud, tiny_batch
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin
from trl import DPOConfig

from pipelines.errors import UserError
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.sampling import GumbelSampler, sample_completions
from pipelines.seq2seq.stacks import source_name
from pipelines.seq2seq.training import LengthConfig
from pipelines.seq2seq.view import as_view, decoder_inputs, decoder_start_id, encode, sequence_log_probs

REFUSED = {
    "EncoderDecoderModel": "its logits are not its output embedding",  # BERT has a transform before it
    "ProphetNetForConditionalGeneration": "its logits are not its output embedding",  # n-gram streams
    "MoonshineStreamingForConditionalGeneration": "its logits are not its output embedding",  # positions on the states
    "FSMTForConditionalGeneration": "cannot be told apart",  # parts without a configuration of their own
    "NllbMoeForConditionalGeneration": "by a source and a completion alone",  # experts want the encoder's routing
    "SwitchTransformersForConditionalGeneration": "by a source and a completion alone",
    "SpeechT5ForSpeechToText": "by a source and a completion alone",  # networks before and behind the stacks
    "Pix2StructForConditionalGeneration": "by a source and a completion alone",
    "PPFormulaNetForConditionalGeneration": "by a source and a completion alone",
    "UdopForConditionalGeneration": "by a source and a completion alone",  # boxes of the words
    "DiaForConditionalGeneration": "has no language-model head",  # it writes speech
}
WORKING = (
    *("BartForConditionalGeneration", "BigBirdPegasusForConditionalGeneration", "BlenderbotForConditionalGeneration"),
    *("BlenderbotSmallForConditionalGeneration", "CanaryForConditionalGeneration", "CohereAsrForConditionalGeneration"),
    *("Florence2ForConditionalGeneration", "LEDForConditionalGeneration", "LongT5ForConditionalGeneration"),
    *("M2M100ForConditionalGeneration", "MBartForConditionalGeneration", "MT5ForConditionalGeneration"),
    *("MarianMTModel", "MoonshineForConditionalGeneration", "MvpForConditionalGeneration"),
    *("PLBartForConditionalGeneration", "PegasusForConditionalGeneration", "PegasusXForConditionalGeneration"),
    *("Pop2PianoForConditionalGeneration", "SeamlessM4TForSpeechToText", "SeamlessM4TForTextToText"),
    *("SeamlessM4Tv2ForSpeechToText", "SeamlessM4Tv2ForTextToText", "Speech2TextForConditionalGeneration"),
    *("SpeechEncoderDecoderModel", "T5ForConditionalGeneration", "T5Gemma2ForConditionalGeneration"),
    *("T5GemmaForConditionalGeneration", "UMT5ForConditionalGeneration", "VisionEncoderDecoderModel"),
    "WhisperForConditionalGeneration",
)
pytestmark = pytest.mark.slow


def test_the_two_lists_are_what_transformers_registers():
    assert set(REFUSED) | set(WORKING) == set(encoder_decoders())
    assert not set(REFUSED) & set(WORKING)


def test_what_is_no_encoder_decoder_is_refused_by_its_configuration():
    others = {name: kind for name, kind in registered().items() if name not in REFUSED and name not in WORKING}
    assert len(others) > 50  # language models with an encoder of speech or images in front

    class Model(torch.nn.Module):
        """Of a model that is refused for its configuration nothing else is looked at."""

        def __init__(self, config):
            super().__init__()
            self.config = config

    for name, kind in others.items():
        with pytest.raises(UserError, match="not an encoder-decoder") as caught:
            as_view(Model(CONFIG_MAPPING[kind]()))
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        as_view(build(name))
    assert str(caught.value).startswith(f"model={name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WORKING)
def test_it_fits_the_view(name):
    """Log-probabilities and gradients are those of the plain class's own forward, the source repeated for each row."""
    plain, view = loud(build(name)), as_view(loud(build(name)))
    source, source_mask = sources_of(plain)
    completion, mask = tiny_batch()[2:]
    rows = [0, 1, 0, 1, 0, 1]
    given = {} if source_mask is None else {"attention_mask": source_mask[rows]}
    inputs = {source_name(plain): source[rows], "decoder_input_ids": decoder_inputs(plain, completion)}
    logits = plain(**inputs, **given, use_cache=False).logits
    expected = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0] * mask
    states = encode(view, source, source_mask)
    assert len(states) == 2
    found = sequence_log_probs(view, states, source_mask, completion, mask, order="sample-major")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # or nothing would depend on the source
    for value in (expected.sum(), found.sum()):
        value.backward()
    for (part, one), other in zip(view.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            scale = other.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=1e-5, msg=part)


@pytest.mark.parametrize("name", WORKING)
def test_completions_are_those_of_generate(name):
    """Whatever its decoder keeps from one position to the next; the sampled tokens differ from row to row."""
    model = as_view(loud(build(name)))
    source, source_mask = sources_of(model)
    start = decoder_start_id(model)
    sampler = GumbelSampler.of_samples(5, torch.arange(2), 3)
    states = encode(model, source, source_mask)
    options = {"samples": 3, "max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
    completions, mask = sample_completions(model, states, source_mask, sampler, **options)
    model.generation_config = GenerationConfig(decoder_start_token_id=start, bos_token_id=start, pad_token_id=0)
    given = {} if source_mask is None else {"attention_mask": source_mask.repeat_interleave(3, 0)}
    # Some have a `generate` of their own on top of this.
    expected = GenerationMixin.generate(
        model, source.repeat_interleave(3, 0), **given, logits_processor=[sampler], max_new_tokens=12, do_sample=False
    )[:, 1:]
    assert completions.tolist() == expected.tolist()
    assert mask.all()
    assert len({tuple(row) for row in completions.tolist()}) > 3


def changed(before: dict, model) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def weights(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lengths(documents, summaries, references) -> list[float]:
    """A reward that differs among completions: only then is there something to learn."""
    return [float(len(summary)) for summary in summaries]


@pytest.mark.parametrize("name", WORKING)
def test_it_takes_a_dpo_and_a_ppo_step(name, tmp_path):
    model = loud(build(name))
    column, sources = source_name(model), sources_of(model)[0]
    tokenizer = make_tokenizer()
    completions = {
        "chosen_ids": [[5, 6, 1], [7, 1], [8, 9, 1], [4, 1]],
        "rejected_ids": [[6, 1], [9, 5, 1], [3, 1], [1]],
    }
    text = column == "input_ids"
    pairs = {"prompt_ids" if text else column: [sources[i % 2].tolist() for i in range(4)]}
    arguments = {"bf16": False, "activation_checkpointing": False, "use_cpu": True, "report_to": [], "logging_steps": 1}
    arguments |= {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}
    before = weights(model)
    trainer = EncoderDecoderDPOTrainer(
        model, DPOConfig(str(tmp_path), **arguments), Dataset.from_dict(pairs | completions), tokenizer, LengthConfig()
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert 0 < logged[0]["entropy"] < math.log(VOCABULARY) - 1e-3
    assert changed(before, trainer.model)

    policy = loud(build(name))
    policy.generation_config.eos_token_id = 1
    examples = make_sources(8)
    if not text:
        examples = [
            {k: v for k, v in e.items() if k != "input_ids"} | {column: sources[i % 2]} for i, e in enumerate(examples)
        ]
    before = weights(policy)
    sizes = {"sources_per_rollout": 4, "samples_per_source": 2, "mini_batch_size": 8, "rollouts": 1, "ppo_epochs": 1}
    ppo = make_trainer(tmp_path, policy=policy, sources=examples, reward=lengths, **sizes)
    seen, plain = [], ppo.compute_loss

    def compute_loss(module, inputs, *given, **options):
        names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
        with torch.no_grad():
            now = module(*(inputs.get(part) for part in names))["log_probs"]
        seen.append(float((now - inputs["log_probs"]).abs().max()))
        return plain(module, inputs, *given, **options)

    ppo.compute_loss = compute_loss
    ppo.train()
    assert seen == [pytest.approx(0, abs=1e-6)]  # the first ratio is one, in training mode
    assert ppo.state.log_history[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert changed(before, ppo.model.policy)
