"""Exercise: what a prompt alone can do, quoted from finished prompting stages and counted anew from their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, config, nearest
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems

if TYPE_CHECKING:
    from torch import Tensor

_HARD, _EXPLORE, _COMPARE = "prompting/hard", "prompting/explore", "prompting/compare"


@config
class PromptingConfig(ExerciseConfig):
    """Which finished stages are quoted."""

    output_dir: str = Field("runs/prompting_page", description="folder the stage writes into", json_schema_extra=INERT)
    hard: Source = Field(description=f"folder of a finished stage of {_HARD}, on words or questions")
    explore: Source = Field(description=f"folder of a finished stage of {_EXPLORE}")
    compare: Source = Field(description=f"folder of a finished stage of {_COMPARE}")
    right: str = Field("few_shot_5", description="the strategy whose labels are right …")
    wrong: str = Field("few_shot_wrong_labels_5", description="… and the one that has wrong ones in their place")
    logits: int = Field(50, ge=2, le=10_000, description="tokens of the distribution whose temperature is varied")

    def problems(self) -> list[Problem]:
        stages = {"hard": _HARD, "explore": _EXPLORE, "compare": _COMPARE}
        return super().problems() + stage_problems({n: (getattr(self, n), recipe) for n, recipe in stages.items()})


def prompting(config: PromptingConfig) -> dict[str, float]:
    """Count the answers of the stages anew, verify what temperature does, and show the comparisons.

    Returns:
        ``prompting/best_accuracy`` of the strategies asked, ``prompting/wrong_minus_right`` (accuracy with wrong labels
        less that with right ones, on the same examples); and the checks' counts.

    Raises:
        UserError: a folder without the finished stage it should hold, or a strategy that was not asked.
    """
    answer = Answer(config, "prompting", "Prompting")
    record = finished_stage(config.hard, "hard", _HARD)
    finished_stage(config.compare, "compare", _COMPARE)
    lines = _lines(Path(config.hard).expanduser() / "answers.jsonl")
    found = _strategies(answer, config, record["metrics"], lines)
    _confidence(answer, config, record["metrics"], lines)
    _temperature(answer, config)
    _sweep(answer, finished_stage(config.explore, "explore", _EXPLORE), Path(config.explore).expanduser())
    _soft(answer, Path(config.compare).expanduser())
    return answer.write() | {f"prompting/{name}": value for name, value in found.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _strategies(
    answer: Answer, config: PromptingConfig, metrics: Mapping[str, float], lines: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Accuracy of every strategy, counted anew from the answers; wrong labels against right ones."""
    from scipy.stats import binomtest

    from pipelines.reporting.metrics import Estimate
    from pipelines.reporting.plots import forest

    model = lines[0]["model"]
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["model"] == model and line["kind"] != "failed":
            asked.setdefault(line["strategy"], []).append(line)
    for field in ("right", "wrong"):
        wanted = getattr(config, field)
        if wanted not in asked:
            raise UserError(field, wanted, f"was not asked in {config.hard}", nearest(wanted, list(asked)))
    counted = {name: sum(line["kind"] == "right" for line in mine) / len(mine) for name, mine in asked.items()}
    off = max(abs(counted[name] - metrics[f"hard/{model}/{name}/accuracy"]) for name in asked)
    answer.check(
        "The accuracy of every strategy is its share of right answers", off, 0, 1e-12, "counted from the answers"
    )
    rows, bars = [], []
    for name, mine in asked.items():
        key = f"hard/{model}/{name}/accuracy"
        interval = Estimate(*(100 * metrics[key + end] for end in ("", "_ci_low", "_ci_high")))
        kinds = [sum(line["kind"] == kind for line in mine) for kind in ("plausible", "uninformative", "invalid")]
        cells = [f"{interval.value:.1f} % ({interval.low:.1f}–{interval.high:.1f})", *kinds, len(mine[0]["shots"])]
        rows.append([name.replace("_", " "), *cells])
        bars.append((name.replace("_", " "), interval, name == config.wrong))
    columns = ["Strategy", "right", "plausible", "says nothing", "invalid", "solved examples"]
    answer.table("strategies", columns, rows, "Right: with Wilson's 95 % interval. The next three count wrong answers.")
    best = max(counted, key=counted.get)
    right = round(counted[best] * len(asked[best]))
    exact = binomtest(right, len(asked[best])).proportion_ci(0.95, "wilson")
    low, high = (metrics[f"hard/{model}/{best}/accuracy{end}"] for end in ("_ci_low", "_ci_high"))
    off = max(abs(low - exact.low), abs(high - exact.high))
    answer.check("The best strategy's interval is Wilson's", off, 0, 1e-6, "scipy.stats.binomtest, both ends")
    values = {
        name: {line["id"]: line["kind"] == "right" for line in asked[name]} for name in (config.right, config.wrong)
    }
    shared = [i for i in values[config.right] if i in values[config.wrong]]
    difference = sum(values[config.wrong][i] - values[config.right][i] for i in shared) / len(shared)
    key = f"hard/{model}/{config.wrong}/accuracy_minus_{config.right}"
    if key in metrics:
        statement = "Wrong labels less right ones, on the same examples"
        answer.check(statement, difference, metrics[key], 1e-12, "counted example by example from the answers")
    answer.value(asked=len(asked[best]), best_accuracy=counted[best], best_shots=len(asked[best][0]["shots"]))
    answer.value(right_accuracy=counted[config.right], wrong_accuracy=counted[config.wrong])
    answer.value(label_effect=100 * difference)
    alt = "accuracy of each strategy with its interval"
    svg = forest("strategies", bars, "right answers, %", alt)
    caption = "Solved examples show the form of an answer; with wrong labels (in colour) the form stays."
    answer.figure(Figure("strategies", svg, caption=caption, title="Strategies"))
    return {"best_accuracy": counted[best], "wrong_minus_right": difference}


def _confidence(
    answer: Answer, config: PromptingConfig, metrics: Mapping[str, float], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Whether the model knows when it is right."""
    from pipelines.reporting.plots import calibration

    model = lines[0]["model"]
    mine = [e for e in lines if (e["model"], e["strategy"]) == (model, config.right) and e["confidence"] is not None]
    if not mine:
        raise UserError("right", config.right, "has answers without confidence", "name a strategy of a local model")
    means = {}
    for kind, wanted in (("right", True), ("wrong", False)):
        chosen = [line["confidence"] for line in mine if (line["kind"] == "right") is wanted]
        means[kind] = sum(chosen) / len(chosen) if chosen else 0.0
        known = metrics.get(f"hard/{model}/{config.right}/confidence_{kind}", 0.0)
        statement = f"Mean confidence of {kind} answers"
        answer.check(statement, means[kind], known, 1e-9, "mean of the answers' probabilities, taken anew")
    answer.value(confidence_right=means["right"], confidence_wrong=means["wrong"])
    answer.value(calibration_error=metrics[f"hard/{model}/{config.right}/calibration_error"])
    trials = json.loads((Path(config.hard).expanduser() / "trials.json").read_text(encoding="utf-8"))
    curve = next(t["curve"] for t in trials if (t["model"], t["strategy"]) == (model, config.right))
    alt = "confidence of the answers against the share that is right"
    svg = calibration("confidence", curve, alt, of="answer")
    caption = "On the dashed line the model would be right as often as it is sure. Larger dots: more answers."
    answer.figure(Figure("confidence", svg, caption=caption, title="Confidence"))


def _entropy(logits: Tensor, temperature: Tensor) -> Tensor:
    """H of softmax(logits/T), in nats."""
    log_probs = (logits / temperature).log_softmax(0)
    return -(log_probs.exp() * log_probs).sum()


def _temperature(answer: Answer, config: PromptingConfig) -> None:
    """dH/dT = Var_p(logit)/T³: entropy rises with temperature, from the likeliest token to all alike."""
    import math

    import torch

    from pipelines.reporting.plots import Panel, Series, lines

    generator = torch.Generator().manual_seed(config.seed)
    logits = 2 * torch.randn(config.logits, generator=generator, dtype=torch.float64)
    worst, curve = 0.0, []
    for value in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0):
        temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        entropy = _entropy(logits, temperature)
        (slope,) = torch.autograd.grad(entropy, temperature)
        p = (logits / value).softmax(0)
        variance = (p * (logits - (p * logits).sum()) ** 2).sum()
        worst = max(worst, float((slope - variance / value**3).abs()))
        curve.append((value, entropy.item(), float(p.max())))
    route = f"autograd of the entropy at {len(curve)} temperatures: the largest distance"
    answer.check("dH/dT = Var_p(logit)/T³ ≥ 0: entropy rises with temperature", worst, 0, 1e-9, route)
    cold = (logits / 1e-3).softmax(0)
    answer.check("As T → 0 all probability is the likeliest token's", cold[logits.argmax()], 1, 1e-9, "T = 0.001")
    hot = _entropy(logits, torch.tensor(1e6, dtype=torch.float64))
    answer.check(
        "As T → ∞ all tokens are equally likely: H → log V", hot, math.log(config.logits), 1e-9, "T = 1,000,000"
    )
    x, entropies, highest = zip(*curve, strict=True)
    panels = [
        Panel([Series("", x, entropies)], "entropy, nats", zero=True),
        Panel([Series("", x, highest)], "largest p"),
    ]
    svg = lines("entropy", panels, "temperature", "entropy rises and the largest probability falls with temperature")
    caption = f"Of {config.logits} random logits. Low temperatures write the likeliest token, high ones any."
    answer.figure(Figure("entropy", svg, caption=caption, title="Temperature and entropy"))


def _sweep(answer: Answer, record: Mapping[str, Any], folder: Path) -> None:
    """What the model writes at which temperature."""
    from pipelines.reporting.plots import Panel, Series, lines

    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    model = sweep["points"][0]["model"]
    points = sorted((p for p in sweep["points"] if p["model"] == model), key=lambda point: point["temperature"])
    x = [point["temperature"] for point in points]
    series = [
        Series(
            label,
            x,
            [100 * p[key] for p in points],
            bars=[(100 * p[f"{key}_low"], 100 * p[f"{key}_high"]) for p in points],
        )
        for key, label in (("accuracy", "right"), ("valid_rate", "valid"), ("diversity", "different"))
        if all(key in point for point in points)
    ]
    first, last = points[0], points[-1]
    if first["temperature"] == 0 and "diversity" in first:
        answer.check(
            "At temperature 0 all answers to a prompt are alike: their diversity", first["diversity"], 0, 0, "count"
        )
    answer.value(
        low_temperature=x[0], high_temperature=x[-1], sweep_examples=int(record["metrics"]["explore/examples"])
    )
    answer.value(low_accuracy=first["accuracy"], high_accuracy=last["accuracy"])
    answer.value(low_diversity=first.get("diversity", 0.0), high_diversity=last.get("diversity", 0.0))
    svg = lines("sweep", [Panel(series, "answers, %", zero=True)], "temperature", "shares of answers by temperature")
    caption = "Right and valid answers fall with temperature, different ones rise. Bars: 95 % over prompts."
    answer.figure(Figure("sweep", svg, caption=caption, title="What is written"))


def _soft(answer: Answer, folder: Path) -> None:
    """Written prompts against learnt ones."""
    from pipelines.reporting.metrics import Estimate
    from pipelines.reporting.plots import forest

    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    points = [p for p in comparison["points"] if p.get("best") or p.get("whole")]
    off = max(abs(sum(p["seeds"]) / len(p["seeds"]) - p["value"]) for p in points)
    answer.check("Each system's accuracy is the mean of its seeds'", off, 0, 1e-9, "mean of the seeds' own accuracies")
    bars, rows = [], []
    for point in points:
        label = ("written: " if point["kind"] == "hard" else "") + point["label"].replace("_", " ")
        interval = Estimate(*(100 * point[key] for key in ("value", "low", "high")))
        bars.append((label, interval, point["kind"] == "learnt"))
        shown = f"{interval.value:.1f} % ({interval.low:.1f}–{interval.high:.1f})"
        rows.append([label, f"{point['trained']:,}", point["examples"], shown])
    best = max((p for p in points if p["kind"] == "learnt"), key=lambda point: point["value"])
    written = next(p for p in points if p["kind"] == "hard")
    answer.table(
        "soft", ["System", "trained parameters", "examples", "right"], rows, "95 % intervals over seeds and examples."
    )
    answer.value(written_accuracy=written["value"], learnt_accuracy=best["value"], learnt_parameters=best["trained"])
    answer.value(learnt_examples=best["examples"])
    svg = forest("soft", bars, "right answers, %", "accuracy of the best written prompt and of what was learnt")
    caption = "In colour: learnt by gradient descent. The written prompt was chosen in its favour."
    answer.figure(Figure("soft", svg, caption=caption, title="Written and learnt"))
