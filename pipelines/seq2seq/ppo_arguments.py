"""What ``PPOTrainer`` is told beside what every ``transformers.Trainer`` is."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass
class PPOArguments(TrainingArguments):
    """Arguments of ``PPOTrainer``; each is described in ``ppo.PPOConfig``, whose fields have the same names."""

    rollouts: int = 100
    sources_per_rollout: int = 64
    samples_per_source: int = 4
    ppo_epochs: int = 2
    mini_batch_size: int = 64
    rollout_batch_size: int = 256
    max_new_tokens: int = 48
    temperature: float = 1.0
    kl_coefficient: float = 0.1
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.0
    value_coefficient: float = 0.1
    value_learning_rate: float | None = None
    entropy_coefficient: float = 0.0
    missing_eos_penalty: float = 0.0
    scale_rewards: bool = False
    reward_clip: float | None = None
    whiten_advantages: bool = True
    stop_kl: float | None = None
    max_kl: float | None = None
    samples_kept: int = 4

    def __post_init__(self) -> None:
        rows = self.sources_per_rollout * self.samples_per_source
        if rows % self.mini_batch_size or self.mini_batch_size % self.samples_per_source:
            raise ValueError(
                f"mini_batch_size={self.mini_batch_size} must divide the rollout's {rows} completions and be a "
                f"multiple of samples_per_source={self.samples_per_source}"
            )
        self.max_steps = self.rollouts * self.steps_per_rollout
        # The rollout's own record is the log: the Trainer's running averages would not survive a resume.
        self.logging_strategy = "no"
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        super().__post_init__()

    @property
    def mini_batches(self) -> int:
        """Optimizer steps of one epoch over a rollout."""
        return self.sources_per_rollout * self.samples_per_source // self.mini_batch_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that a rollout is trained on."""
        return self.ppo_epochs * self.mini_batches
