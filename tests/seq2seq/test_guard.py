"""Every policy trainer compares its first batch with the plain class: what goes silently wrong is caught before a step.

Each way of going wrong keeps the loss finite and falling. None touches the first completion of the first source, so a
check that looks at nothing else would let it pass.
"""

import pytest
import torch
from datasets import Dataset
from ppo_environment import make_policy, make_sources, make_tokenizer, make_trainer
from preference_environment import arguments
from trl import GRPOConfig, RLOOConfig

from pipelines.seq2seq import actor_critic, guard, shared_attention, view
from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.group_trainer import EncoderDecoderGRPOTrainer, EncoderDecoderRLOOTrainer
from pipelines.seq2seq.guard import check_batch
from pipelines.seq2seq.listwise_trainer import ListwiseDPOTrainer
from pipelines.seq2seq.rewards import RewardFunction, Rewards
from pipelines.seq2seq.training import LengthConfig
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs

GROUPS = {"grpo": (EncoderDecoderGRPOTrainer, GRPOConfig), "rloo": (EncoderDecoderRLOOTrainer, RLOOConfig)}
KINDS = ("dpo", "listwise", "listwise, lists of unequal length", "ppo", *GROUPS)
WRONG = "log-probabilities differ from those of T5ForConditionalGeneration itself"


def policy():
    """Weights large enough for a completion to depend on its source."""
    model = make_policy(dropout=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0
    return model


def completions(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(2, 6, (count,), generator=generator).tolist()
    return [[*torch.randint(3, 20, (length,), generator=generator).tolist(), 1] for length in lengths]


def lengths_paid(documents, summaries, references) -> list[float]:
    return [float(len(summary)) for summary in summaries]


def trainer_of(kind: str, folder, bf16: bool = False):
    """A trainer whose first batch has several sources, with several completions each."""
    if kind == "ppo":
        return make_trainer(folder, policy=policy(), rollouts=1, bf16=bf16)
    sources, rewards = make_sources(16), Rewards([RewardFunction("length", 1.0, lengths_paid)])
    if kind in GROUPS:
        cls, config = GROUPS[kind]
        fields = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "num_generations": 4, "max_steps": 1}
        fields |= {"bf16": bf16, "activation_checkpointing": False, "use_cpu": True, "report_to": []}
        given = config(str(folder), max_completion_length=6, beta=0.05, save_strategy="no", **fields)
        rows = Dataset.from_list([{**row, "prompt": row["document"]} for row in sources])
        return cls(policy(), given, rows, make_tokenizer(), rewards)
    prompts, given = [row["input_ids"] for row in sources], arguments(folder, max_steps=1, bf16=bf16)
    if kind == "dpo":
        columns = {"chosen_ids": completions(32)[::2], "rejected_ids": completions(32)[1::2]}
        cls = EncoderDecoderDPOTrainer
    else:
        sizes = [2 + (index % 2 if "," in kind else 1) for index in range(16)]
        texts, ends = completions(sum(sizes)), torch.tensor(sizes).cumsum(0).tolist()
        columns = {"completion_ids": [texts[end - size : end] for end, size in zip(ends, sizes, strict=True)]}
        columns |= {"ranking": [list(range(size)) for size in sizes], "known": sizes}
        cls = ListwiseDPOTrainer
    return cls(policy(), given, Dataset.from_dict({"prompt_ids": prompts} | columns), make_tokenizer(), LengthConfig())


def sources_permuted(monkeypatch, trainer):
    """All sources but the first in the wrong places."""
    plain = view.run_encoder

    def run_encoder(model, inputs):
        states = plain(model, inputs)
        return torch.cat([states[:1], states[1:].roll(1, 0)])

    monkeypatch.setattr(view, "run_encoder", run_encoder)


def labels_shifted(monkeypatch, trainer):
    """Each position but the first scored by the token before its own."""
    if isinstance(trainer.model, actor_critic.ActorCritic):
        plain_forward = trainer.model.forward

        def forward(source_ids, source_mask, completion_ids, completion_mask, **options):
            scored = completion_ids.clone()
            scored[:, 1:] = completion_ids[:, :-1]
            inputs = actor_critic.decoder_inputs
            with monkeypatch.context() as patch:
                patch.setattr(actor_critic, "decoder_inputs", lambda model, ids: inputs(model, completion_ids))
                return plain_forward(source_ids, source_mask, scored, completion_mask, **options)

        trainer.model.forward = forward
        return
    model, plain = trainer.model, trainer.model.forward

    def forward(*given, labels=None, **options):
        if labels is not None:
            shifted = labels.clone()
            shifted[:, 2:] = labels[:, 1:-1]
            labels = shifted.masked_fill(labels == -100, -100)
            options |= {"labels": labels}
        return plain(*given, **options)

    model.forward = forward


def rows_in_another_order(monkeypatch, trainer):
    """Rows that stand beside those of their source taken for rows a batch apart, or the other way round."""
    plain = shared_attention.decode_shared
    turned = {"source-major": "sample-major", "sample-major": "source-major"}

    def decode_shared(model, states, mask, ids, decoder_mask=None, *, order):
        order = turned[order] if isinstance(order, str) else torch.cat([order[:1], order[1:].flip(0)])
        return plain(model, states, mask, ids, decoder_mask, order=order)

    monkeypatch.setattr(actor_critic, "decode_shared", decode_shared)
    for cls in (type(trainer.model), type(getattr(trainer.model, "base_model", trainer.model))):
        if hasattr(cls, "_plain_class"):
            scope = cls.forward.__closure__[cls.forward.__code__.co_freevars.index("decode_shared")]
            monkeypatch.setattr(scope, "cell_contents", decode_shared)


WAYS = (sources_permuted, labels_shifted, rows_in_another_order)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_batch_passes(kind, bf16, tmp_path, monkeypatch):
    """And is looked at, in the arithmetic that it was made in: two sources, beside each its own completions."""
    trainer = trainer_of(kind, tmp_path, bf16)
    seen, plain = [], guard.check_log_probs

    def check_log_probs(model, sources, *rows, **options):
        seen.append(tuple(sources["input_ids"][0].tolist()))
        assert len(sources["input_ids"]) == 1
        plain(model, sources, *rows, **options)

    monkeypatch.setattr(guard, "check_log_probs", check_log_probs)
    trainer.train()
    assert trainer.state.global_step > 0
    assert len(seen) == (8 if kind == "ppo" else 4)  # PPO's rollout, and the first batch made of it
    for start in range(0, len(seen), 4):
        first, _, _, last = counts = seen[start : start + 4]
        assert first != last
        assert counts.count(first) == counts.count(last) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_batch_is_caught_before_the_first_step(kind, way, tmp_path, monkeypatch):
    trainer = trainer_of(kind, tmp_path)
    way(monkeypatch, trainer)
    with pytest.raises(RuntimeError, match=WRONG):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_ppo_batch_that_is_paired_wrongly_in_training_alone_is_caught(tmp_path):
    """The rollout, whose sources are encoded already, is right."""
    trainer = make_trainer(tmp_path, policy=policy(), rollouts=1)
    plain = trainer.model.forward

    def forward(source_ids, source_mask, *rows, encoder_states=None, **options):
        if encoder_states is None:
            source_ids, source_mask = (torch.cat([t[:1], t[1:].roll(1, 0)]) for t in (source_ids, source_mask))
        return plain(source_ids, source_mask, *rows, encoder_states=encoder_states, **options)

    trainer.model.forward = forward
    with pytest.raises(RuntimeError, match=WRONG):
        trainer.train()
    assert trainer.rollout is not None


@pytest.mark.parametrize("order", ["sample-major", "source-major", "ragged"])
def test_each_row_is_compared_with_its_own_source(order):
    model = as_view(policy()).eval()
    source = torch.tensor([[5, 6, 7, 1], [9, 8, 1, 0], [11, 4, 12, 1]])
    ids = torch.randint(3, 20, (6, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 2:] = mask[4, 1:] = 0
    rows = {"sample-major": [0, 1, 2, 0, 1, 2], "source-major": [0, 0, 1, 1, 2, 2], "ragged": [0, 0, 0, 1, 2, 2]}[order]
    given = torch.tensor(rows) if order == "ragged" else order
    sources = {"input_ids": source, "attention_mask": source.ne(0).long()}
    with torch.no_grad():
        states = encode(model, *sources.values())
        found = sequence_log_probs(model, states, sources["attention_mask"], ids, mask, order=torch.tensor(rows))
    check_batch(model, sources, ids, mask, found, order=given)
    for row in (0, 5):
        wrong = found.clone()
        wrong[row, 0] += 0.1
        with pytest.raises(RuntimeError, match=WRONG):
            check_batch(model, sources, ids, mask, wrong, order=given)
    turned = {name: torch.cat([value[:1], value[1:].flip(0)]) for name, value in sources.items()}
    with pytest.raises(RuntimeError, match=WRONG):
        check_batch(model, turned, ids, mask, found, order=given)
