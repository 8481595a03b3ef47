"""The sequence policy gradient by enumeration, its variance, its relation to cross-entropy; a finished RLHF chain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems
from pipelines.seq2seq.known_optimum import completion_count

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.seq2seq.enumerable import World

_REWARD, _PPO, _EVALUATE = "summarization/reward", "summarization/ppo", "summarization/evaluate"
_EXACT = 1e-9
_MOST = 200  # completions: each costs a backward pass


@config
class PolicyGradientConfig(ExerciseConfig):
    """The world that is enumerated, and the stages of a finished RLHF chain."""

    output_dir: str = Field("runs/policy_gradient", description="folder the stage writes into", json_schema_extra=INERT)
    reward: Source = Field(description="folder of the chain's finished stage of summarization/reward")
    ppo: Source = Field(description="folder of its finished stage of summarization/ppo")
    evaluation: Source = Field(description="folder of its finished stage of summarization/evaluate")
    policy: str = Field("ppo", description="what that evaluation calls the model that PPO made")
    vocabulary: int = Field(4, ge=4, le=8, description="tokens: padding, the end mark and letters")
    length: int = Field(3, ge=1, le=4, description="tokens of a completion at most")
    sources: int = Field(2, ge=1, le=4, description="prompts, each with rewards of its own")
    offset: float = Field(2.0, description="added to all rewards: it changes no gradient, but its estimates' variance")
    draws: int = Field(20_000, ge=1000, description="completions sampled to check the estimator")
    steps: int = Field(100, ge=1, description="steps of each training with sampled gradients")
    batch_size: int = Field(4, ge=1, description="completions of each prompt that such a step samples")
    seeds: int = Field(3, ge=1, le=20, description="trainings with, and as many without a baseline")
    learning_rate: float = Field(0.006, gt=0, description="of those trainings, Adam's")

    @property
    def completions(self) -> int:
        """How many completions a source has."""
        return completion_count(self.vocabulary, self.length)

    def problems(self) -> list[Problem]:
        found = super().problems()
        stages = {"reward": _REWARD, "ppo": _PPO, "evaluation": _EVALUATE}
        found += stage_problems({name: (getattr(self, name), recipe) for name, recipe in stages.items()})
        if self.completions * self.sources > _MOST:
            problem = f"with vocabulary={self.vocabulary} and sources={self.sources} gives "
            problem += f"{self.completions * self.sources:,} completions to enumerate"
            found.append(Problem("length", self.length, problem, f"give smaller ones: at most {_MOST} completions"))
        return found


def policy_gradient(config: PolicyGradientConfig) -> dict[str, float]:
    """Compute, check, train in the small and quote the chain; see ``docs/problems/policy_gradient.md``.

    Returns:
        ``policy_gradient/variance`` and ``policy_gradient/variance_mean_baseline``,
        ``policy_gradient/variance_best_baseline``: trace of the covariance of one sample's estimate;
        ``policy_gradient/reward``, ``policy_gradient/reward_baseline``: expected reward after training without and with
        a baseline, means over seeds; ``policy_gradient/checks``, ``policy_gradient/checks_failed``.

    Raises:
        UserError: a stage of the chain that is missing, unfinished, or another's; ``policy`` is not in the evaluation.
    """
    from pipelines.problems.policy_gradient_math import make_model
    from pipelines.seq2seq.enumerable import make_world

    answer = Answer(config, "policy_gradient", "Policy gradients and RLHF")
    chain = _read_chain(config)
    world = make_world(
        vocabulary=config.vocabulary, length=config.length, sources=config.sources, spread=1.0, seed=config.seed
    )
    model = make_model(world, seed=config.seed)
    _gradient(config, world, model, answer)
    _cross_entropy(config, world, model, answer)
    _training(config, world, answer)
    _chain(config, chain, answer)
    kept = ("variance", "variance_mean_baseline", "variance_best_baseline", "reward", "reward_baseline")
    return answer.write() | {f"policy_gradient/{name}": float(answer.values[name]) for name in kept}


# --------------------------------------------------------------------------------------------------------- the gradient


def _gradient(config: PolicyGradientConfig, world: World, model: Any, answer: Answer) -> None:
    """The estimator's mean, its variance, and baselines."""
    import numpy as np
    import torch
    from scipy.optimize import minimize_scalar

    from pipelines.problems import policy_gradient_math as pg

    rewards = world.rewards + config.offset
    parameters = pg.parameters_of(model)
    exact = -pg.flat_gradient(pg.expected_reward(world.log_probs(model, gradient=True), rewards), parameters)
    probabilities, score = pg.scores(world, model)
    weight = probabilities / len(probabilities)
    answer.value(completions=len(world.completions), parameters=len(exact), gradient_norm=exact.norm())
    answer.check(
        "probabilities of all completions sum to 1",
        probabilities.sum(1).sub(1).abs().max(),
        0.0,
        _EXACT,
        "enumeration; the largest deviation over prompts",
    )
    mean = torch.einsum("sn,snd->d", weight, pg.estimates(score, rewards))
    route = "autograd through Σ π(y|x) r(x, y); expected: Σ π(y|x) · estimate(y); the largest deviation of a component"
    answer.check(
        "−E[r Σ ∇ log π(y_i|y_<i, x)] is the gradient of −E[r]", (mean - exact).abs().max(), 0.0, _EXACT, route
    )
    direction = exact / exact.norm()
    slope = _central_difference(world, model, rewards, direction)
    route = "central difference along the gradient"
    answer.check("the slope of −E[r] along its gradient is the gradient's length", slope, exact.norm(), 1e-6, route)
    zero = torch.einsum("sn,snd->sd", probabilities, score).abs().max()
    route = "enumeration; the largest component over prompts"
    answer.check("E[Σ ∇ log π] = 0, so a baseline changes no mean", zero, 0.0, _EXACT, route)

    baselines = {
        "none": torch.zeros(len(rewards), 1, dtype=torch.float64),
        "mean reward": pg.mean_reward(probabilities, rewards),
        "least variance": pg.best_baseline(probabilities, score, rewards),
    }
    draw, rows, variances = torch.Generator().manual_seed(config.seed), [], []
    prompts = torch.randint(len(rewards), (config.draws,), generator=draw)
    picked = torch.multinomial(probabilities[prompts], 1, generator=draw)[:, 0]
    for name, baseline in baselines.items():
        each = pg.estimates(score, rewards, baseline)
        variance = pg.total_variance(probabilities, score, rewards, baseline)
        variances.append(variance)
        along = (each @ direction)[prompts, picked]
        squares = (each - exact).square().sum(-1)[prompts, picked]
        route = f"{config.draws:,} sampled completions, 4 standard errors"
        answer.check(
            f"baseline {name}: mean estimate along the gradient", along.mean(), exact.norm(), _four(along), route
        )
        answer.check(f"baseline {name}: variance of one estimate", squares.mean(), variance, _four(squares), route)
        rows.append(
            [name, f"{along.mean():.4f} ± {_four(along) / 4:.4f}", f"{variance:.2f}", f"{variance / variances[0]:.3f}"]
        )
    first = probabilities[:1], score[:1], rewards[:1]
    found = minimize_scalar(lambda b: pg.total_variance(*first, b))
    route = "minimization of the enumerated variance over b; expected: E[r|∇ log π|²] / E[|∇ log π|²]"
    answer.check("the baseline of least variance, first prompt", found.x, pg.best_baseline(*first)[0, 0], 1e-4, route)
    answer.value(variance=variances[0], variance_mean_baseline=variances[1], variance_best_baseline=variances[2])
    answer.value(mean_reward=pg.mean_reward(*(first[0], first[2]))[0, 0], best_baseline=pg.best_baseline(*first)[0, 0])
    columns = ["baseline", "mean along the gradient", "variance of one sample", "of that without"]
    caption = f"The gradient's length is {exact.norm():.4f}, and every baseline's mean agrees to four standard errors."
    answer.table("baselines", columns, rows, caption)
    range_of = np.linspace(min(0.0, float(found.x) - 1), max(2 * float(found.x), 1.0), 60)
    _variance_figure(answer, range_of, [pg.total_variance(*first, b) for b in range_of], pg, first)


def _four(values: Tensor) -> float:
    """Four standard errors of a mean."""
    return 4 * float(values.std()) / math.sqrt(len(values))


def _central_difference(world: World, model: Any, rewards: Tensor, direction: Tensor, step: float = 1e-4) -> float:
    """Slope of −J along a direction of the parameters; they are put back as they were."""
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    from pipelines.problems.policy_gradient_math import expected_reward

    place, ends = parameters_to_vector(model.parameters()).detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            vector_to_parameters(place + sign * step * direction, model.parameters())
            ends.append(-float(expected_reward(world.log_probs(model), rewards)))
    vector_to_parameters(place, model.parameters())
    return (ends[0] - ends[1]) / (2 * step)


def _variance_figure(answer: Answer, baselines: Any, variances: list[float], pg: Any, first: tuple) -> None:
    from pipelines.reporting.plots import Panel, Series, lines

    marks = [0.0, float(pg.mean_reward(first[0], first[2])[0, 0]), float(pg.best_baseline(*first)[0, 0])]
    heights = [pg.total_variance(*first, mark) for mark in marks]
    panel = Panel(
        [
            Series("", baselines, variances, colour=0),
            Series("0, mean reward, least variance", marks, heights, marks=True, colour=1),
        ],
        "variance of one estimate",
        zero=True,
    )
    alt = "The variance is a parabola in the baseline; the mean reward lies near its lowest point."
    svg = lines("policy_gradient-variance", [panel], "baseline b, in units of reward", alt)
    caption = (
        "A parabola: without a baseline (left dot) the rewards' offset costs noise; the mean reward is nearly best."
    )
    answer.figure(Figure("variance", svg, caption=caption, title="What a baseline does (first prompt)"))


# -------------------------------------------------------------------------------------------------------- cross-entropy


def _cross_entropy(config: PolicyGradientConfig, world: World, model: Any, answer: Answer) -> None:
    """Reward 1 on the data, in three senses."""
    import torch

    from pipelines.problems import policy_gradient_math as pg

    draw = torch.Generator().manual_seed(config.seed + 1)
    shape = world.rewards.shape
    data = torch.softmax(2 * torch.randn(shape, generator=draw, dtype=torch.float64), 1)
    probabilities, score = pg.scores(world, model)
    likelihood = pg.cross_entropy_gradient(world, model, data)
    ones = torch.ones(shape, dtype=torch.float64)
    on_data = torch.einsum("sn,snd->d", data / len(data), pg.estimates(score, ones))
    route = "autograd through transformers' loss of labelled examples; the largest deviation of a component"
    name = "y from the data, r = 1: the estimator's mean is maximum likelihood's gradient"
    answer.check(name, (likelihood - on_data).abs().max(), 0.0, _EXACT, route)
    ratio = data / probabilities
    weighted = torch.einsum("sn,snd->d", probabilities / len(data), pg.estimates(score, ratio))
    name = "y from the policy, r = P_data(y|x)/π(y|x): the same"
    answer.check(name, (likelihood - weighted).abs().max(), 0.0, _EXACT, route)
    # One reference for the first prompt, rewarded by 1 where the policy writes just that.
    number = int(data[0].argmax())
    target, hit = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    target[0, number] = hit[0, number] = 1.0
    single = pg.cross_entropy_gradient(world, model, target)
    own = torch.einsum("sn,snd->d", probabilities / len(data), pg.estimates(score, hit))
    likely = probabilities[0, number]
    name = "y from the policy, r = [y = y*]: cross-entropy's gradient times π(y*|x)"
    answer.check(name, (own - likely * single).abs().max(), 0.0, _EXACT, route)
    answer.value(reference_probability=likely, samples_until_hit=1 / likely, cross_entropy_norm=single.norm())
    answer.value(hit_norm=own.norm())


# ------------------------------------------------------------------------------------------------------------- training


def _training(config: PolicyGradientConfig, world: World, answer: Answer) -> None:
    """Trainings on sampled gradients, with the mean reward as baseline and without one, followed exactly."""
    import numpy as np

    from pipelines.reporting.plots import Panel, Series, lines

    rewards = world.rewards + config.offset
    best = float(rewards.max(1).values.mean())
    found, curves = {}, []
    for number, (label, use) in enumerate((("without", False), ("with a baseline", True))):
        runs = np.array([_train(config, world, rewards, use, seed) for seed in range(config.seeds)])
        found[use] = runs
        for row, run in enumerate(runs):
            curves.append(Series("" if row else label, range(len(run)), run, colour=1 - number))
    early = config.steps // 5
    answer.value(early_steps=early, early=found[False][:, early].mean(), early_baseline=found[True][:, early].mean())
    answer.value(reward_start=found[True][:, 0].mean(), reward=found[False][:, -1].mean(), best_reward=best)
    answer.value(reward_baseline=found[True][:, -1].mean(), steps=config.steps, batch_size=config.batch_size)
    curves.append(Series("largest possible", [0, config.steps], [best, best], colour=2))
    alt = "Expected reward rises towards the largest possible one, faster and more evenly with a baseline."
    svg = lines("policy_gradient-training", [Panel(curves, "E[r], exact")], "steps", alt)
    caption = f"{config.batch_size} samples a prompt and step: faster with a baseline ({config.seeds} seeds each)."
    answer.figure(Figure("training", svg, caption=caption, title="Training on sampled gradients"))


def _train(config: PolicyGradientConfig, world: World, rewards: Tensor, use: bool, seed: int) -> list[float]:
    """Expected reward, exact, before each step and after the last."""
    import torch

    from pipelines.problems.policy_gradient_math import expected_reward, make_model, mean_reward

    model = make_model(world, seed=config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    draw, curve = torch.Generator().manual_seed(1000 * config.seed + seed), []
    for _ in range(config.steps):
        log_probs = world.log_probs(model, gradient=True)
        probabilities = log_probs.detach().exp()
        curve.append(float(expected_reward(log_probs.detach(), rewards)))
        picked = torch.multinomial(probabilities, config.batch_size, replacement=True, generator=draw)
        gained = rewards.gather(1, picked)
        baseline = mean_reward(probabilities, rewards) if use else 0.0
        loss = -((gained - baseline) * log_probs.gather(1, picked)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*curve, float(expected_reward(world.log_probs(model), rewards))]


# ------------------------------------------------------------------------------------------------------------ the chain


def _read_chain(config: PolicyGradientConfig) -> dict[str, dict[str, Any]]:
    """``stage.json`` of the three stages, checked before anything is computed."""
    from pipelines.errors import UserError

    records = {
        name: finished_stage(getattr(config, name), name, recipe)
        for name, recipe in (("reward", _REWARD), ("ppo", _PPO), ("evaluation", _EVALUATE))
    }
    measured, systems = records["evaluation"]["metrics"], records["evaluation"]["config"]["systems"]
    if config.policy not in systems:
        problem = f"the evaluation measured {', '.join(systems)}"
        raise UserError("policy", config.policy, problem, "name one of those")
    if f"{config.policy}/gold_win_rate" not in measured or f"{config.policy}/kl" not in measured:
        problem = "was not measured against another model"
        raise UserError(
            "policy", config.policy, problem, "name another than the reference, or evaluate with kl_samples=1"
        )
    return records


def _chain(config: PolicyGradientConfig, records: dict[str, dict[str, Any]], answer: Answer) -> None:
    """What the RLHF chain gained, in its own numbers."""
    from pipelines.reporting.metrics import format_mean
    from pipelines.reporting.plots import Panel, Series, lines
    from pipelines.training import read_history

    measured, policy = records["evaluation"]["metrics"], config.policy
    reference = records["evaluation"]["config"]["reference_system"]
    rows = []
    for system in (reference, policy):
        keys = [f"{system}/{measure}" for measure in ("rouge1", "gold", "gold_win_rate", "kl", "length")]
        rows.append([system, *(format_mean(measured, key) for key in keys)])
    columns = ["system", "ROUGE-1", "gold score", "gold win rate", "KL, nats", "length, words"]
    answer.table(
        "chain",
        columns,
        rows,
        f"Held-out documents: {int(measured['evaluate/examples']):,}. In brackets: 95 % intervals.",
    )
    gain = f"{policy}/rouge1_minus_{reference}"
    answer.value(
        reward_accuracy=100 * records["reward"]["metrics"]["reward/accuracy"],
        win_rate=100 * measured[f"{policy}/gold_win_rate"],
        win_rate_low=100 * measured[f"{policy}/gold_win_rate_ci_low"],
        win_rate_high=100 * measured[f"{policy}/gold_win_rate_ci_high"],
        chain_kl=measured[f"{policy}/kl"],
        rouge_gain=measured[gain],
        rouge_gain_low=measured[f"{gain}_ci_low"],
        rouge_gain_high=measured[f"{gain}_ci_high"],
        rollouts=records["ppo"]["metrics"]["ppo/rollouts"],
        kl_coefficient=records["ppo"]["config"]["kl_coefficient"],
    )
    history = [entry for entry in read_history(Path(config.ppo).expanduser()) if "objective/kl" in entry]
    steps = range(1, len(history) + 1)
    panels = []
    for number, (key, label) in enumerate(
        (("objective/proxy_reward", "reward model"), ("objective/gold", "judge"), ("objective/kl", "KL, nats"))
    ):
        if history and all(key in entry for entry in history):
            panels.append(Panel([Series("", steps, [e[key] for e in history], smooth=True, colour=number)], label))
    alt = "The reward model's score, the judge's and the divergence over the rollouts of PPO."
    svg = lines("policy_gradient-chain", panels, "rollout", alt)
    caption = "What PPO maximizes (top), what it is meant to improve (middle), how far it went from its start (bottom)."
    answer.figure(Figure("chain", svg, caption=caption, title="The chain's PPO"))
