"""PPO of models that hear or see: the encoder's input goes in under its own name; the first rollout is checked."""

import math

import pytest
import torch
from ppo_environment import VOCABULARY, make_sources, make_trainer
from tiny_models import loud, tiny

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
