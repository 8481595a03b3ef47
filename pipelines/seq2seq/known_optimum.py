"""The known-optimum stage: how near to π* ∝ π_ref e^{r/β} each method comes where everything can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.errors import Problem, UserError

if TYPE_CHECKING:
    from pipelines.seq2seq.known_optimum_training import Task

Method = Literal["dpo", "listwise", "ppo", "grpo", "grpo_kl_in_loss"]
LIMITS = {"dpo": 0.02, "listwise": 0.05, "ppo": 0.05, "grpo": 0.05}
"""Nats that each method has to come below; GRPO as published (``grpo_kl_in_loss``) has another optimum."""
_MOST = 400


def completion_count(vocabulary: int, length: int) -> int:
    """How many completions there are of at most ``length`` tokens: those that end in time, and those that are cut."""
    others = vocabulary - 1
    return sum(others**size for size in range(length)) + others**length


@config
class KnownOptimumConfig(StageConfig):
    """Train every method in a world so small that its optimum and the distance from it are known exactly."""

    output_dir: str = Field("runs/known_optimum", description="folder the stage writes into", json_schema_extra=INERT)
    methods: list[Method] = Field(["dpo", "listwise", "ppo", "grpo", "grpo_kl_in_loss"], description="what is trained")
    vocabulary: int = Field(4, ge=4, le=8, description="tokens: padding, the end mark and letters")
    length: int = Field(2, ge=1, le=4, description="tokens of a completion at most, its end mark included")
    sources: int = Field(2, ge=1, le=8, description="prompts, each with rewards of its own")
    spread: float = Field(1.5, gt=0, description="standard deviation of the rewards, in units of β")
    preference_steps: int = Field(110, ge=1, description="optimizer steps of DPO and listwise DPO")
    pairs_per_step: int = Field(320, ge=1, description="pairs that a step of DPO takes")
    lists_per_step: int = Field(96, ge=1, description="lists of four that a step of listwise DPO takes")
    preference_learning_rate: float = Field(1e-2, gt=0, description="peak rate of DPO and listwise DPO")
    rollouts: int = Field(50, ge=1, description="rollouts of PPO and GRPO, each trained on twice")
    samples: int = Field(96, ge=2, description="completions of each source in a rollout")
    rollout_learning_rate: float = Field(5e-3, gt=0, description="peak rate of PPO and GRPO")

    @property
    def completions(self) -> int:
        """How many completions a source has."""
        return completion_count(self.vocabulary, self.length)

    def problems(self) -> list[Problem]:
        """Whether there is a method, and few enough completions to enumerate."""
        found = super().problems()
        if not self.methods:
            found.append(Problem("methods", [], "names nothing", "give at least one, such as dpo"))
        if self.completions > _MOST:
            problem = f"with vocabulary={self.vocabulary} gives {self.completions:,} completions to enumerate"
            mend = f"give a smaller length or vocabulary: at most {_MOST} completions"
            found.append(Problem("length", self.length, problem, mend))
        return found


def known_optimum(config: KnownOptimumConfig) -> dict[str, float]:
    """Train each method from the same start and follow its distance from the optimum.

    Writes ``curves.json``: ``start``, ``rest`` and the ``curves``, [step, KL(π‖π*)] for some steps of each method.

    Returns:
        In nats, means over the sources: ``known_optimum/start``, KL(π_ref‖π*); for each method
        ``known_optimum/METHOD``, KL(π‖π*) after its last step; ``known_optimum/rest``, KL(π‖π*) of the policy at which
        GRPO with its divergence in the loss comes to rest, worked out, not trained; ``known_optimum/completions``.

    Raises:
        UserError: more than one process.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from pipelines.seq2seq.enumerable import divergence, make_world
    from pipelines.seq2seq.known_optimum_training import Task, token_divergence_optimum
    from pipelines.seq2seq.shards import run_shards
    from pipelines.stage import write_json

    if PartialState().num_processes > 1:
        mend = "start with accelerate_configs/cpu.yaml, or without a launcher"
        raise UserError("processes", PartialState().num_processes, "so small a world is trained on by one", mend)
    sizes = {"vocabulary": config.vocabulary, "length": config.length, "sources": config.sources}
    task = Task(make_world(**sizes, spread=config.spread, seed=config.seed))

    def train(methods: Sequence[Method], what: str) -> list[Any]:
        set_seed(config.seed)
        return [_train(task, method, config) for method in methods]

    found = run_shards(config.output_dir, "methods", config.methods, train, size=1)
    curves = dict(zip(config.methods, found, strict=True))
    rest = divergence(token_divergence_optimum(task), task.optimum)
    written = {"start": task.first_distance, "rest": rest, "curves": curves}
    write_json(Path(config.output_dir) / "curves.json", written)
    return {
        "known_optimum/completions": float(len(task.world.completions)),
        "known_optimum/start": task.first_distance,
        "known_optimum/rest": rest,
        **{f"known_optimum/{name}": curve[-1][1] for name, curve in curves.items()},
    }


def _train(task: Task, method: Method, settings: KnownOptimumConfig) -> list[list[float]]:
    from pipelines.seq2seq.known_optimum_training import train_dpo, train_grpo, train_listwise, train_ppo

    folder = Path(settings.output_dir) / "checkpoints" / method
    if method in ("dpo", "listwise"):
        fields = {"steps": settings.preference_steps, "rate": settings.preference_learning_rate}
        if method == "dpo":
            return train_dpo(task, folder, **fields, batch_size=settings.pairs_per_step, copies=10)
        return train_listwise(task, folder, **fields, batch_size=settings.lists_per_step, copies=48)
    fields = {
        "rollouts": settings.rollouts,
        "samples": settings.samples,
        "rate": settings.rollout_learning_rate,
        "seed": settings.seed,
    }
    if method == "ppo":
        return train_ppo(task, folder, **fields)
    return train_grpo(task, folder, **fields, kl_in="loss" if method == "grpo_kl_in_loss" else "reward")
