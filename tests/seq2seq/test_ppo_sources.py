"""PPO of models that hear or see: the encoder's input goes in under its own name; the first rollout is checked."""

import math

import pytest
import torch
from architectures import build
from ppo_environment import VOCABULARY, make_sources, make_trainer
from tiny_models import loud, tiny

from pipelines.seq2seq.sampling import GumbelSampler, sample_completions
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs

SHAPES = {"whisper": ("input_features", (8, 40)), "vision": ("pixel_values", (3, 8, 8))}


def featured(family, count=24):
    """The toy world's sources with arrays in place of tokens."""
    name, shape = SHAPES[family]
    generator = torch.Generator().manual_seed(2)
    return [
        {key: value for key, value in source.items() if key != "input_ids"}
        | {name: torch.randn(shape, generator=generator)}
        for source in make_sources(count)
    ]


@pytest.mark.parametrize("family", SHAPES)
def test_speech_and_images_take_ppo_steps(tmp_path, family):
    trainer = make_trainer(
        tmp_path,
        policy=loud(tiny(family, vocabulary=VOCABULARY), 0.2),
        sources=featured(family),
        rollouts=2,
        rollout_batch_size=8,
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "rollout" in entry]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert 0.3 < first["objective/entropy"] < math.log(VOCABULARY) - 0.1
    assert second["objective/kl"] > 1e-4
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("encoder.layer" in name for name in moved)
    assert any(name.startswith("value_head") for name in moved)
    # What the rollout holds is what the plain model says of these completions of these sources.
    rollout = trainer.rollout
    assert "source_mask" not in rollout
    assert rollout["source_ids"].shape == (trainer.args.sources_per_rollout, *SHAPES[family][1])
    reference = as_view(loud(tiny(family, vocabulary=VOCABULARY), 0.2))
    with torch.no_grad():
        states = encode(reference, rollout["source_ids"], None)
        expected = sequence_log_probs(
            reference, states, None, rollout["completion_ids"], rollout["completion_mask"], order="source-major"
        )
    torch.testing.assert_close(rollout["reference"], expected, rtol=0, atol=1e-5)


def test_a_collator_of_ones_own_makes_the_sources(tmp_path):
    """As one that opens audio files when they are needed: the example holds what it likes."""

    def collate_sources(examples):
        numbers = torch.tensor([float(len(example["document"])) for example in examples])
        return {"input_features": numbers[:, None, None].expand(-1, 8, 40).clone()}

    sources = [{key: value for key, value in s.items() if key != "input_ids"} for s in make_sources()]
    policy = tiny("whisper", vocabulary=VOCABULARY)
    trainer = make_trainer(tmp_path, policy=policy, sources=sources, collate_sources=collate_sources, rollouts=1)
    trainer.train()
    assert trainer.rollout["source_ids"].shape[1:] == (8, 40)


LENGTHS = (24, 15, 21, 10)
"""Frames of speech: the encoder of Speech2Text makes one state of four."""


def hearing():
    """A Speech2Text of the toy world's words and its frames: their batch, and the mask that says how long each is."""
    model = loud(build("Speech2TextForConditionalGeneration"))
    model.generation_config.eos_token_id = 1
    frames = torch.randn(len(LENGTHS), max(LENGTHS), 80, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return model, frames * mask[..., None], mask


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_of_speech_of_unequal_length_are_those_of_generate(samples):
    """The mask is of frames, the decoder's of the states that the encoder makes of them."""
    model, frames, mask = hearing()
    model, rows = as_view(model), torch.arange(len(LENGTHS)).repeat_interleave(samples)
    sampler = GumbelSampler.of_samples(5, torch.arange(len(LENGTHS)), samples)
    with torch.no_grad():
        states = encode(model, frames, mask)
    assert states.shape[1] == 6
    options = {"samples": samples, "max_new_tokens": 8, "eos_token_id": 1, "pad_token_id": 0}
    found, _ = sample_completions(model, states, mask, sampler, **options)
    wanted = model.generate(
        frames[rows], attention_mask=mask[rows], logits_processor=[sampler], max_new_tokens=8, do_sample=False
    )[:, 1:]
    assert found.tolist() == wanted.tolist()
    # Were the padding read, others would come.
    with torch.no_grad():
        everything = sample_completions(model, states, torch.ones_like(mask), sampler, **options)[0]
    assert everything.tolist() != found.tolist()


@pytest.mark.parametrize("chunk", [64, 8])
def test_speech_of_unequal_length_takes_ppo_steps(tmp_path, chunk):
    """Also where a rollout is sampled in chunks, and a mini-batch without its longest recording."""
    model, frames, _ = hearing()

    def collate_sources(examples):
        parts = [example["frames"] for example in examples]
        ones = [torch.ones(len(part), dtype=torch.long) for part in parts]
        return {
            name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            for name, rows in (("input_features", parts), ("attention_mask", ones))
        }

    sources = [
        {key: value for key, value in source.items() if key != "input_ids"}
        | {"frames": frames[i % 4, : LENGTHS[i % 4] - i // 4]}
        for i, source in enumerate(make_sources())
    ]
    sizes = {"rollouts": 2, "rollout_batch_size": chunk, "learning_rate": 1e-2}
    trainer = make_trainer(
        tmp_path, policy=model, sources=sources, collate_sources=collate_sources, reward=lengths, **sizes
    )
    rollout = trainer.rollout = trainer.make_rollout(0)
    mask = rollout["source_mask"]
    assert len(mask.sum(1).unique()) > 2
    assert rollout["source_ids"].shape == (*mask.shape, 80)
    assert not rollout["source_ids"][mask == 0].any()
    # What the encoder makes of a recording's end depends on the padding behind it: the first ratio is one all the same.
    longest = []
    for number in range(trainer.args.mini_batches):
        batch = trainer.micro_batch(number)
        with torch.no_grad():
            names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
            now = trainer.model(*(batch[name] for name in names))["log_probs"]
        torch.testing.assert_close(now, batch["log_probs"], rtol=0, atol=1e-5)
        longest.append(int(batch["source_mask"].sum(1).max()))
    assert min(longest) < mask.shape[1]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rollout" in entry]
    assert entries[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert entries[1]["objective/kl"] > 1e-4


def lengths(documents, summaries, references) -> list[float]:
    return [float(len(summary)) for summary in summaries]


def test_a_view_that_scores_wrongly_is_caught_on_the_first_rollout(tmp_path):
    trainer = make_trainer(tmp_path, rollouts=1)
    trainer.model.policy.__dict__["_view_scale"] = 0.0  # uniform logits: entropy ln V, and losses that look healthy
    with pytest.raises(RuntimeError, match="log-probabilities differ"):
        trainer.train()


@pytest.mark.parametrize("layers", [(1, 3), (3, 1)])
def test_encoder_and_decoder_may_differ_in_depth(tmp_path, layers):
    """The cache of sampling counts the decoder's layers, whose number hides behind the encoder's in some configs."""
    from transformers import BartForConditionalGeneration

    config = tiny("bart", vocabulary=VOCABULARY).config
    config.encoder_layers, config.decoder_layers = layers
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, policy=BartForConditionalGeneration(config), rollouts=1)
    trainer.train()
    assert trainer.state.log_history[0]["objective/length"] > 1
