"""The reward model and its stage: scores, gradients, saving, resuming, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, load_from_disk
from preference_environment import LENGTHS, same_outcome, stage_settings
from tiny_models import FAMILIES, save_pairs, tiny, tiny_batch

from pipelines.errors import UserError
from pipelines.seq2seq.collators import (
    GroupedByLength,
    LengthGroupedSampler,
    PairCollator,
    pad_rows,
    pair_lengths,
    token_counts,
    tokenize_pairs,
)
from pipelines.seq2seq.metrics import wilson_interval
from pipelines.seq2seq.reward import RewardConfig, reward
from pipelines.seq2seq.reward_model import (
    EncoderDecoderRewardConfig,
    EncoderDecoderRewardModel,
    RewardScorer,
    load_reward_model,
)
from pipelines.seq2seq.reward_trainer import RewardTrainer, calibration
from pipelines.seq2seq.training import LengthConfig, last_checkpoint


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_corpus):
    return save_pairs(tmp_path_factory.mktemp("pairs") / "preferences", tiny_corpus)


def settings(tiny_t5, pairs, output, **fields) -> RewardConfig:
    given = {"max_steps": 24, "learning_rate": 1e-2, "logging_steps": 2, "warmup_ratio": 0.1, "prefix": "summarize: "}
    return stage_settings(RewardConfig, output, model=tiny_t5, preferences=pairs, **(given | fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5, pairs):
    output = tmp_path_factory.mktemp("reward")
    config = settings(tiny_t5, pairs, output)
    return config, output, reward(config)


def reward_model(family, tmp_path) -> EncoderDecoderRewardModel:
    tiny(family).save_pretrained(tmp_path / family)
    torch.manual_seed(0)
    return EncoderDecoderRewardModel.from_seq2seq(str(tmp_path / family), LengthConfig(prefix="x: ")).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_head_on_the_last_real_state_and_survive_saving(family, tmp_path):
    model = reward_model(family, tmp_path)
    source, source_mask, summary, mask = tiny_batch()
    found = model.score(source, source_mask, summary, mask, order="source-major")
    start = torch.full((6, 1), model.config.decoder_start_token_id)
    backbone = transformers.AutoModel.from_pretrained(tmp_path / family)
    for row, document in enumerate([0, 0, 0, 1, 1, 1]):
        real = int(mask[row].sum())
        # Alone and without any padding: what a row scores must not depend on its neighbours.
        state = backbone(
            input_ids=source[document][source_mask[document].bool()][None],
            decoder_input_ids=torch.cat([start[row], summary[row, :real]])[None],
        ).last_hidden_state[0, -1]
        assert found[row].item() == pytest.approx((state @ model.score_head.weight[0]).item(), abs=2e-5)
    left = (torch.arange(5) + mask.sum(1, keepdim=True)) % 5
    torch.testing.assert_close(
        model.score(source, source_mask, summary.gather(1, left), mask.gather(1, left), order="source-major"), found
    )
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    again = load_reward_model(str(tmp_path / "saved"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    # Weights mapped from a file lie at other addresses, which may change the last bit of a product.
    torch.testing.assert_close(
        again.score(source, source_mask, summary, mask, order="source-major"), found, rtol=0, atol=1e-6
    )
    assert again.lengths == LengthConfig(prefix="x: ")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "saved")) is EncoderDecoderRewardModel


def test_both_orders_encode_once_and_equal_repeated_documents(tmp_path):
    model = reward_model("t5", tmp_path)
    source, source_mask, summary, mask = tiny_batch()
    seen = []
    model.backbone.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for order, rows in (("sample-major", [0, 1] * 3), ("source-major", [0, 0, 0, 1, 1, 1])):
        once = model.score(source, source_mask, summary, mask, order=order)
        repeated = model.score(source[rows], source_mask[rows], summary, mask)
        torch.testing.assert_close(once, repeated, rtol=0, atol=1e-6)
    assert seen == [2, 6, 2, 6]


def test_gradient_of_the_loss_is_the_surprise_times_the_difference_of_score_gradients(tmp_path, tiny_t5):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_t5)
    torch.manual_seed(0)
    model = EncoderDecoderRewardModel.from_seq2seq(str(tiny_t5), LengthConfig()).eval()
    batch = PairCollator(tokenizer.pad_token_id, 0)(
        [{"prompt_ids": [5, 6, 7, 1], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 11, 12, 13, 1]}]
    )
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    rows = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [1]}])
    trainer = RewardTrainer(model, arguments, rows, None, tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        )

    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    chosen, rejected = model(**inputs).logits
    surprise = torch.sigmoid(rejected - chosen).item()
    expected = -surprise * (gradient(chosen) - gradient(rejected))
    torch.testing.assert_close(gradient(trainer.compute_loss(model, batch)), expected, rtol=1e-4, atol=1e-6)


def test_a_training_step_encodes_each_document_once_for_chosen_and_rejected(tiny_t5, pairs, tokenizer, tmp_path):
    rows = tokenize_pairs(load_from_disk(str(pairs))["train"], tokenizer, LENGTHS)[0]
    model = EncoderDecoderRewardModel.from_seq2seq(str(tiny_t5), LENGTHS)
    seen = []
    for name, part in (("encoder", model.backbone.get_encoder()), ("decoder", model.backbone.get_decoder())):
        part.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.append((name, len(kwargs["input_ids"]))), with_kwargs=True
        )
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "gradient_accumulation_steps": 2}
    given = transformers.TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **options)
    before = model.score_head.weight.detach().clone()
    RewardTrainer(model, given, rows, None, tokenizer).train()
    assert seen == [("encoder", 4), ("decoder", 8)] * 4  # two steps of two batches
    assert not torch.equal(model.score_head.weight, before)


def test_the_stage_learns_and_says_how_sure_it_may_be(trained):
    config, output, metrics = trained
    assert metrics["reward/accuracy_ci_low"] > 0.5  # the rejected ones carry words that the chosen never end in
    assert metrics["reward/accuracy_ci_low"] <= metrics["reward/accuracy"] <= metrics["reward/accuracy_ci_high"]
    assert metrics["reward/length_accuracy"] == 0.0  # every rejected summary is longer
    assert metrics["reward/loss"] < math.log(2)
    bins = json.loads((output / "calibration.json").read_text())
    assert sum(b["count"] for b in bins) == metrics["reward/pairs"] == 24
    assert all(b["low"] <= b["observed"] <= b["high"] for b in bins)
    history = json.loads((output / "log_history.json").read_text())
    assert any("eval_accuracy" in entry for entry in history)
    saved = (output / "config.json").read_text()
    assert json.loads(saved)["backbone"]["model_type"] == "t5"
    assert config.model not in saved  # no path of this machine


def test_the_scorer_reads_texts_as_the_stage_did(trained, pairs):
    _, output, metrics = trained
    test = load_from_disk(str(pairs))["test"]
    scorer = RewardScorer(str(output), batch_size=7)
    assert scorer.model.lengths.prefix == "summarize: "
    chosen = scorer(test["prompt"], test["chosen"])
    rejected = scorer(test["prompt"], test["rejected"])
    assert np.mean(np.array(chosen) > np.array(rejected)) == metrics["reward/accuracy"]
    # One call or many, one batch or many: the same scores.
    mixed = scorer([*test["prompt"], *test["prompt"]], [*test["chosen"], *test["rejected"]])
    assert mixed == pytest.approx([*chosen, *rejected], abs=1e-5)
    assert scorer([], []) == []
    with pytest.raises(ValueError, match="2 documents but 1 summaries"):
        scorer(["a", "b"], ["c"])


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(trained, tiny_t5, pairs, tmp_path):
    _, output, metrics = trained
    # 96 pairs in batches of 16: checkpoint 20 lies in the middle of the fourth pass. Dropout is on.
    kept = output / "checkpoints" / "checkpoint-20"
    shutil.copytree(kept, tmp_path / "again" / "checkpoints" / kept.name)
    resumed = settings(tiny_t5, pairs, tmp_path / "again")
    assert last_checkpoint(resumed).endswith(kept.name)
    assert reward(resumed) == metrics
    assert same_outcome(output, tmp_path / "again")
    assert (output / "calibration.json").read_text() == (tmp_path / "again" / "calibration.json").read_text()


def test_margin_and_best_checkpoint(tiny_t5, pairs, tmp_path):
    config = settings(tiny_t5, pairs, tmp_path, use_margin=True, margin_scale=2.0, keep="best")
    metrics = reward(config)
    history = json.loads((tmp_path / "log_history.json").read_text())
    best = min(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    kept = json.loads((tmp_path / "checkpoints" / "checkpoint-24" / "trainer_state.json").read_text())
    assert kept["best_metric"] == pytest.approx(best)
    assert metrics["reward/accuracy"] > 0.6


def test_wrong_models_are_refused_in_one_line(tiny_t5, trained, tmp_path):
    cases = {
        str(tiny_t5): "is not a reward model",
        str(tmp_path / "config.json"): "is a file",
        str(tmp_path): "its config.json is not valid JSON",
    }
    (tmp_path / "config.json").write_text("{")
    for path, problem in cases.items():
        with pytest.raises(UserError, match=problem) as caught:
            load_reward_model(path)
        assert "\n" not in str(caught.value)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained[1] / "config.json", bare)
    with pytest.raises(UserError, match="holds no weights"):
        load_reward_model(str(bare))


@pytest.mark.parametrize(("use_margin", "centre"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)])
def test_the_trainers_loss_is_that_of_llama_2_with_centring(tmp_path, tiny_t5, use_margin, centre):
    """−log σ(r_w − r_l − m) + c (r_w + r_l)²: the margin acts on the difference, the centring on the sum."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_t5)
    torch.manual_seed(0)
    model = EncoderDecoderRewardModel.from_seq2seq(str(tiny_t5), LengthConfig()).eval()
    rows = [
        {"prompt_ids": [5, 6, 1], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 1], "margin": 0.5},
        {"prompt_ids": [7, 1], "chosen_ids": [11, 1], "rejected_ids": [12, 13, 1], "margin": 2.0},
    ]
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    data = Dataset.from_list(rows)
    trainer = RewardTrainer(model, arguments, data, None, tokenizer, use_margin=use_margin, centre=centre)
    loss = trainer.compute_loss(model, trainer.data_collator(rows)).item()
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            source = torch.tensor([row["prompt_ids"]])
            w, x = (
                model.score(source, torch.ones_like(source), torch.tensor([row[side]]), torch.ones(1, len(row[side])))
                for side in ("chosen_ids", "rejected_ids")
            )
            margin = row["margin"] if use_margin else 0.0
            expected += (-torch.log(torch.sigmoid(w - x - margin)) + centre * (w + x) ** 2).item() / 2
    assert loss == pytest.approx(expected, abs=1e-5)


def test_centring_keeps_scores_near_zero(tiny_t5, pairs, tmp_path):
    means = []
    for centre in (0.0, 1.0):
        config = settings(tiny_t5, pairs, tmp_path / str(centre), centre=centre, max_steps=12, save_steps=12)
        assert reward(config)["reward/accuracy"] > 0.6
        history = json.loads((tmp_path / str(centre) / "log_history.json").read_text())
        means.append(abs([entry["eval_score"] for entry in history if "eval_score" in entry][-1]))
    assert means[1] < 0.5 * means[0]


@pytest.mark.parametrize(("family", "kind"), [("whisper", "whisper"), ("vision", "vision-encoder-decoder")])
def test_a_model_of_speech_or_images_is_refused_in_one_line(family, kind, tmp_path):
    """As a checkpoint to start from, and as the backbone of a configuration made by hand."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    by_hand = EncoderDecoderRewardConfig(backbone=model.config, decoder_start_token_id=3)
    for make in (
        lambda: EncoderDecoderRewardModel.from_seq2seq(str(tmp_path), LengthConfig()),
        lambda: EncoderDecoderRewardModel(by_hand),
    ):
        with pytest.raises(UserError, match=f"^model=.+: {kind} is not a model from text to text; give one") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_calibration_of_a_sure_and_of_a_random_judge():
    sure = np.full(200, 4.0)
    bins, error = calibration(sure, np.zeros(200))
    assert [b["count"] for b in bins] == [200]
    assert error == pytest.approx(1 - 1 / (1 + math.exp(-4)))
    draw = np.random.default_rng(0)
    difference = draw.normal(size=20_000) * 2
    right = draw.random(20_000) < 1 / (1 + np.exp(-difference))  # a judge whose confidence is the truth
    difference = np.where(right, difference, -difference)
    bins, error = calibration(difference, np.zeros(20_000))
    assert error < 0.015
    assert all(abs(b["observed"] - b["predicted"]) < 0.03 for b in bins)


def test_wilson_interval_of_known_values():
    low, high = wilson_interval(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] == 1.0


def test_batches_have_like_lengths_and_an_order_of_their_own_for_each_epoch():
    lengths = np.random.default_rng(0).integers(1, 200, 1003).tolist()
    sampler = LengthGroupedSampler(lengths, step_size=8, seed=1)
    first = list(sampler)
    assert len(first) == len(set(first)) == len(sampler) == 1000  # whole steps only
    steps = [first[i : i + 8] for i in range(0, 1000, 8)]
    spread = np.mean([max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps])
    assert spread < 20  # of a random order: about 155
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert set(sampler) != set(first)  # others are left out
    means = [np.mean([lengths[i] for i in s]) for s in steps]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # no drift from short to long


def test_lengths_count_every_id_of_an_example():
    rows = [
        {"prompt_ids": [5, 6, 1], "chosen_ids": [7, 1], "rejected_ids": [1], "lists": [[5, 1], [], [6]]},
        {"prompt_ids": [1], "chosen_ids": [7, 8, 9, 1], "rejected_ids": [5, 1], "lists": []},
        {"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [4, 1], "lists": [[1, 2, 3]]},
    ]
    examples = Dataset.from_list([*rows, *rows])
    assert pair_lengths(examples) == [6, 7, 3] * 2
    assert pair_lengths(examples.remove_columns("prompt_ids").select([2, 0])) == [3, 3]
    assert token_counts(examples, ("prompt_ids", "lists")).tolist() == [6, 1, 3] * 2
    assert token_counts(examples.select([4, 3]), ("lists",)).tolist() == [0, 3]


def test_operations_are_counted_of_encoder_and_decoder_each(tiny_t5, pairs, tokenizer, tmp_path):
    """Six for each weight outside embeddings and each token that it meets; logged under transformers' name for it."""
    rows = tokenize_pairs(load_from_disk(str(pairs))["train"], tokenizer, LENGTHS)[0]
    model = EncoderDecoderRewardModel.from_seq2seq(str(tiny_t5), LENGTHS)
    weights = {"encoder": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        part = next((part for part in weights if f".{part}." in name), None)
        if part is not None and "embed_tokens" not in name and "relative_attention_bias" not in name:
            weights[part] += parameter.numel()
    assert 0 < weights["encoder"] < weights["decoder"]  # which also attends to the encoder
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "per_device_train_batch_size": 4}
    given = transformers.TrainingArguments(str(tmp_path), max_steps=3, **options)
    trainer, batches = RewardTrainer(model, given, rows, None, tokenizer), []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    met = {
        part: sum(batch[name].numel() for batch in batches[:3])
        for part, name in (("encoder", "encoder_input_ids"), ("decoder", "input_ids"))
    }
    assert trainer.state.total_flos == 6 * sum(weights[part] * met[part] for part in weights)


def test_padding_and_pair_layout():
    ids, mask = pad_rows([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    batch = PairCollator(pad_id=0, start_id=9)(
        [
            {"prompt_ids": [3, 1], "chosen_ids": [4, 1], "rejected_ids": [5, 6, 1], "margin": 2.0},
            {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [7, 1], "margin": 0.5},
        ]
    )
    assert batch["input_ids"].tolist() == [[9, 4, 1, 0], [9, 1, 0, 0], [9, 5, 6, 1], [9, 7, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]]
    assert batch["encoder_input_ids"].tolist() == [[3, 1], [1, 0]]
    assert batch["margin"].tolist() == [2.0, 0.5]
    assert issubclass(RewardTrainer, GroupedByLength)
