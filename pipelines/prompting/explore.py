"""Looking at what models write: a temperature sweep, "random" digits against chance, token probabilities."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipelines.config import INERT, StageConfig, as_plain, config
from pipelines.errors import Problem
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_fields import open_backend
from pipelines.prompting.hard import StrategyFields, prompts_of, questions
from pipelines.prompting.hard_asking import Answers, AskFields, Job, ask_all, check_fit, on_main
from pipelines.prompting.strategies import Strategy
from pipelines.prompting.tasks import Example, load_task

DIGITS = "digits"
GENERATOR = "generator"
"""The name under which numpy's random generator stands beside the models."""

LEAST_DIGITS = 50
"""What a test needs: five of each digit expected (Cochran 1954)."""


@config
class ExploreConfig(AskFields, StrategyFields, StageConfig):
    """Look at what models write, at several temperatures."""

    output_dir: str = Field("runs/explore", description="folder the stage writes into", json_schema_extra=INERT)
    strategies: list[str] | dict[str, dict[str, Any] | None] = Field(
        default_factory=lambda: ["few_shot"], description="the one strategy that is asked, as in the hard recipe"
    )
    max_examples: int | None = Field(32, ge=1, description="ask a random sample of at most so many examples")
    temperatures: list[float] = Field(
        default_factory=lambda: [0.0, 0.4, 0.8, 1.2, 1.6, 2.0],
        description="temperatures of the sweep; 0 takes the likeliest token",
    )
    samples: int = Field(8, ge=2, description="answers to each prompt at each temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampling: only the likeliest tokens with this probability")
    digits_prompt: str = Field(
        "Here is a list of 100 random digits: ", description="prompt after which digits are counted; empty: none are"
    )
    digits: int = Field(100, ge=10, description="digits of each list that are counted")
    digits_lists: int = Field(5, ge=1, description="lists that each model writes")
    digits_max_new_tokens: int = Field(
        300, ge=10, description="tokens of a list at most; the model's context may cut it"
    )
    digits_temperature: float = Field(1.0, gt=0, description="temperature of the lists")
    views: int = Field(3, ge=0, description="answers shown token by token, with probabilities; 0 shows none")
    view_prompts: list[str] = Field(
        default_factory=list, description="prompts that are shown so instead of the strategy's first ones"
    )
    alternatives: int = Field(5, ge=1, le=20, description="likeliest tokens that are shown at each place")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval of a mean")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if len(self.strategies) != 1:
            mend = "name one strategy"
            found.append(Problem("strategies", list(self.strategies), "a sweep asks exactly one", mend))
        if self.shots is not None and len(self.shots) != 1:
            found.append(Problem("shots", self.shots, "a sweep has one number of shots", "give one"))
        names = [temperature_name(t) for t in self.temperatures]
        for temperature in self.temperatures:
            if not 0 <= temperature <= 100:
                found.append(Problem("temperatures", temperature, "is no temperature", "give 0 to 100"))
        if not names or len(set(names)) < len(names):
            mend = "give different ones, to three digits"
            found.append(Problem("temperatures", self.temperatures, "is empty or names one twice", mend))
        if GENERATOR in self.names:
            found.append(Problem(f"models.{GENERATOR}", GENERATOR, "is what chance goes by", "give it another name"))
        return found


def temperature_name(temperature: float) -> str:
    """A temperature as part of a metric's name: ``0_8``."""
    return f"{temperature:.3g}".replace(".", "_").replace("-", "m").replace("+", "")


def diversity(texts: Sequence[str]) -> float:
    """(different texts − 1) / (texts − 1): 0 where all are alike, 1 where no two are."""
    return (len(set(texts)) - 1) / (len(texts) - 1)


def digits_of(text: str, count: int) -> list[int]:
    """The first ``count`` digits that stand in a text, one by one (a number of three digits is three)."""
    return [int(digit) for digit in re.findall(r"[0-9]", text)[:count]]


def chi_square(digits: Sequence[int]) -> tuple[float, float]:
    """Pearson's χ² of digits against equal shares, and the probability of so large a one by chance (9 degrees).

    Args:
        digits: at least ``LEAST_DIGITS``.
    """
    from scipy.stats import chisquare

    if len(digits) < LEAST_DIGITS:
        raise ValueError(f"χ² of {len(digits)} digits says nothing: at least {LEAST_DIGITS} are needed")
    found = chisquare(np.bincount(np.asarray(digits), minlength=10))
    return float(found.statistic), float(found.pvalue)


def explore(config: ExploreConfig) -> dict[str, float]:
    """Sweep the temperature, count digits, look at tokens.

    Writes ``sweep.json`` (for each model and temperature means with intervals and the answers to the first prompt),
    ``digits.json`` (for each model and for chance the counts, the test and the first list) and ``views.json`` (tokens
    with their probabilities and alternatives).

    Returns:
        For each model and temperature ``explore/MODEL/accuracy_tT``, ``valid_rate_tT`` and ``diversity_tT``, with
        intervals over prompts (of summaries no accuracy); ``explore/MODEL/digits``, ``digits_chi_square``,
        ``digits_p_value``, ``digits_repeat_rate``, the same of ``explore/generator``; ``explore/examples``.

    Raises:
        UserError: as the hard recipe; and an endpoint without log-probabilities while ``views`` is not 0.
    """
    from accelerate import PartialState

    from pipelines.stage import write_json

    task = load_task(config, ("train", config.split))
    examples = questions(config, task, config.split_seed)
    ((name, strategy),) = config.loaded_strategies().items()
    prompts = [prompt.text for prompt in prompts_of(strategy, examples, task.train, config, config.seed)]
    jobs = _sweep_jobs(config, strategy, prompts)
    check_fit(config, jobs)
    views = _views(config, strategy, config.view_prompts or prompts[: config.views]) if config.views else []
    answers = ask_all(config, config.output_dir, jobs)
    sweep, metrics = _sweep(config, examples, jobs, answers)
    counted: list[dict[str, Any]] = []
    if config.digits_prompt:
        lists = _digit_lists(config)
        counted = [_count_digits(model, some, config) for model, some in lists.items()]
        for entry in counted:
            metrics |= _digit_metrics(entry)
    if PartialState().is_main_process:
        folder = Path(config.output_dir)
        write_json(folder / "sweep.json", {"strategy": name, "prompt": prompts[0], "points": sweep})
        write_json(folder / "digits.json", {"prompt": config.digits_prompt, "models": counted})
        write_json(folder / "views.json", views)
    PartialState().wait_for_everyone()
    return metrics | {"explore/examples": float(len(examples))}


# --- temperature ------------------------------------------------------------------------------------------------------


def _sweep_jobs(config: ExploreConfig, strategy: Strategy, prompts: list[str]) -> list[Job]:
    tokens = strategy.max_new_tokens or config.max_new_tokens
    found = []
    for temperature in config.temperatures:
        top_p = config.top_p if temperature else 1.0
        sampling = Sampling(
            temperature=temperature, top_p=top_p, max_new_tokens=tokens, stop=strategy.stop, seed=config.seed
        )
        found.append(Job(f"t{temperature_name(temperature)}", prompts, sampling, samples=config.samples))
    return found


def _sweep(
    config: ExploreConfig,
    examples: Sequence[Example],
    jobs: Sequence[Job],
    answers: Mapping[tuple[str, str], Sequence[Answers]],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    from pipelines.prompting.scoring import judge_generation
    from pipelines.seq2seq.metrics import with_interval

    points, metrics = [], {}
    for model in config.names:
        for job in jobs:
            columns: dict[str, list[float]] = {"valid_rate": [], "diversity": []}
            if config.task != "summarization":
                columns["accuracy"] = []
            for example, some in zip(examples, answers[model, job.name], strict=True):
                here = [a for a in some if a.failure is None]
                verdicts = [judge_generation(a, example, config.task) for a in here]
                if len(here) > 1:
                    columns["diversity"].append(diversity([a.text for a in here]))
                if here:
                    columns["valid_rate"].append(float(np.mean([v.valid for v in verdicts])))
                if here and "accuracy" in columns:
                    columns["accuracy"].append(float(np.mean([v.right for v in verdicts])))
            first = [a.text for a in answers[model, job.name][0]]
            point: dict[str, Any] = {"model": model, "temperature": job.sampling.temperature, "answers": first}
            for name, values in columns.items():
                if values:
                    interval = with_interval(name, values, resamples=config.resamples, seed=config.seed)
                    point |= {key.replace("_ci_", "_"): value for key, value in interval.items()}
                    key = f"explore/{model}/{name}_{job.name}"
                    metrics |= {key + k.removeprefix(name): value for k, value in interval.items()}
            points.append(point)
    return points, metrics


# --- digits -----------------------------------------------------------------------------------------------------------


def _digit_lists(config: ExploreConfig) -> dict[str, list[str]]:
    """Model -> the lists that it wrote; and those of a generator, which are what chance looks like."""
    found: dict[str, list[str]] = {}
    for name in config.names:
        sampling = Sampling(
            temperature=config.digits_temperature,
            top_p=config.top_p,
            max_new_tokens=_digit_room(config, name),
            seed=config.seed,
        )
        job = Job(DIGITS, [config.digits_prompt], sampling, samples=config.digits_lists)
        (some,) = ask_all(config, config.output_dir, [job], names=[name])[name, DIGITS]
        found[name] = [a.text for a in some if a.failure is None]
    draw = np.random.default_rng(config.seed)
    found[GENERATOR] = [" ".join(map(str, draw.integers(0, 10, config.digits))) for _ in range(config.digits_lists)]
    return found


def _digit_room(config: ExploreConfig, name: str) -> int:
    """Tokens that a list may take: what is asked for, or what the model's context leaves."""
    from pipelines.prompting.backends_text import load_reader

    if name not in config.models:
        return config.digits_max_new_tokens
    reader = load_reader(config.models[name], f"models.{name}", name=name, chat=name in config.chat_models)
    (prompt,) = reader.prompts([config.digits_prompt], 1)
    if reader.room is None or reader.encodes:
        return config.digits_max_new_tokens
    return min(config.digits_max_new_tokens, reader.room - len(prompt))


def _count_digits(model: str, lists: Sequence[str], config: ExploreConfig) -> dict[str, Any]:
    """What the lists of one model hold: counts of each digit, the test, how often a digit repeats the one before."""
    each = [digits_of(text, config.digits) for text in lists]
    together = [digit for digits in each for digit in digits]
    counts = Counter(together)
    repeats = [a == b for digits in each for a, b in pairwise(digits)]
    entry: dict[str, Any] = {
        "model": model,
        "lists": len(each),
        "digits": len(together),
        "counts": [counts[digit] for digit in range(10)],
        "repeats": sum(repeats),
        "pairs": len(repeats),
        "first": lists[0] if lists else "",
    }
    if len(together) >= LEAST_DIGITS:
        entry["chi_square"], entry["p_value"] = chi_square(together)
    return entry


def _digit_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    from pipelines.seq2seq.metrics import wilson_interval

    prefix = f"explore/{entry['model']}/digits"
    found = {prefix: float(entry["digits"])}
    if entry["pairs"]:
        mean = entry["repeats"] / entry["pairs"]
        low, high = wilson_interval(mean, entry["pairs"])
        found |= {f"{prefix}_repeat_rate": mean}
        found |= {f"{prefix}_repeat_rate_ci_low": low, f"{prefix}_repeat_rate_ci_high": high}
    if "chi_square" in entry:
        found |= {f"{prefix}_chi_square": entry["chi_square"], f"{prefix}_p_value": entry["p_value"]}
    return found


# --- tokens -----------------------------------------------------------------------------------------------------------


def _views(config: ExploreConfig, strategy: Strategy, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The likeliest answer of each model to each prompt, token by token."""
    tokens = strategy.max_new_tokens or config.max_new_tokens
    sampling = Sampling(max_new_tokens=tokens, stop=strategy.stop, seed=config.seed)

    def work() -> list[dict[str, Any]]:
        found = []
        for name in config.names:
            rows = open_backend(config, name).token_probabilities(prompts, sampling, alternatives=config.alternatives)
            for prompt, row in zip(prompts, rows, strict=True):
                found.append({"model": name, "prompt": prompt, "tokens": [as_plain(token) for token in row]})
        return found

    return on_main(work)
