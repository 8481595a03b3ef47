"""The mathematics of PPO for sequences in pure functions: tensors in, tensors out, no model, no trainer.

Everything is fp32. R is the number of completions, T the longest; ``mask`` (R, T) is 1 on a completion's tokens, its
end token included, and 0 after them. Position t is the *action* y_t taken in the *state* (x, y_<t); ``values[:, t]``
is the critic's estimate in that state, before y_t is known. Log-probabilities, entropies and divergences are in nats.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipelines.seq2seq.losses import kl_estimate, masked_mean


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over the real tokens, by the two-pass algorithm (Chan et al. 1983).

    Args:
        values: (R, T), or any shape.
        mask: same shape, 1 where a value counts.

    Returns:
        Two fp32 scalars, in the values' unit and its square; 0 where nothing counts.
    """
    values = values.float()
    mean = masked_mean(values, mask)
    # Two passes: E[x²] − E[x]² loses all digits where the mean is large beside the spread.
    return mean, masked_mean((values - mean) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Values with mean 0 and variance 1 over the real tokens; 0 elsewhere.

    (x − μ) / √(σ² + ε), as the code of Ziegler et al. (2019) whitens advantages.

    Args:
        values: (R, T).
        mask: (R, T).
        epsilon: ε, for constant values to become 0, not infinity.

    Returns:
        (R, T) fp32, without unit.
    """
    mean, variance = masked_moments(values, mask)
    return (values.float() - mean) * torch.rsqrt(variance + epsilon) * mask


def last_token_index(mask: Tensor) -> Tensor:
    """(R,) index of each row's last real token; 0 for an empty row."""
    return (mask.sum(1) - 1).clamp(min=0).long()


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """The per-token reward −β·kl_t, the score of the whole completion added at its last token.

    Ziegler et al. (2019), eq. 2: R = r(x, y) − β log π(y|x)/π_ref(y|x), the second term spread over the tokens.

    Args:
        scores: (R,) scores r(x, y).
        kl: (R, T) estimates of each token's divergence from the reference, from ``losses.kl_estimate``.
        mask: (R, T).
        kl_coefficient: β ≥ 0, in units of the score a nat.

    Returns:
        (R, T) fp32, 0 after the end.
    """
    rewards = -kl_coefficient * kl.float() * mask
    has_tokens = (mask.sum(1, keepdim=True) > 0).float()
    return rewards.scatter_add(1, last_token_index(mask)[:, None], scores.float()[:, None] * has_tokens)


def loss_kl(
    log_probs: Tensor, old_log_probs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """Per-token divergence from the reference as a term of the loss: what counts is not its value but its gradient.

    k1 is weighted by the ratio ρ = π/π_old: the expectation of ρ (log π − log π_ref) over tokens that π_old drew is
    KL(π‖π_ref) whatever π is, and so is its gradient that of KL(π‖π_ref): E[ρ (log π − log π_ref) ∇ log π], the score
    function's term, and E[ρ ∇ log π] = 0, the direct one. Without the ratio the direct one alone is left, which pulls
    nowhere (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"). k2 and k3 are
    differentiated as they stand: where π is still π_old the gradient of k2 is that of KL(π‖π_ref), and that of k3, as
    GRPO has it in its loss (Shao et al. 2024, eq. 4), is that of KL(π_ref‖π).

    Args:
        log_probs: (R, T) log π of the current policy, with gradient.
        old_log_probs: (R, T) log π_old of the policy that sampled.
        reference: (R, T) log π_ref.
        estimator: see ``losses.kl_estimate``.

    Returns:
        (R, T) fp32, in nats, not masked.
    """
    found = kl_estimate(log_probs, reference, estimator)
    return torch.exp(log_probs.float() - old_log_probs.float()) * found if estimator == "k1" else found


def penalize_missing_end(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores less a penalty where a completion was cut before its end token.

    r(x, y) − c, as TRL's ``missing_eos_penalty``; Ziegler et al. (2019) put a fixed low score in its place.

    Args:
        scores: (R,).
        ended: (R,) bool, whether the end token came.
        penalty: c ≥ 0, in units of the score.

    Returns:
        (R,) fp32.
    """
    return scores.float() - penalty * (~ended.bool()).float()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns that the critic learns.

    Schulman et al. (2015), eq. 16: Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t). A completion is an
    episode: after its last token the value is 0.

    Args:
        rewards: (R, T).
        values: (R, T), V(s_t); what stands where the mask is 0 is not read.
        mask: (R, T).
        gamma: discount γ in [0, 1].
        lam: λ in [0, 1]: 0 is one-step, 1 is Monte Carlo.

    Returns:
        advantages and returns = advantages + values, both (R, T) fp32 and 0 after the end.
    """
    mask = mask.float()
    rewards, values = rewards.float() * mask, values.float() * mask
    following = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(following)
    backwards = []
    for t in range(values.shape[1] - 1, -1, -1):
        # The mask makes both `following` and `advantage` 0 beyond the last token, so padding needs no special case.
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        following = values[:, t]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


class PolicyLoss(NamedTuple):
    """Per-token clipped surrogate with what one watches beside it; all (R, T) fp32, not masked."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> PolicyLoss:
    """The clipped surrogate, to be minimized: −min(ρÂ, clip(ρ, 1−ε, 1+ε)Â) with ρ = π/π_old.

    Schulman et al. (2017), eq. 7.

    Args:
        log_probs: (R, T) of the current policy, with gradient.
        old_log_probs: (R, T) of the policy that sampled.
        advantages: (R, T).
        clip_range: ε > 0.

    Returns:
        Per-token loss, ratio ρ, and 1.0 where the clipped branch was the smaller (there is no gradient there).
    """
    ratio = torch.exp(log_probs.float() - old_log_probs.float())
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return PolicyLoss(-torch.minimum(plain, clipped), ratio, (clipped < plain).float())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error of the critic, its step clipped: ½ max((V−R)², (clip(V, V_old±ε)−R)²), per token.

    The critic's part of the PPO objective as in OpenAI's baselines (ppo2) and Ziegler et al. (2019).

    Args:
        values: (R, T) current estimates, with gradient.
        old_values: (R, T) estimates at the time of the rollout.
        returns: (R, T) targets.
        clip_range: ε in units of the reward; 0 turns clipping off.
    """
    error = (values.float() - returns) ** 2
    if clip_range > 0:
        near = torch.maximum(torch.minimum(values.float(), old_values + clip_range), old_values - clip_range)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean per-token KL(π_old‖π): the k3 estimate from samples of π_old (Schulman 2020, "Approximating KL divergence").

    Args:
        log_probs: (R, T) of the current policy.
        old_log_probs: (R, T) of the policy that sampled.
        mask: (R, T).

    Returns:
        A scalar in nats, never negative.
    """
    return masked_mean(kl_estimate(old_log_probs, log_probs, "k3"), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var[R − V] / Var[R] over the real tokens: 1 for a perfect critic, 0 for a constant one, less for a worse.

    The coefficient of determination with a free constant, as OpenAI's baselines log it (Dhariwal et al. 2017).

    Args:
        values: (R, T), the critic's estimates V.
        returns: (R, T), what they were to predict.
        mask: (R, T).

    Returns:
        A scalar without unit; 0 where the returns do not vary.
    """
    _, whole = masked_moments(returns, mask)
    _, left = masked_moments(returns.float() - values.float(), mask)
    return torch.where(whole > 0, 1 - left / whole.clamp(min=torch.finfo(torch.float32).tiny), torch.zeros_like(whole))


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The coefficient for the next rollout, moved in proportion to how far the divergence is from its target.

    Ziegler et al. (2019), section 2.2: e = clip(KL/target − 1, −0.2, 0.2), β ← β (1 + e·n/N).

    Args:
        coefficient: β now.
        kl: observed mean divergence, nats a sequence.
        target: wanted divergence, nats a sequence, > 0.
        samples: n, completions in the rollout.
        horizon: N, completions over which the coefficient can change by a factor of about 1.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)


class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1983, the parallel form of Welford's update)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0):
        self.count, self.mean, self.squares = count, mean, squares

    def update(self, scores: Tensor) -> None:
        """Take in (R,) scores; the same on every process."""
        scores = scores.double()
        count, mean = scores.numel(), float(scores.mean())
        squares = float(((scores - mean) ** 2).sum())
        total, shift = self.count + count, mean - self.mean
        self.squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation of what was seen; 1 before two different scores were."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def state(self) -> list[float]:
        """What ``RunningMoments(*state)`` goes on from."""
        return [self.count, self.mean, self.squares]
