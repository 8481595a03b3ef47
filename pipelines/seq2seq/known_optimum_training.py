"""Every trainer let loose on a world whose optimum is known, and how far from it each ends (see ``enumerable``)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, GRPOConfig

from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer
from pipelines.seq2seq.enumerable import World, all_lists, all_pairs, divergence, make_policy, make_tokenizer
from pipelines.seq2seq.group_trainer import EncoderDecoderGRPOTrainer
from pipelines.seq2seq.listwise_trainer import ListwiseDPOTrainer
from pipelines.seq2seq.losses import dpo_loss
from pipelines.seq2seq.ppo_arguments import PPOArguments
from pipelines.seq2seq.ppo_trainer import PPOTrainer
from pipelines.seq2seq.rewards import RewardFunction, Rewards
from pipelines.seq2seq.training import LengthConfig
from pipelines.seq2seq.view import as_view


@dataclass
class Task:
    """A world, the policy every method starts from and is held near, and the strength of that pull.

    Args:
        world: sources, completions, rewards.
        beta: β, in units of reward a nat.
    """

    world: World
    beta: float = 1.0

    def __post_init__(self) -> None:
        self.start = make_policy(self.world)
        self.tokenizer = make_tokenizer(self.world)
        self.reference = self.world.log_probs(self.start)
        self.optimum = self.world.optimum(self.reference, self.beta)

    def policy(self) -> Any:
        """A copy of the policy to start from."""
        return copy.deepcopy(self.start)

    def distance(self, model: Any) -> float:
        """KL(π‖π*) of a model in nats, the mean over sources."""
        return divergence(self.world.log_probs(getattr(model, "policy", model)), self.optimum)

    @property
    def first_distance(self) -> float:
        """KL(π_ref‖π*)."""
        return divergence(self.reference, self.optimum)


class _Curve(TrainerCallback):
    """Keeps [step, KL(π‖π*)] of some steps."""

    def __init__(self, task: Task, every: int):
        self.task, self.every = task, every
        self.points: list[list[float]] = [[0, task.first_distance]]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append([state.global_step, self.task.distance(model)])


def _arguments(folder: str | Path, **fields: Any) -> dict[str, Any]:
    common = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    common |= {"lr_scheduler_type": "cosine", "output_dir": str(folder)}
    return common | fields


def _train(task: Task, trainer: Any, points: int) -> list[list[float]]:
    curve = _Curve(task, max(1, trainer.args.max_steps // points))
    trainer.add_callback(curve)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve.points


def train_dpo(
    task: Task, folder: str | Path, *, steps: int, batch_size: int, copies: int, rate: float, points: int = 20
) -> list[list[float]]:
    """DPO on every pair of completions, each order as often as Bradley–Terry prefers it (``all_pairs``).

    Args:
        task: world, start, β.
        folder: for the trainer; nothing of use is written.
        steps: optimizer steps.
        batch_size: pairs of a step.
        copies: rows a pair, shared out between its two orders.
        rate: peak learning rate, falling to 0 on a cosine.
        points: how many distances to take on the way.

    Returns:
        [step, KL(π‖π*)] from before the first step to after the last.
    """
    arguments = _preference_arguments(task, folder, steps, batch_size, rate)
    data = all_pairs(task.world, copies)
    trainer = EncoderDecoderDPOTrainer(task.policy(), arguments, data, task.tokenizer, LengthConfig())
    return _train(task, trainer, points)


def train_listwise(
    task: Task,
    folder: str | Path,
    *,
    steps: int,
    batch_size: int,
    copies: int,
    rate: float,
    size: int = 4,
    points: int = 20,
) -> list[list[float]]:
    """Listwise DPO on lists of ``size`` with rankings as often as Plackett–Luce has them; the rest as ``train_dpo``."""
    arguments = _preference_arguments(task, folder, steps, batch_size, rate)
    data = all_lists(task.world, size=size, copies=copies)
    trainer = ListwiseDPOTrainer(task.policy(), arguments, data, task.tokenizer, LengthConfig())
    return _train(task, trainer, points)


def _preference_arguments(task: Task, folder: str | Path, steps: int, batch_size: int, rate: float) -> DPOConfig:
    return DPOConfig(
        **_arguments(folder, learning_rate=rate, max_steps=steps, per_device_train_batch_size=batch_size),
        beta=task.beta,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=1024,
        activation_checkpointing=False,
        logging_steps=max(1, steps),
    )


def _sources(task: Task) -> list[dict[str, Any]]:
    return [
        {"id": f"s{number}", "input_ids": ids, "document": str(number), "references": [""]}
        for number, ids in enumerate(task.world.sources)
    ]


def _rewards(task: Task) -> Rewards:
    return Rewards([RewardFunction("table", 1.0, task.world.reward_of)])


def train_ppo(
    task: Task,
    folder: str | Path,
    *,
    rollouts: int,
    samples: int,
    rate: float,
    epochs: int = 2,
    seed: int = 42,
    points: int = 20,
) -> list[list[float]]:
    """PPO on all sources at once, the price of a nat β in the reward.

    Args:
        task: world, start, β.
        folder: for the trainer; nothing of use is written.
        rollouts: how many; each is one mini-batch.
        samples: completions a source and rollout.
        rate: peak learning rate, falling to 0 on a cosine; the critic's head learns at the same.
        epochs: passes over a rollout.
        seed: of the samples.
        points: how many distances to take on the way.

    Returns:
        [step, KL(π‖π*)] from before the first step to after the last.
    """
    sources = _sources(task)
    arguments = PPOArguments(
        **_arguments(folder, learning_rate=rate, seed=seed),
        rollouts=rollouts,
        sources_per_rollout=len(sources),
        samples_per_source=samples,
        ppo_epochs=epochs,
        mini_batch_size=len(sources) * samples,
        rollout_batch_size=len(sources) * samples,
        max_new_tokens=task.world.length,
        kl_coefficient=task.beta,
    )
    trainer = PPOTrainer(task.policy(), arguments, sources, task.tokenizer, _rewards(task))
    return _train(task, trainer, points)


def train_grpo(
    task: Task,
    folder: str | Path,
    *,
    rollouts: int,
    samples: int,
    rate: float,
    epochs: int = 2,
    seed: int = 42,
    kl_in: str = "reward",
    policy: Any = None,
    points: int = 20,
) -> list[list[float]]:
    """GRPO without scaling by group deviations, which would weigh sources unequally (Liu et al. 2025, Dr. GRPO).

    Args:
        task, folder, rollouts, samples, rate, epochs, seed, points: as for ``train_ppo``.
        kl_in: with ``loss`` it ends at another point, see ``token_divergence_optimum``.
        policy: a copy of the start that is trained in place; None makes one.
    """
    sources = _sources(task)
    rows = {name: [source[name] for source in sources] for name in ("id", "input_ids", "references")}
    arguments = GRPOConfig(
        **_arguments(folder, learning_rate=rate, max_steps=rollouts * epochs, seed=seed),
        per_device_train_batch_size=len(sources) * samples,
        steps_per_generation=1,
        num_generations=samples,
        num_iterations=epochs,
        max_completion_length=task.world.length,
        beta=task.beta,
        loss_type="dr_grpo",
        scale_rewards="none",
        activation_checkpointing=False,
        logging_steps=rollouts * epochs,
    )
    data = Dataset.from_dict(rows | {"prompt": [source["document"] for source in sources]})
    trainer = EncoderDecoderGRPOTrainer(
        policy or task.policy(), arguments, data, task.tokenizer, _rewards(task), kl_in=kl_in
    )
    return _train(task, trainer, points)


def train_exactly(
    task: Task, loss: Callable[[Task, Tensor], Tensor], *, steps: int, rate: float, points: int = 20
) -> list[list[float]]:
    """Descend the expectation of a loss over everything, no sampling anywhere: what the method itself leads to.

    Args:
        task: world, start, β.
        loss: of the task and the (S, N) log-probabilities, with gradient.
        steps: steps of Adam.
        rate: peak learning rate, falling to 0 on a cosine.
        points: how many distances to take on the way.
    """
    model = as_view(task.policy()).train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = [[0, task.first_distance]]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(task, task.world.log_probs(model, gradient=True)).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // points) == 0 or step == steps:
            found.append([step, task.distance(model)])
    return found


def expected_dpo_loss(task: Task, log_probs: Tensor) -> Tensor:
    """The sigmoid DPO loss in expectation over all pairs of completions and Bradley–Terry labels; a scalar."""
    first, second = torch.triu_indices(log_probs.shape[1], log_probs.shape[1], offset=1)
    rewards, reference = task.world.rewards, task.reference
    wrong = torch.sigmoid(rewards[:, second] - rewards[:, first])
    return dpo_loss(
        log_probs[:, first],
        log_probs[:, second],
        reference[:, first],
        reference[:, second],
        beta=task.beta,
        label_smoothing=wrong,
    ).mean()


def regularized_reward_loss(task: Task, log_probs: Tensor) -> Tensor:
    """−(E_π[r] − β KL(π‖π_ref)), the mean over sources: what PPO, GRPO and RLOO estimate from samples; a scalar."""
    penalty = task.beta * (log_probs - task.reference)
    return -(log_probs.exp() * (task.world.rewards - penalty)).sum(dim=1).mean()


def token_divergence_optimum(task: Task) -> Tensor:
    """(S, N) fp64: log-probabilities of the policy at which GRPO with its divergence in the loss comes to rest.

    That loss charges each token for its own divergence in the states that occur, and not for where it leads. At rest

        π(a|s) ∝ π_ref(a|s) e^{Q(s,a)/β},   Q(s,a) = E_π[r | s, a],

    while π* has the soft value β log E_{π_ref}[e^{r/β} | s, a] in the place of Q: less than Q plus what going on like
    π costs. The two agree for one token, and where β is large.
    """
    world, found = task.world, []
    for source in range(len(world.sources)):
        reference = {tuple(c): float(p) for c, p in zip(world.completions, task.reference[source].exp(), strict=True)}
        rewards = {tuple(c): r for c, r in zip(world.completions, world.rewards[source].tolist(), strict=True)}
        mass: dict[tuple[int, ...], float] = {}
        for completion, probability in reference.items():
            for size in range(len(completion) + 1):
                mass[completion[:size]] = mass.get(completion[:size], 0.0) + probability
        chosen: dict[tuple[int, ...], float] = {}
        values = dict(rewards)
        for state in sorted(mass.keys() - rewards.keys(), key=len, reverse=True):
            actions = [(*state, token) for token in range(world.vocabulary)]
            odds = torch.tensor([math.log(mass[a]) + values[a] / task.beta for a in actions], dtype=torch.float64)
            share = odds.softmax(0).tolist()
            chosen |= dict(zip(actions, share, strict=True))
            values[state] = sum(p * values[a] for p, a in zip(share, actions, strict=True))
        found.append([sum(math.log(chosen[tuple(c[: i + 1])]) for i in range(len(c))) for c in world.completions])
    return torch.tensor(found, dtype=torch.float64)
