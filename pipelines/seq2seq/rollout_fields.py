"""What stages that sample, score and learn from their own summaries have in common: fields, checks, sources."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipelines.config import Source, config
from pipelines.corpus.fields import CorpusFields
from pipelines.distributed import Strategy
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.annotators import annotator_problems, annotator_sources
from pipelines.seq2seq.lora import LoraFields
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.rewards import is_function, reward_problems
from pipelines.seq2seq.training import LengthConfig, TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@config
class RewardFields:
    """What summaries are paid for, and who watches."""

    reward: Source | list[Source] = Field(
        description="what summaries are paid for: folder of a reward model, rouge, length, module:function, or a list"
    )
    reward_weights: list[float] | None = Field(None, description="weights of the reward functions; null: all 1")
    gold: str | None = Field(
        "rouge", description="judge logged beside the reward, never trained on: rouge, module:function, or null"
    )

    @property
    def reward_specs(self) -> list[str]:
        """The reward functions as a list."""
        return [self.reward] if isinstance(self.reward, str) else list(self.reward)

    def problems(self) -> list[Problem]:
        """Reward functions and judges that cannot be had, and weights that are not one for each."""
        found = super().problems() + reward_problems(self.reward_specs)
        found += annotator_problems(self.gold, "gold") if self.gold else []
        if not self.reward_specs:
            mend = "give a reward model's folder, rouge or module:function"
            found.append(Problem("reward", [], "names nothing", mend))
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_specs):
            problem = f"{len(self.reward_weights)} weights for {len(self.reward_specs)} reward functions"
            found.append(Problem("reward_weights", self.reward_weights, problem, "give one weight for each"))
        return found

    def environment(self) -> dict[str, str]:
        """The sources of the user's own functions."""
        own = [spec for spec in [*self.reward_specs, self.gold or ""] if is_function(spec)]
        return super().environment() | annotator_sources(own)


@config
class RolloutFields(RewardFields, CorpusFields, LengthConfig, LoraFields, TrainingConfig):
    """Rollouts: how many, of how many documents and samples, and the steps taken on each."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp")

    model: Source = Field(description="encoder-decoder to align, usually the supervised fine-tuned one; the reference")
    rollouts: int = Field(100, ge=1, description="how many times summaries are sampled and trained on")
    sources_per_rollout: int = Field(64, ge=1, description="documents of a rollout, over all devices")
    samples_per_source: int = Field(4, ge=2, description="summaries sampled of each document; it is encoded once")
    mini_batch_size: int = Field(64, ge=1, description="summaries of one optimizer step, over all devices")
    batch_size: int = Field(256, ge=1, description="summaries a reward model scores at once (training: see above)")
    temperature: float = Field(
        1.0, gt=0, description="the policy is softmax(logits / temperature), in sampling and loss"
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="taken off the score of a summary that was cut")

    @property
    def rows_per_rollout(self) -> int:
        """Summaries of a rollout."""
        return self.sources_per_rollout * self.samples_per_source

    def problems(self) -> list[Problem]:
        """Sizes of rollouts that do not divide, and fields that count in something other than rollouts."""
        found = super().problems() + model_problems({"model": self.model})
        if self.rows_per_rollout % self.mini_batch_size:
            mend = f"give a divisor of sources_per_rollout × samples_per_source = {self.rows_per_rollout}"
            found.append(Problem("mini_batch_size", self.mini_batch_size, "does not divide a rollout", mend))
        factor = self.samples_per_source * self.gradient_accumulation
        if self.mini_batch_size % factor:
            mend = f"give a multiple of samples_per_source × gradient_accumulation = {factor}"
            found.append(Problem("mini_batch_size", self.mini_batch_size, "would cut a document's summaries", mend))
        for name in ("epochs", "max_steps"):
            if getattr(self, name) != TrainingConfig.__pydantic_fields__[name].default:
                found.append(
                    Problem(name, getattr(self, name), "training counts in rollouts", "give rollouts= instead")
                )
        return found


def check_processes(settings: RolloutFields, processes: int) -> None:
    """Refuse sizes that cannot be shared out among the processes.

    Raises:
        UserError: naming the size.
    """
    if settings.sources_per_rollout % processes:
        mend = f"give a multiple of {processes}, the number of processes"
        raise UserError("sources_per_rollout", settings.sources_per_rollout, "cannot be shared out", mend)
    factor = settings.samples_per_source * settings.gradient_accumulation * processes
    if settings.mini_batch_size % factor:
        mend = f"give a multiple of samples_per_source × gradient_accumulation × processes = {factor}"
        raise UserError("mini_batch_size", settings.mini_batch_size, "cannot be shared out", mend)


def training_sources(settings: RolloutFields, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, float]:
    """The training documents that rollouts are made of: no more of them than are needed.

    Returns:
        Columns ``id``, ``prompt`` (the document), ``input_ids`` and ``references``; and the share that was cut.

    Raises:
        UserError: fewer documents than one rollout takes.
    """
    import datasets

    from pipelines.corpus import load_corpus
    from pipelines.seq2seq.training import tokenize_sources

    train = load_corpus(settings)["train"]
    if len(train) < settings.sources_per_rollout:
        problem = f"a rollout takes {settings.sources_per_rollout} documents"
        mend = f"give more documents, or sources_per_rollout={len(train)} or less"
        raise UserError("dataset", f"{len(train)} training documents", problem, mend)
    needed = settings.rollouts * settings.sources_per_rollout
    if len(train) > needed:
        train = train.select(sorted(random.Random(settings.seed).sample(range(len(train)), needed)))
    tokens = tokenize_sources(tokenizer, train["document"], settings)
    columns = {"id": train["id"], "prompt": train["document"], "references": train["references"]}
    columns = {name: list(values) for name, values in columns.items()} | {"input_ids": tokens["input_ids"]}
    return datasets.Dataset.from_dict(columns), tokens["truncated"] / len(train)


def last_quarter(history: list[dict[str, float]], name: str) -> dict[str, float]:
    """Means over the last quarter of the logged rollouts, as ``<name>/train_proxy_reward``, ``…_kl``, ``…_gold``, …"""
    entries = [entry for entry in history if "objective/proxy_reward" in entry]
    last = entries[-max(1, len(entries) // 4) :]
    return {
        f"{name}/train_{key}": sum(entry[f"objective/{key}"] for entry in last) / len(last)
        for key in ("proxy_reward", "kl", "gold", "length")
        if all(f"objective/{key}" in entry for entry in last)
    }
