"""The mathematics of preference alignment in pure functions: tensors in, tensors out, no model and no state.

Sequence quantities are sums over tokens, in nats. Half precision is widened to fp32 on entry; fp64 stays what it is.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def token_log_probs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given tokens.

    Args:
        logits: (…, V), any floating type.
        token_ids: (…) integers in [0, V).
        temperature: positive.

    Returns:
        (…) fp32 log-probabilities, with gradient.
    """
    logits = _wide(logits)
    if temperature != 1.0:
        logits = logits / temperature
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), token_ids.reshape(-1), reduction="none")
    return -flat.view(token_ids.shape)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), −Σ_v p_v log p_v (Shannon 1948).

    Args:
        logits: (…, V), any floating type.
        temperature: positive.

    Returns:
        (…) fp32, in nats, between 0 and log V.
    """
    log_probs = torch.log_softmax(_wide(logits) / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the real tokens of each row, as log π(y|x) = Σ_t log π(y_t|y_<t, x).

    Args:
        values: (R, T), of a token each.
        mask: (R, T), 1 on the real tokens.

    Returns:
        (R,) fp32.
    """
    return (_wide(values) * mask).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all real tokens.

    Args:
        values: any shape.
        mask: the same shape, 1 where a value counts.

    Returns:
        A fp32 scalar; 0 where nothing counts.
    """
    return (_wide(values) * mask).sum() / mask.sum().clamp(min=1)


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centre: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the preferences under Bradley–Terry (1952), per pair.

    −log σ(r_w − r_l − m) + c·(r_w + r_l)². Without m and c it is the loss of Stiennon et al. (2020), section 3.4; the
    margin is that of Llama 2 (Touvron et al. 2023, eq. 2), the centring term that of Eisenstein et al. (2023, eq. 3),
    which fixes the scores' free constant near 0.

    Args:
        chosen: (B,) scores r_w.
        rejected: (B,) scores r_l.
        margin: (B,) m ≥ 0, or None.
        centre: c ≥ 0.

    Returns:
        (B,) fp32 losses.
    """
    chosen, rejected = _wide(chosen), _wide(rejected)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(difference)
    return loss + centre * (chosen + rejected) ** 2 if centre else loss


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """The sigmoid DPO loss, per pair (Rafailov et al. 2023, eq. 7; label smoothing: Mitchell 2023, cDPO).

    −(1−ε) log σ(βΔ) − ε log σ(−βΔ) with Δ = (log π/π_ref)(y_w) − (log π/π_ref)(y_l).

    Args:
        chosen_log_probs: (B,) log π(y_w | x), summed over tokens.
        rejected_log_probs: (B,) log π(y_l | x).
        chosen_reference: (B,) log π_ref(y_w | x).
        rejected_reference: (B,) log π_ref(y_l | x).
        beta: strength of the pull to the reference, in reward units a nat.
        label_smoothing: ε, the share of flipped labels: one in [0, 0.5) that is assumed, or (B,) in [0, 1] where known.

    Returns:
        (B,) fp32 losses; ln 2 where the policy is the reference.
    """
    delta = (_wide(chosen_log_probs) - chosen_reference) - (_wide(rejected_log_probs) - rejected_reference)
    return -(1 - label_smoothing) * F.logsigmoid(beta * delta) - label_smoothing * F.logsigmoid(-beta * delta)


def plackett_luce_loss(rewards: Tensor, ranking: Tensor, *, top_k: int | Tensor | None = None) -> Tensor:
    """Negative log-likelihood of rankings under Plackett–Luce, per list (Luce 1959; Plackett 1975; Rafailov
    et al. 2023, eq. 18).

    −Σ_{k ≤ top_k} log[ e^{r_k} / Σ_{j ≥ k} e^{r_j} ] with r_k the reward of what was ranked k-th: the best is drawn
    first, in proportion to e^r, then the next of those that are left. For two it is Bradley–Terry's.

    Args:
        rewards: (B, K) of each list's completions, in any order; what stands beyond a shorter list must be finite.
        ranking: (B, K) integers, the numbers of the completions from best to worst; −1 beyond the end of a shorter
            list. What stands after the first ``top_k`` is worse than those, in no order.
        top_k: how many leading places are known, one number or (B,); None: all.

    Returns:
        (B,) fp32 losses; log K! of a full ranking where all rewards are equal.
    """
    ordered, _, decided = _in_rank_order(rewards, ranking, top_k)
    places = torch.arange(ranking.shape[1], device=ranking.device)
    # Each place competes with what stands behind it; with itself in any case, so that no sum is empty.
    rivals = (places >= places[:, None]) & (ranking >= 0)[:, None] | (places == places[:, None])
    total = ordered[:, None].masked_fill(~rivals, float("-inf")).logsumexp(-1)
    return ((total - ordered) * decided).sum(-1)


def ranking_agreement(rewards: Tensor, ranking: Tensor, *, top_k: int | Tensor | None = None) -> Tensor:
    """Share of the pairs that a ranking decides which the rewards order alike, a tie counting one half.

    (τ + 1)/2 with Kendall's (1938) τ over these pairs: 1 where all are ordered alike, 1/2 by chance.

    Args:
        rewards: (B, K), as for ``plackett_luce_loss``, and so the others.
        ranking: (B, K) with at least two entries in each row.
        top_k: as there.

    Returns:
        (B,) fp32 in [0, 1], without unit.
    """
    ordered, present, decided = _in_rank_order(rewards, ranking, top_k)
    places = torch.arange(ranking.shape[1], device=ranking.device)
    pairs = decided[:, :, None] & present[:, None] & (places > places[:, None])
    difference = ordered[:, :, None] - ordered[:, None]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return (right * pairs).sum((1, 2)) / pairs.sum((1, 2))


def _in_rank_order(rewards: Tensor, ranking: Tensor, top_k: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (B, K) from best- to worst-ranked, and where a completion and a known place stand."""
    present = ranking >= 0
    places = torch.arange(ranking.shape[1], device=ranking.device)
    known = ranking.shape[1] if top_k is None else top_k
    decided = present & (places < (known[:, None] if isinstance(known, Tensor) else known))
    return _wide(rewards).gather(1, ranking.clamp(min=0)), present, decided


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimates of KL(π‖π_ref) from samples of π, elementwise (Schulman 2020, "Approximating KL divergence").

    With ρ = log π − log π_ref: k1 = ρ (unbiased, can be negative), k2 = ρ²/2 (biased, never negative),
    k3 = e^{−ρ} − 1 + ρ (unbiased, never negative). In nats.

    Args:
        log_probs: log π of the sampled tokens, any shape.
        reference: log π_ref of the same tokens.
        estimator: which of the three.

    Returns:
        fp32, the shape of the inputs.

    Raises:
        ValueError: an estimator of another name.
    """
    log_ratio = _wide(log_probs) - _wide(reference)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', not {estimator!r}")
