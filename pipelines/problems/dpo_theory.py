"""Exercise: the derivation of DPO, every step of it verified where all completions can be enumerated."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipelines.problems.dpo_theory_math import Setting, Tree

_RECIPE = "summarization/known_optimum"
_MOST = 160  # completions: all their pairs are enumerated, and optima searched over all prefixes
_SHOWN = 300  # pairs of the figure
_ATOMS = 80  # log₁₀ of the atoms of the observable universe, about


@config
class DPOTheoryConfig(ExerciseConfig):
    """The optimal policy, Bradley–Terry, the loss's gradient and Plackett–Luce, by enumeration."""

    output_dir: str = Field("runs/dpo_theory", description="folder the stage writes into", json_schema_extra=INERT)
    known_optimum: Source = Field(description=f"folder of a finished {_RECIPE} stage that trained dpo and listwise")
    vocabulary: int = Field(4, ge=4, le=8, description="tokens: padding, the end mark and letters")
    length: int = Field(3, ge=1, le=4, description="tokens of a completion at most, its end mark included")
    spread: float = Field(1.0, gt=0, le=10, description="standard deviation of the rewards")
    beta: float = Field(0.5, ge=0.2, le=10, description="β, in units of reward a nat")
    list_size: int = Field(4, ge=2, le=5, description="completions that are ranked together")
    samples: int = Field(200_000, ge=1000, description="simulated preferences and rankings")
    large_vocabulary: int = Field(32_128, ge=2, description="tokens of a model whose completions are counted (T5's)")
    large_length: int = Field(64, ge=1, le=4096, description="tokens of such a completion at most")

    def problems(self) -> list[Problem]:
        from pipelines.seq2seq.known_optimum import completion_count

        found = super().problems() + stage_problems({"known_optimum": (self.known_optimum, _RECIPE)})
        count = completion_count(self.vocabulary, self.length)
        if count > _MOST:
            problem = f"with vocabulary={self.vocabulary} gives {count:,} completions to enumerate"
            mend = f"give a smaller length or vocabulary: at most {_MOST} completions"
            found.append(Problem("length", self.length, problem, mend))
        return found


@dataclass(frozen=True)
class _World:
    """What every part works on: one prompt, a random π_ref with its table, rewards, and π* by its formula."""

    setting: Setting
    tree: Tree
    reference_logits: Tensor
    generator: torch.Generator

    @property
    def reference(self) -> Tensor:
        return self.setting.reference[0]

    @property
    def rewards(self) -> Tensor:
        return self.setting.world.rewards[0]

    @property
    def beta(self) -> float:
        return self.setting.beta

    @property
    def optimum(self) -> Tensor:
        return self.setting.world.optimum(self.setting.reference, self.beta)[0]


def dpo_theory(config: DPOTheoryConfig) -> dict[str, float]:
    """Enumerate a small world, optimize in it without using the formulas, and hold the formulas against what is found.

    Returns:
        ``dpo_theory/log_partition``, log Z in nats; ``/best_value``, the largest E[r] − β KL(π‖π_ref) found;
        ``/population_kl``, KL(π‖π*) in nats where the expected DPO loss is least; and the checks' counts.

    Raises:
        UserError: ``known_optimum`` is no finished stage of its recipe.
    """
    import torch

    from pipelines.problems.dpo_theory_math import Setting, tree
    from pipelines.seq2seq.enumerable import make_world

    record = finished_stage(config.known_optimum, "known_optimum", _RECIPE)
    answer = Answer(config, "dpo_theory", "DPO, from the objective to the loss")
    generator = torch.Generator().manual_seed(config.seed)
    sizes = {"vocabulary": config.vocabulary, "length": config.length}
    small = make_world(**sizes, sources=1, spread=config.spread, seed=config.seed)
    table = tree(small.completions, small.vocabulary)
    logits = torch.randn(table.prefixes, small.vocabulary, generator=generator, dtype=torch.float64)
    setting = Setting(small, table.log_probs(logits)[None], config.beta)
    world = _World(setting, table, logits, generator)
    answer.value(vocabulary=config.vocabulary, length=config.length, beta=config.beta, spread=config.spread)
    answer.value(samples=config.samples)
    _gibbs(answer, world)
    best, found = _optimal(answer, world)
    _partition(answer, world, config)
    _bradley_terry(answer, world, best, config)
    _gradient(answer, world)
    kl = _population(answer, world)
    _plackett_luce(answer, world, best, config)
    _trained(answer, record, Path(config.known_optimum).expanduser())
    return answer.write() | found | {"dpo_theory/population_kl": kl}


def _gibbs(answer: Answer, world: _World) -> None:
    """argmin_p KL(p‖q) = q."""
    import torch

    from pipelines.problems.dpo_theory_math import kl
    from pipelines.problems.search import minimized

    count = len(world.reference)
    answer.value(completions=count)
    total = world.reference.exp().sum()
    answer.check("The enumerated completions are all there are: Σ π_ref(y) = 1", total, 1, 1e-12, "enumeration")
    q = torch.randn(count, generator=world.generator, dtype=torch.float64).log_softmax(0)
    start = torch.randn(count, generator=world.generator, dtype=torch.float64)
    p = minimized(lambda x: kl(x.log_softmax(0), q), start).log_softmax(0)
    route = f"Newton's method over the {count} logits of p from a random start: largest |p − q|"
    answer.check("argmin_p KL(p‖q) = q", (p.exp() - q.exp()).abs().max(), 0, 1e-6, route)
    others = torch.randn(10_000, count, generator=world.generator, dtype=torch.float64)
    least = kl((q + 0.1 * others).log_softmax(1), q).min()
    answer.value(least_kl=float(least))
    route = "10,000 random p near q: how far the least falls below 0"
    answer.check("KL(p‖q) ≥ 0", max(0.0, -float(least)), 0, 0, route)


def _optimal(answer: Answer, world: _World) -> tuple[Tensor, dict[str, float]]:
    """π* where E[r] − β KL(π‖π_ref) is largest; the reward that a policy is optimal for."""
    import torch

    from pipelines.problems.dpo_theory_math import implicit_rewards, kl, log_partition
    from pipelines.problems.search import minimized
    from pipelines.seq2seq.known_optimum_training import regularized_reward_loss

    setting, table = world.setting, world.tree

    def loss(logits: Tensor) -> Tensor:
        return regularized_reward_loss(setting, table.log_probs(logits)[None])

    best_logits = minimized(loss, world.reference_logits)
    best, value = table.log_probs(best_logits), -float(loss(best_logits))
    log_z = float(log_partition(world.reference, world.rewards, world.beta))
    route = f"Newton's method over the {best_logits.numel()} logits of an autoregressive policy, from π_ref"
    statement = "The policy with the largest E[r] − β KL(π‖π_ref) is π_ref e^{r/β}/Z: KL between the two"
    answer.check(statement, kl(best, world.optimum), 0, 1e-8, route)
    answer.check("That largest value is β log Z", value, world.beta * log_z, 1e-8, f"{route}: the value there")
    recovered = implicit_rewards(best, world.reference, world.beta) + world.beta * log_z
    off = (recovered - world.rewards).abs().max()
    route += "; largest distance from r over all completions"
    answer.check("r(y) = β log π*(y)/π_ref(y) + β log Z", off, 0, 1e-3, route)
    answer.value(log_partition=log_z, best_value=value, reference_reward=_mean(world.reference, world.rewards))
    answer.value(optimal_reward=_mean(best, world.rewards), optimal_kl=kl(best, world.reference).item())
    order = world.rewards.argsort(descending=True)
    answer.figure(_tilted(world, order))
    answer.figure(_frontier(world, torch.stack([world.reference, best])))
    return best, {"dpo_theory/log_partition": log_z, "dpo_theory/best_value": value}


def _mean(log_probs: Tensor, values: Tensor) -> float:
    return float((log_probs.exp() * values).sum())


def _tilted(world: _World, order: Tensor) -> Figure:
    from pipelines.reporting.plots import Panel, Series, lines

    places = list(range(1, len(order) + 1))
    series = [Series("π_ref", places, world.reference[order].exp().tolist(), points=True, colour=0)]
    for colour, beta in enumerate((4 * world.beta, world.beta), start=1):
        optimum = world.setting.world.optimum(world.setting.reference, beta)[0]
        series.append(Series(f"π*, β = {beta:g}", places, optimum[order].exp().tolist(), colour=colour))
    alt = "probabilities of the completions under the reference and two optimal policies, best reward first"
    svg = lines("tilted", [Panel(series, "probability", log=True)], "completion, by falling reward", alt)
    caption = "The smaller β, the more probability moves to the left, to what is rewarded; none becomes zero."
    return Figure("tilted", svg, caption=caption, title="The optimal policy")


def _frontier(world: _World, shown: Tensor) -> Figure:
    import torch

    from pipelines.problems.dpo_theory_math import kl
    from pipelines.reporting.plots import Panel, Series, lines

    setting = world.setting
    betas = torch.logspace(2, -2, 60, dtype=torch.float64).tolist()
    optima = torch.stack([setting.world.optimum(setting.reference, beta)[0] for beta in betas])
    noise = torch.randn(400, *world.reference_logits.shape, generator=world.generator, dtype=torch.float64)
    scales = torch.linspace(0.1, 3, len(noise), dtype=torch.float64)
    others = [world.tree.log_probs(world.reference_logits + s * n) for s, n in zip(scales, noise, strict=True)]
    series = []
    for name, policies, points in (("random policies", torch.stack(others), True), ("π* for every β", optima, False)):
        x, y = kl(policies, world.reference).tolist(), (policies.exp() @ world.rewards).tolist()
        series.append(Series(name, x, y, points=points, colour=len(series)))
    alt = "expected reward against divergence: random policies lie below the curve of the optimal ones"
    svg = lines("frontier", [Panel(series, "E[r]")], "KL(π‖π_ref), nats", alt)
    caption = "No policy has more reward at the same divergence than the π* of some β."
    return Figure("frontier", svg, caption=caption, title="The frontier")


def _partition(answer: Answer, world: _World, config: DPOTheoryConfig) -> None:
    """Why Z cannot be had: how many completions it sums over, and how badly samples estimate it."""
    import torch

    from pipelines.problems.dpo_theory_math import relative_error_of_z
    from pipelines.problems.estimates import ERRORS
    from pipelines.reporting.plots import Panel, Series, lines
    from pipelines.seq2seq.known_optimum import completion_count

    counted = completion_count(config.vocabulary, config.length)
    statement = "Completions of at most T tokens: Σ_{t<T} (V−1)^t + (V−1)^T"
    answer.check(statement, len(set(map(tuple, world.setting.world.completions))), counted, 0, "enumeration")
    large = completion_count(config.large_vocabulary, config.large_length)
    digits = len(str(large)) - 1
    answer.value(large_vocabulary=config.large_vocabulary, large_length=config.large_length, digits=digits)
    answer.value(atoms=_ATOMS, years=digits - round(math.log10(1e9 * 365.25 * 86_400)))
    rows = []
    for beta in (4 * world.beta, 2 * world.beta, world.beta, world.beta / 2, world.beta / 4):
        error = relative_error_of_z(world.reference, world.rewards, beta)
        rows.append([f"{beta:g}", f"{error:.3g}", f"{math.ceil((error / 0.01) ** 2):,}"])
    answer.table(
        "partition", ["β", "relative error of one sample", "samples for 1 %"], rows, "Exactly, by enumeration."
    )
    error = relative_error_of_z(world.reference, world.rewards, world.beta)
    batch, repeats = 100, max(100, config.samples // 100)
    drawn = torch.multinomial(world.reference.exp(), batch * repeats, True, generator=world.generator)
    weights = (world.rewards[drawn] / world.beta).exp().view(repeats, batch).mean(1)
    found = float(weights.std() / weights.mean())
    statement = f"The error of Ẑ from {batch} samples of π_ref, relative to Z"
    # The sampling error of a standard deviation, from the estimates' own fourth moment.
    squares = (weights - weights.mean()) ** 2
    tolerance = ERRORS * found * float(squares.std() / squares.mean()) / 2 / math.sqrt(repeats)
    route = f"spread of {repeats:,} such estimates, tolerance {ERRORS:.0f} standard errors"
    answer.check(statement, found, error / math.sqrt(batch), tolerance, route)
    answer.value(partition_error=error)
    lengths = list(range(1, config.large_length + 1))
    series = [
        Series(f"V = {v:,}", lengths, [math.log10(completion_count(v, n)) for n in lengths], colour=colour)
        for colour, v in enumerate(dict.fromkeys((4096, config.large_vocabulary)))
    ]
    series.append(Series("atoms of the universe", lengths, [_ATOMS] * len(lengths), colour=4))
    alt = "the number of completions rises in a straight line on a logarithmic scale; a level line marks the atoms"
    svg = lines("count", [Panel(series, "log₁₀ of completions")], "tokens of a completion, at most", alt)
    caption = "Z sums over all of them, for every prompt anew; a score of a completion costs a pass of the model."
    answer.figure(Figure("count", svg, caption=caption, title="What Z sums over"))


def _bradley_terry(answer: Answer, world: _World, best: Tensor, config: DPOTheoryConfig) -> None:
    """Preferences written by policies: Z cancels, and so does whatever depends on the prompt alone."""
    import torch

    from pipelines.problems.dpo_theory_math import Setting, all_preferences, gumbel_rankings, implicit_rewards, kl
    from pipelines.problems.estimates import ERRORS
    from pipelines.problems.search import minimized
    from pipelines.seq2seq.enumerable import World
    from pipelines.seq2seq.known_optimum_training import regularized_reward_loss

    said = all_preferences(implicit_rewards(best, world.reference, world.beta))
    off = (said - all_preferences(world.rewards)).abs().max()
    pairs = len(world.rewards) * (len(world.rewards) - 1) // 2
    route = f"all {pairs:,} pairs, with the π* that the search found: the largest distance of the two probabilities"
    statement = "P(y₁ ≻ y₂) = σ(β log π*(y₁)/π_ref(y₁) − β log π*(y₂)/π_ref(y₂)): Z cancels"
    answer.check(statement, off, 0, 1e-3, route)
    ranked = world.rewards.argsort()
    pair = world.rewards[ranked[[len(ranked) - 1, len(ranked) // 2]]]
    first = (gumbel_rankings(pair, config.samples, world.generator)[:, 0] == 0).double()
    exact = float(torch.sigmoid(pair[0] - pair[1]))
    route = f"{config.samples:,} choices of the larger r + Gumbel noise, tolerance {ERRORS:.0f} standard errors"
    tolerance = ERRORS * math.sqrt(exact * (1 - exact) / config.samples)
    answer.check(
        "Bradley–Terry: P(y₁ ≻ y₂) = σ(r(y₁) − r(y₂)), best against middle", first.mean(), exact, tolerance, route
    )
    answer.value(simulated_preference=float(first.mean()), exact_preference=exact, pairs=pairs)
    small = world.setting.world
    raised = World(small.vocabulary, small.length, small.sources, small.completions, small.rewards + 3)
    setting = Setting(raised, world.setting.reference, world.beta)
    found = minimized(lambda x: regularized_reward_loss(setting, world.tree.log_probs(x)[None]), world.reference_logits)
    statement = "r and r + c(x) have the same optimal policy: KL between the two, for c = 3"
    route = "Newton's method with the raised rewards"
    answer.check(statement, kl(world.tree.log_probs(found), world.optimum), 0, 1e-8, route)


def _gradient(answer: Answer, world: _World) -> None:
    """∇L = −β σ(r̂_l − r̂_w)(∇log π(y_w) − ∇log π(y_l)), for every pair of a random policy."""
    import torch

    from pipelines.problems.dpo_theory_math import implicit_rewards
    from pipelines.reporting.plots import Panel, Series, lines
    from pipelines.seq2seq.losses import dpo_loss

    beta, table, reference = world.beta, world.tree, world.reference
    noise = torch.randn(world.reference_logits.shape, generator=world.generator, dtype=torch.float64)
    logits = (world.reference_logits + noise / beta).requires_grad_()
    won, lost = torch.triu_indices(len(reference), len(reference), offset=1)
    swap = torch.rand(len(won), generator=world.generator) < 0.5
    won, lost = torch.where(swap, lost, won), torch.where(swap, won, lost)
    log_probs = table.log_probs(logits)
    chosen, rejected = log_probs[won], log_probs[lost]
    losses = dpo_loss(chosen, rejected, reference[won], reference[lost], beta=beta)
    by_chosen, by_logits = torch.autograd.grad(losses.sum(), (chosen, logits), retain_graph=True)
    rewards = implicit_rewards(log_probs.detach(), reference, beta)
    weights = torch.sigmoid(rewards[lost] - rewards[won])
    route = f"autograd of the loss of all {len(won):,} pairs under a random policy: the largest distance"
    statement = "A pair weighs σ(r̂_l − r̂_w): ∂L/∂log π(y_w) = −β of it"
    answer.check(statement, (by_chosen + beta * weights).abs().max(), 0, 1e-10, route)
    jacobian = torch.autograd.functional.jacobian(table.log_probs, logits.detach())
    formula = -beta * (weights[:, None, None] * (jacobian[won] - jacobian[lost])).sum(0)
    statement = "∇L = −β Σ σ(r̂_l − r̂_w)(∇log π(y_w) − ∇log π(y_l))"
    route = f"autograd of the whole loss by the {logits.numel()} logits, against each ∇log π by itself"
    answer.check(statement, (by_logits - formula).abs().max(), 0, 1e-9, route)
    start = dpo_loss(reference[won], reference[lost], reference[won], reference[lost], beta=beta)
    answer.check("At π = π_ref the loss is log 2", start.mean(), math.log(2), 1e-12, "evaluation of all pairs")
    margins = (rewards[won] - rewards[lost]).tolist()
    wrong = torch.tensor(margins) < 0
    answer.value(wrong_weight=float(weights[wrong].mean()), right_weight=float(weights[~wrong].mean()))
    grid = torch.linspace(min(margins), max(margins), 60, dtype=torch.float64)
    found = (-by_chosen / beta).tolist()
    series = [
        Series("σ(r̂_l − r̂_w)", grid.tolist(), torch.sigmoid(-grid).tolist(), colour=0),
        Series("autograd", margins[:_SHOWN], found[:_SHOWN], points=True, colour=1),
    ]
    alt = "the weight of a pair falls from one to zero as its margin grows; autograd's weights lie on the curve"
    svg = lines("weight", [Panel(series, "weight of the pair")], "margin r̂_w − r̂_l of the policy", alt)
    caption = "Pairs that the policy ranks wrongly (left) pull in full, those that it ranks rightly hardly at all."
    answer.figure(Figure("weight", svg, caption=caption, title="The weight of a pair"))


def _population(answer: Answer, world: _World) -> float:
    """Where the expected loss over all pairs, labelled by Bradley–Terry, is least."""
    from pipelines.problems.dpo_theory_math import kl
    from pipelines.problems.search import minimized
    from pipelines.seq2seq.known_optimum_training import expected_dpo_loss

    logits = minimized(
        lambda x: expected_dpo_loss(world.setting, world.tree.log_probs(x)[None]), world.reference_logits
    )
    found = max(0.0, float(kl(world.tree.log_probs(logits), world.optimum)))  # rounding may put it below
    route = "Newton's method on the expected loss over all pairs, from π_ref"
    answer.check("The expected DPO loss is least at π*: KL between the two", found, 0, 1e-7, route)
    answer.value(population_kl=found, first_kl=float(kl(world.reference, world.optimum)))
    return found


def _plackett_luce(answer: Answer, world: _World, best: Tensor, config: DPOTheoryConfig) -> None:
    """Rankings of several completions: Z cancels in each of the product's factors."""
    import torch

    from pipelines.problems.dpo_theory_math import all_rankings, gumbel_rankings, implicit_rewards
    from pipelines.problems.estimates import ERRORS
    from pipelines.seq2seq.losses import plackett_luce_loss

    size = config.list_size
    chosen = torch.linspace(0, len(world.rewards) - 1, size).round().long()
    chosen = world.rewards.argsort()[chosen]
    rankings = all_rankings(size)

    def law(rewards: Tensor) -> Tensor:
        return plackett_luce_loss(rewards[chosen].expand(len(rankings), size), rankings).neg().exp()

    by_reward = law(world.rewards)
    by_policy = law(implicit_rewards(best, world.reference, world.beta))
    answer.check(f"The {len(rankings)} rankings of {size} have probability 1", by_reward.sum(), 1, 1e-12, "enumeration")
    statement = "Plackett–Luce by r̂ = β log π*/π_ref is that by r: Z cancels in every factor"
    route = "all rankings, with the π* that the search found: the largest distance of the two probabilities"
    answer.check(statement, (by_reward - by_policy).abs().max(), 0, 1e-3, route)
    drawn = gumbel_rankings(world.rewards[chosen], config.samples, world.generator)
    powers = size ** torch.arange(size)
    places = {code: place for place, code in enumerate((rankings * powers).sum(1).tolist())}
    counts = torch.bincount(
        torch.tensor([places[code] for code in (drawn * powers).sum(1).tolist()]), minlength=len(rankings)
    )
    errors = (by_reward * (1 - by_reward) / config.samples).sqrt()
    worst = ((counts / config.samples - by_reward).abs() / errors).max()
    statement = "P(ranking) = Π_k e^{r_k}/Σ_{j≥k} e^{r_j}: the farthest of all rankings, in standard errors"
    answer.check(statement, worst, 0, ERRORS + 0.5, f"{config.samples:,} orders of r + Gumbel noise")
    answer.value(list_size=size, rankings=len(rankings), likeliest=float(by_reward.max()))
    answer.value(likeliest_drawn=float(counts[by_reward.argmax()] / config.samples))
    two = plackett_luce_loss(world.rewards[chosen[:2]][None], torch.tensor([[1, 0]])).neg().exp()
    pair = torch.sigmoid(world.rewards[chosen[1]] - world.rewards[chosen[0]])
    answer.check("For two, Plackett–Luce is Bradley–Terry", two.item(), pair, 1e-12, "evaluation of both")


def _trained(answer: Answer, record: dict, folder: Path) -> None:
    """What the trainers reach in the known-optimum stage."""
    from pipelines.errors import UserError
    from pipelines.reporting.plots import Panel, Series, lines

    metrics = record["metrics"]
    missing = [name for name in ("dpo", "listwise") if f"known_optimum/{name}" not in metrics]
    if missing:
        mend = "run that stage with methods=[dpo,listwise]"
        raise UserError("known_optimum", str(folder), f"did not train {' and '.join(missing)}", mend)
    answer.value(trained_start=metrics["known_optimum/start"], trained_dpo=metrics["known_optimum/dpo"])
    answer.value(trained_listwise=metrics["known_optimum/listwise"])
    answer.value(trained_completions=metrics["known_optimum/completions"])
    curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))["curves"]
    series = [
        Series(label, [step for step, _ in curves[name]], [max(y, 1e-6) for _, y in curves[name]])
        for name, label in (("dpo", "DPO"), ("listwise", "listwise DPO"))
    ]
    svg = lines(
        "trained", [Panel(series, "KL(π‖π*), nats", log=True)], "optimizer step", "distance from π* in training"
    )
    caption = "The trainers, on samples of labelled pairs and lists, come near to the same policy."
    answer.figure(Figure("trained", svg, caption=caption, title="The trainers on the same problem"))
