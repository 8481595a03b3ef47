"""Bit-flip diffusion: coins, posteriors, the sigmoid, the loss, and digits from fair coins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    from pipelines.images.bitflip_pipeline import BitFlipPipeline

_RECIPE = "images/bitflip"
_EXACT = 1e-10
_LEFT = 1e-4  # of the image after the last stage, where generation is computed exactly
_STAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROWS, _COLUMNS = 5, 10


@config
class BitFlipExerciseConfig(ExerciseConfig):
    """A chain of flips, and a trained stage to generate from."""

    output_dir: str = Field("runs/bit_flip", description="folder the stage writes into", json_schema_extra=INERT)
    bitflip: Source = Field(description="folder of a finished stage of images/bitflip")
    delta: float = Field(0.08, ge=0.001, lt=0.5, description="probability that a pixel flips at a stage, δ")
    stages: int = Field(10, ge=2, le=14, description="stages of the chain whose paths are all enumerated, T")
    pixels: int = Field(4, ge=2, le=6, description="pixels of the images that are all enumerated")
    draws: int = Field(200_000, ge=1000, description="pixels of each simulation")

    def problems(self) -> list[Problem]:
        return super().problems() + stage_problems({"bitflip": (self.bitflip, _RECIPE)})

    @property
    def deltas(self) -> list[float]:
        """δ_1 … δ_T."""
        return [self.delta] * self.stages


def bit_flip(config: BitFlipExerciseConfig) -> dict[str, float]:
    """Compute, check, generate and draw; see ``docs/problems/bit_flip.md``.

    Returns:
        ``bit_flip/replaced``, P(a pixel was replaced by stage T); ``bit_flip/coins``, mean number of coins of a
        one-shot draw; ``bit_flip/white_share`` and ``bit_flip/data_white_share``, of generated and of training images;
        ``bit_flip/checks``, ``bit_flip/checks_failed``.

    Raises:
        UserError: ``bitflip`` is no finished stage of images/bitflip, or its pipeline cannot be loaded.
    """
    from pipelines.images.saved import load_pipeline

    answer = Answer(config, "bit_flip", "Bit-flip diffusion")
    record = finished_stage(config.bitflip, "bitflip", _RECIPE)
    pipeline = load_pipeline(config.bitflip, "bitflip")
    pipeline.set_progress_bar_config(disable=True)
    _replaced(config, answer)
    _one_shot(config, answer)
    _sigmoid(config, answer)
    _posterior(config, pipeline, answer)
    _loss(config, answer)
    _exact_generation(config, answer)
    _trained_generation(config, pipeline, record["config"], answer)
    kept = ("replaced", "coins", "white_share", "data_white_share")
    return answer.write() | {f"bit_flip/{name}": float(answer.values[name]) for name in kept}


def _simulated(count: int) -> str:
    return f"simulation of {count:,} pixels, 4 standard errors"


def _error(p: float, count: int) -> float:
    return 4 * math.sqrt(p * (1 - p) / count)


def _replaced(config: BitFlipExerciseConfig, answer: Answer) -> None:
    """(a) 1 − (1 − 2δ)^T, and its limit."""
    import numpy as np

    from pipelines.problems import bit_flip_math as brute
    from pipelines.reporting.plots import Panel, Series, lines

    formula = 1 - (1 - 2 * config.delta) ** config.stages
    nearly = math.ceil(math.log(0.01) / math.log(1 - 2 * config.delta))
    answer.value(delta=config.delta, stages=config.stages, replaced=formula, stages_until_99=nearly)
    name = f"P(replaced by stage {config.stages}) = 1 − (1 − 2δ)ᵀ"
    found = brute.replaced_by_enumeration(config.deltas)
    answer.check(name, found, formula, _EXACT, f"enumeration of the {2**config.stages:,} outcomes of the coins")
    draw = np.random.default_rng(config.seed)
    thrown = brute.stage_by_stage(draw, config.draws, config.deltas).replaced.mean()
    answer.check(f"{name}, by coins", thrown, formula, _error(formula, config.draws), _simulated(config.draws))
    many = brute.keeps_by_products([config.delta] * (10 * nearly))[-1]
    answer.check(
        f"after {10 * nearly} stages nothing is left: E[Y_T | Y₀ = +1] → 0", many, 0.0, 1e-12, "matrix products"
    )

    lengths = np.arange(1, min(2 * nearly, 200) + 1)
    curves = []
    for number, delta in enumerate((config.delta / 2, config.delta, min(2 * config.delta, 0.49))):
        curves.append(Series(f"δ = {delta:g}", lengths, 1 - (1 - 2 * delta) ** lengths, colour=number))
        some = np.unique(np.linspace(1, lengths[-1], 8).astype(int))
        shares = [brute.stage_by_stage(draw, 2000, [delta] * length).replaced.mean() for length in some]
        curves.append(Series("", some, shares, marks=True, colour=number))
    caption = (
        "Whatever δ is, every pixel has been replaced in the end (lines: the formula; dots: 2,000 pixels simulated)."
    )
    alt = "The share of replaced pixels rises towards 1 with the number of stages, faster the larger δ is."
    svg = lines("bit_flip-replaced", [Panel(curves, "P(replaced)", zero=True)], "stages T", alt)
    answer.figure(Figure("replaced", svg, caption=caption, title="Until nothing is left"))


def _one_shot(config: BitFlipExerciseConfig, answer: Answer) -> None:
    """(b) Two coins at most instead of T stages."""
    import numpy as np
    import torch

    from pipelines.images.bitflip_scheduler import BitFlipScheduler
    from pipelines.problems import bit_flip_math as brute

    keep = (1 - 2 * config.delta) ** config.stages
    formula = (1 + keep) / 2
    values, probability = brute.paths(config.deltas)
    exact = float(probability[values[:, -1] == 1].sum())
    name = "P(Y_T = +1 | Y₀ = +1) = (1 + ρ)/2, ρ = (1 − 2δ)ᵀ"
    answer.check(name, exact, formula, _EXACT, f"enumeration of {len(values):,} paths")
    draw = np.random.default_rng([config.seed, 1])
    rows = []
    for label, coins in (
        ("stage by stage", brute.stage_by_stage(draw, config.draws, config.deltas)),
        ("one shot", brute.one_shot(draw, config.draws, keep)),
    ):
        share = float((coins.values == 1).mean())
        answer.check(f"{label}: P(Y_T = +1)", share, exact, _error(exact, config.draws), _simulated(config.draws))
        rows.append([label, f"{share:.4f}", f"{coins.coins.mean():.3f}", int(coins.coins.max())])
        if label == "one shot":
            route = _simulated(config.draws)
            found, tolerance = coins.coins.mean(), _error(keep, config.draws)
            answer.check("one shot: mean number of coins, 2 − ρ", found, 2 - keep, tolerance, route)
            answer.check("one shot: largest number of coins", coins.coins.max(), 2, 0, route)
    count = 100_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    scheduler = BitFlipScheduler(config.stages, trained_deltas=config.deltas)
    noisy = scheduler.add_noise(torch.ones(1, count, dtype=torch.float64), uniform[None], config.stages)
    route = f"{count:,} evenly spaced uniform numbers through it; expected: enumeration of the paths"
    answer.check("the scheduler's add_noise: P(Y_T = +1)", (noisy == 1).double().mean(), exact, 1 / count, route)
    answer.value(keep=keep, coins=2 - keep, stays=formula)
    columns = ["how Y_T is drawn", "share of +1", "coins a pixel", "at most"]
    caption = (
        f"{config.draws:,} pixels that began at +1, after {config.stages} stages; exactly, the share is {exact:.4f}."
    )
    answer.table("coins", columns, rows, caption)


def _sigmoid(config: BitFlipExerciseConfig, answer: Answer) -> None:
    """(c) The log-odds of a pixel given all of Y_t: its own term, linear in Y_t, and what the others say."""
    import numpy as np
    import torch

    from pipelines.images.bitflip_scheduler import BitFlipScheduler
    from pipelines.problems import bit_flip_math as brute

    world = brute.World.random(config.pixels, config.seed)
    stage = max(2, config.stages // 2)
    deltas = config.deltas[:stage]
    before = world.marginals(deltas)[stage - 1]
    whole = brute.log_odds(world.previous(before, config.delta))
    others = brute.log_odds(world.from_others(before, config.delta))
    own = math.log((1 - config.delta) / config.delta)
    route = f"Bayes over all {2**config.pixels} images, every Yₜ and pixel; the largest deviation"
    name = "log-odds of Yₜ₋₁,ᵢ given Yₜ = Yₜ,ᵢ log((1−δ)/δ) + log-odds given the other pixels"
    answer.check(name, np.abs(whole - others - own * world.images).max(), 0.0, 1e-7, route)
    images = torch.from_numpy(world.images).double()
    previous = BitFlipScheduler(stage, trained_deltas=deltas, prediction_type="previous")
    added = previous.logits(torch.from_numpy(others), images, stage).numpy()
    answer.check("the scheduler adds that very term (it predicts Yₜ₋₁)", np.abs(added - whole).max(), 0.0, 1e-7, route)
    # The image itself from Y_t: one flip with what all stages together flip.
    together = (1 - brute.keeps_by_products(deltas)[-1]) / 2
    original = BitFlipScheduler(stage, trained_deltas=deltas, prediction_type="original")
    given = torch.from_numpy(brute.log_odds(world.from_others(world.data, together)))
    found = original.logits(given, images, stage).numpy()
    expected = brute.log_odds(world.previous(world.data, together))
    deviation = np.abs(found - expected).max()
    answer.check("the scheduler adds 2 artanh(ρₜ) Yₜ (it predicts Y₀)", deviation, 0.0, 1e-7, route)
    answer.value(own_evidence=own, pixels=config.pixels)


def _posterior(config: BitFlipExerciseConfig, pipeline: BitFlipPipeline, answer: Answer) -> None:
    """(d) P(Y_{t−1} = +1 | Y_t, Y_0 = +1), and the trained stage's scheduler against it."""
    import numpy as np
    import torch

    from pipelines.problems import bit_flip_math as brute
    from pipelines.reporting.plots import Panel, Series, lines

    step, rows, worst = 1 - 2 * config.delta, [], 0.0
    for t in range(1, config.stages + 1):
        exact = brute.posterior_by_paths(config.deltas, t)
        for y in (1, -1):
            formula = (1 + step * y) * (1 + step ** (t - 1)) / (2 * (1 + step**t * y))
            worst = max(worst, abs(formula - exact[y]))
        rows.append([t, f"{exact[1]:.4f}", f"{exact[-1]:.4f}"])
    name = "P(Yₜ₋₁ = +1 | Yₜ = y, Y₀ = +1) = (1 + (1−2δ)y)(1 + ρₜ₋₁) / (2(1 + ρₜ y))"
    route = f"enumeration of all paths, t = 1 … {config.stages}, y = ±1; the largest deviation"
    answer.check(name, worst, 0.0, _EXACT, route)
    shown = [row for row in rows if row[0] in {1, 2, 3, config.stages // 2, config.stages - 1, config.stages}]
    caption = "P(Yₜ₋₁ = +1 | Yₜ, Y₀ = +1), by enumeration of the paths."
    answer.table("posterior", ["t", "Yₜ = +1", "Yₜ = −1"], shown, caption)

    scheduler = pipeline.scheduler
    deltas, stages = scheduler.deltas.tolist(), np.arange(1, len(scheduler) + 1)
    exact = brute.posteriors_by_matrices(deltas)
    noisy = torch.from_numpy(np.tile(brute.SIDES, (len(stages), 1))).double()
    found = scheduler.posterior(noisy, torch.ones_like(noisy), torch.from_numpy(stages)).numpy()
    route = f"products of 2×2 matrices, all {len(stages)} stages of the trained schedule; the largest deviation"
    answer.check(
        "the trained stage's scheduler gives the same posterior", np.abs(found - exact).max(), 0.0, 1e-9, route
    )
    keeps = np.abs(scheduler.keeps.numpy() - brute.keeps_by_products(deltas)).max()
    answer.check("the trained stage's scheduler: ρₜ = E[Yₜ | Y₀ = +1]", keeps, 0.0, _EXACT, route)
    answer.value(trained_stages=len(stages), trained_left=scheduler.keeps[-1].item())
    panel = Panel(
        [
            Series("Yₜ = +1", stages, exact[:, 1], colour=0),
            Series("Yₜ = −1", stages, exact[:, 0], colour=1),
        ],
        "P(Yₜ₋₁ = +1)",
        zero=True,
    )
    alt = "Where the pixel is as in the image it stays; where it is not, it may still turn back."
    svg = lines("bit_flip-posterior", [panel], "stage t of the trained schedule", alt)
    caption = "Early stages turn every pixel back to the image; late ones hardly look at it and keep what they find."
    answer.figure(Figure("posterior", svg, caption=caption, title="One stage back, when the image is known"))


def _loss(config: BitFlipExerciseConfig, answer: Answer) -> None:
    """(e) The divergence of one pixel: its gradient, its least point, and its form at t = 1."""
    import numpy as np
    import torch
    from scipy.optimize import minimize_scalar
    from torch.distributions import Bernoulli

    from pipelines.images.bitflip_math import StagePosterior, stage_kl
    from pipelines.problems import bit_flip_math as brute
    from pipelines.reporting.plots import Panel, Series, lines

    keeps = torch.from_numpy(brute.keeps_by_products(config.deltas))
    logits = torch.linspace(-6, 6, 49, dtype=torch.float64)
    stage = config.stages // 2 + 1
    exact = brute.posterior_by_paths(config.deltas, stage)
    answer.value(loss_stage=stage, target_agreed=exact[1], target_differed=exact[-1])
    posterior, ones = StagePosterior.between(keeps[stage - 1], keeps[stage]), torch.ones_like(logits)
    slope, value = 0.0, 0.0
    for y in (1, -1):
        asked = logits.clone().requires_grad_()
        loss = stage_kl(asked, y * ones, ones, posterior, "previous")
        (gradient,) = torch.autograd.grad(loss.sum(), asked)
        slope = max(slope, float((gradient - (torch.sigmoid(logits) - exact[y])).abs().max()))
        value = max(
            value, float(np.abs(loss.detach().numpy() - brute.bernoulli_kl(exact[y], logits.sigmoid().numpy())).max())
        )
    route = f"autograd through the loss that is trained, t = {stage}; the largest deviation over log-odds −6 … 6"
    answer.check("∂KL/∂ℓ = σ(ℓ) − P(Yₜ₋₁ = +1 | Yₜ, Y₀)", slope, 0.0, 1e-9, route)
    route = f"scipy.special.rel_entr with the posterior by enumeration, t = {stage}; the largest deviation"
    answer.check("the trained loss is KL(P(Yₜ₋₁|Yₜ, Y₀) ‖ Q)", value, 0.0, 1e-9, route)
    first = StagePosterior.between(keeps[0], keeps[1])
    worst = 0.0
    for y in (1, -1):
        loss = stage_kl(logits, y * ones, ones, first, "previous")
        worst = max(worst, float((loss + Bernoulli(logits=logits).log_prob(ones)).abs().max()))
    route = "torch.distributions.Bernoulli, Y₁ = ±1; the largest deviation"
    answer.check("at t = 1 it is −log Q(Y₀ | Y₁)", worst, 0.0, 1e-9, route)

    # Over all images that may stand behind a Y_t: in the world where they can be enumerated.
    world = brute.World.random(config.pixels, config.seed)
    together = (1 - keeps[stage - 1].item()) / 2
    joint = world.data[:, None] * world.kernel(together)  # P(Y_0, Y_{t−1})
    marginal, flips = joint.sum(0), world.kernel(config.delta)
    noisy = int(np.argmax(world.data))
    weight = joint @ flips[:, noisy]  # P(Y_0, Y_t), for this Y_t
    white = world.images[:, 0] == 1
    given_both = (joint[:, white] @ flips[white, noisy]) / weight  # P(Y_{t−1,1} = +1 | Y_t, Y_0)
    share = weight / weight.sum()
    within = {"bounds": (1e-9, 1 - 1e-9), "method": "bounded", "options": {"xatol": 1e-10}}
    least = minimize_scalar(lambda q: share @ brute.bernoulli_kl(given_both, q), **within)
    expected = world.previous(marginal, config.delta)[noisy, 0]
    route = "minimization over q of the mean over all images Y₀; expected: Bayes without Y₀"
    answer.check("the mean loss over Y₀ is least at P(Yₜ₋₁ = +1 | Yₜ)", least.x, expected, 1e-5, route)
    answer.value(least_loss=least.fun)
    q = np.linspace(0.005, 0.995, 199)
    curves = [
        Series("t = 1", q, -np.log(q), colour=2),
        Series(f"t = {stage}, Yₜ = +1", q, brute.bernoulli_kl(exact[1], q), colour=0),
        Series("Yₜ = −1", q, brute.bernoulli_kl(exact[-1], q), colour=1),
    ]
    alt = "The loss is 0 where the network says what the posterior says, and without bound where it excludes it."
    svg = lines("bit_flip-loss", [Panel(curves, "KL, nats", zero=True)], "what the network says, Q(Yₜ₋₁ = +1)", alt)
    caption = (
        "Each curve is 0 at the posterior (at t = 1: at 1) and without bound where the network excludes what may be."
    )
    answer.figure(Figure("loss", svg, caption=caption, title="What the loss punishes, Y₀ = +1"))


def _exact_generation(config: BitFlipExerciseConfig, answer: Answer) -> None:
    """(f) What generation loses, where all images can be enumerated: pixels drawn apart, ever less of it with T."""
    import numpy as np

    from pipelines.problems import bit_flip_math as brute
    from pipelines.reporting.plots import Panel, Series, lines

    world = brute.World.random(config.pixels, config.seed)

    def distance(deltas: np.ndarray) -> float:
        return brute.total_variation(world.generated(deltas), world.data)

    cosine = [distance(brute.cosine_deltas(count)) for count in _STAGES]
    constant = [distance(np.full(count, (1 - _LEFT ** (1 / count)) / 2)) for count in _STAGES]
    exponent = float(np.polyfit(np.log(_STAGES[-4:]), np.log(cosine[-4:]), 1)[0])
    answer.value(distance_first=cosine[0], distance_last=cosine[-1], distance_exponent=exponent)
    answer.value(constant_last=constant[-1], most_stages=_STAGES[-1])
    route = (
        f"all {2**config.pixels} images, exact posteriors, T = {_STAGES[-4]} … {_STAGES[-1]}, slope by least squares"
    )
    name = "generation by stages of independent pixels errs in proportion to 1/T (cosine schedule)"
    answer.check(name, exponent, -1.0, 0.1, route)
    curves = [Series("cosine schedule", _STAGES, cosine, colour=0), Series("one δ", _STAGES, constant, colour=1)]
    alt = "The distance between generated and true distribution falls as one over the number of stages."
    svg = lines("bit_flip-stages", [Panel(curves, "total variation", log=True)], "stages T", alt, logx=True)
    caption = "With exact posteriors, what comes out of fair coins nears the data as 1/T: many small steps are needed."
    answer.figure(Figure("stages", svg, caption=caption, title="Why many stages"))


def _trained_generation(
    config: BitFlipExerciseConfig, pipeline: BitFlipPipeline, made_with: dict, answer: Answer
) -> None:
    """(f) Digits from fair coins by the trained stage."""
    import torch

    from pipelines.config import validate
    from pipelines.images.bitflip import BitFlipConfig
    from pipelines.images.data import load_images
    from pipelines.images.method import Draws
    from pipelines.images.seeds import seeded
    from pipelines.images.unet import strip
    from pipelines.problems.pictures import grid_png

    fields = validate(BitFlipConfig, made_with | {"output_dir": config.output_dir, "model": None})
    train = load_images(fields).train
    real = train.batch(slice(None), Draws(seeded(config.seed, 0), len(train)), fields).images
    steps = fields.inference_steps or fields.timesteps
    generator = seeded(config.seed, 1)
    images = pipeline(_ROWS * _COLUMNS, generator, steps, output_type="pt").images
    nearest = torch.cdist(images.flatten(1), real.flatten(1), p=1).min(1).values  # pixels that differ
    answer.value(
        steps=steps,
        white_share=images.mean().item(),
        data_white_share=real.mean().item(),
        generated=len(images),
        nearest=nearest.mean().item(),
        copies=int((nearest == 0).sum()),
        image_pixels=images[0].numel(),
    )
    caption = f"{len(images)} images, each drawn from fair coins alone in {steps} stages of the trained chain."
    picture = grid_png(images.unflatten(0, (_ROWS, _COLUMNS)))
    answer.figure(Figure("generated", png=picture, caption=caption, title="From scratch"))

    def stages(count: int):
        return ((s.prev_sample, s.pred_original_sample) for s in pipeline.denoise(count, generator, steps))

    caption = "From fair coins (left) to the image (right); below each row what the network expects of the image then."
    answer.figure(Figure("denoising", png=grid_png(strip(stages, steps)), caption=caption, title="On the way"))
