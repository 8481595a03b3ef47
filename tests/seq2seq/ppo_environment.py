"""A world small enough for tests: random sources, a random T5, one point for every ``w5`` in the completion."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, TrainerCallback

from pipelines.seq2seq.ppo_arguments import PPOArguments
from pipelines.seq2seq.ppo_trainer import PPOTrainer
from pipelines.seq2seq.rewards import RewardFunction, Rewards
from pipelines.seq2seq.view import as_view

VOCABULARY = 20


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words w3 … w19 with T5's special ids."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_policy(dropout: float = 0.0, seed: int = 0) -> T5ForConditionalGeneration:
    """A random T5 whose first distributions are nearly uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                dropout_rate=dropout,
                decoder_start_token_id=0,
                initializer_factor=0.5,
            )
        )


def make_sources(count: int = 24) -> list[dict]:
    """Sources of 3 to 8 random words and the end token."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        {
            "id": f"s{index}",
            "input_ids": [*torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), 1],
            "document": f"document {index}",
            "references": ["w3 w4 w5"],
        }
        for index, length in enumerate(lengths)
    ]


def count_w5(documents, summaries, references) -> list[float]:
    """The toy reward."""
    return [float(summary.split().count("w5")) for summary in summaries]


class StopAt(TrainerCallback):
    """Ends training at a step, as if the power went."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def make_trainer(
    folder,
    *,
    dropout=0.0,
    separate_critic=False,
    train_encoder=True,
    lora=0,
    callbacks=None,
    policy=None,
    sources=None,
    collate_sources=None,
    reward=count_w5,
    **options,
) -> PPOTrainer:
    """A trainer of that world, or of another policy, sources and reward; ``options`` are ``PPOArguments``."""
    settings = {
        "rollouts": 2,
        "sources_per_rollout": 8,
        "samples_per_source": 4,
        "ppo_epochs": 2,
        "mini_batch_size": 16,
        "max_new_tokens": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "kl_coefficient": 0.02,
    }
    policy = make_policy(dropout, seed=options.get("seed", 0)) if policy is None else policy
    if lora:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(0)
            targets = LoraConfig(task_type="SEQ_2_SEQ_LM", r=lora, target_modules="all-linear")
            policy = get_peft_model(as_view(policy), targets)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return PPOTrainer(
        policy,
        PPOArguments(output_dir=str(folder), **(settings | options)),
        make_sources() if sources is None else sources,
        make_tokenizer(),
        Rewards([RewardFunction("count", 1.0, reward)]),
        collate_sources=collate_sources,
        gold=count_w5,
        separate_critic=separate_critic,
        train_encoder=train_encoder,
        samples_file=Path(folder) / "samples.jsonl",
        callbacks=callbacks,
    )
