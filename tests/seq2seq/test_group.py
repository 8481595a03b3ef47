"""GRPO and RLOO on TRL's trainers: exact log-probabilities, one encoding, advantages by hand, learning, resuming."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from ppo_environment import VOCABULARY, StopAt, count_w5, make_policy, make_sources, make_tokenizer
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import BartConfig, BartForConditionalGeneration
from trl import GRPOConfig, RLOOConfig

from pipelines.errors import UserError
from pipelines.seq2seq.group import GRPOStageConfig, RLOOStageConfig, grpo, rloo
from pipelines.seq2seq.group_trainer import EncoderDecoderGRPOTrainer, EncoderDecoderRLOOTrainer
from pipelines.seq2seq.rewards import RewardFunction, Rewards

KINDS = {"grpo": (EncoderDecoderGRPOTrainer, GRPOConfig), "rloo": (EncoderDecoderRLOOTrainer, RLOOConfig)}


def bart():
    torch.manual_seed(0)
    config = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, init_std=0.2, forced_eos_token_id=None, **config, **heads, **ids)
    )
    model.final_logits_bias.normal_()
    return model


def make_trainer(folder, kind="grpo", *, policy=None, lora=0, callbacks=None, options=None, **fields):
    from datasets import Dataset
    from peft import LoraConfig

    cls, arguments = KINDS[kind]
    given = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "beta": 0.05,
        "logging_steps": 1,
    }
    fixed = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    rows = [{**row, "prompt": row["document"]} for row in make_sources()]
    peft_config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=lora, target_modules="all-linear") if lora else None
    return cls(
        make_policy(dropout=0.3) if policy is None else policy,
        arguments(str(folder), **({"save_strategy": "no"} | given | fixed | fields)),
        Dataset.from_list(rows),
        make_tokenizer(),
        Rewards([RewardFunction("count", 1.0, count_w5)]),
        gold=count_w5,
        peft_config=peft_config,
        callbacks=callbacks,
        **(options or {}),
    )


def recorded(trainer):
    """The rollouts that the trainer makes, and what it was given."""
    seen, plain = [], trainer._generate_and_score_completions

    def make(inputs):
        seen.append((inputs, plain(inputs)))
        return seen[-1][1]

    trainer._generate_and_score_completions = make
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_log_probs_are_the_plain_models(tmp_path, kind, family):
    policy = bart() if family == "bart" else make_policy(dropout=0.3)
    plain = copy.deepcopy(policy).eval()
    trainer = make_trainer(tmp_path, kind, policy=policy, max_steps=1, temperature=0.7)
    seen, passes = recorded(trainer), []
    score = trainer._get_per_token_logps_and_entropies

    def kept(*arguments, **options):
        found = score(*arguments, **options)
        passes.append(found[0].detach())
        return found

    trainer._get_per_token_logps_and_entropies = kept
    trainer.train()
    inputs, rollout = seen[0]
    assert len(inputs) == 16
    ids, mask = rollout["completion_ids"], rollout["completion_mask"]
    wanted = torch.zeros(ids.shape)
    for row, source in enumerate(inputs):
        length = int(mask[row].sum())
        target = ids[row : row + 1, :length]
        with torch.no_grad():
            start = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], dim=1)
            logits = plain(input_ids=torch.tensor([source["input_ids"]]), decoder_input_ids=start).logits
        wanted[row, :length] = torch.log_softmax(logits[0] / 0.7, -1)[range(length), target[0]]
    # first the policy, then the reference, then the loss of the first micro-batch: dropout is off, nothing has moved
    for found in passes[:2]:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    first = wanted.view(2, 2, 4, -1)[:, 0].flatten(0, 1)  # the first of two micro-batches: every second source
    torch.testing.assert_close(passes[2], first, rtol=0, atol=1e-5)
    assert len({len(row["input_ids"]) for row in inputs}) > 1  # or padding would not be tested
    assert mask.sum(1).min() < mask.shape[1]
    assert len(set(map(tuple, ids.tolist()))) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_encoded_once_for_all_its_samples(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind)
    trainer._unchecked = False  # the first batch's check against the plain model encodes a source for each row
    encoded = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):

        def count(module, args, kwargs, name=name):
            encoded[name] += len(kwargs["input_ids"])

        model.get_encoder().register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    # One rollout of 4 sources: sampling, the old log-probabilities, two epochs; one pass of the reference.
    assert encoded == {"policy": 4 * (1 + 1 + 2), "reference": 4}


@pytest.mark.parametrize("kind", ["grpo", "grpo, divergence in the reward", "rloo"])
def test_advantages_are_those_of_the_papers(tmp_path, kind):
    options = {"kl_in": "reward"} if "," in kind else {}
    name = kind.partition(",")[0]
    trainer = make_trainer(tmp_path, name, max_steps=8, learning_rate=2e-2, beta=0.3, options=options)
    seen, passes = recorded(trainer), []
    charge = trainer._sequence_kl
    trainer._sequence_kl = lambda: passes.append(charge()) or passes[-1]
    trainer.train()
    inputs, rollout = seen[1]  # the second: the policy has moved from the reference
    texts = trainer.processing_class.batch_decode(rollout["completion_ids"].tolist(), skip_special_tokens=True)
    rewards = torch.tensor(count_w5(None, texts, None))
    assert passes[1].abs().max() > 1e-2
    if kind != "grpo":
        rewards = rewards - 0.3 * passes[1]
    groups = rewards.view(-1, 4)
    assert groups.std(dim=1).max() > 0
    if name == "grpo":
        wanted = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    else:
        wanted = groups - (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(rollout["advantages"], wanted.flatten(), rtol=1e-4, atol=1e-5)
    assert [row["id"] for row in inputs[::4]] == [inputs[4 * i]["id"] for i in range(4)]
    assert all(row["id"] == inputs[i // 4 * 4]["id"] for i, row in enumerate(inputs))


def test_a_missing_end_is_charged(tmp_path):
    trainer = make_trainer(tmp_path, options={"missing_eos_penalty": 7.0}, max_completion_length=3, max_steps=1)
    kept, score = [], trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: kept.append((a[3], score(*a))) or kept[-1][1]
    trainer.train()
    ids, found = kept[0]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    for row, text, value in zip(ids, texts, found[:, 0].tolist(), strict=True):
        assert value == count_w5(None, [text], None)[0] - 7.0 * (row[-1] != 1)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seed_source_and_rollout_alone(tmp_path, kind):
    first, second = make_trainer(tmp_path, kind, max_steps=12), make_trainer(tmp_path, kind, max_steps=12)
    seen, again = recorded(first), recorded(second)
    first.train()
    torch.manual_seed(999)  # generators elsewhere play no part
    second.train()
    for (_, one), (_, two) in zip(seen, again, strict=True):
        assert torch.equal(one["completion_ids"], two["completion_ids"])
    assert [row["id"] for row in seen[0][0]] != [row["id"] for row in seen[1][0]]
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_rises(tmp_path, kind):
    trainer = make_trainer(
        tmp_path, kind, max_steps=40, learning_rate=2e-2, per_device_train_batch_size=32, steps_per_generation=1,
        num_generations=8, beta=0.02,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "objective/proxy_reward" in entry]
    assert len(entries) == 20
    assert entries[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert entries[-1]["objective/proxy_reward"] > entries[0]["objective/proxy_reward"] + 1
    assert entries[-1]["objective/kl"] > 0.5
    assert entries[0].keys() == entries[-1].keys()
    names = {"objective/gold", "objective/length", "objective/entropy", "policy/clip_fraction", "policy/loss"}
    assert names <= entries[0].keys()
    assert not any("time" in key or "num_tokens" in key for entry in entries for key in entry)


@pytest.mark.parametrize(("kind", "lora"), [("grpo", 0), ("grpo", 2), ("rloo", 0)])
def test_resume_in_the_middle_of_a_rollout_is_exact(tmp_path, kind, lora):
    """Four steps a rollout, 24 sources: stopped at step 7, saved at 6; a pass over the sources ends at step 24."""
    fields = {"max_steps": 28, "save_strategy": "steps", "save_steps": 6, "lora": lora, "seed": 3}
    whole = make_trainer(tmp_path / "whole", kind, **fields)
    whole.train()
    for step, checkpoint in ((7, 6), (26, 24)):
        folder = tmp_path / f"stopped-{step}"
        make_trainer(folder, kind, callbacks=[StopAt(step)], **fields).train()
        torch.manual_seed(12345)
        resumed = make_trainer(folder, kind, **fields)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
        weights, again = whole.model.state_dict(), resumed.model.state_dict()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        histories = [[e for e in t.state.log_history if "policy/loss" in e] for t in (whole, resumed)]
        assert histories[0] == histories[1]
        assert len(histories[0]) == 28


def test_lora_has_the_model_without_its_adapter_as_reference(tmp_path):
    trainer = make_trainer(tmp_path, lora=2, max_steps=16, learning_rate=2e-2)
    trainer.train()
    assert trainer.ref_model is None
    kl = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[-1]) > 1e-3


def test_a_batch_that_cuts_a_sources_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stay together"):
        make_trainer(tmp_path, per_device_train_batch_size=6, steps_per_generation=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "reads"), [("whisper", "input_features"), ("vision", "pixel_values")])
def test_a_model_of_speech_or_images_is_refused_in_one_line(tmp_path, kind, family, reads):
    with pytest.raises(UserError, match=f"^model=[A-Za-z]+: reads {reads}, and GRPO and RLOO take") as caught:
        make_trainer(tmp_path, kind, policy=tiny(family, vocabulary=VOCABULARY))
    assert "\n" not in str(caught.value)


def test_a_policy_gone_to_nan_is_said_in_one_line(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"learning_rate=.*NaN"):
        trainer.train()


def settings(cls, tiny_t5, tiny_corpus, output, **fields):
    given = {
        "model": str(tiny_t5),
        "dataset": str(tiny_corpus),
        "reward": ["rouge", "length"],
        "output_dir": str(output),
        "rollouts": 4,
        "sources_per_rollout": 8,
        "samples_per_source": 4,
        "mini_batch_size": 16,
        "group_epochs": 2,
        "max_target_length": 8,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "save_steps": 6,
        "report_to": "none",
    }
    return cls(**(given | fields))


@pytest.mark.parametrize(("stage", "cls"), [(grpo, GRPOStageConfig), (rloo, RLOOStageConfig)])
def test_the_stage_writes_a_plain_model_and_resumes(tiny_t5, tiny_corpus, tmp_path, stage, cls):
    metrics = stage(settings(cls, tiny_t5, tiny_corpus, tmp_path / "out"))
    name = stage.__name__
    assert metrics[f"{name}/rollouts"] == 4
    assert {f"{name}/train_{key}" for key in ("proxy_reward", "gold", "kl", "length")} < metrics.keys()
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert sum("objective/kl" in entry for entry in history) == 4
    assert sum("policy/loss" in entry for entry in history) == 16
    assert {"reward/rouge", "reward/length"} < history[0].keys()
    plain = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert type(plain) is transformers.T5ForConditionalGeneration
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-12"
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-16", ignore_errors=True)
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    assert stage(settings(cls, tiny_t5, tiny_corpus, tmp_path / "again")) == metrics
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "again" / "log_history.json").read_text() == (tmp_path / "out" / "log_history.json").read_text()


def test_lora_of_the_stage_is_merged(tiny_t5, tiny_corpus, tmp_path):
    config = settings(GRPOStageConfig, tiny_t5, tiny_corpus, tmp_path / "out", lora_r=2, rollouts=2, kl_in="reward")
    grpo(config)
    before = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in merged.items())
    assert str(tiny_t5) not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()


def test_impossible_combinations_are_named(tiny_t5, tiny_corpus, tmp_path):
    for fields, what in (
        ({"mini_batch_size": 12}, "mini_batch_size"),
        ({"mini_batch_size": 6, "samples_per_source": 4, "sources_per_rollout": 3}, "mini_batch_size"),
        ({"epochs": 2.0}, "epochs"),
        ({"reward_weights": [1.0]}, "reward_weights"),
        ({"logging_steps": 3, "save_steps": 6}, "logging_steps"),
    ):
        config = settings(GRPOStageConfig, tiny_t5, tiny_corpus, tmp_path, **fields)
        assert what in {p.what for p in config.problems()}
    assert settings(GRPOStageConfig, tiny_t5, tiny_corpus, tmp_path).problems() == []
    with pytest.raises(UserError, match="dataset=96 training documents: a rollout takes 200"):
        grpo(settings(GRPOStageConfig, tiny_t5, tiny_corpus, tmp_path, sources_per_rollout=200, mini_batch_size=800))
