"""Every loss and divergence of DPO against its formula on the plain model; references; sources that are not text."""

import ast
import copy
import inspect
import math
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from preference_environment import LENGTHS, arguments, t5
from tiny_models import loud, save_pairs, tiny
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq import dpo
from pipelines.seq2seq.collators import tokenize_pairs
from pipelines.seq2seq.dpo import DPOStageConfig, LossType
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer, pair_log_probs
from pipelines.seq2seq.losses import dpo_loss
from pipelines.seq2seq.training import checkpoint_marker
from pipelines.seq2seq.view import as_view, decoder_inputs, encode, sequence_log_probs

BETA, SMOOTHING, ALPHA = 0.7, 0.1, 0.3


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_corpus):
    from datasets import load_from_disk

    return load_from_disk(str(save_pairs(tmp_path_factory.mktemp("pairs") / "preferences", tiny_corpus)))["train"]


@pytest.fixture(scope="module")
def pairs(rows, tokenizer):
    return tokenize_pairs(rows, tokenizer, LENGTHS)[0]


def moved(model, size=0.3):
    """The model away from where it was, or every loss would be that of the reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def make_trainer(model, folder, pairs, tokenizer, *, ref_model=None, peft_config=None, callbacks=None, **fields):
    given = arguments(folder, **({"max_steps": 1, "beta": BETA} | fields))
    more = {"ref_model": ref_model, "peft_config": peft_config, "callbacks": callbacks}
    return EncoderDecoderDPOTrainer(model, given, pairs, tokenizer, LENGTHS, **more)


def away_from_reference(tiny_t5, folder, pairs, tokenizer, **fields):
    """A trainer whose policy has moved: at the reference many of the losses agree."""
    return make_trainer(moved(t5(tiny_t5)), folder, pairs, tokenizer, ref_model=t5(tiny_t5), **fields)


def batch_of(trainer, count=6):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def plain_log_probs(model, batch) -> tuple[Tensor, Tensor]:
    """(2·B, T) per-token log-probabilities and their mask, by the plain model's own forward."""
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = model.eval()(
            input_ids=batch["encoder_input_ids"].repeat(2, 1),
            attention_mask=batch["encoder_attention_mask"].repeat(2, 1),
            decoder_input_ids=decoder_inputs(model, ids),
        ).logits
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].double() * mask, mask


def scored(ratio: Tensor, divergence: str) -> Tensor:
    """f'(π/π_ref) of f-DPO (Wang et al. 2023, table 1), up to constants that cancel between chosen and rejected."""
    u = ratio.exp()
    return {
        "reverse_kl": ratio,
        "forward_kl": -1 / u,
        "js_divergence": (2 * u / (1 + u)).log(),
        "alpha_divergence": u ** (ALPHA - 1) / (ALPHA - 1),
    }[divergence]


def formula(loss_type: str, policy: Tensor, reference: Tensor, mask: Tensor, divergence: str = "reverse_kl") -> float:
    """The losses as their papers write them; arguments (2·B, T) of which the first half is chosen."""
    sums, count = (policy.sum(1), reference.sum(1)), mask.sum(1)
    (w, x), (n_w, n_l) = (sums[0] - sums[1]).chunk(2), count.chunk(2)
    f_w, f_l = scored(w, divergence), scored(x, divergence)
    b, e, log_s, s = BETA, SMOOTHING, F.logsigmoid, torch.sigmoid
    delta = f_w - f_l
    policy_w, policy_l = sums[0].chunk(2)
    reference_w, reference_l = sums[1].chunk(2)
    transport = (policy_w - policy_l).sort().values - (reference_w - reference_l).sort().values
    unpaired = w.sort().values - x.sort().values

    def smoothed(y):
        return -(1 - e) * log_s(b * y) - e * log_s(-b * y)

    p = s(b * delta)
    mix = s(b * delta / 0.05)
    values = {
        "sigmoid": -log_s(b * delta),
        "cdpo": smoothed(delta),
        "hinge": (1 - b * delta).clamp(min=0),
        "ipo": (f_w / n_w - f_l / n_l - 1 / (2 * b)) ** 2,
        "exo_pair": p * (p / (1 - e)).log() + (1 - p) * ((1 - p) / e).log(),
        "nca_pair": -log_s(b * w) - 0.5 * log_s(-b * w) - 0.5 * log_s(-b * x),
        "robust": (-(1 - e) * log_s(b * delta) + e * log_s(-b * delta)) / (1 - 2 * e),
        "bco_pair": -log_s(b * w) - log_s(-b * x),
        "sppo_hard": (w - 1 / (2 * b)) ** 2 + (x + 1 / (2 * b)) ** 2,
        "aot": smoothed(transport),
        "aot_unpaired": smoothed(unpaired),
        "apo_zero": 1 - s(b * w) + s(b * x),
        "apo_down": s(b * w) + 1 - s(b * (w - x)),
        "discopop": -log_s(b * delta) * (1 - mix) + (-b * delta).exp() * mix,
        "sft": -policy[: len(w)].sum()[None] / n_w.sum(),
        "sigmoid_norm": -log_s(b * (f_w / n_w - f_l / n_l)),
    }
    return values[loss_type].mean().item()


def trls_branches(chosen_by: str) -> dict[str, str]:
    """What TRL's trainer compares a variable with -> the code it runs where they are equal."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss)))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == chosen_by:
            name = ast.literal_eval(node.test.comparators[0])
            found[name] = "".join(map(ast.unparse, node.body))
    return found


def test_the_losses_and_divergences_are_those_that_trl_knows():
    """A TRL that adds or drops one, or reads other fields for it, is noticed here."""
    losses = trls_branches("loss_type")
    assert set(LossType.__args__) == set(losses)
    # Smoothing the sigmoid loss (cDPO) would be our own doing.
    assert set(dpo._SMOOTHED) - {"sigmoid"} == {name for name, code in losses.items() if "label_smoothing" in code}
    divergence = DPOStageConfig.__pydantic_fields__["f_divergence"].annotation
    assert set(divergence.__args__) == set(trls_branches("self.f_divergence_type"))
    listed = re.search(r"f_divergence_loss_types = (\{[^}]+\})", inspect.getsource(DPOTrainer.__init__))
    assert set(dpo._ANY_DIVERGENCE) == ast.literal_eval(listed[1])


CASES = [(name, "reverse_kl") for name in LossType.__args__]
CASES += [("sigmoid", d) for d in ("forward_kl", "js_divergence", "alpha_divergence")]
CASES += [("ipo", "js_divergence"), ("hinge", "forward_kl")]


@pytest.mark.parametrize(("loss_type", "divergence"), CASES)
def test_each_loss_is_its_formula_on_plain_log_probs_and_trains(
    tiny_t5, pairs, tokenizer, tmp_path, loss_type, divergence
):
    smoothing = SMOOTHING if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    trainer = away_from_reference(
        tiny_t5,
        tmp_path,
        pairs,
        tokenizer,
        loss_type=[loss_type],
        label_smoothing=smoothing,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=ALPHA,
    )
    batch = batch_of(trainer)
    policy, mask = plain_log_probs(moved(t5(tiny_t5)), batch)
    reference, _ = plain_log_probs(t5(tiny_t5), batch)
    gap = (policy - reference).sum(1).abs()
    assert gap.max() > 0.3  # not at the reference, where many of the losses agree
    expected = formula(loss_type, policy, reference, mask, divergence)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothed_labels_make_the_sigmoid_loss_that_of_cdpo(tiny_t5, pairs, tokenizer, tmp_path, smoothing):
    """Value and gradient, the smoothed loss on log-probabilities of the same model for comparison."""
    trainer = away_from_reference(tiny_t5, tmp_path, pairs, tokenizer, label_smoothing=smoothing)
    assert trainer.args.loss_type == ["sigmoid"]
    batch, parameters = batch_of(trainer), list(trainer.model.parameters())
    reference = plain_log_probs(t5(tiny_t5), batch)[0].sum(1).float()
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    states = encode(trainer.model, batch["encoder_input_ids"], batch["encoder_attention_mask"])
    log_probs = sequence_log_probs(
        trainer.model, states, batch["encoder_attention_mask"], ids, mask, order="sample-major"
    )
    scores = (*log_probs.sum(1).chunk(2), *reference.chunk(2))
    wanted = dpo_loss(*scores, beta=BETA, label_smoothing=smoothing).mean()
    found = trainer.compute_loss(trainer.model, batch)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(found.item() - dpo_loss(*scores, beta=BETA).mean().item()) > 1e-3
    gradients = zip(*(torch.autograd.grad(value, parameters) for value in (found, wanted)), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_labels_that_are_as_often_wrong_as_right_are_refused(tiny_t5, pairs, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^label_smoothing=0.5: .* give a share below 0.5$"):
        make_trainer(t5(tiny_t5), tmp_path, pairs, tokenizer, label_smoothing=0.5)


def test_smoothed_labels_beside_other_losses_and_divergences(tiny_t5, pairs, tokenizer, tmp_path):
    """All losses that read it share one ε; the others go on as they are; the weights are those that were given."""
    names, weights = ["sigmoid", "sft", "exo_pair"], [0.8, 0.3, 0.5]
    trainer = away_from_reference(
        tiny_t5,
        tmp_path,
        pairs,
        tokenizer,
        loss_type=names,
        loss_weights=weights,
        label_smoothing=SMOOTHING,
        f_divergence_type="js_divergence",
    )
    batch = batch_of(trainer)
    policy, mask = plain_log_probs(moved(t5(tiny_t5)), batch)
    reference, _ = plain_log_probs(t5(tiny_t5), batch)
    values = [formula(n, policy, reference, mask, "js_divergence") for n in ("cdpo", "sft", "exo_pair")]
    expected = sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_a_list_of_losses_is_their_weighted_sum(tiny_t5, pairs, tokenizer, tmp_path):
    trainer = away_from_reference(
        tiny_t5,
        tmp_path,
        pairs,
        tokenizer,
        loss_type=["sigmoid", "sft"],
        loss_weights=[0.8, 0.3],
    )
    batch = batch_of(trainer)
    policy, mask = plain_log_probs(moved(t5(tiny_t5)), batch)
    reference, _ = plain_log_probs(t5(tiny_t5), batch)
    expected = 0.8 * formula("sigmoid", policy, reference, mask) + 0.3 * formula("sft", policy, reference, mask)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_cached_and_online_references_give_equal_losses_and_weights(tiny_t5, pairs, tokenizer, tmp_path):
    logged, models = [], []
    for cached in (True, False):
        trainer = make_trainer(
            t5(tiny_t5), tmp_path, pairs, tokenizer, precompute_ref_log_probs=cached, max_steps=4, learning_rate=3e-3
        )
        trainer.train()
        models.append(trainer.model)
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)
    assert logged[0][-1] < math.log(2) - 0.02
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=5e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["all-parameters", "lora"])
def test_recomputed_activations_give_the_same_gradients(tiny_t5, pairs, tokenizer, tmp_path, lora):
    from peft import LoraConfig

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        settings = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear") if lora else None
        trainer = make_trainer(
            moved(t5(tiny_t5)),
            tmp_path,
            pairs,
            tokenizer,
            peft_config=settings,
            activation_checkpointing=recompute,
            precompute_ref_log_probs=not lora,
        )
        # What the Trainer does when it starts.
        if recompute:
            trainer.model.activation_checkpointing_enable()
        trainer.model.train()
        counted = []
        block = trainer.model.get_encoder().block[0].layer[1]
        block.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
        assert len(counted) >= 2 + recompute  # the first batch's check, the pass, and once more going back
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_under_lora_the_reference_is_the_model_with_its_adapters_off(tiny_t5, pairs, tokenizer, tmp_path):
    from peft import LoraConfig

    settings = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(
        t5(tiny_t5), tmp_path, pairs, tokenizer, peft_config=settings, max_steps=4, learning_rate=1e-2
    )
    assert trainer.ref_model is None
    trainer.train()
    batch = batch_of(trainer)
    expected = plain_log_probs(t5(tiny_t5), batch)[0].sum(1).float()
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss < math.log(2) - 1e-3  # and with them on it has moved


class Record(TrainerCallback):
    """Copies of the weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = [p.detach().clone() for p in model.parameters()]


SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "learning_rate": 3e-3}


def test_the_reference_follows_the_policy(tiny_t5, pairs, tokenizer, tmp_path):
    """π_ref ← α π + (1 − α) π_ref every second step (Gorbatovski et al. 2024, TR-DPO, eq. 7)."""
    record = Record()
    trainer = make_trainer(t5(tiny_t5), tmp_path, pairs, tokenizer, callbacks=[record], max_steps=5, **SYNC)
    trainer.train()
    expected = list(t5(tiny_t5).parameters())
    for step in (2, 4):
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, record.weights[step], strict=True)]
    for found, wanted in zip(trainer.ref_model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_moved_reference_survives_a_resume(tiny_t5, pairs, tokenizer, tmp_path):
    """Saved at step 3, after one move of the reference and before the next."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | SYNC
    whole = make_trainer(t5(tiny_t5), tmp_path, pairs, tokenizer, callbacks=[checkpoint_marker()], **options)
    whole.train()
    resumed = make_trainer(t5(tiny_t5), tmp_path, pairs, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for model, other in ((whole.model, resumed.model), (whole.ref_model, resumed.ref_model)):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    assert [e["loss"] for e in whole.state.log_history if "loss" in e] == [
        e["loss"] for e in resumed.state.log_history if "loss" in e
    ]


def test_impossible_combinations_are_named():
    common = {"model": "m", "preferences": "p"}
    for fields, what in (
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": False, "lora_r": 2}, "sync_ref_model"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": ["sigmoid", "bco_pair"], "f_divergence": "js_divergence"}, "f_divergence"),
        ({"loss_type": []}, "loss_type"),
    ):
        assert [p.what for p in DPOStageConfig(**common, **fields).problems()] == [what], fields
    fine = {"sync_ref_model": True, "precompute_ref_log_probs": False, "loss_type": ["robust", "sft"]}
    assert DPOStageConfig(**common, **fine, label_smoothing=0.1, loss_weights=[1.0, 0.2]).problems() == []
    with pytest.raises(UserError, match="loss_type"):
        validate(DPOStageConfig, common | {"loss_type": "sigmiod"})


SHAPES = {"whisper": ("input_features", (8, 40)), "vision": ("pixel_values", (3, 8, 8))}


def featured(family: str, rows: Dataset) -> Dataset:
    """The pairs with a random array in place of each text, under the name that the encoder reads."""
    name, shape = SHAPES[family]
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(shape, generator=generator).tolist() for _ in range(24)]
    short = rows.select(range(24)).select_columns(["chosen", "rejected"])
    return short.add_column(name, arrays)


@pytest.mark.parametrize("cached", [True, False], ids=["cached-reference", "online-reference"])
@pytest.mark.parametrize("family", SHAPES)
def test_speech_and_images_take_dpo_steps(rows, tokenizer, tmp_path, family, cached):
    model = loud(tiny(family, vocabulary=len(tokenizer)), 0.3)
    reference = copy.deepcopy(model)
    data = featured(family, rows)
    trainer = make_trainer(
        model, tmp_path, data, tokenizer, max_steps=4, learning_rate=1e-2, precompute_ref_log_probs=cached
    )
    batch = batch_of(trainer, 4)
    assert batch[f"encoder_{SHAPES[family][0]}"].shape == (4, *SHAPES[family][1])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05
    entropy = trainer.state.log_history[0]["entropy"]
    assert 0.3 < entropy < math.log(len(tokenizer)) - 0.3
    # The source is read: other features, other log-probabilities.
    before = pair_log_probs(as_view(reference), trainer.train_dataset, tokenizer, 8)[0]
    shuffled = trainer.train_dataset.map(
        lambda example: {SHAPES[family][0]: trainer.train_dataset[0][SHAPES[family][0]]}, keep_in_memory=True
    )
    after = pair_log_probs(reference, shuffled, tokenizer, 8)[0]
    assert before[0] == pytest.approx(after[0], abs=1e-5)
    assert abs(before[1:] - after[1:]).max() > 1e-4


def test_sources_may_be_made_when_they_are_needed(rows, tokenizer, tmp_path):
    """A collator of one's own, as one that opens image files: it gets the examples with all their columns."""
    data = rows.select(range(16)).select_columns(["chosen", "rejected", "id"])
    seen = []

    def collate_sources(examples):
        seen.extend(example["id"] for example in examples)
        numbers = [float(len(example["id"])) for example in examples]
        return {"pixel_values": torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 8, 8).clone()}

    trainer = EncoderDecoderDPOTrainer(
        tiny("vision", vocabulary=len(tokenizer)),
        DPOConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"),
        data,
        tokenizer,
        LENGTHS,
        collate_sources=collate_sources,
    )
    trainer.train()
    assert set(seen) <= set(data["id"])
    assert len(seen) >= 8
