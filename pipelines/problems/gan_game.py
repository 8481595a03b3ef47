"""Exercise: the GAN's game: why its generator loss vanishes, the best discriminator, and the value at it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    import numpy as np
    import torch

_RECIPE = "images/gan"
_LAST = 0.1  # share of the log whose mean is quoted
_LOGGED = ("probability_real", "probability_fake", "gradient_norm_minimax", "gradient_norm_nonsaturating")
_REACH = 30.0  # beyond which both densities are nothing


@config
class GANGameConfig(ExerciseConfig):
    """The two generator losses by autograd, D* by optimization, V(G, D*) by quadrature and simulation."""

    output_dir: str = Field("runs/gan_game", description="folder the stage writes into", json_schema_extra=INERT)
    gan: Source = Field(description=f"folder of a finished {_RECIPE} stage, with gradient_norms=true")
    shift: float = Field(2.0, ge=0, le=8, description="mean of the generator's density; the data's is N(0, 1)")
    spread: float = Field(0.7, ge=0.2, le=3, description="its standard deviation")
    noises: int = Field(256, ge=8, description="noise vectors of the small generator")
    samples: int = Field(200_000, ge=1000, description="samples behind every simulated number")

    def problems(self) -> list[Problem]:
        return super().problems() + stage_problems({"gan": (self.gan, _RECIPE)})


def gan_game(config: GANGameConfig) -> dict[str, float]:
    """Verify what the question claims of the game, and quote the GAN that was trained with the other loss.

    Returns:
        ``gan_game/jensen_shannon``, JSD of the two densities in nats; ``gan_game/value``, V(G, D*); and the checks'
        counts.

    Raises:
        UserError: ``gan`` is no finished stage of its recipe, or logged no gradient norms.
    """
    import torch

    record = finished_stage(config.gan, "gan", _RECIPE)
    history = json.loads((Path(config.gan).expanduser() / "log_history.json").read_text(encoding="utf-8"))
    entries = [entry for entry in history if all(key in entry for key in _LOGGED)]
    if not entries:
        raise UserError("gan", config.gan, "logged no norms of gradients", "run it with gradient_norms=true")
    answer = Answer(config, "gan_game", "The generative adversarial network")
    answer.value(shift=config.shift, spread=config.spread, noises=config.noises, samples=config.samples)
    generator = torch.Generator().manual_seed(config.seed)
    _vanishing(answer, config, generator)
    _best_discriminator(answer, config)
    found = _value(answer, config)
    _trained(answer, config, record, entries)
    return answer.write() | {f"gan_game/{name}": value for name, value in found.items()}


def _vanishing(answer: Answer, config: GANGameConfig, generator: torch.Generator) -> None:
    """∇ E log(1 − D(G(z))) = −E[D ∂h/∂θ] → 0 where the discriminator is sure."""
    import torch
    from torch import nn

    from pipelines.images.gan_losses import generator_gradients
    from pipelines.reporting.plots import Panel, Series, lines

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        players = [nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, out)).double() for out in (2, 1)]
    maker, judge = players
    parameters = list(maker.parameters())
    noise = torch.randn(config.noises, 2, generator=generator, dtype=torch.float64)
    logits = judge(maker(noise)).squeeze(1)
    by_sample = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logit, parameters, retain_graph=True)])
            for logit in logits
        ]
    )
    sure = 30.0
    found, formulas = {}, {}
    for confidence in (0.0, 4.0, sure):
        shifted = judge(maker(noise)).squeeze(1) - confidence
        found[confidence] = generator_gradients(shifted, parameters)
        probability = shifted.detach().sigmoid()[:, None]
        formulas[confidence] = {
            "minimax": -(probability * by_sample).mean(0),
            "nonsaturating": -((1 - probability) * by_sample).mean(0),
        }
    route = f"autograd of the loss, against ∂h/∂θ of each of {config.noises} samples by itself: the largest distance"
    for kind, formula in (("minimax", "−E[D ∂h/∂θ]"), ("nonsaturating", "−E[(1 − D) ∂h/∂θ]")):
        off = max(float((found[c][kind] - formulas[c][kind]).abs().max()) for c in found)
        answer.check(f"The {kind} loss has the gradient {formula}", off, 0, 1e-12, route)
    norms = {kind: found[sure][kind].norm().item() for kind in ("minimax", "nonsaturating")}
    route = f"autograd, with {sure:g} taken off every logit (D ≈ e^−{sure:g})"
    answer.check("Minimax: as D(G(z)) → 0 the gradient vanishes: its norm", norms["minimax"], 0, 1e-10, route)
    statement = "Non-saturating: as D(G(z)) → 0 the gradient stays, −E[∂h/∂θ]: its norm"
    answer.check(statement, norms["nonsaturating"], by_sample.mean(0).norm(), 1e-9, route)
    answer.value(sure_minimax=norms["minimax"], sure_nonsaturating=norms["nonsaturating"], sure=sure)
    points: dict[str, list[float]] = {"minimax": [], "nonsaturating": []}
    means = []
    for confidence in torch.linspace(-3, 14, 35).tolist():
        shifted = judge(maker(noise)).squeeze(1) - confidence
        means.append(float(shifted.detach().sigmoid().mean()))
        for kind, gradient in generator_gradients(shifted, parameters).items():
            points[kind].append(gradient.norm().item())
    series = [Series(kind, means, norms) for kind, norms in points.items()]
    alt = "norm of the generator's gradient under both losses against the discriminator's mean probability"
    svg = lines("gradients", [Panel(series, "norm of the gradient", log=True)], "mean D(G(z))", alt, logx=True)
    caption = "To the left the discriminator is sure: the minimax gradient goes with D, the other one stays."
    answer.figure(Figure("gradients", svg, caption=caption, title="What the generator is told"))


def _log_densities(config: GANGameConfig, x: np.ndarray, shift: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """log p_data and log p_θ; with another mean of the latter, where it is given."""
    from pipelines.problems.estimates import gaussian_log

    mean = config.shift if shift is None else shift
    return gaussian_log(x, 0.0, 1.0), gaussian_log(x, mean, config.spread**2)


def _best_discriminator(answer: Answer, config: GANGameConfig) -> None:
    """D* = p_data/(p_θ + p_data)."""
    import numpy as np
    import torch
    from scipy.optimize import minimize_scalar
    from scipy.special import expit

    from pipelines.images.gan_losses import discriminator_loss
    from pipelines.problems.search import minimized
    from pipelines.reporting.plots import Panel, Series, lines

    places = np.linspace(-2, config.shift + 2, 25)
    real, fake = (np.exp(logs) for logs in _log_densities(config, places))
    best = [
        minimize_scalar(
            lambda h, p=p, q=q: p * np.logaddexp(0, -h) + q * np.logaddexp(0, h),
            bounds=(-60, 60),
            options={"xatol": 1e-9},
        ).x
        for p, q in zip(real, fake, strict=True)
    ]
    off = np.abs(expit(best) - real / (real + fake)).max()
    route = f"−p log D − q log(1−D) minimized by itself at each of {len(places)} places: the largest distance"
    answer.check("D*(x) = p_data(x)/(p_θ(x) + p_data(x))", off, 0, 1e-6, route)
    counts = torch.tensor([[7, 1, 3, 0, 5, 4], [2, 6, 3, 4, 0, 5]])
    rows = [torch.repeat_interleave(torch.arange(6), count) for count in counts]
    shown = (counts > 0).all(0)  # where only one of the two has samples, D* is 0 or 1, at an infinite logit
    table = minimized(
        lambda h: discriminator_loss(h[rows[0]], h[rows[1]]) + 1e-12 * h.square().sum(),
        torch.zeros(6, dtype=torch.float64),
    )
    weights = counts / counts.sum(1, keepdim=True)
    off = (table.sigmoid() - weights[0] / weights.sum(0))[shown].abs().max()
    route = "L-BFGS on the loss that the trainer uses, over a logit for each of the values that samples take"
    answer.check("The trainer's discriminator loss is least at D*", off, 0, 1e-5, route)
    x = np.linspace(-4, config.shift + 4 * config.spread, 200)
    logs = _log_densities(config, x)
    densities = [Series("data", x, np.exp(logs[0])), Series("generator", x, np.exp(logs[1]))]
    panels = [
        Panel(densities, "density", zero=True),
        Panel(
            [Series("", x, expit(logs[0] - logs[1]), colour=2), Series("", places, expit(best), marks=True)], "D*(x)"
        ),
    ]
    svg = lines("optimum", panels, "x", "densities of data and generator, and the best discriminator between them")
    caption = "Dots: found by optimization at each place. Where both densities are equal, D* is one half."
    answer.figure(Figure("optimum", svg, caption=caption, title="The best discriminator"))


def _value(answer: Answer, config: GANGameConfig) -> dict[str, float]:
    """V(G, D*) = −log 4 + 2 JSD(p_data ‖ p_θ)."""
    import numpy as np
    import torch

    from pipelines.images.gan_losses import discriminator_loss
    from pipelines.problems.estimates import ERRORS, expectation, mean_error
    from pipelines.reporting.plots import Panel, Series, lines

    def jensen_shannon(shift: float) -> float:
        """From three entropies: H((p + q)/2) − ½H(p) − ½H(q), by quadrature; the Gaussians' are known."""

        def log_middle(x: np.ndarray) -> np.ndarray:
            return np.logaddexp(*_log_densities(config, x, shift)) - math.log(2)

        middle = expectation(log_middle, lambda x: -log_middle(x), -_REACH, _REACH)
        gaussian = 0.5 * math.log(2 * math.pi * math.e)
        return middle - gaussian - 0.5 * math.log(config.spread)

    draw = np.random.default_rng(config.seed)
    real = draw.standard_normal(config.samples)
    fake = config.shift + config.spread * draw.standard_normal(config.samples)
    logits = [np.subtract(*_log_densities(config, x)) for x in (real, fake)]
    value = -float(discriminator_loss(*(torch.from_numpy(h) for h in logits)))
    errors = [mean_error(np.logaddexp(0, sign * h)) for sign, h in zip((-1, 1), logits, strict=True)]
    divergence = jensen_shannon(config.shift)
    route = f"the trainer's loss at D* over {config.samples:,} samples, tolerance {ERRORS:.0f} standard errors"
    statement = "V(G, D*) = −log 4 + 2 JSD(p_data ‖ p_θ)"
    answer.check(
        statement,
        value,
        2 * divergence - math.log(4),
        1e-9 + ERRORS * math.hypot(*errors),
        f"{route}; JSD by quadrature",
    )
    same = torch.zeros(2, dtype=torch.float64)
    value_same = -discriminator_loss(same, same).item()
    answer.check("Where p_θ = p_data, D* = ½ and V = −log 4", value_same, -math.log(4), 1e-12, "evaluation of the loss")
    shifts = np.linspace(0, 8, 33)
    values = [2 * jensen_shannon(s) - math.log(4) for s in shifts]
    series = [Series("V(G, D*)", shifts, values), Series("its least, −log 4", shifts, [-math.log(4)] * len(shifts))]
    series.append(Series("its most, 0", shifts, [0.0] * len(shifts)))
    alt = "the value of the game at the best discriminator rises from minus log four to zero as the densities part"
    svg = lines("value", [Panel(series, "V(G, D*), nats")], "mean of the generator's density", alt)
    caption = "Once the two hardly overlap the value is flat: it tells the generator no direction."
    answer.figure(Figure("value", svg, caption=caption, title="The value of the game"))
    answer.value(jensen_shannon=divergence, game_value=value, floor=-math.log(4))
    return {"jensen_shannon": divergence, "value": value}


def _trained(answer: Answer, config: GANGameConfig, record: dict[str, Any], entries: list[dict[str, float]]) -> None:
    """The GAN of the images: its probabilities, both gradients, its grid."""
    from pipelines.reporting.plots import Panel, Series, lines

    folder = Path(config.gan).expanduser()
    late = entries[-max(1, round(_LAST * len(entries))) :]
    means = {key: sum(entry[key] for entry in late) / len(late) for key in _LOGGED}
    answer.value(trained_real=means["probability_real"], trained_fake=means["probability_fake"])
    answer.value(trained_ratio=means["gradient_norm_nonsaturating"] / means["gradient_norm_minimax"])
    answer.value(trained_steps=int(record["metrics"]["gan/steps"]))
    steps = [entry["step"] for entry in entries]
    probabilities = [
        Series(name, steps, [entry[f"probability_{key}"] for entry in entries], smooth=True, colour=colour)
        for colour, (key, name) in enumerate((("real", "images"), ("fake", "samples")))
    ]
    norms = [
        Series(
            kind, steps, [max(entry[f"gradient_norm_{kind}"], 1e-12) for entry in entries], smooth=True, colour=colour
        )
        for colour, kind in enumerate(("minimax", "nonsaturating"), start=2)
    ]
    panels = [Panel(probabilities, "D(x)"), Panel(norms, "norm of gradient", log=True)]
    alt = "the discriminator's probabilities, and the generator's gradient under both losses, over training"
    svg = lines("training", panels, "optimizer step", alt)
    loss = record["config"]["loss"]
    caption = f"Trained by the {loss} loss. Where D is sure, the minimax gradient is the smaller one."
    answer.figure(Figure("training", svg, caption=caption, title="The game in training"))
    caption = "10 × 20 draws of z: not chosen."
    answer.figure(Figure("samples", png=(folder / "samples.png").read_bytes(), caption=caption, title="200 samples"))
