"""Listwise DPO: the loss against the plain model's, K = 2 against DPO, one encoding, references, resuming."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, load_from_disk
from preference_environment import LENGTHS, arguments, same_outcome, stage_settings, t5
from safetensors.torch import load_file
from tiny_models import tiny

from pipelines.errors import UserError
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.listwise import ListwiseConfig, listwise
from pipelines.seq2seq.listwise_trainer import ListwiseDPOTrainer, list_log_probs, tokenize_rankings
from pipelines.seq2seq.losses import plackett_luce_loss
from pipelines.seq2seq.view import as_view


def ranked(row, others, draw):
    """The reference first, then other rows' with one, two … words added; between two and four texts, shuffled."""
    texts = [row["summary"]]
    for worse in range(1, draw.randint(2, 4)):
        texts.append(f"{draw.choice(others)} {' '.join(draw.choices(['file', 'table', 'token'], k=worse))}")
    order = draw.sample(range(len(texts)), len(texts))
    completions = [texts[i] for i in order]
    return {
        "id": row["id"],
        "prompt": row["document"],
        "completions": completions,
        "ranking": [order.index(i) for i in range(len(texts))],
    }


@pytest.fixture(scope="module")
def rankings(tmp_path_factory, tiny_corpus):
    draw = random.Random(4)
    splits = {}
    for name, rows in load_from_disk(str(tiny_corpus)).items():
        splits[name] = Dataset.from_list([ranked(row, rows["summary"], draw) for row in rows])
    folder = tmp_path_factory.mktemp("rankings") / "lists"
    DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def lists(rankings, tokenizer):
    return tokenize_rankings(load_from_disk(str(rankings))["train"], tokenizer, LENGTHS)[0]


def make_trainer(tiny_t5, lists, tokenizer, folder, *, cls=ListwiseDPOTrainer, **fields):
    given = arguments(folder, **({"beta": 0.5} | fields))
    return cls(t5(tiny_t5), given, lists, tokenizer, LENGTHS)


def settings(tiny_t5, rankings, output, **fields) -> ListwiseConfig:
    return stage_settings(ListwiseConfig, output, model=tiny_t5, rankings=rankings, **fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5, rankings):
    output = tmp_path_factory.mktemp("listwise")
    config = settings(tiny_t5, rankings, output)
    return config, output, listwise(config)


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
def test_first_loss_is_the_log_of_the_number_of_rankings(tiny_t5, lists, tokenizer, tmp_path, cached):
    trainer = make_trainer(tiny_t5, lists, tokenizer, tmp_path, precompute_ref_log_probs=cached)
    assert trainer.model.config.dropout_rate > 0
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in range(6)]
    assert len({len(row["completion_ids"]) for row in rows}) > 1
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected = sum(math.log(math.factorial(len(row["completion_ids"]))) for row in rows) / 6
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_loss_is_that_of_the_plain_models_log_probs(tiny_t5, lists, tokenizer, tmp_path):
    trainer = make_trainer(tiny_t5, lists, tokenizer, tmp_path, precompute_ref_log_probs=True)
    generator = torch.Generator().manual_seed(0)
    moved = t5(tiny_t5).eval()
    for parameter in moved.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    trainer.model.load_state_dict(moved.state_dict())

    def log_prob(model, source, target):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
        return torch.log_softmax(logits, -1)[range(len(target)), target].sum()

    rows, reference = [trainer.train_dataset[i] for i in range(5)], t5(tiny_t5).eval()
    losses = []
    for row in rows:
        ratios = torch.stack([log_prob(moved, row["prompt_ids"], c) for c in row["completion_ids"]]) - torch.stack(
            [log_prob(reference, row["prompt_ids"], c) for c in row["completion_ids"]]
        )
        losses.append(plackett_luce_loss(0.5 * ratios[None], torch.tensor([row["ranking"]])).item())
    assert max(losses) - min(losses) > 0.1
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(sum(losses) / 5, abs=1e-4)


def test_lists_of_two_train_what_dpo_trains(tiny_t5, rankings, tokenizer, tmp_path):
    texts = load_from_disk(str(rankings))["train"].select(range(32))
    twos = [{**r, "completions": [r["completions"][i] for i in (r["ranking"][-1], r["ranking"][0])]} for r in texts]
    twos = Dataset.from_list([{**row, "ranking": [1, 0]} for row in twos])
    pairs = Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["completions"][1], "rejected": r["completions"][0]} for r in twos]
    )
    pair_lists = tokenize_rankings(twos, tokenizer, LENGTHS)[0]
    trainers = [
        make_trainer(tiny_t5, pair_lists, tokenizer, tmp_path, precompute_ref_log_probs=True),
        make_trainer(tiny_t5, pairs, tokenizer, tmp_path, cls=EncoderDecoderDPOTrainer, precompute_ref_log_probs=True),
    ]
    for trainer in trainers:
        trainer.train()
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_a_source_is_encoded_once_for_all_its_completions(tiny_t5, lists, tokenizer, tmp_path):
    trainer = make_trainer(tiny_t5, lists, tokenizer, tmp_path, precompute_ref_log_probs=False)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.compute_loss(trainer.model, batch)  # the first batch is also checked against the plain model
    encoded = {"policy": [], "reference": []}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.get_encoder().register_forward_pre_hook(
            lambda module, args, kwargs, name=name: encoded[name].append(len(kwargs["input_ids"])), with_kwargs=True
        )
    assert len(batch["input_ids"]) > 16
    trainer.compute_loss(trainer.model, batch)
    assert encoded == {"policy": [8], "reference": [8]}


def test_cached_reference_log_probs_are_those_of_each_completion(tiny_t5, lists, tokenizer, tmp_path):
    trainer = make_trainer(tiny_t5, lists, tokenizer, tmp_path, precompute_ref_log_probs=True)
    found = list_log_probs(as_view(t5(tiny_t5)), lists, tokenizer, batch_size=5)
    for cached, value in zip(trainer.train_dataset["ref_logps"], found, strict=True):
        assert cached == pytest.approx(value, abs=1e-4)


def test_only_the_first_places_are_believed_where_so_many_are_asked_for(rankings, tokenizer):
    texts = load_from_disk(str(rankings))["train"]
    found = tokenize_rankings(texts, tokenizer, LENGTHS, top_k=1)[0]
    assert set(found["known"]) == {1}
    short = texts.map(lambda row: {"ranking": row["ranking"][:2]})
    found = tokenize_rankings(short, tokenizer, LENGTHS)[0]
    assert set(found["known"]) == {2}
    for row, text in zip(found, texts, strict=True):
        assert row["ranking"][:2] == text["ranking"][:2]
        assert sorted(row["ranking"]) == list(range(len(text["completions"])))


@pytest.mark.parametrize(("family", "reads"), [("whisper", "input_features"), ("vision", "pixel_values")])
def test_a_model_of_speech_or_images_is_refused_in_one_line(lists, tokenizer, tmp_path, family, reads):
    model = tiny(family, vocabulary=len(tokenizer))
    with pytest.raises(UserError, match=f"^model=[A-Za-z]+: reads {reads}, and listwise DPO takes") as caught:
        ListwiseDPOTrainer(model, arguments(tmp_path), lists, tokenizer, LENGTHS)
    assert "\n" not in str(caught.value)


def test_the_stage_learns_the_order(trained):
    _, output, metrics = trained
    assert metrics["listwise/accuracy"] > 0.75
    assert metrics["listwise/accuracy_ci_low"] <= metrics["listwise/accuracy"] <= metrics["listwise/accuracy_ci_high"]
    assert metrics["listwise/margin_ci_low"] > 0
    assert 2 < metrics["listwise/completions"] < 4
    history = json.loads((output / "log_history.json").read_text())
    agreement = [entry["rewards/accuracies"] for entry in history if "rewards/accuracies" in entry]
    assert agreement[0] == pytest.approx(0.5, abs=0.25)  # at the reference only rounding tells rewards apart
    assert [entry for entry in history if "eval_loss" in entry]
    plain = transformers.T5ForConditionalGeneration.from_pretrained(output)
    assert type(plain) is transformers.T5ForConditionalGeneration


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(trained, tiny_t5, rankings, tmp_path, cached):
    _, output, metrics = trained
    if not cached:
        output = tmp_path / "whole"
        metrics = listwise(settings(tiny_t5, rankings, output, precompute_ref_log_probs=False))
    kept = output / "checkpoints" / "checkpoint-8"
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    resumed = settings(tiny_t5, rankings, tmp_path / "again", precompute_ref_log_probs=cached)
    assert listwise(resumed) == metrics
    assert same_outcome(output, tmp_path / "again")


def test_lora_has_the_model_without_its_adapter_as_reference(tiny_t5, rankings, tmp_path):
    config = settings(
        tiny_t5, rankings, tmp_path / "out", lora_r=4, learning_rate=1e-2, max_steps=6, save_steps=3,
        precompute_ref_log_probs=False,
    )  # fmt: skip
    metrics = listwise(config)
    assert metrics["listwise/margin_ci_low"] > 0
    before, merged = t5(tiny_t5).state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed
    assert not any("shared" in name or "layer_norm" in name for name in changed)
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-3"
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    assert listwise(dataclasses.replace(config, output_dir=str(tmp_path / "again"))) == metrics
